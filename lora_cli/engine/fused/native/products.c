/* Products of bfloat16 with sums in float32, on matrix tiles: what oneDNN does as well, and what it prepares a kernel for
 * at each new number of rows, for milliseconds, whereas micro-batches hardly ever have the same. For right sides that
 * stay in a core's second-level cache. */

#include "tiles.h"

#if defined(__AMX_BF16__) && defined(__linux__)

#define DOWN (2 * TILE)
#define TOKENS 256 /* of a block that is summed over */

/* The right side of x W': W [rows, depth] as panels of pairs along its rows. Rows are a multiple of 16. */
EXPORT void pair_weight_along(int64_t rows, int64_t depth, const uint16_t *from, uint32_t *to) {
#pragma omp parallel for schedule(static)
    for (int64_t row = 0; row < rows; row += BLOCK)
        pair_along(from + row * depth, least(BLOCK, rows - row), depth, to + row * depth / 2);
}

/* The right side of g W: W [depth, columns] as pairs of rows. */
EXPORT void pair_weight_rows(int64_t depth, int64_t columns, const uint16_t *from, uint32_t *to) {
#pragma omp parallel for schedule(static)
    for (int64_t row = 0; row < depth; row += 2) pair_rows(from + row * columns, 2, columns, to + row / 2 * columns);
}

typedef struct {
    int64_t depth, stride;
    const uint16_t *left;
    const uint32_t *right;
    int64_t row, panel; /* of the right side: from a pair to the next one, from a panel of 64 columns to the next one */
} Factor;

/* 32 rows of the left side; a copy, with zeros, where there are fewer. */
INLINE const uint16_t *some_rows(const Factor *f, int64_t first, int64_t rows, uint16_t *copy, int64_t *stride) {
    *stride = f->stride;
    if (first + DOWN <= rows) return f->left + first * f->stride;
    memset(copy, 0, (size_t)(DOWN * f->depth) * 2);
    for (int64_t r = first; r < rows; r++)
        memcpy(copy + (r - first) * f->depth, f->left + r * f->stride, (size_t)f->depth * 2);
    *stride = f->depth;
    return copy;
}

/* out [rows, columns] = the sum of one or two products, plus bias where it is given. Depths are multiples of 32. */
EXPORT int tile_product_of(int64_t rows, int64_t columns, int64_t depth, const uint16_t *left, int64_t stride,
                           const uint32_t *right, int64_t row, int64_t panel, int64_t depth_2, const uint16_t *left_2,
                           int64_t stride_2, const uint32_t *right_2, const uint16_t *bias, uint16_t *out,
                           int64_t out_stride) {
    const Factor factors[2] = {{depth, stride, left, right, row, panel},
                               {depth_2, stride_2, left_2, right_2, columns, BLOCK}};
    int failed = 0;
#pragma omp parallel
    {
        float sums[DOWN * BLOCK] __attribute__((aligned(64)));
        uint16_t *copy = aligned_alloc(64, (size_t)(DOWN * (depth + depth_2)) * 2);
        if (copy) open_tiles();
        else {
#pragma omp atomic write
            failed = 1;
        }
#pragma omp for schedule(static)
        for (int64_t first = 0; first < rows; first += DOWN) {
            if (!copy) continue;
            int64_t strides[2];
            const uint16_t *lefts[2] = {some_rows(&factors[0], first, rows, copy, &strides[0]), 0};
            if (depth_2) lefts[1] = some_rows(&factors[1], first, rows, copy + DOWN * depth, &strides[1]);
            for (int64_t n = 0; n < columns; n += BLOCK) {
                int64_t across_n = least(BLOCK, columns - n);
                for (int i = 0; i < (depth_2 ? 2 : 1); i++)
                    product(DOWN, across_n, factors[i].depth, lefts[i], strides[i],
                            factors[i].right + n / BLOCK * factors[i].panel, factors[i].row, sums, BLOCK, i == 0);
                for (int64_t r = 0; r < least(DOWN, rows - first); r++)
                    for (int64_t c = 0; c < across_n; c += WIDTH) {
                        vec v = load(sums + r * BLOCK, c, 0);
                        if (bias) v += load(bias, n + c, 1);
                        store(out + (first + r) * out_stride, n + c, v, 1);
                    }
            }
        }
        if (copy) _tile_release();
        free(copy);
    }
    return failed;
}

/* sums [ranks, columns] of left' right over the rows, in float32: left [rows, ranks], right [rows, columns], both with
 * strides; ranks are a multiple of 32, columns of 16. */
EXPORT int tile_sums_of(int64_t rows, int64_t ranks, const uint16_t *left, int64_t left_stride, int64_t columns,
                        const uint16_t *right, int64_t right_stride, float *sums) {
    int failed = 0;
    memset(sums, 0, (size_t)(ranks * columns) * 4);
#pragma omp parallel
    {
        int64_t few = TOKENS * ranks, many = TOKENS * columns;
        char *bytes = aligned_alloc(64, (size_t)(few * 4 + BLOCK * ranks * 2 + many * 4 + ranks * columns * 4));
        uint32_t *paired = (uint32_t *)bytes;
        uint16_t *turned = (uint16_t *)(paired + many / 2), *low = turned + few, *tall = low + few;
        uint32_t *pairs = (uint32_t *)(tall + many);
        float *own = (float *)(pairs + BLOCK * ranks / 2);
        if (bytes) {
            open_tiles();
            memset(own, 0, (size_t)(ranks * columns) * 4);
        } else {
#pragma omp atomic write
            failed = 1;
        }
#pragma omp for schedule(static)
        for (int64_t first = 0; first < rows; first += TOKENS) {
            if (!bytes) continue;
            int64_t count = least(TOKENS, rows - first), up_to = whole(count, BLOCK);
            for (int64_t t = 0; t < count; t++) {
                memcpy(low + t * ranks, left + (first + t) * left_stride, (size_t)ranks * 2);
                memcpy(tall + t * columns, right + (first + t) * right_stride, (size_t)columns * 2);
            }
            memset(low + count * ranks, 0, (size_t)((up_to - count) * ranks) * 2);
            memset(tall + count * columns, 0, (size_t)((up_to - count) * columns) * 2);
            for (int64_t t = 0; t < up_to; t += BLOCK) {
                pair_along(low + t * ranks, BLOCK, ranks, pairs);
                across(pairs, ranks, turned + t, TOKENS);
            }
            pair_rows(tall, up_to, columns, paired);
            for (int64_t r = 0; r < ranks; r += DOWN)
                for (int64_t n = 0; n < columns; n += BLOCK)
                    product(DOWN, least(BLOCK, columns - n), up_to, turned + r * TOKENS, TOKENS, paired + n, columns,
                            own + r * columns + n, columns, 0);
        }
        if (bytes) {
            _tile_release();
#pragma omp critical(lora_sums)
            for (int64_t i = 0; i < ranks * columns; i += WIDTH) store(sums, i, load(sums, i, 0) + load(own, i, 0), 0);
        }
        free(bytes);
    }
    return failed;
}

/* Whether there are tiles. */
EXPORT int has_tiles(void) { return tiles_fit(1, DEPTH); }

#else

EXPORT int has_tiles(void) { return 0; }

#endif
