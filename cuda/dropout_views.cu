/* Dropout views on the GPU: one kernel forward, one backward. Masks in ops/dropout_views.h; threads
 * with four or more neighbouring elements draw one counter for each four.
 *
 * Test: python -m pytest tests/test_simt.py -k dropout_views
 * Machine code: make sass OP=dropout_views
 * Time: selfkd bench dropout_views --device cuda */
#include "core/philox.h"
#include "core/rows.cuh"
#include "dropout_views.h"

extern "C" {
SK_PARAMS(dropout_views)
SK_PARAMS(dropout_views_backward)
}
typedef struct dropout_views_params forward_params;
typedef struct dropout_views_backward_params backward_params;

enum { SAMPLES = 2 };

/* Leaves 0 in those of this thread's items of the step that sample k drops, the others scaled.
 * `first` is element 0 of the row. */
template <typename T, int kVec>
SK_DEVICE void drop(const sk_arg &seed, sk_dropout p, uint32_t sample, uint64_t first, int64_t base,
                    sk_real<T> (&x)[sk_items<T>]) {
    constexpr int kRun = kVec < 4 ? kVec : 4; /* items that surely share a counter */
    const uint64_t key = *(const uint64_t *)seed.data;
    sk_words w;
    SK_UNROLL for (int i = 0; i < sk_items<T>; i++) {
        const uint64_t e = first + (uint64_t)sk_class<kVec>(base, i);
        if (i % kRun == 0) w = sk_dropout_words(key, sample, e / 4);
        const int at = kRun == 4 ? i % 4 : (int)(e % 4);
        const uint32_t word = at == 0 ? w.x : at == 1 ? w.y : at == 2 ? w.z : w.w;
        x[i] = word >= p.threshold ? x[i] * (sk_real<T>)p.scale : 0;
    }
}

/* The element that a row begins with: rows of whole vectors begin with a whole counter. */
template <typename Params>
SK_DEVICE uint64_t first_of(const Params *p, int64_t n) {
    return ((uint64_t)p->first_row + (uint64_t)n) * (uint64_t)SK_DIM(p, C);
}

/* Leaves views. */
template <typename T, int kVec>
__global__ void __launch_bounds__(SK_BLOCK, sk_resident<T, kVec>)
    dropout_views_kernel(const forward_params p, const sk_dropout dropout) {
    const int64_t C = SK_DIM(&p, C), stride = p.views.stride[2];
    sk_each(SK_DIM(&p, N), [&](int64_t n) {
        const T *const from = sk_keep(sk_row<T>(p.features, n, 0));
        T *const to = sk_keep(sk_cell<T>(p.views, 0, n, 0));
        SK_ROLLED for (int64_t base = 0; base < C; base += sk_step<T>()) {
            sk_real<T> x[sk_items<T>], y[sk_items<T>];
            sk_load<T, kVec>(from, p.features.stride[1], base, C, 0, x);
            sk_store<T, kVec>(to, stride, base, C, x);
            SK_UNROLL for (int k = 0; k < SAMPLES; k++) {
                memcpy(y, x, sizeof y);
                drop<T, kVec>(p.seed, dropout, k, first_of(&p, n), base, y);
                sk_store<T, kVec>(to + (k + 1) * p.views.stride[0], stride, base, C, y);
            }
        }
    });
}

/* Leaves grad_features. */
template <typename T, int kVec>
__global__ void __launch_bounds__(SK_BLOCK, sk_resident<T, kVec>)
    dropout_views_backward_kernel(const backward_params p, const sk_dropout dropout) {
    const int64_t C = SK_DIM(&p, C), stride = p.grad.stride[2];
    sk_each(SK_DIM(&p, N), [&](int64_t n) {
        const T *const from = sk_keep(sk_cell<T>(p.grad, 0, n, 0));
        T *const to = sk_keep(sk_row<T>(p.grad_features, n, 0));
        SK_ROLLED for (int64_t base = 0; base < C; base += sk_step<T>()) {
            sk_real<T> g[sk_items<T>], sum[sk_items<T>];
            sk_load<T, kVec>(from, stride, base, C, 0, sum);
            SK_UNROLL for (int k = 0; k < SAMPLES; k++) {
                sk_load<T, kVec>(from + (k + 1) * p.grad.stride[0], stride, base, C, 0, g);
                drop<T, kVec>(p.seed, dropout, k, first_of(&p, n), base, g);
                SK_UNROLL for (int i = 0; i < sk_items<T>; i++) sum[i] += g[i];
            }
            sk_store<T, kVec>(to, p.grad_features.stride[1], base, C, sum);
        }
    });
}

/* ---- launches ---- */

/* Launches over the rows of `one` and of the three in `stack`, in the layout that suits all. */
template <typename Instances, typename Params>
static int launch(Instances instances, const sk_arg &one, const sk_arg &stack, const Params &p,
                  void *stream) {
    const int64_t view = stack.stride[0] * sk_element(stack.dtype);
    sk_arg part[1 + SAMPLES];
    for (int k = 0; k < 1 + SAMPLES; k++)
        part[k] = {(char *)stack.data + k * view, {stack.stride[1], stack.stride[2]}, stack.dtype};
    return sk_launch_rows(instances, SK_DIM(&p, N), {&one, &part[0], &part[1], &part[2]}, stream, p,
                          sk_dropout_of(p.p));
}

extern "C" int sk_cuda_dropout_views(const struct dropout_views_params *p, void *stream) {
    return launch(SK_INSTANCES(dropout_views_kernel), p->features, p->views, *p, stream);
}

extern "C" int sk_cuda_dropout_views_backward(const struct dropout_views_backward_params *p,
                                              void *stream) {
    return launch(SK_INSTANCES(dropout_views_backward_kernel), p->grad_features, p->grad, *p,
                  stream);
}
