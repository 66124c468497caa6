/* SimReg on the GPU: one kernel forward, one backward, each reading the features once. Formulas in
 * ops/simreg.h; computed in double, for the reasons in cpu/simreg.c. */
#include "core/rows.cuh"
#include "simreg.h"

extern "C" {
SK_PARAMS(simreg)
SK_PARAMS(simreg_backward)
}
typedef struct simreg_params forward_params;
typedef struct simreg_backward_params backward_params;

/* The least length that a row is divided by. */
constexpr double kEps = 1e-12;

/* 2 - 2 cos is off by some 1e-15: below this the differences are summed up instead. */
template <typename T>
constexpr double kNear = sizeof(T) == 8 ? 0.03 : 1e-6;

/* ---- forward ---- */

/* A row's loss and, as saved for backward, x_hat = x scale_x, t_hat = t scale_t and h. */
struct result {
    double value, scale_x, scale_t, h;
};

enum { XX, TT, XT };

/* Leaves the sums of x^2, t^2 and x t of a row. */
template <typename T, int kVec>
SK_DEVICE void multiply(const forward_params &p, int64_t n, int64_t s, double (&sum)[3]) {
    const forward_params *const params = &p;
    const int64_t C = SK_DIM(params, C);
    const T *const student = sk_keep(sk_row<T>(p.student, n, s));
    const sk_any_row target = sk_any_row_of(p.target, n, s);
    for (int64_t base = 0; base < C; base += sk_step<T>()) {
        sk_real<T> x[sk_items<T>], t[sk_items<T>];
        sk_load<T, kVec>(student, p.student.stride[1], base, C, 0, x);
        sk_load_constant<T, kVec>(target, base, C, 0, t);
        SK_UNROLL for (int i = 0; i < sk_items<T>; i++) {
            const double a = x[i], b = t[i];
            sum[XX] += a * a;
            sum[TT] += b * b;
            sum[XT] += a * b;
        }
    }
    sk_group_reduce(sum, sk_add());
}

/* The sum of (ratio x - t)^2, exactly 0 for equal rows and ratio 1. */
template <typename T, int kVec>
SK_DEVICE double distance(const forward_params &p, int64_t n, int64_t s, double ratio) {
    const forward_params *const params = &p;
    const int64_t C = SK_DIM(params, C);
    const T *const student = sk_keep(sk_row<T>(p.student, n, s));
    const sk_any_row target = sk_any_row_of(p.target, n, s);
    double sum[1] = {0};
    for (int64_t base = 0; base < C; base += sk_step<T>()) {
        sk_real<T> x[sk_items<T>], t[sk_items<T>];
        sk_load<T, kVec>(student, p.student.stride[1], base, C, 0, x);
        sk_load_constant<T, kVec>(target, base, C, 0, t);
        SK_UNROLL for (int i = 0; i < sk_items<T>; i++) {
            const double d = (double)x[i] * ratio - (double)t[i];
            sum[0] += d * d;
        }
    }
    sk_group_reduce(sum, sk_add());
    return sum[0];
}

/* ---- rows of doubles too large or too small to square: times powers of two, one by one ---- */

/* Squares of lengths, and factors of features, that are sure to be good. */
SK_DEVICE bool is_near(double square) { return square > 0x1p-900 && square < 0x1p900; }
SK_DEVICE bool is_far_scale(double scale) { return scale > 0 && scale < 0x1p-450; }

/* What brings the largest element to between 1 and 2; 1 where there is none. */
SK_DEVICE double power_of(const sk_any_row &row, int64_t C) {
    double top[1] = {0};
    SK_ROLLED for (int64_t c = sk_lane(); c < C; c += sk_group()) top[0] =
        fmax(top[0], fabs(row(c)));
    sk_group_reduce(top, sk_larger());
    const int exponent = top[0] > 0 && isfinite(top[0]) ? -ilogb(top[0]) : 0;
    return ldexp(1.0, exponent < 1023 ? exponent : 1023);
}

SK_DEVICE result compare_far(const forward_params &p, int64_t n, int64_t s) {
    const forward_params *const params = &p;
    const int64_t C = SK_DIM(params, C);
    const sk_any_row student = sk_any_row_of(p.student, n, s);
    const sk_any_row target = sk_any_row_of(p.target, n, s);
    const double by_x = power_of(student, C), by_t = power_of(target, C);
    double sum[3] = {0, 0, 0};
    SK_ROLLED for (int64_t c = sk_lane(); c < C; c += sk_group()) {
        const double a = student(c) * by_x, b = target(c) * by_t;
        sum[XX] += a * a;
        sum[TT] += b * b;
        sum[XT] += a * b;
    }
    sk_group_reduce(sum, sk_add());
    const double x = sqrt(sum[XX]), t = sqrt(sum[TT]);
    const bool unit_x = !(x < kEps * by_x), unit_t = !(t < kEps * by_t);
    const double scale_x = 1 / (unit_x ? x : kEps * by_x), scale_t = 1 / (unit_t ? t : kEps * by_t);
    const double xx = unit_x ? 1 : sum[XX] * scale_x * scale_x;
    const double tt = unit_t ? 1 : sum[TT] * scale_t * scale_t;
    double value = xx + tt - 2 * (sum[XT] * scale_x * scale_t);
    if (!(value >= kNear<double>)) {
        double apart[1] = {0};
        SK_ROLLED for (int64_t c = sk_lane(); c < C; c += sk_group()) {
            const double a = student(c) * by_x, b = target(c) * by_t;
            const double d = a * (scale_x / scale_t) - b;
            apart[0] += d * d;
        }
        sk_group_reduce(apart, sk_add());
        value = apart[0] * scale_t * scale_t;
    }
    return {value, scale_x * by_x, scale_t * by_t, unit_x ? (value + (1 - tt)) / 2 : 0};
}

/* ---- all rows ---- */

/* Rows of unit length: by their products or, where 2 - 2 cos would cancel, by their differences. */
template <typename T, int kVec>
SK_DEVICE result compare(const forward_params &p, int64_t n, int64_t s) {
    double sum[3] = {0, 0, 0};
    multiply<T, kVec>(p, n, s, sum);
    if constexpr (sizeof(T) == 8)
        if (!is_near(sum[XX]) || !is_near(sum[TT])) return compare_far(p, n, s);
    const double x = sqrt(sum[XX]), t = sqrt(sum[TT]);
    const bool unit_x = !(x < kEps), unit_t = !(t < kEps);
    const double scale_x = 1 / (unit_x ? x : kEps), scale_t = 1 / (unit_t ? t : kEps);
    const double xx = unit_x ? 1 : sum[XX] * scale_x * scale_x; /* |x_hat|^2 */
    const double tt = unit_t ? 1 : sum[TT] * scale_t * scale_t;
    double value = xx + tt - 2 * (sum[XT] * scale_x * scale_t);
    if (!(value >= kNear<T>)) /* the same answer in the whole group */
        value = distance<T, kVec>(p, n, s, scale_x / scale_t) * scale_t * scale_t;
    return {value, scale_x, scale_t, unit_x ? (value + (1 - tt)) / 2 : 0};
}

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
    simreg_kernel(const forward_params params) {
    typedef sk_real<T> real;
    const forward_params *const p = &params;
    const int64_t S = SK_DIM(p, S), count = SK_DIM(p, N) * S;
    double total[2] = {0, 0};
    for (int64_t row = sk_first_row(); row < count; row += sk_row_step()) {
        const int64_t n = row / S, s = row % S;
        const real w = sk_weight<real>(p->weight, n, s);
        result x = {0, 1, 1, 0};
        if (w != 0 && p->normalize)
            x = compare<T, kVec>(params, n, s);
        else if (w != 0)
            x.value = distance<T, kVec>(params, n, s, 1);
        if (sk_lane() != 0) continue;
        const double value = w * x.value;
        *sk_cell<real>(p->rows, n, s) = (real)value;
        *sk_cell<double>(p->saved, 0, n, s) = x.scale_x;
        *sk_cell<double>(p->saved, 1, n, s) = x.scale_t;
        *sk_cell<double>(p->saved, 2, n, s) = x.h;
        total[0] += value;
        total[1] += w;
    }
    if (sk_grid_sum(total, p->scratch.data) && sk_thread() == 0) finish<real>(params, total);
}

/* ---- backward ---- */

/* What the gradient of a row needs: dl/dx = factor ((ratio x - t) - along x), of a far row with x
 * times by_x and t times by_t. */
struct slope {
    bool zero, far; /* zero: no gradient, whatever the features hold */
    double factor, ratio, along, by_x, by_t;
};

template <typename real>
SK_DEVICE slope slope_of(const backward_params &p, int64_t n, int64_t s) {
    const double grad = *sk_cell<real>(p.grad, n, s), w = sk_weight<real>(p.weight, n, s);
    const double of_row = 2 * grad * w / *(const real *)p.denominator.data;
    const double scale_x = *sk_cell<double>(p.saved, 0, n, s);
    const double scale_t = *sk_cell<double>(p.saved, 1, n, s);
    const double h = *sk_cell<double>(p.saved, 2, n, s);
    slope k = {grad == 0 || w == 0, false, 0, 0, 0, 1, 1};
    k.far = sizeof(real) == 8 && (is_far_scale(scale_x) || is_far_scale(scale_t));
    if (k.far) {
        k.by_x = ldexp(1.0, ilogb(scale_x));
        k.by_t = ldexp(1.0, ilogb(scale_t));
    }
    k.ratio = (scale_x / k.by_x) / (scale_t / k.by_t);
    k.factor = of_row * scale_x * (scale_t / k.by_t);
    k.along = k.ratio * h;
    return k;
}

/* Leaves grad_student; exactly 0 for equal rows. */
template <typename T, int kVec>
__global__ void __launch_bounds__(SK_BLOCK, sk_resident<T, kVec>)
    simreg_backward_kernel(const backward_params params) {
    typedef sk_real<T> real;
    const backward_params *const p = &params;
    const int64_t S = SK_DIM(p, S), C = SK_DIM(p, C), count = SK_DIM(p, N) * S;
    for (int64_t row = sk_first_row(); row < count; row += sk_row_step()) {
        const int64_t n = row / S, s = row % S;
        const slope k = slope_of<real>(params, n, s);
        const T *const student = sk_keep(sk_row<T>(p->student, n, s));
        const sk_any_row target = sk_any_row_of(p->target, n, s);
        T *const to = sk_keep(sk_row<T>(p->grad_student, n, s));
        SK_ROLLED for (int64_t base = 0; base < C; base += sk_step<T>()) {
            real x[sk_items<T>], t[sk_items<T>];
            sk_load<T, kVec>(student, p->student.stride[1], base, C, 0, x);
            sk_load_constant<T, kVec>(target, base, C, 0, t);
            if (sizeof(T) == 8 && k.far) {
                SK_UNROLL for (int i = 0; i < sk_items<T>; i++) {
                    x[i] *= (real)k.by_x;
                    t[i] *= (real)k.by_t;
                }
            }
            SK_UNROLL for (int i = 0; i < sk_items<T>; i++) {
                const double a = x[i], apart = a * k.ratio - (double)t[i];
                x[i] = k.zero ? 0 : (real)(k.factor * (apart - a * k.along));
            }
            sk_store<T, kVec>(to, p->grad_student.stride[1], base, C, x);
        }
    }
}

/* ---- launches ---- */

extern "C" int sk_cuda_simreg(const struct simreg_params *params, void *stream) {
    const int zeroed = cudaMemsetAsync(params->scratch.data, 0, 16, (cudaStream_t)stream);
    if (zeroed != cudaSuccess) return zeroed;
    const int64_t count = SK_DIM(params, N) * SK_DIM(params, S);
    SK_SWITCH_FLOATING(params->student.dtype, T, {
        const sk_layout layout =
            sk_layout_of(params->dims, sizeof(T), {&params->student, &params->target});
        const auto kernel = SK_KERNEL(simreg_kernel, T, layout);
        SK_LAUNCH(kernel, sk_grid(count, layout), sk_block(layout), 0, stream, *params);
    })
    return cudaGetLastError();
}

extern "C" int sk_cuda_simreg_backward(const struct simreg_backward_params *params, void *stream) {
    const int64_t count = SK_DIM(params, N) * SK_DIM(params, S);
    SK_SWITCH_FLOATING(params->student.dtype, T, {
        const sk_layout layout = sk_layout_of(
            params->dims, sizeof(T), {&params->student, &params->target, &params->grad_student});
        const auto kernel = SK_KERNEL(simreg_backward_kernel, T, layout);
        SK_LAUNCH(kernel, sk_grid(count, layout), sk_block(layout), 0, stream, *params);
    })
    return cudaGetLastError();
}
