/* Vectors of sixteen floats, loaded from float32 or bfloat16 and stored as either; written for GCC's vector extensions,
 * so that -march=native decides what they become. */

#ifndef LORA_VECTORS_H
#define LORA_VECTORS_H

#include <math.h>
#include <stdint.h>
#include <string.h>
#ifdef __AVX512F__
#include <immintrin.h>
#endif

#define INLINE static inline __attribute__((always_inline))
#define EXPORT __attribute__((visibility("default")))
#define WIDTH 16

typedef float vec __attribute__((vector_size(64)));
typedef int32_t ivec __attribute__((vector_size(64)));
typedef uint32_t uvec __attribute__((vector_size(64)));
typedef uint16_t hvec __attribute__((vector_size(32)));
typedef float vec_at __attribute__((vector_size(64), aligned(4), may_alias));
typedef uint16_t hvec_at __attribute__((vector_size(32), aligned(2), may_alias));

/* The `index`th value of a row: `half` says whether values are bfloat16. */
INLINE float get(const void *row, int64_t index, int half) {
    if (!half) return ((const float *)row)[index];
    uint32_t bits = (uint32_t)((const uint16_t *)row)[index] << 16;
    float value;
    memcpy(&value, &bits, 4);
    return value;
}

/* To the nearest bfloat16, ties to even, as PyTorch rounds. */
INLINE uint16_t rounded(float value) {
    uint32_t bits;
    memcpy(&bits, &value, 4);
    uint32_t up = bits + 0x7fffu + ((bits >> 16) & 1u);
    return (uint16_t)(value != value ? 0x7fc0u : up >> 16);
}

INLINE void put(void *row, int64_t index, float value, int half) {
    if (half) ((uint16_t *)row)[index] = rounded(value);
    else ((float *)row)[index] = value;
}

INLINE vec load(const void *row, int64_t index, int half) {
    if (!half) return *(const vec_at *)((const float *)row + index);
    hvec narrow = *(const hvec_at *)((const uint16_t *)row + index);
    return (vec)(__builtin_convertvector(narrow, uvec) << 16);
}

/* The same for sixteen: the upper half of each word is the bfloat16. */
INLINE uvec rounded_bits(vec v) {
    uvec bits = (uvec)v;
    uvec nan = (uvec)(v != v);
    return ((bits + 0x7fffu + ((bits >> 16) & 1u)) & ~nan) | (nan & 0x7fc00000u);
}

/* Sixteen values as bfloat16s. Where the processor rounds by itself, what is denormal becomes 0, as tiles take it. */
INLINE hvec narrowed(vec v) {
#ifdef __AVX512BF16__
    return (hvec)_mm512_cvtneps_pbh((__m512)v);
#else
    return __builtin_convertvector(rounded_bits(v) >> 16, hvec);
#endif
}

INLINE void store(void *row, int64_t index, vec value, int half) {
    if (!half) {
        *(vec_at *)((float *)row + index) = value;
        return;
    }
    *(hvec_at *)((uint16_t *)row + index) = narrowed(value);
}

/* The address of a row of `stride` values. */
INLINE void *row_of(const void *start, int64_t row, int64_t stride, int half) {
    return (char *)start + row * stride * (half ? 2 : 4);
}

/* `yes` where the mask is all ones, `no` where it is 0. */
INLINE vec choose(ivec mask, vec yes, vec no) { return (vec)((mask & (ivec)yes) | (~mask & (ivec)no)); }

/* e^r for |r| up to ln 2 / 2. */
#define EXPONENTIAL_POLYNOMIAL(r)                                                                           \
    ((((((r * 1.9875691500e-4f + 1.3981999507e-3f) * r + 8.3334519073e-3f) * r + 4.1665795894e-2f) * r +     \
       1.6666665459e-1f) * r + 5.0000001201e-1f) * (r * r) + r + 1.0f)

/* e^x to about one unit in the last place: 2^n times a polynomial on [-ln 2 / 2, ln 2 / 2], as Cephes's expf has it.
 * Below -87 it is 0, above 88 as large as there; what isn't a number stays none. */
INLINE float exponential(float x) {
    float clamped = x < -87.0f ? -87.0f : x > 88.0f ? 88.0f : x;
    float shifted = clamped * 1.44269504088896341f + 12582912.0f;
    float n = shifted - 12582912.0f;
    float r = clamped - n * 0.693359375f;
    r = r + n * 2.12194440e-4f;
    float p = EXPONENTIAL_POLYNOMIAL(r);
    int32_t bits;
    memcpy(&bits, &shifted, 4);
    bits = (bits - 0x4b400000 + 127) << 23;
    float power;
    memcpy(&power, &bits, 4);
    return x < -87.0f ? 0.0f : p * power;
}

#ifdef __AVX512F__
INLINE vec exponential_vec(vec x) {
    const __m512 low = _mm512_set1_ps(-87.0f), high = _mm512_set1_ps(88.0f);
    vec clamped = (vec)_mm512_min_ps(high, _mm512_max_ps(low, (__m512)x));
    vec n = (vec)_mm512_roundscale_ps((__m512)(clamped * 1.44269504088896341f), _MM_FROUND_TO_NEAREST_INT);
    vec r = clamped - n * 0.693359375f;
    r = r + n * 2.12194440e-4f;
    vec p = EXPONENTIAL_POLYNOMIAL(r);
    return (vec)_mm512_maskz_scalef_ps(_mm512_cmp_ps_mask((__m512)x, low, _CMP_NLT_UQ), (__m512)p, (__m512)n);
}
#else
INLINE vec exponential_vec(vec x) {
    vec low = (vec){0} - 87.0f, high = (vec){0} + 88.0f;
    ivec tiny = x < low;
    vec clamped = choose(x > high, high, choose(tiny, low, x));
    vec shifted = clamped * 1.44269504088896341f + 12582912.0f;
    vec n = shifted - 12582912.0f;
    vec r = clamped - n * 0.693359375f;
    r = r + n * 2.12194440e-4f;
    vec p = EXPONENTIAL_POLYNOMIAL(r);
    ivec bits = ((ivec)shifted - 0x4b400000 + 127) << 23;
    return choose(tiny, (vec){0}, p * (vec)bits);
}
#endif

INLINE float sum_of(vec v) {
#ifdef __AVX512F__
    return _mm512_reduce_add_ps((__m512)v);
#else
    float total = 0;
    for (int i = 0; i < WIDTH; i++) total += v[i];
    return total;
#endif
}

INLINE float largest_of(vec v) {
    float most = v[0];
    for (int i = 1; i < WIDTH; i++) most = v[i] > most ? v[i] : most;
    return most;
}

#endif
