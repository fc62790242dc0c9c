/* The head of a language model, there and back in one pass over its weight: the cross-entropy of x W' + b, and the
 * gradient of its sum with respect to x, without logits [T, V] ever lying in memory. Softmax is scaled as it goes, as
 * attention's is: (softmax(x W') - one) W is attention with W for keys and values, but for the target's row. Method:
 * Milakov and Gimelshein, "Online normalizer calculation for softmax" (arXiv:1805.02867). On matrix tiles. */

#include "packing.h"

#ifdef TILES

#include <omp.h>

#define COLUMNS 128 /* of W that are multiplied at once, there and back */
#define PIECES_OF(half) ((half) ? 1 : PIECES)
#define ABOVE 32.0f /* how far a logit may stand above the one that its row's are counted from */

typedef struct {
    int64_t width, vocabulary;
    const void *x, *weight, *bias;
    const int64_t *targets;
    float *losses;
    void *grad;
} Head;

/* One thread's room. */
typedef struct {
    uint16_t *left;         /* blocks of x */
    float *back;            /* [rows / 32][width / 32][32, 32]: softmax W, not yet divided by its sums */
    uint32_t *along, *down; /* panels of W for either product */
    uint16_t *shares;       /* a left block: softmax of 32 rows, not yet divided */
    float *logits;          /* [32, COLUMNS] */
    vec *sums;              /* [rows]: of softmax, sixteen parts of each */
    float *from, *wanted;   /* [rows]: what logits are counted from, and the target's logit */
} Room;

static Room room_of(int64_t rows, int64_t width, int half, Memory *memory) {
    int pieces = PIECES_OF(half);
    Room room = {.left = some(memory, rows * width * pieces * 2)};
    room.back = some(memory, rows * width * 4);
    room.along = some(memory, right_bytes(pieces, width, COLUMNS));
    room.down = some(memory, right_bytes(pieces, COLUMNS, width));
    room.shares = some(memory, WIDE * COLUMNS * pieces * 2);
    room.logits = some(memory, WIDE * COLUMNS * 4);
    room.sums = some(memory, rows * 64);
    room.from = some(memory, rows * 4), room.wanted = some(memory, rows * 4);
    return room;
}

/* The 32 logits by 128 columns that begin at `first`; where there is no column, far below all others. */
INLINE void logits_of(const Head *head, const Room *room, int64_t block, int64_t first, int half) {
    int pieces = PIECES_OF(half);
    int64_t steps = wides(head->width);
    for (int64_t n = 0; n < wides(COLUMNS); n++) {
        clear_sums(1, 1);
        accumulate(pieces, 1, 1, steps, room->left + block * steps * pieces * LEFT, LEFT, LEFT / 2,
                   room->along + n * steps * pieces * RIGHT, 0, 0);
        store_sums(1, 1, room->logits + n * WIDE, COLUMNS);
    }
    int64_t there = least(COLUMNS, head->vocabulary - first);
    if (!head->bias && there == COLUMNS) return;
    for (int64_t r = 0; r < WIDE; r++)
        for (int64_t c = 0; c < COLUMNS; c++) {
            float *logit = room->logits + r * COLUMNS + c;
            if (c >= there) *logit = -INFINITY;
            else if (head->bias) *logit += get(head->bias, first + c, half);
        }
}

/* A larger logit than all before: count from it, and scale what there is. */
static __attribute__((noinline)) void recount(float most, int64_t width, float *from, vec *sum, float *back) {
    float scale = exponential(*from - most);
    *from = most;
    *sum *= scale;
    for (int64_t c = 0; c < width; c += WIDE, back += WIDE * WIDE)
        for (int64_t i = 0; i < WIDE; i += WIDTH) store(back, i, load(back, i, 0) * scale, 0);
}

/* e^(logit - from) of 32 rows, summed and packed. The target's is left out of what is packed: it is added at the end, as
 * exactly as float32 has it, because in a row that is well predicted nearly nothing is left of it. */
INLINE void shares_of(const Head *head, const Room *room, int64_t block, const int64_t *targets, int64_t rows,
                      int64_t first, int half) {
    int pieces = PIECES_OF(half);
    for (int64_t r = 0; r < WIDE; r++) {
        const float *logits = room->logits + r * COLUMNS;
        int64_t at = block * WIDE + r;
        vec most = load(logits, 0, 0);
        for (int64_t c = WIDTH; c < COLUMNS; c += WIDTH) {
            vec v = load(logits, c, 0);
            most = (vec)_mm512_max_ps((__m512)most, (__m512)v);
        }
        if (_mm512_cmp_ps_mask((__m512)most, _mm512_set1_ps(room->from[at] + ABOVE), _CMP_GT_OQ))
            recount(largest_of(most), head->width, &room->from[at], &room->sums[at],
                    room->back + block * head->width * WIDE + r * WIDE);
        vec sum = room->sums[at];
        for (int64_t c = 0; c < COLUMNS; c += WIDE) {
            vec one = exponential_vec(load(logits, c, 0) - room->from[at]);
            vec other = exponential_vec(load(logits, c + WIDTH, 0) - room->from[at]);
            sum += one + other;
            put_step(pieces, 0, one, other, left_at(pieces, room->shares, wides(COLUMNS), r, c), LEFT);
        }
        room->sums[at] = sum;
        int64_t target = r < rows ? targets[r] - first : -1;
        if (target < 0 || target >= COLUMNS) continue;
        room->wanted[at] = logits[target];
        uint16_t *share = room->shares + target / WIDE * pieces * LEFT + r * WIDE + target % WIDE;
        for (int p = 0; p < pieces; p++) share[p * LEFT] = 0;
    }
}

/* back += shares W, of as many columns of W as there are. */
INLINE void add_back(const Head *head, const Room *room, int64_t block, int64_t steps, int half) {
    int pieces = PIECES_OF(half);
    float *back = room->back + block * head->width * WIDE;
    for (int64_t n = 0; n < wides(head->width); n++, back += WIDE * WIDE) {
        load_sums(1, 1, back, WIDE);
        accumulate(pieces, 1, 1, steps, room->shares, LEFT, LEFT / 2, room->down + n * steps * pieces * RIGHT, 0, 0);
        store_sums(1, 1, back, WIDE);
    }
}

INLINE void finish(const Head *head, const Room *room, int64_t first, int64_t rows, int half) {
    for (int64_t t = 0; t < rows; t++) {
        const float *back = room->back + t / WIDE * head->width * WIDE + t % WIDE * WIDE;
        const void *target = row_of(head->weight, head->targets[first + t], head->width, half);
        void *grad = row_of(head->grad, first + t, head->width, half);
        float sum = sum_of(room->sums[t]), inverse = 1.0f / sum;
        float own = exponential(room->wanted[t] - room->from[t]) * inverse - 1.0f;
        head->losses[first + t] = room->from[t] + logf(sum) - room->wanted[t];
        for (int64_t c = 0; c < head->width; c += WIDE, back += WIDE * WIDE)
            for (int64_t i = 0; i < WIDE; i += WIDTH)
                store(grad, c + i, load(back, i, 0) * inverse + load(target, c + i, half) * own, half);
    }
}

INLINE void some_rows(const Head *head, const Room *room, int64_t first, int64_t rows, int half) {
    int pieces = PIECES_OF(half);
    int64_t width = head->width, blocks = wides(rows);
    memset(room->back, 0, (size_t)(blocks * WIDE * width) * 4);
    memset(room->sums, 0, (size_t)(blocks * WIDE) * sizeof(vec));
    memset(room->left, 0, (size_t)(blocks * WIDE * width * pieces) * 2);
    for (int64_t t = 0; t < blocks * WIDE; t++) room->from[t] = -INFINITY;
    for (int64_t t = 0; t < rows; t++)
        put_row(pieces, room->left, wides(width), t, row_of(head->x, first + t, width, half), width, half);
    for (int64_t v = 0; v < head->vocabulary; v += COLUMNS) {
        int64_t there = least(COLUMNS, head->vocabulary - v), steps = wides(there);
        const Matrix weight = {row_of(head->weight, v, width, half), half, there, width, 0, 0, 0};
        for (int64_t n = 0; n < wides(COLUMNS); n++)
            panel_along(pieces, &weight, n, room->along + n * wides(width) * pieces * RIGHT);
        for (int64_t n = 0; n < wides(width); n++) panel_down(pieces, &weight, n, room->down + n * steps * pieces * RIGHT);
        for (int64_t b = 0; b < blocks; b++) {
            logits_of(head, room, b, v, half);
            shares_of(head, room, b, head->targets + first + b * WIDE, rows - b * WIDE, v, half);
            add_back(head, room, b, steps, half);
        }
    }
    finish(head, room, first, rows, half);
}

/* losses [rows] of the targets, and the gradient of their sum with respect to x [rows, width], a multiple of 32; weight
 * [vocabulary, width], bias where it is given. `most` rows of a thread at once, a multiple of 32. */
EXPORT int head_losses(int half, int64_t rows, int64_t width, int64_t vocabulary, const void *x, const void *weight,
                       const void *bias, const int64_t *targets, int64_t most, float *losses, void *grad) {
    const Head head = {width, vocabulary, x, weight, bias, targets, losses, grad};
    int failed = 0;
    if (!rows) return 0;
#pragma omp parallel
    {
        int64_t threads = omp_get_num_threads(), parts = whole(rows, most * threads) / most;
        int64_t each = whole((rows + parts - 1) / parts, WIDE);
        Memory memory = {0};
        (void)room_of(each, width, half, &memory);
        char *all = aligned_alloc(64, memory.used);
        memory = (Memory){all, 0};
        const Room room = room_of(each, width, half, &memory);
        if (all) open_tiles();
        else {
#pragma omp atomic write
            failed = 1;
        }
#pragma omp for schedule(static)
        for (int64_t first = 0; first < rows; first += each) {
            if (!all) continue;
            if (half) some_rows(&head, &room, first, least(each, rows - first), 1);
            else some_rows(&head, &room, first, least(each, rows - first), 0);
        }
        if (all) _tile_release();
        free(all);
    }
    return failed;
}

#endif
