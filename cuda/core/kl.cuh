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
#include <type_traits>

#include "core/rows.cuh"

/* -inf is computed with as -2^110 (1e33): 0 * y stays 0. */
constexpr double kLowest = -0x1p110;

/* Anchors of u and v that are more than 16 T apart: then a - b may be near their distance, so that
 * y is small, though a is thousands of times b; and kShort leaves out a part of y that counts. */
constexpr double kFar = 16;

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

/* a - b. kShort: its low part is left out, which of numbers of a half type is 0 but where one is
 * thousands of times the other. */
template <bool kShort, typename real>
SK_DEVICE two<real> apart(real a, real b) {
    if constexpr (kShort) return {a - b, 0};
    return difference(a, b);
}

/* What logits are compared against; gap = u - v. */
template <typename real>
struct anchors {
    real u, v;
    two<real> gap;
};

template <typename real>
SK_DEVICE anchors<real> anchors_at(real u, real v) {
    return {u, v, difference(u, v)};
}

template <typename real>
struct pair {
    real p, q, y;
    real diff, first; /* p - q, q*y */
    real gp, gq;      /* p*g(-y), q*g(y) */
};

/* (e^y - 1 - y) / y^2 for |y| < 0.75. float: by the polynomial of least relative error, 7.3e-8 as
 * computed; double: by the series, whose terms left out are below 1e-17 of it. */
SK_DEVICE float curvature(float y) {
    constexpr float of[] = {0.5f,          0.16666672f,    0.041666638f, 0.008332572f,
                            0.0013889658f, 0.00020113161f, 2.4891528e-5f};
    float g = of[6];
    SK_UNROLL for (int k = 5; k >= 0; k--) g = g * y + of[k];
    return g;
}
SK_DEVICE double curvature(double y) {
    // clang-format off
    constexpr double inverse_factorial[] = {
        1. / 2,          1. / 6,           1. / 24,           1. / 120,
        1. / 720,        1. / 5040,        1. / 40320,        1. / 362880,
        1. / 3628800,    1. / 39916800,    1. / 479001600,    1. / 6227020800,
        1. / 87178291200, 1. / 1307674368000, 1. / 20922789888000, 1. / 355687428096000};
    // clang-format on
    double g = inverse_factorial[15];
    SK_UNROLL for (int k = 14; k >= 0; k--) g = g * y + inverse_factorial[k];
    return g;
}

/* A pair of logits from y and the logarithms of p and q to base 2. Near y = 0 no term is a
 * difference of larger ones: gp + gq = diff * y. */
template <typename real>
SK_DEVICE pair<real> compare(real y, real log2_p, real log2_q) {
    pair<real> x;
    x.y = y;
    x.p = sk_exp2(log2_p);
    x.q = sk_exp2(log2_q);
    x.first = x.q * y;
    const bool near = fabs(y) < (real)0.75;
    const real second = x.first * y * curvature(y), apart = x.p - x.q;
    x.diff = near ? x.first + second : apart;
    x.gq = near ? second : apart - x.first;
    x.gp = near ? x.diff * y - second : x.p * y - apart;
    return x;
}

/* y is what a - b lies above h.gap, not what a - h.u lies above b - h.v: of rows that nearly agree
 * the small logits differ, and those lose digits against an anchor. kShort as in apart(). */
template <bool kShort = false, typename real>
SK_DEVICE pair<real> compare(real a, real b, const anchors<real> &h, const scale<real> &t) {
    const real y = distance(apart<kShort>(a, b), h.gap) * t.inverse;
    return compare(y, (a - h.u) * t.log2e, (b - h.v) * t.log2e);
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

/* A step of logits, from kLowest up; returns the largest. */
template <typename T, int kVec, typename Stored>
SK_DEVICE sk_real<T> load_logits(const Stored *row, int64_t stride, int64_t base, int64_t C,
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
SK_DEVICE void visit(const rows<T> &r, sk_real<T> (&top)[3], double (&sum)[SUMS]) {
    typedef sk_real<T> real;
    const scale<real> t = scale_of<real>(r.temperature);
    const real lowest = (real)kLowest, slack = (real)(2 * r.temperature);
    const T *const u = sk_keep(r.u), *const v = sk_keep(r.v);
    real hu = lowest, hv = lowest;
    for (int k = 0; k < SUMS; k++) sum[k] = 0;
    SK_ROLLED for (int64_t base = 0; base < r.C; base += sk_step<T>()) {
        real a[sk_items<T>], b[sk_items<T>];
        const real top_u = load_logits<T, kVec>(u, r.u_stride, base, r.C, a);
        const real top_v = load_logits<T, kVec>(v, r.v_stride, base, r.C, b);
        if (top_u > hu + slack || top_v > hv + slack) {
            const real old_u = hu, old_v = hv;
            hu = sk_max(hu, top_u);
            hv = sk_max(hv, top_v);
            if (base > 0) move(sum, compare(old_u, old_v, anchors_at(hu, hv), t));
        }
        const anchors<real> h = anchors_at(hu, hv);
        real part[SUMS] = {};
        SK_UNROLL for (int i = 0; i < sk_items<T>; i++) {
            if (i % kVec == 0 && !sk_any_class<kVec>(base, i, r.C)) break;
            pair<real> x = compare<sizeof(T) == 2>(a[i], b[i], h, t);
            x.gp = x.diff * x.y;
            add(part, x);
        }
        part[GP] -= part[GQ];
        for (int k = 0; k < SUMS; k++) sum[k] += part[k];
    }
    top[0] = hu;
    top[1] = hv;
    top[2] = fabs(hu - hv);
    if (sk_group() == 1) return;
    sk_group_reduce(top, sk_larger());
    move(sum, compare(hu, hv, anchors_at(top[0], top[1]), t));
    sk_group_reduce(sum, sk_add());
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

/* A row with a side of nothing but -inf: what the contracts say of it. */
SK_DEVICE divergence undefined(double lse_u, double lse_v) {
    return {lse_u, lse_u == -INFINITY ? lse_v : lse_u - lse_v, NAN, NAN, false};
}

/* poor also where anchors were `far` apart. */
SK_DEVICE divergence conclude(const double (&sum)[SUMS], double hu, double hv, double temperature,
                              bool far) {
    if (hu <= kLowest || hv <= kLowest) return {0, 0, 0, 0, true}; /* -inf, or finite still */
    const double gp = sum[GP] / sum[P], gq = sum[GQ] / sum[Q], r = sum[D] / sum[Q];
    const double log_ratio = fabs(r) < 0.5 ? log1p(r) : log(sum[P] / sum[Q]);
    divergence x;
    x.lse = hu / temperature + log(sum[P]);
    x.dl = (hu - hv) / temperature + log_ratio;
    x.forward = gp - log_gap(-sum[D] / sum[P], -log_ratio);
    x.reverse = gq - log_gap(r, log_ratio);
    /* float sums are good to 1e-7 of their terms, the gradient's d - KL to 1e-7 of the KL, and GP
     * to 1e-7 of GP + GQ */
    x.poor = far || !(gp <= 16 * x.forward && gq <= 16 * x.reverse && x.forward <= 32 &&
                      x.reverse <= 32 && sum[GQ] <= 16 * sum[GP]);
    return x;
}

/* ---- a row in double, class by class: whatever its logits are ---- */

/* A side of a row: its largest logit, and the logarithm of the sum of e^((z - top)/T). Kept apart,
 * for log_sum would be lost in the log-sum-exp of large logits. */
struct side {
    double top, log_sum; /* -inf of nothing but -inf, NaN of a row that holds NaN or inf */
};

/* Logits as they are stored. */
template <typename T>
struct stored_row {
    const T *at;
    int64_t stride;
    __device__ double operator()(int64_t c) const { return sk_widen(at[c * stride]); }
};

/* The same in all threads of the group. */
template <typename Row>
SK_DEVICE side side_of(const Row &row, int64_t C, double temperature) {
    double top[1] = {-INFINITY}, sum[1] = {0};
    SK_ROLLED for (int64_t c = sk_lane(); c < C; c += sk_group()) top[0] = fmax(top[0], row(c));
    sk_group_reduce(top, sk_larger());
    SK_ROLLED for (int64_t c = sk_lane(); c < C; c += sk_group()) {
        const double z = row(c);
        sum[0] += z == -INFINITY ? 0 : exp((z - top[0]) / temperature);
    }
    sk_group_reduce(sum, sk_add());
    return {top[0], log(sum[0])};
}

/* Of two rows, one after the other: the code is long, and rarely runs. */
template <typename Row>
SK_DEVICE void sides_of(const Row &u, const Row &v, int64_t C, double T, double T_v, side *x,
                        side *y) {
    SK_ROLLED for (int i = 0; i < 2; i++) {
        Row row = v; /* a copy stays in registers, which a reference to either does not */
        if (i == 0) row = u;
        *y = side_of(row, C, i == 0 ? T : T_v);
        if (i == 0) *x = *y;
    }
}

SK_DEVICE double lse_of(const side &x, double temperature) {
    return x.top / temperature + x.log_sum;
}

/* A log-sum-exp beyond this does not say what p is to the last digits, a factor beyond that may
 * leave the range of `real`: gradients of such rows are found class by class. */
template <typename real>
constexpr double kFarLse = sizeof(real) == 8 ? 0x1p10 : 0x1p30;
template <typename real>
constexpr double kFarFactor = sizeof(real) == 8 ? 0x1p1014 : 0x1p118;

SK_DEVICE bool is_beyond(double x, double limit) { return fabs(x) >= limit && fabs(x) < INFINITY; }

/* What was saved says of which row the classes are a part: a log_sum; or lse(u/T) and dl, of which
 * follows lse(v/T). But where that is no more than what they are, x knows the digits that were
 * rounded away. */
template <typename real>
constexpr double kRounded = sizeof(real) == 8 ? 1e-15 : 1e-6;
template <typename real>
SK_DEVICE side whole_side(const side &x, double top, double log_sum) {
    const bool same = fabs(log_sum - x.log_sum) <= kRounded<real> * (1 + fabs(x.log_sum));
    return x.top == top && same ? x : side{top, log_sum};
}
template <typename real>
SK_DEVICE side side_within(const side &x, double temperature, double lse_u, double dl) {
    if (x.top == -INFINITY) return {0, lse_u - dl};
    const double log_sum = (lse_u - dl) - x.top / temperature;
    const double rounded = kRounded<real> + 1e-15 * (fabs(lse_u) + fabs(dl));
    return {x.top, fabs(log_sum - x.log_sum) <= rounded ? x.log_sum : log_sum};
}

SK_DEVICE double log_p(double z, double temperature, const side &x) {
    return (z - x.top) / temperature - x.log_sum;
}

/* log p - log q, infinite for a class at -inf on one side. At one temperature from the exact
 * difference of (u - v) and (top - top), however large they are. */
SK_DEVICE double log_ratio(double u, double v, double T, double T_v, const side &x, const side &y) {
    if (isinf(u) || isinf(v)) return u - v;
    if (T != T_v) return log_p(u, T, x) - log_p(v, T_v, y);
    return distance(difference(u, v), difference(x.top, y.top)) / T - (x.log_sum - y.log_sum);
}

/* Both KL, with 0 log 0 = 0. */
template <typename T>
SK_DEVICE divergence careful(const rows<T> &r) {
    const stored_row<T> u = {r.u, r.u_stride}, v = {r.v, r.v_stride};
    const double t = r.temperature;
    side x, y;
    sides_of(u, v, r.C, t, t, &x, &y);
    if (!isfinite(x.log_sum) || !isfinite(y.log_sum)) return undefined(lse_of(x, t), lse_of(y, t));
    double kl[2] = {0, 0};
    SK_ROLLED for (int64_t c = sk_lane(); c < r.C; c += sk_group()) {
        const double a = u(c), b = v(c);
        if (isinf(a) && isinf(b)) continue;
        const double p = exp(log_p(a, t, x)), q = exp(log_p(b, t, y));
        const double d = log_ratio(a, b, t, t, x, y), diff = p - q;
        const bool near = fabs(d) < 0.5; /* nothing cancels */
        kl[0] += isinf(a)   ? q
                 : isinf(b) ? (double)INFINITY
                 : near     ? p * d * d * curvature(-d)
                            : p * d - diff;
        kl[1] += isinf(b)   ? p
                 : isinf(a) ? (double)INFINITY
                 : near     ? q * d * d * curvature(d)
                            : diff - q * d;
    }
    sk_group_reduce(kl, sk_add());
    return {lse_of(x, t), (x.top - y.top) / t + (x.log_sum - y.log_sum), kl[0], kl[1], false};
}

/* The same result in all threads of the group. */
template <typename T, int kVec>
SK_DEVICE divergence diverge(const rows<T> &r) {
    sk_real<T> top[3];
    double sum[SUMS];
    visit<T, kVec>(r, top, sum);
    const bool far = sizeof(T) == 2 && top[2] > kFar * r.temperature;
    const divergence x = conclude(sum, top[0], top[1], r.temperature, far);
    return x.poor ? careful<T>(r) : x;
}

/* ---- gradients ---- */

/* What the gradients of a row need, besides its logits. */
template <typename real>
struct pair_slope {
    bool zero; /* weight 0: no gradient, whatever the logits hold */
    scale<real> t;
    real f, r;                /* factors of p - q in dl/dv and dl/du */
    real own_f, own_r;        /* factors of p * T (d - KL(p||q)) and q * T (d + KL(q||p)) */
    two<real> log2_u, log2_v; /* lse of u and of v, to base 2 */
    two<real> gap;            /* T dl: a - b where d = 0 */
    two<real> mid_f, mid_r; /* a - b where d = KL(p||q), d = -KL(q||p): a KL may be as large as d */
};

/* A number as the sum of two that is kept in registers: it comes from double, and a loop needs it.
 */
template <typename real>
SK_DEVICE two<real> keep(double x) {
    const two<real> both = split<real>(x);
    return {sk_keep(both.high), sk_keep(both.low)};
}

/* f and r are the factors of KL(p||q) and of KL(q||p). */
template <typename real>
SK_DEVICE pair_slope<real> pair_slope_of(const divergence &of, double T, double f, double r,
                                         bool detach, bool zero) {
    const double own_f = detach ? 0 : f, own_r = detach ? 0 : r;
    /* a KL that does not count may be infinite */
    const double kl_f = own_f != 0 ? of.forward : 0, kl_r = own_r != 0 ? of.reverse : 0;
    pair_slope<real> x;
    x.zero = zero;
    x.t = scale_of<real>(T);
    x.f = sk_keep((real)(T * f));
    x.r = sk_keep((real)(T * r));
    x.own_f = sk_keep((real)own_f);
    x.own_r = sk_keep((real)own_r);
    x.log2_u = keep<real>(T * of.lse * x.t.log2e);
    x.log2_v = keep<real>(T * (of.lse - of.dl) * x.t.log2e);
    x.gap = keep<real>(T * of.dl);
    x.mid_f = keep<real>(T * (of.dl + kl_f));
    x.mid_r = keep<real>(T * (of.dl - kl_r));
    return x;
}

/* log2 of e^(a/T) over e^lse; `lse` is to base 2. The product is exact until the large part of lse
 * is gone. */
template <typename real>
SK_DEVICE real log2_of(real a, real log2e, const two<real> &lse) {
    return fma(a, log2e, -lse.high) - lse.low;
}

/* Replaces a pair of logits, from kLowest up, by its gradients. */
template <typename real>
SK_DEVICE void differentiate(const pair_slope<real> &k, real *a, real *b) {
    const two<real> d = difference(*a, *b);
    const pair<real> x = compare(distance(d, k.gap) * k.t.inverse, log2_of(*a, k.t.log2e, k.log2_u),
                                 log2_of(*b, k.t.log2e, k.log2_v));
    *a = k.own_f * x.p * distance(d, k.mid_f) + k.r * x.diff;
    *b = -k.own_r * x.q * distance(d, k.mid_r) - k.f * x.diff;
}

/* The same of a step. */
template <typename T, int kVec>
SK_DEVICE void differentiate(const pair_slope<sk_real<T>> &k, int64_t base, int64_t C,
                             sk_real<T> (&a)[sk_items<T>], sk_real<T> (&b)[sk_items<T>]) {
    SK_UNROLL for (int i = 0; i < sk_items<T>; i++) {
        if (i % kVec == 0 && !sk_any_class<kVec>(base, i, C)) break;
        differentiate(k, &a[i], &b[i]);
    }
    if (!k.zero) return;
    SK_UNROLL for (int i = 0; i < sk_items<T>; i++) a[i] = b[i] = 0;
}

/* Whether the gradients of a row are found class by class. */
template <typename real>
SK_DEVICE bool is_far(const divergence &x, double f, double r) {
    const double limit = kFarLse<real>;
    return is_beyond(x.lse, limit) || is_beyond(x.dl, limit) || is_beyond(x.forward, limit) ||
           is_beyond(x.reverse, limit) || is_beyond(f, kFarFactor<real>) ||
           is_beyond(r, kFarFactor<real>);
}

/* Leaves them; they may lie over the logits. */
template <typename T>
SK_DEVICE void differentiate_far(const rows<T> &r, const divergence &of, double f, double rev,
                                 bool detach, T *grad_u, int64_t u_stride, T *grad_v,
                                 int64_t v_stride) {
    typedef sk_real<T> real;
    const stored_row<T> u = {r.u, r.u_stride}, v = {r.v, r.v_stride};
    const double t = r.temperature;
    side x, y;
    sides_of(u, v, r.C, t, t, &x, &y);
    x = side_within<real>(x, t, of.lse, 0);
    y = side_within<real>(y, t, of.lse, of.dl);
    SK_ROLLED for (int64_t c = sk_lane(); c < r.C; c += sk_group()) {
        const double a = u(c), b = v(c), p = exp(log_p(a, t, x)), q = exp(log_p(b, t, y));
        const double d = log_ratio(a, b, t, t, x, y), diff = p - q;
        double to_u = rev != 0 ? rev * diff : 0, to_v = f != 0 ? -f * diff : 0;
        if (!detach && f != 0) to_u += p == 0 && isinf(a) ? 0 : f * p * (d - of.forward);
        if (!detach && rev != 0) to_v -= q == 0 && isinf(b) ? 0 : rev * q * (d + of.reverse);
        sk_narrow((real)(t * to_u), grad_u + c * u_stride);
        sk_narrow((real)(t * to_v), grad_v + c * v_stride);
    }
}
