/* The rows of the SD-Dropout objective on the GPU, in one kernel: each group of threads finishes a
 * row, and writes gradients over logits that it has just read. Formula in ops/sd_dropout_head.h.
 *
 * Test: python -m pytest tests/test_simt.py -k sd_dropout_head
 * Machine code: make sass OP=sd_dropout_head
 * Time: selfkd bench sd_dropout_head --device cuda */
#include "core/ce.cuh"
#include "core/kl.cuh"
#include "core/rows.cuh"
#include "sd_dropout_head.h"

extern "C" {
SK_PARAMS(sd_dropout_head_rows)
}
typedef struct sd_dropout_head_rows_params row_params;

/* The class of a row; -1 where it is ignored. */
SK_DEVICE int64_t target_of(const row_params &p, int64_t n) {
    const int64_t y = *sk_cell<int64_t>(p.target, n, 0);
    if (y == p.ignore_index) return -1;
    sk_assert(y >= 0 && y < SK_DIM(&p, C),
              "sd_dropout_head: target is no class and not ignore_index");
    return y;
}

/* Leaves the sums of cross-entropy the same in all threads; returns the largest logit. */
template <typename T, int kVec>
SK_DEVICE sk_real<T> add_row(const row_params &p, int64_t n, double (&sum)[SK_CE_SUMS]) {
    typedef sk_real<T> real;
    const int64_t C = SK_DIM(&p, C);
    const T *const z = sk_keep(sk_row<T>(p.z, n, 0));
    sk_softmax<real> x = sk_no_softmax<real>();
    real h = (real)kLowest;
    SK_ROLLED for (int64_t base = 0; base < C; base += sk_step<T>()) {
        real a[sk_items<T>];
        const real most = sk_load_logits<T, kVec>(z, p.z.stride[1], base, C, a);
        if (most > h + 2) {
            x.rest *= sk_exponential(h - most);
            h = most;
        }
        sk_add_softmax<T, kVec>(a, h, most, &x);
        if (p.label_smoothing != 0) sk_add_minus<T, kVec>(a, base, C, h, &x);
    }
    const real largest =
        sk_mend_softmax<T>(sk_row<T>(p.z, n, 0), p.z.stride[1], C, p.label_smoothing,
                           sk_gather_softmax(x, h, C, sum), sum);
    return largest == -INFINITY ? (real)NAN : largest;
}

/* Writes the gradients of a row over its logits. */
template <typename T, int kVec>
SK_DEVICE void differentiate_row(const row_params &p, int64_t n,
                                 const sk_ce_slope<sk_real<T>> &of_z,
                                 const sk_pair_slope<sk_real<T>> &of_views) {
    typedef sk_real<T> real;
    const int64_t C = SK_DIM(&p, C);
    T *const z = sk_row<T>(p.z, n, 0), *const u = sk_row<T>(p.u, n, 0),
             *const v = sk_row<T>(p.v, n, 0);
    SK_ROLLED for (int64_t base = 0; base < C; base += sk_step<T>()) {
        real a[sk_items<T>], b[sk_items<T>];
        sk_load_logits<T, kVec>(z, p.z.stride[1], base, C, a);
        sk_ce_gradients<T, kVec>(of_z, a, base, b);
        sk_store<T, kVec>(z, p.z.stride[1], base, C, b);
        sk_load_logits<T, kVec>(u, p.u.stride[1], base, C, a);
        sk_load_logits<T, kVec>(v, p.v.stride[1], base, C, b);
        sk_differentiate<T, kVec>(of_views, base, C, a, b);
        sk_store<T, kVec>(u, p.u.stride[1], base, C, a);
        sk_store<T, kVec>(v, p.v.stride[1], base, C, b);
    }
}

/* The same class by class: whatever the logits are. */
template <typename T>
SK_DEVICE void differentiate_far_row(const row_params &p, int64_t n, double w, int64_t target,
                                     const sk_side &of_z, const sk_divergence &x) {
    typedef sk_real<T> real;
    const int64_t C = SK_DIM(&p, C);
    T *const z = sk_row<T>(p.z, n, 0), *const u = sk_row<T>(p.u, n, 0),
             *const v = sk_row<T>(p.v, n, 0);
    SK_ROLLED for (int64_t c = sk_lane(); c < C; c += sk_group()) {
        T *const at = z + c * p.z.stride[1];
        const double slope = sk_ce_slope_of(sk_widen(*at), c == target, p.label_smoothing, C, of_z);
        sk_narrow((real)(w * slope), at);
    }
    const double factor = w * p.kl_weight;
    sk_differentiate_far<T>({u, v, p.u.stride[1], p.v.stride[1], C, p.temperature}, x,
                            factor * p.forward_weight, factor * p.reverse_weight, p.detach_target,
                            u, p.u.stride[1], v, p.v.stride[1]);
}

/* Leaves rows and, over the logits, their gradients. */
template <typename T, int kVec>
__global__ void __launch_bounds__(SK_BLOCK) sd_dropout_head_kernel(const row_params params) {
    typedef sk_real<T> real;
    const row_params *const p = &params;
    const int64_t C = SK_DIM(p, C);
    const double TT = p->temperature * p->temperature, per_kl = p->kl_weight;
    for (int64_t n = sk_first_row(); n < SK_DIM(p, N); n += sk_row_step()) {
        const int64_t y = target_of(params, n);
        const double w = y < 0 ? 0 : (double)sk_weight<real>(p->weight, n, 0);
        double sum[SK_CE_SUMS] = {}, h = 0, level = 0, loss = 0, z_y[1] = {0};
        sk_divergence x = {0, 0, 0, 0, false};
        if (w != 0) {
            /* by one thread, for all: none may read what another has written over */
            if (sk_lane() == 0) z_y[0] = sk_widen(sk_row<T>(p->z, n, 0)[y * p->z.stride[1]]);
            sk_group_reduce(z_y, sk_add());
            h = add_row<T, kVec>(params, n, sum);
            level = sk_log_sum(sum);
            loss = sk_conclude_ce(p->label_smoothing, C, sum, level, h, z_y[0]);
        }
        if (w != 0 && per_kl != 0) {
            x = sk_diverge<T, kVec>({sk_row<T>(p->u, n, 0), sk_row<T>(p->v, n, 0), p->u.stride[1],
                                     p->v.stride[1], C, p->temperature});
            loss += per_kl * TT * sk_weighted_kl(x, p->forward_weight, p->reverse_weight);
        }
        if (sk_lane() == 0) *sk_cell<real>(p->rows, n, 0) = w != 0 ? (real)(w * loss) : 0;
        if (!p->differentiate) continue;
        const double factor = w * per_kl;
        if (h < kLowest || sk_is_beyond(w, kFarFactor<real>) ||
            sk_is_far<real>(x, factor * p->forward_weight, factor * p->reverse_weight)) {
            differentiate_far_row<T>(params, n, w, y, {h, level}, x);
            continue;
        }
        differentiate_row<T, kVec>(
            params, n, sk_set_ce<real>(h, level, w, p->label_smoothing, C, y, z_y[0]),
            sk_pair_slope_of<real>(x, p->temperature, factor * p->forward_weight,
                                   factor * p->reverse_weight, p->detach_target,
                                   w == 0 || per_kl == 0));
    }
}

extern "C" int sk_cuda_sd_dropout_head_rows(const struct sd_dropout_head_rows_params *p,
                                            void *stream) {
    return sk_launch_rows(SK_INSTANCES(sd_dropout_head_kernel), SK_DIM(p, N), {&p->z, &p->u, &p->v},
                          stream, *p);
}
