/* A row by itself, class by class, in double: the plainest way to its results, whatever its logits
 * are. Read it first; the tiles of kl.h give the same faster, and rows for which they do not come
 * back here. */
#pragma once
#include "core/side.h"
#include "cpu/core/task.h"

/* Class c of row i; of probabilities the logarithm. */
static inline double sk_logit_at(const sk_task *r, const sk_arg *x, bool probs, int64_t i,
                                 int64_t c) {
    const double z = sk_load_one(x, sk_class_at(r, x, i, c));
    return probs ? log(z) : z;
}

SK_RARE sk_side sk_side_of(const sk_task *r, const sk_arg *x, bool probs, double T, int64_t i) {
    double top = -INFINITY, sum = 0;
    for (int64_t c = 0; c < r->C; c++) top = fmax(top, sk_logit_at(r, x, probs, i, c));
    for (int64_t c = 0; c < r->C; c++) {
        const double z = sk_logit_at(r, x, probs, i, c);
        sum += z == -INFINITY ? 0 : exp((z - top) / T);
    }
    return (sk_side){top, log(sum)};
}

/* What rounding leaves of a number that was saved: see sk_whole_side. */
#define SK_ROUNDED (sizeof(real) == 8 ? 4 * DBL_EPSILON : 1e-6)

/* ---- two rows of logits ---- */

/* Row i of u and v, and their sides. */
typedef struct sk_row_pair {
    const sk_task *r;
    const sk_arg *u, *v;
    double T, T_v;
    int64_t i;
    sk_side of_u, of_v;
} sk_row_pair;

SK_RARE sk_row_pair sk_row_pair_of(const sk_task *r, const sk_arg *u, const sk_arg *v, double T,
                                   double T_v, int64_t i) {
    return (sk_row_pair){
        r, u, v, T, T_v, i, sk_side_of(r, u, false, T, i), sk_side_of(r, v, false, T_v, i)};
}

/* As a part of the row of which lse(u/T) and dl were saved. */
static inline sk_row_pair sk_row_pair_within(sk_row_pair x, double lse_u, double dl) {
    x.of_u = sk_side_within(x.of_u, x.T, lse_u, 0, SK_ROUNDED);
    x.of_v = sk_side_within(x.of_v, x.T_v, lse_u, dl, SK_ROUNDED);
    return x;
}

static inline bool sk_is_finite_pair(const sk_row_pair *x) {
    return sk_is_finite_side(x->of_u) && sk_is_finite_side(x->of_v);
}

/* What lse(u/T) lies above lse(v/T'); of a side of nothing but -inf, what the contracts say. */
static inline double sk_log_ratio_of_sums(const sk_row_pair *x) {
    const double lse_u = sk_lse_of(x->of_u, x->T), lse_v = sk_lse_of(x->of_v, x->T_v);
    if (!sk_is_finite_pair(x)) return lse_u == -INFINITY ? lse_v : lse_u - lse_v;
    if (x->T != x->T_v) return lse_u - lse_v;
    return (x->of_u.top - x->of_v.top) / x->T + (x->of_u.log_sum - x->of_v.log_sum);
}

/* A class of them: p, q and d = log p - log q. */
typedef struct sk_class_terms {
    double p, q, d;
    bool no_p, no_q; /* u, v infinite */
} sk_class_terms;

static inline sk_class_terms sk_class_of(const sk_row_pair *x, int64_t c) {
    const double u = sk_logit_at(x->r, x->u, false, x->i, c);
    const double v = sk_logit_at(x->r, x->v, false, x->i, c);
    return (sk_class_terms){exp(sk_log_p(u, x->T, x->of_u)), exp(sk_log_p(v, x->T_v, x->of_v)),
                            sk_log_ratio_of(u, v, x->T, x->T_v, x->of_u, x->of_v), isinf(u),
                            isinf(v)};
}

/* lse(u/T), and what it lies above lse(v/T'); both KL. */
typedef struct sk_divergence {
    double lse_u, dl, kl_pq, kl_qp;
} sk_divergence;

/* The divergence of a row, with 0 log 0 = 0. Both KL are NaN for a row with a NaN or a side of
 * nothing but -inf, whose other results are those of the contract (ops/sd_dropout_kl.h). */
SK_RARE sk_divergence sk_divergence_of(const sk_row_pair *x) {
    const double lse_u = sk_lse_of(x->of_u, x->T), dl = sk_log_ratio_of_sums(x);
    if (!sk_is_finite_pair(x)) return (sk_divergence){lse_u, dl, NAN, NAN};
    sk_divergence row = {lse_u, dl, 0, 0};
    for (int64_t c = 0; c < x->r->C; c++) {
        const sk_class_terms k = sk_class_of(x, c);
        if (k.no_p && k.no_q) continue;
        const double diff = k.p - k.q, dd = k.d * k.d;
        const bool near = fabs(k.d) < 0.5; /* as in kl.h: nothing cancels */
        row.kl_pq += k.no_p   ? k.q
                     : k.no_q ? INFINITY
                     : near   ? k.p * dd * sk_exp_rest(-(real)k.d)
                              : k.p * k.d - diff;
        row.kl_qp += k.no_q   ? k.p
                     : k.no_p ? INFINITY
                     : near   ? k.q * dd * sk_exp_rest((real)k.d)
                              : diff - k.q * k.d;
    }
    return row;
}
