/* Adversarial losses on the GPU: see ops/adversarial.h and ops/formula/adversarial.h. A thread
 * takes one score of each side at a time.
 *
 * Test: python -m pytest tests/test_simt.py -k adversarial
 * Machine code: make sass OP=adversarial
 * Time: selfkd bench adversarial --device cuda */
#include "adversarial.h"
#include "core/rows.cuh"

#include "formula/adversarial.h"

extern "C" {
SK_PARAMS(adversarial)
SK_PARAMS(adversarial_backward)
}
typedef struct adversarial_params forward_params;
typedef struct adversarial_backward_params backward_params;

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
    const int64_t term = sk_adversarial_term(p->mode, p->side);
    const bool mean = p->reduction == SELFKD_MEAN, none = p->reduction == SELFKD_NONE;
    double total[2] = {0, 0};
    for (int64_t i = sk_first_row(); i < longer; i += sk_row_step()) {
        const real f = i < M ? -score<T>(p->fake, i) : 0;
        const real of_fake = i < M ? sk_adversarial_value<real>(term, f, 0) : 0;
        if (i < M) ((real *)p->fake_rows.data)[i] = of_fake;
        if (!none) total[1] += sk_adversarial_summand<real>(term, f, 0, of_fake);
        if (i >= N) continue;
        const real r = score<T>(p->real, i), of_real = sk_adversarial_value<real>(term, r, 1);
        const real row = none ? of_real + of_fake : of_real;
        ((real *)p->rows.data)[i] = row;
        total[0] += none ? row : sk_adversarial_summand<real>(term, r, 1, of_real);
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
    const int64_t term = sk_adversarial_term(p->mode, p->side), stride = p->grad.stride[0];
    const bool mean = p->reduction == SELFKD_MEAN;
    for (int64_t i = sk_first_row(); i < longer; i += sk_row_step()) {
        const bool known = i < N || stride == 0;
        const double grad = known ? ((const real *)p->grad.data)[i * stride] : 0;
        if (i < N) {
            const real factor = (real)(grad / (mean ? (double)N : 1));
            sk_narrow(factor * sk_adversarial_slope<real>(term, score<T>(p->real, i), 1),
                      (T *)p->grad_real.data + i * p->grad_real.stride[0]);
        }
        if (i < M) {
            const real factor = (real)(grad / (mean ? (double)M : 1));
            sk_narrow(-factor * sk_adversarial_slope<real>(term, -score<T>(p->fake, i), 0),
                      (T *)p->grad_fake.data + i * p->grad_fake.stride[0]);
        }
    }
}

/* ---- launches ---- */

/* A thread takes a score of each side. */
static int64_t longer_side(const sk_dims &dims) {
    const int64_t N = dims.size['N' - 'A'], M = dims.size['M' - 'A'];
    return N > M ? N : M;
}

extern "C" int sk_cuda_adversarial(const struct adversarial_params *p, void *stream) {
    return sk_launch_each(SK_INSTANCES_FOR_EACH(adversarial_kernel), longer_side(p->dims),
                          p->real.dtype, stream, *p);
}

extern "C" int sk_cuda_adversarial_backward(const struct adversarial_backward_params *p,
                                            void *stream) {
    return sk_launch_each(SK_INSTANCES_FOR_EACH(adversarial_backward_kernel), longer_side(p->dims),
                          p->real.dtype, stream, *p);
}
