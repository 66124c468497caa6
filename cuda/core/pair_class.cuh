/* The classes of two rows of logits, as a formula of them takes them: see cpu/core/pair_class.h. */
#pragma once
#include "core/row.cuh"

#include <float.h>

#include "formula/pair_class.h"

template <typename T>
struct sk_two_rows_of {
    const T *u, *v;
    int64_t u_stride, v_stride, C;
    double T_u, T_v;
};

/* -inf is computed with as -2^110: 0 * y stays 0. */
constexpr double kExcluded = -0x1p110;

/* A number as the sum of two that is kept in registers: it comes from double, and a loop needs it.
 */
template <typename real>
struct sk_high_low {
    real high, low;
};
template <typename real>
SK_DEVICE sk_high_low<real> sk_high_low_of(double x) {
    const real high = (real)x;
    return {sk_keep(high), sk_keep((real)(x - high))};
}

/* What the classes of a row need of its sides: 1/T, lse to base 2 and log2(e)/T of u and v; whether
 * T = T'; dl, then times T; and a d below which is no more than the rounding of a constant between
 * u and v, and counts as 0. */
template <typename real>
struct sk_pair_sides {
    sk_high_low<real> per_T, per_T_v, log2_u, log2_v, dl;
    real log2e, log2e_v, agree;
    bool same;
};

template <typename T>
SK_DEVICE sk_pair_sides<sk_real<T>> sk_sides_at(const sk_two_rows_of<T> &r, double lse, double dl) {
    typedef sk_real<T> real;
    const real log2e = sk_keep((real)(1.4426950408889634 / r.T_u)),
               log2e_v = sk_keep((real)(1.4426950408889634 / r.T_v));
    const bool same = r.T_u == r.T_v;
    return {
        sk_high_low_of<real>(1 / r.T_u),
        sk_high_low_of<real>(1 / r.T_v),
        sk_high_low_of<real>(lse * r.T_u * log2e), /* so that its rounding is no more than that */
        sk_high_low_of<real>((lse - dl) * r.T_v * log2e_v), /* of a difference */
        sk_high_low_of<real>(same ? dl * r.T_u : dl),
        log2e,
        log2e_v,
        sk_keep((real)(4 * DBL_EPSILON * fabs(dl))),
        same};
}

/* a/T - b/T' - dl to the last digits. Where T = T' the logits are subtracted first, exactly
 * (Knuth), so that a constant between them is the same in all classes, whatever T; else the
 * products and their difference are exact but for the square of an epsilon. */
template <typename real>
SK_DEVICE real sk_log_ratio_at(const sk_pair_sides<real> &k, real a, real b) {
    if (k.same) {
        const real high = a - b, minus_b = high - a;
        const real low = (a - (high - minus_b)) - (b + minus_b);
        return ((high - k.dl.high) + (low - k.dl.low)) * k.per_T.high;
    }
    const real u = a * k.per_T.high, v = b * k.per_T_v.high;
    const real u_low = fma(a, k.per_T.high, -u) + a * k.per_T.low;
    const real v_low = fma(b, k.per_T_v.high, -v) + b * k.per_T_v.low;
    const real high = u - v, minus_v = high - u; /* u - v, exactly (Knuth) */
    const real low = ((u - (high - minus_v)) - (v + minus_v)) + (u_low - v_low);
    return (high - k.dl.high) + (low - k.dl.low);
}

/* From p, q and d; the smaller of p and q is found from the larger. */
template <typename real>
SK_DEVICE sk_pair_class<real> sk_class_from(real d, real larger) {
    const real size = d < 0 ? -d : d;
    const bool near = size < (real)0.75;
    const real ratio = sk_exp2(-size * (real)1.4426950408889634), smaller = larger * ratio;
    const real second = size * size * sk_curvature(-size), gap = near ? size - second : 1 - ratio;
    return {d < 0 ? smaller : larger,
            d < 0 ? larger : smaller,
            d,
            size,
            larger,
            ratio,
            gap,
            near                   ? second
            : size >= (real)0x1p90 ? (real)INFINITY
                                   : size - gap};
}

/* A class with the logits a and b, from kExcluded up. */
template <typename real>
SK_DEVICE sk_pair_class<real> sk_class_at(const sk_pair_sides<real> &k, real a, real b) {
    const real found = sk_log_ratio_at(k, a, b), size = found < 0 ? -found : found;
    const bool nowhere = a <= (real)kExcluded && b <= (real)kExcluded;
    const real d = nowhere || size < k.agree ? 0 : found;
    const bool less = d < 0;
    const sk_high_low<real> lse = less ? k.log2_v : k.log2_u;
    const real z = fma(less ? b : a, less ? k.log2e_v : k.log2e, -lse.high) - lse.low;
    return sk_class_from(d, sk_exp2(z));
}

/* A class in double; what the formula makes of it is in `real`. */
template <typename T>
SK_DEVICE sk_pair_class<double> sk_careful_class(const sk_two_rows_of<T> &r, int64_t c,
                                                 const sk_side &x, const sk_side &y) {
    const double u = sk_widen(r.u[c * r.u_stride]), v = sk_widen(r.v[c * r.v_stride]);
    const double p = exp(sk_log_p(u, r.T_u, x)), q = exp(sk_log_p(v, r.T_v, y));
    const bool nowhere = isinf(u) && isinf(v);
    const double d = nowhere ? 0 : sk_log_ratio_of(u, v, r.T_u, r.T_v, x, y);
    const double size = fabs(d), gap = -expm1(-size);
    const double rest = size < 0.5 ? size * size * sk_curvature(-size) : size - gap;
    return {p, q, d, size, nowhere ? 0 : fmax(p, q), exp(-size), gap, rest};
}

template <typename T>
SK_DEVICE void sk_sides_of_rows(const sk_two_rows_of<T> &r, sk_side *x, sk_side *y) {
    const sk_stored_row<T> u = {r.u, r.u_stride}, v = {r.v, r.v_stride};
    sk_sides_of(u, v, r.C, r.T_u, r.T_v, x, y);
}
