/* Losses of two rows of logits that are a sum over the classes: what cpu/core/pair_loss.h says of a
 * formula holds here. One kernel each way: forward reads the logits twice, the second time from
 * cache, backward once. */
#pragma once
#include "core/kl.cuh"
#include "core/row_loss.cuh"

#include <float.h>

/* What a formula makes of a class. Formula is a type with
 *   template <typename real> static sk_class_result<real> at(p, q, d, p_q, k). */
template <typename real>
struct sk_class_result {
    real value, slope_p, slope_q;
};

/* What is found of a row: lse(u/T), what it lies above lse(v/T), A, B and the loss. */
struct sk_pair_loss_row {
    double lse, dl, a, b, loss;
};

/* Where a gradient goes. */
template <typename T>
struct sk_out_row {
    T *at;
    int64_t stride;
};

/* A class in double: what the formula makes of it in `real`, its p and q. */
template <typename real>
struct sk_careful_result {
    sk_class_result<real> of;
    double p, q;
    bool counts;
};
template <typename Formula, typename T>
SK_DEVICE sk_careful_result<sk_real<T>> sk_careful_class(const sk_two_rows<T> &r, int64_t c,
                                                         const sk_side &x, const sk_side &y,
                                                         const sk_real<T> *numbers) {
    typedef sk_real<T> real;
    const double t = r.temperature, u = sk_widen(r.u[c * r.u_stride]),
                 v = sk_widen(r.v[c * r.v_stride]);
    const double p = exp(sk_log_p(u, t, x)), q = exp(sk_log_p(v, t, y));
    const double d = sk_log_ratio_of(u, v, t, t, x, y);
    const real finite = isinf(u) ? (real)kLowest : isinf(v) ? (real)-kLowest : (real)d;
    const real p_q = (real)(fabs(d) < 0.5 ? q * expm1(d) : p - q);
    return {Formula::template at<real>((real)p, (real)q, finite, p_q, numbers), p, q,
            !(isinf(u) && isinf(v))};
}

template <typename T>
SK_DEVICE void sk_sides_within(const sk_two_rows<T> &r, double lse, double dl, sk_side *x,
                               sk_side *y) {
    const sk_stored_row<T> u = {r.u, r.u_stride}, v = {r.v, r.v_stride};
    const double t = r.temperature;
    sk_sides_of(u, v, r.C, t, t, x, y);
    *x = sk_side_within(*x, t, lse, 0, kRounded<sk_real<T>>);
    *y = sk_side_within(*y, t, lse, dl, kRounded<sk_real<T>>);
}

/* A pair of logits, from kLowest up, as in differentiate() of kl.cuh. A y below `agree` is no more
 * than the rounding of a constant between u and v, and counts as 0. */
template <typename real>
SK_DEVICE sk_pair<real> sk_pair_at(const sk_pair_slope<real> &k, real agree, real a, real b) {
    sk_pair<real> x =
        sk_compare(sk_distance(sk_difference(a, b), k.gap) * k.t.inverse,
                   sk_log2_of(a, k.t.log2e, k.log2_u), sk_log2_of(b, k.t.log2e, k.log2_v));
    if (fabs(x.y) < agree) x.y = x.diff = 0;
    return x;
}
template <typename real>
SK_DEVICE real sk_agreement(double dl) {
    return sk_keep((real)(4 * DBL_EPSILON * fabs(dl)));
}

/* A sum of p dphi/dp that stays exact where one class has nearly all of p: see sk_slope_sum in
 * cpu/core/pair_loss.h. One for each thread. */
template <typename real>
struct sk_slope_sum {
    real largest, slope, mass;
    double rest;
};

/* Adds p and its slope; rest is added up in `real` for the length of a step. */
template <typename real>
SK_DEVICE void sk_add_slope(sk_slope_sum<real> *to, real p, real slope, real *rest) {
    if (p == 0) return;
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

/* The same result in all threads of the group. */
template <typename Formula, typename T, int kVec>
SK_DEVICE sk_pair_loss_row sk_pair_loss_of(const sk_two_rows<T> &r, const sk_real<T> *numbers) {
    typedef sk_real<T> real;
    const sk_divergence found = sk_diverge<T, kVec>(r);
    double loss[1] = {0}, total[2] = {0, 0};
    if (sk_is_far_pair<real>(found.lse, found.dl, 0)) {
        sk_side x, y;
        sk_sides_within(r, found.lse, found.dl, &x, &y);
        SK_ROLLED for (int64_t c = sk_lane(); c < r.C; c += sk_group()) {
            const sk_careful_result<real> of = sk_careful_class<Formula>(r, c, x, y, numbers);
            if (!of.counts) continue;
            loss[0] += of.of.value;
            total[0] += of.p == 0 ? 0 : of.p * of.of.slope_p;
            total[1] += of.q == 0 ? 0 : of.q * of.of.slope_q;
        }
        sk_group_reduce(total, sk_add());
    } else {
        const sk_pair_slope<real> k =
            sk_pair_slope_of<real>(found, r.temperature, 0, 0, true, false);
        const real agree = sk_agreement<real>(found.dl);
        const T *const u = sk_keep(r.u), *const v = sk_keep(r.v);
        sk_slope_sum<real> of_p = {}, of_q = {};
        SK_ROLLED for (int64_t base = 0; base < r.C; base += sk_step<T>()) {
            real a[sk_items<T>], b[sk_items<T>], part[3] = {};
            sk_load_logits<T, kVec>(u, r.u_stride, base, r.C, a);
            sk_load_logits<T, kVec>(v, r.v_stride, base, r.C, b);
            SK_UNROLL for (int i = 0; i < sk_items<T>; i++) {
                if (i % kVec == 0 && !sk_any_class<kVec>(base, i, r.C)) break;
                const sk_pair<real> x = sk_pair_at(k, agree, a[i], b[i]);
                const sk_class_result<real> of =
                    Formula::template at<real>(x.p, x.q, x.y, x.diff, numbers);
                const bool nowhere = a[i] <= (real)kLowest && b[i] <= (real)kLowest;
                part[0] += nowhere ? 0 : of.value;
                sk_add_slope(&of_p, x.p, of.slope_p, &part[1]);
                sk_add_slope(&of_q, x.q, of.slope_q, &part[2]);
            }
            loss[0] += part[0];
            of_p.rest += part[1];
            of_q.rest += part[2];
        }
        sk_slope_totals(of_p, of_q, total);
    }
    sk_group_reduce(loss, sk_add());
    return {found.lse, found.dl, total[0], total[1], loss[0]};
}

/* Leaves the gradients of a row: both times the factor. */
template <typename Formula, typename T, int kVec>
SK_DEVICE void sk_differentiate_pair_loss(const sk_two_rows<T> &r, const sk_pair_loss_row &of,
                                          double factor, const sk_real<T> *numbers,
                                          const sk_out_row<T> &to_u, const sk_out_row<T> &to_v) {
    typedef sk_real<T> real;
    if (factor != 0 && sk_is_far_pair<real>(of.lse, of.dl, factor)) {
        sk_side x, y;
        sk_sides_within(r, of.lse, of.dl, &x, &y);
        SK_ROLLED for (int64_t c = sk_lane(); c < r.C; c += sk_group()) {
            const sk_careful_result<real> k = sk_careful_class<Formula>(r, c, x, y, numbers);
            const double u = k.p == 0 ? 0 : k.p * (k.of.slope_p - of.a);
            const double v = k.q == 0 ? 0 : k.q * (k.of.slope_q - of.b);
            sk_narrow((real)(factor * u), to_u.at + c * to_u.stride);
            sk_narrow((real)(factor * v), to_v.at + c * to_v.stride);
        }
        return;
    }
    const sk_pair_slope<real> k =
        sk_pair_slope_of<real>({of.lse, of.dl, 0, 0, false}, r.temperature, 0, 0, true, false);
    const sk_split<real> mean_p = sk_keep_split<real>(of.a), mean_q = sk_keep_split<real>(of.b);
    const real f = sk_keep((real)factor), agree = sk_agreement<real>(of.dl);
    const T *const u = sk_keep(r.u), *const v = sk_keep(r.v);
    SK_ROLLED for (int64_t base = 0; base < r.C; base += sk_step<T>()) {
        real a[sk_items<T>], b[sk_items<T>];
        sk_load_logits<T, kVec>(u, r.u_stride, base, r.C, a);
        sk_load_logits<T, kVec>(v, r.v_stride, base, r.C, b);
        SK_UNROLL for (int i = 0; i < sk_items<T>; i++) {
            if (i % kVec == 0 && !sk_any_class<kVec>(base, i, r.C)) break;
            const sk_pair<real> x = sk_pair_at(k, agree, a[i], b[i]);
            const sk_class_result<real> of_class =
                Formula::template at<real>(x.p, x.q, x.y, x.diff, numbers);
            const real by_p = (of_class.slope_p - mean_p.high) - mean_p.low;
            const real by_q = (of_class.slope_q - mean_q.high) - mean_q.low;
            a[i] = f != 0 && x.p != 0 ? f * x.p * by_p : 0;
            b[i] = f != 0 && x.q != 0 ? f * x.q * by_q : 0;
        }
        sk_store<T, kVec>(to_u.at, to_u.stride, base, r.C, a);
        sk_store<T, kVec>(to_v.at, to_v.stride, base, r.C, b);
    }
}

/* ---- the kernels ---- */

template <typename T, typename Params>
SK_DEVICE sk_two_rows<T> sk_rows_at(const Params &p, int64_t n, int64_t s) {
    return {sk_row<T>(p.u, n, s), sk_row<T>(p.v, n, s), p.u.stride[1],
            p.v.stride[1],        SK_DIM(&p, C),        p.temperature};
}

/* Leaves rows, saved, loss and denominator. */
template <typename Formula, typename T, int kVec, typename Params>
SK_DEVICE void sk_pair_loss_forward(const Params &p, const sk_real<T> *numbers) {
    sk_row_forward<T, 4>(p, [&](int64_t n, int64_t s, double w, double(&saved)[4]) {
        const sk_pair_loss_row x =
            sk_pair_loss_of<Formula, T, kVec>(sk_rows_at<T>(p, n, s), numbers);
        saved[0] = x.lse;
        saved[1] = x.dl;
        saved[2] = x.a;
        saved[3] = x.b;
        return w * x.loss;
    });
}

/* Leaves grad_u and grad_v. */
template <typename Formula, typename T, int kVec, typename Params>
SK_DEVICE void sk_pair_loss_backward(const Params &p, const sk_real<T> *numbers) {
    sk_each_row(p, [&](int64_t n, int64_t s) {
        const sk_incoming<sk_real<T>, Params> in(p, n, s);
        const double per_row = in.grad * in.weight / (in.denominator * p.temperature);
        const double factor = in.weight != 0 ? per_row : 0;
        const sk_pair_loss_row x = {in.saved(0), in.saved(1), in.saved(2), in.saved(3), 0};
        const sk_out_row<T> to_u = {sk_keep(sk_row<T>(p.grad_u, n, s)), p.grad_u.stride[1]};
        const sk_out_row<T> to_v = {sk_keep(sk_row<T>(p.grad_v, n, s)), p.grad_v.stride[1]};
        sk_differentiate_pair_loss<Formula, T, kVec>(sk_rows_at<T>(p, n, s), x, factor, numbers,
                                                     to_u, to_v);
    });
}

/* Defines kernels and launches of a loss with the inputs u, v and weight and a temperature, by its
 * formula: as SK_PAIR_LOSS of cpu/core/pair_loss.h. */
#define SK_PAIR_LOSS(op)                                                                          \
    struct op##_formula {                                                                         \
        template <typename real>                                                                  \
        static __device__ sk_class_result<real> at(real p, real q, real d, real p_q,              \
                                                   const real *k) {                               \
            return {op##_value(p, q, d, p_q, k), op##_slope_p(p, q, d, p_q, k),                   \
                    op##_slope_q(p, q, d, p_q, k)};                                               \
        }                                                                                         \
    };                                                                                            \
    template <typename T, int kVec>                                                               \
    __global__ void __launch_bounds__(SK_BLOCK, sk_resident<T, kVec>)                             \
        op##_kernel(const struct op##_params p) {                                                 \
        typedef sk_real<T> real;                                                                  \
        const real k[] = op##_NUMBERS(&p);                                                        \
        sk_pair_loss_forward<op##_formula, T, kVec>(p, k);                                        \
    }                                                                                             \
    template <typename T, int kVec>                                                               \
    __global__ void __launch_bounds__(SK_BLOCK, sk_resident<T, kVec>)                             \
        op##_backward_kernel(const struct op##_backward_params p) {                               \
        typedef sk_real<T> real;                                                                  \
        const real k[] = op##_NUMBERS(&p);                                                        \
        sk_pair_loss_backward<op##_formula, T, kVec>(p, k);                                       \
    }                                                                                             \
    extern "C" int sk_cuda_##op(const struct op##_params *p, void *stream) {                      \
        return sk_launch_rows(SK_INSTANCES(op##_kernel), SK_ROWS(p), {&p->u, &p->v}, stream, *p); \
    }                                                                                             \
    extern "C" int sk_cuda_##op##_backward(const struct op##_backward_params *p, void *stream) {  \
        return sk_launch_rows(SK_INSTANCES(op##_backward_kernel), SK_ROWS(p),                     \
                              {&p->u, &p->v, &p->grad_u, &p->grad_v}, stream, *p);                \
    }
