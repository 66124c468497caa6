/* Both KL divergences between two rows of logits, from one reading of the rows.
 *
 * Against anchors hu, hv (any two logits near the rows' maxima) a pair of logits a, b has
 *     p = exp((a - hu)/T)   q = exp((b - hv)/T)   y = log(p/q)
 * and five terms: p, q, p - q, p*g(-y), q*g(y), where g(x) = e^x - 1 - x >= 0. From their sums
 * P, Q, D, Gp, Gq over the row follow
 *     lse(u/T) = hu/T + log P           KL(p||q) = Gp/P - h(-D/P)
 *     dl = (hu - hv)/T + log1p(D/Q)     KL(q||p) = Gq/Q - h(D/Q)
 * where h(r) = r - log(1 + r) >= 0. Both terms of a KL are of second order, so rows close to each
 * other keep their digits. Where the first term is much larger than the KL (y = 0 lies far from the
 * middle of the row's y) or the KL is very large, the row is read once more, class by class and in
 * double, with y = log p - log q: then the sums are the two KL themselves, whatever the logits. */
#pragma once
#include "core/row.cuh"

/* -inf is computed with as -2^110 (1e33): 0 * y stays 0. */
constexpr double kLowest = -0x1p110;

/* Anchors of u and v that are more than 16 T apart: then a - b may be near their distance, so that
 * y is small, though a is thousands of times b; and kShort leaves out a part of y that counts. */
constexpr double kFar = 16;

/* ---- one pair of logits ---- */

template <typename real>
struct sk_scale {
    real inverse; /* 1/T */
    real log2e;   /* log2(e)/T */
};

template <typename real>
SK_DEVICE sk_scale<real> sk_scale_of(double temperature) {
    return {sk_keep((real)(1 / temperature)), sk_keep((real)(1.4426950408889634 / temperature))};
}

/* A number as the sum of two. */
template <typename real>
struct sk_split {
    real high, low;
};

template <typename real>
SK_DEVICE sk_split<real> sk_split_of(double x) {
    const real high = (real)x;
    return {high, (real)(x - high)};
}

/* a - b, exactly (Knuth). */
template <typename real>
SK_DEVICE sk_split<real> sk_difference(real a, real b) {
    const real high = a - b, minus_b = high - a;
    return {high, (a - (high - minus_b)) - (b + minus_b)};
}

template <typename real>
SK_DEVICE real sk_distance(const sk_split<real> &x, const sk_split<real> &y) {
    return (x.high - y.high) + (x.low - y.low);
}

/* a - b. kShort: its low part is left out, which of numbers of a half type is 0 but where one is
 * thousands of times the other. */
template <bool kShort, typename real>
SK_DEVICE sk_split<real> sk_apart(real a, real b) {
    if constexpr (kShort) return {a - b, 0};
    return sk_difference(a, b);
}

/* What logits are compared against; gap = u - v. */
template <typename real>
struct sk_anchors {
    real u, v;
    sk_split<real> gap;
};

template <typename real>
SK_DEVICE sk_anchors<real> sk_anchors_at(real u, real v) {
    return {u, v, sk_difference(u, v)};
}

template <typename real>
struct sk_pair {
    real p, q, y;
    real diff, first; /* p - q, q*y */
    real gp, gq;      /* p*g(-y), q*g(y) */
};

/* A pair of logits from y and the logarithms of p and q to base 2. Near y = 0 no term is a
 * difference of larger ones: gp + gq = diff * y. */
template <typename real>
SK_DEVICE sk_pair<real> sk_compare(real y, real log2_p, real log2_q) {
    sk_pair<real> x;
    x.y = y;
    x.p = sk_exp2(log2_p);
    x.q = sk_exp2(log2_q);
    x.first = x.q * y;
    const bool near = fabs(y) < (real)0.75;
    const real second = x.first * y * sk_curvature(y), far_diff = x.p - x.q;
    x.diff = near ? x.first + second : far_diff;
    x.gq = near ? second : far_diff - x.first;
    x.gp = near ? x.diff * y - second : x.p * y - far_diff;
    return x;
}

/* y is what a - b lies above h.gap, not what a - h.u lies above b - h.v: of rows that nearly agree
 * the small logits differ, and those lose digits against an anchor. kShort as in apart(). */
template <bool kShort = false, typename real>
SK_DEVICE sk_pair<real> sk_compare(real a, real b, const sk_anchors<real> &h,
                                   const sk_scale<real> &t) {
    const real y = sk_distance(sk_apart<kShort>(a, b), h.gap) * t.inverse;
    return sk_compare(y, (a - h.u) * t.log2e, (b - h.v) * t.log2e);
}

/* ---- sums over a row ---- */

enum { SK_P, SK_Q, SK_D, SK_GP, SK_GQ, SK_SUMS };

template <typename real>
SK_DEVICE void sk_add_terms(real (&sum)[SK_SUMS], const sk_pair<real> &x) {
    sum[SK_P] += x.p;
    sum[SK_Q] += x.q;
    sum[SK_D] += x.diff;
    sum[SK_GP] += x.gp;
    sum[SK_GQ] += x.gq;
}

/* Rewrites sums for new anchors; x compares the old ones against the new. */
template <typename real>
SK_DEVICE void sk_move_sums(double (&sum)[SK_SUMS], const sk_pair<real> &x) {
    sum[SK_GP] = x.p * sum[SK_GP] + x.diff * sum[SK_D] + x.gp * sum[SK_P];
    sum[SK_GQ] = x.q * sum[SK_GQ] + x.diff * sum[SK_D] + x.gq * sum[SK_Q];
    sum[SK_D] = x.p * sum[SK_D] + x.diff * sum[SK_Q];
    sum[SK_P] *= x.p;
    sum[SK_Q] *= x.q;
}

template <typename T>
struct sk_two_rows {
    const T *u, *v;
    int64_t u_stride, v_stride, C;
    double temperature;
};

/* A step of logits, from kLowest up; returns the largest. */
template <typename T, int kVec, typename Stored>
SK_DEVICE sk_real<T> sk_load_logits(const Stored *row, int64_t stride, int64_t base, int64_t C,
                                    sk_real<T> (&to)[sk_items<T>]) {
    const sk_real<T> lowest = (sk_real<T>)kLowest;
    return sk_load_above<T, kVec>(row, stride, base, C, lowest, lowest, to);
}

/* Leaves the sums of the row and, in `top`, their anchors, the largest logits, and how far apart
 * anchors were. Until the end each thread has anchors of its own, which are raised to its maxima,
 * but not by less than 2 T: moving the sums costs a hundred instructions, and weights of e^2 do no
 * harm. The float sums of a step are added up in double, for a thread may take thousands of steps.
 * Of gp + gq, which is a product, a step takes gq: enough digits of gp stay unless it is much
 * smaller, and then the row is poor. */
template <typename T, int kVec>
SK_DEVICE void sk_visit(const sk_two_rows<T> &r, sk_real<T> (&top)[3], double (&sum)[SK_SUMS]) {
    typedef sk_real<T> real;
    const sk_scale<real> t = sk_scale_of<real>(r.temperature);
    const real lowest = (real)kLowest, slack = (real)(2 * r.temperature);
    const T *const u = sk_keep(r.u), *const v = sk_keep(r.v);
    real hu = lowest, hv = lowest;
    for (int k = 0; k < SK_SUMS; k++) sum[k] = 0;
    SK_ROLLED for (int64_t base = 0; base < r.C; base += sk_step<T>()) {
        real a[sk_items<T>], b[sk_items<T>];
        const real top_u = sk_load_logits<T, kVec>(u, r.u_stride, base, r.C, a);
        const real top_v = sk_load_logits<T, kVec>(v, r.v_stride, base, r.C, b);
        if (top_u > hu + slack || top_v > hv + slack) {
            const real old_u = hu, old_v = hv;
            hu = sk_max(hu, top_u);
            hv = sk_max(hv, top_v);
            if (base > 0) sk_move_sums(sum, sk_compare(old_u, old_v, sk_anchors_at(hu, hv), t));
        }
        const sk_anchors<real> h = sk_anchors_at(hu, hv);
        real part[SK_SUMS] = {};
        SK_UNROLL for (int i = 0; i < sk_items<T>; i++) {
            if (i % kVec == 0 && !sk_any_class<kVec>(base, i, r.C)) break;
            sk_pair<real> x = sk_compare<sizeof(T) == 2>(a[i], b[i], h, t);
            x.gp = x.diff * x.y;
            sk_add_terms(part, x);
        }
        part[SK_GP] -= part[SK_GQ];
        for (int k = 0; k < SK_SUMS; k++) sum[k] += part[k];
    }
    top[0] = hu;
    top[1] = hv;
    top[2] = fabs(hu - hv);
    if (sk_group() == 1) return;
    sk_group_reduce(top, sk_larger());
    sk_move_sums(sum, sk_compare(hu, hv, sk_anchors_at(top[0], top[1]), t));
    sk_group_reduce(sum, sk_add());
}

/* ---- from sums to divergences ---- */

struct sk_divergence {
    double lse, dl, kl_pq, kl_qp;
    bool poor; /* a KL is a small difference of large terms, or large itself: it lost digits */
};

/* A direction that does not count may be infinite. */
SK_DEVICE double sk_weighted_kl(const sk_divergence &x, double pq, double qp) {
    return (pq != 0 ? pq * x.kl_pq : 0) + (qp != 0 ? qp * x.kl_qp : 0);
}

/* A row with a side of nothing but -inf: what the contracts say of it. */
SK_DEVICE sk_divergence sk_undefined(double lse_u, double lse_v) {
    return {lse_u, lse_u == -INFINITY ? lse_v : lse_u - lse_v, NAN, NAN, false};
}

/* poor also where anchors were `far` apart. */
SK_DEVICE sk_divergence sk_conclude(const double (&sum)[SK_SUMS], double hu, double hv,
                                    double temperature, bool far) {
    if (hu <= kLowest || hv <= kLowest) return {0, 0, 0, 0, true}; /* -inf, or finite still */
    const double gp = sum[SK_GP] / sum[SK_P], gq = sum[SK_GQ] / sum[SK_Q],
                 r = sum[SK_D] / sum[SK_Q];
    const double log_ratio = fabs(r) < 0.5 ? log1p(r) : log(sum[SK_P] / sum[SK_Q]);
    sk_divergence x;
    x.lse = hu / temperature + log(sum[SK_P]);
    x.dl = (hu - hv) / temperature + log_ratio;
    x.kl_pq = gp - sk_log_gap(-sum[SK_D] / sum[SK_P], -log_ratio);
    x.kl_qp = gq - sk_log_gap(r, log_ratio);
    /* Sums of floats are good to 1e-7 of their terms, so to 1.6e-6 of a KL that is a 16th of its
     * first term; GP is good to 1e-7 of GP + GQ, so that GQ is bounded by GP and by the KL: what is
     * left of that was 5.3e-6 in the worst of rows with a gap of 17. The gradient's d - KL is
     * rounded to 2^-24 of the KL, at most 2e-6 up to 32. Rows must be good to 3e-6, gradients to
     * 1e-5 of their largest. */
    x.poor = far || !(gp <= 16 * x.kl_pq && gq <= 16 * x.kl_qp && x.kl_pq <= 32 && x.kl_qp <= 32 &&
                      sum[SK_GQ] <= 8 * sum[SK_GP] && sum[SK_GQ] <= 16 * x.kl_pq * sum[SK_P]);
    return x;
}

/* ---- a row in double, class by class: whatever its logits are ---- */

/* Both KL, with 0 log 0 = 0. */
template <typename T>
SK_DEVICE sk_divergence sk_careful(const sk_two_rows<T> &r) {
    const sk_stored_row<T> u = {r.u, r.u_stride}, v = {r.v, r.v_stride};
    const double t = r.temperature;
    sk_side x, y;
    sk_sides_of(u, v, r.C, t, t, &x, &y);
    if (!isfinite(x.log_sum) || !isfinite(y.log_sum))
        return sk_undefined(sk_lse_of(x, t), sk_lse_of(y, t));
    double kl[2] = {0, 0};
    SK_ROLLED for (int64_t c = sk_lane(); c < r.C; c += sk_group()) {
        const double a = u(c), b = v(c);
        if (isinf(a) && isinf(b)) continue;
        const double p = exp(sk_log_p(a, t, x)), q = exp(sk_log_p(b, t, y));
        const double d = sk_log_ratio_of(a, b, t, t, x, y), diff = p - q;
        const bool near = fabs(d) < 0.5; /* nothing cancels */
        kl[0] += isinf(a)   ? q
                 : isinf(b) ? (double)INFINITY
                 : near     ? p * d * d * sk_curvature(-d)
                            : p * d - diff;
        kl[1] += isinf(b)   ? p
                 : isinf(a) ? (double)INFINITY
                 : near     ? q * d * d * sk_curvature(d)
                            : diff - q * d;
    }
    sk_group_reduce(kl, sk_add());
    return {sk_lse_of(x, t), (x.top - y.top) / t + (x.log_sum - y.log_sum), kl[0], kl[1], false};
}

/* The same result in all threads of the group: lse to 1e-7 and the rounding of a double, dl to 1e-7
 * of sum |p - q|, both KL to 3e-6 of themselves; of doubles, and of rows that were poor, all to
 * 1e-12. An lse is no exact one of its row: gradients take the p and q that follow from it. */
template <typename T, int kVec>
SK_DEVICE sk_divergence sk_diverge(const sk_two_rows<T> &r) {
    sk_real<T> top[3];
    double sum[SK_SUMS];
    sk_visit<T, kVec>(r, top, sum);
    const bool far = sizeof(T) == 2 && top[2] > kFar * r.temperature;
    const sk_divergence x = sk_conclude(sum, top[0], top[1], r.temperature, far);
    return x.poor ? sk_careful<T>(r) : x;
}

/* ---- gradients ---- */

/* What the gradients of a row need, besides its logits. */
template <typename real>
struct sk_pair_slope {
    bool zero; /* weight 0: no gradient, whatever the logits hold */
    sk_scale<real> t;
    real f, r;                     /* factors of p - q in dl/dv and dl/du */
    real own_f, own_r;             /* factors of p * T (d - KL(p||q)) and q * T (d + KL(q||p)) */
    sk_split<real> log2_u, log2_v; /* lse of u and of v, to base 2 */
    sk_split<real> gap;            /* T dl: a - b where d = 0 */
    sk_split<real> mid_f,
        mid_r; /* a - b where d = KL(p||q), d = -KL(q||p): a KL may be as large as d */
};

/* A number as the sum of two that is kept in registers: it comes from double, and a loop needs it.
 */
template <typename real>
SK_DEVICE sk_split<real> sk_keep_split(double x) {
    const sk_split<real> both = sk_split_of<real>(x);
    return {sk_keep(both.high), sk_keep(both.low)};
}

/* f and r are the factors of KL(p||q) and of KL(q||p). */
template <typename real>
SK_DEVICE sk_pair_slope<real> sk_pair_slope_of(const sk_divergence &of, double T, double f,
                                               double r, bool detach, bool zero) {
    const double own_f = detach ? 0 : f, own_r = detach ? 0 : r;
    /* a KL that does not count may be infinite */
    const double kl_f = own_f != 0 ? of.kl_pq : 0, kl_r = own_r != 0 ? of.kl_qp : 0;
    sk_pair_slope<real> x;
    x.zero = zero;
    x.t = sk_scale_of<real>(T);
    x.f = sk_keep((real)(T * f));
    x.r = sk_keep((real)(T * r));
    x.own_f = sk_keep((real)own_f);
    x.own_r = sk_keep((real)own_r);
    x.log2_u = sk_keep_split<real>(T * of.lse * x.t.log2e);
    x.log2_v = sk_keep_split<real>(T * (of.lse - of.dl) * x.t.log2e);
    x.gap = sk_keep_split<real>(T * of.dl);
    x.mid_f = sk_keep_split<real>(T * (of.dl + kl_f));
    x.mid_r = sk_keep_split<real>(T * (of.dl - kl_r));
    return x;
}

/* log2 of e^(a/T) over e^lse; `lse` is to base 2. The product is exact until the large part of lse
 * is gone. */
template <typename real>
SK_DEVICE real sk_log2_of(real a, real log2e, const sk_split<real> &lse) {
    return fma(a, log2e, -lse.high) - lse.low;
}

/* Replaces a pair of logits, from kLowest up, by its gradients. */
template <typename real>
SK_DEVICE void sk_differentiate(const sk_pair_slope<real> &k, real *a, real *b) {
    const sk_split<real> d = sk_difference(*a, *b);
    const sk_pair<real> x =
        sk_compare(sk_distance(d, k.gap) * k.t.inverse, sk_log2_of(*a, k.t.log2e, k.log2_u),
                   sk_log2_of(*b, k.t.log2e, k.log2_v));
    *a = k.own_f * x.p * sk_distance(d, k.mid_f) + k.r * x.diff;
    *b = -k.own_r * x.q * sk_distance(d, k.mid_r) - k.f * x.diff;
}

/* The same of a step. */
template <typename T, int kVec>
SK_DEVICE void sk_differentiate(const sk_pair_slope<sk_real<T>> &k, int64_t base, int64_t C,
                                sk_real<T> (&a)[sk_items<T>], sk_real<T> (&b)[sk_items<T>]) {
    SK_UNROLL for (int i = 0; i < sk_items<T>; i++) {
        if (i % kVec == 0 && !sk_any_class<kVec>(base, i, C)) break;
        sk_differentiate(k, &a[i], &b[i]);
    }
    if (!k.zero) return;
    SK_UNROLL for (int i = 0; i < sk_items<T>; i++) a[i] = b[i] = 0;
}

/* Whether the gradients of a row are found class by class. */
template <typename real>
SK_DEVICE bool sk_is_far(const sk_divergence &x, double f, double r) {
    const double limit = kFarLse<real>;
    return sk_is_beyond(x.lse, limit) || sk_is_beyond(x.dl, limit) ||
           sk_is_beyond(x.kl_pq, limit) || sk_is_beyond(x.kl_qp, limit) ||
           sk_is_beyond(f, kFarFactor<real>) || sk_is_beyond(r, kFarFactor<real>);
}

/* Leaves them; they may lie over the logits. */
template <typename T>
SK_DEVICE void sk_differentiate_far(const sk_two_rows<T> &r, const sk_divergence &of, double f,
                                    double rev, bool detach, T *grad_u, int64_t u_stride, T *grad_v,
                                    int64_t v_stride) {
    typedef sk_real<T> real;
    const sk_stored_row<T> u = {r.u, r.u_stride}, v = {r.v, r.v_stride};
    const double t = r.temperature;
    sk_side x, y;
    sk_sides_of(u, v, r.C, t, t, &x, &y);
    x = sk_side_within(x, t, of.lse, 0, kRounded<real>);
    y = sk_side_within(y, t, of.lse, of.dl, kRounded<real>);
    SK_ROLLED for (int64_t c = sk_lane(); c < r.C; c += sk_group()) {
        const double a = u(c), b = v(c), p = exp(sk_log_p(a, t, x)), q = exp(sk_log_p(b, t, y));
        const double d = sk_log_ratio_of(a, b, t, t, x, y), diff = p - q;
        double to_u = rev != 0 ? rev * diff : 0, to_v = f != 0 ? -f * diff : 0;
        if (!detach && f != 0) to_u += p == 0 && isinf(a) ? 0 : f * p * (d - of.kl_pq);
        if (!detach && rev != 0) to_v -= q == 0 && isinf(b) ? 0 : rev * q * (d + of.kl_qp);
        if (grad_u) sk_narrow((real)(t * to_u), grad_u + c * u_stride);
        if (grad_v) sk_narrow((real)(t * to_v), grad_v + c * v_stride);
    }
}
