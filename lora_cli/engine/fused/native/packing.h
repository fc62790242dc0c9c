/* Putting rows and matrices in the order of panels.h: values as pieces, rows as left blocks, matrices as right panels;
 * and the memory that it takes. */

#ifndef LORA_PACKING_H
#define LORA_PACKING_H

#include "panels.h"

#ifdef TILES

/* Sixteen values, in the upper halves of words, as pieces; `exact` are bfloat16s already. */
INLINE void split(int pieces, int exact, vec v, uvec to[PIECES]) {
    if (pieces == PIECES) pieces_of(v, to);
    else to[0] = exact ? (uvec)v : rounded_bits(v) & 0xffff0000u;
}

INLINE hvec upper_half(uvec v) { return __builtin_convertvector(v >> 16, hvec); }

/* Where a value stands in a row of left blocks; pieces are LEFT apart. */
INLINE uint16_t *left_at(int pieces, uint16_t *left, int64_t steps, int64_t row, int64_t column) {
    return left + ((row >> 5) * steps + (column >> 5)) * pieces * LEFT + (row & 31) * WIDE + (column & 31);
}

/* Values `column` to `column` + 15 of a row of left blocks. */
INLINE void put_left(int pieces, uint16_t *left, int64_t steps, int64_t row, int64_t column, vec v) {
    uvec found[PIECES];
    split(pieces, 0, v, found);
    left = left_at(pieces, left, steps, row, column);
    for (int p = 0; p < pieces; p++) *(hvec_at *)(left + p * LEFT) = upper_half(found[p]);
}

typedef uint16_t rowvec __attribute__((vector_size(64)));
typedef uint16_t rowvec_at __attribute__((vector_size(64), aligned(2), may_alias));

/* 32 values as a row of a tile in each piece, which are `piece` values apart. */
INLINE void put_step(int pieces, int exact, vec first, vec second, uint16_t *to, int64_t piece) {
    const rowvec uppers = {1,  3,  5,  7,  9,  11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31,
                           33, 35, 37, 39, 41, 43, 45, 47, 49, 51, 53, 55, 57, 59, 61, 63};
    uvec one[PIECES], other[PIECES];
#ifdef __AVX512BF16__
    if (pieces == 1 && !exact) { /* denormals become 0, as tiles take them */
        *(rowvec_at *)to = (rowvec)_mm512_cvtne2ps_pbh((__m512)second, (__m512)first);
        return;
    }
#endif
    split(pieces, exact, first, one), split(pieces, exact, second, other);
    for (int p = 0; p < pieces; p++)
        *(rowvec_at *)(to + p * piece) = __builtin_shuffle((rowvec)one[p], (rowvec)other[p], uppers);
}

/* A whole step of a row of left blocks, values `column` to `column` + 31. */
INLINE void put_wide(int pieces, uint16_t *left, int64_t steps, int64_t row, int64_t column, vec first, vec second) {
    if (pieces == 1) {
        put_step(1, 0, first, second, left_at(1, left, steps, row, column), LEFT);
        return;
    }
    put_left(pieces, left, steps, row, column, first);
    put_left(pieces, left, steps, row, column + WIDTH, second);
}

/* Values `index` to `index` + 15 of a row of `width`, or zeros where it has ended. */
INLINE vec load_or_0(const void *row, int64_t index, int64_t width, int half) {
    return index < width ? load(row, index, half) : (vec){0};
}

/* A row of bfloat16 or float32, with zeros up to a whole step. */
INLINE void put_row(int pieces, uint16_t *left, int64_t steps, int64_t r, const void *from, int64_t width, int half) {
    for (int64_t c = 0; c < width; c += WIDE) {
        if (pieces == 1 && half && c + WIDE <= width)
            memcpy(left_at(1, left, steps, r, c), (const uint16_t *)from + c, WIDE * 2);
        else put_wide(pieces, left, steps, r, c, load(from, c, half), load_or_0(from, c + WIDTH, width, half));
    }
}

/* A matrix of 16-wide columns, bfloat16 or float32, plus b a where it has one: b [rows, rank], a [rank, columns]. */
typedef struct {
    const void *at;
    int half;
    int64_t rows, columns, rank;
    const float *b, *a;
} Matrix;

/* [16, 16] of the matrix from a row and a column on; 0 where there is none. */
INLINE void square(const Matrix *m, int64_t row, int64_t column, vec to[TILE]) {
    int64_t rows = column < m->columns ? least(TILE, m->rows - row) : 0;
    for (int64_t r = 0; r < TILE; r++) {
        const void *from = row_of(m->at, row + r, m->columns, m->half);
        to[r] = r >= rows ? (vec){0} : m->half ? load(from, column, 1) : load(from, column, 0);
    }
    if (rows < 1) return;
    for (int64_t k = 0; k < m->rank; k += TILE) {
        vec a[TILE]; /* stays in registers */
        _Pragma("GCC unroll 16") for (int j = 0; j < TILE; j++) a[j] = load(m->a + (k + j) * m->columns, column, 0);
        for (int64_t r = 0; r < rows; r++) {
            const float *b = m->b + (row + r) * m->rank + k;
            vec v = to[r], more = {0};
            _Pragma("GCC unroll 8") for (int j = 0; j < TILE; j += 2) v += b[j] * a[j], more += b[j + 1] * a[j + 1];
            to[r] = v + more;
        }
    }
}

/* 32 rows of 32 bfloat16s, `row` apart, as a step of a right panel that is summed over these rows; of a left block's it is
 * one piece. */
INLINE void pair_block(const uint16_t *from, int64_t row, uint32_t *panel) {
    const rowvec first = {0, 32, 1, 33, 2, 34, 3, 35, 4, 36, 5, 37, 6, 38, 7, 39,
                          8, 40, 9, 41, 10, 42, 11, 43, 12, 44, 13, 45, 14, 46, 15, 47};
    for (int64_t j = 0; j < WIDE / 2; j++, from += 2 * row, panel += TILE) {
        rowvec even = *(const rowvec_at *)from, odd = *(const rowvec_at *)(from + row);
        *(rowvec_at *)(void *)panel = __builtin_shuffle(even, odd, first);
        *(rowvec_at *)(void *)(panel + RIGHT / 2) = __builtin_shuffle(even, odd, first + 16);
    }
}

/* Whether [32, 32] from a row and a column on is there; `exact`: of bfloat16s as they stand, which needn't be taken apart. */
INLINE int is_plain(int exact, const Matrix *m, int64_t row, int64_t column) {
    return exact && row + WIDE <= m->rows && column + WIDE <= m->columns;
}

/* Tiles are written row by row, as a left side's are, and turned in their place. */
INLINE void pack_along(int pieces, int exact, const Matrix *m, int64_t panel, uint32_t *to) {
    vec values[2][TILE];
    for (int64_t s = 0; s < wides(m->columns); s++, to += pieces * RIGHT)
        for (int64_t h = 0; h < 2; h++) {
            uint32_t *half = to + h * RIGHT / 2;
            if (is_plain(exact, m, panel * WIDE, s * WIDE)) {
                const void *from = row_of(m->at, (panel * WIDE + h * TILE) * m->columns + s * WIDE, 1, 1);
                transpose(from, m->columns / 2, (float *)(void *)half, TILE);
                continue;
            }
            for (int64_t c = 0; c < 2; c++) square(m, panel * WIDE + h * TILE, s * WIDE + c * WIDTH, values[c]);
            for (int64_t r = 0; r < TILE; r++)
                put_step(pieces, exact, values[0][r], values[1][r], (uint16_t *)(half + r * TILE), LEFT);
            for (int p = 0; p < pieces; p++, half += RIGHT)
                transpose((const float *)(const void *)half, TILE, (float *)(void *)half, TILE);
        }
}

INLINE void pack_down(int pieces, int exact, const Matrix *m, int64_t panel, uint32_t *to) {
    vec values[TILE];
    for (int64_t s = 0; s < wides(m->rows); s++, to += pieces * RIGHT) {
        if (is_plain(exact, m, s * WIDE, panel * WIDE)) {
            pair_block(row_of(m->at, s * WIDE * m->columns + panel * WIDE, 1, 1), m->columns, to);
            continue;
        }
        for (int64_t h = 0; h < 2; h++)
            for (int64_t r = 0; r < WIDE; r += TILE) {
                square(m, s * WIDE + r, panel * WIDE + h * TILE, values);
                for (int64_t j = 0; j < TILE; j += 2) {
                    uvec even[PIECES], odd[PIECES];
                    split(pieces, exact, values[j], even), split(pieces, exact, values[j + 1], odd);
                    uint32_t *pairs = to + h * RIGHT / 2 + (r + j) / 2 * TILE;
                    for (int p = 0; p < pieces; p++)
                        *(vec_at *)(void *)(pairs + p * RIGHT) = (vec)(even[p] >> 16 | odd[p]);
                }
            }
    }
}

/* A panel of the right side of x M': 32 rows of M. */
INLINE void panel_along(int pieces, const Matrix *m, int64_t panel, uint32_t *to) {
    if (m->half && !m->rank) pack_along(pieces, 1, m, panel, to);
    else pack_along(pieces, 0, m, panel, to);
}

/* A panel of the right side of g M: 32 columns of M. */
INLINE void panel_down(int pieces, const Matrix *m, int64_t panel, uint32_t *to) {
    if (m->half && !m->rank) pack_down(pieces, 1, m, panel, to);
    else pack_down(pieces, 0, m, panel, to);
}

/* Memory in pieces of whole cache lines; with none yet, only what it comes to. */
typedef struct {
    char *at;
    size_t used;
} Memory;

INLINE void *some(Memory *m, int64_t bytes) {
    void *found = m->at ? m->at + m->used : 0;
    m->used += (size_t)whole(bytes, 64);
    return found;
}

INLINE int64_t right_bytes(int pieces, int64_t depth, int64_t columns) {
    return wides(depth) * wides(columns) * pieces * RIGHT * 4;
}

#endif
#endif
