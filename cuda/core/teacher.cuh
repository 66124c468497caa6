/* Teachers of distillation: their logits, and their KL divergence from sums as in core/kl.cuh, with
 * a temperature for each side. */
#pragma once
#include "core/kl.cuh"

enum { LOGITS, PROBS };
enum { MOST_TEACHERS = 2 };

/* Temperatures of a student and its teacher. */
template <typename real>
struct warmth {
    scale<real> t, own;
    real ratio; /* T / own: 1 exactly where they are the same */
};

struct teacher {
    sk_arg x;
    double weight, T, own; /* weight 0: not there */
    bool probs;
    warmth<float> in_float; /* found once for all threads */
    warmth<double> in_double;
};
struct teachers {
    teacher of[MOST_TEACHERS];
    double slack; /* how far a logit may lie above its anchor */
};

template <typename real>
static warmth<real> warmth_at(double T, double own) {
    const double log2e = 1.4426950408889634;
    return {{(real)(1 / T), (real)(log2e / T)},
            {(real)(1 / own), (real)(log2e / own)},
            (real)(T / own)};
}

static teacher teacher_of(const sk_arg &x, double weight, double T, double own, int64_t kind) {
    return {x,
            x.data ? weight : 0,
            T,
            own,
            kind == PROBS,
            warmth_at<float>(T, own),
            warmth_at<double>(T, own)};
}

template <typename real>
SK_DEVICE const warmth<real> &warmth_of(const teacher &k) {
    if constexpr (sizeof(real) == 8)
        return k.in_double;
    else
        return k.in_float;
}

/* A step of a teacher's logits, the logarithms of its probabilities. */
template <typename T, int kGroup, int kVec>
SK_DEVICE void load_teacher(const teacher &k, int64_t n, int64_t s, int64_t base, int64_t C,
                            sk_real<T> (&to)[sk_items<T>]) {
    const sk_real<T> lowest = (sk_real<T>)kLowest;
    if (k.probs) {
        sk_load_constant<T, kGroup, kVec>(k.x, n, s, base, C, 0, to);
        SK_UNROLL for (int i = 0; i < sk_items<T>; i++) to[i] = log(to[i]);
    } else {
        sk_load_constant<T, kGroup, kVec>(k.x, n, s, base, C, lowest, to);
    }
    SK_UNROLL for (int i = 0; i < sk_items<T>; i++) to[i] = sk_at_least(to[i], lowest);
}

/* A student's and a teacher's logit; kShort as in core/kl.cuh. */
template <bool kShort, typename real>
SK_DEVICE pair<real> compare(real a, real b, const anchors<real> &h, const warmth<real> &w) {
    const real from_u = (a - h.u.high) - h.u.low, from_v = (b - h.v.high) - h.v.low;
    const real apart = from_u - w.ratio * from_v;
    const bool exact = !kShort && w.ratio == 1;
    const real y = (exact ? distance(difference(a, b), h.gap) : apart) * w.t.inverse;
    return compare(y, from_u, from_v, w.t, w.own);
}

/* Sums over a row, of a teacher: as P, Q, D and GQ in core/kl.cuh. */
enum { SUM_P, SUM_Q, SUM_D, SUM_GQ, TEACHER_SUMS };

template <typename real>
SK_DEVICE void add(real (&sum)[TEACHER_SUMS], const pair<real> &x) {
    sum[SUM_P] += x.p;
    sum[SUM_Q] += x.q;
    sum[SUM_D] += x.diff;
    sum[SUM_GQ] += x.gq;
}

template <typename real>
SK_DEVICE void move(double (&sum)[TEACHER_SUMS], const pair<real> &x) {
    sum[SUM_GQ] = x.q * sum[SUM_GQ] + x.diff * sum[SUM_D] + x.gq * sum[SUM_Q];
    sum[SUM_D] = x.p * sum[SUM_D] + x.diff * sum[SUM_Q];
    sum[SUM_P] *= x.p;
    sum[SUM_Q] *= x.q;
}

struct teacher_row {
    double level, dl, kl;
    bool poor;
};

/* From a teacher's sums; poor as in core/kl.cuh, or where `rough` numbers leave too few digits. */
SK_DEVICE teacher_row conclude(const teacher &k, const double (&sum)[TEACHER_SUMS], double hu,
                               double hv, bool rough) {
    if (hu <= kLowest || hv <= kLowest) {
        const divergence none =
            undefined(lse_of(hu, k.T, sum[SUM_P]), lse_of(hv, k.own, sum[SUM_Q]));
        return {none.lse - hu / k.T, none.dl, none.reverse, none.poor};
    }
    const double gq = sum[SUM_GQ] / sum[SUM_Q], r = sum[SUM_D] / sum[SUM_Q];
    const double log_ratio = fabs(r) < 0.5 ? log1p(r) : log(sum[SUM_P] / sum[SUM_Q]);
    teacher_row x;
    x.level = log(sum[SUM_P]);
    x.dl = (hu / k.T - hv / k.own) + log_ratio;
    x.kl = gq - log_gap(r, log_ratio);
    x.poor = gq > 16 * x.kl || x.kl < 0 || (rough && x.kl < 1e-3);
    if (x.kl > kInfinite) x.kl = INFINITY;
    if (x.kl < 0) x.kl = 0;
    return x;
}
