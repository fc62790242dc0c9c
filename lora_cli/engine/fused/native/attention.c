/* Causal attention within documents, there and back, in float32, from rows [T, stride] that hold all query heads, then all
 * key heads, then all value heads.
 *
 * A task is one document's key head with the query heads that share it. Keys and values are packed once for a task; a
 * block of queries then sees all its keys at once, so that softmax needs no second scaling (documents are short), and
 * products stop at the diagonal. On the way back probabilities are made anew from the kept log-sums, as
 * FlashAttention-2 does (arXiv:2307.08691). Scratch is asked for once in a thread. */

#include "blocks.h"

#define ROWS 4   /* of a product's tile */
#ifdef __AVX512F__
#define TILE 4 /* vectors across a product's tile: with four rows, sixteen sums stay in registers */
#else
#define TILE 1
#endif

/* c [rows, 16 vectors] (+)= a b: a's values are anywhere, b's rows are whole vectors. */
#define PRODUCT_TILE(rows, vectors)                                                                         \
    do {                                                                                                    \
        vec sums[rows][vectors];                                                                            \
        _Pragma("GCC unroll 8") for (int r = 0; r < rows; r++)                                              \
            _Pragma("GCC unroll 8") for (int v = 0; v < vectors; v++)                                       \
                sums[r][v] = fresh ? (vec){0} : load(c + r * c_row, v * WIDTH, 0);                          \
        for (int64_t k = 0; k < depth; k++) {                                                               \
            _Pragma("GCC unroll 8") for (int v = 0; v < vectors; v++) {                                     \
                vec right = load(b + k * b_row, v * WIDTH, 0);                                              \
                _Pragma("GCC unroll 8") for (int r = 0; r < rows; r++)                                      \
                    sums[r][v] += a[r * a_row + k * a_column] * right;                                      \
            }                                                                                               \
        }                                                                                                   \
        _Pragma("GCC unroll 8") for (int r = 0; r < rows; r++)                                              \
            _Pragma("GCC unroll 8") for (int v = 0; v < vectors; v++)                                       \
                store(c + r * c_row, v * WIDTH, sums[r][v], 0);                                             \
    } while (0)

INLINE void strip(int rows, int64_t vectors, int64_t depth, const float *a, int64_t a_row, int64_t a_column,
                  const float *b, int64_t b_row, float *c, int64_t c_row, int fresh) {
#define STRIP(rows)                                                                                         \
    for (; vectors >= TILE; vectors -= TILE, b += TILE * WIDTH, c += TILE * WIDTH) PRODUCT_TILE(rows, TILE); \
    if (TILE > 1) {                                                                                         \
        if (vectors == 3) PRODUCT_TILE(rows, 3);                                                            \
        if (vectors == 2) PRODUCT_TILE(rows, 2);                                                            \
        if (vectors == 1) PRODUCT_TILE(rows, 1);                                                            \
    }
    if (rows == ROWS) {
        STRIP(ROWS)
    } else {
        STRIP(1)
    }
}

/* Rows are strided by `a_row`, what is summed over by `a_column`. */
static void product(int64_t rows, int64_t vectors, int64_t depth, const float *a, int64_t a_row, int64_t a_column,
                    const float *b, int64_t b_row, float *c, int64_t c_row, int fresh) {
    if (rows == ROWS) strip(ROWS, vectors, depth, a, a_row, a_column, b, b_row, c, c_row, fresh);
    else
        for (int64_t r = 0; r < rows; r++)
            strip(1, vectors, depth, a + r * a_row, a_row, a_column, b, b_row, c + r * c_row, c_row, fresh);
}

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

/* Of documents `order`, longest first; starts [documents + 1]. Gives out [T, out_stride] and log_sums [heads, T].
 * Returns 0, or 1 when there is no memory for scratch. */
EXPORT int attend(int half, int64_t documents, const int64_t *order, const int64_t *starts, int64_t heads, int64_t keys,
                  int64_t size, const void *qkv, int64_t stride, float scale, void *out, int64_t out_stride,
                  float *log_sums) {
    Shape shape = {half, heads, keys, size, whole(size, WIDTH), stride, out_stride, 0, starts[documents], scale, qkv};
    if (tiles_fit(half, size)) return attend_on_tiles(&shape, documents, order, starts, out, log_sums);
    int64_t width = widest(order, starts), padded = shape.padded;
    int failed = 0;
#pragma omp parallel
    {
        size_t bytes = sizeof(float) * (size_t)(3 * width * padded + 2 * BLOCK * padded + BLOCK * width);
        float *keys_packed = aligned_alloc(64, bytes), *values = keys_packed + width * padded;
        float *across = values + width * padded, *scratch = across + width * padded;
        if (!keys_packed) {
#pragma omp atomic write
            failed = 1;
        }
#pragma omp for schedule(dynamic, 1)
        for (int64_t task = 0; task < documents * keys; task++) {
            if (!keys_packed) continue;
            int64_t start = starts[order[task / keys]], length = starts[order[task / keys] + 1] - start;
            int64_t key = task % keys, group = heads / keys, up_to = whole(length, WIDTH);
            const void *row = row_of(qkv, start, stride, half);
            pack(&shape, row_of(row, heads + key, size, half), stride, length, up_to, 1.0f, keys_packed);
            pack(&shape, row_of(row, heads + keys + key, size, half), stride, length, up_to, 1.0f, values);
            pack_across(keys_packed, up_to, padded, across);
            for (int64_t head = key * group; head < (key + 1) * group; head++)
                attend_head(&shape, start, length, head, across, values, scratch, out, log_sums);
        }
        free(keys_packed);
    }
    return failed;
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

/* The gradient of qkv, all of [T, stride], from that of `attend`'s output, that output and its log_sums. */
EXPORT int attend_back(int half, int64_t documents, const int64_t *order, const int64_t *starts, int64_t heads,
                       int64_t keys, int64_t size, const void *qkv, int64_t stride, float scale, const void *out,
                       int64_t out_stride, const void *grad, int64_t grad_stride, const float *log_sums, void *qkv_grad) {
    Shape shape = {half, heads, keys, size, whole(size, WIDTH), stride, out_stride, grad_stride,
                   starts[documents], scale, qkv};
    if (tiles_fit(half, size))
        return attend_back_on_tiles(&shape, documents, order, starts, out, grad, log_sums, qkv_grad);
    int64_t width = widest(order, starts), padded = shape.padded;
    int failed = 0;
#pragma omp parallel
    {
        size_t each = (size_t)(width * padded), few = (size_t)(BLOCK * padded);
        float *s = aligned_alloc(64, sizeof(float) * (5 * each + 3 * few + 2 * BLOCK * BLOCK));
        Packed p = {s, s + each, s + 2 * each, s + 3 * each, s + 4 * each, 0, 0, 0, 0, 0};
        p.queries = s + 5 * each, p.grads = p.queries + few, p.query_grads = p.grads + few;
        p.scores = p.query_grads + few, p.slopes = p.scores + BLOCK * BLOCK;
        if (!s) {
#pragma omp atomic write
            failed = 1;
        }
#pragma omp for schedule(dynamic, 1)
        for (int64_t task = 0; task < documents * keys; task++) {
            if (!s) continue;
            int64_t start = starts[order[task / keys]], length = starts[order[task / keys] + 1] - start;
            int64_t key = task % keys, group = heads / keys, up_to = whole(length, WIDTH);
            const void *row = row_of(qkv, start, stride, half);
            pack(&shape, row_of(row, heads + keys + key, size, half), stride, length, up_to, 1.0f, p.keys);
            pack_across(p.keys, up_to, padded, p.values_across);
            pack(&shape, row_of(row, heads + key, size, half), stride, length, up_to, 1.0f, p.keys);
            pack_across(p.keys, up_to, padded, p.keys_across);
            memset(p.key_grads, 0, sizeof(float) * (size_t)(whole(length, BLOCK) * padded));
            memset(p.value_grads, 0, sizeof(float) * (size_t)(whole(length, BLOCK) * padded));
            for (int64_t head = key * group; head < (key + 1) * group; head++)
                head_back(&shape, &p, start, length, head, out, grad, log_sums, qkv_grad);
            void *to = row_of(qkv_grad, start, stride, half);
            unpack(&shape, p.key_grads, length, 1.0f, row_of(to, heads + key, size, half), stride);
            unpack(&shape, p.value_grads, length, 1.0f, row_of(to, heads + keys + key, size, half), stride);
        }
        free(s);
    }
    return failed;
}
