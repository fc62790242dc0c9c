/* The way back's blocks of queries on tiles, and from scores and gradients of weights the gradients of scores. */

#ifndef LORA_SLOPES_H
#define LORA_SLOPES_H

#include "powers.h"

#ifdef PLANES_FIT

#define QUERIES 128 /* of a block: the gradients of keys and values are fetched and stored once for so many */

typedef struct {
    uint16_t *keys, *values;                /* left tiles [key, along size] */
    uint32_t *keys_down;                    /* left tiles [size, keys], as words */
    uint32_t *queries_along, *grads_along;  /* right tiles [query, along size] of a block */
    uint32_t *queries, *grads;              /* right tiles [size, pairs of queries] of a block */
    uint16_t *weights, *slopes;             /* left tiles [2 of keys, queries of a block] */
    uint32_t *slopes_down;                  /* right tiles [queries of a block, pairs of keys] */
    float *key_grads, *value_grads;         /* tiles [keys, size] */
    float *scores, *dots;                   /* twice tiles [2 of keys, 2 of queries] */
    float logs[QUERIES], rows[QUERIES];     /* of a block's queries; `rows`: their gradients times what they gave */
    int64_t width;
} Back;

/* What is left to do of `slopes_of` for a block of 32 keys and 32 queries, from the `pair`th of sixteen pairs of keys. */
typedef struct {
    const Back *b;
    int64_t query, pairs_next;
    const float *scores, *dots;
    uint32_t *pairs;
    float scale;
    int whole, diagonal, down, across, pair;
} Block;

/* From scores and gradients of weights, the weights and the gradients of scores of two keys and 32 queries. Queries that
 * aren't there have no gradient, so their weights are as good as 0; keys that aren't there come after every query. */
INLINE void slopes_of(int half, int whole, Block *of) {
    if (of->pair == TILE) return;
    const Back *b = of->b;
    const int64_t planes = planes_of(half), to = of->query / DEPTH * planes * SPOT;
    const int key[2] = {(int)first_of(half, of->pair), (int)second_of(half, of->pair)};
    vec weights[2][2], slopes[2][2];
    for (int i = 0; i < 2; i++)
        for (int q = 0; q < 2; q++) {
            const int t = !half ? i : key[i] / TILE, k = !half ? of->pair : key[i] % TILE, at = (2 * t + q) * PAIRS + k * TILE;
            vec x = load(of->scores + at, 0, 0) * (half ? of->scale : 1.0f) - load(b->logs, of->query + q * TILE, 0);
            vec apart = load(of->dots + at, 0, 0) - load(b->rows, of->query + q * TILE, 0);
            if (whole) {
                weights[i][q] = power_of_two(half, 0xffff, x);
                slopes[i][q] = weights[i][q] * apart;
                continue;
            }
            unsigned seen = of->diagonal && t >= q ? t > q ? 0 : 0xffffu << k : 0xffffu;
            if (t > of->down || q > of->across) seen = 0;
            weights[i][q] = power_of_two(half, (__mmask16)seen, x);
            slopes[i][q] = (vec)_mm512_maskz_mul_ps((__mmask16)seen, (__m512)weights[i][q], (__m512)apart);
        }
    uvec rows[2][PIECES], pairs[2][PIECES];
    for (int i = 0; i < 2; i++) {
        const int64_t row = to + key[i] / TILE * (QUERIES / DEPTH * planes * SPOT) + key[i] % TILE * DEPTH;
        planes_of_row(half, weights[i][0], weights[i][1], rows[i]);
        for (int p = 0; p < planes; p++) put_words(rows[i][p], b->weights + row + p * SPOT);
    }
    planes_of_two(half, 1, slopes, rows, pairs);
    for (int i = 0; i < 2; i++) {
        const int64_t row = to + key[i] / TILE * (QUERIES / DEPTH * planes * SPOT) + key[i] % TILE * DEPTH;
        for (int p = 0; p < planes; p++) put_words(rows[i][p], b->slopes + row + p * SPOT);
        for (int p = 0; p < planes && (whole || i <= of->across); p++)
            put_words(pairs[i][p], of->pairs + i * of->pairs_next + p * PAIRS + of->pair * TILE);
    }
    of->pair++;
}

/* As much of it as fits beside four products of tiles. */
static __attribute__((noinline)) void slopes_of_full(void *given) {
    Block *block = given;
    if (block->whole) slopes_of(0, 1, block);
    else slopes_of(0, 0, block);
}

INLINE void finish(int half, Block *block) {
    while (block->pair < TILE)
        if (block->whole) slopes_of(half, 1, block);
        else slopes_of(half, 0, block);
}

#endif
#endif
