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

/* Where each begins, with the end of the last, and their order from the longest to the shortest. */
typedef struct {
    int64_t count;
    const int64_t *order, *starts;
} Documents;

INLINE int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
INLINE int64_t whole(int64_t count, int64_t of) { return (count + of - 1) / of * of; }

/* The length of the longest document, in whole blocks. */
INLINE int64_t widest(const Documents *d) { return whole(d->starts[d->order[0] + 1] - d->starts[d->order[0]], BLOCK); }

#define UPPER_OF(i, w) ((i) & (w) ? 16 + (i) - (w) : (i))
#define LOWER_OF(i, w) ((i) & (w) ? 16 + (i) : (i) + (w))
#define OF_ALL(part, w)                                                                                     \
    (ivec) {                                                                                                \
        part(0, w), part(1, w), part(2, w), part(3, w), part(4, w), part(5, w), part(6, w), part(7, w),     \
        part(8, w), part(9, w), part(10, w), part(11, w), part(12, w), part(13, w), part(14, w), part(15, w) \
    }
#define SWAP(w)                                                                                             \
    _Pragma("GCC unroll 16") for (int r = 0; r < 16; r++)                                                   \
        if (!(r & w)) {                                                                                     \
            const ivec upper = OF_ALL(UPPER_OF, w), lower = OF_ALL(LOWER_OF, w);                                  \
            vec one = rows[r], other = rows[r + w];                                                         \
            rows[r] = __builtin_shuffle(one, other, upper);                                                 \
            rows[r + w] = __builtin_shuffle(one, other, lower);                                             \
        }

/* [16, 16] transposed: blocks of 8, 4, 2 and 1 change places across the diagonal. */
INLINE void turn(vec rows[16]) {
    SWAP(8)
    SWAP(4)
    SWAP(2)
    SWAP(1)
}

INLINE void transpose(const float *from, int64_t from_row, float *to, int64_t to_row) {
    vec rows[16];
    _Pragma("GCC unroll 16") for (int r = 0; r < 16; r++) rows[r] = load(from, r * from_row, 0);
    turn(rows);
    _Pragma("GCC unroll 16") for (int r = 0; r < 16; r++) store(to, r * to_row, rows[r], 0);
}

/* A task is one document's key head with the query heads that share it: tokens from `start`. */
typedef struct {
    int64_t start, length, key;
} Task;

/* Does every task, the longest documents first, each thread with `bytes` of scratch of its own. Returns 0, or 1 when there
 * is no memory for it. */
typedef void Work(const void *job, const Task *task, char *scratch);
int each_task(const Documents *documents, int64_t keys, size_t bytes, Work *work, const void *job);

/* What `each_task` hands on to a way of attention. `to`: out, or on the way back the gradient of qkv. */
typedef struct {
    const Shape *shape;
    const void *out, *grad;
    float *log_sums;
    void *to;
    int64_t width;
} Job;

/* The first row of one of a task's heads: of queries, then of keys, then of values. */
INLINE const void *head_of(const Shape *shape, const Task *task, int64_t head) {
    return row_of(row_of(shape->qkv, task->start, shape->stride, shape->half), head, shape->size, shape->half);
}

/* The next `bytes` of scratch, in whole lines of the cache. */
INLINE void *take(char **scratch, int64_t bytes) {
    void *taken = *scratch;
    *scratch += whole(bytes, 64);
    return taken;
}

/* Attention there and back on vector units (strips.c), and on matrix tiles, with whether there are any that take these
 * heads (tiles.c, tiles_back.c). */
int attend_on_vectors(const Shape *shape, const Documents *documents, void *out, float *log_sums);
int attend_back_on_vectors(const Shape *shape, const Documents *documents, const void *out, const void *grad,
                           const float *log_sums, void *qkv_grad);
int tiles_fit(int half, int64_t size);
int attend_on_tiles(const Shape *shape, const Documents *documents, void *out, float *log_sums);
int attend_back_on_tiles(const Shape *shape, const Documents *documents, const void *out, const void *grad,
                         const float *log_sums, void *qkv_grad);

#endif
