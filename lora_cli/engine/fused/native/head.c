/* The head of a language model, there and back in one pass over its weight: the cross-entropy of x W' + b, and the
 * gradient of its sum with respect to x, without logits [T, V] ever lying in memory. Softmax is scaled as it goes, as
 * attention's is: (softmax(x W') - one) W is attention with W for keys and values, but for the target's row. Method:
 * Milakov and Gimelshein, "Online normalizer calculation for softmax" (arXiv:1805.02867). On matrix tiles. */

#include "packed.h"

#if defined(__AMX_BF16__) && defined(__linux__)

#include <omp.h>

#define PANEL 128 /* columns of W that are multiplied at once, there and back */
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
    uint32_t *left;         /* [rows / 32][width / 32] steps: x */
    float *back;            /* [rows / 32][width / 32][4 tiles]: softmax W, not yet divided by its sums */
    uint32_t *along, *down; /* a panel of W for either product */
    uint32_t *shares;       /* [PANEL / 32] steps: softmax of 32 rows, not yet divided */
    float *logits;          /* [32, PANEL] */
    vec *sums;              /* [rows]: of softmax, sixteen parts of each */
    float *from, *wanted;   /* [rows]: what logits are counted from, and the target's logit */
} Room;

INLINE int64_t bytes_of(int64_t rows, int64_t width, int half, int part) {
    int64_t steps = width / DEPTH, blocks = rows / SIDE;
    const int64_t bytes[] = {
        blocks * steps * STEP(half) * 4, blocks * steps * SIDE * SIDE * 4, PANEL / SIDE * steps * STEP(half) * 4,
        PANEL / SIDE * steps * STEP(half) * 4, PANEL / SIDE * STEP(half) * 4, SIDE * PANEL * 4, rows * 64, rows * 4,
        rows * 4,
    };
    return bytes[part];
}

static char *open_room(Room *room, int64_t rows, int64_t width, int half) {
    int64_t total = 0, starts[9];
    for (int i = 0; i < 9; i++) starts[i] = total, total += whole(bytes_of(rows, width, half, i), 64);
    char *all = aligned_alloc(64, (size_t)total);
    if (!all) return 0;
    *room = (Room){(uint32_t *)(all + starts[0]), (float *)(all + starts[1]), (uint32_t *)(all + starts[2]),
                   (uint32_t *)(all + starts[3]), (uint32_t *)(all + starts[4]), (float *)(all + starts[5]),
                   (vec *)(all + starts[6]),      (float *)(all + starts[7]), (float *)(all + starts[8])};
    return all;
}

/* e^x of what is 88 or less: the same polynomial as `exponential_vec`, its power of two by the instruction for that. */
INLINE vec power_of_e(vec x) {
    const __m512 least_x = _mm512_set1_ps(-104.0f); /* where 0 is the nearest float; what is no number stays none */
    vec v = (vec)_mm512_max_ps(least_x, (__m512)x);
    vec n = (vec)_mm512_roundscale_ps((__m512)(v * 1.44269504088896341f), _MM_FROUND_TO_NEAREST_INT);
    vec r = v - n * 0.693359375f;
    r = r + n * 2.12194440e-4f;
    vec p = r * 1.9875691500e-4f + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * (r * r) + r + 1.0f;
    return (vec)_mm512_scalef_ps((__m512)p, (__m512)n);
}

/* The 32 logits by 128 columns that begin at `first`; where there is no column, far below all others. */
INLINE void logits_of(const Head *head, const Room *room, const uint32_t *left, int64_t first, int half) {
    int64_t steps = head->width / DEPTH;
    for (int64_t n = 0; n < PANEL; n += SIDE) {
        clear_block();
        times(steps, left, room->along + n / SIDE * steps * STEP(half), half);
        store_rows(room->logits + n, PANEL);
    }
    int64_t there = least(PANEL, head->vocabulary - first);
    if (!head->bias && there == PANEL) return;
    for (int64_t r = 0; r < SIDE; r++)
        for (int64_t c = 0; c < PANEL; c++) {
            float *logit = room->logits + r * PANEL + c;
            if (c >= there) *logit = -INFINITY;
            else if (head->bias) *logit += get(head->bias, first + c, half);
        }
}

/* A larger logit than all before: count from it, and scale what there is. */
static __attribute__((noinline)) void recount(float most, int64_t width, float *from, vec *sum, float *back) {
    float scale = exponential(*from - most);
    *from = most;
    *sum *= scale;
    for (int64_t c = 0; c < width; c += SIDE, back += SIDE * SIDE)
        for (int half = 0; half < 2; half++)
            store(back + half * TILE_WORDS, 0, load(back + half * TILE_WORDS, 0, 0) * scale, 0);
}

/* e^(logit - from) of 32 rows, summed and packed. The target's is left out of what is packed: it is added at the end, as
 * exactly as float32 has it, because in a row that is well predicted nearly nothing is left of it. */
INLINE void shares_of(const Head *head, const Room *room, int64_t block, const int64_t *targets, int64_t rows,
                      int64_t first, int half) {
    for (int64_t r = 0; r < SIDE; r++) {
        const float *logits = room->logits + r * PANEL;
        int64_t at = block * SIDE + r;
        float *back = room->back + block * head->width * SIDE + r / TILE * 2 * TILE_WORDS + r % TILE * TILE;
        vec most = load(logits, 0, 0);
        for (int64_t c = WIDTH; c < PANEL; c += WIDTH) {
            vec v = load(logits, c, 0);
            most = (vec)_mm512_max_ps((__m512)most, (__m512)v);
        }
        if (_mm512_cmp_ps_mask((__m512)most, _mm512_set1_ps(room->from[at] + ABOVE), _CMP_GT_OQ))
            recount(largest_of(most), head->width, &room->from[at], &room->sums[at], back);
        float from = room->from[at];
        vec sum = room->sums[at];
        uint32_t *row = room->shares + r * TILE;
        for (int64_t c = 0; c < PANEL; c += SIDE, row += STEP(half)) {
            vec one = power_of_e(load(logits, c, 0) - from);
            vec other = power_of_e(load(logits, c + WIDTH, 0) - from);
            sum += one + other;
            put_planes(one, other, half, row);
        }
        room->sums[at] = sum;
        int64_t target = r < rows ? targets[r] - first : -1;
        if (target < 0 || target >= PANEL) continue;
        room->wanted[at] = logits[target];
        uint16_t *share = (uint16_t *)(room->shares + target / SIDE * STEP(half) + r * TILE) + target % SIDE;
        for (int p = 0; p < PLANES(half); p++) share[p * 4 * TILE_WORDS] = 0;
    }
}

/* back += shares W. */
INLINE void add_back(const Head *head, const Room *room, int64_t block, int half) {
    float *back = room->back + block * head->width * SIDE;
    const uint32_t *right = room->down;
    for (int64_t c = 0; c < head->width; c += SIDE, back += SIDE * SIDE, right += PANEL / SIDE * STEP(half)) {
        load_block(back);
        times(PANEL / SIDE, room->shares, right, half);
        store_block(back);
    }
}

INLINE void finish(const Head *head, const Room *room, int64_t first, int64_t rows, int half) {
    for (int64_t t = 0; t < rows; t++) {
        const float *back = room->back + t / SIDE * head->width * SIDE + t % SIDE / TILE * 2 * TILE_WORDS + t % TILE * TILE;
        const void *target = row_of(head->weight, head->targets[first + t], head->width, half);
        void *grad = row_of(head->grad, first + t, head->width, half);
        float sum = sum_of(room->sums[t]), inverse = 1.0f / sum;
        float own = exponential(room->wanted[t] - room->from[t]) * inverse - 1.0f;
        head->losses[first + t] = room->from[t] + logf(sum) - room->wanted[t];
        for (int64_t c = 0; c < head->width; c += SIDE, back += SIDE * SIDE)
            for (int64_t i = 0; i < 2; i++) {
                vec v = load(back + i * TILE_WORDS, 0, 0) * inverse;
                store(grad, c + i * WIDTH, v + load(target, c + i * WIDTH, half) * own, half);
            }
    }
}

INLINE void some_rows(const Head *head, const Room *room, int64_t first, int64_t rows, int half) {
    int64_t steps = head->width / DEPTH, blocks = whole(rows, SIDE) / SIDE;
    memset(room->back, 0, (size_t)(blocks * SIDE * head->width) * 4);
    memset(room->sums, 0, (size_t)(blocks * SIDE) * sizeof(vec));
    for (int64_t t = 0; t < blocks * SIDE; t++) room->from[t] = -INFINITY;
    for (int64_t b = 0; b < blocks; b++)
        pack_left(row_of(head->x, first + b * SIDE, head->width, half), least(SIDE, rows - b * SIDE), head->width, half,
                  room->left + b * steps * STEP(half));
    for (int64_t v = 0; v < head->vocabulary; v += PANEL) {
        for (int64_t n = 0; n < PANEL; n += SIDE) {
            const void *weight = row_of(head->weight, v + n, head->width, half);
            int64_t there = head->vocabulary - v - n;
            pack_along(weight, there, head->width, half, room->along + n / SIDE * steps * STEP(half));
            pack_rows(weight, there, head->width, half, room->down + n / SIDE * STEP(half), PANEL / SIDE * STEP(half));
        }
        for (int64_t b = 0; b < blocks; b++) {
            logits_of(head, room, room->left + b * steps * STEP(half), v, half);
            shares_of(head, room, b, head->targets + first + b * SIDE, rows - b * SIDE, v, half);
            add_back(head, room, b, half);
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
        int64_t each = whole((rows + parts - 1) / parts, SIDE);
        Room room = {0};
        char *all = open_room(&room, each, width, half);
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
