/* Matrix tiles (Intel's AMX) of bfloat16, summed in float32. A product's right side takes values in pairs: [depth / 2,
 * columns] of two values that follow each other in depth. */

#ifndef LORA_TILES_H
#define LORA_TILES_H

#include "blocks.h"

#if defined(__AMX_BF16__) && defined(__linux__)
#define TILES 1

#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>

#define TILE 16 /* rows, and columns of float32 */
#define DEPTH 32

INLINE void open_tiles(void) {
    struct {
        uint8_t palette, start, reserved[14];
        uint16_t row_bytes[16];
        uint8_t rows[16];
    } __attribute__((packed, aligned(64))) config = {.palette = 1};
    for (int i = 0; i < 8; i++) config.row_bytes[i] = 64, config.rows[i] = 16;
    __asm__ volatile("" ::"r"(&config) : "memory"); /* GCC takes the call to read eight bytes alone, and drops the rest */
    _tile_loadconfig(&config);
}

/* c (+)= a b for one or two tiles down and across. */
INLINE void tile_product(int down, int across, int64_t depth, const uint16_t *a, int64_t a_row, const uint32_t *b,
                         int64_t b_row, float *c, int64_t c_row, int fresh) {
    if (fresh) {
        _tile_zero(0);
        if (across) _tile_zero(1);
        if (down) _tile_zero(2);
        if (down && across) _tile_zero(3);
    } else {
        _tile_loadd(0, c, c_row * 4);
        if (across) _tile_loadd(1, c + TILE, c_row * 4);
        if (down) _tile_loadd(2, c + TILE * c_row, c_row * 4);
        if (down && across) _tile_loadd(3, c + TILE * c_row + TILE, c_row * 4);
    }
    for (int64_t k = 0; k < depth; k += DEPTH, a += DEPTH, b += DEPTH / 2 * b_row) {
        _tile_loadd(4, a, a_row * 2);
        _tile_loadd(6, b, b_row * 4);
        _tile_dpbf16ps(0, 4, 6);
        if (across) {
            _tile_loadd(7, b + TILE, b_row * 4);
            _tile_dpbf16ps(1, 4, 7);
        }
        if (down) {
            _tile_loadd(5, a + TILE * a_row, a_row * 2);
            _tile_dpbf16ps(2, 5, 6);
            if (across) _tile_dpbf16ps(3, 5, 7);
        }
    }
    _tile_stored(0, c, c_row * 4);
    if (across) _tile_stored(1, c + TILE, c_row * 4);
    if (down) _tile_stored(2, c + TILE * c_row, c_row * 4);
    if (down && across) _tile_stored(3, c + TILE * c_row + TILE, c_row * 4);
}

/* Rows are 16 or 32, columns whole tiles, depth a multiple of 32. */
INLINE void product(int64_t rows, int64_t columns, int64_t depth, const uint16_t *a, int64_t a_row, const uint32_t *b,
                    int64_t b_row, float *c, int64_t c_row, int fresh) {
    int64_t n = 0;
    for (; n + 2 * TILE <= columns; n += 2 * TILE)
        if (rows > TILE) tile_product(1, 1, depth, a, a_row, b + n, b_row, c + n, c_row, fresh);
        else tile_product(0, 1, depth, a, a_row, b + n, b_row, c + n, c_row, fresh);
    if (n < columns) {
        if (rows > TILE) tile_product(1, 0, depth, a, a_row, b + n, b_row, c + n, c_row, fresh);
        else tile_product(0, 0, depth, a, a_row, b + n, b_row, c + n, c_row, fresh);
    }
}

/* Rows [length, size] as panels [size / 2, BLOCK] of pairs along a row, for products that sum over the row. */
INLINE void pair_along(const uint16_t *from, int64_t length, int64_t size, uint32_t *to) {
    for (int64_t t = 0; t < length; t += TILE)
        for (int64_t e = 0; e < size / 2; e += TILE)
            transpose((const float *)(const void *)(from + t * size) + e, size / 2,
                      (float *)to + t / BLOCK * BLOCK * size / 2 + e * BLOCK + t % BLOCK, BLOCK);
}

/* Rows [length, size] as [length / 2, size] of pairs of rows, for products that sum over rows. */
INLINE void pair_rows(const uint16_t *from, int64_t length, int64_t size, uint32_t *to) {
    for (int64_t t = 0; t < length; t += 2, from += 2 * size, to += size)
        for (int64_t e = 0; e < size; e += WIDTH) {
            uvec even = __builtin_convertvector(*(const hvec_at *)(from + e), uvec);
            uvec odd = __builtin_convertvector(*(const hvec_at *)(from + size + e), uvec);
            *(vec_at *)(void *)(to + e) = (vec)(even | odd << 16);
        }
}

/* A panel of `pair_along` as the transposed rows [size, BLOCK] themselves, `to_row` apart. */
INLINE void across(const uint32_t *pairs, int64_t size, uint16_t *to, int64_t to_row) {
    for (int64_t e = 0; e < size / 2; e++, pairs += BLOCK, to += 2 * to_row)
        for (int64_t t = 0; t < BLOCK; t += WIDTH) {
            uvec both = (uvec)load(pairs, t, 0);
            *(hvec_at *)(to + t) = __builtin_convertvector(both & 0xffffu, hvec);
            *(hvec_at *)(to + to_row + t) = __builtin_convertvector(both >> 16, hvec);
        }
}

#endif
#endif
