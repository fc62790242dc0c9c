/* Attention by document on matrix tiles (Intel's AMX): products of bfloat16, summed in float32. A float32 is three of them
 * (planes.h), so that its products are as exact as any in float32; in bfloat16, probabilities and the gradients of scores
 * are rounded before they are multiplied, as FlashAttention does.
 *
 * 32 queries see all their keys at once, so that softmax needs no second scaling. Scores stand in tiles of [16 queries,
 * 16 keys], and end on the diagonal. The way back is in tiles_back.c. */

#include "planes.h"

#ifdef PLANES_FIT

/* Linux gives tiles to a process that asks for them: arch_prctl(ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA). */
int tiles_fit(int half, int64_t size) {
    static int granted = -1;
    if (granted < 0) granted = syscall(SYS_arch_prctl, 0x1023, 18) == 0;
    return (void)half, granted && size % DEPTH == 0;
}

typedef struct {
    uint32_t *keys, *values;      /* right tiles [key, along size] and [size, pairs of keys] */
    uint16_t *queries, *weights;  /* left tiles of 32 queries [query, along size] and [query, keys] */
    float *scores, *sums;         /* tiles [2, keys] and [2, size] */
    int64_t width;
} There;

/* Scores of 16 queries, times `scale`, to weights e^(score - largest), in left tiles. The last of `tiles` is on the
 * diagonal. Returns the weights' sums; `largest` is of each query. */
INLINE vec soften(int half, const float *scores, int64_t tiles, float scale, uint16_t *weights, float *largest) {
    const int64_t last = tiles - 1;
    vec most[TILE], totals[TILE];
    _Pragma("GCC unroll 16") for (int r = 0; r < TILE; r++)
        most[r] = (vec)_mm512_mask_loadu_ps(_mm512_set1_ps(-INFINITY), (__mmask16)((2u << r) - 1),
                                            scores + last * PAIRS + r * TILE);
    for (int64_t k = 0; k < last; k++)
        _Pragma("GCC unroll 16") for (int r = 0; r < TILE; r++)
            most[r] = LARGER(most[r], load(scores + k * PAIRS + r * TILE, 0, 0));
    store(largest, 0, largest_of_each(most) * scale, 0);
    for (int64_t r = 0; r < TILE; r++) {
        const float *from = scores + r * TILE;
        uint16_t *to = weights + r * DEPTH;
        vec total = {0};
        uvec planes[PIECES];
        for (int64_t k = 0; k < tiles; k += 2, to += planes_of(half) * SPOT) {
            __mmask16 first = 0xffff, second = 0xffff;
            if (k + 2 >= tiles) {
                __mmask16 seen = (__mmask16)((2u << r) - 1);
                first = k == last ? seen : first, second = k == last ? 0 : seen;
            }
            vec one = exponential_seen(half, first, load(from + k * PAIRS, 0, 0) * scale - largest[r]);
            vec two = exponential_seen(half, second, load(from + (k + 1) * PAIRS, 0, 0) * scale - largest[r]);
            total += one + two;
            narrow(half, one, two, planes);
            for (int p = 0; p < planes_of(half); p++) put_words(planes[p], to + p * SPOT);
        }
        totals[r] = total;
    }
    return sum_of_each(totals);
}

INLINE void some_queries(int half, const Job *job, const There *s, const Task *task, int64_t head, int64_t first) {
    const Shape *shape = job->shape;
    const int64_t planes = planes_of(half), size = shape->size, at = task->start + first;
    const int64_t count = least(DEPTH, task->length - first), after = first / DEPTH, steps = s->width / DEPTH;
    const int64_t along = size / DEPTH * planes, wide = s->width / TILE * PAIRS;
    const int two = count > TILE;
    const void *from = row_of(row_of(shape->qkv, at, shape->stride, half), head, size, half);
    pack(half, from, shape->stride, count, size, s->queries, 0, 0);
    Sides sides = {s->queries, s->keys, along * SPOT, along * PAIRS, size / DEPTH};
    for (int64_t key = 0; key < after; key++, sides.right += 2 * along * PAIRS)
        if (two) multiply(half, ALL, &sides, s->scores + 2 * key * PAIRS, wide, PAIRS, 1);
        else multiply(half, UPPER, &sides, s->scores + 2 * key * PAIRS, wide, PAIRS, 1);
    if (two) multiply(half, NOT_UPPER_RIGHT, &sides, s->scores + 2 * after * PAIRS, wide, PAIRS, 1);
    else multiply(half, FIRST, &sides, s->scores + 2 * after * PAIRS, wide, PAIRS, 1);
    float inverse[DEPTH];
    for (int t = 0; t <= two; t++) {
        float largest[TILE], logs[TILE];
        vec total = soften(half, s->scores + t * wide, 2 * after + t + 1, shape->scale,
                           s->weights + t * steps * planes * SPOT, largest);
        store(inverse, t * TILE, 1.0f / total, 0);
        for (int r = 0; r < TILE; r++) logs[r] = largest[r] + logf(total[r]);
        for (int64_t r = 0; r < least(TILE, count - t * TILE); r++)
            job->log_sums[head * shape->tokens + at + t * TILE + r] = logs[r];
    }
    for (int64_t e = 0; e < size / TILE; e += 2) {
        Sides down = {s->weights, s->values + e * steps * planes * PAIRS, steps * planes * SPOT,
                      steps * planes * PAIRS, after + 1};
        if (two) multiply(half, ALL, &down, s->sums + e * PAIRS, size / TILE * PAIRS, PAIRS, 1);
        else multiply(half, UPPER, &down, s->sums + e * PAIRS, size / TILE * PAIRS, PAIRS, 1);
    }
    for (int64_t r = 0; r < count; r++) {
        const float *sums = s->sums + r / TILE * size * TILE + r % TILE * TILE;
        void *to = row_of(row_of(job->to, at + r, shape->out_stride, half), head, size, half);
        for (int64_t e = 0; e < size; e += DEPTH, sums += 2 * PAIRS)
            put_row(half, to, e, load(sums, 0, 0) * inverse[r], load(sums + PAIRS, 0, 0) * inverse[r]);
    }
}

INLINE size_t laid_out(int half, const Shape *shape, int64_t width, There *s, char *bytes) {
    const int64_t planes = planes_of(half), each = width * shape->size * 2 * planes;
    char *at = bytes;
    s->width = width;
    s->keys = take(&at, each), s->values = take(&at, each);
    s->queries = take(&at, DEPTH * shape->size * 2 * planes), s->weights = take(&at, DEPTH * width * 2 * planes);
    s->scores = take(&at, DEPTH * width * 4), s->sums = take(&at, DEPTH * shape->size * 4);
    return (size_t)(at - bytes);
}

INLINE void task_there(int half, const Job *job, const Task *task, char *bytes) {
    const Shape *shape = job->shape;
    const int64_t size = shape->size, group = shape->heads / shape->keys, key = shape->heads + task->key;
    There s;
    laid_out(half, shape, job->width, &s, bytes);
    pack_along(half, head_of(shape, task, key), shape->stride, task->length, size, s.keys);
    pack(half, head_of(shape, task, key + shape->keys), shape->stride, task->length, size, 0, s.values, s.width / DEPTH);
    open_tiles();
    for (int64_t head = task->key * group; head < (task->key + 1) * group; head++)
        for (int64_t first = 0; first < task->length; first += DEPTH) some_queries(half, job, &s, task, head, first);
    _tile_release();
}

static void task_of_half(const void *job, const Task *task, char *bytes) { task_there(1, job, task, bytes); }
static void task_of_full(const void *job, const Task *task, char *bytes) { task_there(0, job, task, bytes); }

int attend_on_tiles(const Shape *shape, const Documents *documents, void *out, float *log_sums) {
    const Job job = {shape, 0, 0, log_sums, out, widest(documents)};
    There s;
    size_t bytes = laid_out(shape->half, shape, job.width, &s, 0);
    return each_task(documents, shape->keys, bytes, shape->half ? task_of_half : task_of_full, &job);
}

#else

int tiles_fit(int half, int64_t size) { return (void)half, (void)size, 0; }

int attend_on_tiles(const Shape *shape, const Documents *documents, void *out, float *log_sums) {
    return (void)shape, (void)documents, (void)out, (void)log_sums, 1;
}

#endif
