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
 * middle of the row's y) or the KL is very large, the row is read once more, in double and with
 * T*lse as anchors: then y = log p - log q, D = 0, and the sums are the two KL themselves. */
#pragma once
#include <type_traits>

#include "core/rows.cuh"

/* -inf is computed with as -2^110 (1e33): 0 * y stays 0, and a KL past 1e13 can only come from such
 * a class. */
constexpr double kLowest = -0x1p110, kInfinite = 1e13;

/* ---- one pair of logits ---- */

template <typename real>
struct scale {
    real inverse; /* 1/T */
    real log2e;   /* log2(e)/T */
};

template <typename real>
SK_DEVICE scale<real> scale_of(double temperature) {
    return {sk_keep((real)(1 / temperature)), sk_keep((real)(1.4426950408889634 / temperature))};
}

/* A number as the sum of two. */
template <typename real>
struct two {
    real high, low;
};

template <typename real>
SK_DEVICE two<real> split(double x) {
    const real high = (real)x;
    return {high, (real)(x - high)};
}

/* a - b, exactly (Knuth). */
template <typename real>
SK_DEVICE two<real> difference(real a, real b) {
    const real high = a - b, minus_b = high - a;
    return {high, (a - (high - minus_b)) - (b + minus_b)};
}

template <typename real>
SK_DEVICE real distance(const two<real> &x, const two<real> &y) {
    return (x.high - y.high) + (x.low - y.low);
}

/* What logits are compared against; gap = u - v. */
template <typename real>
struct anchors {
    two<real> u, v, gap;
};

template <typename real>
SK_DEVICE anchors<real> anchors_at(real u, real v) {
    return {{u, 0}, {v, 0}, difference(u, v)};
}

template <typename real>
struct pair {
    two<real> apart; /* a - b */
    real p, q, y;
    real diff, gp, gq; /* p - q, p*g(-y), q*g(y) */
};

/* e^y - 1 - y for |y| < 0.75, by its series; the terms left out are below 8e-8 (double: 1e-17) of
 * it. */
template <typename real>
SK_DEVICE real curvature(real y) {
    // clang-format off
    constexpr double inverse_factorial[] = {
        1. / 2,          1. / 6,           1. / 24,           1. / 120,
        1. / 720,        1. / 5040,        1. / 40320,        1. / 362880,
        1. / 3628800,    1. / 39916800,    1. / 479001600,    1. / 6227020800,
        1. / 87178291200, 1. / 1307674368000, 1. / 20922789888000, 1. / 355687428096000};
    // clang-format on
    constexpr int terms = sizeof(real) == 4 ? 8 : 16;
    real g = (real)inverse_factorial[terms - 1];
    SK_UNROLL for (int k = terms - 2; k >= 0; k--) g = g * y + (real)inverse_factorial[k];
    return g * y * y;
}

/* A pair of logits whose y is known; from_u and from_v are what they lie above the anchors. Near
 * y = 0 no term is a difference of larger ones: gp + gq = diff * y. */
template <typename real>
SK_DEVICE pair<real> compare(real y, real from_u, real from_v, const scale<real> &t,
                             const scale<real> &of_v) {
    pair<real> x;
    x.y = y;
    x.p = sk_exp2(from_u * t.log2e);
    x.q = sk_exp2(from_v * of_v.log2e);
    const bool near = fabs(y) < (real)0.75;
    const real first = x.q * y, second = x.q * curvature(y), apart = x.p - x.q;
    x.diff = near ? first + second : apart;
    x.gq = near ? second : apart - first;
    x.gp = near ? x.diff * y - second : x.p * y - apart;
    return x;
}

/* kShort: a - h.u, b - h.v and a - b are exact as they are. */
template <bool kShort = false, typename real>
SK_DEVICE pair<real> compare(real a, real b, const anchors<real> &h, const scale<real> &t) {
    const real from_u = (a - h.u.high) - h.u.low, from_v = (b - h.v.high) - h.v.low;
    const two<real> apart = difference(a, b);
    const real y = (kShort ? from_u - from_v : distance(apart, h.gap)) * t.inverse;
    pair<real> x = compare(y, from_u, from_v, t, t);
    x.apart = apart;
    return x;
}

/* ---- sums over a row ---- */

enum { P, Q, D, GP, GQ, SUMS };

template <typename real>
SK_DEVICE void add(real (&sum)[SUMS], const pair<real> &x) {
    sum[P] += x.p;
    sum[Q] += x.q;
    sum[D] += x.diff;
    sum[GP] += x.gp;
    sum[GQ] += x.gq;
}

/* Rewrites sums for new anchors; x compares the old ones against the new. */
template <typename real>
SK_DEVICE void move(double (&sum)[SUMS], const pair<real> &x) {
    sum[GP] = x.p * sum[GP] + x.diff * sum[D] + x.gp * sum[P];
    sum[GQ] = x.q * sum[GQ] + x.diff * sum[D] + x.gq * sum[Q];
    sum[D] = x.p * sum[D] + x.diff * sum[Q];
    sum[P] *= x.p;
    sum[Q] *= x.q;
}

template <typename T>
struct rows {
    const T *u, *v;
    int64_t u_stride, v_stride, C;
    double temperature;
};

/* Leaves the sums of the row and, in `top`, their anchors: the largest logits. Until the end each
 * thread has anchors of its own, which are raised to its maxima, but not by less than 2 T: moving
 * the sums costs a hundred instructions, and weights of e^2 do no harm. The float sums of a step
 * are added up in double, for a thread may take thousands of steps. */
template <typename T, int kGroup, int kVec>
SK_DEVICE void visit(const rows<T> &r, sk_real<T> (&top)[2], double (&sum)[SUMS]) {
    typedef sk_real<T> real;
    /* bfloat16 logits and maxima have few enough digits */
    constexpr bool is_short = std::is_same<T, __nv_bfloat16>::value;
    const scale<real> t = scale_of<real>(r.temperature);
    const real lowest = (real)kLowest, slack = (real)(2 * r.temperature);
    const T *const u = sk_keep(r.u), *const v = sk_keep(r.v);
    real hu = lowest, hv = lowest;
    for (int k = 0; k < SUMS; k++) sum[k] = 0;
    SK_ROLLED for (int64_t base = 0; base < r.C; base += kGroup * sk_items<T>) {
        real a[sk_items<T>], b[sk_items<T>], top_u = lowest, top_v = lowest;
        sk_load<T, kGroup, kVec>(u, r.u_stride, base, r.C, lowest, a);
        sk_load<T, kGroup, kVec>(v, r.v_stride, base, r.C, lowest, b);
        SK_UNROLL for (int i = 0; i < sk_items<T>; i++) {
            top_u = sk_max(top_u, a[i] = sk_at_least(a[i], lowest));
            top_v = sk_max(top_v, b[i] = sk_at_least(b[i], lowest));
        }
        if (top_u > hu + slack || top_v > hv + slack) {
            const real old_u = hu, old_v = hv;
            hu = sk_max(hu, top_u);
            hv = sk_max(hv, top_v);
            if (base > 0) move(sum, compare(old_u, old_v, anchors_at(hu, hv), t));
        }
        const anchors<real> h = anchors_at(hu, hv);
        real part[SUMS] = {};
        SK_UNROLL for (int i = 0; i < sk_items<T>; i++) {
            if (i % kVec == 0 && !sk_any_class<kGroup, kVec>(base, i, r.C)) break;
            add(part, compare<is_short>(a[i], b[i], h, t));
        }
        for (int k = 0; k < SUMS; k++) sum[k] += part[k];
    }
    top[0] = hu;
    top[1] = hv;
    if (kGroup == 1) return;
    sk_group_reduce<kGroup>(top, sk_larger());
    move(sum, compare(hu, hv, anchors_at(top[0], top[1]), t));
    sk_group_reduce<kGroup>(sum, sk_add());
}

/* ---- from sums to divergences ---- */

struct divergence {
    double lse, dl, forward, reverse;
    bool poor; /* a KL is a small difference of large terms, or large itself: it lost digits */
};

/* A direction that does not count may be infinite. */
SK_DEVICE double weighted(const divergence &x, double forward_weight, double reverse_weight) {
    return (forward_weight != 0 ? forward_weight * x.forward : 0) +
           (reverse_weight != 0 ? reverse_weight * x.reverse : 0);
}

/* h(r) = r - log(1 + r), given the logarithm. */
SK_DEVICE double log_gap(double r, double log1p_r) {
    if (!(fabs(r) < 0.1)) return r - log1p_r;
    const double s = r / (2 + r), z = s * s; /* log(1 + r) = 2 atanh(s) */
    double series = 0;
    SK_UNROLL for (int k = 15; k >= 3; k -= 2) series = series * z + 1.0 / k;
    return s * (r - 2 * z * series);
}

/* The log-sum-exp of a row, from its sum against h: -inf of nothing but -inf. */
SK_DEVICE double lse_of(double h, double temperature, double sum) {
    return h <= kLowest ? -INFINITY + 0 * sum : h / temperature + log(sum);
}

/* A row with a side of nothing but -inf: what the contracts say of it. */
SK_DEVICE divergence undefined(double lse_u, double lse_v) {
    return {lse_u, lse_u == -INFINITY ? lse_v : lse_u - lse_v, NAN, NAN, false};
}

SK_DEVICE divergence conclude(const double (&sum)[SUMS], double hu, double hv, double temperature) {
    if (hu <= kLowest || hv <= kLowest)
        return undefined(lse_of(hu, temperature, sum[P]), lse_of(hv, temperature, sum[Q]));
    const double gp = sum[GP] / sum[P], gq = sum[GQ] / sum[Q], r = sum[D] / sum[Q];
    const double log_ratio = fabs(r) < 0.5 ? log1p(r) : log(sum[P] / sum[Q]);
    divergence x;
    x.lse = hu / temperature + log(sum[P]);
    x.dl = (hu - hv) / temperature + log_ratio;
    x.forward = gp - log_gap(-sum[D] / sum[P], -log_ratio);
    x.reverse = gq - log_gap(r, log_ratio);
    /* float sums are good to 1e-7 of their terms, the gradient's d - KL to 1e-7 of the KL */
    x.poor = gp > 16 * x.forward || gq > 16 * x.reverse || x.forward > 32 || x.reverse > 32;
    if (x.forward > kInfinite) x.forward = INFINITY;
    if (x.reverse > kInfinite) x.reverse = INFINITY;
    return x;
}

/* Leaves the sums of the row in double, against the anchors hu and hv: a class at a time, for few
 * rows need it. */
template <typename T, int kGroup>
SK_DEVICE void visit_again(const rows<T> &r, double hu, double hv, double (&sum)[SUMS]) {
    const scale<double> t = scale_of<double>(r.temperature);
    const anchors<double> h = anchors_at<double>(hu, hv);
    for (int k = 0; k < SUMS; k++) sum[k] = 0;
    SK_ROLLED for (int64_t c = sk_lane<kGroup>(); c < r.C; c += kGroup) {
        const double a = sk_widen(r.u[c * r.u_stride]), b = sk_widen(r.v[c * r.v_stride]);
        add(sum, compare<false, double>(sk_at_least(a, kLowest), sk_at_least(b, kLowest), h, t));
    }
    sk_group_reduce<kGroup>(sum, sk_add());
}

/* The same result in all threads of the group. */
template <typename T, int kGroup, int kVec>
SK_DEVICE divergence diverge(const rows<T> &r) {
    sk_real<T> top[2];
    double sum[SUMS];
    visit<T, kGroup, kVec>(r, top, sum);
    double hu = top[0], hv = top[1];
    SK_ROLLED for (bool again = false;; again = true) {
        const divergence x = conclude(sum, hu, hv, r.temperature);
        if (again || !x.poor) return x;
        hu = r.temperature * x.lse;
        hv = r.temperature * (x.lse - x.dl);
        visit_again<T, kGroup>(r, hu, hv, sum);
    }
}

/* ---- gradients ---- */

/* What the gradients of a row need, besides its logits. */
template <typename real>
struct pair_slope {
    bool zero;              /* weight 0: no gradient, whatever the logits hold */
    real f, r;              /* factors of p - q in dl/dv and dl/du */
    real own_f, own_r;      /* factors of p * T (d - KL(p||q)) and q * T (d + KL(q||p)) */
    anchors<real> h;        /* T lse of u and of v, T dl */
    two<real> mid_f, mid_r; /* a - b where d = KL(p||q), d = -KL(q||p): a KL may be as large as d */
};

/* f and r are the factors of KL(p||q) and of KL(q||p). */
template <typename real>
SK_DEVICE pair_slope<real> pair_slope_of(const divergence &of, double T, double f, double r,
                                         bool detach, bool zero) {
    const double own_f = detach ? 0 : f, own_r = detach ? 0 : r;
    /* a KL that does not count may be infinite */
    const double kl_f = own_f != 0 ? of.forward : 0, kl_r = own_r != 0 ? of.reverse : 0;
    pair_slope<real> x;
    x.zero = zero;
    x.f = (real)(T * f);
    x.r = (real)(T * r);
    x.own_f = (real)own_f;
    x.own_r = (real)own_r;
    x.h = {split<real>(T * of.lse), split<real>(T * (of.lse - of.dl)), split<real>(T * of.dl)};
    x.mid_f = split<real>(T * (of.dl + kl_f));
    x.mid_r = split<real>(T * (of.dl - kl_r));
    return x;
}

/* Replaces a pair of logits by its gradients. */
template <typename real>
SK_DEVICE void differentiate(const pair_slope<real> &k, const scale<real> &t, real *a, real *b) {
    const real lowest = (real)kLowest;
    const pair<real> x = compare(sk_at_least(*a, lowest), sk_at_least(*b, lowest), k.h, t);
    *a = k.zero ? 0 : k.own_f * x.p * distance(x.apart, k.mid_f) + k.r * x.diff;
    *b = k.zero ? 0 : -k.own_r * x.q * distance(x.apart, k.mid_r) - k.f * x.diff;
}
