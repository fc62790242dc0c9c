/* Attention by document in bfloat16 on matrix tiles (Intel's AMX): as attention.c does it, with products of bfloat16 that
 * are summed in float32. Probabilities and the gradients of scores are rounded to bfloat16 before they are multiplied,
 * as FlashAttention does. */

#include "tiles.h"

#if defined(__AMX_BF16__) && defined(__linux__)

/* Linux gives tiles to a process that asks for them: arch_prctl(ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA). */
int tiles_fit(int half, int64_t size) {
    static int granted = -1;
    if (granted < 0) granted = syscall(SYS_arch_prctl, 0x1023, 18) == 0;
    return granted && half && size % DEPTH == 0;
}

/* A head's rows as they are, [up_to, size]; 0 beyond count. */
static void copy_rows(const Shape *shape, const void *from, int64_t stride, int64_t count, int64_t up_to, uint16_t *to) {
    size_t bytes = (size_t)shape->size * 2;
    for (int64_t t = 0; t < count; t++) memcpy(to + t * shape->size, row_of(from, t, stride, 1), bytes);
    memset(to + count * shape->size, 0, (size_t)(up_to - count) * bytes);
}

/* Scores, times `scale`, to e^(score - largest) in bfloat16, 0 from `seen` up to `end`; their sum, and the largest. */
static float soften(float *scores, float scale, int64_t seen, int64_t end, uint16_t *weights, float *largest) {
    for (int64_t i = seen; i < whole(seen, WIDTH); i++) scores[i] = -INFINITY;
    vec most = load(scores, 0, 0), total = {0};
    for (int64_t i = WIDTH; i < seen; i += WIDTH) {
        vec v = load(scores, i, 0);
        most = choose(v > most, v, most);
    }
    *largest = largest_of(most) * scale;
    int64_t i = 0;
    for (; i < seen; i += WIDTH) {
        vec v = exponential_vec(load(scores, i, 0) * scale - *largest);
        total += v;
        store(weights, i, v, 1);
    }
    for (; i < end; i += WIDTH) store(weights, i, (vec){0}, 1);
    return sum_of(total);
}

typedef struct {
    uint16_t *rows, *queries, *weights;
    uint32_t *keys, *values;
    float *scores, *sums;
} There;

static void attend_head(const Shape *shape, const There *s, int64_t start, int64_t length, int64_t head, int64_t width,
                        void *out, float *log_sums) {
    int64_t size = shape->size;
    for (int64_t first = 0; first < length; first += BLOCK) {
        int64_t count = least(BLOCK, length - first), rows = whole(count, TILE), at = start + first;
        copy_rows(shape, row_of(row_of(shape->qkv, at, shape->stride, 1), head, size, 1), shape->stride, count, BLOCK,
                  s->queries);
        for (int64_t key = 0; key < first + count; key += BLOCK)
            for (int64_t r = 0; r < rows; r += 2 * TILE) {
                int64_t down = least(2 * TILE, rows - r), columns = least(BLOCK, first + r + down - key);
                product(down, columns, size, s->queries + r * size, size, s->keys + key * size / 2, BLOCK,
                        s->scores + r * width + key, width, 1);
            }
        float inverse[BLOCK];
        for (int64_t r = 0; r < rows; r++) {
            float largest, total;
            int64_t end = whole(first + r / (2 * TILE) * 2 * TILE + 2 * TILE, DEPTH);
            total = soften(s->scores + r * width, shape->scale, first + r + 1, end, s->weights + r * width, &largest);
            inverse[r] = 1.0f / total;
            if (r < count) log_sums[head * shape->tokens + at + r] = largest + logf(total);
        }
        for (int64_t r = 0; r < rows; r += 2 * TILE)
            product(least(2 * TILE, rows - r), size, whole(first + r + 2 * TILE, DEPTH), s->weights + r * width, width,
                    s->values, size, s->sums + r * size, size, 1);
        for (int64_t r = 0; r < count; r++) {
            void *to = row_of(row_of(out, at + r, shape->out_stride, 1), head, size, 1);
            for (int64_t i = 0; i < size; i += WIDTH) store(to, i, load(s->sums + r * size, i, 0) * inverse[r], 1);
        }
    }
}

int attend_on_tiles(const Shape *shape, int64_t documents, const int64_t *order, const int64_t *starts, void *out,
                    float *log_sums) {
    int64_t width = widest(order, starts), size = shape->size, keys = shape->keys, group = shape->heads / keys;
    int failed = 0;
#pragma omp parallel
    {
        int64_t each = width * size * 2, few = BLOCK * size, wide = BLOCK * width;
        char *bytes = aligned_alloc(64, (size_t)(3 * each + few * 2 + wide * 2 + wide * 4 + few * 4));
        There s = {(uint16_t *)bytes, 0, 0, 0, 0, 0, 0};
        s.keys = (uint32_t *)(bytes + each), s.values = (uint32_t *)(bytes + 2 * each);
        s.queries = (uint16_t *)(bytes + 3 * each), s.weights = s.queries + few;
        s.scores = (float *)(s.weights + wide), s.sums = s.scores + wide;
        if (bytes) open_tiles();
        else {
#pragma omp atomic write
            failed = 1;
        }
#pragma omp for schedule(dynamic, 1)
        for (int64_t task = 0; task < documents * keys; task++) {
            if (!bytes) continue;
            int64_t start = starts[order[task / keys]], length = starts[order[task / keys] + 1] - start;
            int64_t key = task % keys, up_to = whole(length, BLOCK);
            const void *row = row_of(shape->qkv, start, shape->stride, 1);
            copy_rows(shape, row_of(row, shape->heads + key, size, 1), shape->stride, length, up_to, s.rows);
            pair_along(s.rows, up_to, size, s.keys);
            copy_rows(shape, row_of(row, shape->heads + keys + key, size, 1), shape->stride, length, up_to, s.rows);
            pair_rows(s.rows, up_to, size, s.values);
            for (int64_t head = key * group; head < (key + 1) * group; head++)
                attend_head(shape, &s, start, length, head, width, out, log_sums);
        }
        if (bytes) _tile_release();
        free(bytes);
    }
    return failed;
}

typedef struct {
    uint16_t *rows, *queries, *grads, *outs, *queries_across, *grads_across, *slopes;
    uint32_t *keys_along, *values_along, *keys_down, *pairs, *weights_down, *slopes_down;
    float *key_grads, *value_grads; /* panels [size, BLOCK] */
    float *query_grads, *scores, *dots;
} Back;

/* From scores and the gradients of weights, [BLOCK, BLOCK] both: the weights in pairs of queries, and the gradients of
 * scores as they are and in pairs; nothing where a key comes after the query or either isn't there. */
static void slopes_of(const Shape *shape, Back *b, int64_t after, int64_t count, int64_t rows, const float *logs,
                      const float *dots) {
    const ivec steps = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    for (int64_t r = 0; r < rows; r += 2)
        for (int64_t k = 0; k < BLOCK; k += WIDTH) {
            uvec weights[2], slopes[2];
            for (int64_t i = 0; i < 2; i++) {
                int64_t row = r + i;
                vec weight = {0}, slope = {0};
                if (row < count && k <= after + row) {
                    weight = exponential_vec(load(b->scores + row * BLOCK, k, 0) * shape->scale - logs[row]);
                    slope = weight * (load(b->dots + row * BLOCK, k, 0) - dots[row]);
                    ivec seen = steps <= (int32_t)least(after + row - k, BLOCK);
                    weight = (vec)(seen & (ivec)weight), slope = (vec)(seen & (ivec)slope);
                }
                weights[i] = rounded_bits(weight), slopes[i] = rounded_bits(slope);
                *(hvec_at *)(b->slopes + row * BLOCK + k) = __builtin_convertvector(slopes[i] >> 16, hvec);
            }
            *(vec_at *)(void *)(b->weights_down + r / 2 * BLOCK + k) = (vec)(weights[0] >> 16 | (weights[1] & 0xffff0000u));
            *(vec_at *)(void *)(b->slopes_down + r / 2 * BLOCK + k) = (vec)(slopes[0] >> 16 | (slopes[1] & 0xffff0000u));
        }
}

static void block_back(const Shape *shape, Back *b, int64_t first, int64_t count, int64_t key, const float *logs,
                       const float *dots) {
    int64_t size = shape->size, after = first - key, rows = whole(count, DEPTH);
    for (int64_t r = 0; r < rows; r += 2 * TILE) {
        int64_t columns = least(BLOCK, after + r + 2 * TILE);
        product(2 * TILE, columns, size, b->queries + r * size, size, b->keys_along + key * size / 2, BLOCK,
                b->scores + r * BLOCK, BLOCK, 1);
        product(2 * TILE, columns, size, b->grads + r * size, size, b->values_along + key * size / 2, BLOCK,
                b->dots + r * BLOCK, BLOCK, 1);
    }
    slopes_of(shape, b, after, count, rows, logs, dots);
    for (int64_t r = 0; r < rows; r += 2 * TILE)
        product(2 * TILE, size, least(BLOCK, after + r + 2 * TILE), b->slopes + r * BLOCK, BLOCK,
                b->keys_down + key / 2 * size, size, b->query_grads + r * size, size, key == 0);
    for (int64_t k = 0; k < BLOCK; k += 2 * TILE) {
        int64_t from = after ? 0 : k; /* queries before these keys don't see them */
        if (from >= rows) break;
        for (int64_t e = 0; e < size; e += 2 * TILE) {
            int64_t to = key * size + e * BLOCK + k;
            product(2 * TILE, 2 * TILE, rows - from, b->grads_across + e * BLOCK + from, BLOCK,
                    b->weights_down + from / 2 * BLOCK + k, BLOCK, b->value_grads + to, BLOCK, 0);
            product(2 * TILE, 2 * TILE, rows - from, b->queries_across + e * BLOCK + from, BLOCK,
                    b->slopes_down + from / 2 * BLOCK + k, BLOCK, b->key_grads + to, BLOCK, 0);
        }
    }
}

static void head_back(const Shape *shape, Back *b, int64_t start, int64_t length, int64_t head, const void *out,
                      const void *grad, const float *log_sums, void *qkv_grad) {
    int64_t size = shape->size, stride = shape->stride;
    for (int64_t first = 0; first < length; first += BLOCK) {
        int64_t count = least(BLOCK, length - first), at = start + first;
        const void *outs = row_of(row_of(out, at, shape->out_stride, 1), head, size, 1);
        copy_rows(shape, row_of(row_of(shape->qkv, at, stride, 1), head, size, 1), stride, count, BLOCK, b->queries);
        copy_rows(shape, row_of(row_of(grad, at, shape->grad_stride, 1), head, size, 1), shape->grad_stride, count, BLOCK,
                  b->grads);
        pair_along(b->queries, BLOCK, size, b->pairs);
        across(b->pairs, size, b->queries_across, BLOCK);
        pair_along(b->grads, BLOCK, size, b->pairs);
        across(b->pairs, size, b->grads_across, BLOCK);
        float dots[BLOCK];
        for (int64_t r = 0; r < count; r++) {
            vec dot = {0};
            for (int64_t i = 0; i < size; i += WIDTH)
                dot += load(b->grads + r * size, i, 1) * load(row_of(outs, r, shape->out_stride, 1), i, 1);
            dots[r] = sum_of(dot);
        }
        for (int64_t key = 0; key < first + count; key += BLOCK)
            block_back(shape, b, first, count, key, log_sums + head * shape->tokens + at, dots);
        for (int64_t r = 0; r < count; r++) {
            void *to = row_of(row_of(qkv_grad, at + r, stride, 1), head, size, 1);
            for (int64_t i = 0; i < size; i += WIDTH) store(to, i, load(b->query_grads + r * size, i, 0) * shape->scale, 1);
        }
    }
}

/* Panels [size, BLOCK] of gradients to a head's rows. */
static void across_back(const Shape *shape, const float *from, int64_t length, float factor, void *to) {
    float turned[TILE * TILE];
    for (int64_t t = 0; t < length; t += TILE)
        for (int64_t e = 0; e < shape->size; e += TILE) {
            transpose(from + t / BLOCK * BLOCK * shape->size + e * BLOCK + t % BLOCK, BLOCK, turned, TILE);
            for (int64_t r = 0; r < least(TILE, length - t); r++)
                store(row_of(to, t + r, shape->stride, 1), e, load(turned + r * TILE, 0, 0) * factor, 1);
        }
}

int attend_back_on_tiles(const Shape *shape, int64_t documents, const int64_t *order, const int64_t *starts,
                         const void *out, const void *grad, const float *log_sums, void *qkv_grad) {
    int64_t width = widest(order, starts), size = shape->size, keys = shape->keys, group = shape->heads / keys;
    int failed = 0;
#pragma omp parallel
    {
        int64_t each = width * size, few = BLOCK * size, square = BLOCK * BLOCK;
        char *bytes = aligned_alloc(64, (size_t)(each * 16 + few * 14 + square * 14));
        Back b = {0};
        b.key_grads = (float *)bytes, b.value_grads = b.key_grads + each;
        b.query_grads = b.value_grads + each, b.scores = b.query_grads + few, b.dots = b.scores + square;
        b.keys_along = (uint32_t *)(b.dots + square), b.values_along = b.keys_along + each / 2;
        b.keys_down = b.values_along + each / 2, b.pairs = b.keys_down + each / 2;
        b.weights_down = b.pairs + few / 2, b.slopes_down = b.weights_down + square / 2;
        b.rows = (uint16_t *)(b.slopes_down + square / 2), b.queries = b.rows + each, b.grads = b.queries + few;
        b.queries_across = b.grads + few, b.grads_across = b.queries_across + few, b.slopes = b.grads_across + few;
        if (bytes) open_tiles();
        else {
#pragma omp atomic write
            failed = 1;
        }
#pragma omp for schedule(dynamic, 1)
        for (int64_t task = 0; task < documents * keys; task++) {
            if (!bytes) continue;
            int64_t start = starts[order[task / keys]], length = starts[order[task / keys] + 1] - start;
            int64_t key = task % keys, up_to = whole(length, BLOCK);
            const void *row = row_of(shape->qkv, start, shape->stride, 1);
            copy_rows(shape, row_of(row, shape->heads + keys + key, size, 1), shape->stride, length, up_to, b.rows);
            pair_along(b.rows, up_to, size, b.values_along);
            copy_rows(shape, row_of(row, shape->heads + key, size, 1), shape->stride, length, up_to, b.rows);
            pair_along(b.rows, up_to, size, b.keys_along);
            pair_rows(b.rows, up_to, size, b.keys_down);
            memset(b.key_grads, 0, (size_t)(up_to * size) * 4);
            memset(b.value_grads, 0, (size_t)(up_to * size) * 4);
            for (int64_t head = key * group; head < (key + 1) * group; head++)
                head_back(shape, &b, start, length, head, out, grad, log_sums, qkv_grad);
            void *to = row_of(qkv_grad, start, shape->stride, 1);
            across_back(shape, b.key_grads, length, shape->scale, row_of(to, shape->heads + key, size, 1));
            across_back(shape, b.value_grads, length, 1.0f, row_of(to, shape->heads + keys + key, size, 1));
        }
        if (bytes) _tile_release();
        free(bytes);
    }
    return failed;
}

#else

int tiles_fit(int half, int64_t size) { return (void)half, (void)size, 0; }

int attend_on_tiles(const Shape *shape, int64_t documents, const int64_t *order, const int64_t *starts, void *out,
                    float *log_sums) {
    return (void)shape, (void)documents, (void)order, (void)starts, (void)out, (void)log_sums, 1;
}

int attend_back_on_tiles(const Shape *shape, int64_t documents, const int64_t *order, const int64_t *starts,
                         const void *out, const void *grad, const float *log_sums, void *qkv_grad) {
    (void)shape, (void)documents, (void)order, (void)starts, (void)out, (void)grad, (void)log_sums, (void)qkv_grad;
    return 1;
}

#endif
