/* Dropout views on the GPU: one kernel forward, one backward. Masks in ops/dropout_views.h; threads
 * with four or more neighbouring elements draw one counter for each four.
 *
 * Test: python -m pytest tests/test_simt.py -k dropout_views    Machine code: make sass
 * OP=dropout_views Time: selfkd bench --device cuda --case dropout_views */
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
    dropout_views_kernel(const forward_params params, const sk_dropout dropout) {
    const forward_params *const p = &params;
    const int64_t N = SK_DIM(p, N), C = SK_DIM(p, C), stride = p->views.stride[2];
    for (int64_t n = sk_first_row(); n < N; n += sk_row_step()) {
        const T *const from = sk_keep(sk_row<T>(p->features, n, 0));
        T *const to = sk_keep(sk_cell<T>(p->views, 0, n, 0));
        SK_ROLLED for (int64_t base = 0; base < C; base += sk_step<T>()) {
            sk_real<T> x[sk_items<T>], y[sk_items<T>];
            sk_load<T, kVec>(from, p->features.stride[1], base, C, 0, x);
            sk_store<T, kVec>(to, stride, base, C, x);
            SK_UNROLL for (int k = 0; k < SAMPLES; k++) {
                memcpy(y, x, sizeof y);
                drop<T, kVec>(p->seed, dropout, k, first_of(p, n), base, y);
                sk_store<T, kVec>(to + (k + 1) * p->views.stride[0], stride, base, C, y);
            }
        }
    }
}

/* Leaves grad_features. */
template <typename T, int kVec>
__global__ void __launch_bounds__(SK_BLOCK, sk_resident<T, kVec>)
    dropout_views_backward_kernel(const backward_params params, const sk_dropout dropout) {
    const backward_params *const p = &params;
    const int64_t N = SK_DIM(p, N), C = SK_DIM(p, C), stride = p->grad.stride[2];
    for (int64_t n = sk_first_row(); n < N; n += sk_row_step()) {
        const T *const from = sk_keep(sk_cell<T>(p->grad, 0, n, 0));
        T *const to = sk_keep(sk_row<T>(p->grad_features, n, 0));
        SK_ROLLED for (int64_t base = 0; base < C; base += sk_step<T>()) {
            sk_real<T> g[sk_items<T>], sum[sk_items<T>];
            sk_load<T, kVec>(from, stride, base, C, 0, sum);
            SK_UNROLL for (int k = 0; k < SAMPLES; k++) {
                sk_load<T, kVec>(from + (k + 1) * p->grad.stride[0], stride, base, C, 0, g);
                drop<T, kVec>(p->seed, dropout, k, first_of(p, n), base, g);
                SK_UNROLL for (int i = 0; i < sk_items<T>; i++) sum[i] += g[i];
            }
            sk_store<T, kVec>(to, p->grad_features.stride[1], base, C, sum);
        }
    }
}

/* ---- launches ---- */

/* One of three stacked tensors of rows. */
static sk_arg view_of(const sk_arg &x, int k, int64_t element) {
    return {(char *)x.data + k * x.stride[0] * element, {x.stride[1], x.stride[2]}, x.dtype};
}

/* The layout that suits the rows of `one` and of the three in `stack`. */
static sk_layout layout_of(const sk_dims &dims, int64_t element, const sk_arg &one,
                           const sk_arg &stack) {
    const sk_arg a = view_of(stack, 0, element), b = view_of(stack, 1, element),
                 c = view_of(stack, 2, element);
    return sk_layout_of(dims, element, {&one, &a, &b, &c});
}

extern "C" int sk_cuda_dropout_views(const struct dropout_views_params *params, void *stream) {
    SK_SWITCH_FLOATING(params->features.dtype, T, {
        const sk_layout layout =
            layout_of(params->dims, sizeof(T), params->features, params->views);
        const auto kernel = SK_KERNEL(dropout_views_kernel, T, layout);
        SK_LAUNCH(kernel, sk_grid(SK_DIM(params, N), layout), sk_block(layout), 0, stream, *params,
                  sk_dropout_of(params->p));
    })
    return cudaGetLastError();
}

extern "C" int sk_cuda_dropout_views_backward(const struct dropout_views_backward_params *params,
                                              void *stream) {
    SK_SWITCH_FLOATING(params->grad.dtype, T, {
        const sk_layout layout =
            layout_of(params->dims, sizeof(T), params->grad_features, params->grad);
        const auto kernel = SK_KERNEL(dropout_views_backward_kernel, T, layout);
        SK_LAUNCH(kernel, sk_grid(SK_DIM(params, N), layout), sk_block(layout), 0, stream, *params,
                  sk_dropout_of(params->p));
    })
    return cudaGetLastError();
}
