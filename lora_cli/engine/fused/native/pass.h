/* A pass of all threads over blocks of rows: the packed weights that they share, what each has for itself. */

#ifndef LORA_PASS_H
#define LORA_PASS_H

#include "group.h"

#ifdef TILES

#include <omp.h>

#define ROWS 128 /* of a block, at most */
#define GROUPS 3
#define BUFFERS 6

typedef struct {
    int half, back;
    int64_t tokens, count, rows;
    Group groups[GROUPS];
    int64_t row_widths[BUFFERS], left_widths[BUFFERS]; /* of buffers that a block needs; 0 for none */
} Pass;

typedef struct {
    Room rooms[GROUPS];
    float *sums[GROUPS], *rows[BUFFERS];
    int64_t strides[BUFFERS], steps[BUFFERS];
    uint16_t *left[BUFFERS];
} Own;

/* Blocks of about one size, as many for each thread. */
static int64_t rows_of_block(int64_t tokens) {
    int64_t threads = omp_get_max_threads(), blocks = whole((tokens + ROWS - 1) / ROWS, threads);
    return whole((tokens + blocks - 1) / blocks, WIDE);
}

/* The sums come first; `*scratch` is where the rest begins. */
static Own own_of(const Pass *p, Memory *memory, size_t *scratch) {
    Own own = {0};
    int pieces = p->half ? 1 : PIECES;
    for (int64_t i = 0; i < p->count; i++)
        if (p->groups[i].back) own.sums[i] = some(memory, sums_size(&p->groups[i]) * 4);
    *scratch = memory->used;
    for (int64_t i = 0; i < p->count; i++) own.rooms[i] = room_of(pieces, &p->groups[i], p->rows, memory);
    for (int64_t i = 0; i < BUFFERS; i++) {
        own.strides[i] = wides(p->row_widths[i]) * WIDE + TILE; /* no power of two, by which rows fall on each other */
        own.steps[i] = wides(p->left_widths[i]);
        if (p->row_widths[i]) own.rows[i] = some(memory, p->rows * own.strides[i] * 4);
        if (p->left_widths[i]) own.left[i] = some(memory, p->rows * own.steps[i] * pieces * WIDE * 2);
    }
    return own;
}

static void pack_groups(const Pass *p) {
    for (int64_t i = 0; i < p->count; i++) copy_adapters(&p->groups[i]);
#pragma omp barrier
    for (int64_t i = 0; i < p->count; i++)
        if (p->half) pack_group(1, &p->groups[i]);
        else pack_group(PIECES, &p->groups[i]);
#pragma omp barrier
}

/* Says which groups there are, with memory or only to know how much. */
typedef void Groups(Pass *p, const void *layer, Memory *memory);
/* What is done to rows `first` up to `first + count`. */
typedef void Block(const Pass *p, const void *layer, const Own *own, int64_t first, int64_t count);

/* Every block of rows, then the gradients. All memory is asked for at once, by the thread that calls: what that one frees
 * stays in the process, whereas the others' would be given back and come as new pages each time. 1 when there is none. */
static int run_pass(Pass *p, const void *layer, Groups *groups, Block *block) {
    Memory shared = {0}, each = {0};
    size_t scratch;
    int64_t threads = omp_get_max_threads();
    p->rows = rows_of_block(p->tokens);
    groups(p, layer, &shared);
    (void)own_of(p, &each, &scratch);
    char *bytes = aligned_alloc(64, shared.used + (size_t)threads * each.used);
    if (!bytes) return 1;
    size_t begin = shared.used;
    shared = (Memory){bytes, 0};
    groups(p, layer, &shared);
    Memory of_first = {bytes + begin, 0};
    const Own first_own = own_of(p, &of_first, &scratch);
#pragma omp parallel num_threads(threads)
    {
        Memory memory = {bytes + begin + (size_t)omp_get_thread_num() * each.used, 0};
        size_t from;
        const Own own = own_of(p, &memory, &from);
        memset(memory.at, 0, from);
        open_tiles();
        pack_groups(p);
#pragma omp for schedule(static)
        for (int64_t first = 0; first < p->tokens; first += p->rows) {
            int64_t count = least(p->rows, p->tokens - first);
            if (count < p->rows) memset(memory.at + from, 0, each.used - from); /* rows that aren't there add nothing */
            block(p, layer, &own, first, count);
        }
        _tile_release();
        for (int64_t i = 0; i < p->count; i++)
            if (first_own.sums[i]) give_sums(&p->groups[i], first_own.sums[i], each.used, omp_get_num_threads());
    }
    free(bytes);
    return 0;
}

#endif
#endif
