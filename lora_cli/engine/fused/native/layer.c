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

INLINE void put_row(int pieces, uint16_t *left, int64_t steps, int64_t r, const void *from, int64_t width, int half) {
    for (int64_t c = 0; c < width; c += WIDTH) put_left(pieces, left, steps, r, c, load(from, c, half));
    fill_left(pieces, left, steps, r, width);
}

/* An RMS norm's output as a row of left blocks. */
INLINE void put_normed(int pieces, uint16_t *left, int64_t steps, int64_t r, const void *x, const void *weight, double eps,
                       int64_t width, int half) {
    float inverse = inverse_rms(x, width, (float)eps, half);
    for (int64_t c = 0; c < width; c += WIDTH)
        put_left(pieces, left, steps, r, c, load(x, c, half) * inverse * load(weight, c, half));
    fill_left(pieces, left, steps, r, width);
}

/* to = the gradient of a norm's input plus `residual`, from that of its output. */
INLINE void norm_back(const float *grad, const void *x, const void *weight, const void *residual, double eps, int64_t width,
                      void *to, int half) {
    float inverse = inverse_rms(x, width, (float)eps, half);
    vec dots = {0};
    for (int64_t c = 0; c < width; c += WIDTH) dots += load(grad, c, 0) * load(weight, c, half) * load(x, c, half);
    float back = sum_of(dots) * inverse * inverse * inverse / (float)width;
    for (int64_t c = 0; c < width; c += WIDTH) {
        vec v = load(grad, c, 0) * load(weight, c, half) * inverse - load(x, c, half) * back;
        store(to, c, v + load(residual, c, half), half);
    }
}

/* `columns` values from the bias's `first` one on. */
INLINE void add_bias(const void *bias, float *to, int64_t first, int64_t columns, int half) {
    for (int64_t c = 0; bias && c < columns; c += WIDTH) store(to, c, load(to, c, 0) + load(bias, first + c, half), 0);
}

static void turn_heads(const Layer *l, float *to, int64_t token, float sign, int half) {
    const void *c = row(l->cosine, token, l->head, half), *s = row(l->sine, token, l->head, half);
    for (int64_t h = 0; h < l->turned_heads; h++) turn(to + h * l->head, 0, c, s, sign, l->head / 2, half);
}

INLINE void inputs(const Pass *p, const Layer *l, const Own *own, int64_t first, int64_t count, int half) {
    int pieces = half ? 1 : PIECES;
    const Group *g = &p->groups[0];
    for (int64_t r = 0; r < count; r++)
        put_normed(pieces, own->left[0], own->steps[0], r, row(l->x, first + r, l->width, half), l->attention_norm,
                   l->attention_eps, l->width, half);
    group_all(pieces, g, &own->rooms[0], own->left[0], own->rows[0], own->strides[0]);
    for (int64_t r = 0; r < count; r++) {
        float *from = own->rows[0] + r * own->strides[0];
        for (int64_t i = 0; i < g->count; i++)
            add_bias(g->linears[i].bias, from + g->output_at[i], 0, g->linears[i].outputs, half);
        turn_heads(l, from, first + r, 1.0f, half);
        void *to = row(l->qkv, first + r, g->outputs, half);
        for (int64_t c = 0; c < g->outputs; c += WIDTH) store(to, c, load(from, c, 0), half);
    }
}

INLINE vec activated(const Layer *l, vec gate, vec *slope) {
    return l->activation == SILU ? activation(gate, SILU, slope) : activation(gate, GELU_TANH, slope);
}

/* Where gate and up are kept: 32 columns of each side by side, for 32 tokens after each other, so that memory is read and
 * written in its order. */
INLINE void *kept_row(const Layer *l, int64_t token, int64_t column, int half) {
    int64_t block = (token >> 5) * wides(l->intermediate) + (column >> 5);
    return row(l->gate_up, block * WIDE + (token & 31), 2 * WIDE, half);
}

/* Gate, up and what comes of them, 32 columns at a time, which stay in the first-level cache. */
INLINE void gate_and_up(const Pass *p, const Layer *l, const Own *own, int64_t first, int64_t count, int half) {
    int pieces = half ? 1 : PIECES;
    int64_t wide = l->intermediate;
    float *gates = own->rows[1], *ups = gates + WIDE;
    group_begin(pieces, &p->groups[1], &own->rooms[1], own->left[1]);
    for (int64_t n = 0; n < wide; n += WIDE) {
        group_there(pieces, &p->groups[1], &own->rooms[1], own->left[1], 0, n, WIDE, gates, own->strides[1]);
        group_there(pieces, &p->groups[1], &own->rooms[1], own->left[1], 1, n, WIDE, ups, own->strides[1]);
        for (int64_t r = 0; r < count; r++) {
            float *gate = gates + r * own->strides[1], *up = ups + r * own->strides[1];
            void *kept = kept_row(l, first + r, n, half);
            int64_t columns = least(WIDE, wide - n);
            add_bias(l->gate.bias, gate, n, columns, half), add_bias(l->up.bias, up, n, columns, half);
            for (int64_t c = 0; c < columns; c += WIDTH) {
                vec slope, g = load(gate, c, 0), u = load(up, c, 0);
                store(kept, c, g, half), store(kept, WIDE + c, u, half);
                put_left(pieces, own->left[2], own->steps[2], r, n + c, activated(l, g, &slope) * u);
            }
            fill_left(pieces, own->left[2], own->steps[2], r, n + columns);
        }
    }
}

INLINE void outputs(const Pass *p, const Layer *l, const Own *own, int64_t first, int64_t count, int half) {
    int pieces = half ? 1 : PIECES;
    for (int64_t r = 0; r < count; r++)
        put_row(pieces, own->left[0], own->steps[0], r, row(l->attended, first + r, l->attended_width, half),
                l->attended_width, half);
    group_all(pieces, &p->groups[0], &own->rooms[0], own->left[0], own->rows[0], own->strides[0]);
    for (int64_t r = 0; r < count; r++) {
        float *from = own->rows[0] + r * own->strides[0];
        void *x = row(l->x, first + r, l->width, half), *hidden = row(l->hidden, first + r, l->width, half);
        add_bias(l->output.bias, from, 0, l->width, half);
        for (int64_t c = 0; c < l->width; c += WIDTH) store(hidden, c, load(from, c, 0) + load(x, c, half), half);
        put_normed(pieces, own->left[1], own->steps[1], r, hidden, l->block_norm, l->block_eps, l->width, half);
    }
    gate_and_up(p, l, own, first, count, half);
    group_all(pieces, &p->groups[2], &own->rooms[2], own->left[2], own->rows[0], own->strides[0]);
    for (int64_t r = 0; r < count; r++) {
        float *from = own->rows[0] + r * own->strides[0];
        void *hidden = row(l->hidden, first + r, l->width, half), *out = row(l->out, first + r, l->width, half);
        add_bias(l->down.bias, from, 0, l->width, half);
        for (int64_t c = 0; c < l->width; c += WIDTH) store(out, c, load(from, c, 0) + load(hidden, c, half), half);
    }
}

enum { GRAD, ACTIVATED, GATE_UP, NORMED, HIDDEN, ATTENDED };

/* From the gradient of `down`'s output to those of gate and up, and `down`'s input again, 32 columns at a time. */
INLINE void activation_back(const Pass *p, const Layer *l, const Own *own, int64_t first, int64_t count, int half) {
    int pieces = half ? 1 : PIECES;
    int64_t wide = l->intermediate, up_at = p->groups[1].output_at[1], both = own->steps[GATE_UP];
    float *grads = own->rows[ACTIVATED];
    for (int64_t n = 0; n < wide; n += WIDE) {
        group_back(pieces, &p->groups[2], &own->rooms[2], own->left[GRAD], n, WIDE, grads, own->strides[ACTIVATED]);
        for (int64_t r = 0; r < count; r++) {
            const void *kept = kept_row(l, first + r, n, half);
            int64_t c = n, end = least(n + WIDE, wide);
            for (; c < end; c += WIDTH) {
                vec slope, gate = load(kept, c - n, half), up = load(kept, WIDE + c - n, half), v = activated(l, gate, &slope);
                vec grad = load(grads + r * own->strides[ACTIVATED], c - n, 0);
                put_left(pieces, own->left[GATE_UP], both, r, c, grad * up * slope);
                put_left(pieces, own->left[GATE_UP], both, r, up_at + c, grad * v);
                put_left(pieces, own->left[ACTIVATED], own->steps[ACTIVATED], r, c, v * up);
            }
            fill_left(pieces, own->left[GATE_UP], both, r, c);
            fill_left(pieces, own->left[GATE_UP], both, r, up_at + c);
            fill_left(pieces, own->left[ACTIVATED], own->steps[ACTIVATED], r, c);
        }
    }
}

#define BEGIN_BACK(number, grad) group_begin_back(pieces, &p->groups[number], &own->rooms[number], own->left[grad])
#define SUMS(number, x, grad)                                                                               \
    group_sums(pieces, &p->groups[number], &own->rooms[number], own->left[x], own->left[grad], own->sums[number])
#define BACK(number, grad, into)                                                                            \
    group_back(pieces, &p->groups[number], &own->rooms[number], own->left[grad], 0, p->groups[number].inputs, \
               own->rows[into], own->strides[into])

INLINE void outputs_back(const Pass *p, const Layer *l, const Own *own, int64_t first, int64_t count, int half) {
    int pieces = half ? 1 : PIECES;
    int64_t width = l->width;
    for (int64_t r = 0; r < count; r++) {
        put_row(pieces, own->left[GRAD], own->steps[GRAD], r, row(l->grad, first + r, width, half), width, half);
        put_normed(pieces, own->left[NORMED], own->steps[NORMED], r, row(l->hidden, first + r, width, half), l->block_norm,
                   l->block_eps, width, half);
        put_row(pieces, own->left[ATTENDED], own->steps[ATTENDED], r, row(l->attended, first + r, l->attended_width, half),
                l->attended_width, half);
    }
    BEGIN_BACK(2, GRAD);
    activation_back(p, l, own, first, count, half);
    SUMS(2, ACTIVATED, GRAD);
    BEGIN_BACK(1, GATE_UP);
    SUMS(1, NORMED, GATE_UP);
    BACK(1, GATE_UP, HIDDEN);
    for (int64_t r = 0; r < count; r++) {
        void *to = row(l->hidden_grad, first + r, width, half);
        norm_back(own->rows[HIDDEN] + r * own->strides[HIDDEN], row(l->hidden, first + r, width, half), l->block_norm,
                  row(l->grad, first + r, width, half), l->block_eps, width, to, half);
        put_row(pieces, own->left[HIDDEN], own->steps[HIDDEN], r, to, width, half);
    }
    BEGIN_BACK(0, HIDDEN);
    SUMS(0, ATTENDED, HIDDEN);
    BACK(0, HIDDEN, ATTENDED);
    for (int64_t r = 0; r < count; r++) {
        void *to = row(l->attended_grad, first + r, l->attended_width, half);
        for (int64_t c = 0; c < l->attended_width; c += WIDTH)
            store(to, c, load(own->rows[ATTENDED] + r * own->strides[ATTENDED], c, 0), half);
    }
}

INLINE void inputs_back(const Pass *p, const Layer *l, const Own *own, int64_t first, int64_t count, int half) {
    int pieces = half ? 1 : PIECES;
    int64_t width = l->width, outputs = p->groups[0].outputs;
    for (int64_t r = 0; r < count; r++) {
        float *grads = own->rows[GRAD];
        const void *from = row(l->qkv_grad, first + r, outputs, half);
        for (int64_t c = 0; c < outputs; c += WIDTH) store(grads, c, load(from, c, half), 0);
        turn_heads(l, grads, first + r, -1.0f, half);
        put_row(pieces, own->left[GRAD], own->steps[GRAD], r, grads, outputs, 0);
        put_normed(pieces, own->left[NORMED], own->steps[NORMED], r, row(l->x, first + r, width, half), l->attention_norm,
                   l->attention_eps, width, half);
    }
    BEGIN_BACK(0, GRAD);
    SUMS(0, NORMED, GRAD);
    if (!l->x_grad) return;
    BACK(0, GRAD, HIDDEN);
    for (int64_t r = 0; r < count; r++)
        norm_back(own->rows[HIDDEN] + r * own->strides[HIDDEN], row(l->x, first + r, width, half), l->attention_norm,
                  row(l->hidden_grad, first + r, width, half), l->attention_eps, width, row(l->x_grad, first + r, width, half),
                  half);
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
    int64_t wide = wides(l->intermediate) * WIDE;
    Pass p = {.half = (int)l->half,
              .tokens = l->tokens,
              .row_widths = {l->width, 2 * WIDE},
              .left_widths = {l->attended_width, l->width, wide}};
    return run_pass(&p, l, other_groups, l->half ? outputs_half : outputs_whole);
}

/* grad to hidden_grad, attended_grad and the gradients of output, gate, up, down. */
EXPORT int layer_outputs_back(const Layer *l) {
    int64_t wide = wides(l->intermediate) * WIDE;
    Pass p = {.half = (int)l->half,
              .back = 1,
              .tokens = l->tokens,
              .row_widths = {[ACTIVATED] = WIDE, [HIDDEN] = l->width, [ATTENDED] = l->attended_width},
              .left_widths = {l->width, wide, 2 * wide, l->width, l->width, l->attended_width}};
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

#endif
