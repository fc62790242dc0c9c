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

/* As many blocks for each thread, unless some would be without any rows. They differ by 32 rows at most, and so do what
 * threads have to do. */
static int64_t blocks_of(int64_t tokens) { return least(whole((tokens + ROWS - 1) / ROWS, omp_get_max_threads()), wides(tokens)); }

/* Where the i-th of `blocks` begins. */
INLINE int64_t block_at(int64_t tokens, int64_t blocks, int64_t i) { return wides(tokens) * i / blocks * WIDE; }

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

/* Rows from `count` up to a whole block's are 0, and add nothing to any sum. Only left blocks are written row by row. */
static void clear_rows(const Pass *p, const Own *own, int64_t count) {
    int pieces = p->half ? 1 : PIECES;
    for (int64_t i = 0; count % WIDE && i < BUFFERS; i++)
        for (int64_t s = 0; s < own->steps[i] * pieces; s++)
            memset(left_at(pieces, own->left[i], own->steps[i], count, 0) + s * LEFT, 0,
                   (size_t)(WIDE - count % WIDE) * WIDE * 2);
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
    int64_t blocks = blocks_of(p->tokens);
    p->rows = (wides(p->tokens) + blocks - 1) / blocks * WIDE;
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
        Own own = own_of(p, &memory, &from);
        memset(memory.at, 0, from);
        open_tiles();
        pack_groups(p);
#pragma omp for schedule(static)
        for (int64_t n = 0; n < blocks; n++) {
            int64_t first = block_at(p->tokens, blocks, n), rows = block_at(p->tokens, blocks, n + 1) - first;
            int64_t count = least(rows, p->tokens - first);
            for (int64_t i = 0; i < p->count; i++) own.rooms[i].rows = rows;
            clear_rows(p, &own, count);
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
