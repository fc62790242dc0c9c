/* Products of float32 on vector units, for attention. */

#ifndef LORA_STRIPS_H
#define LORA_STRIPS_H

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
INLINE void product(int64_t rows, int64_t vectors, int64_t depth, const float *a, int64_t a_row, int64_t a_column,
                    const float *b, int64_t b_row, float *c, int64_t c_row, int fresh) {
    if (rows == ROWS) strip(ROWS, vectors, depth, a, a_row, a_column, b, b_row, c, c_row, fresh);
    else
        for (int64_t r = 0; r < rows; r++)
            strip(1, vectors, depth, a + r * a_row, a_row, a_column, b, b_row, c + r * c_row, c_row, fresh);
}

#endif
