/* Products on matrix tiles from operands that lie in the order in which tiles are loaded, a kilobyte each: the rows of the
 * left side in blocks of 32, the columns of the right side in panels of 32, what is summed over in steps of 32. Values
 * are bfloat16 (one piece) or float32 (three pieces, pieces.h).
 *
 *   left block  [steps][pieces][32 rows][32 values]
 *   right panel [steps][pieces][2][16 pairs of values][16 columns]
 *
 * What a matrix lacks to whole steps and panels is 0. */

#ifndef LORA_PANELS_H
#define LORA_PANELS_H

#include "pieces.h"
#include "tiles.h"

#ifdef TILES

#define WIDE 32           /* rows of a block, columns of a panel, values of a step */
#define LEFT (WIDE * WIDE) /* bfloat16 of a block's step and piece */
#define RIGHT (LEFT / 2)  /* pairs of a panel's step and piece */
#define AWAKE 12          /* times pieces: steps without a store, at most */

INLINE int64_t wides(int64_t count) { return (count + WIDE - 1) / WIDE; }

/* Tiles 0 to 3 += left right, or the upper two without `down`, the left two without `across`. `left_step` is between the
 * left side's pieces, `lower` from its upper 16 rows to its lower ones, in values. In each step `lines` cache lines from
 * `ahead` on are brought near, for whoever comes next. */
INLINE void accumulate(int pieces, int down, int across, int64_t steps, const uint16_t *left, int64_t left_step,
                       int64_t lower, const uint32_t *right, const char *ahead, int64_t lines) {
#define LOAD_LEFT(piece)                                                                                    \
    _tile_loadd(4, left + (piece) * left_step, 64);                                                         \
    if (down) _tile_loadd(5, left + (piece) * left_step + lower, 64);
#define LOAD_RIGHT(piece)                                                                                   \
    _tile_loadd(6, right + (piece) * RIGHT, 64);                                                            \
    if (across) _tile_loadd(7, right + (piece) * RIGHT + RIGHT / 2, 64);
#define MULTIPLY                                                                                            \
    _tile_dpbf16ps(0, 4, 6);                                                                                \
    if (across) _tile_dpbf16ps(1, 4, 7);                                                                    \
    if (down) _tile_dpbf16ps(2, 5, 6);                                                                      \
    if (down && across) _tile_dpbf16ps(3, 5, 7);
    /* On the processor this was made on, the first store after some 2,300 cycles of products alone takes 900 cycles, where
     * one takes 16 otherwise: one in between that nobody reads makes float32 products 1.2 times as fast. */
    float unread[TILE * TILE] __attribute__((aligned(64)));
    int64_t until = AWAKE / pieces;
    __asm__ volatile("" ::: "memory"); /* GCC doesn't take loads of tiles to read what was stored before */
    for (int64_t s = 0; s < steps; s++, left += pieces * left_step, right += pieces * RIGHT) {
        if (s == until) {
            _tile_stored(0, unread, 64);
            until += AWAKE / pieces;
        }
        for (int64_t i = 0; i < lines; i++, ahead += 64) _mm_prefetch(ahead, _MM_HINT_T1);
        if (pieces == PIECES) { /* from the smallest products to the largest, each operand loaded as seldom as can be */
            LOAD_LEFT(0)
            LOAD_RIGHT(2)
            MULTIPLY
            LOAD_RIGHT(1)
            MULTIPLY
            LOAD_LEFT(1)
            MULTIPLY
            LOAD_RIGHT(0)
            MULTIPLY
            LOAD_LEFT(2)
            MULTIPLY
            LOAD_LEFT(0)
            MULTIPLY
        } else {
            LOAD_LEFT(0)
            LOAD_RIGHT(0)
            MULTIPLY
        }
    }
}

INLINE void clear_sums(int down, int across) {
    _tile_zero(0);
    if (across) _tile_zero(1);
    if (down) _tile_zero(2);
    if (down && across) _tile_zero(3);
}

INLINE void load_sums(int down, int across, const float *from, int64_t stride) {
    _tile_loadd(0, from, stride * 4);
    if (across) _tile_loadd(1, from + TILE, stride * 4);
    if (down) _tile_loadd(2, from + TILE * stride, stride * 4);
    if (down && across) _tile_loadd(3, from + TILE * stride + TILE, stride * 4);
}

INLINE void store_sums(int down, int across, float *to, int64_t stride) {
    _tile_stored(0, to, stride * 4);
    if (across) _tile_stored(1, to + TILE, stride * 4);
    if (down) _tile_stored(2, to + TILE * stride, stride * 4);
    if (down && across) _tile_stored(3, to + TILE * stride + TILE, stride * 4);
}

/* Left blocks of `steps` steps each, which are steps `from` up to `to` of a product's depth. */
typedef struct {
    const uint16_t *at;
    int64_t steps, from, to;
} Left;

INLINE Left whole_left(const uint16_t *at, int64_t steps) { return (Left){at, steps, 0, steps}; }

/* A product's factors: the right side's panels have `steps` steps. */
typedef struct {
    Left left;
    const uint32_t *right;
    int64_t steps;
} Factor;

/* Of a block and a panel. */
INLINE void accumulate_factor(int pieces, int across, const Factor *f, int64_t m, int64_t n, const char *ahead,
                              int64_t lines) {
    accumulate(pieces, 1, across, f->left.to - f->left.from, f->left.at + m * f->left.steps * pieces * LEFT, LEFT, LEFT / 2,
               f->right + (n * f->steps + f->left.from) * pieces * RIGHT, ahead, lines);
}

INLINE void multiply_blocks(int pieces, int across, int64_t blocks, const Factor *one, const Factor *more, int64_t n,
                            int64_t fresh, float *out, int64_t stride) {
    const char *ahead = (const char *)(one->right + ((n + 1) * one->steps + one->left.from) * pieces * RIGHT);
    int64_t lines = (pieces * RIGHT / 16 + blocks - 1) / blocks; /* of the next panel, for each step and block */
    for (int64_t m = 0; m < blocks; m++, out += WIDE * stride) {
        if (fresh) clear_sums(1, across);
        else load_sums(1, across, out, stride);
        accumulate_factor(pieces, across, one, m, n, ahead + m * lines * (one->left.to - one->left.from) * 64, lines);
        if (more) accumulate_factor(pieces, across, more, m, n, ahead, 0);
        store_sums(1, across, out, stride);
    }
}

/* out [32 blocks, columns], rows `stride` apart, = the sum of one or two products, or with `fresh` 0 that much more.
 * Columns are a multiple of 16. */
INLINE void multiply(int pieces, int64_t blocks, int64_t columns, const Factor *one, const Factor *more, int64_t fresh,
                     float *out, int64_t stride) {
    for (int64_t n = 0; n < wides(columns); n++, out += WIDE)
        if (columns - n * WIDE > TILE) multiply_blocks(pieces, 1, blocks, one, more, n, fresh, out, stride);
        else multiply_blocks(pieces, 0, blocks, one, more, n, fresh, out, stride);
}

/* Sixteen values, in the upper halves of words, as pieces. */
INLINE void split(int pieces, vec v, uvec to[PIECES]) {
    if (pieces == PIECES) pieces_of(v, to);
    else to[0] = rounded_bits(v);
}

INLINE hvec upper_half(uvec v) { return __builtin_convertvector(v >> 16, hvec); }

/* Values `column` to `column` + 15 of a row of left blocks. */
INLINE void put_left(int pieces, uint16_t *left, int64_t steps, int64_t row, int64_t column, vec v) {
    uvec found[PIECES];
    split(pieces, v, found);
    left += ((row >> 5) * steps + (column >> 5)) * pieces * LEFT + (row & 31) * WIDE + (column & 31);
    for (int p = 0; p < pieces; p++) *(hvec_at *)(left + p * LEFT) = upper_half(found[p]);
}

/* Zeros up to a whole step, in a row of `width` values. */
INLINE void fill_left(int pieces, uint16_t *left, int64_t steps, int64_t row, int64_t width) {
    if (width % WIDE) put_left(pieces, left, steps, row, width, (vec){0});
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

/* A panel of the right side of x M': 32 rows of M. */
INLINE void panel_along(int pieces, const Matrix *m, int64_t panel, uint32_t *to) {
    uint16_t rows[PIECES][TILE][WIDE] __attribute__((aligned(64)));
    vec values[TILE];
    for (int64_t s = 0; s < wides(m->columns); s++, to += pieces * RIGHT)
        for (int64_t h = 0; h < 2; h++) {
            for (int64_t c = 0; c < WIDE; c += WIDTH) {
                square(m, panel * WIDE + h * TILE, s * WIDE + c, values);
                for (int64_t r = 0; r < TILE; r++) {
                    uvec found[PIECES];
                    split(pieces, values[r], found);
                    for (int p = 0; p < pieces; p++) *(hvec_at *)&rows[p][r][c] = upper_half(found[p]);
                }
            }
            for (int p = 0; p < pieces; p++)
                transpose((const float *)(const void *)rows[p], TILE, (float *)(void *)(to + p * RIGHT + h * RIGHT / 2), TILE);
        }
}

INLINE void pair(int pieces, vec even, vec odd, uint32_t *to, int64_t piece) {
    uvec one[PIECES], other[PIECES];
    split(pieces, even, one), split(pieces, odd, other);
    for (int p = 0; p < pieces; p++) *(vec_at *)(void *)(to + p * piece) = (vec)(one[p] >> 16 | (other[p] & 0xffff0000u));
}

/* A panel of the right side of g M: 32 columns of M. */
INLINE void panel_down(int pieces, const Matrix *m, int64_t panel, uint32_t *to) {
    vec values[TILE];
    for (int64_t s = 0; s < wides(m->rows); s++, to += pieces * RIGHT)
        for (int64_t h = 0; h < 2; h++)
            for (int64_t r = 0; r < WIDE; r += TILE) {
                square(m, s * WIDE + r, panel * WIDE + h * TILE, values);
                for (int64_t j = 0; j < TILE; j += 2)
                    pair(pieces, values[j], values[j + 1], to + h * RIGHT / 2 + (r + j) / 2 * TILE, RIGHT);
            }
}

typedef uint16_t rowvec __attribute__((vector_size(64)));
typedef uint16_t rowvec_at __attribute__((vector_size(64), aligned(2), may_alias));

/* A piece of a left block's step, 32 rows of 32 values, as that of a right panel that is summed over these rows. */
INLINE void pair_block(const uint16_t *left, uint32_t *panel) {
    const rowvec first = {0, 32, 1, 33, 2, 34, 3, 35, 4, 36, 5, 37, 6, 38, 7, 39,
                          8, 40, 9, 41, 10, 42, 11, 43, 12, 44, 13, 45, 14, 46, 15, 47};
    for (int64_t j = 0; j < WIDE / 2; j++, left += 2 * WIDE, panel += TILE) {
        rowvec even = *(const rowvec_at *)left, odd = *(const rowvec_at *)(left + WIDE);
        *(rowvec_at *)(void *)panel = __builtin_shuffle(even, odd, first);
        *(rowvec_at *)(void *)(panel + RIGHT / 2) = __builtin_shuffle(even, odd, first + 16);
    }
}

#endif
#endif
