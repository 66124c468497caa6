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
 * digits; those who would lose too many say so (sk_needs_care). */
#pragma once
#include "cpu/core/chunk.h"

typedef struct sk_scale {
    double T;
    real inverse_T, log2e_T, lowest; /* x log2e_T = -127 at x = lowest */
} sk_scale;

static inline sk_scale sk_scale_of(double T) {
    const real log2e_T = (real)(SK_LOG2E / T);
    return (sk_scale){T, (real)(1 / T), log2e_T, -127 / log2e_T};
}

/* e^(x/T) */
static inline real sk_exp_of(real x, const sk_scale *t) {
    return sk_exp2_scaled(x, t->log2e_T, t->lowest);
}

/* (u - v - gap)/T. The exact form is right to the last digits however large the gap; the other is
 * as long as the result is not much smaller than the gap. Equal logits, infinities included, give
 * -gap/T: exactly 0 when there is none. */
static inline real sk_log_ratio(bool exact, real u, real v, sk_split gap, const sk_scale *t) {
    if (exact) return sk_difference(u, v, gap) * t->inverse_T;
    const real apart = u == v ? 0 : u - v;
    return (apart - gap.high) * t->inverse_T;
}

/* Whether a row's KL, and its gradient, need the exact form: the rounding of u - v, 2^-25 of the
 * gap, is to be small against the spread of y, sqrt(2 KL). */
static inline bool sk_needs_exact(double gap_T, double forward, double reverse) {
    const double least = forward < reverse ? forward : reverse;
    return !(gap_T * gap_T <= 512 * least);
}

typedef struct sk_compared {
    real diff, gq;
} sk_compared;

/* By series where y is small, so that nothing cancels; with e^y = p/q elsewhere, so that nothing
 * overflows. */
static inline sk_compared sk_compare(real p, real q, real y) {
    const real qy = q * y, rest = qy * y * sk_exp_rest(y), far_diff = p - q;
    const bool near = y < 1 && y > -1;
    return (sk_compared){near ? qy + rest : far_diff, near ? rest : far_diff - qy};
}

/* h(r) = r - log(1 + r), given log(1 + r) for an r that is not small: log(1 + r) = 2 atanh(s). */
static inline double sk_log_gap(double r, double log1p_r) {
    const double s = r / (2 + r), z = s * s;
    double series = 1.0 / 15;
    series = series * z + 1.0 / 13;
    series = series * z + 1.0 / 11;
    series = series * z + 1.0 / 9;
    series = series * z + 1.0 / 7;
    series = series * z + 1.0 / 5;
    series = series * z + 1.0 / 3;
    return r < 0.1 && r > -0.1 ? s * (r - 2 * z * series) : r - log1p_r;
}
