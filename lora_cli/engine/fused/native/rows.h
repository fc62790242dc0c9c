/* What is done to one row: its root mean square, a norm back, rotary positions, the activation. */

#ifndef LORA_ROWS_H
#define LORA_ROWS_H

#include "vectors.h"

enum { SILU = 0, GELU_TANH = 1 };

INLINE float inverse_rms(const void *x, int64_t width, float eps, int half) {
    vec squares[4] = {{0}};
    int64_t i = 0;
    for (; i + 4 * WIDTH <= width; i += 4 * WIDTH)
        for (int k = 0; k < 4; k++) {
            vec v = load(x, i + k * WIDTH, half);
            squares[k] += v * v;
        }
    float total = sum_of((squares[0] + squares[1]) + (squares[2] + squares[3]));
    for (; i < width; i++) total += get(x, i, half) * get(x, i, half);
    return 1.0f / sqrtf(total / (float)width + eps);
}

/* out = the gradient of an RMS norm's input plus `residual`, from that of its output in bfloat16 (`narrow`) or float32, and
 * x's inverse_rms. */
INLINE void norm_back_row(const void *grad, int narrow, const void *x, float inverse, const void *weight,
                          const void *residual, int64_t width, void *out, int half) {
    vec dots[2] = {{0}};
    int64_t i = 0;
    for (; i + 2 * WIDTH <= width; i += 2 * WIDTH)
        for (int k = 0; k < 2; k++) {
            int64_t at = i + k * WIDTH;
            dots[k] += load(grad, at, narrow) * load(weight, at, half) * load(x, at, half);
        }
    float dot = sum_of(dots[0] + dots[1]);
    for (; i < width; i++) dot += get(grad, i, narrow) * get(weight, i, half) * get(x, i, half);
    float back = dot * inverse * inverse * inverse / (float)width;
    for (i = 0; i + WIDTH <= width; i += WIDTH) {
        vec v = load(grad, i, narrow) * load(weight, i, half) * inverse - load(x, i, half) * back;
        store(out, i, v + load(residual, i, half), half);
    }
    for (; i < width; i++) {
        float v = get(grad, i, narrow) * get(weight, i, half) * inverse - get(x, i, half) * back;
        put(out, i, v + get(residual, i, half), half);
    }
}

/* Rotary positions on a head of bfloat16 (`narrow`) or float32, halves paired, in place. */
INLINE void rotate_head(void *head, int narrow, const void *cosine, const void *sine, float sign, int64_t half_size, int half) {
    int64_t i = 0;
    for (; i + WIDTH <= half_size; i += WIDTH) {
        vec first = load(head, i, narrow), second = load(head, i + half_size, narrow);
        store(head, i, first * load(cosine, i, half) - second * (load(sine, i, half) * sign), narrow);
        store(head, i + half_size,
              second * load(cosine, i + half_size, half) + first * (load(sine, i + half_size, half) * sign),
              narrow);
    }
    for (; i < half_size; i++) {
        float first = get(head, i, narrow), second = get(head, i + half_size, narrow);
        put(head, i, first * get(cosine, i, half) - second * get(sine, i, half) * sign, narrow);
        put(head, i + half_size,
            second * get(cosine, i + half_size, half) + first * get(sine, i + half_size, half) * sign, narrow);
    }
}

/* 1 / (1 + e^-x). For bfloat16 to 3e-6, a thousandth of what its rounding costs: e^-x is 2^floor(y) times a polynomial on
 * [0, 1), and the processor's estimate of a reciprocal is bettered once. Below -87 it is as large as there. */
INLINE vec logistic(vec x, int half) {
#ifdef __AVX512DQ__
    if (half) {
        vec y = (vec)_mm512_min_ps(_mm512_set1_ps(126.0f), (__m512)(x * -1.44269504088896341f));
        vec r = (vec)_mm512_reduce_ps((__m512)y, 0x09);
        vec p = (((r * 0.0134266843f + 0.0522424742f) * r + 0.241280205f) * r + 0.693044845f) * r + 1.0f;
        vec sum = (vec)_mm512_scalef_ps((__m512)p, (__m512)y) + 1.0f, inverse = (vec)_mm512_rcp14_ps((__m512)sum);
        return inverse * (2.0f - sum * inverse);
    }
#endif
    (void)half;
    return 1.0f / (1.0f + exponential_vec(-x));
}

/* The activation and its derivative. tanh(u) is 1 - 2 / (1 + e^2u). */
INLINE vec activation(vec x, int kind, vec *slope, int half) {
    if (kind == SILU) {
        vec gate = logistic(x, half);
        *slope = gate * (1.0f + x * (1.0f - gate));
        return x * gate;
    }
    vec u = 0.7978845608028654f * (x + 0.044715f * x * x * x);
    vec tangent = 1.0f - 2.0f * logistic(-2.0f * u, half);
    vec inner = 0.7978845608028654f * (1.0f + 3.0f * 0.044715f * x * x);
    *slope = 0.5f * (1.0f + tangent) + 0.5f * x * (1.0f - tangent * tangent) * inner;
    return 0.5f * x * (1.0f + tangent);
}

#endif
