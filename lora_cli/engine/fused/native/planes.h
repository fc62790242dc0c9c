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

/* A step of depth is 32 values in sixteen pairs, of neighbours in bfloat16; of a float32, the pairs are of one value and
 * the sixteenth after it, which takes no shuffling: shuffles run on the very port that tiles keep busy. */
INLINE int64_t first_of(int half, int64_t pair) { return half ? 2 * pair : pair; }
INLINE int64_t second_of(int half, int64_t pair) { return half ? 2 * pair + 1 : pair + TILE; }

/* `pieces_of` with the first cut off like the others; for one side of a product, that of the other being rounded. */
INLINE void cut_pieces_of(vec value, uvec pieces[PIECES]) {
    pieces[0] = (uvec)value & 0xffff0000u;
    vec rest = value - (vec)pieces[0];
    pieces[1] = (uvec)rest & 0xffff0000u;
    pieces[2] = (uvec)(rest - (vec)pieces[1]);
}

/* Two pieces as a pair. */
INLINE uvec joined(uvec first, uvec second) {
    return (uvec)_mm512_mask_blend_epi16(0xaaaaaaaau, (__m512i)(first >> 16), (__m512i)second);
}

/* Two rows of bfloat16s as pairs of one with the other: of the left halves, and of the right ones. */
INLINE uvec woven(uvec one, uvec other, int right) {
    const wvec first = {0, 32, 1, 33, 2,  34, 3,  35, 4,  36, 5,  37, 6,  38, 7,  39,
                        8, 40, 9, 41, 10, 42, 11, 43, 12, 44, 13, 45, 14, 46, 15, 47};
    return (uvec)__builtin_shuffle((wvec)one, (wvec)other, right ? first + 16 : first);
}

/* The planes of a row of 32 values, in pairs along it; cut off. */
INLINE void planes_of_row(int half, vec first, vec second, uvec row[PIECES]) {
    if (half) {
        row[0] = (uvec)_mm512_cvtne2ps_pbh((__m512)second, (__m512)first);
        return;
    }
    uvec one[PIECES], other[PIECES];
    cut_pieces_of(first, one);
    cut_pieces_of(second, other);
    for (int p = 0; p < PIECES; p++) row[p] = joined(one[p], other[p]);
}

/* Of two rows of 32 values, which are a pair in depth themselves: the planes of each row, in pairs along it, and those of
 * each half of both, in pairs of the rows. */
INLINE void planes_of_two(int half, int cut, vec values[2][2], uvec rows[2][PIECES], uvec pairs[2][PIECES]) {
    if (half) {
        for (int i = 0; i < 2; i++) planes_of_row(1, values[i][0], values[i][1], rows[i]);
        for (int i = 0; i < 2; i++) pairs[i][0] = woven(rows[0][0], rows[1][0], i);
        return;
    }
    uvec pieces[2][2][PIECES];
    for (int i = 0; i < 2; i++)
        for (int j = 0; j < 2; j++)
            if (cut) cut_pieces_of(values[i][j], pieces[i][j]);
            else pieces_of(values[i][j], pieces[i][j]);
    for (int p = 0; p < PIECES; p++)
        for (int i = 0; i < 2; i++) {
            rows[i][p] = joined(pieces[i][0][p], pieces[i][1][p]);
            pairs[i][p] = joined(pieces[0][i][p], pieces[1][i][p]);
        }
}

INLINE void put_words(uvec words, void *to) { *(vec_at *)to = (vec)words; }

/* Rows that will be read, or written, soon: a head's are apart, which no prefetcher sees. They are asked for a few at a
 * time, beside what is computed meanwhile. */
typedef struct {
    const void *read[3], *written;
    int64_t read_stride[3], written_stride, done, count, each;
} Ahead;

INLINE void look_ahead(int half, Ahead *a, int64_t size) {
    const int64_t end = least(a->count, a->done + a->each), bytes = size * (half ? 2 : 4);
    for (; a->done < end; a->done++)
        for (int64_t at = 0; at < bytes; at += 64) {
            for (int i = 0; i < 3; i++)
                if (a->read[i]) __builtin_prefetch((const char *)row_of(a->read[i], a->done, a->read_stride[i], half) + at);
            if (a->written)
                __builtin_prefetch((const char *)row_of(a->written, a->done, a->written_stride, half) + at, 1);
        }
}

/* Rows [count, size], times `factor` if they are float32, as left tiles of 16 rows, as right tiles of pairs of rows, or
 * both; 0 from `count` to the end of a step of 32 rows. `steps`: of such, from one right tile to the next. */
INLINE void pack(int half, const void *from, int64_t stride, int64_t count, int64_t size, float factor, uint16_t *rows,
                 uint32_t *pairs, int64_t steps) {
    const int64_t planes = planes_of(half), depth = size / DEPTH;
    for (int64_t n = 0; n < whole(count, DEPTH) / 2; n++)
        for (int64_t e = 0; e < size; e += DEPTH) {
            const int64_t step = n / TILE, at[2] = {step * DEPTH + first_of(half, n % TILE),
                                                    step * DEPTH + second_of(half, n % TILE)};
            vec values[2][2] = {0};
            uvec words[2][PIECES] = {0}, pair[2][PIECES] = {0};
            for (int i = 0; i < 2; i++) {
                const void *row = row_of(from, at[i], stride, half);
                if (at[i] >= count) continue;
                if (half) words[i][0] = (uvec)load((const uint16_t *)row + e, 0, 0);
                else values[i][0] = load(row, e, 0) * factor, values[i][1] = load(row, e + WIDTH, 0) * factor;
            }
            if (half) pair[0][0] = woven(words[0][0], words[1][0], 0), pair[1][0] = woven(words[0][0], words[1][0], 1);
            else planes_of_two(0, 0, values, words, pair);
            const int64_t right = (e / TILE * steps + step) * planes * PAIRS + n % TILE * TILE;
            for (int p = 0; p < planes; p++)
                for (int i = 0; i < 2; i++) {
                    const int64_t left = ((at[i] / TILE * depth + e / DEPTH) * planes + p) * SPOT + at[i] % TILE * DEPTH;
                    if (rows) put_words(words[i][p], rows + left);
                    if (pairs) put_words(pair[i][p], pairs + right + (i * steps * planes + p) * PAIRS);
                }
        }
}

/* Sixteen rows from `from` on, `stride` words apart, of which `count` are there; transposed. */
INLINE void fetch_turned(const float *from, int64_t stride, int64_t count, vec rows[TILE]) {
    if (count >= TILE) {
        _Pragma("GCC unroll 16") for (int r = 0; r < TILE; r++) rows[r] = load(from + r * stride, 0, 0);
    } else {
        for (int64_t r = 0; r < TILE; r++) rows[r] = r < count ? load(from + r * stride, 0, 0) : (vec){0};
    }
    turn(rows);
}

/* Rows [count, size], times `factor` if they are float32, as right tiles of pairs along a row; 0 from `count` to the end
 * of a tile. */
INLINE void pack_along(int half, const void *from, int64_t stride, int64_t count, int64_t size, float factor,
                       uint32_t *to) {
    for (int64_t t = 0; t < count; t += TILE)
        for (int64_t e = 0; e < size; e += DEPTH, to += planes_of(half) * PAIRS) {
            const float *at = row_of(row_of(from, t, stride, half), e, 1, half);
            vec rows[2][TILE];
            fetch_turned(at, half ? stride / 2 : stride, count - t, rows[0]);
            if (!half) fetch_turned(at + TILE, stride, count - t, rows[1]);
            for (int r = 0; r < TILE; r++) {
                if (half) {
                    put_words((uvec)rows[0][r], to + r * TILE);
                    continue;
                }
                uvec one[PIECES], other[PIECES];
                pieces_of(rows[0][r] * factor, one);
                pieces_of(rows[1][r] * factor, other);
                for (int p = 0; p < PIECES; p++) put_words(joined(one[p], other[p]), to + p * PAIRS + r * TILE);
            }
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

/* What vector units do meanwhile: a product on tiles keeps them waiting, and a core sees too few instructions ahead to
 * find other work by itself. So a part of it stands after every four products of tiles. */
typedef void Meanwhile(void *work);

/* sums, one to four tiles, (+)= left right. `down` and `across`: from a tile of the sums to those beside it. */
INLINE void multiply(int half, int which, const Sides *sides, float *sums, int64_t down, int64_t across, int fresh,
                     Meanwhile *meanwhile, void *work) {
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
#define ADD_ALL                                                                                             \
    do {                                                                                                    \
        EACH(ADD);                                                                                          \
        if (meanwhile) meanwhile(work);                                                                     \
    } while (0)
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
            ADD_ALL;
            COLUMNS_OF(1);
            ADD_ALL;
            ROWS_OF(1);
            ADD_ALL;
            COLUMNS_OF(0);
            ADD_ALL;
            ROWS_OF(2);
            ADD_ALL;
            ROWS_OF(0);
        } else {
            COLUMNS_OF(0);
        }
        ADD_ALL;
        a += planes_of(half) * SPOT, a_next += planes_of(half) * SPOT;
        b += planes_of(half) * PAIRS, b_next += planes_of(half) * PAIRS;
    }
    EACH(KEEP);
}

#endif
#endif
