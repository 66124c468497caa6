/* SD-Dropout on the GPU: one kernel forward, one backward, each reading its logits once.
 * Formulas in ops/sd_dropout_kl.h; how the forward kernel computes both KL in core/kl.cuh. */
#include "core/kl.cuh"
#include "core/rows.cuh"
#include "sd_dropout_kl.h"

extern "C" {
SK_PARAMS(sd_dropout_kl)
SK_PARAMS(sd_dropout_kl_backward)
}
typedef struct sd_dropout_kl_params forward_params;
typedef struct sd_dropout_kl_backward_params backward_params;

/* ---- forward ---- */

/* Leaves loss and denominator, from the sums of rows and weights. */
template <typename real>
SK_DEVICE void finish(const forward_params &p, const double (&total)[2]) {
    const real *const divisor = (const real *)p.divisor.data;
    const bool mean = p.reduction == SELFKD_MEAN;
    const double denominator = !mean ? 1 : divisor ? *divisor : total[1];
    *(real *)p.loss.data = (real)(total[0] / denominator);
    *(real *)p.denominator.data = (real)denominator;
}

/* Leaves rows and saved; the block that ends last leaves loss and denominator. */
template <typename T, int kVec>
__global__ void __launch_bounds__(SK_BLOCK, sk_resident<T, kVec>)
    sd_dropout_kl_kernel(const forward_params params) {
    typedef sk_real<T> real;
    const forward_params *const p = &params;
    const int64_t S = SK_DIM(p, S), count = SK_DIM(p, N) * S;
    double total[2] = {0, 0};
    for (int64_t row = sk_first_row(); row < count; row += sk_row_step()) {
        const int64_t n = row / S, s = row % S;
        const real w = sk_weight<real>(p->weight, n, s);
        divergence x = {0, 0, 0, 0, false};
        if (w != 0)
            x = diverge<T, kVec>({sk_row<T>(p->u, n, s), sk_row<T>(p->v, n, s), p->u.stride[1],
                                  p->v.stride[1], SK_DIM(p, C), p->temperature});
        if (sk_lane() != 0) continue;
        const double value = w * (p->temperature * p->temperature *
                                  weighted(x, p->forward_weight, p->reverse_weight));
        *sk_cell<real>(p->rows, n, s) = (real)value;
        *sk_cell<double>(p->saved, 0, n, s) = x.lse;
        *sk_cell<double>(p->saved, 1, n, s) = x.dl;
        *sk_cell<double>(p->saved, 2, n, s) = x.forward;
        *sk_cell<double>(p->saved, 3, n, s) = x.reverse;
        total[0] += value;
        total[1] += w;
    }
    if (sk_grid_sum(total, p->scratch.data) && sk_thread() == 0) finish<real>(params, total);
}

/* ---- backward ---- */

SK_DEVICE divergence saved_of(const backward_params &p, int64_t n, int64_t s) {
    return {*sk_cell<double>(p.saved, 0, n, s), *sk_cell<double>(p.saved, 1, n, s),
            *sk_cell<double>(p.saved, 2, n, s), *sk_cell<double>(p.saved, 3, n, s), false};
}

/* Leaves grad_u and grad_v. */
template <typename T, int kVec>
__global__ void __launch_bounds__(SK_BLOCK, sk_resident<T, kVec>)
    sd_dropout_kl_backward_kernel(const backward_params params) {
    typedef sk_real<T> real;
    const backward_params *const p = &params;
    const int64_t S = SK_DIM(p, S), C = SK_DIM(p, C), count = SK_DIM(p, N) * S;
    for (int64_t row = sk_first_row(); row < count; row += sk_row_step()) {
        const int64_t n = row / S, s = row % S;
        const double w = sk_weight<real>(p->weight, n, s);
        const double factor =
            *sk_cell<real>(p->grad, n, s) * w / *(const real *)p->denominator.data;
        const double forward = factor * p->forward_weight, reverse = factor * p->reverse_weight;
        const divergence x = saved_of(params, n, s);
        if (w != 0 && is_far<real>(x, forward, reverse)) {
            differentiate_far<T>({sk_row<T>(p->u, n, s), sk_row<T>(p->v, n, s), p->u.stride[1],
                                  p->v.stride[1], C, p->temperature},
                                 x, forward, reverse, p->detach_target, sk_row<T>(p->grad_u, n, s),
                                 p->grad_u.stride[1], sk_row<T>(p->grad_v, n, s),
                                 p->grad_v.stride[1]);
            continue;
        }
        const pair_slope<real> k =
            pair_slope_of<real>(x, p->temperature, forward, reverse, p->detach_target, w == 0);
        const T *const u = sk_keep(sk_row<T>(p->u, n, s)), *const v =
                                                               sk_keep(sk_row<T>(p->v, n, s));
        T *const grad_u = sk_keep(sk_row<T>(p->grad_u, n, s));
        T *const grad_v = sk_keep(sk_row<T>(p->grad_v, n, s));
        SK_ROLLED for (int64_t base = 0; base < C; base += sk_step<T>()) {
            real a[sk_items<T>], b[sk_items<T>];
            load_logits<T, kVec>(u, p->u.stride[1], base, C, a);
            load_logits<T, kVec>(v, p->v.stride[1], base, C, b);
            differentiate<T, kVec>(k, base, C, a, b);
            sk_store<T, kVec>(grad_u, p->grad_u.stride[1], base, C, a);
            sk_store<T, kVec>(grad_v, p->grad_v.stride[1], base, C, b);
        }
    }
}

/* ---- launches ---- */

extern "C" int sk_cuda_sd_dropout_kl(const struct sd_dropout_kl_params *params, void *stream) {
    const int zeroed = cudaMemsetAsync(params->scratch.data, 0, 16, (cudaStream_t)stream);
    if (zeroed != cudaSuccess) return zeroed;
    const int64_t count = SK_DIM(params, N) * SK_DIM(params, S);
    SK_SWITCH_FLOATING(params->u.dtype, T, {
        const sk_layout layout = sk_layout_of(params->dims, sizeof(T), {&params->u, &params->v});
        const auto kernel = SK_KERNEL(sd_dropout_kl_kernel, T, layout);
        SK_LAUNCH(kernel, sk_grid(count, layout), sk_block(layout), 0, stream, *params);
    })
    return cudaGetLastError();
}

extern "C" int sk_cuda_sd_dropout_kl_backward(const struct sd_dropout_kl_backward_params *params,
                                              void *stream) {
    const int64_t count = SK_DIM(params, N) * SK_DIM(params, S);
    SK_SWITCH_FLOATING(params->u.dtype, T, {
        const sk_layout layout = sk_layout_of(
            params->dims, sizeof(T), {&params->u, &params->v, &params->grad_u, &params->grad_v});
        const auto kernel = SK_KERNEL(sd_dropout_kl_backward_kernel, T, layout);
        SK_LAUNCH(kernel, sk_grid(count, layout), sk_block(layout), 0, stream, *params);
    })
    return cudaGetLastError();
}
