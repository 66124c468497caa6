/* Both KL divergences between two rows of logits, from one comparison of their classes.
 *
 * Against anchors hu, hv (the rows' largest logits, or T lse) a pair of logits u, v has
 *     p = exp((u - hu)/T)   q = exp((v - hv)/T)   y = log(p/q)
 *     diff = p - q          gq = q (e^y - 1 - y)
 * all exact to rounding however close the rows are. From P, Q, D, GQ and DY, the sums over the row
 * of p, q, diff, gq and diff y, with GP = DY - GQ and r = D/Q, follow
 *     lse(u/T) = hu/T + log P        KL(p||q) = GP/P - (r D/P - h(r))
 *     dl = (hu - hv)/T + log(1 + r)  KL(q||p) = GQ/Q - h(r)
 * with h(r) = r - log(1 + r). Every term is of second order, so rows close to each other keep their
 * digits; those that would lose too many are told apart (sk_conclude) and done once more.
 *
 * A file that includes this, by itself or by another header, is compiled with two flags more: see
 * chain_flags in CMakeLists.txt. */
#pragma once
#include "cpu/core/row.h"
#include "cpu/core/tile.h"

/* ---- one pair of logits ---- */

typedef struct sk_scale {
    double T, per_T;                 /* 1/T */
    real inverse_T, log2e_T, lowest; /* x log2e_T = -127 at x = lowest */
    real least;                      /* SK_LEAST */
} sk_scale;

/* -inf is computed with as -2^100: 0 y stays 0. Such a class makes a KL of 2^100/T times its
 * probability on the other side, where it should be infinite. Rows of a KL past SK_LARGE_KL,
 * which few others have, are found class by class; a probability below 1e-28 T stays unnoticed. */
#define SK_LEAST ((real)-0x1p100)
#define SK_LARGE_KL 100

static inline sk_scale sk_scale_of(double T) {
    const real log2e_T = (real)(SK_LOG2E / T);
    return (sk_scale){
        T, 1 / T, (real)(1 / T), log2e_T, sk_opaque(-127 / log2e_T), sk_opaque(SK_LEAST)};
}

/* least is SK_LEAST; in loops over classes, that of a scale. */
static inline real sk_logit(real x, real least) { return x < least ? least : x; }

/* e^(x/T) */
static inline real sk_exp_of(real x, const sk_scale *t) {
    return sk_exp2_scaled(x, t->log2e_T, t->lowest);
}

/* What the largest logit of a row makes its anchor: NaN where all are -inf, as softmax has it, or
 * below SK_LEAST, so that no sum is taken for good. */
static inline real sk_anchor(real top) { return top < SK_LEAST ? (real)NAN : top; }

/* A log-sum-exp beyond this does not say what p is to the last digits, a factor beyond that may
 * leave the range of a real: gradients of such rows are found in double, class by class. */
#define SK_FAR_LSE (sizeof(real) == 8 ? 0x1p10 : 0x1p30)
#define SK_FAR_FACTOR (SK_REAL_MAX / 1024)
static inline bool sk_is_far_factor(double x) {
    return (fabs(x) >= SK_FAR_FACTOR) & (fabs(x) < (double)INFINITY);
}

/* How y = u/T - v/T' - gap is found: PLAIN is right as long as y is not much smaller than the gap,
 * EXACT to the last digits however large the gap, APART (in double) where the temperatures differ.
 * PLAIN and EXACT give exactly 0 for equal logits without a gap. */
enum sk_form { SK_PLAIN, SK_EXACT, SK_APART };

/* gap is that of u - v, hu - hv; APART: that of y, hu/T - hv/T'. */
static inline real sk_log_ratio(enum sk_form form, real u, real v, sk_split gap, const sk_scale *t,
                                const sk_scale *t_v) {
    if (form == SK_APART)
        return (real)((u * t->per_T - v * t_v->per_T) - ((double)gap.high + gap.low));
    if (form == SK_EXACT) return sk_difference(u, v, gap, 1) * t->inverse_T;
    return ((u - v) - gap.high) * t->inverse_T;
}

typedef struct sk_compared {
    real diff, gq;
} sk_compared;

/* By series where y is small, so that nothing cancels; with e^y = p/q elsewhere, so that nothing
 * overflows. */
static inline sk_compared sk_compare(real p, real q, real y) {
    const real qy = q * y, rest = qy * y * sk_exp_rest(y), far_diff = p - q;
    const bool near = y * y < 1;
    return (sk_compared){near ? qy + rest : far_diff, near ? rest : far_diff - qy};
}

/* ---- sums over a row ---- */

enum { SK_P, SK_Q, SK_D, SK_GQ, SK_DY, SK_SUMS };

/* For each row: what its logits are compared against, and the sums. */
typedef struct sk_comparison {
    SK_ALIGNED real hu[SK_PITCH], hv[SK_PITCH];
    SK_ALIGNED double sum[SK_SUMS][SK_PITCH];
} sk_comparison;

static inline void sk_clear_sums(const sk_task *r, sk_comparison *m) {
    for (int i = 0; i < SK_SUMS; i++)
        memset(m->sum[i], 0, (size_t)sk_scalars(r) * sizeof m->sum[i][0]);
}

/* What a group's sums are for: dl alone; KL(q||p) too; both KL. */
enum sk_wanted { SK_ONLY_DL, SK_ONE_KL, SK_BOTH_KL };

/* Where p comes from: computed; computed and left in e; found in e. */
enum sk_exps { SK_FRESH, SK_KEEP, SK_REUSE };

/* Turns n exponentials e^(x/T), rounded up to whole groups of lanes, into those of T/power: 2 to 4
 * times the error, a seventh of the work. */
static inline void sk_to_power(real *e, int64_t n, int power) {
    for (int64_t i = 0; i < n && power > 1; i += SK_LANES) {
#pragma omp simd
        for (int k = 0; k < SK_LANES; k++) {
            const real x = e[i + k], x2 = x * x;
            e[i + k] = power == 2 ? x2 : x2 * (power == 3 ? x : x2);
        }
    }
}

/* A group of lanes in the tiles of u and v, and where their next tiles lie. */
typedef struct sk_two_tiles {
    sk_vectors u, v;
    sk_ahead next_u, next_v;
    int64_t g;
    real *e; /* what sk_exps says of p */
} sk_two_tiles;

/* Adds a group of lanes; asks for the next ones. */
SK_SPECIAL void sk_compare_group(enum sk_form form, enum sk_wanted wanted, enum sk_exps exps,
                                 const sk_task *r, const sk_scale *scale, const sk_scale *scale_v,
                                 const sk_two_tiles *x, sk_comparison *m) {
    const sk_scale t = *scale, t_v = *scale_v;
    const sk_vectors of_u = x->u, of_v = x->v;
    const sk_ahead next_u = x->next_u, next_v = x->next_v;
    const int64_t g = x->g;
    real *restrict const e = x->e;
    const int64_t pitch = sk_pitch(r);
    real hu[SK_LANES], hv[SK_LANES], high[SK_LANES], low[SK_LANES];
    real p_[SK_LANES] = {0}, q_[SK_LANES] = {0}, d_[SK_LANES] = {0}, gq_[SK_LANES] = {0},
         dy_[SK_LANES] = {0};
    sk_to_lanes(r, g, m->hu, hu);
    sk_to_lanes(r, g, m->hv, hv);
#pragma omp simd
    for (int k = 0; k < SK_LANES; k++) {
        const sk_split gap = form == SK_APART ? sk_split_of(hu[k] * t.per_T - hv[k] * t_v.per_T)
                                              : sk_split_difference(hu[k], hv[k]);
        high[k] = gap.high;
        low[k] = gap.low;
    }
    for (int64_t i = 0, end = sk_min(of_u.whole, of_v.whole); i < of_u.depth; end = of_u.depth) {
        const real *u = sk_part(of_u, i), *v = sk_part(of_v, i);
        for (; i < end; i++, u += pitch, v += pitch) {
            const int64_t kept = i * SK_LANES;
            sk_fetch(next_u, i);
            sk_fetch(next_v, i);
#pragma omp simd
            for (int k = 0; k < SK_LANES; k++) {
                const sk_split gap = {high[k], low[k]};
                const real a = sk_logit(u[k], t.least), b = sk_logit(v[k], t.least);
                const real p = exps == SK_REUSE ? e[kept + k] : sk_exp_of(a - hu[k], &t);
                const real q = sk_exp_of(b - hv[k], &t_v);
                const real y = sk_log_ratio(form, a, b, gap, &t, &t_v);
                const sk_compared of = sk_compare(p, q, y);
                if (exps == SK_KEEP) e[kept + k] = p;
                p_[k] += p;
                q_[k] += q;
                d_[k] += of.diff;
                if (wanted != SK_ONLY_DL) gq_[k] += of.gq;
                if (wanted == SK_BOTH_KL) dy_[k] += of.diff * y;
            }
        }
    }
    sk_add_lanes(r, g, p_, m->sum[SK_P]);
    sk_add_lanes(r, g, q_, m->sum[SK_Q]);
    sk_add_lanes(r, g, d_, m->sum[SK_D]);
    if (wanted != SK_ONLY_DL) sk_add_lanes(r, g, gq_, m->sum[SK_GQ]);
    if (wanted == SK_BOTH_KL) sk_add_lanes(r, g, dy_, m->sum[SK_DY]);
}

/* ---- from sums to divergences ---- */

/* log-ratio dl, KL(p||q) (if both are wanted) and KL(q||p). Both KL are NaN where they lost too
 * many digits. The bounds were found in 80 bits, over rows of 100 classes (tests/test_kl.c): h(r)
 * takes most of gp or gq away: KL is off by 2.1e-6 where a sixth is left, by 3.9e-6 where an eighth
 * is. u - v is rounded, by 2^-25 of the gap, which is to be small against the spread of y, sqrt(2
 * KL): KL is off by 1.8e-6 at gap^2 = 512 KL, by 3.7e-6 at 4000 KL. GP is the difference of DY and
 * GQ, which is large where Q is far larger than P, and KL(p||q) may be a part of GP: it is off by
 * 3.2e-6 at most within both bounds, by 1.4e-5 without. u/T and v/T' are rounded in double, by
 * 2^-53 of SK_FAR_LSE at most. */
typedef struct sk_concluded {
    double dl, kl_pq, kl_qp;
} sk_concluded;

/* hu/T - hv/T' */
static inline double sk_gap(enum sk_form form, const sk_comparison *m, int64_t i, const sk_scale *t,
                            const sk_scale *t_v) {
    return form == SK_APART ? m->hu[i] * t->per_T - m->hv[i] * t_v->per_T
                            : ((double)m->hu[i] - m->hv[i]) * t->per_T;
}

static inline sk_concluded sk_conclude(enum sk_form form, bool both, const sk_comparison *m,
                                       int64_t i, const sk_scale *t, const sk_scale *t_v) {
    const double p = m->sum[SK_P][i], per_q = 1 / m->sum[SK_Q][i], d = m->sum[SK_D][i];
    const double gap = sk_gap(form, m, i, t, t_v);
    const double r =
        d * per_q; /* 1 + r is P/Q, and agrees with r in its errors, unless it cancels */
    const double h = sk_log_gap(r, sk_log(r > -0.5 ? 1 + r : p * per_q));
    const double sum_gq = m->sum[SK_GQ][i], sum_gp = m->sum[SK_DY][i] - sum_gq;
    const double gq = sum_gq * per_q, kl_qp = gq - h;
    const double gp = both ? sum_gp / p : gq;
    const double kl_pq = both ? gp - (r * d / p - h) : kl_qp;
    const double least = kl_pq < kl_qp ? kl_pq : kl_qp;
    const double most = kl_pq < kl_qp ? kl_qp : kl_pq;
    const double large = fabs(m->hu[i] * t->per_T) + fabs(m->hv[i] * t_v->per_T);
    const bool exact_gp = (sum_gq <= 8 * sum_gp) & (sum_gq <= 16 * kl_pq * p);
    const bool good = (gp <= 6 * kl_pq) & (gq <= 6 * kl_qp) & (most < SK_LARGE_KL) &
                      (!both | exact_gp) & ((form != SK_PLAIN) | (gap * gap <= 512 * least)) &
                      ((form != SK_APART) | (large < SK_FAR_LSE));
    return (sk_concluded){gap + (r - h), good ? kl_pq : (double)NAN, good ? kl_qp : (double)NAN};
}

/* log P, to the precision of its sum. */
static inline real sk_level(const sk_comparison *m, int64_t i) {
    return sk_log_of((real)m->sum[SK_P][i]);
}
