/* A decoder layer of Llama's kind on matrix tiles, but for attention (attention.c): what stands before and behind it, there
 * and back. Blocks of rows go through norms, products, rotary positions and activations while they lie in a core's
 * caches; only what the way back needs is written to memory. */

#include "pass.h"
#include "rows.h"

#ifdef TILES

/* As Python fills it in. Tensors are [tokens, columns], contiguous, bfloat16 or float32; adapters are float32. */
typedef struct {
    int64_t half, tokens, width, attended_width, intermediate, turned_heads, head, activation;
    double attention_eps, block_eps;
    const void *attention_norm, *block_norm, *cosine, *sine; /* [width], [width], [tokens, head] twice */
    const void *x;
    void *qkv; /* with positions */
    const void *attended;
    void *hidden, *gate_up, *out; /* between the halves; before the activation; the result */
    const void *grad;
    void *hidden_grad, *attended_grad;
    const void *qkv_grad;
    void *x_grad; /* or none */
    Linear query, key, value, output, gate, up, down;
} Layer;

INLINE void *row(const void *start, int64_t t, int64_t width, int half) { return row_of(start, t, width, half); }

/* An RMS norm's output as a row of left blocks; gives the input's inverse_rms. */
INLINE float put_normed(int pieces, uint16_t *left, int64_t steps, int64_t r, const void *x, const void *weight, double eps,
                        int64_t width, int half) {
    float inverse = inverse_rms(x, width, (float)eps, half);
    for (int64_t c = 0; c < width; c += WIDE)
        put_wide(pieces, left, steps, r, c, load(x, c, half) * inverse * load(weight, c, half),
                 load_or_0(x, c + WIDTH, width, half) * inverse * load_or_0(weight, c + WIDTH, width, half));
    return inverse;
}

/* `columns` values from the bias's `first` one on. */
INLINE void add_bias(const void *bias, float *to, int64_t first, int64_t columns, int half) {
    for (int64_t c = 0; bias && c < columns; c += WIDTH) store(to, c, load(to, c, 0) + load(bias, first + c, half), 0);
}

INLINE void turn_heads(const Layer *l, float *to, int64_t token, float sign, int half) {
    const void *c = row(l->cosine, token, l->head, half), *s = row(l->sine, token, l->head, half);
    for (int64_t i = 0, size = l->head / 2; i < size; i += WIDTH) { /* of all heads, so that positions are read once */
        vec cosines[2] = {load(c, i, half), load(c, i + size, half)};
        vec sines[2] = {load(s, i, half) * sign, load(s, i + size, half) * sign};
        for (float *head = to + i; head < to + l->turned_heads * l->head; head += l->head) {
            vec first = load(head, 0, 0), second = load(head, size, 0);
            store(head, 0, first * cosines[0] - second * sines[0], 0);
            store(head, size, second * cosines[1] + first * sines[1], 0);
        }
    }
}

INLINE Left left_of(const Own *own, int64_t number) { return whole_left(own->left[number], own->steps[number]); }

INLINE void inputs(const Pass *p, const Layer *l, const Own *own, int64_t first, int64_t count, int half) {
    int pieces = half ? 1 : PIECES;
    const Group *g = &p->groups[0];
    for (int64_t r = 0; r < count; r++)
        put_normed(pieces, own->left[0], own->steps[0], r, row(l->x, first + r, l->width, half), l->attention_norm,
                   l->attention_eps, l->width, half);
    group_all(pieces, g, &own->rooms[0], left_of(own, 0), own->rows[0], own->strides[0]);
    for (int64_t r = 0; r < count; r++) {
        float *from = own->rows[0] + r * own->strides[0];
        for (int64_t i = 0; i < g->count; i++)
            add_bias(g->linears[i].bias, from + g->output_at[i], 0, g->linears[i].outputs, half);
        turn_heads(l, from, first + r, 1.0f, half);
        void *to = row(l->qkv, first + r, g->outputs, half);
        for (int64_t c = 0; c < g->outputs; c += WIDTH) store(to, c, load(from, c, 0), half);
    }
}

INLINE vec activated(const Layer *l, vec gate, vec *slope, int half) {
    return l->activation == SILU ? activation(gate, SILU, slope, half) : activation(gate, GELU_TANH, slope, half);
}

/* Where gate and up are kept: 32 columns of each side by side, for 32 tokens after each other, so that memory is read and
 * written in its order. */
INLINE void *kept_row(const Layer *l, int64_t token, int64_t column, int half) {
    int64_t block = (token >> 5) * wides(l->intermediate) + (column >> 5);
    return row(l->gate_up, block * WIDE + (token & 31), 2 * WIDE, half);
}

/* The feed-forward block goes by chunks of its width: what a chunk's columns are made of and what is made of them stays in
 * the second-level cache. */
#define CHUNK 4 /* steps */

/* Steps `from` up to `to` of down's input, into the left buffer 2. */
INLINE void gate_and_up(const Pass *p, const Layer *l, const Own *own, int64_t first, int64_t count, int64_t from, int64_t to,
                        int half) {
    int pieces = half ? 1 : PIECES;
    float *gates = own->rows[1], *ups = gates + WIDE;
    for (int64_t n = from * WIDE; n < to * WIDE; n += WIDE) {
        int64_t columns = least(WIDE, l->intermediate - n), at = n - from * WIDE;
        group_there(pieces, &p->groups[1], &own->rooms[1], left_of(own, 1), 0, n, WIDE, gates, own->strides[1]);
        group_there(pieces, &p->groups[1], &own->rooms[1], left_of(own, 1), 1, n, WIDE, ups, own->strides[1]);
        for (int64_t r = 0; r < count; r++) {
            float *gate = gates + r * own->strides[1], *up = ups + r * own->strides[1];
            void *kept = kept_row(l, first + r, n, half);
            add_bias(l->gate.bias, gate, n, columns, half), add_bias(l->up.bias, up, n, columns, half);
            vec slope, made[2];
            for (int64_t i = 0; i < 2; i++) { /* columns that aren't there are 0 */
                vec g = load(gate, i * WIDTH, 0), u = load(up, i * WIDTH, 0);
                store(kept, i * WIDTH, g, half), store(kept, WIDE + i * WIDTH, u, half);
                made[i] = activated(l, g, &slope, half) * u;
            }
            put_wide(pieces, own->left[2], CHUNK, r, at, made[0], made[1]);
        }
    }
}

INLINE void outputs(const Pass *p, const Layer *l, const Own *own, int64_t first, int64_t count, int half) {
    int pieces = half ? 1 : PIECES;
    int64_t steps = wides(l->intermediate);
    for (int64_t r = 0; r < count; r++)
        put_row(pieces, own->left[0], own->steps[0], r, row(l->attended, first + r, l->attended_width, half),
                l->attended_width, half);
    group_all(pieces, &p->groups[0], &own->rooms[0], left_of(own, 0), own->rows[0], own->strides[0]);
    for (int64_t r = 0; r < count; r++) {
        float *from = own->rows[0] + r * own->strides[0];
        void *x = row(l->x, first + r, l->width, half), *hidden = row(l->hidden, first + r, l->width, half);
        add_bias(l->output.bias, from, 0, l->width, half);
        for (int64_t c = 0; c < l->width; c += WIDTH) store(hidden, c, load(from, c, 0) + load(x, c, half), half);
        put_normed(pieces, own->left[1], own->steps[1], r, hidden, l->block_norm, l->block_eps, l->width, half);
    }
    group_low(pieces, &p->groups[1], &own->rooms[1], left_of(own, 1));
    for (int64_t s = 0; s < steps; s += CHUNK) {
        Left chunk = {own->left[2], CHUNK, s, least(s + CHUNK, steps)};
        gate_and_up(p, l, own, first, count, chunk.from, chunk.to, half);
        group_all(pieces, &p->groups[2], &own->rooms[2], chunk, own->rows[0], own->strides[0]);
    }
    for (int64_t r = 0; r < count; r++) {
        float *from = own->rows[0] + r * own->strides[0];
        void *hidden = row(l->hidden, first + r, l->width, half), *out = row(l->out, first + r, l->width, half);
        add_bias(l->down.bias, from, 0, l->width, half);
        for (int64_t c = 0; c < l->width; c += WIDTH) store(out, c, load(from, c, 0) + load(hidden, c, half), half);
    }
}

enum { GRAD, ACTIVATED, GATE_UP, NORMED, HIDDEN, ATTENDED };

/* From the gradient of down's output to those of gate and up, and down's input again: steps `from` up to `to`, gate's
 * before up's. */
INLINE void activation_back(const Pass *p, const Layer *l, const Own *own, int64_t first, int64_t count, int64_t from,
                            int64_t to, int half) {
    int pieces = half ? 1 : PIECES;
    uint16_t *gates = own->left[GATE_UP], *ups = gates + CHUNK * pieces * LEFT, *activations = own->left[ACTIVATED];
    float *grads = own->rows[ACTIVATED];
    for (int64_t n = from * WIDE; n < to * WIDE; n += WIDE) {
        group_back_whole(pieces, &p->groups[2], &own->rooms[2], left_of(own, GRAD), n, WIDE, grads, own->strides[ACTIVATED]);
        int64_t at = n - from * WIDE;
        for (int64_t r = 0; r < count; r++) {
            const void *kept = kept_row(l, first + r, n, half);
            vec to_gate[2], to_up[2], made[2];
            for (int64_t i = 0; i < 2; i++) {
                vec gate = load(kept, i * WIDTH, half), up = load(kept, WIDE + i * WIDTH, half), slope;
                vec v = activated(l, gate, &slope, half), grad = load(grads + r * own->strides[ACTIVATED], i * WIDTH, 0);
                to_gate[i] = grad * up * slope, to_up[i] = grad * v, made[i] = v * up;
            }
            put_wide(pieces, gates, 2 * CHUNK, r, at, to_gate[0], to_gate[1]);
            put_wide(pieces, ups, 2 * CHUNK, r, at, to_up[0], to_up[1]);
            put_wide(pieces, activations, CHUNK, r, at, made[0], made[1]);
        }
    }
}

/* The feed-forward block back, from the gradient of its output to that of its input, normed. */
INLINE void block_back(const Pass *p, const Layer *l, const Own *own, int64_t first, int64_t count, int half) {
    int pieces = half ? 1 : PIECES;
    int64_t steps = wides(l->intermediate), width = own->strides[HIDDEN];
    const Group *pair = &p->groups[1], *down = &p->groups[2];
    const Room *pair_room = &own->rooms[1], *down_room = &own->rooms[2];
    group_low_back(pieces, down, down_room, 0, left_of(own, GRAD));
    group_low_back_done(pieces, down, down_room);
    group_low(pieces, pair, pair_room, left_of(own, NORMED));
    for (int64_t s = 0; s < steps; s += CHUNK) {
        int64_t to = least(s + CHUNK, steps);
        activation_back(p, l, own, first, count, s, to, half);
        Left activated = {own->left[ACTIVATED], CHUNK, s, to};
        group_low(pieces, down, down_room, activated);
        sums_of_a(pieces, down, down_room, activated, own->sums[2]);
        Left gate = {own->left[GATE_UP], 2 * CHUNK, s, to};
        Left up = {gate.at + CHUNK * pieces * LEFT, 2 * CHUNK, s, to};
        group_low_back(pieces, pair, pair_room, 0, gate), group_low_back(pieces, pair, pair_room, 1, up);
        sums_of_b(pieces, pair, pair_room, 0, gate, own->sums[1]), sums_of_b(pieces, pair, pair_room, 1, up, own->sums[1]);
        up.from += steps, up.to += steps; /* of both layers' outputs */
        group_back(pieces, pair, pair_room, gate, up, 0, l->width, !s, own->rows[HIDDEN], width);
    }
    sums_of_b(pieces, down, down_room, 0, left_of(own, GRAD), own->sums[2]);
    group_low_back_done(pieces, pair, pair_room);
    sums_of_a(pieces, pair, pair_room, left_of(own, NORMED), own->sums[1]);
    group_back_low(pieces, pair, pair_room, 0, l->width, own->rows[HIDDEN], width);
}

INLINE void outputs_back(const Pass *p, const Layer *l, const Own *own, int64_t first, int64_t count, int half) {
    int pieces = half ? 1 : PIECES;
    int64_t width = l->width;
    float inverse[ROWS];
    for (int64_t r = 0; r < count; r++) {
        put_row(pieces, own->left[GRAD], own->steps[GRAD], r, row(l->grad, first + r, width, half), width, half);
        inverse[r] = put_normed(pieces, own->left[NORMED], own->steps[NORMED], r, row(l->hidden, first + r, width, half),
                                l->block_norm, l->block_eps, width, half);
        put_row(pieces, own->left[ATTENDED], own->steps[ATTENDED], r, row(l->attended, first + r, l->attended_width, half),
                l->attended_width, half);
    }
    block_back(p, l, own, first, count, half);
    for (int64_t r = 0; r < count; r++) {
        void *to = row(l->hidden_grad, first + r, width, half);
        norm_back_row(own->rows[HIDDEN] + r * own->strides[HIDDEN], 0, row(l->hidden, first + r, width, half), inverse[r],
                      l->block_norm, row(l->grad, first + r, width, half), width, to, half);
        put_row(pieces, own->left[HIDDEN], own->steps[HIDDEN], r, to, width, half);
    }
    group_sums(pieces, &p->groups[0], &own->rooms[0], left_of(own, ATTENDED), left_of(own, HIDDEN), own->sums[0]);
    group_back_whole(pieces, &p->groups[0], &own->rooms[0], left_of(own, HIDDEN), 0, l->attended_width, own->rows[ATTENDED],
                     own->strides[ATTENDED]);
    for (int64_t r = 0; r < count; r++) {
        void *to = row(l->attended_grad, first + r, l->attended_width, half);
        for (int64_t c = 0; c < l->attended_width; c += WIDTH)
            store(to, c, load(own->rows[ATTENDED] + r * own->strides[ATTENDED], c, 0), half);
    }
}

INLINE void inputs_back(const Pass *p, const Layer *l, const Own *own, int64_t first, int64_t count, int half) {
    int pieces = half ? 1 : PIECES;
    int64_t width = l->width, outputs = p->groups[0].outputs;
    float inverse[ROWS];
    for (int64_t r = 0; r < count; r++) {
        float *grads = own->rows[GRAD];
        const void *from = row(l->qkv_grad, first + r, outputs, half);
        for (int64_t c = 0; c < outputs; c += WIDTH) store(grads, c, load(from, c, half), 0);
        turn_heads(l, grads, first + r, -1.0f, half);
        put_row(pieces, own->left[GRAD], own->steps[GRAD], r, grads, outputs, 0);
        inverse[r] = put_normed(pieces, own->left[NORMED], own->steps[NORMED], r, row(l->x, first + r, width, half),
                                l->attention_norm, l->attention_eps, width, half);
    }
    group_sums(pieces, &p->groups[0], &own->rooms[0], left_of(own, NORMED), left_of(own, GRAD), own->sums[0]);
    if (!l->x_grad) return;
    group_back_whole(pieces, &p->groups[0], &own->rooms[0], left_of(own, GRAD), 0, width, own->rows[HIDDEN],
                     own->strides[HIDDEN]);
    for (int64_t r = 0; r < count; r++)
        norm_back_row(own->rows[HIDDEN] + r * own->strides[HIDDEN], 0, row(l->x, first + r, width, half), inverse[r],
                      l->attention_norm, row(l->hidden_grad, first + r, width, half), width,
                      row(l->x_grad, first + r, width, half), half);
}

#define BOTH(name)                                                                                          \
    static void name##_half(const Pass *p, const void *l, const Own *own, int64_t first, int64_t count) {   \
        name(p, l, own, first, count, 1);                                                                   \
    }                                                                                                       \
    static void name##_whole(const Pass *p, const void *l, const Own *own, int64_t first, int64_t count) {  \
        name(p, l, own, first, count, 0);                                                                   \
    }
BOTH(inputs)
BOTH(outputs)
BOTH(outputs_back)
BOTH(inputs_back)

static void first_group(Pass *p, const void *layer, Memory *memory) {
    const Layer *l = layer;
    p->count = 1;
    p->groups[0] = group_of(&l->query, 3, l->width, p->half, p->back, memory);
}

static void other_groups(Pass *p, const void *layer, Memory *memory) {
    const Layer *l = layer;
    p->count = 3;
    p->groups[0] = group_of(&l->output, 1, l->attended_width, p->half, p->back, memory);
    p->groups[1] = group_of(&l->gate, 2, l->width, p->half, p->back, memory);
    p->groups[2] = group_of(&l->down, 1, l->intermediate, p->half, p->back, memory);
}

/* Each returns 0, or 1 when there is no memory. */

/* x to qkv. */
EXPORT int layer_inputs(const Layer *l) {
    int64_t outputs = l->query.outputs + l->key.outputs + l->value.outputs;
    Pass p = {.half = (int)l->half, .tokens = l->tokens, .row_widths = {outputs}, .left_widths = {l->width}};
    return run_pass(&p, l, first_group, l->half ? inputs_half : inputs_whole);
}

/* x and attended to hidden, gate_up, out. */
EXPORT int layer_outputs(const Layer *l) {
    Pass p = {.half = (int)l->half,
              .tokens = l->tokens,
              .row_widths = {l->width, 2 * WIDE},
              .left_widths = {l->attended_width, l->width, CHUNK * WIDE}};
    return run_pass(&p, l, other_groups, l->half ? outputs_half : outputs_whole);
}

/* grad to hidden_grad, attended_grad and the gradients of output, gate, up, down. */
EXPORT int layer_outputs_back(const Layer *l) {
    Pass p = {.half = (int)l->half,
              .back = 1,
              .tokens = l->tokens,
              .row_widths = {[ACTIVATED] = WIDE, [HIDDEN] = l->width, [ATTENDED] = l->attended_width},
              .left_widths = {l->width, CHUNK * WIDE, 2 * CHUNK * WIDE, l->width, l->width, l->attended_width}};
    return run_pass(&p, l, other_groups, l->half ? outputs_back_half : outputs_back_whole);
}

/* qkv_grad and hidden_grad to x_grad and the gradients of query, key, value. */
EXPORT int layer_inputs_back(const Layer *l) {
    int64_t outputs = l->query.outputs + l->key.outputs + l->value.outputs;
    Pass p = {.half = (int)l->half,
              .back = 1,
              .tokens = l->tokens,
              .row_widths = {[GRAD] = outputs, [HIDDEN] = l->width},
              .left_widths = {[GRAD] = outputs, [NORMED] = l->width}};
    return run_pass(&p, l, first_group, l->half ? inputs_back_half : inputs_back_whole);
}

/* Whether there are tiles that this process may use. */
EXPORT int has_tiles(void) { return tiles_fit(1, DEPTH); }

#else

EXPORT int has_tiles(void) { return 0; }

#endif
