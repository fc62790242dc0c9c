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

#endif
#endif
