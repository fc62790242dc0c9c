/* Adapted linear layers that share an input, y_i = x W_i' + bias_i + s_i (x A_i') B_i', for blocks of rows: products
 * there and back, and the sums over rows that are the gradients of A and B.
 *
 * In float32 (three pieces) W + s B A is multiplied; in bfloat16 (one piece), where that sum would lose small adapters,
 * [x, x A'] and [W, s B]. Outputs of all layers lie side by side, each beginning at a multiple of 32 columns; ranks of all
 * lie side by side, each beginning at a multiple of 16. */

#ifndef LORA_GROUP_H
#define LORA_GROUP_H

#include "packing.h"

#ifdef TILES

#define MOST 3 /* layers of a group */

/* As Python fills it in. Gradients are those of a and b, in their shapes. */
typedef struct {
    const void *weight, *bias; /* [outputs, inputs], [outputs] or none */
    const float *a, *b;        /* [rank, inputs], [outputs, rank] */
    float *a_grad, *b_grad;
    int64_t outputs, rank;
    double scale;
} Linear;

typedef struct {
    const Linear *linears;
    int64_t count, inputs, outputs, ranks, half;
    int64_t output_at[MOST + 1], rank_at[MOST + 1]; /* where each layer's columns begin, and the end */
    int back;
    float *a;                       /* [ranks, inputs] */
    float *b[MOST];                 /* s B: [outputs, its ranks], 0 beyond */
    uint32_t *main;                 /* of x W' or g W */
    uint32_t *low;                  /* of x A' */
    uint32_t *low_out[MOST];        /* there, in bfloat16: of (x A') (s B)' */
    uint32_t *low_back[MOST];       /* back: of g (s B) */
    uint32_t *low_in;               /* back, in bfloat16: of (g s B) A */
} Group;

INLINE int64_t ranks_of(const Group *g, int64_t i) { return g->rank_at[i + 1] - g->rank_at[i]; }

/* Where everything of a group goes. A group with no adapter has no ranks. */
static Group group_of(const Linear *linears, int64_t count, int64_t inputs, int half, int back, Memory *memory) {
    Group g = {.linears = linears, .count = count, .inputs = inputs, .half = half, .back = back};
    int pieces = half ? 1 : PIECES;
    for (int64_t i = 0; i < count; i++) {
        g.output_at[i + 1] = g.output_at[i] + wides(linears[i].outputs) * WIDE;
        g.rank_at[i + 1] = g.rank_at[i] + whole(linears[i].rank, TILE);
    }
    g.outputs = g.output_at[count], g.ranks = g.rank_at[count];
    g.main = some(memory, right_bytes(pieces, back ? g.outputs : inputs, back ? inputs : g.outputs));
    if (!g.ranks) return g;
    g.a = some(memory, g.ranks * inputs * 4);
    if (half || back) g.low = some(memory, right_bytes(pieces, inputs, g.ranks));
    if (half && back) g.low_in = some(memory, right_bytes(pieces, g.ranks, inputs));
    for (int64_t i = 0; i < count; i++) {
        int64_t ranks = g.rank_at[i + 1] - g.rank_at[i];
        if (!ranks) continue;
        g.b[i] = some(memory, linears[i].outputs * ranks * 4);
        if (back) g.low_back[i] = some(memory, right_bytes(pieces, linears[i].outputs, ranks));
        else if (half) g.low_out[i] = some(memory, right_bytes(pieces, ranks, linears[i].outputs));
    }
    return g;
}

/* A and s B with whole sixteens of ranks; by all threads together, which wait for each other before what follows. */
static void copy_adapters(const Group *g) {
    for (int64_t i = 0; i < g->count; i++) {
        const Linear *l = &g->linears[i];
        int64_t ranks = ranks_of(g, i);
#pragma omp for schedule(static) nowait
        for (int64_t r = 0; r < ranks; r++) {
            float *to = g->a + (g->rank_at[i] + r) * g->inputs;
            if (r < l->rank) memcpy(to, l->a + r * g->inputs, (size_t)g->inputs * 4);
            else memset(to, 0, (size_t)g->inputs * 4);
        }
#pragma omp for schedule(static) nowait
        for (int64_t o = 0; o < (ranks ? l->outputs : 0); o++)
            for (int64_t r = 0; r < ranks; r++)
                g->b[i][o * ranks + r] = r < l->rank ? l->b[o * l->rank + r] * (float)l->scale : 0;
    }
}

INLINE Matrix plain(const float *at, int64_t rows, int64_t columns) {
    return (Matrix){at, 0, rows, columns, 0, 0, 0};
}

#define PANELS(pieces, count, of, matrix, right, each)                                                      \
    _Pragma("omp for schedule(static) nowait") for (int64_t n = 0; n < wides(count); n++)                   \
        of(pieces, &matrix, n, (right) + n * wides(each) * pieces * RIGHT);

/* The right sides of a group's products; by all threads together, as above. */
INLINE void pack_group(int pieces, const Group *g) {
    for (int64_t i = 0; i < g->count; i++) {
        const Linear *l = &g->linears[i];
        int64_t ranks = ranks_of(g, i);
        Matrix weight = {l->weight, (int)g->half, l->outputs, g->inputs, 0, 0, 0};
        if (ranks && pieces == PIECES)
            weight.rank = ranks, weight.b = g->b[i], weight.a = g->a + g->rank_at[i] * g->inputs;
        Matrix b = plain(g->b[i], l->outputs, ranks);
        if (g->back) {
            /* Each panel goes on through all layers: this one's steps of it. */
            int64_t panel = wides(g->outputs) * pieces * RIGHT;
            uint32_t *start = g->main + g->output_at[i] / WIDE * pieces * RIGHT;
#pragma omp for schedule(static) nowait
            for (int64_t n = 0; n < wides(g->inputs); n++) panel_down(pieces, &weight, n, start + n * panel);
            if (ranks) PANELS(pieces, ranks, panel_down, b, g->low_back[i], l->outputs)
        } else {
            uint32_t *start = g->main + g->output_at[i] / WIDE * wides(g->inputs) * pieces * RIGHT;
            PANELS(pieces, l->outputs, panel_along, weight, start, g->inputs)
            if (g->low_out[i]) PANELS(pieces, l->outputs, panel_along, b, g->low_out[i], ranks)
        }
    }
    Matrix a = plain(g->a, g->ranks, g->inputs);
    if (g->low) PANELS(pieces, g->ranks, panel_along, a, g->low, g->inputs)
    if (g->low_in) PANELS(pieces, g->inputs, panel_down, a, g->low_in, g->ranks)
}

/* What a thread needs for a block of `rows` rows of a group, beside input and outputs. */
typedef struct {
    int64_t rows;
    float *low, *back;                  /* x A' and g s B, [rows, ranks + 16] */
    uint16_t *low_left, *back_left;     /* the same as left sides, in bfloat16; x A' with each layer's ranks apart */
    uint16_t *low_turned, *back_turned; /* the same as left sides that are summed over rows, 16 ranks each */
    uint32_t *panel;                    /* the other side of such a sum */
} Room;

INLINE int64_t low_stride(const Group *g) { return g->ranks + TILE; }

/* From one layer's ranks to the next one's, in `low_left`. */
INLINE int64_t low_size(int pieces, const Group *g, int64_t rows) {
    int64_t most = 0;
    for (int64_t i = 0; i < g->count; i++) most = ranks_of(g, i) > most ? ranks_of(g, i) : most;
    return rows * wides(most) * WIDE * pieces;
}

static Room room_of(int pieces, const Group *g, int64_t rows, Memory *memory) {
    Room r = {.rows = rows};
    int64_t turned = rows / WIDE * whole(g->ranks, WIDE) / TILE * pieces * LEFT;
    if (!g->ranks) return r;
    r.low = some(memory, rows * low_stride(g) * 4);
    if (pieces == 1) r.low_left = some(memory, MOST * low_size(pieces, g, rows) * 2);
    if (!g->back) return r;
    r.back = some(memory, rows * low_stride(g) * 4);
    if (pieces == 1) r.back_left = some(memory, rows * wides(g->ranks) * WIDE * 2);
    r.low_turned = some(memory, turned), r.back_turned = some(memory, turned);
    r.panel = some(memory, rows / WIDE * pieces * RIGHT * 4);
    return r;
}

INLINE void rows_to_left(int pieces, const float *from, int64_t stride, int64_t rows, int64_t columns, uint16_t *left) {
    for (int64_t r = 0; r < rows; r++) put_row(pieces, left, wides(columns), r, from + r * stride, columns, 0);
}

/* `ranks` columns of rows, turned: [16 ranks at a time][steps of rows][pieces][16][32]. */
INLINE void turn_rows(int pieces, const float *from, int64_t stride, int64_t rows, int64_t ranks, uint16_t *to) {
    float turned[TILE][TILE] __attribute__((aligned(64)));
    for (int64_t t = 0; t < ranks; t += TILE)
        for (int64_t r = 0; r < rows; r += TILE) {
            transpose(from + r * stride + t, stride, turned[0], TILE);
            uint16_t *tile = to + (t * rows / WIDE / TILE + r / WIDE) * pieces * LEFT / 2 + r % WIDE;
            for (int64_t k = 0; k < TILE; k++) {
                uvec found[PIECES];
                split(pieces, 0, load(turned[k], 0, 0), found);
                for (int p = 0; p < pieces; p++)
                    *(hvec_at *)(tile + p * LEFT / 2 + k * WIDE) = upper_half(found[p]);
            }
        }
}

/* x A', from some or all of the input's steps; with the last, it is made ready for what needs it. */
INLINE void group_low(int pieces, const Group *g, const Room *room, Left x) {
    int64_t steps = wides(g->inputs), stride = low_stride(g);
    Factor low = {x, g->low, steps};
    if (!g->ranks || !g->low) return;
    multiply(pieces, room->rows / WIDE, g->ranks, &low, 0, !x.from, room->low, stride);
    if (x.to < steps) return;
    if (g->back) turn_rows(pieces, room->low, stride, room->rows, g->ranks, room->low_turned);
    else
        for (int64_t i = 0; i < g->count; i++)
            rows_to_left(pieces, room->low + g->rank_at[i], stride, room->rows, ranks_of(g, i),
                         room->low_left + i * low_size(pieces, g, room->rows));
}

/* `columns` of the i-th layer's outputs from `first` on, a multiple of 32, without bias; rows of out are `stride` apart.
 * From some or all of the input's steps, after `group_low` of the same. */
INLINE void group_there(int pieces, const Group *g, const Room *room, Left x, int64_t i, int64_t first, int64_t columns,
                        float *out, int64_t stride) {
    int64_t steps = wides(g->inputs), ranks = wides(ranks_of(g, i));
    Factor one = {x, g->main + (g->output_at[i] + first) / WIDE * steps * pieces * RIGHT, steps};
    Factor more = {whole_left(room->low_left + i * low_size(pieces, g, room->rows), ranks),
                   g->low_out[i] + first / WIDE * ranks * pieces * RIGHT, ranks};
    int joined = pieces == 1 && ranks && x.to == steps;
    multiply(pieces, room->rows / WIDE, columns, &one, joined ? &more : 0, !x.from, out, stride);
}

/* All outputs of all layers side by side. */
INLINE void group_all(int pieces, const Group *g, const Room *room, Left x, float *out, int64_t stride) {
    group_low(pieces, g, room, x);
    for (int64_t i = 0; i < g->count; i++)
        group_there(pieces, g, room, x, i, 0, g->output_at[i + 1] - g->output_at[i], out + g->output_at[i], stride);
}

/* g s B of the i-th layer, from some or all of its outputs' gradients. */
INLINE void group_low_back(int pieces, const Group *g, const Room *room, int64_t i, Left grad) {
    Factor back = {grad, g->low_back[i], wides(g->linears[i].outputs)};
    if (ranks_of(g, i))
        multiply(pieces, room->rows / WIDE, ranks_of(g, i), &back, 0, !grad.from, room->back + g->rank_at[i], low_stride(g));
}

/* When those of all layers are whole. */
INLINE void group_low_back_done(int pieces, const Group *g, const Room *room) {
    if (!g->ranks) return;
    if (pieces == 1) rows_to_left(pieces, room->back, low_stride(g), room->rows, g->ranks, room->back_left);
    turn_rows(pieces, room->back, low_stride(g), room->rows, g->ranks, room->back_turned);
}

/* `columns` of the input's gradient from `first` on, a multiple of 32, from some steps of the outputs' gradients: `grad`
 * and `more`. */
INLINE void group_back(int pieces, const Group *g, const Room *room, Left grad, Left more, int64_t first, int64_t columns,
                       int64_t fresh, float *out, int64_t stride) {
    int64_t steps = wides(g->outputs);
    const uint32_t *right = g->main + first / WIDE * steps * pieces * RIGHT;
    Factor one = {grad, right, steps}, other = {more, right, steps};
    multiply(pieces, room->rows / WIDE, columns, &one, &other, fresh, out, stride);
}

INLINE Factor low_in(const Group *g, const Room *room, int64_t first) {
    int64_t ranks = wides(g->ranks);
    return (Factor){whole_left(room->back_left, ranks), g->low_in + first / WIDE * ranks * RIGHT, ranks};
}

/* What the adapters add to that in bfloat16; g s B must be whole. */
INLINE void group_back_low(int pieces, const Group *g, const Room *room, int64_t first, int64_t columns, float *out,
                           int64_t stride) {
    Factor low = low_in(g, room, first);
    if (pieces == 1 && g->ranks) multiply(pieces, room->rows / WIDE, columns, &low, 0, 0, out, stride);
}

/* Both at once, from whole outputs' gradients. */
INLINE void group_back_whole(int pieces, const Group *g, const Room *room, Left grad, int64_t first, int64_t columns,
                             float *out, int64_t stride) {
    int64_t steps = wides(g->outputs);
    Factor one = {grad, g->main + first / WIDE * steps * pieces * RIGHT, steps}, low = low_in(g, room, first);
    multiply(pieces, room->rows / WIDE, columns, &one, pieces == 1 && g->ranks ? &low : 0, 1, out, stride);
}

/* sums [ranks, columns] += what was turned times the rows that lie as left blocks, from a column on. */
INLINE void add_sums(int pieces, const Room *room, int64_t ranks, const uint16_t *turned, Left x, int64_t columns,
                     float *sums) {
    int64_t blocks = room->rows / WIDE, tile = blocks * pieces * LEFT / 2;
    for (int64_t n = x.from * WIDE; n < least(columns, x.to * WIDE); n += WIDE) {
        int across = columns - n > TILE;
        for (int64_t m = 0; m < blocks * pieces; m++)
            pair_block(x.at + ((m / pieces * x.steps + n / WIDE - x.from) * pieces + m % pieces) * LEFT, WIDE,
                       room->panel + m * RIGHT);
        for (int64_t t = 0; t < ranks; t += WIDE) {
            int down = ranks - t > TILE;
            float *at = sums + t * columns + n;
            const uint16_t *left = turned + t / TILE * tile;
#define SUM(down, across)                                                                                   \
    load_sums(down, across, at, columns);                                                                   \
    accumulate(pieces, down, across, blocks, left, LEFT / 2, tile, room->panel, 0, 0);                      \
    store_sums(down, across, at, columns);
            if (down && across) {
                SUM(1, 1)
            } else if (down) {
                SUM(1, 0)
            } else if (across) {
                SUM(0, 1)
            } else {
                SUM(0, 0)
            }
        }
    }
}

/* A block's part of the gradients of A, from some or all of the input's steps, once g s B is whole. */
INLINE void sums_of_a(int pieces, const Group *g, const Room *room, Left x, float *sums) {
    if (g->ranks) add_sums(pieces, room, g->ranks, room->back_turned, x, g->inputs, sums);
}

/* The same of the i-th layer's B, from some or all of its outputs' gradients, once x A' is whole. */
INLINE void sums_of_b(int pieces, const Group *g, const Room *room, int64_t i, Left grad, float *sums) {
    int64_t tile = room->rows / WIDE * pieces * LEFT / 2;
    sums += g->ranks * g->inputs;
    for (int64_t j = 0; j < i; j++) sums += ranks_of(g, j) * g->linears[j].outputs;
    if (ranks_of(g, i))
        add_sums(pieces, room, ranks_of(g, i), room->low_turned + g->rank_at[i] / TILE * tile, grad, g->linears[i].outputs,
                 sums);
}

/* A block's part of all gradients at once, and g s B, from the input and the outputs' gradients. */
INLINE void group_sums(int pieces, const Group *g, const Room *room, Left x, Left grad, float *sums) {
    for (int64_t i = 0; i < g->count; i++) {
        Left own = {grad.at + g->output_at[i] / WIDE * pieces * LEFT, grad.steps, 0, wides(g->linears[i].outputs)};
        group_low_back(pieces, g, room, i, own);
    }
    group_low_back_done(pieces, g, room);
    sums_of_a(pieces, g, room, x, sums);
    group_low(pieces, g, room, x);
    for (int64_t i = 0; i < g->count; i++) {
        Left own = {grad.at + g->output_at[i] / WIDE * pieces * LEFT, grad.steps, 0, wides(g->linears[i].outputs)};
        sums_of_b(pieces, g, room, i, own, sums);
    }
}

/* The sums of a group: of A's gradients [ranks, inputs], then of each B's, turned, [its ranks, outputs]. */
INLINE int64_t sums_size(const Group *g) {
    int64_t size = g->ranks * g->inputs;
    for (int64_t i = 0; i < g->count; i++) size += ranks_of(g, i) * g->linears[i].outputs;
    return size;
}

/* Gradients, from the sums of all threads, `between` bytes apart; by all threads together, always in the same order. */
static void give_sums(const Group *g, const float *sums, size_t between, int64_t threads) {
    const float *of_b = sums + g->ranks * g->inputs;
#define TOTAL(of, index) ((const float *)(const void *)((const char *)(of) + (size_t)t * between))[index]
    for (int64_t i = 0; i < g->count; i++) {
        const Linear *l = &g->linears[i];
        const float *of_a = sums + g->rank_at[i] * g->inputs;
#pragma omp for schedule(static) nowait
        for (int64_t k = 0; k < l->rank * g->inputs; k++) {
            float total = 0;
            for (int64_t t = 0; t < threads; t++) total += TOTAL(of_a, k);
            l->a_grad[k] = total;
        }
#pragma omp for schedule(static) nowait
        for (int64_t o = 0; o < (l->rank ? l->outputs : 0); o++)
            for (int64_t r = 0; r < l->rank; r++) {
                float total = 0;
                for (int64_t t = 0; t < threads; t++) total += TOTAL(of_b, r * l->outputs + o);
                l->b_grad[o * l->rank + r] = total * (float)l->scale;
            }
        of_b += ranks_of(g, i) * l->outputs;
    }
}

#endif
#endif
