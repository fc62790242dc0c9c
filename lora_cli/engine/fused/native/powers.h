/* What stands between attention's products on tiles: powers of two, reductions of sixteen rows, rows of the caller's. */

#ifndef LORA_POWERS_H
#define LORA_POWERS_H

#include "planes.h"

#ifdef PLANES_FIT

#define LOG2_E 1.44269504088896341f
#define LN_2 0.693147180559945309f

/* Tiles for this thread, and no denormals, which tiles don't know either; `leave` gives back what was. */
INLINE unsigned enter(void) {
    unsigned before = _mm_getcsr();
    _mm_setcsr(before | 0x8040u);
    open_tiles();
    return before;
}

INLINE void leave(unsigned before) {
    _tile_release();
    _mm_setcsr(before);
}

/* 2^x where `seen` has a bit, else 0: 2^floor(x) times a polynomial on [0, 1), which is 1 at 0, fitted to 2e-9; for a
 * bfloat16 to 9e-5. */
INLINE vec power_of_two(int half, __mmask16 seen, vec x) {
    vec r = (vec)_mm512_reduce_ps((__m512)x, 0x09), p;
    if (half) {
        p = ((r * 0.0770670399f + 0.227644995f) * r + 0.695116758f) * r + 1.0f;
    } else {
        p = ((r * 0.000216129149f + 0.0012467847f) * r + 0.00967545155f) * r + 0.0554852821f;
        p = ((p * r + 0.240229309f) * r + 0.693147063f) * r + 1.0f;
    }
    return (vec)_mm512_maskz_scalef_ps(seen, (__m512)p, (__m512)x);
}

/* One value for each of sixteen vectors: their sums, or their largest. */
#define REDUCE(name, both)                                                                                  \
    INLINE vec name(vec rows[TILE]) {                                                                       \
        FOLD(8, both)                                                                                       \
        FOLD(4, both)                                                                                       \
        FOLD(2, both)                                                                                       \
        FOLD(1, both)                                                                                       \
        return rows[0];                                                                                     \
    }
#define FOLD(w, both)                                                                                       \
    _Pragma("GCC unroll 8") for (int r = 0; r < w; r++) {                                                   \
        const ivec upper = OF_ALL(UPPER_OF, w), lower = OF_ALL(LOWER_OF, w);                                \
        vec one = __builtin_shuffle(rows[r], rows[r + w], upper);                                           \
        vec other = __builtin_shuffle(rows[r], rows[r + w], lower);                                         \
        rows[r] = both(one, other);                                                                         \
    }
#define LARGER(a, b) ((vec)_mm512_max_ps((__m512)(a), (__m512)(b)))
#define SUM(a, b) ((a) + (b))
REDUCE(largest_of_each, LARGER)
REDUCE(sum_of_each, SUM)

/* 32 values of a row of the caller's. */
INLINE void put_row(int half, void *row, int64_t index, vec first, vec second) {
    if (half) {
        put_words((uvec)_mm512_cvtne2ps_pbh((__m512)second, (__m512)first), (uint16_t *)row + index);
    } else {
        store(row, index, first, 0);
        store(row, index + WIDTH, second, 0);
    }
}

#endif
#endif
