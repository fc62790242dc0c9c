/* What attention multiplies on matrix tiles (Intel's AMX): a bfloat16 as it is, which is one plane, or a float32 as its
 * three pieces, which are three (pieces.h). A tile is 16 rows of 64 bytes in one place, so that loading it touches no two
 * lines of one set of the first-level cache.
 *
 * A left tile is [16, 32] of bfloat16, its depth along the row. A right one is [16, 16] of pairs of bfloat16, two that
 * follow each other in depth; its transposed words are a left tile. Both stand as [tile across, step of depth, plane].
 * `half`, which says whether values are bfloat16, is a constant wherever these functions are called. */

#ifndef LORA_PLANES_H
#define LORA_PLANES_H

#include "pieces.h"
#include "tiles.h"

#if defined(__AMX_BF16__) && defined(__AVX512BF16__) && defined(__linux__)
#define PLANES_FIT 1

#define SPOT 512         /* values of a left tile */
#define PAIRS (SPOT / 2) /* words of a right one, and sums of a product's */

typedef uint16_t wvec __attribute__((vector_size(64)));

INLINE int64_t planes_of(int half) { return half ? 1 : PIECES; }

/* The upper halves of sixteen words, and of the next sixteen. */
INLINE uvec beside(uvec first, uvec second) {
    const wvec upper = {1,  3,  5,  7,  9,  11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31,
                        33, 35, 37, 39, 41, 43, 45, 47, 49, 51, 53, 55, 57, 59, 61, 63};
    return (uvec)__builtin_shuffle((wvec)first, (wvec)second, upper);
}

/* Two rows of 32 bfloat16s as sixteen pairs of one with the other: of the left halves, and of the right ones. */
INLINE uvec woven(uvec one, uvec other, int right) {
    const wvec first = {0, 32, 1, 33, 2,  34, 3,  35, 4,  36, 5,  37, 6,  38, 7,  39,
                        8, 40, 9, 41, 10, 42, 11, 43, 12, 44, 13, 45, 14, 46, 15, 47};
    return (uvec)__builtin_shuffle((wvec)one, (wvec)other, right ? first + 16 : first);
}

/* The planes of 32 values that follow each other. */
INLINE void narrow(int half, vec first, vec second, uvec planes[PIECES]) {
    if (half) {
        planes[0] = (uvec)_mm512_cvtne2ps_pbh((__m512)second, (__m512)first);
        return;
    }
    uvec one[PIECES], other[PIECES];
    pieces_of(first, one);
    pieces_of(second, other);
    for (int p = 0; p < PIECES; p++) planes[p] = beside(one[p], other[p]);
}

INLINE void put_words(uvec words, void *to) { *(vec_at *)to = (vec)words; }

/* Rows [count, size] as left tiles of 16 rows, as right tiles of pairs of rows, or both; 0 from `count` to the end of a
 * step of 32 rows. `steps`: of such, from one right tile to the next. */
INLINE void pack(int half, const void *from, int64_t stride, int64_t count, int64_t size, uint16_t *rows, uint32_t *pairs,
                 int64_t steps) {
    const int64_t planes = planes_of(half), depth = size / DEPTH;
    for (int64_t t = 0; t < whole(count, DEPTH); t += 2)
        for (int64_t e = 0; e < size; e += DEPTH) {
            uvec words[2][PIECES] = {0};
            for (int i = 0; i < 2; i++) {
                const void *row = row_of(from, t + i, stride, half);
                if (t + i >= count) continue;
                if (half) words[i][0] = (uvec)load((const uint16_t *)row + e, 0, 0);
                else narrow(0, load(row, e, 0), load(row, e + WIDTH, 0), words[i]);
            }
            const int64_t left = (t / TILE * depth + e / DEPTH) * planes * SPOT + t % TILE * DEPTH;
            const int64_t right = (e / TILE * steps + t / DEPTH) * planes * PAIRS + t % DEPTH / 2 * TILE;
            for (int p = 0; p < planes; p++) {
                for (int i = 0; rows && i < 2; i++) put_words(words[i][p], rows + left + p * SPOT + i * DEPTH);
                for (int i = 0; pairs && i < 2; i++)
                    put_words(woven(words[0][p], words[1][p], i), pairs + right + (i * steps * planes + p) * PAIRS);
            }
        }
}

/* Rows [count, size] as right tiles of pairs along a row; 0 from `count` to the end of a tile. */
INLINE void pack_along(int half, const void *from, int64_t stride, int64_t count, int64_t size, uint32_t *to) {
    const int64_t words = half ? size / 2 : size;
    for (int64_t t = 0; t < count; t += TILE)
        for (int64_t e = 0; e < words; e += TILE) {
            vec rows[TILE] = {0};
            const float *at = (const float *)row_of(from, t, stride, half) + e;
            const int64_t row = half ? stride / 2 : stride;
            if (count - t >= TILE) {
                _Pragma("GCC unroll 16") for (int r = 0; r < TILE; r++) rows[r] = load(at + r * row, 0, 0);
            } else {
                for (int64_t r = 0; r < count - t; r++) rows[r] = load(at + r * row, 0, 0);
            }
            turn(rows);
            if (half) {
                for (int r = 0; r < TILE; r++, to += TILE) put_words((uvec)rows[r], to);
                continue;
            }
            for (int r = 0; r < TILE; r += 2, to += TILE) {
                uvec even[PIECES], odd[PIECES];
                pieces_of(rows[r], even);
                pieces_of(rows[r + 1], odd);
                for (int p = 0; p < PIECES; p++) put_words(even[p] >> 16 | (odd[p] & 0xffff0000u), to + p * PAIRS);
            }
            if (e % DEPTH) to += (PIECES - 1) * PAIRS; /* two times sixteen of depth make a tile */
        }
}

/* Tiles with their words transposed. */
INLINE void turn_tiles(int64_t count, uint32_t *tiles) {
    for (; count > 0; count--, tiles += PAIRS) transpose((float *)tiles, TILE, (float *)tiles, TILE);
}

/* Which of two by two tiles a product makes; those across the diagonal from what's left out see nothing. */
enum { FIRST = 1, UPPER = 3, LEFT = 5, NOT_LOWER_LEFT = 11, NOT_UPPER_RIGHT = 13, ALL = 15 };

/* A left and a right side: from one tile across to the next, and steps of depth. */
typedef struct {
    const uint16_t *left;
    const uint32_t *right;
    int64_t left_next, right_next, steps;
} Sides;

/* sums, one to four tiles, (+)= left right. `down` and `across`: from a tile of the sums to those beside it. */
INLINE void multiply(int half, int which, const Sides *sides, float *sums, int64_t down, int64_t across, int fresh) {
    const uint16_t *a = sides->left, *a_next = a + sides->left_next;
    const uint32_t *b = sides->right, *b_next = b + sides->right_next;
#define EACH(what)                                                                                          \
    do {                                                                                                    \
        what(0, 1, 0, 4, 6);                                                                                \
        what(1, 2, across, 4, 7);                                                                           \
        what(2, 4, down, 5, 6);                                                                             \
        what(3, 8, down + across, 5, 7);                                                                    \
    } while (0)
#define CLEAR(n, bit, at, a, b) if (which & bit) _tile_zero(n)
#define FETCH(n, bit, at, a, b) if (which & bit) _tile_loadd(n, sums + (at), 64)
#define KEEP(n, bit, at, a, b) if (which & bit) _tile_stored(n, sums + (at), 64)
#define ADD(n, bit, at, a, b) if (which & bit) _tile_dpbf16ps(n, a, b)
#define ROWS_OF(p)                                                                                          \
    do {                                                                                                    \
        _tile_loadd(4, a + p * SPOT, 64);                                                                   \
        if (which & 12) _tile_loadd(5, a_next + p * SPOT, 64);                                              \
    } while (0)
#define COLUMNS_OF(p)                                                                                       \
    do {                                                                                                    \
        _tile_loadd(6, b + p * PAIRS, 64);                                                                  \
        if (which & 10) _tile_loadd(7, b_next + p * PAIRS, 64);                                             \
    } while (0)
    if (fresh) EACH(CLEAR);
    else EACH(FETCH);
    for (int64_t step = 0; step < sides->steps; step++) {
        ROWS_OF(0);
        if (!half) { /* from the smallest products to the largest, each change with two loads */
            COLUMNS_OF(2);
            EACH(ADD);
            COLUMNS_OF(1);
            EACH(ADD);
            ROWS_OF(1);
            EACH(ADD);
            COLUMNS_OF(0);
            EACH(ADD);
            ROWS_OF(2);
            EACH(ADD);
            ROWS_OF(0);
        } else {
            COLUMNS_OF(0);
        }
        EACH(ADD);
        a += planes_of(half) * SPOT, a_next += planes_of(half) * SPOT;
        b += planes_of(half) * PAIRS, b_next += planes_of(half) * PAIRS;
    }
    EACH(KEEP);
}

/* e^x where `seen` has a bit, else 0, as `exponential_vec`; for a bfloat16 to 1e-4. */
INLINE vec exponential_seen(int half, __mmask16 seen, vec x) {
    seen = _mm512_mask_cmp_ps_mask(seen, (__m512)x, _mm512_set1_ps(-87.0f), _CMP_NLT_UQ);
    vec shifted = x * 1.44269504088896341f + 12582912.0f, n = shifted - 12582912.0f, p;
    if (half) {
        vec r = x - n * 0.693147180559945309f;
        p = ((r * 0.165179744f + 0.50413038f) * r + 1.00019584f) * r + 1.0f;
    } else {
        vec r = x - n * 0.693359375f;
        r = r + n * 2.12194440e-4f;
        p = r * 1.9875691500e-4f + 1.3981999507e-3f;
        p = p * r + 8.3334519073e-3f;
        p = p * r + 4.1665795894e-2f;
        p = p * r + 1.6666665459e-1f;
        p = p * r + 5.0000001201e-1f;
        p = p * (r * r) + r + 1.0f;
    }
    return (vec)_mm512_maskz_scalef_ps(seen, (__m512)p, (__m512)n);
}

/* One value for each of sixteen vectors: their sums, or their largest. */
#define REDUCE(name, both)                                                                                  \
    INLINE vec name(vec rows[TILE]) {                                                                       \
        FOLD(8, both)                                                                                       \
        FOLD(4, both)                                                                                       \
        FOLD(2, both)                                                                                       \
        FOLD(1, both)                                                                                       \
        return rows[0];                                                                                     \
    }
#define FOLD(w, both)                                                                                       \
    _Pragma("GCC unroll 8") for (int r = 0; r < w; r++) {                                                   \
        const ivec upper = OF_ALL(UPPER_OF, w), lower = OF_ALL(LOWER_OF, w);                                \
        vec one = __builtin_shuffle(rows[r], rows[r + w], upper);                                           \
        vec other = __builtin_shuffle(rows[r], rows[r + w], lower);                                         \
        rows[r] = both(one, other);                                                                         \
    }
#define LARGER(a, b) ((vec)_mm512_max_ps((__m512)(a), (__m512)(b)))
#define SUM(a, b) ((a) + (b))
REDUCE(largest_of_each, LARGER)
REDUCE(sum_of_each, SUM)

/* 32 values of a row of the caller's. */
INLINE void put_row(int half, void *row, int64_t index, vec first, vec second) {
    if (half) {
        uvec words[PIECES];
        narrow(1, first, second, words);
        put_words(words[0], (uint16_t *)row + index);
    } else {
        store(row, index, first, 0);
        store(row, index + WIDTH, second, 0);
    }
}

#endif
#endif
