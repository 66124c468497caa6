/* Adversarial losses on the GPU: see ops/adversarial.h for the formulas. A thread takes one score
 * of each side at a time. As on the CPU a term is named by y = r or y = -f, and lsgan's target. */
#include "adversarial.h"
#include "core/rows.cuh"

extern "C" {
SK_PARAMS(adversarial)
SK_PARAMS(adversarial_backward)
}
typedef struct adversarial_params forward_params;
typedef struct adversarial_backward_params backward_params;

/* What kind of term the call has: the generator's hinge is open, like wgan. */
SK_DEVICE int64_t term_of(int64_t mode, int64_t side) {
    return side == SK_GENERATOR && mode == SK_HINGE ? SK_WGAN : mode;
}

template <typename real>
SK_DEVICE real value(int64_t term, real y, real target) {
    const real room = 1 - y, d = y - target;
    switch (term) {
    case SK_BCE:
        return (y > 0 ? 0 : -y) + log1p(exp(y > 0 ? -y : y));
    case SK_HINGE:
        return room <= 0 ? 0 : room; /* a NaN stays one */
    case SK_LSGAN:
        return (real)0.5 * d * d;
    default:
        return -y;
    }
}

/* The same in double where a finite score may have one too large for `real`: lsgan's. */
template <typename real>
SK_DEVICE double to_sum(int64_t term, real y, real target, real found) {
    if (term != SK_LSGAN || !isinf(found)) return found;
    const double d = (double)y - target;
    return 0.5 * d * d;
}

/* Its derivative by y. */
template <typename real>
SK_DEVICE real slope(int64_t term, real y, real target) {
    switch (term) {
    case SK_BCE: {
        const real e = exp(y > 0 ? -y : y); /* softplus and sigmoid lose nothing as its functions */
        return -(y > 0 ? e : 1) / (1 + e);
    }
    case SK_HINGE:
        return 1 - y <= 0 ? 0 : -1;
    case SK_LSGAN:
        return y - target;
    default:
        return -1;
    }
}

template <typename T>
SK_DEVICE sk_real<T> score(const sk_arg &x, int64_t i) {
    return sk_widen(((const T *)x.data)[i * x.stride[0]]);
}

/* ---- forward ---- */

/* Leaves rows and fake_rows; the block that ends last leaves the loss. */
template <typename T>
__global__ void __launch_bounds__(SK_BLOCK) adversarial_kernel(const forward_params params) {
    typedef sk_real<T> real;
    const forward_params *const p = &params;
    const int64_t N = SK_DIM(p, N), M = SK_DIM(p, M), longer = N > M ? N : M;
    const int64_t term = term_of(p->mode, p->side);
    const bool mean = p->reduction == SELFKD_MEAN, none = p->reduction == SELFKD_NONE;
    double total[2] = {0, 0};
    for (int64_t i = sk_first_row(); i < longer; i += sk_row_step()) {
        const real f = i < M ? -score<T>(p->fake, i) : 0;
        const real of_fake = i < M ? value<real>(term, f, 0) : 0;
        if (i < M) ((real *)p->fake_rows.data)[i] = of_fake;
        if (!none) total[1] += to_sum<real>(term, f, 0, of_fake);
        if (i >= N) continue;
        const real r = score<T>(p->real, i), of_real = value<real>(term, r, 1);
        const real row = none ? of_real + of_fake : of_real;
        ((real *)p->rows.data)[i] = row;
        total[0] += none ? row : to_sum<real>(term, r, 1, of_real);
    }
    if (!sk_grid_sum(total, p->scratch.data) || sk_thread() != 0) return;
    double loss = total[0] / (mean ? (double)N : 1);
    if (M > 0 || p->side == SK_DISCRIMINATOR) loss += total[1] / (mean ? (double)M : 1);
    *(real *)p->loss.data = (real)loss;
}

/* ---- backward ---- */

/* Leaves grad_real and grad_fake. A gradient that is not 0-d is one for each of N scores. */
template <typename T>
__global__ void __launch_bounds__(SK_BLOCK)
    adversarial_backward_kernel(const backward_params params) {
    typedef sk_real<T> real;
    const backward_params *const p = &params;
    const int64_t N = SK_DIM(p, N), M = SK_DIM(p, M), longer = N > M ? N : M;
    const int64_t term = term_of(p->mode, p->side), stride = p->grad.stride[0];
    const bool mean = p->reduction == SELFKD_MEAN;
    for (int64_t i = sk_first_row(); i < longer; i += sk_row_step()) {
        const bool known = i < N || stride == 0;
        const double grad = known ? ((const real *)p->grad.data)[i * stride] : 0;
        if (i < N) {
            const real factor = (real)(grad / (mean ? (double)N : 1));
            sk_narrow(factor * slope<real>(term, score<T>(p->real, i), 1),
                      (T *)p->grad_real.data + i * p->grad_real.stride[0]);
        }
        if (i < M) {
            const real factor = (real)(grad / (mean ? (double)M : 1));
            sk_narrow(-factor * slope<real>(term, -score<T>(p->fake, i), 0),
                      (T *)p->grad_fake.data + i * p->grad_fake.stride[0]);
        }
    }
}

/* ---- launches ---- */

/* A thread for each score of the longer side. */
static unsigned grid_of(const sk_dims &dims) {
    const int64_t N = dims.size['N' - 'A'], M = dims.size['M' - 'A'];
    return sk_grid(N > M ? N : M, kOneEach);
}

extern "C" int sk_cuda_adversarial(const struct adversarial_params *params, void *stream) {
    const int zeroed = cudaMemsetAsync(params->scratch.data, 0, 16, (cudaStream_t)stream);
    if (zeroed != cudaSuccess) return zeroed;
    SK_SWITCH_FLOATING(params->real.dtype, T, {
        SK_LAUNCH(adversarial_kernel<T>, grid_of(params->dims), sk_block(kOneEach), 0, stream,
                  *params);
    })
    return cudaGetLastError();
}

extern "C" int sk_cuda_adversarial_backward(const struct adversarial_backward_params *params,
                                            void *stream) {
    SK_SWITCH_FLOATING(params->real.dtype, T, {
        SK_LAUNCH(adversarial_backward_kernel<T>, grid_of(params->dims), sk_block(kOneEach), 0,
                  stream, *params);
    })
    return cudaGetLastError();
}
