/* SD-Dropout on the GPU: one kernel forward, one backward, each reading its logits once.
 * Formulas in ops/sd_dropout_kl.h; how the forward kernel computes both KL in core/kl.cuh.
 *
 * Test: python -m pytest tests/test_simt.py -k sd_dropout_kl
 * Machine code: make sass OP=sd_dropout_kl
 * Time: selfkd bench sd_dropout_kl --device cuda */
#include "core/kl.cuh"
#include "core/row_loss.cuh"
#include "sd_dropout_kl.h"

extern "C" {
SK_PARAMS(sd_dropout_kl)
SK_PARAMS(sd_dropout_kl_backward)
}
typedef struct sd_dropout_kl_params forward_params;
typedef struct sd_dropout_kl_backward_params backward_params;

template <typename T, typename Params>
SK_DEVICE sk_two_rows<T> rows_at(const Params &p, int64_t n, int64_t s) {
    return {sk_row<T>(p.u, n, s), sk_row<T>(p.v, n, s), p.u.stride[1],
            p.v.stride[1],        SK_DIM(&p, C),        p.temperature};
}

/* Leaves rows, saved, loss and denominator. */
template <typename T, int kVec>
__global__ void __launch_bounds__(SK_BLOCK, sk_resident<T, kVec>)
    sd_dropout_kl_kernel(const forward_params p) {
    sk_row_forward<T, 4>(p, [&](int64_t n, int64_t s, double w, double(&saved)[4]) {
        const sk_divergence x = sk_diverge<T, kVec>(rows_at<T>(p, n, s));
        saved[0] = x.lse;
        saved[1] = x.dl;
        saved[2] = x.kl_pq;
        saved[3] = x.kl_qp;
        return w * (p.temperature * p.temperature *
                    sk_weighted_kl(x, p.forward_weight, p.reverse_weight));
    });
}

/* Leaves grad_u and grad_v. */
template <typename T, int kVec>
__global__ void __launch_bounds__(SK_BLOCK, sk_resident<T, kVec>)
    sd_dropout_kl_backward_kernel(const backward_params p) {
    typedef sk_real<T> real;
    sk_each_row(p, [&](int64_t n, int64_t s) {
        const sk_incoming<real, backward_params> in(p, n, s);
        const double factor = in.grad * in.weight / in.denominator;
        const double forward = factor * p.forward_weight, reverse = factor * p.reverse_weight;
        const sk_divergence x = {in.saved(0), in.saved(1), in.saved(2), in.saved(3), false};
        const sk_two_rows<T> r = rows_at<T>(p, n, s);
        if (in.weight != 0 && sk_is_far<real>(x, forward, reverse)) {
            sk_differentiate_far<T>(r, x, forward, reverse, p.detach_target,
                                    sk_wanted_row<T>(p.grad_u, n, s), p.grad_u.stride[1],
                                    sk_wanted_row<T>(p.grad_v, n, s), p.grad_v.stride[1]);
            return;
        }
        const sk_pair_slope<real> k = sk_pair_slope_of<real>(x, p.temperature, forward, reverse,
                                                             p.detach_target, in.weight == 0);
        const T *const u = sk_keep(r.u), *const v = sk_keep(r.v);
        T *const grad_u = sk_wanted_row<T>(p.grad_u, n, s);
        T *const grad_v = sk_wanted_row<T>(p.grad_v, n, s);
        SK_ROLLED for (int64_t base = 0; base < r.C; base += sk_step<T>()) {
            real a[sk_items<T>], b[sk_items<T>];
            sk_load_logits<T, kVec>(u, r.u_stride, base, r.C, a);
            sk_load_logits<T, kVec>(v, r.v_stride, base, r.C, b);
            sk_differentiate<T, kVec>(k, base, r.C, a, b);
            if (grad_u) sk_store<T, kVec>(grad_u, p.grad_u.stride[1], base, r.C, a);
            if (grad_v) sk_store<T, kVec>(grad_v, p.grad_v.stride[1], base, r.C, b);
        }
    });
}

extern "C" int sk_cuda_sd_dropout_kl(const struct sd_dropout_kl_params *p, void *stream) {
    return sk_launch_rows(SK_INSTANCES(sd_dropout_kl_kernel), SK_ROWS(p), {&p->u, &p->v}, stream,
                          *p);
}

extern "C" int sk_cuda_sd_dropout_kl_backward(const struct sd_dropout_kl_backward_params *p,
                                              void *stream) {
    return sk_launch_rows(SK_INSTANCES(sd_dropout_kl_backward_kernel), SK_ROWS(p),
                          {&p->u, &p->v, SK_OR(p->grad_u, p->u), SK_OR(p->grad_v, p->v)}, stream,
                          *p);
}
