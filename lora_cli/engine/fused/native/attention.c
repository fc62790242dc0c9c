/* Causal attention within documents, there and back, from rows [T, stride] that hold all query heads, then all key heads,
 * then all value heads; float32 or bfloat16, on matrix tiles where there are any, else on vector units. Both ways go from
 * task to task, and ask for scratch once in a thread. */

#include "blocks.h"

int each_task(const Documents *documents, int64_t keys, size_t bytes, Work *work, const void *job) {
    const int64_t *starts = documents->starts;
    int failed = 0;
#pragma omp parallel
    {
        char *scratch = aligned_alloc(64, (bytes + 63) / 64 * 64);
        if (!scratch) {
#pragma omp atomic write
            failed = 1;
        }
#pragma omp for schedule(dynamic, 1)
        for (int64_t n = 0; n < documents->count * keys; n++) {
            int64_t document = documents->order[n / keys];
            const Task task = {starts[document], starts[document + 1] - starts[document], n % keys};
            if (scratch) work(job, &task, scratch);
        }
        free(scratch);
    }
    return failed;
}

static int tiles_allowed = 1;

/* Whether attention takes tiles where it may; tests try both ways. */
EXPORT void attend_with_tiles(int allowed) { tiles_allowed = allowed; }

/* Of documents `order`, longest first; starts [documents + 1]. Gives out [T, out_stride] and log_sums [heads, T].
 * Returns 0, or 1 when there is no memory for scratch. */
EXPORT int attend(int half, int64_t documents, const int64_t *order, const int64_t *starts, int64_t heads, int64_t keys,
                  int64_t size, const void *qkv, int64_t stride, float scale, void *out, int64_t out_stride,
                  float *log_sums) {
    Shape shape = {half, heads, keys, size, whole(size, WIDTH), stride, out_stride, 0, starts[documents], scale, qkv};
    Documents all = {documents, order, starts};
    return tiles_allowed && tiles_fit(half, size) ? attend_on_tiles(&shape, &all, out, log_sums)
                                                  : attend_on_vectors(&shape, &all, out, log_sums);
}

/* The gradient of qkv, all of [T, stride], from that of `attend`'s output, that output and its log_sums. */
EXPORT int attend_back(int half, int64_t documents, const int64_t *order, const int64_t *starts, int64_t heads,
                       int64_t keys, int64_t size, const void *qkv, int64_t stride, float scale, const void *out,
                       int64_t out_stride, const void *grad, int64_t grad_stride, const float *log_sums, void *qkv_grad) {
    Shape shape = {half, heads, keys, size, whole(size, WIDTH), stride, out_stride, grad_stride,
                   starts[documents], scale, qkv};
    Documents all = {documents, order, starts};
    return tiles_allowed && tiles_fit(half, size)
               ? attend_back_on_tiles(&shape, &all, out, grad, log_sums, qkv_grad)
               : attend_back_on_vectors(&shape, &all, out, grad, log_sums, qkv_grad);
}
