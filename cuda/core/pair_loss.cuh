/* Losses of two rows of logits that are a sum over the classes: what cpu/core/pair_loss.h says of a
 * formula holds here. One kernel each way: forward reads the logits twice, the second time from
 * cache, backward once. */
#pragma once
#include "core/pair_class.cuh"
#include "core/row_loss.cuh"

/* Formula is a type with
 *   static constexpr bool kLong       whether its gradient needs the registers of two blocks, not
 * three static bool smooth(k)             what cpu/core/pair_loss.h says of it static
 * sk_pair_result at(x, k)    what it makes of a class */

/* What is found of a row: lse(u/T), what it lies above lse(v/T'), A, B and the loss. */
struct sk_pair_loss_row {
    double lse, dl, a, b, loss;
};

/* Where a gradient goes; at is NULL where it is not wanted. */
template <typename T>
struct sk_out_row {
    T *at;
    int64_t stride;
};

template <typename Formula, typename real>
SK_DEVICE sk_pair_result<real> sk_terms_of(const sk_pair_class<double> &x, const real *k) {
    const sk_pair_class<real> y = {(real)x.p,      (real)x.q,     (real)x.d,   (real)x.size,
                                   (real)x.larger, (real)x.ratio, (real)x.gap, (real)x.rest};
    return Formula::at(y, k);
}

/* ---- forward ---- */

/* A step of logits, from kExcluded up; returns the largest. */
template <typename T, int kVec>
SK_DEVICE sk_real<T> sk_load_side(const T *row, int64_t stride, int64_t base, int64_t C,
                                  sk_real<T> (&to)[sk_items<T>]) {
    const sk_real<T> lowest = (sk_real<T>)kExcluded;
    return sk_load_above<T, kVec>(row, stride, base, C, lowest, lowest, to);
}

/* Anchors, the largest logits, and the sums against them. */
template <typename real>
struct sk_pair_sums {
    real top[2];
    double sum[2]; /* of e^((u - top)/T) and e^((v - top)/T') */
};

template <typename T, int kVec>
SK_DEVICE sk_pair_sums<sk_real<T>> sk_sum_pair(const sk_two_rows_of<T> &r) {
    typedef sk_real<T> real;
    const real lowest = (real)kExcluded, log2e_u = sk_keep((real)(1.4426950408889634 / r.T_u)),
               log2e_v = sk_keep((real)(1.4426950408889634 / r.T_v));
    const T *const u = sk_keep(r.u), *const v = sk_keep(r.v);
    sk_pair_sums<real> x = {{lowest, lowest}, {0, 0}};
    SK_ROLLED for (int64_t base = 0; base < r.C; base += sk_step<T>()) {
        real a[sk_items<T>], b[sk_items<T>], part[2] = {0, 0};
        const real top_u = sk_max(x.top[0], sk_load_side<T, kVec>(u, r.u_stride, base, r.C, a));
        const real top_v = sk_max(x.top[1], sk_load_side<T, kVec>(v, r.v_stride, base, r.C, b));
        if (top_u > x.top[0]) x.sum[0] *= sk_exp2((x.top[0] - top_u) * log2e_u);
        if (top_v > x.top[1]) x.sum[1] *= sk_exp2((x.top[1] - top_v) * log2e_v);
        x.top[0] = top_u;
        x.top[1] = top_v;
        SK_UNROLL for (int i = 0; i < sk_items<T>; i++) {
            if (i % kVec == 0 && !sk_any_class<kVec>(base, i, r.C)) break;
            part[0] += sk_exp2((a[i] - top_u) * log2e_u);
            part[1] += sk_exp2((b[i] - top_v) * log2e_v);
        }
        x.sum[0] += part[0];
        x.sum[1] += part[1];
    }
    real top[2] = {x.top[0], x.top[1]};
    sk_group_reduce(top, sk_larger());
    x.sum[0] *= sk_exp2((x.top[0] - top[0]) * log2e_u);
    x.sum[1] *= sk_exp2((x.top[1] - top[1]) * log2e_v);
    x.top[0] = top[0];
    x.top[1] = top[1];
    sk_group_reduce(x.sum, sk_add());
    return x;
}

/* lse and dl of a row. */
template <typename T>
SK_DEVICE sk_pair_loss_row sk_row_of_sums(const sk_two_rows_of<T> &r,
                                          const sk_pair_sums<sk_real<T>> &x) {
    const double u = x.top[0] / r.T_u, v = x.top[1] / r.T_v, log_u = log(x.sum[0]);
    return {u + log_u, (u - v) + (log_u - log(x.sum[1])), 0, 0, 0};
}

/* What dl is off by: log(sum p / sum q) by what it is now, from sum (p - q), of which nothing
 * cancels.
 */
template <typename T, int kVec>
SK_DEVICE double sk_error_of_dl(const sk_two_rows_of<T> &r, const sk_pair_loss_row &row) {
    typedef sk_real<T> real;
    const sk_pair_sides<real> k = sk_sides_at(r, row.lse, row.dl);
    const T *const u = sk_keep(r.u), *const v = sk_keep(r.v);
    double sum[2] = {0, 0};
    SK_ROLLED for (int64_t base = 0; base < r.C; base += sk_step<T>()) {
        real a[sk_items<T>], b[sk_items<T>], part[2] = {0, 0};
        sk_load_side<T, kVec>(u, r.u_stride, base, r.C, a);
        sk_load_side<T, kVec>(v, r.v_stride, base, r.C, b);
        SK_UNROLL for (int i = 0; i < sk_items<T>; i++) {
            if (i % kVec == 0 && !sk_any_class<kVec>(base, i, r.C)) break;
            const sk_pair_class<real> x = sk_class_at(k, a[i], b[i]);
            part[0] += x.d < 0 ? -x.larger * x.gap : x.larger * x.gap;
            part[1] += x.q;
        }
        sum[0] += part[0];
        sum[1] += part[1];
    }
    sk_group_reduce(sum, sk_add());
    return log1p(sum[0] / sum[1]);
}

/* Whether p times its slope is no limit: neither has left the range of a number. */
template <typename real>
SK_DEVICE bool sk_counts(double p, real slope) {
    return p != 0 && !isinf(slope);
}

/* A sum of p dphi/dp that stays exact where one class has nearly all of p, so that the gradient is
 * a small difference: with `slope` that of the class with the largest p so far, the rest of the sum
 * of p (dphi/dp - slope), and the sum of p. One for each thread. */
template <typename real>
struct sk_slope_sum {
    real largest, slope, mass;
    double rest;
};

/* Adds p and its slope; rest is added up in `real` for the length of a step. */
template <typename real>
SK_DEVICE void sk_add_slope(sk_slope_sum<real> *to, real p, real slope, real limit, real *rest) {
    if (!sk_counts(p, slope)) *rest += limit;
    if (!sk_counts(p, slope)) return;
    const real before = to->slope;
    to->slope = p > to->largest ? slope : before;
    to->largest = sk_max(p, to->largest);
    *rest += (before - to->slope) * to->mass + p * (slope - to->slope);
    to->mass += p;
}

/* The sums of a group: of a and b. */
template <typename real>
SK_DEVICE void sk_slope_totals(const sk_slope_sum<real> &a, const sk_slope_sum<real> &b,
                               double (&total)[2]) {
    real top[2] = {a.largest, b.largest};
    sk_group_reduce(top, sk_larger());
    real slope[2] = {a.largest == top[0] ? a.slope : (real)-INFINITY,
                     b.largest == top[1] ? b.slope : (real)-INFINITY};
    sk_group_reduce(slope, sk_larger());
    total[0] = a.rest + (double)a.mass * ((double)a.slope - (double)slope[0]);
    total[1] = b.rest + (double)b.mass * ((double)b.slope - (double)slope[1]);
    sk_group_reduce(total, sk_add());
    total[0] += slope[0];
    total[1] += slope[1];
}

template <typename real>
SK_DEVICE bool sk_is_far_pair(double lse, double dl, double factor) {
    return sk_is_beyond(lse, kFarLse<real>) || sk_is_beyond(dl, kFarLse<real>) ||
           sk_is_beyond(factor, kFarFactor<real>);
}

/* Leaves A, B and the loss of a row whose lse and dl are there. */
template <typename Formula, typename T, int kVec>
SK_DEVICE void sk_add_pair_loss(const sk_two_rows_of<T> &r, const sk_real<T> *numbers,
                                sk_pair_loss_row *row) {
    typedef sk_real<T> real;
    const sk_pair_sides<real> k = sk_sides_at(r, row->lse, row->dl);
    const T *const u = sk_keep(r.u), *const v = sk_keep(r.v);
    sk_slope_sum<real> of_p = {}, of_q = {};
    double loss[1] = {0}, total[2];
    SK_ROLLED for (int64_t base = 0; base < r.C; base += sk_step<T>()) {
        real a[sk_items<T>], b[sk_items<T>], part[3] = {};
        sk_load_side<T, kVec>(u, r.u_stride, base, r.C, a);
        sk_load_side<T, kVec>(v, r.v_stride, base, r.C, b);
        SK_UNROLL for (int i = 0; i < sk_items<T>; i++) {
            if (i % kVec == 0 && !sk_any_class<kVec>(base, i, r.C)) break;
            const sk_pair_class<real> x = sk_class_at(k, a[i], b[i]);
            const sk_pair_result<real> of = Formula::at(x, numbers);
            part[0] += of.value;
            sk_add_slope(&of_p, x.p, of.slope_p, of.limit_p, &part[1]);
            sk_add_slope(&of_q, x.q, of.slope_q, of.limit_q, &part[2]);
        }
        loss[0] += part[0];
        of_p.rest += part[1];
        of_q.rest += part[2];
    }
    sk_slope_totals(of_p, of_q, total);
    sk_group_reduce(loss, sk_add());
    row->a = total[0];
    row->b = total[1];
    row->loss = loss[0];
}

/* All that is found of a row in double, class by class: whatever its logits are. */
template <typename Formula, typename T>
SK_DEVICE sk_pair_loss_row sk_careful_pair_loss(const sk_two_rows_of<T> &r,
                                                const sk_real<T> *numbers) {
    sk_side x, y;
    sk_sides_of_rows(r, &x, &y);
    const double lse = sk_lse_of(x, r.T_u), lse_v = sk_lse_of(y, r.T_v);
    if (!isfinite(x.log_sum) || !isfinite(y.log_sum))
        return {lse, lse == -INFINITY ? lse_v : lse - lse_v, NAN, NAN, NAN};
    const double dl =
        r.T_u == r.T_v ? (x.top - y.top) / r.T_u + (x.log_sum - y.log_sum) : lse - lse_v;
    double sum[3] = {0, 0, 0};
    SK_ROLLED for (int64_t c = sk_lane(); c < r.C; c += sk_group()) {
        const sk_pair_class<double> k = sk_careful_class(r, c, x, y);
        const sk_pair_result<sk_real<T>> of = sk_terms_of<Formula>(k, numbers);
        const bool infinite = isnan(of.value) && isinf(k.d); /* times a p or q that is no real */
        sum[0] += k.larger == 0 && k.d == 0 ? 0 : infinite ? (double)INFINITY : (double)of.value;
        sum[1] += sk_counts(k.p, of.slope_p) ? k.p * of.slope_p : (double)of.limit_p;
        sum[2] += sk_counts(k.q, of.slope_q) ? k.q * of.slope_q : (double)of.limit_q;
    }
    sk_group_reduce(sum, sk_add());
    return {lse, dl, sum[1], sum[2], sum[0]};
}

/* The same result in all threads of the group. */
template <typename Formula, typename T, int kVec>
SK_DEVICE sk_pair_loss_row sk_pair_loss_of(const sk_two_rows_of<T> &r, const sk_real<T> *numbers) {
    typedef sk_real<T> real;
    const real e = (real)0.36787944117144233;
    const sk_pair_class<real> apart = {1, e, 1, 1, 1, e, 1 - e, e};
    const sk_pair_sums<real> sums = sk_sum_pair<T, kVec>(r);
    sk_pair_loss_row row = sk_row_of_sums(r, sums);
    bool exact = !Formula::smooth(numbers);
    SK_ROLLED for (int visits = 0; visits < 2; visits++) {
        if (exact) row.dl += sk_error_of_dl<T, kVec>(r, row);
        sk_add_pair_loss<Formula, T, kVec>(r, numbers, &row);
        const bool close = row.loss < 1e-6 * Formula::at(apart, numbers).value;
        if (exact || !close) break;
        exact = true;
    }
    const bool side = sums.top[0] > (real)kExcluded && sums.top[1] > (real)kExcluded;
    if (side && row.loss < 1e13 && !sk_is_far_pair<real>(row.lse, row.dl, 0)) return row;
    return sk_careful_pair_loss<Formula>(r, numbers);
}

/* ---- backward ---- */

/* Leaves the gradients of a row. */
template <typename Formula, typename T, int kVec>
SK_DEVICE void sk_differentiate_pair_loss(const sk_two_rows_of<T> &r, const sk_pair_loss_row &of,
                                          double factor, const sk_real<T> *numbers,
                                          const sk_out_row<T> &to_u, const sk_out_row<T> &to_v) {
    typedef sk_real<T> real;
    const double by_u = factor / r.T_u, by_v = factor / r.T_v;
    if (factor != 0 && sk_is_far_pair<real>(of.lse, of.dl, fmax(fabs(by_u), fabs(by_v)))) {
        sk_side x, y;
        sk_sides_of_rows(r, &x, &y);
        x = sk_side_within(x, r.T_u, of.lse, 0, kRounded<real>);
        y = sk_side_within(y, r.T_v, of.lse, of.dl, kRounded<real>);
        SK_ROLLED for (int64_t c = sk_lane(); c < r.C; c += sk_group()) {
            const sk_pair_class<double> k = sk_careful_class(r, c, x, y);
            const sk_pair_result<real> f = sk_terms_of<Formula>(k, numbers);
            const double u =
                sk_counts(k.p, f.slope_p) ? k.p * (f.slope_p - of.a) : (double)f.limit_p;
            const double v =
                sk_counts(k.q, f.slope_q) ? k.q * (f.slope_q - of.b) : (double)f.limit_q;
            if (to_u.at) sk_narrow((real)(by_u * u), to_u.at + c * to_u.stride);
            if (to_v.at) sk_narrow((real)(by_v * v), to_v.at + c * to_v.stride);
        }
        return;
    }
    const sk_pair_sides<real> k = sk_sides_at(r, of.lse, of.dl);
    const sk_high_low<real> mean_p = sk_high_low_of<real>(of.a),
                            mean_q = sk_high_low_of<real>(of.b);
    const real f_u = sk_keep((real)by_u), f_v = sk_keep((real)by_v);
    const T *const u = sk_keep(r.u), *const v = sk_keep(r.v);
    SK_ROLLED for (int64_t base = 0; base < r.C; base += sk_step<T>()) {
        real a[sk_items<T>], b[sk_items<T>];
        sk_load_side<T, kVec>(u, r.u_stride, base, r.C, a);
        sk_load_side<T, kVec>(v, r.v_stride, base, r.C, b);
        SK_UNROLL for (int i = 0; i < sk_items<T>; i++) {
            if (i % kVec == 0 && !sk_any_class<kVec>(base, i, r.C)) break;
            const sk_pair_class<real> x = sk_class_at(k, a[i], b[i]);
            const sk_pair_result<real> of_class = Formula::at(x, numbers);
            const real by_p = (of_class.slope_p - mean_p.high) - mean_p.low;
            const real by_q = (of_class.slope_q - mean_q.high) - mean_q.low;
            a[i] = f_u != 0
                       ? f_u * (sk_counts(x.p, of_class.slope_p) ? x.p * by_p : of_class.limit_p)
                       : 0;
            b[i] = f_v != 0
                       ? f_v * (sk_counts(x.q, of_class.slope_q) ? x.q * by_q : of_class.limit_q)
                       : 0;
        }
        if (to_u.at) sk_store<T, kVec>(to_u.at, to_u.stride, base, r.C, a);
        if (to_v.at) sk_store<T, kVec>(to_v.at, to_v.stride, base, r.C, b);
    }
}

/* ---- the kernels ---- */

/* Leaves rows, saved, loss and denominator. */
template <typename Formula, typename T, int kVec, typename Params, typename Rows>
SK_DEVICE void sk_pair_loss_forward(const Params &p, const sk_real<T> *numbers, Rows rows) {
    sk_row_forward<T, 4>(p, [&](int64_t n, int64_t s, double w, double(&saved)[4]) {
        const sk_pair_loss_row x = sk_pair_loss_of<Formula, T, kVec>(rows(n, s), numbers);
        saved[0] = x.lse;
        saved[1] = x.dl;
        saved[2] = x.a;
        saved[3] = x.b;
        return w * x.loss;
    });
}

/* Leaves the gradients that are wanted. */
template <typename Formula, typename T, int kVec, typename Params, typename Rows>
SK_DEVICE void sk_pair_loss_backward(const Params &p, const sk_arg &to_u, const sk_arg &to_v,
                                     const sk_real<T> *numbers, Rows rows) {
    sk_each_row(p, [&](int64_t n, int64_t s) {
        const sk_incoming<sk_real<T>, Params> in(p, n, s);
        const double per_row = in.grad * in.weight / in.denominator;
        const double factor = in.weight != 0 ? per_row : 0;
        const sk_pair_loss_row x = {in.saved(0), in.saved(1), in.saved(2), in.saved(3), 0};
        const sk_out_row<T> u = {sk_wanted_row<T>(to_u, n, s), to_u.stride[1]};
        const sk_out_row<T> v = {sk_wanted_row<T>(to_v, n, s), to_v.stride[1]};
        sk_differentiate_pair_loss<Formula, T, kVec>(rows(n, s), x, factor, numbers, u, v);
    });
}

/* The rows of inputs u and v, whose temperatures are the parameters T and T_v. */
#define SK_PAIR_ROWS(type, p, u, v, T, T_v)                    \
    [&](int64_t n, int64_t s) {                                \
        return sk_two_rows_of<type>{sk_row<type>((p).u, n, s), \
                                    sk_row<type>((p).v, n, s), \
                                    (p).u.stride[1],           \
                                    (p).v.stride[1],           \
                                    SK_DIM(&(p), C),           \
                                    (p).T,                     \
                                    (p).T_v};                  \
    }

/* Defines the kernel op_kernel<T, kVec, Formula> of a loss, and that of its gradient; and how they
 * are launched for the parameters *p. */
#define SK_PAIR_FORWARD(op, u, v, temperature, temperature_v)                                \
    template <typename T, int kVec, typename Formula>                                        \
    __global__ void __launch_bounds__(SK_BLOCK, 2) op##_kernel(const struct op##_params p) { \
        typedef sk_real<T> real;                                                             \
        const real k[] = op##_NUMBERS(&p);                                                   \
        sk_pair_loss_forward<Formula, T, kVec>(                                              \
            p, k, SK_PAIR_ROWS(T, p, u, v, temperature, temperature_v));                     \
    }
#define SK_PAIR_BACKWARD(op, u, v, temperature, temperature_v)                                   \
    template <typename T, int kVec, typename Formula>                                            \
    __global__ void __launch_bounds__(SK_BLOCK, Formula::kLong ? 2 : sk_resident<T, kVec>)       \
        op##_backward_kernel(const struct op##_backward_params p) {                              \
        typedef sk_real<T> real;                                                                 \
        const real k[] = op##_NUMBERS(&p);                                                       \
        sk_pair_loss_backward<Formula, T, kVec>(                                                 \
            p, p.grad_##u, p.grad_##v, k, SK_PAIR_ROWS(T, p, u, v, temperature, temperature_v)); \
    }
#define SK_LAUNCH_FORWARD(op, u, v, formula) \
    sk_launch_rows(SK_INSTANCES(op##_kernel, formula), SK_ROWS(p), {&p->u, &p->v}, stream, *p)
#define SK_LAUNCH_BACKWARD(op, u, v, formula)                               \
    sk_launch_rows(SK_INSTANCES(op##_backward_kernel, formula), SK_ROWS(p), \
                   {&p->u, &p->v, SK_OR(p->grad_##u, p->u), SK_OR(p->grad_##v, p->v)}, stream, *p)

/* Defines name_formula, of the function name_terms. */
#define SK_PAIR_FORMULA(name, is_long, is_smooth)                                                \
    struct name##_formula {                                                                      \
        static constexpr bool kLong = is_long;                                                   \
        template <typename real>                                                                 \
        static __device__ bool smooth(const real *) {                                            \
            return is_smooth;                                                                    \
        }                                                                                        \
        template <typename real>                                                                 \
        static __device__ sk_pair_result<real> at(const sk_pair_class<real> &x, const real *k) { \
            return name##_terms(x, k);                                                           \
        }                                                                                        \
    }

/* Defines all of it for a loss with one formula, op_terms. */
#define SK_PAIR_LOSS(op, u, v, temperature, temperature_v)                                       \
    SK_PAIR_FORMULA(op, false, false);                                                           \
    SK_PAIR_FORWARD(op, u, v, temperature, temperature_v)                                        \
    SK_PAIR_BACKWARD(op, u, v, temperature, temperature_v)                                       \
    extern "C" int sk_cuda_##op(const struct op##_params *p, void *stream) {                     \
        return SK_LAUNCH_FORWARD(op, u, v, op##_formula);                                        \
    }                                                                                            \
    extern "C" int sk_cuda_##op##_backward(const struct op##_backward_params *p, void *stream) { \
        return SK_LAUNCH_BACKWARD(op, u, v, op##_formula);                                       \
    }
