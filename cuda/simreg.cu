/* SimReg on the GPU: one kernel forward, one backward, each reading the features once. See
 * ops/simreg.h and ops/formula/simreg.h.
 *
 * Test: python -m pytest tests/test_simt.py -k simreg
 * Machine code: make sass OP=simreg
 * Time: selfkd bench simreg --device cuda */
#include "core/row_loss.cuh"
#include "simreg.h"

#include "formula/simreg.h"

extern "C" {
SK_PARAMS(simreg)
SK_PARAMS(simreg_backward)
}
typedef struct simreg_params forward_params;
typedef struct simreg_backward_params backward_params;

enum { SCALE_X, SCALE_T, H, SAVED };

/* ---- forward ---- */

/* Calls each(x, t) for the elements of a row in `real`; absent ones are 0. */
template <typename T, int kVec, typename Each>
SK_DEVICE void each_feature(const forward_params &p, int64_t n, int64_t s, Each each) {
    const int64_t C = SK_DIM(&p, C);
    const T *const student = sk_keep(sk_row<T>(p.student, n, s));
    const sk_any_row target = sk_any_row_of(p.target, n, s);
    for (int64_t base = 0; base < C; base += sk_step<T>()) {
        sk_real<T> x[sk_items<T>], t[sk_items<T>];
        sk_load<T, kVec>(student, p.student.stride[1], base, C, 0, x);
        sk_load_constant<T, kVec>(target, base, C, 0, t);
        SK_UNROLL for (int i = 0; i < sk_items<T>; i++) each((double)x[i], (double)t[i]);
    }
}

/* The sum of (ratio x - t)^2, exactly 0 for equal rows and ratio 1. */
template <typename T, int kVec>
SK_DEVICE double distance(const forward_params &p, int64_t n, int64_t s, double ratio) {
    double sum[1] = {0};
    each_feature<T, kVec>(p, n, s, [&](double x, double t) {
        const double d = x * ratio - t;
        sum[0] += d * d;
    });
    sk_group_reduce(sum, sk_add());
    return sum[0];
}

SK_DEVICE double power_of(const sk_any_row &row, int64_t C) {
    double top[1] = {0};
    SK_ROLLED for (int64_t c = sk_lane(); c < C; c += sk_group()) top[0] =
        fmax(top[0], fabs(row(c)));
    sk_group_reduce(top, sk_larger());
    return sk_simreg_power(top[0]);
}

/* A row of doubles too large or too small to square. */
SK_DEVICE sk_simreg_row compare_far(const forward_params &p, int64_t n, int64_t s) {
    const int64_t C = SK_DIM(&p, C);
    const sk_any_row student = sk_any_row_of(p.student, n, s);
    const sk_any_row target = sk_any_row_of(p.target, n, s);
    const double by_x = power_of(student, C), by_t = power_of(target, C);
    double sum[3] = {0, 0, 0}, apart[1] = {0};
    SK_ROLLED for (int64_t c = sk_lane(); c < C; c += sk_group()) {
        const double a = student(c) * by_x, b = target(c) * by_t;
        sum[0] += a * a;
        sum[1] += b * b;
        sum[2] += a * b;
    }
    sk_group_reduce(sum, sk_add());
    const sk_simreg_lengths k = sk_simreg_measure({sum[0], sum[1], sum[2]}, by_x, by_t);
    const bool good = k.value >= SK_SIMREG_NEAR(double); /* the same answer in the whole group */
    if (good) return sk_simreg_finish(k, k.value, by_x, by_t);
    SK_ROLLED for (int64_t c = sk_lane(); c < C; c += sk_group()) {
        const double d = student(c) * by_x * (k.scale_x / k.scale_t) - target(c) * by_t;
        apart[0] += d * d;
    }
    sk_group_reduce(apart, sk_add());
    return sk_simreg_finish(k, apart[0] * k.scale_t * k.scale_t, by_x, by_t);
}

/* Rows of unit length: by their products or, where 2 - 2 cos would cancel, by their differences. */
template <typename T, int kVec>
SK_DEVICE sk_simreg_row compare(const forward_params &p, int64_t n, int64_t s) {
    double sum[3] = {0, 0, 0};
    each_feature<T, kVec>(p, n, s, [&](double x, double t) {
        sum[0] += x * x;
        sum[1] += t * t;
        sum[2] += x * t;
    });
    sk_group_reduce(sum, sk_add());
    if constexpr (sizeof(T) == 8)
        if (!sk_simreg_is_near(sum[0]) || !sk_simreg_is_near(sum[1])) return compare_far(p, n, s);
    const sk_simreg_lengths k = sk_simreg_measure({sum[0], sum[1], sum[2]}, 1, 1);
    double value = k.value;
    if (!(value >= SK_SIMREG_NEAR(sk_real<T>))) /* the same answer in the whole group */
        value = distance<T, kVec>(p, n, s, k.scale_x / k.scale_t) * k.scale_t * k.scale_t;
    return sk_simreg_finish(k, value, 1, 1);
}

/* Leaves rows, saved, loss and denominator. */
template <typename T, int kVec>
__global__ void __launch_bounds__(SK_BLOCK, sk_resident<T, kVec>)
    simreg_kernel(const forward_params p) {
    sk_row_forward<T, SAVED>(p, [&](int64_t n, int64_t s, double w, double(&saved)[SAVED]) {
        sk_simreg_row x = {0, 1, 1, 0};
        if (p.normalize)
            x = compare<T, kVec>(p, n, s);
        else
            x.value = distance<T, kVec>(p, n, s, 1);
        saved[SCALE_X] = x.scale_x;
        saved[SCALE_T] = x.scale_t;
        saved[H] = x.h;
        return w * x.value;
    });
}

/* ---- backward ---- */

/* Leaves grad_student; exactly 0 for equal rows. */
template <typename T, int kVec>
__global__ void __launch_bounds__(SK_BLOCK, sk_resident<T, kVec>)
    simreg_backward_kernel(const backward_params p) {
    typedef sk_real<T> real;
    sk_each_row(p, [&](int64_t n, int64_t s) {
        const sk_incoming<real, backward_params> in(p, n, s);
        const sk_simreg_slope k =
            sk_simreg_slope_of(in.grad, in.weight, in.denominator, in.saved(SCALE_X),
                               in.saved(SCALE_T), in.saved(H), sizeof(T) == 8);
        const int64_t C = SK_DIM(&p, C);
        const T *const student = sk_keep(sk_row<T>(p.student, n, s));
        const sk_any_row target = sk_any_row_of(p.target, n, s);
        T *const to = sk_keep(sk_row<T>(p.grad_student, n, s));
        SK_ROLLED for (int64_t base = 0; base < C; base += sk_step<T>()) {
            real x[sk_items<T>], t[sk_items<T>];
            sk_load<T, kVec>(student, p.student.stride[1], base, C, 0, x);
            sk_load_constant<T, kVec>(target, base, C, 0, t);
            if (sizeof(T) == 8 && k.far) {
                SK_UNROLL for (int i = 0; i < sk_items<T>; i++) {
                    x[i] *= (real)k.by_x;
                    t[i] *= (real)k.by_t;
                }
            }
            SK_UNROLL for (int i = 0; i < sk_items<T>; i++) x[i] =
                (real)sk_simreg_gradient(k, x[i], t[i]);
            sk_store<T, kVec>(to, p.grad_student.stride[1], base, C, x);
        }
    });
}

extern "C" int sk_cuda_simreg(const struct simreg_params *p, void *stream) {
    return sk_launch_rows(SK_INSTANCES(simreg_kernel), SK_ROWS(p), {&p->student, &p->target},
                          stream, *p);
}

extern "C" int sk_cuda_simreg_backward(const struct simreg_backward_params *p, void *stream) {
    return sk_launch_rows(SK_INSTANCES(simreg_backward_kernel), SK_ROWS(p),
                          {&p->student, &p->target, &p->grad_student}, stream, *p);
}
