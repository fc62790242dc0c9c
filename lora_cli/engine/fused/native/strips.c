/* Attention by document on vector units, there and back, in float32.
 *
 * Keys and values are packed once for a task; a block of queries then sees all its keys at once, so that softmax needs no
 * second scaling (documents are short), and products stop at the diagonal. On the way back probabilities are made anew
 * from the kept log-sums, as FlashAttention-2 does (arXiv:2307.08691). */

#include "strips.h"

/* `count` heads' rows as float32 [up_to, padded], times `factor`; what is beyond count or size is 0. */
static void pack(const Shape *shape, const void *from, int64_t from_stride, int64_t count, int64_t up_to, float factor,
                 float *to) {
    for (int64_t t = 0; t < up_to; t++, to += shape->padded) {
        if (t >= count) {
            memset(to, 0, (size_t)shape->padded * sizeof(float));
            continue;
        }
        const void *row = row_of(from, t, from_stride, shape->half);
        int64_t i = 0;
        for (; i + WIDTH <= shape->size; i += WIDTH)
            store(to, i, (shape->half ? load(row, i, 1) : load(row, i, 0)) * factor, 0);
        for (; i < shape->size; i++) to[i] = get(row, i, shape->half) * factor;
        for (; i < shape->padded; i++) to[i] = 0;
    }
}

/* [length, padded] as panels [padded, BLOCK] of BLOCK rows each. */
static void pack_across(const float *from, int64_t length, int64_t padded, float *to) {
    for (int64_t t = 0; t < length; t += WIDTH)
        for (int64_t e = 0; e < padded; e += WIDTH)
            transpose(from + t * padded + e, padded, to + (t / BLOCK) * padded * BLOCK + e * BLOCK + t % BLOCK, BLOCK);
}

/* A row of scores as e^(score - largest), 0 beyond `seen` up to `end`; their sum, and the largest score. */
static float soften(float *scores, int64_t seen, int64_t end, float *largest) {
    for (int64_t i = seen; i < whole(seen, WIDTH); i++) scores[i] = -INFINITY;
    vec most = load(scores, 0, 0), total = {0};
    for (int64_t i = WIDTH; i < seen; i += WIDTH) {
        vec v = load(scores, i, 0);
        most = choose(v > most, v, most);
    }
    *largest = largest_of(most);
    for (int64_t i = 0; i < seen; i += WIDTH) {
        vec v = exponential_vec(load(scores, i, 0) - *largest);
        total += v;
        store(scores, i, v, 0);
    }
    for (int64_t i = whole(seen, WIDTH); i < end; i += WIDTH) store(scores, i, (vec){0}, 0);
    return sum_of(total);
}

static void attend_head(const Shape *shape, int64_t start, int64_t length, int64_t head, const float *across,
                        const float *values, float *scratch, void *out, float *log_sums) {
    int64_t padded = shape->padded, vectors = padded / WIDTH, width = whole(length, BLOCK);
    float *queries = scratch, *scores = queries + BLOCK * padded, *sums = scores + BLOCK * width;
    for (int64_t first = 0; first < length; first += BLOCK) {
        int64_t count = least(BLOCK, length - first), rows = whole(count, ROWS);
        const void *from = row_of(row_of(shape->qkv, start + first, shape->stride, shape->half), head, shape->size,
                                  shape->half);
        pack(shape, from, shape->stride, count, rows, shape->scale, queries);
        for (int64_t key = 0; key < first + count; key += BLOCK)
            for (int64_t r = 0; r < rows; r += ROWS) {
                int64_t seen = least(BLOCK, first + r + ROWS - key);
                product(ROWS, (seen + WIDTH - 1) / WIDTH, padded, queries + r * padded, padded, 1, across + key * padded,
                        BLOCK, scores + r * width + key, width, 1);
            }
        float inverse[BLOCK];
        for (int64_t r = 0; r < rows; r++) {
            float largest, total;
            int64_t group = first + r / ROWS * ROWS + ROWS;
            total = soften(scores + r * width, first + r + 1, group, &largest);
            inverse[r] = 1.0f / total;
            if (r < count) log_sums[head * shape->tokens + start + first + r] = largest + logf(total);
        }
        for (int64_t key = 0; key < first + count; key += BLOCK)
            for (int64_t r = 0; r < rows; r += ROWS)
                product(ROWS, vectors, least(BLOCK, first + r + ROWS - key), scores + r * width + key, width, 1,
                        values + key * padded, padded, sums + r * padded, padded, key == 0);
        for (int64_t r = 0; r < count; r++) {
            void *to = row_of(row_of(out, start + first + r, shape->out_stride, shape->half), head, shape->size,
                              shape->half);
            int64_t i = 0;
            for (; i + WIDTH <= shape->size; i += WIDTH)
                if (shape->half) store(to, i, load(sums + r * padded, i, 0) * inverse[r], 1);
                else store(to, i, load(sums + r * padded, i, 0) * inverse[r], 0);
            for (; i < shape->size; i++) put(to, i, sums[r * padded + i] * inverse[r], shape->half);
        }
    }
}

static void task_there(const void *given, const Task *task, char *bytes) {
    const Job *job = given;
    const Shape *shape = job->shape;
    int64_t each = job->width * shape->padded * 4, up_to = whole(task->length, WIDTH), group = shape->heads / shape->keys;
    float *keys = take(&bytes, each), *values = take(&bytes, each), *across = take(&bytes, each);
    pack(shape, head_of(shape, task, shape->heads + task->key), shape->stride, task->length, up_to, 1.0f, keys);
    pack(shape, head_of(shape, task, shape->heads + shape->keys + task->key), shape->stride, task->length, up_to, 1.0f,
         values);
    pack_across(keys, up_to, shape->padded, across);
    for (int64_t head = task->key * group; head < (task->key + 1) * group; head++)
        attend_head(shape, task->start, task->length, head, across, values, (float *)bytes, job->to, job->log_sums);
}

int attend_on_vectors(const Shape *shape, const Documents *documents, void *out, float *log_sums) {
    int64_t width = widest(documents), padded = shape->padded;
    const Job job = {shape, 0, 0, log_sums, out, width};
    size_t bytes = sizeof(float) * (size_t)(3 * width * padded + 2 * BLOCK * padded + BLOCK * width);
    return each_task(documents, shape->keys, bytes, task_there, &job);
}

/* What a key head of a document has on its way back; everything [whole blocks, padded] but where it says across. */
typedef struct {
    float *keys, *keys_across, *values_across, *key_grads, *value_grads;
    float *queries, *grads, *query_grads; /* [BLOCK, padded] */
    float *scores, *slopes;               /* [BLOCK, BLOCK] */
} Packed;

/* The gradient of the scores of one block, and the probabilities in the place of the scores: p (dp - dot), for queries
 * from `first` and keys from `key`, none after the query. */
static void slopes_of(Packed *p, int64_t first, int64_t key, int64_t count, const float *logs, const float *dots) {
    for (int64_t r = 0; r < BLOCK; r++) {
        float *scores = p->scores + r * BLOCK, *slopes = p->slopes + r * BLOCK;
        int64_t seen = r < count ? least(BLOCK, first + r + 1 - key) : 0, i = 0;
        for (; i + WIDTH <= seen; i += WIDTH) {
            vec probability = exponential_vec(load(scores, i, 0) - logs[r]);
            store(slopes, i, probability * (load(slopes, i, 0) - dots[r]), 0);
            store(scores, i, probability, 0);
        }
        for (; i < seen; i++) {
            scores[i] = exponential(scores[i] - logs[r]);
            slopes[i] = scores[i] * (slopes[i] - dots[r]);
        }
        for (; i % WIDTH; i++) scores[i] = slopes[i] = 0;
        for (; i < BLOCK; i += WIDTH) {
            store(scores, i, (vec){0}, 0);
            store(slopes, i, (vec){0}, 0);
        }
    }
}

/* One block of queries with one block of keys, of which `keys` are the document's: gradients of all three. */
static void block_back(const Shape *shape, Packed *p, int64_t first, int64_t count, int64_t key, int64_t keys,
                       const float *logs, const float *dots) {
    int64_t padded = shape->padded, vectors = padded / WIDTH, rows = whole(count, ROWS), groups = whole(keys, ROWS);
    int64_t after = first - key; /* 0 on the diagonal */
    for (int64_t r = 0; r < rows; r += ROWS) {
        int64_t across = (least(keys, after + r + ROWS) + WIDTH - 1) / WIDTH;
        product(ROWS, across, padded, p->queries + r * padded, padded, 1, p->keys_across + key * padded, BLOCK,
                p->scores + r * BLOCK, BLOCK, 1);
        product(ROWS, across, padded, p->grads + r * padded, padded, 1, p->values_across + key * padded, BLOCK,
                p->slopes + r * BLOCK, BLOCK, 1);
    }
    slopes_of(p, first, key, count, logs, dots);
    for (int64_t r = 0; r < rows; r += ROWS)
        product(ROWS, vectors, least(groups, after + r + ROWS), p->slopes + r * BLOCK, BLOCK, 1,
                p->keys + key * padded, padded, p->query_grads + r * padded, padded, key == 0);
    for (int64_t k = 0; k < groups; k += ROWS) {
        int64_t from = after ? 0 : k; /* queries before these keys don't see them */
        product(ROWS, vectors, rows - from, p->scores + from * BLOCK + k, 1, BLOCK, p->grads + from * padded, padded,
                p->value_grads + (key + k) * padded, padded, 0);
        product(ROWS, vectors, rows - from, p->slopes + from * BLOCK + k, 1, BLOCK, p->queries + from * padded, padded,
                p->key_grads + (key + k) * padded, padded, 0);
    }
}

/* Rows of float32 [count, padded] times `factor` to a head's place. */
static void unpack(const Shape *shape, const float *from, int64_t count, float factor, void *to, int64_t to_stride) {
    for (int64_t t = 0; t < count; t++, from += shape->padded) {
        void *row = row_of(to, t, to_stride, shape->half);
        int64_t i = 0;
        for (; i + WIDTH <= shape->size; i += WIDTH)
            if (shape->half) store(row, i, load(from, i, 0) * factor, 1);
            else store(row, i, load(from, i, 0) * factor, 0);
        for (; i < shape->size; i++) put(row, i, from[i] * factor, shape->half);
    }
}

static void head_back(const Shape *shape, Packed *p, int64_t start, int64_t length, int64_t head, const void *out,
                      const void *grad, const float *log_sums, void *qkv_grad) {
    int64_t padded = shape->padded, size = shape->size, stride = shape->stride;
    int half = shape->half;
    for (int64_t first = 0; first < length; first += BLOCK) {
        int64_t count = least(BLOCK, length - first), at = start + first;
        const void *outs = row_of(row_of(out, at, shape->out_stride, half), head, size, half);
        const void *grads = row_of(row_of(grad, at, shape->grad_stride, half), head, size, half);
        pack(shape, row_of(row_of(shape->qkv, at, stride, half), head, size, half), stride, count, BLOCK, shape->scale,
             p->queries);
        pack(shape, outs, shape->out_stride, count, count, 1.0f, p->query_grads); /* for a moment */
        pack(shape, grads, shape->grad_stride, count, BLOCK, 1.0f, p->grads);
        float dots[BLOCK];
        for (int64_t r = 0; r < count; r++) {
            vec dot = {0};
            for (int64_t i = 0; i < padded; i += WIDTH)
                dot += load(p->grads + r * padded, i, 0) * load(p->query_grads + r * padded, i, 0);
            dots[r] = sum_of(dot);
        }
        for (int64_t key = 0; key < first + count; key += BLOCK)
            block_back(shape, p, first, count, key, least(BLOCK, length - key), log_sums + head * shape->tokens + at,
                       dots);
        unpack(shape, p->query_grads, count, shape->scale,
               row_of(row_of(qkv_grad, at, stride, half), head, size, half), stride);
    }
}

static void task_back(const void *given, const Task *task, char *bytes) {
    const Job *job = given;
    const Shape *shape = job->shape;
    int64_t padded = shape->padded, each = job->width * padded * 4, few = BLOCK * padded * 4, square = BLOCK * BLOCK * 4;
    int64_t length = task->length, up_to = whole(length, WIDTH), group = shape->heads / shape->keys;
    int64_t keys = shape->heads + task->key, values = keys + shape->keys;
    Packed p;
    p.keys = take(&bytes, each), p.keys_across = take(&bytes, each), p.values_across = take(&bytes, each);
    p.key_grads = take(&bytes, each), p.value_grads = take(&bytes, each), p.queries = take(&bytes, few);
    p.grads = take(&bytes, few), p.query_grads = take(&bytes, few);
    p.scores = take(&bytes, square), p.slopes = take(&bytes, square);
    pack(shape, head_of(shape, task, values), shape->stride, length, up_to, 1.0f, p.keys);
    pack_across(p.keys, up_to, padded, p.values_across);
    pack(shape, head_of(shape, task, keys), shape->stride, length, up_to, 1.0f, p.keys);
    pack_across(p.keys, up_to, padded, p.keys_across);
    memset(p.key_grads, 0, sizeof(float) * (size_t)(whole(length, BLOCK) * padded));
    memset(p.value_grads, 0, sizeof(float) * (size_t)(whole(length, BLOCK) * padded));
    for (int64_t head = task->key * group; head < (task->key + 1) * group; head++)
        head_back(shape, &p, task->start, length, head, job->out, job->grad, job->log_sums, job->to);
    void *to = row_of(job->to, task->start, shape->stride, shape->half);
    unpack(shape, p.key_grads, length, 1.0f, row_of(to, keys, shape->size, shape->half), shape->stride);
    unpack(shape, p.value_grads, length, 1.0f, row_of(to, values, shape->size, shape->half), shape->stride);
}

int attend_back_on_vectors(const Shape *shape, const Documents *documents, const void *out, const void *grad,
                           const float *log_sums, void *qkv_grad) {
    int64_t width = widest(documents), padded = shape->padded;
    const Job job = {shape, out, grad, (float *)log_sums, qkv_grad, width};
    size_t bytes = sizeof(float) * (size_t)(5 * width * padded + 3 * BLOCK * padded + 2 * BLOCK * BLOCK);
    return each_task(documents, shape->keys, bytes, task_back, &job);
}
