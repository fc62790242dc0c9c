/* Attention by document on matrix tiles (Intel's AMX): products of bfloat16, summed in float32. A float32 is three of them
 * (planes.h), so that its products are as exact as any in float32; in bfloat16, probabilities and the gradients of scores
 * are rounded before they are multiplied, as FlashAttention does.
 *
 * 32 queries see all their keys at once, so that softmax needs no second scaling. Scores stand in tiles of [16 queries,
 * 16 keys], and end on the diagonal. The way back is in tiles_back.c. */

#include "powers.h"

#ifdef PLANES_FIT

/* Linux gives tiles to a process that asks for them: arch_prctl(ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA). */
int tiles_fit(int half, int64_t size) {
    static int granted = -1;
    if (granted < 0) granted = syscall(SYS_arch_prctl, 0x1023, 18) == 0;
    return (void)half, granted && size % DEPTH == 0;
}

typedef struct {
    uint32_t *keys, *values;     /* right tiles [key, along size] and [size, pairs of keys] */
    uint16_t *queries, *weights; /* left tiles of 32 queries [query, along size] and [query, keys] */
    float *scores[2], *sums;     /* tiles [2 of queries, keys], of a unit and of the one before it, and [2, size] */
    int64_t width;
} There;

/* 32 queries of a head: scores first, then, beside the next unit's scores, their weights. */
typedef struct {
    const There *s;
    int64_t head, first, count, step, row; /* of weights, a row of a step of 32 keys comes next */
    float *scores, scale, largest[DEPTH], totals[DEPTH][WIDTH];
} Unit;

INLINE int is_done(const Unit *u) { return u->step > u->first / DEPTH; }

/* Weights 2^(score - largest) of `rows` queries and 32 keys, in left tiles, and their sums. */
INLINE void soften(int half, int rows, Unit *u) {
    const int64_t planes = planes_of(half), wide = u->s->width / DEPTH * planes * SPOT, last = u->first / DEPTH;
    for (int n = 0; n < rows && !is_done(u); n++) {
        const int64_t t = u->row / TILE, r = u->row % TILE;
        const float *from = u->scores + (t * u->s->width + u->step * DEPTH) * TILE + r * TILE;
        uint16_t *to = u->s->weights + t * wide + u->step * planes * SPOT + r * DEPTH;
        vec one = load(from, 0, 0), two = load(from + PAIRS, 0, 0);
        if (half) one *= u->scale, two *= u->scale;
        one -= u->largest[u->row], two -= u->largest[u->row];
        if (u->step < last) {
            one = power_of_two(half, 0xffff, one), two = power_of_two(half, 0xffff, two);
        } else {
            const __mmask16 seen = (__mmask16)((2u << r) - 1);
            one = power_of_two(half, t ? 0xffff : seen, one), two = power_of_two(half, t ? seen : 0, two);
        }
        store(u->totals[u->row], 0, load(u->totals[u->row], 0, 0) + (one + two), 0);
        uvec row[PIECES];
        planes_of_row(half, one, two, row);
        for (int p = 0; p < planes; p++) put_words(row[p], to + p * SPOT);
        if (++u->row == whole(u->count, TILE)) u->row = 0, u->step++;
    }
}

/* As much of it as fits beside four products of tiles. */
static __attribute__((noinline)) void soften_full(void *unit) { soften(0, 3, unit); }

/* The largest score of each query; the last tile is on the diagonal. */
INLINE void find_largest(int half, Unit *u) {
    for (int64_t t = 0; t < whole(u->count, TILE) / TILE; t++) {
        const float *scores = u->scores + t * u->s->width * TILE;
        const int64_t last = u->first / TILE + t;
        vec most[TILE];
        _Pragma("GCC unroll 16") for (int r = 0; r < TILE; r++)
            most[r] = (vec)_mm512_mask_loadu_ps(_mm512_set1_ps(-INFINITY), (__mmask16)((2u << r) - 1),
                                                scores + last * PAIRS + r * TILE);
        for (int64_t k = 0; k < last; k++)
            _Pragma("GCC unroll 16") for (int r = 0; r < TILE; r++)
                most[r] = LARGER(most[r], load(scores + k * PAIRS + r * TILE, 0, 0));
        store(u->largest, t * TILE, largest_of_each(most) * (half ? u->scale : 1.0f), 0);
    }
    memset(u->totals, 0, sizeof u->totals);
    u->step = u->row = 0;
}

/* Scores of a unit, and meanwhile the weights of the one before. */
INLINE void score(int half, const Job *job, const Task *task, const There *s, Unit *u, Unit *before, const void *next) {
    const Shape *shape = job->shape;
    const int64_t size = shape->size, along = size / DEPTH * planes_of(half), wide = s->width / TILE * PAIRS;
    const void *from = row_of(row_of(shape->qkv, task->start + u->first, shape->stride, half), u->head, size, half);
    Ahead ahead = {{next},
                   row_of(row_of(job->to, task->start + u->first, shape->out_stride, half), u->head, size, half),
                   {shape->stride}, shape->out_stride, 0, DEPTH, DEPTH / (u->first / DEPTH + 1) + 1};
    Meanwhile *some = half ? 0 : soften_full;
    float *to = u->scores;
    pack(half, from, shape->stride, u->count, size, shape->scale * LOG2_E, s->queries, 0, 0);
    Sides sides = {s->queries, s->keys, along * SPOT, along * PAIRS, size / DEPTH};
    for (int64_t key = 0; key < u->first; key += DEPTH, sides.right += 2 * along * PAIRS, to += 2 * PAIRS) {
        look_ahead(half, &ahead, size);
        if (u->count > TILE) multiply(half, ALL, &sides, to, wide, PAIRS, 1, some, before);
        else multiply(half, UPPER, &sides, to, wide, PAIRS, 1, some, before);
    }
    look_ahead(half, &ahead, size);
    if (u->count > TILE) multiply(half, NOT_UPPER_RIGHT, &sides, to, wide, PAIRS, 1, some, before);
    else multiply(half, FIRST, &sides, to, wide, PAIRS, 1, some, before);
}

/* What a unit's queries attend to. */
INLINE void gather(int half, const Job *job, const Task *task, const There *s, Unit *u) {
    const Shape *shape = job->shape;
    const int64_t size = shape->size, at = task->start + u->first, wide = s->width / DEPTH * planes_of(half);
    while (!is_done(u)) soften(half, TILE, u);
    float inverse[DEPTH];
    for (int64_t t = 0; t < u->count; t += TILE) {
        vec totals[TILE];
        for (int r = 0; r < TILE; r++) totals[r] = load(u->totals[t + r], 0, 0);
        vec total = sum_of_each(totals);
        store(inverse, t, 1.0f / total, 0);
        for (int64_t r = 0; r < least(TILE, u->count - t); r++)
            job->log_sums[u->head * shape->tokens + at + t + r] = u->largest[t + r] + log2f(total[r]);
    }
    for (int64_t e = 0; e < size / TILE; e += 2) {
        const Sides sides = {s->weights, s->values + e * wide * PAIRS, wide * SPOT, wide * PAIRS, u->first / DEPTH + 1};
        if (u->count > TILE) multiply(half, ALL, &sides, s->sums + e * PAIRS, size * TILE, PAIRS, 1, 0, 0);
        else multiply(half, UPPER, &sides, s->sums + e * PAIRS, size * TILE, PAIRS, 1, 0, 0);
    }
    for (int64_t r = 0; r < u->count; r++) {
        const float *sums = s->sums + r / TILE * size * TILE + r % TILE * TILE;
        void *to = row_of(row_of(job->to, at + r, shape->out_stride, half), u->head, size, half);
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
    s->scores[0] = take(&at, DEPTH * width * 4), s->scores[1] = take(&at, DEPTH * width * 4);
    s->sums = take(&at, DEPTH * shape->size * 4);
    return (size_t)(at - bytes);
}

INLINE void task_there(int half, const Job *job, const Task *task, char *bytes) {
    const Shape *shape = job->shape;
    const int64_t size = shape->size, group = shape->heads / shape->keys, key = shape->heads + task->key;
    There s;
    laid_out(half, shape, job->width, &s, bytes);
    pack_along(half, head_of(shape, task, key), shape->stride, task->length, size, 1.0f, s.keys);
    pack(half, head_of(shape, task, key + shape->keys), shape->stride, task->length, size, 1.0f, 0, s.values,
         s.width / DEPTH);
    const unsigned before_us = enter();
    Unit units[2], none = {.s = &s, .step = 1}, *before = &none;
    for (int64_t n = 0; n < (task->length + DEPTH - 1) / DEPTH * group; n++) {
        const int64_t first = n / group * DEPTH;
        Unit *u = units + n % 2;
        u->s = &s, u->head = task->key * group + n % group, u->first = first, u->scores = s.scores[n % 2];
        u->count = least(DEPTH, task->length - first), u->scale = shape->scale * LOG2_E;
        const int64_t later = (n + 1) / group * DEPTH;
        score(half, job, task, &s, u, before,
              row_of(head_of(shape, task, task->key * group + (n + 1) % group), later, shape->stride, half));
        if (n) gather(half, job, task, &s, before);
        find_largest(half, u);
        before = u;
    }
    gather(half, job, task, &s, before);
    leave(before_us);
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
