/* What stands between products, one pass over memory each: RMS norms, rotary positions, gated activations, and the
 * cross-entropy of logits. Rows are [T, width] with a stride in values; `half` says bfloat16, else float32; arithmetic
 * is in float32 and rounded once. */

#include "rows.h"

INLINE void normed_row(const void *x, float inverse, const void *weight, void *out, int64_t width, int half) {
    int64_t i = 0;
    for (; i + WIDTH <= width; i += WIDTH) {
        vec v = load(x, i, half) * inverse;
        if (half) { /* transformers rounds before the weight */
            uint16_t between[WIDTH];
            store(between, 0, v, 1);
            v = load(between, 0, 1);
        }
        store(out, i, v * load(weight, i, half), half);
    }
    for (; i < width; i++) {
        float v = get(x, i, half) * inverse;
        if (half) {
            uint16_t between = rounded(v);
            v = get(&between, 0, 1);
        }
        put(out, i, v * get(weight, i, half), half);
    }
}

INLINE void added_row(void *x, const void *more, int64_t width, int half) {
    int64_t i = 0;
    for (; i + WIDTH <= width; i += WIDTH) store(x, i, load(x, i, half) + load(more, i, half), half);
    for (; i < width; i++) put(x, i, get(x, i, half) + get(more, i, half), half);
}

/* out = RMS norm of x; where `more` is given, x becomes x + more first. */
EXPORT void rms_norm(int half, int64_t rows, int64_t width, void *x, const void *more, const void *weight, float eps,
                     void *out, int64_t out_stride) {
#pragma omp parallel for schedule(static)
    for (int64_t t = 0; t < rows; t++) {
        void *xs = row_of(x, t, width, half), *to = row_of(out, t, out_stride, half);
        const void *mores = more ? row_of(more, t, width, half) : 0;
        if (half) {
            if (more) added_row(xs, mores, width, 1);
            normed_row(xs, inverse_rms(xs, width, eps, 1), weight, to, width, 1);
        } else {
            if (more) added_row(xs, mores, width, 0);
            normed_row(xs, inverse_rms(xs, width, eps, 0), weight, to, width, 0);
        }
    }
}

/* out = the gradient of a norm's input, from that of its output, plus `residual`. */
EXPORT void rms_norm_back(int half, int64_t rows, int64_t width, const void *grad, int64_t grad_stride, const void *x,
                          const void *weight, const void *residual, float eps, void *out) {
#pragma omp parallel for schedule(static)
    for (int64_t t = 0; t < rows; t++) {
        void *g = row_of(grad, t, grad_stride, half), *xs = row_of(x, t, width, half);
        void *r = row_of(residual, t, width, half), *to = row_of(out, t, width, half);
        if (half) norm_back_row(g, 1, xs, inverse_rms(xs, width, eps, 1), weight, r, width, to, 1);
        else norm_back_row(g, 0, xs, inverse_rms(xs, width, eps, 0), weight, r, width, to, 0);
    }
}

/* Rotary positions in place on the first `heads` heads of each row, halves paired; sign -1 turns back. */
EXPORT void rotate(int half, int64_t rows, int64_t heads, int64_t size, void *x, int64_t stride, const void *cosine,
                   const void *sine, float sign) {
#pragma omp parallel for schedule(static)
    for (int64_t t = 0; t < rows; t++) {
        void *c = row_of(cosine, t, size, half), *s = row_of(sine, t, size, half);
        for (int64_t h = 0; h < heads; h++) {
            void *head = row_of(row_of(x, t, stride, half), h, size, half);
            if (half) rotate_head(head, 1, c, s, sign, size / 2, 1);
            else rotate_head(head, 0, c, s, sign, size / 2, 0);
        }
    }
}

/* Sixteen values of a row, or the `count` that are left of it. */
INLINE vec load_some(const void *row, int64_t index, int64_t count, int half) {
    if (count >= WIDTH) return load(row, index, half);
    vec v = {0};
    for (int64_t i = 0; i < count; i++) v[i] = get(row, index + i, half);
    return v;
}

INLINE void store_some(void *row, int64_t index, vec v, int64_t count, int half) {
    if (count >= WIDTH) {
        store(row, index, v, half);
        return;
    }
    for (int64_t i = 0; i < count; i++) put(row, index + i, v[i], half);
}

INLINE void gated_row(const void *gate, const void *up, void *out, int64_t width, int kind, int half) {
    for (int64_t i = 0; i < width; i += WIDTH) {
        vec slope, v = activation(load_some(gate, i, width - i, half), kind, &slope, half);
        store_some(out, i, v * load_some(up, i, width - i, half), width - i, half);
    }
}

/* out [T, width] = act(gate) * up, from rows of [gate, up]. */
EXPORT void gated(int half, int kind, int64_t rows, int64_t width, const void *gate_up, void *out, int64_t out_stride) {
#pragma omp parallel for schedule(static)
    for (int64_t t = 0; t < rows; t++) {
        void *gate = row_of(gate_up, t, 2 * width, half), *up = row_of(gate, 1, width, half);
        void *to = row_of(out, t, out_stride, half);
        if (half) {
            if (kind == SILU) gated_row(gate, up, to, width, SILU, 1);
            else gated_row(gate, up, to, width, GELU_TANH, 1);
        } else {
            if (kind == SILU) gated_row(gate, up, to, width, SILU, 0);
            else gated_row(gate, up, to, width, GELU_TANH, 0);
        }
    }
}

INLINE void gated_back_row(void *gate, void *up, void *grad, int64_t width, int kind, int half) {
    for (int64_t i = 0; i < width; i += WIDTH) {
        int64_t count = width - i;
        vec slope, g = load_some(grad, i, count, half), u = load_some(up, i, count, half);
        vec v = activation(load_some(gate, i, count, half), kind, &slope, half);
        store_some(gate, i, g * u * slope, count, half);
        store_some(up, i, g * v, count, half);
        store_some(grad, i, v * u, count, half);
    }
}

/* gate and up become their gradients, and grad, that of `gated`'s output, becomes that output. */
EXPORT void gated_back(int half, int kind, int64_t rows, int64_t width, void *gate_up, void *grad, int64_t grad_stride) {
#pragma omp parallel for schedule(static)
    for (int64_t t = 0; t < rows; t++) {
        void *gate = row_of(gate_up, t, 2 * width, half), *up = row_of(gate, 1, width, half);
        void *g = row_of(grad, t, grad_stride, half);
        if (half) {
            if (kind == SILU) gated_back_row(gate, up, g, width, SILU, 1);
            else gated_back_row(gate, up, g, width, GELU_TANH, 1);
        } else {
            if (kind == SILU) gated_back_row(gate, up, g, width, SILU, 0);
            else gated_back_row(gate, up, g, width, GELU_TANH, 0);
        }
    }
}

INLINE float entropy_row(void *logits, int64_t width, int64_t target, int half) {
    vec most = {0}, total = {0};
    float largest = get(logits, 0, half), wanted = get(logits, target, half);
    int64_t i = 0;
    most += largest;
    for (; i + WIDTH <= width; i += WIDTH) {
        vec v = load(logits, i, half);
        most = choose(v > most, v, most);
    }
    largest = largest_of(most);
    for (; i < width; i++) largest = get(logits, i, half) > largest ? get(logits, i, half) : largest;
    for (i = 0; i + WIDTH <= width; i += WIDTH) {
        vec v = exponential_vec(load(logits, i, half) - largest);
        total += v;
        if (!half) store(logits, i, v, 0); /* 16 bits would be rounded twice */
    }
    float sum = sum_of(total);
    for (; i < width; i++) sum += exponential(get(logits, i, half) - largest);
    float inverse = 1.0f / sum;
    for (i = 0; i + WIDTH <= width; i += WIDTH) {
        vec v = half ? exponential_vec(load(logits, i, 1) - largest) : load(logits, i, 0);
        store(logits, i, v * inverse, half);
    }
    for (; i < width; i++) put(logits, i, exponential(get(logits, i, half) - largest) * inverse, half);
    put(logits, target, exponential(wanted - largest) * inverse - 1.0f, half);
    return largest + logf(sum) - wanted;
}

/* losses [T] of the targets, and the gradient of their sum in the place of the logits. */
EXPORT void cross_entropy(int half, int64_t rows, int64_t width, void *logits, const int64_t *targets, float *losses) {
#pragma omp parallel for schedule(static)
    for (int64_t t = 0; t < rows; t++) {
        void *row = row_of(logits, t, width, half);
        losses[t] = half ? entropy_row(row, width, targets[t], 1) : entropy_row(row, width, targets[t], 0);
    }
}
