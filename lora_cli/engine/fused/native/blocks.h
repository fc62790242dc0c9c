/* What both ways of attention share: the shape of their rows, and transposing. */

#ifndef LORA_BLOCKS_H
#define LORA_BLOCKS_H

#include "vectors.h"

#include <stdlib.h>

#define BLOCK 64 /* queries or keys of a block */

typedef struct {
    int half;
    int64_t heads, keys, size, padded; /* `padded`: size rounded up to whole vectors */
    int64_t stride, out_stride, grad_stride, tokens;
    float scale;
    const void *qkv;
} Shape;

INLINE int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
INLINE int64_t whole(int64_t count, int64_t of) { return (count + of - 1) / of * of; }

/* The length of the longest document, which is the first in `order`, in whole blocks. */
INLINE int64_t widest(const int64_t *order, const int64_t *starts) {
    return whole(starts[order[0] + 1] - starts[order[0]], BLOCK);
}

#define UPPER(i, w) ((i) & (w) ? 16 + (i) - (w) : (i))
#define LOWER(i, w) ((i) & (w) ? 16 + (i) : (i) + (w))
#define OF_ALL(part, w)                                                                                     \
    (ivec) {                                                                                                \
        part(0, w), part(1, w), part(2, w), part(3, w), part(4, w), part(5, w), part(6, w), part(7, w),     \
        part(8, w), part(9, w), part(10, w), part(11, w), part(12, w), part(13, w), part(14, w), part(15, w) \
    }
#define SWAP(w)                                                                                             \
    _Pragma("GCC unroll 16") for (int r = 0; r < 16; r++)                                                   \
        if (!(r & w)) {                                                                                     \
            const ivec upper = OF_ALL(UPPER, w), lower = OF_ALL(LOWER, w);                                  \
            vec one = rows[r], other = rows[r + w];                                                         \
            rows[r] = __builtin_shuffle(one, other, upper);                                                 \
            rows[r + w] = __builtin_shuffle(one, other, lower);                                             \
        }

/* [16, 16] transposed: blocks of 8, 4, 2 and 1 change places across the diagonal. */
INLINE void transpose(const float *from, int64_t from_row, float *to, int64_t to_row) {
    vec rows[16];
    _Pragma("GCC unroll 16") for (int r = 0; r < 16; r++) rows[r] = load(from, r * from_row, 0);
    SWAP(8)
    SWAP(4)
    SWAP(2)
    SWAP(1)
    _Pragma("GCC unroll 16") for (int r = 0; r < 16; r++) store(to, r * to_row, rows[r], 0);
}

/* Attention there and back on matrix tiles, and whether there are any that take these heads (tiles.c). */
int tiles_fit(int half, int64_t size);
int attend_on_tiles(const Shape *shape, int64_t documents, const int64_t *order, const int64_t *starts, void *out,
                    float *log_sums);
int attend_back_on_tiles(const Shape *shape, int64_t documents, const int64_t *order, const int64_t *starts,
                         const void *out, const void *grad, const float *log_sums, void *qkv_grad);

#endif
