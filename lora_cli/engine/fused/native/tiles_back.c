/* The way back of tiles.c. Scores stand transposed here, in tiles of [16 keys, 16 queries]: as left tiles, weights and the
 * gradients of scores then give the gradients of keys and values, and nothing has to be transposed for those. They are
 * made anew for 32 keys and 32 queries at a time, from the kept log-sums; the diagonal is where they begin. */

#include "slopes.h"

#ifdef PLANES_FIT

/* 32 keys with all of a block's queries that see them. */
INLINE void some_keys(int half, const Shape *shape, const Back *b, int64_t first, int64_t count, int64_t key, int down,
                      int fresh, Ahead *ahead) {
    const int64_t planes = planes_of(half), size = shape->size, along = size / DEPTH * planes;
    const int64_t from = key > first ? key - first : 0, block = QUERIES / DEPTH * planes;
    const int64_t pairs_next = b->width / DEPTH * planes * PAIRS;
    Meanwhile *some_slopes = half ? 0 : slopes_of_full;
    Block blocks[2] = {{.pair = TILE}, {.pair = TILE}}, *last = blocks;
    for (int64_t q = from; q < count; q += DEPTH) {
        const int64_t left = key / TILE * along * SPOT, right = q / TILE * along * PAIRS;
        const Sides scores = {b->keys + left, b->queries_along + right, along * SPOT, along * PAIRS, size / DEPTH};
        const Sides dots = {b->values + left, b->grads_along + right, along * SPOT, along * PAIRS, size / DEPTH};
        const int64_t turn = q / DEPTH % 2;
        look_ahead(half, ahead, size);
        float *to = b->scores + turn * 4 * PAIRS, *to_dots = b->dots + turn * 4 * PAIRS;
        const int two = count - q > TILE, diagonal = key == first + q;
#define MAKE(which)                                                                                         \
    do {                                                                                                    \
        multiply(half, which, &scores, to, 2 * PAIRS, PAIRS, 1, some_slopes, last);                         \
        multiply(half, which, &dots, to_dots, 2 * PAIRS, PAIRS, 1, some_slopes, last);                      \
    } while (0)
        if (!diagonal && two) MAKE(ALL);
        else if (!diagonal) MAKE(LEFT);
        else if (two) MAKE(NOT_LOWER_LEFT);
        else MAKE(FIRST);
        finish(half, last);
        last = blocks + turn;
        *last = (Block){b, q, pairs_next, to, to_dots, b->slopes_down + q / TILE * pairs_next + key / DEPTH * planes * PAIRS,
                        shape->scale * LOG2_E, !diagonal && two, diagonal, down, two, 0};
    }
    finish(half, last);
    for (int64_t e = 0; e < size / TILE; e += 2) {
        const int64_t left = from / DEPTH * planes * SPOT, right = (e * block + from / DEPTH * planes) * PAIRS;
        const int64_t steps = (count - from + DEPTH - 1) / DEPTH, to = (key * size / TILE + e * TILE) * TILE;
        const Sides values = {b->weights + left, b->grads + right, block * SPOT, block * PAIRS, steps};
        const Sides keys = {b->slopes + left, b->queries + right, block * SPOT, block * PAIRS, steps};
        if (down) multiply(half, ALL, &values, b->value_grads + to, size * TILE, PAIRS, fresh, 0, 0);
        else multiply(half, UPPER, &values, b->value_grads + to, size * TILE, PAIRS, fresh, 0, 0);
        if (down) multiply(half, ALL, &keys, b->key_grads + to, size * TILE, PAIRS, fresh, 0, 0);
        else multiply(half, UPPER, &keys, b->key_grads + to, size * TILE, PAIRS, fresh, 0, 0);
    }
}

/* The gradients of 32 queries, which come as [size, queries], from all their keys. */
INLINE void query_grads(int half, const Shape *shape, const Back *b, int64_t steps, int64_t query, int64_t count, void *to) {
    const int64_t planes = planes_of(half), wide = b->width / DEPTH * planes;
    for (int64_t e = 0; e < shape->size / TILE; e += 2) {
        const Sides sides = {(const uint16_t *)(b->keys_down + e * wide * PAIRS),
                             b->slopes_down + query / TILE * wide * PAIRS, wide * SPOT, wide * PAIRS, steps};
        if (count > TILE) multiply(half, ALL, &sides, b->scores, 2 * PAIRS, PAIRS, 1, 0, 0);
        else multiply(half, LEFT, &sides, b->scores, 2 * PAIRS, PAIRS, 1, 0, 0);
        for (int64_t q = 0; q < count; q += TILE) {
            vec one[TILE], two[TILE];
            const float *tile = b->scores + q * TILE;
            _Pragma("GCC unroll 16") for (int r = 0; r < TILE; r++) one[r] = load(tile, r * TILE, 0);
            turn(one);
            _Pragma("GCC unroll 16") for (int r = 0; r < TILE; r++) two[r] = load(tile + 2 * PAIRS, r * TILE, 0);
            turn(two);
            for (int64_t r = 0; r < least(TILE, count - q); r++)
                put_row(half, row_of(to, q + r, shape->stride, half), e * TILE, one[r] * shape->scale,
                        two[r] * shape->scale);
        }
    }
}

/* What a block of queries needs of each: its log-sum, and its gradient times its output. */
INLINE void facts_of(int half, const Shape *shape, Back *b, int64_t count, const void *out, const void *grad,
                     const float *log_sums) {
    for (int64_t q = 0; q < count; q += TILE) {
        vec dots[TILE] = {0};
        for (int64_t r = 0; r < least(TILE, count - q); r++) {
            const void *one = row_of(out, q + r, shape->out_stride, half);
            const void *other = row_of(grad, q + r, shape->grad_stride, half);
            for (int64_t e = 0; e < shape->size; e += WIDTH) dots[r] += load(one, e, half) * load(other, e, half);
        }
        store(b->rows, q, sum_of_each(dots), 0);
    }
    memset(b->logs, 0, sizeof b->logs);
    memcpy(b->logs, log_sums, (size_t)count * sizeof(float));
}

/* The rows of the block that comes next, and those that this one's gradients go to. */
INLINE Ahead ahead_of(int half, const Job *job, const Task *task, int64_t head, int64_t first) {
    const Shape *shape = job->shape;
    const int64_t size = shape->size, count = least(QUERIES, task->length - first), blocks = (count + DEPTH - 1) / DEPTH;
    const int more = first + QUERIES < task->length;
    const int64_t next = task->start + (more ? first + QUERIES : 0), column = head + !more;
    return (Ahead){
        {row_of(row_of(shape->qkv, next, shape->stride, half), column, size, half),
         row_of(row_of(job->grad, next, shape->grad_stride, half), column, size, half),
         row_of(row_of(job->out, next, shape->out_stride, half), column, size, half)},
        row_of(row_of(job->to, task->start + first, shape->stride, half), head, size, half),
        {shape->stride, shape->grad_stride, shape->out_stride}, shape->stride, 0, least(QUERIES, task->length),
        2 * DEPTH / (2 * first / DEPTH + blocks + 1) + 1};
}

INLINE void head_back(int half, const Job *job, Back *b, const Task *task, int64_t head, int fresh) {
    const Shape *shape = job->shape;
    const int64_t size = shape->size;
    for (int64_t first = 0; first < task->length; first += QUERIES) {
        const int64_t count = least(QUERIES, task->length - first), at = task->start + first;
        const void *out = row_of(row_of(job->out, at, shape->out_stride, half), head, size, half);
        const void *grad = row_of(row_of(job->grad, at, shape->grad_stride, half), head, size, half);
        const void *queries = row_of(row_of(shape->qkv, at, shape->stride, half), head, size, half);
        pack_along(half, queries, shape->stride, count, size, shape->scale * LOG2_E, b->queries_along);
        pack_along(half, grad, shape->grad_stride, count, size, 1.0f, b->grads_along);
        pack(half, queries, shape->stride, count, size, shape->scale * LOG2_E, 0, b->queries, QUERIES / DEPTH);
        pack(half, grad, shape->grad_stride, count, size, 1.0f, 0, b->grads, QUERIES / DEPTH);
        facts_of(half, shape, b, count, out, grad, job->log_sums + head * shape->tokens + at);
        Ahead ahead = ahead_of(half, job, task, head, first);
        for (int64_t key = 0; key < first + count; key += DEPTH)
            some_keys(half, shape, b, first, count, key, task->length - key > TILE, fresh && key >= first, &ahead);
        for (int64_t q = 0; q < count; q += DEPTH)
            query_grads(half, shape, b, (first + q) / DEPTH + 1, q, least(DEPTH, count - q),
                        row_of(row_of(job->to, at + q, shape->stride, half), head, size, half));
    }
}

/* Gradients in tiles to a head's rows. */
INLINE void put_grads(int half, const Shape *shape, const float *tiles, int64_t count, float factor, void *to) {
    for (int64_t t = 0; t < count; t++) {
        const float *from = tiles + (t / TILE * shape->size + t % TILE) * TILE;
        for (int64_t e = 0; e < shape->size; e += DEPTH, from += 2 * PAIRS)
            put_row(half, row_of(to, t, shape->stride, half), e, load(from, 0, 0) * factor, load(from + PAIRS, 0, 0) * factor);
    }
}

INLINE size_t laid_out(int half, const Shape *shape, int64_t width, Back *b, char *bytes) {
    const int64_t planes = planes_of(half), size = shape->size;
    const int64_t each = width * size * 2 * planes, few = QUERIES * size * 2 * planes, strip = DEPTH * QUERIES * 2 * planes;
    char *at = bytes;
    b->width = width;
    b->keys = take(&at, each), b->values = take(&at, each), b->keys_down = take(&at, each);
    b->queries_along = take(&at, few), b->grads_along = take(&at, few);
    b->queries = take(&at, few), b->grads = take(&at, few);
    b->weights = take(&at, strip), b->slopes = take(&at, strip), b->slopes_down = take(&at, width * QUERIES * 2 * planes);
    b->key_grads = take(&at, width * size * 4), b->value_grads = take(&at, width * size * 4);
    b->scores = take(&at, 8 * PAIRS * 4), b->dots = take(&at, 8 * PAIRS * 4);
    return (size_t)(at - bytes);
}

INLINE void task_back(int half, const Job *job, const Task *task, char *bytes) {
    const Shape *shape = job->shape;
    const int64_t size = shape->size, group = shape->heads / shape->keys, steps = job->width / DEPTH;
    const int64_t key = shape->heads + task->key, value = key + shape->keys;
    Back b;
    laid_out(half, shape, job->width, &b, bytes);
    pack(half, head_of(shape, task, key), shape->stride, task->length, size, 1.0f, b.keys, b.keys_down, steps);
    for (int64_t e = 0; e < size / TILE; e++)
        turn_tiles(whole(task->length, DEPTH) / DEPTH * planes_of(half),
                   b.keys_down + e * steps * planes_of(half) * PAIRS);
    pack(half, head_of(shape, task, value), shape->stride, task->length, size, 1.0f, b.values, 0, 0);
    const unsigned before = enter();
    for (int64_t head = 0; head < group; head++) head_back(half, job, &b, task, task->key * group + head, head == 0);
    leave(before);
    void *to = row_of(job->to, task->start, shape->stride, half);
    put_grads(half, shape, b.key_grads, task->length, half ? shape->scale : LN_2, row_of(to, key, size, half));
    put_grads(half, shape, b.value_grads, task->length, 1.0f, row_of(to, value, size, half));
}

static void task_of_half(const void *job, const Task *task, char *bytes) { task_back(1, job, task, bytes); }
static void task_of_full(const void *job, const Task *task, char *bytes) { task_back(0, job, task, bytes); }

int attend_back_on_tiles(const Shape *shape, const Documents *documents, const void *out, const void *grad,
                         const float *log_sums, void *qkv_grad) {
    const Job job = {shape, out, grad, (float *)log_sums, qkv_grad, widest(documents)};
    Back b;
    size_t bytes = laid_out(shape->half, shape, job.width, &b, 0);
    return each_task(documents, shape->keys, bytes, shape->half ? task_of_half : task_of_full, &job);
}

#else

int attend_back_on_tiles(const Shape *shape, const Documents *documents, const void *out, const void *grad,
                         const float *log_sums, void *qkv_grad) {
    return (void)shape, (void)documents, (void)out, (void)grad, (void)log_sums, (void)qkv_grad, 1;
}

#endif
