/* Both sides of a product in the very tiles that are multiplied: 16 rows of 64 bytes each, one behind the other, so that
 * loading one touches sixteen cache lines and no more. bfloat16 as it is, in one plane; float32 in three, its pieces. A
 * block is 32 rows by 32 columns, and a step is 32 of the depth. */

#ifndef LORA_PACKED_H
#define LORA_PACKED_H

#include "pieces.h"
#include "tiles.h"

#if defined(__AMX_BF16__) && defined(__linux__)

#define SIDE 32
#define PLANES(half) ((half) ? 1 : PIECES)
#define STEP(half) (PLANES(half) * SIDE * DEPTH / 2) /* words of one side's step: a plane is two tiles */
#define TILE_WORDS (TILE * TILE)

typedef uint16_t wide_hvec __attribute__((vector_size(64)));

#define ODD(i) 2 * (i) + 1
#define ODDS(i) ODD(i), ODD(i + 1), ODD(i + 2), ODD(i + 3), ODD(i + 4), ODD(i + 5), ODD(i + 6), ODD(i + 7)

/* The upper halves of 32 words. */
INLINE wide_hvec uppers(uvec first, uvec second) {
    const wide_hvec odd = {ODDS(0), ODDS(8), ODDS(16), ODDS(24)};
    return __builtin_shuffle((wide_hvec)first, (wide_hvec)second, odd);
}

/* 32 values of a row as one row of a tile, in each plane; a plane is two tiles after the one before. */
INLINE void put_planes(vec first, vec second, int half, uint32_t *row) {
    if (half) {
#ifdef __AVX512BF16__
        *(__m512bh *)(void *)row = _mm512_cvtne2ps_pbh((__m512)second, (__m512)first);
#else
        *(wide_hvec *)row = uppers(rounded_bits(first), rounded_bits(second));
#endif
        return;
    }
    uvec ones[PIECES], others[PIECES];
    pieces_of(first, ones);
    pieces_of(second, others);
    for (int p = 0; p < PIECES; p++) *(wide_hvec *)(row + p * 2 * TILE_WORDS) = uppers(ones[p], others[p]);
}

/* 32 rows of the left side, of which `count` are there: [depth / 32][planes][2 tiles]. */
INLINE void pack_left(const void *from, int64_t count, int64_t depth, int half, uint32_t *to) {
    for (int64_t r = 0; r < SIDE; r++) {
        uint32_t *row = to + r * TILE;
        const void *values = row_of(from, r, depth, half);
        for (int64_t k = 0; k < depth; k += DEPTH, row += STEP(half)) {
            const vec none = {0};
            if (r >= count) put_planes(none, none, half, row);
            else if (half) memcpy(row, (const uint16_t *)values + k, 64);
            else put_planes(load(values, k, 0), load(values, k + WIDTH, 0), 0, row);
        }
    }
}

/* 32 rows of W as the right side of x W': a tile is its left one with pairs across the diagonal. */
INLINE void pack_along(const void *from, int64_t count, int64_t depth, int half, uint32_t *to) {
    pack_left(from, count, depth, half, to);
    for (uint32_t *tile = to, *end = to + depth / DEPTH * STEP(half); tile < end; tile += TILE_WORDS)
        transpose((const float *)(const void *)tile, TILE, (float *)(void *)tile, TILE);
}

/* 32 rows of W as one step of the right side of g W: for each 32 columns [planes][2 tiles], `apart` words from one such
 * step to the next. */
INLINE void pack_rows(const void *from, int64_t count, int64_t columns, int half, uint32_t *to, int64_t apart) {
    for (int64_t r = 0; r < SIDE; r += 2) {
        const void *even = row_of(from, r, columns, half), *odd = row_of(from, r + 1, columns, half);
        for (int64_t c = 0; c < columns; c += WIDTH) {
            const vec none = {0};
            uvec ones[PIECES], others[PIECES];
            vec one = r < count ? load(even, c, half) : none, other = r + 1 < count ? load(odd, c, half) : none;
            if (half) ones[0] = (uvec)one, others[0] = (uvec)other;
            else pieces_of(one, ones), pieces_of(other, others);
            uint32_t *row = to + c / SIDE * apart + (c & WIDTH ? TILE_WORDS : 0) + r / 2 * TILE;
            for (int p = 0; p < PLANES(half); p++) *(uvec *)(row + p * 2 * TILE_WORDS) = ones[p] >> 16 | others[p];
        }
    }
}

/* GCC's tile loads are assembly that says nothing of memory: what was stored before them must not come after. */
#define STORED() __asm__ volatile("" ::: "memory")

/* Tiles 4 and 5 are the left side's rows, 6 and 7 the right one's columns. */
#define LEFT(p)                                           \
    _tile_loadd(4, a + (p) * 2 * TILE_WORDS, 64);         \
    _tile_loadd(5, a + ((p) * 2 + 1) * TILE_WORDS, 64);
#define RIGHT(p)                                          \
    _tile_loadd(6, b + (p) * 2 * TILE_WORDS, 64);         \
    _tile_loadd(7, b + ((p) * 2 + 1) * TILE_WORDS, 64);
#define TIMES()              \
    _tile_dpbf16ps(0, 4, 6); \
    _tile_dpbf16ps(1, 4, 7); \
    _tile_dpbf16ps(2, 5, 6); \
    _tile_dpbf16ps(3, 5, 7);

/* Tiles 0 to 3, a block, += left right. Of float32 the smallest products come first. */
INLINE void times(int64_t steps, const uint32_t *a, const uint32_t *b, int half) {
    STORED();
    for (int64_t k = 0; k < steps; k++, a += STEP(half), b += STEP(half)) {
        LEFT(0)
        if (half) {
            RIGHT(0) TIMES()
            continue;
        }
        RIGHT(2) TIMES()
        RIGHT(1) TIMES()
        LEFT(1) TIMES()
        RIGHT(0) TIMES()
        LEFT(2) TIMES()
        LEFT(0) TIMES()
    }
}

INLINE void clear_block(void) {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
}

/* A block that lies as its four tiles. */
INLINE void load_block(const float *from) {
    STORED();
    _tile_loadd(0, from, 64);
    _tile_loadd(1, from + TILE_WORDS, 64);
    _tile_loadd(2, from + 2 * TILE_WORDS, 64);
    _tile_loadd(3, from + 3 * TILE_WORDS, 64);
}

INLINE void store_block(float *to) {
    _tile_stored(0, to, 64);
    _tile_stored(1, to + TILE_WORDS, 64);
    _tile_stored(2, to + 2 * TILE_WORDS, 64);
    _tile_stored(3, to + 3 * TILE_WORDS, 64);
}

/* The same as 32 rows, `stride` floats from one to the next. */
INLINE void store_rows(float *to, int64_t stride) {
    _tile_stored(0, to, stride * 4);
    _tile_stored(1, to + TILE, stride * 4);
    _tile_stored(2, to + TILE * stride, stride * 4);
    _tile_stored(3, to + TILE * stride + TILE, stride * 4);
}

#endif
#endif
