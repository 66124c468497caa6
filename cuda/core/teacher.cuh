/* Teachers of distillation: their logits, and their KL divergence from sums as in core/kl.cuh, with
 * a temperature for each side. */
#pragma once
#include "core/kl.cuh"

enum { SK_LOGITS, SK_PROBS };
enum { SK_TEACHERS = 2 };

/* Temperatures of a student and its teacher. */
template <typename real>
struct sk_warmth {
    sk_scale<real> t, own;
    real ratio; /* T / own: 1 exactly where they are the same */
};

struct sk_teacher {
    sk_arg x;
    double weight, T, own; /* weight 0: not there */
    bool probs;
    sk_warmth<float> in_float; /* found once for all threads */
    sk_warmth<double> in_double;
};
struct sk_teachers {
    sk_teacher of[SK_TEACHERS];
    double slack; /* how far a logit may lie above its anchor */
};

template <typename real>
static sk_warmth<real> sk_warmth_at(double T, double own) {
    const double log2e = 1.4426950408889634;
    return {{(real)(1 / T), (real)(log2e / T)},
            {(real)(1 / own), (real)(log2e / own)},
            (real)(T / own)};
}

static sk_teacher sk_teacher_of(const sk_arg &x, double weight, double T, double own,
                                int64_t kind) {
    return {x,
            x.data ? weight : 0,
            T,
            own,
            kind == SK_PROBS,
            sk_warmth_at<float>(T, own),
            sk_warmth_at<double>(T, own)};
}

template <typename real>
SK_DEVICE const sk_warmth<real> &sk_warmth_of(const sk_teacher &k) {
    if constexpr (sizeof(real) == 8)
        return k.in_double;
    else
        return k.in_float;
}

/* A step of a teacher's logits, the logarithms of its probabilities; returns the largest. */
template <typename T, int kVec>
SK_DEVICE sk_real<T> sk_load_teacher(const sk_teacher &k, int64_t n, int64_t s, int64_t base,
                                     int64_t C, sk_real<T> (&to)[sk_items<T>]) {
    typedef sk_real<T> real;
    const real lowest = (real)kLowest, absent = k.probs ? 0 : lowest;
    const real low = k.probs ? (real)-INFINITY : lowest;
    real largest;
    SK_SWITCH_FLOATING(k.x.dtype, Stored,
                       largest = sk_load_above<T, kVec>(sk_row<Stored>(k.x, n, s), k.x.stride[1],
                                                        base, C, absent, low, to));
    if (k.probs) {
        largest = lowest;
        SK_UNROLL for (int i = 0; i < sk_items<T>; i++) {
            to[i] = sk_at_least(log(to[i]), lowest);
            largest = sk_max(largest, to[i]);
        }
    }
    return largest;
}

/* Logits, or logarithms of probabilities, in double, class by class. */
struct sk_logits_row {
    sk_any_row row;
    bool probs;
    __device__ double operator()(int64_t c) const { return probs ? log(row(c)) : row(c); }
};
SK_DEVICE sk_logits_row sk_row_of(const sk_teacher &k, int64_t n, int64_t s) {
    return {sk_any_row_of(k.x, n, s), k.probs};
}

/* A student's and a teacher's logit; kShort as in core/kl.cuh, kSame: at one temperature. */
template <bool kShort, bool kSame, typename real>
SK_DEVICE sk_pair<real> sk_compare(real a, real b, const sk_anchors<real> &h,
                                   const sk_warmth<real> &w) {
    const real from_u = a - h.u, from_v = b - h.v;
    const real y = kSame ? sk_distance(sk_apart<kShort>(a, b), h.gap) : from_u - w.ratio * from_v;
    return sk_compare(y * w.t.inverse, from_u * w.t.log2e, from_v * w.own.log2e);
}

/* The same of logits of many digits, at any temperatures. */
template <typename real>
SK_DEVICE sk_pair<real> sk_compare(real a, real b, const sk_anchors<real> &h,
                                   const sk_warmth<real> &w) {
    return w.ratio == 1 ? sk_compare<false, true>(a, b, h, w)
                        : sk_compare<false, false>(a, b, h, w);
}

/* Sums over a row, of a teacher: as P, Q, D and GQ in core/kl.cuh. */
enum { SK_SUM_P, SK_SUM_Q, SK_SUM_D, SK_SUM_GQ, SK_TEACHER_SUMS };

template <typename real>
SK_DEVICE void sk_add_terms(real (&sum)[SK_TEACHER_SUMS], const sk_pair<real> &x) {
    sum[SK_SUM_P] += x.p;
    sum[SK_SUM_Q] += x.q;
    sum[SK_SUM_D] += x.diff;
    sum[SK_SUM_GQ] += x.gq;
}

/* Adds a step of a student's and a teacher's logits. */
template <typename T, int kVec, bool kSame>
SK_DEVICE void sk_add_teacher(const sk_real<T> (&a)[sk_items<T>],
                              const sk_real<T> (&b)[sk_items<T>], int64_t base, int64_t C,
                              const sk_anchors<sk_real<T>> &h, const sk_warmth<sk_real<T>> &w,
                              double (&sum)[SK_TEACHER_SUMS]) {
    sk_real<T> part[SK_TEACHER_SUMS] = {};
    SK_UNROLL for (int i = 0; i < sk_items<T>; i++) {
        if (i % kVec == 0 && !sk_any_class<kVec>(base, i, C)) break;
        sk_pair<sk_real<T>> x = sk_compare<sizeof(T) == 2, kSame>(a[i], b[i], h, w);
        x.diff = x.first; /* diff = first + gq, which loses digits only where the KL is large */
        sk_add_terms(part, x);
    }
    part[SK_SUM_D] += part[SK_SUM_GQ];
    for (int i = 0; i < SK_TEACHER_SUMS; i++) sum[i] += part[i];
}

template <typename real>
SK_DEVICE void sk_move_sums(double (&sum)[SK_TEACHER_SUMS], const sk_pair<real> &x) {
    sum[SK_SUM_GQ] = x.q * sum[SK_SUM_GQ] + x.diff * sum[SK_SUM_D] + x.gq * sum[SK_SUM_Q];
    sum[SK_SUM_D] = x.p * sum[SK_SUM_D] + x.diff * sum[SK_SUM_Q];
    sum[SK_SUM_P] *= x.p;
    sum[SK_SUM_Q] *= x.q;
}

/* ---- gradients ---- */

/* What the gradient of a row needs of one teacher. */
template <typename real>
struct sk_teacher_slope {
    sk_split<real> log2_u, log2_v; /* lse on both sides, to base 2 */
    sk_split<real> gap;            /* T dl */
    sk_split<real> lse_u, lse_v;   /* times the temperatures */
    real factor;
};

/* dl = lse - lse of the teacher. */
template <typename real>
SK_DEVICE sk_teacher_slope<real> sk_teacher_slope_of(const sk_teacher &k, double lse, double dl,
                                                     double factor) {
    const sk_warmth<real> &w = sk_warmth_of<real>(k);
    const double u = k.T * lse, v = k.own * (lse - dl);
    return {sk_keep_split<real>(u * w.t.log2e),
            sk_keep_split<real>(v * w.own.log2e),
            sk_keep_split<real>(k.T * dl),
            sk_keep_split<real>(u),
            sk_keep_split<real>(v),
            sk_keep((real)factor)};
}

/* p - q of a student's and a teacher's logit; kSame as above. */
template <bool kSame, typename real>
SK_DEVICE real sk_slope_at(real a, real b, const sk_teacher_slope<real> &k,
                           const sk_warmth<real> &w) {
    if constexpr (kSame)
        return sk_compare(sk_distance(sk_difference(a, b), k.gap) * w.t.inverse,
                          sk_log2_of(a, w.t.log2e, k.log2_u), sk_log2_of(b, w.own.log2e, k.log2_v))
            .diff;
    const real from_u = (a - k.lse_u.high) - k.lse_u.low, from_v = (b - k.lse_v.high) - k.lse_v.low;
    return sk_compare((from_u - w.ratio * from_v) * w.t.inverse, from_u * w.t.log2e,
                      from_v * w.own.log2e)
        .diff;
}

/* Adds a teacher's part of the gradients of a step. */
template <typename T, bool kSame>
SK_DEVICE void sk_add_slopes(const sk_real<T> (&a)[sk_items<T>], const sk_real<T> (&b)[sk_items<T>],
                             const sk_teacher_slope<sk_real<T>> &k, const sk_warmth<sk_real<T>> &w,
                             sk_real<T> (&grad)[sk_items<T>]) {
    SK_UNROLL for (int i = 0; i < sk_items<T>; i++) grad[i] +=
        k.factor * sk_slope_at<kSame>(a[i], b[i], k, w);
}

/* ---- from sums to a divergence ---- */

struct sk_teacher_row {
    double level, dl, kl;
    bool poor;
};

/* From a teacher's sums; poor and far as in core/kl.cuh. Poor is also a small KL of `rough`
 * numbers: two temperatures or two dtypes leave each y off by some 2^-24, and as y has a spread of
 * sqrt(2 KL), the KL by 2^-24 sqrt(2 KL), which is 3e-6 of a KL of 1e-3. */
SK_DEVICE sk_teacher_row sk_conclude(const sk_teacher &k, const double (&sum)[SK_TEACHER_SUMS],
                                     double hu, double hv, bool rough, bool far) {
    if (hu <= kLowest || hv <= kLowest) return {0, 0, 0, true}; /* -inf, or finite still */
    const double gq = sum[SK_SUM_GQ] / sum[SK_SUM_Q], r = sum[SK_SUM_D] / sum[SK_SUM_Q];
    const double log_ratio = fabs(r) < 0.5 ? log1p(r) : log(sum[SK_SUM_P] / sum[SK_SUM_Q]);
    sk_teacher_row x;
    x.level = log(sum[SK_SUM_P]);
    x.dl = (hu / k.T - hv / k.own) + log_ratio;
    x.kl = gq - sk_log_gap(r, log_ratio);
    x.poor = far || !(gq <= 16 * x.kl && x.kl >= 0 && x.kl <= 32) || (rough && x.kl < 1e-3);
    if (x.kl < 0) x.kl = 0;
    return x;
}

/* The same of a row class by class, in double, with 0 log 0 = 0: whatever its logits are. */
SK_DEVICE sk_teacher_row sk_careful(const sk_teacher &k, const sk_logits_row &student,
                                    const sk_logits_row &own, int64_t C) {
    sk_side u, v;
    sk_sides_of(student, own, C, k.T, k.own, &u, &v);
    const sk_divergence none = sk_undefined(sk_lse_of(u, k.T), sk_lse_of(v, k.own));
    if (!isfinite(u.log_sum) || !isfinite(v.log_sum)) return {u.log_sum, none.dl, NAN, false};
    double kl[1] = {0};
    SK_ROLLED for (int64_t c = sk_lane(); c < C; c += sk_group()) {
        const double a = student(c), b = own(c);
        const double p = exp(sk_log_p(a, k.T, u)), q = exp(sk_log_p(b, k.own, v));
        const double d = sk_log_ratio_of(a, b, k.T, k.own, u, v);
        const double far = (p - q) - q * d;
        kl[0] += q == 0 ? p : fabs(d) < 0.5 ? q * d * d * sk_curvature(d) : far;
    }
    sk_group_reduce(kl, sk_add());
    return {u.log_sum, (u.top / k.T - v.top / k.own) + (u.log_sum - v.log_sum), kl[0], false};
}
