/* The sums of two rows of logits that log-sum-exps and their difference follow from, with a
 * temperature for each side: one visit leaves them to some 1e-7, one more leaves the difference to
 * that of itself. */
#pragma once
#include "cpu/core/pair.h"

/* Logits of shape (N, C, S), their temperatures, and how log-ratios are found. */
typedef struct sk_two_logits {
    const sk_arg *u, *v;
    sk_scale t, t_v;
    enum sk_form form;
} sk_two_logits;

static inline sk_two_logits sk_two_logits_of(const sk_arg *u, const sk_arg *v, double T,
                                             double T_v) {
    return (sk_two_logits){u, v, sk_scale_of(T), sk_scale_of(T_v), T == T_v ? SK_EXACT : SK_APART};
}

/* The largest logits of each row, and what the other side has in that class. */
typedef struct sk_tops {
    SK_ALIGNED real u[SK_PITCH], v_there[SK_PITCH], v[SK_PITCH], u_there[SK_PITCH];
} sk_tops;

/* Raises `top` to the largest of a row's lanes, and takes what the first such lane has with it. */
static inline void sk_raise_row(const real *lane, const real *with, real *top, real *with_top) {
    real largest = *top;
    int first = SK_LANES;
#pragma omp simd reduction(max : largest)
    for (int k = 0; k < SK_LANES; k++) largest = lane[k] > largest ? lane[k] : largest;
    if (!(largest > *top)) return;
#pragma omp simd reduction(min : first)
    for (int k = 0; k < SK_LANES; k++) first = lane[k] == largest && k < first ? k : first;
    *top = largest;
    *with_top = with[first];
}

/* Raises the tops of lanes to a vector of u and of v. */
SK_SPECIAL void sk_raise_lanes(const real *u, const real *v, real *top_u, real *with_u, real *top_v,
                               real *with_v) {
#pragma omp simd
    for (int k = 0; k < SK_LANES; k++) {
        const real a = u[k], b = v[k];
        with_u[k] = a > top_u[k] ? b : with_u[k];
        top_u[k] = a > top_u[k] ? a : top_u[k];
        with_v[k] = b > top_v[k] ? a : with_v[k];
        top_v[k] = b > top_v[k] ? b : top_v[k];
    }
}

/* Raises them to those of a group of lanes. */
static inline void sk_raise_pair(const sk_task *r, sk_vectors u, sk_vectors v, int64_t g,
                                 sk_tops *x) {
    const int64_t pitch = sk_pitch(r);
    real top_u[SK_LANES], with_u[SK_LANES], top_v[SK_LANES], with_v[SK_LANES];
    sk_to_lanes(r, g, x->u, top_u);
    sk_to_lanes(r, g, x->v_there, with_u);
    sk_to_lanes(r, g, x->v, top_v);
    sk_to_lanes(r, g, x->u_there, with_v);
    const int64_t whole = sk_min(u.whole, v.whole);
    for (int64_t i = 0; i < whole; i++)
        sk_raise_lanes(u.first + i * pitch, v.first + i * pitch, top_u, with_u, top_v, with_v);
    if (whole < u.depth) sk_raise_lanes(u.last, v.last, top_u, with_u, top_v, with_v);
    if (r->positions) {
        const int64_t i = g * SK_LANES;
#pragma omp simd
        for (int k = 0; k < SK_LANES; k++) {
            x->u[i + k] = top_u[k];
            x->v_there[i + k] = with_u[k];
            x->v[i + k] = top_v[k];
            x->u_there[i + k] = with_v[k];
        }
        return;
    }
    sk_raise_row(top_u, with_u, &x->u[g], &x->v_there[g]);
    sk_raise_row(top_v, with_v, &x->v[g], &x->u_there[g]);
}

/* A group of lanes of the tile from class c. */
static inline sk_two_tiles sk_two_tiles_of(const sk_task *r, const sk_two_logits *x, sk_vectors u,
                                           sk_vectors v, int64_t c, int64_t g) {
    return (sk_two_tiles){u, v, sk_next_tile(r, x->u, g, c), sk_next_tile(r, x->v, g, c), g, NULL};
}

/* Adds a group of lanes to P and Q; asks for the next ones. */
SK_SPECIAL void sk_add_to_sums(const sk_task *r, const sk_two_logits *x, const sk_two_tiles *at,
                               sk_comparison *m) {
    const sk_scale t = x->t, t_v = x->t_v;
    const sk_ahead next_u = at->next_u, next_v = at->next_v;
    const sk_vectors of_u = at->u, of_v = at->v;
    const int64_t pitch = sk_pitch(r), g = at->g;
    real hu[SK_LANES], hv[SK_LANES], p[SK_LANES] = {0}, q[SK_LANES] = {0};
    sk_to_lanes(r, g, m->hu, hu);
    sk_to_lanes(r, g, m->hv, hv);
    for (int64_t i = 0, end = sk_min(of_u.whole, of_v.whole); i < of_u.depth; end = of_u.depth) {
        const real *u = sk_part(of_u, i), *v = sk_part(of_v, i);
        for (; i < end; i++, u += pitch, v += pitch) {
            sk_fetch(next_u, i);
            sk_fetch(next_v, i);
#pragma omp simd
            for (int k = 0; k < SK_LANES; k++) {
                p[k] += sk_exp_of(u[k] - hu[k], &t);
                q[k] += sk_exp_of(v[k] - hv[k], &t_v);
            }
        }
    }
    sk_add_lanes(r, g, p, m->sum[SK_P]);
    sk_add_lanes(r, g, q, m->sum[SK_Q]);
}

/* Raises anchors to the tops, and moves the sums against them. */
static inline void sk_move_anchors(const sk_task *r, const sk_scale *t, const real *top, real *h,
                                   double *sum) {
    const sk_scale scale = *t;
#pragma omp simd
    for (int64_t i = 0; i < sk_scalars(r); i++) {
        const real now = sk_logit(top[i], scale.least);
        sum[i] *= sk_exp_of(h[i] - now, &scale);
        h[i] = now;
    }
}

/* The first visit to the logits of a task: tops, and P and Q against them. */
static inline void sk_sum_pair(const sk_task *r, const sk_two_logits *x, sk_tops *tops,
                               sk_comparison *m) {
    SK_ALIGNED real tile[2][SK_TILE];
    sk_vectors u[SK_GROUPS], v[SK_GROUPS];
    const int64_t step = sk_tile_classes(r);
    sk_clear_sums(r, m);
    for (int64_t i = 0; i < sk_scalars(r); i++) {
        tops->u[i] = tops->v[i] = m->hu[i] = m->hv[i] = -INFINITY;
        tops->u_there[i] = tops->v_there[i] = 0;
    }
    for (int64_t c = 0; c < r->C; c += step) {
        const int64_t classes = sk_min(step, r->C - c);
        sk_load_tile(r, x->u, c, classes, tile[0], u);
        sk_load_tile(r, x->v, c, classes, tile[1], v);
        for (int64_t g = 0; g < r->groups; g++) sk_raise_pair(r, u[g], v[g], g, tops);
        sk_move_anchors(r, &x->t, tops->u, m->hu, m->sum[SK_P]);
        sk_move_anchors(r, &x->t_v, tops->v, m->hv, m->sum[SK_Q]);
        for (int64_t g = 0; g < r->groups; g++) {
            const sk_two_tiles tiles = sk_two_tiles_of(r, x, u[g], v[g], c, g);
            sk_add_to_sums(r, x, &tiles, m);
        }
    }
    for (int64_t i = 0; i < sk_scalars(r); i++) {
        m->hu[i] = sk_anchor(tops->u[i]);
        m->hv[i] = sk_anchor(tops->v[i]);
    }
}

/* One more visit, for the sums against these anchors that dl follows from. */
static inline void sk_sum_differences(const sk_task *r, const sk_two_logits *x, sk_comparison *m) {
    SK_ALIGNED real tile[2][SK_TILE];
    sk_vectors u[SK_GROUPS], v[SK_GROUPS];
    const int64_t step = sk_tile_classes(r);
    sk_clear_sums(r, m);
    for (int64_t c = 0; c < r->C; c += step) {
        const int64_t classes = sk_min(step, r->C - c);
        sk_load_tile(r, x->u, c, classes, tile[0], u);
        sk_load_tile(r, x->v, c, classes, tile[1], v);
        for (int64_t g = 0; g < r->groups; g++) {
            const sk_two_tiles tiles = sk_two_tiles_of(r, x, u[g], v[g], c, g);
            if (x->form == SK_EXACT)
                sk_compare_group(SK_EXACT, SK_ONLY_DL, SK_FRESH, r, &x->t, &x->t_v, &tiles, m);
            else
                sk_compare_group(SK_APART, SK_ONLY_DL, SK_FRESH, r, &x->t, &x->t_v, &tiles, m);
        }
    }
}

/* Leaves lse and dl of each row: dl by the difference D where it has been summed up. */
static inline void sk_set_sums(const sk_task *r, const sk_two_logits *of, const sk_comparison *m,
                               bool differences, sk_found to) {
    for (int64_t i = 0; i < sk_scalars(r); i++) {
        const double P = m->sum[SK_P][i], Q = m->sum[SK_Q][i], d = m->sum[SK_D][i] / Q;
        const double log_p = sk_log(P), gap = sk_gap(of->form, m, i, &of->t, &of->t_v);
        const double log_ratio =
            differences && d > -0.5 ? d - sk_log_gap(d, sk_log(1 + d)) : log_p - sk_log(Q);
        to[SK_LSE][i] = i < r->width ? m->hu[i] * of->t.per_T + log_p : 0;
        to[SK_DL][i] = i < r->width ? gap + log_ratio : 0;
    }
}
