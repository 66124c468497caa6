/* Rows of two live logits, "pairs": both KL divergences and the gradients of either side. What kl.h
 * leaves open (rows that lose digits, are far apart, or hold infinities or NaN) is settled here.
 *
 * Forward visits the logits twice (largest logits; sums that both KL follow from), backward once.
 */
#pragma once
#include "cpu/core/kl.h"
#include "cpu/core/run.h"

/* Logits of shape (N, C, S) and their temperature. */
typedef struct sk_pair {
    const sk_arg *u, *v;
    sk_scale t;
} sk_pair;

/* What is found of a row, and saved for backward: lse(u/T), and what it lies above lse(v/T); both
 * KL.
 */
enum { SK_LSE, SK_DL, SK_KL_PQ, SK_KL_QP };

/* Rows with a KL beyond this are computed in double (careful_*): in float, d would be too coarse
 * for d - KL. */
enum { SK_FAR = 64 };

static inline sk_divergence sk_found_row(sk_found x, int64_t i) {
    return (sk_divergence){x[SK_LSE][i], x[SK_DL][i], x[SK_KL_PQ][i], x[SK_KL_QP][i]};
}

static inline bool sk_is_ordinary(sk_divergence x, double factor) {
    return (x.kl_pq < SK_FAR) & (x.kl_qp < SK_FAR) & (fabs(x.lse_u) < SK_FAR_LSE) &
           (fabs(x.dl) < SK_FAR_LSE) & !sk_is_far_factor(factor);
}

/* Both KL by their weights: a direction of weight 0 may be infinite. */
static inline double sk_weighted_kl(sk_found x, int64_t i, double pq, double qp) {
    return (pq != 0 ? pq * x[SK_KL_PQ][i] : 0) + (qp != 0 ? qp * x[SK_KL_QP][i] : 0);
}

/* ---- Forward ---- */

/* The results that follow from the sums; NaN as KL(p||q) of a row that is not good. */
SK_SPECIAL void sk_conclude_pair(enum sk_form form, const sk_task *r, const sk_scale *scale,
                                 const sk_comparison *m, sk_found to) {
    const sk_scale t = *scale;
#pragma omp simd
    for (int64_t i = 0; i < r->width; i++) {
        const sk_concluded x = sk_conclude(form, true, m, i, &t, &t);
        const bool near = (x.kl_pq < SK_FAR) & (x.kl_qp < SK_FAR);
        to[SK_DL][i] = x.dl;
        to[SK_KL_PQ][i] = near ? x.kl_pq : (double)NAN;
        to[SK_KL_QP][i] = x.kl_qp;
    }
#pragma omp simd
    for (int64_t i = 0; i < r->width; i++) to[SK_LSE][i] = m->hu[i] * t.per_T + sk_level(m, i);
}

/* Both visits to a task's logits, the first of them for the anchors: only for the PLAIN form. */
static inline void sk_compare_pair(enum sk_form form, const sk_task *r, const sk_pair *pair,
                                   sk_comparison *m) {
    SK_ALIGNED real tile[2][SK_TILE];
    const sk_arg *logits[2] = {pair->u, pair->v};
    const sk_scale *const t = &pair->t;
    sk_vectors x[2][SK_GROUPS];
    real *top[2] = {m->hu, m->hv};
    const int64_t step = sk_tile_classes(r);
    for (int64_t c = 0; c < r->C; c += step) {
        const int64_t classes = sk_min(step, r->C - c);
        for (int i = 0; i < 2; i++) {
            sk_load_tile(r, logits[i], c, classes, tile[i], x[i]);
            for (int64_t g = 0; g < r->groups && form == SK_PLAIN; g++)
                sk_raise(r, x[i][g], g, top[i]);
        }
    }
    for (int64_t i = 0; i < sk_scalars(r) && form == SK_PLAIN; i++) {
        m->hu[i] = sk_anchor(m->hu[i]);
        m->hv[i] = sk_anchor(m->hv[i]);
    }
    for (int64_t c = 0; c < r->C; c += step) {
        for (int i = 0; i < 2 && r->C > step; i++)
            sk_load_tile(r, logits[i], c, sk_min(step, r->C - c), tile[i], x[i]);
        for (int64_t g = 0; g < r->groups; g++) {
            const sk_two_tiles tiles = {
                x[0][g], x[1][g], sk_next_tile(r, pair->u, g, c), sk_next_tile(r, pair->v, g, c),
                g,       NULL};
            if (form == SK_PLAIN)
                sk_compare_group(SK_PLAIN, SK_BOTH_KL, SK_FRESH, r, t, t, &tiles, m);
            else
                sk_compare_group(SK_EXACT, SK_BOTH_KL, SK_FRESH, r, t, t, &tiles, m);
        }
    }
}

/* Compares again, in the exact form and against T lse, what the first results left open. Rows that
 * differ by a constant keep their anchors: against them they differ by exactly 0. */
static inline void sk_compare_pair_again(const sk_task *r, const sk_pair *x, sk_comparison *m,
                                         sk_found to) {
    SK_ALIGNED sk_found again;
    sk_clear_sums(r, m);
    for (int64_t i = 0; i < r->width; i++) {
        if (to[SK_DL][i] == sk_gap(SK_EXACT, m, i, &x->t, &x->t)) continue;
        m->hu[i] = (real)(to[SK_LSE][i] * x->t.T);
        m->hv[i] = (real)((to[SK_LSE][i] - to[SK_DL][i]) * x->t.T);
    }
    sk_compare_pair(SK_EXACT, r, x, m);
    sk_conclude_pair(SK_EXACT, r, &x->t, m, again);
    for (int64_t i = 0; i < r->width; i++) {
        const bool open = isnan(to[SK_KL_PQ][i]);
        for (int k = 0; k < SK_SAVED && open; k++) to[k][i] = again[k][i];
    }
}

/* Leaves both KL of rows whose weight is not 0, and what their gradients need. */
SK_OUTLINE void sk_diverge(const sk_task *r, const sk_pair *x, const real *weight, sk_found to) {
    sk_comparison m;
    sk_clear_sums(r, &m);
    for (int64_t i = 0; i < sk_scalars(r); i++) m.hu[i] = m.hv[i] = -INFINITY;
    sk_compare_pair(SK_PLAIN, r, x, &m);
    sk_conclude_pair(SK_PLAIN, r, &x->t, &m, to);
    int64_t open = 0;
    for (int64_t i = 0; i < r->width; i++) open += weight[i] != 0 && isnan(to[SK_KL_PQ][i]);
    if (open == 0) return;
    sk_compare_pair_again(r, x, &m, to);
    for (int64_t i = 0; i < r->width; i++) {
        if (weight[i] == 0 || !isnan(to[SK_KL_PQ][i])) continue;
        const sk_row_pair both = sk_row_pair_of(r, x->u, x->v, x->t.T, x->t.T, i);
        const sk_divergence row = sk_divergence_of(&both);
        to[SK_LSE][i] = row.lse_u;
        to[SK_DL][i] = row.dl;
        to[SK_KL_PQ][i] = row.kl_pq;
        to[SK_KL_QP][i] = row.kl_qp;
    }
}

/* ---- Backward ---- */

/* What the gradients of a row need: p = SK_U_FACTOR e^((u - SK_U_SHIFT)/T) and q likewise, both
 * times the row's factor (0: no gradient); d = (u - v - gap)/T, EXACTLY (1) or, in a row that is
 * close (0), well enough without the low parts; both KL, times what their first terms weigh. */
enum {
    SK_U_SHIFT,
    SK_U_FACTOR,
    SK_V_SHIFT,
    SK_V_FACTOR,
    SK_GAP_HIGH,
    SK_GAP_LOW,
    SK_EXACTLY,
    SK_TERM_PQ,
    SK_TERM_QP,
    SK_PAIR_SCALARS
};
typedef real sk_pair_scalars[SK_PAIR_SCALARS][SK_PITCH];

/* What both KL weigh, and what of their first terms stays: nothing if the target is detached. */
typedef struct sk_term_weights {
    real pq, qp, target_pq, target_qp;
} sk_term_weights;

static inline sk_term_weights sk_term_weights_of(double pq, double qp, bool detach) {
    return (sk_term_weights){(real)pq, (real)qp, detach ? 0 : (real)pq, detach ? 0 : (real)qp};
}

/* A class of logits u and v of row i: p and q times the row's factor, d = log p - log q, and p - q,
 * of which nothing cancels. Where the row is close, less work leaves the same. */
typedef struct sk_pair_terms {
    real p, q, d, p_q;
} sk_pair_terms;

SK_SPECIAL sk_pair_terms sk_pair_at(bool close, const sk_scale *t, sk_pair_scalars m, int64_t i,
                                    real u, real v) {
    const real a = sk_logit(u, t->least), b = sk_logit(v, t->least);
    const real p = m[SK_U_FACTOR][i] * sk_exp_of(a - m[SK_U_SHIFT][i], t);
    const real q = m[SK_V_FACTOR][i] * sk_exp_of(b - m[SK_V_SHIFT][i], t);
    const sk_split gap = {m[SK_GAP_HIGH][i], m[SK_GAP_LOW][i]};
    const real d = close ? sk_log_ratio(SK_PLAIN, a, b, gap, t, t)
                         : sk_difference(a, b, gap, m[SK_EXACTLY][i]) * t->inverse_T;
    return (sk_pair_terms){p, q, d, d * d < (real)0.25 ? q * sk_expm1(d) : p - q};
}

/* The gradients of a run of u and v, of rows at positions or of one row. */
SK_SPECIAL void sk_pair_run_of(bool positions, bool close, const sk_scale *scale, sk_term_weights w,
                               sk_pair_scalars m, const sk_slice *at) {
    const sk_scale t = *scale;
    const real *const u = at->x[0], *const v = at->x[1];
    const sk_ahead next_u = sk_next_of(at, 0), next_v = sk_next_of(at, 1);
    real *restrict const grad_u = at->to[0], *restrict const grad_v = at->to[1];
    for (int64_t n = 0; n < at->run.n; n += SK_LANES) {
        sk_fetch(next_u, n / SK_LANES);
        sk_fetch(next_v, n / SK_LANES);
#pragma omp simd
        for (int k = 0; k < SK_LANES; k++) {
            const int64_t i = positions ? at->run.row + n + k : at->run.row;
            const sk_pair_terms x = sk_pair_at(close, &t, m, i, u[n + k], v[n + k]);
            const real to_u = x.p * (w.target_pq * x.d - m[SK_TERM_PQ][i]) + w.qp * x.p_q;
            const real to_v = -x.q * (w.target_qp * x.d + m[SK_TERM_QP][i]) - w.pq * x.p_q;
            grad_u[n + k] = m[SK_U_FACTOR][i] != 0 ? to_u : 0;
            grad_v[n + k] = m[SK_U_FACTOR][i] != 0 ? to_v : 0;
        }
    }
}

/* What a pass over the runs of a task needs. */
typedef struct sk_pair_slopes {
    const sk_scale *t;
    sk_term_weights w;
    bool all_close; /* as sk_set_pair() found */
    SK_ALIGNED sk_pair_scalars of;
} sk_pair_slopes;

/* Leaves the gradients of a run. Where all of its rows are close, less work leaves the same. */
SK_OUTLINE void sk_pair_run(void *context, const sk_slice *at) {
    sk_pair_slopes *const k = context;
    real(*const m)[SK_PITCH] = k->of;
    const bool positions = at->r->positions;
    const bool close = positions ? k->all_close : m[SK_EXACTLY][at->run.row] == 0;
    if (positions && close)
        sk_pair_run_of(true, true, k->t, k->w, m, at);
    else if (positions)
        sk_pair_run_of(true, false, k->t, k->w, m, at);
    else if (close)
        sk_pair_run_of(false, true, k->t, k->w, m, at);
    else
        sk_pair_run_of(false, false, k->t, k->w, m, at);
}

/* The gradient of a row that is far or holds infinities or NaN: terms of weight 0 are left out, 0
 * log 0 = 0. */
SK_RARE void sk_careful_gradient(const sk_task *r, const sk_pair *x, int64_t i, sk_divergence row,
                                 double factor, sk_term_weights w, const sk_arg *const *to) {
    const sk_row_pair found = sk_row_pair_of(r, x->u, x->v, x->t.T, x->t.T, i);
    const sk_row_pair both = sk_row_pair_within(found, row.lse_u, row.dl);
    for (int64_t c = 0; c < r->C; c++) {
        const sk_class_terms k = sk_class_of(&both, c);
        const double kl_pq = k.no_p && !isnan(row.kl_pq) ? 0 : k.p * (k.d - row.kl_pq);
        const double kl_qp = k.no_q && !isnan(row.kl_qp) ? 0 : k.q * (k.d + row.kl_qp);
        double to_u = 0, to_v = 0;
        if (w.target_pq != 0) to_u += w.target_pq * kl_pq;
        if (w.qp != 0) to_u += w.qp * (k.p - k.q);
        if (w.target_qp != 0) to_v -= w.target_qp * kl_qp;
        if (w.pq != 0) to_v -= w.pq * (k.p - k.q);
        sk_store_wanted(r, to[0], i, c, (real)(factor * to_u));
        sk_store_wanted(r, to[1], i, c, (real)(factor * to_v));
    }
}

/* Sets what sk_pair_at() needs of row i, but EXACTLY. */
SK_SPECIAL void sk_set_sides(const sk_scale *t, const sk_scale *t_v, double lse, double dl,
                             double factor, int64_t i, sk_pair_scalars m) {
    const double u = lse * t->T, v = (lse - dl) * t_v->T;
    const sk_split gap = sk_split_of(dl * t->T);
    m[SK_U_SHIFT][i] = (real)u;
    m[SK_V_SHIFT][i] = (real)v;
    m[SK_U_FACTOR][i] = (real)factor * sk_exp_of((real)((real)u - u), t);
    m[SK_V_FACTOR][i] = (real)factor * sk_exp_of((real)((real)v - v), t_v);
    m[SK_GAP_HIGH][i] = gap.high;
    m[SK_GAP_LOW][i] = gap.low;
}

/* Leaves what the gradients of rows need, whose KL are in x: t and w are there. A row is close if
 * its gap is small against the spread of d, sqrt(2 KL): up to twice as large, the low parts of the
 * gap and of u - v are 2.5e-7 of the spread, as much as other roundings (tests/test_kl.c). */
static inline void sk_set_pair(const sk_task *r, sk_found x, const double *factor,
                               sk_pair_slopes *to) {
    const sk_scale *const t = to->t;
    const sk_term_weights w = to->w;
    real(*const m)[SK_PITCH] = to->of, apart = 0;
#pragma omp simd reduction(+ : apart)
    for (int64_t i = 0; i < sk_scalars(r); i++) {
        const double least = x[SK_KL_PQ][i] < x[SK_KL_QP][i] ? x[SK_KL_PQ][i] : x[SK_KL_QP][i];
        const real exactly = x[SK_DL][i] * x[SK_DL][i] <= 8 * least ? 0 : 1;
        sk_set_sides(t, t, x[SK_LSE][i], x[SK_DL][i], factor[i], i, m);
        m[SK_EXACTLY][i] = exactly;
        m[SK_TERM_PQ][i] = w.target_pq * (real)x[SK_KL_PQ][i];
        m[SK_TERM_QP][i] = w.target_qp * (real)x[SK_KL_QP][i];
        apart += exactly;
    }
    to->all_close = apart == 0;
}
