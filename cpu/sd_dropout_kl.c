/* SD-Dropout on the CPU: see ops/sd_dropout_kl.h for the formula, cpu/core/kl.h for the numerics,
 * cpu/core/chunk.h for rows, groups of lanes, tiles and runs.
 *
 * Forward visits the logits twice (largest logits; sums that both KL follow from), backward once.
 */
#include "sd_dropout_kl.h"
#include "cpu/core/chunk.h"
#include "cpu/core/kernel.h"
#include "cpu/core/kl.h"
#include "cpu/core/math.h"
#include "cpu/core/reduce.h"

SK_PARAMS(sd_dropout_kl)
SK_PARAMS(sd_dropout_kl_backward)
typedef struct sd_dropout_kl_params forward_params;
typedef struct sd_dropout_kl_backward_params backward_params;

enum { U, V };

/* Per row, as saved for backward. */
typedef struct results {
    SK_ALIGNED double lse[SK_PITCH], dl[SK_PITCH], forward[SK_PITCH], reverse[SK_PITCH];
} results;

/* Rows with a KL beyond this are computed in double (careful_*): in float, d would be too coarse
 * for d - KL. */
enum { FAR = 64 };

static inline bool is_ordinary(double forward, double reverse) {
    return forward < FAR && reverse < FAR;
}

/* ---- A row in double, class by class ---- */

typedef struct saved_row {
    double lse_u, dl, forward, reverse;
} saved_row;

/* Class c of row i of both logits, over T: p, q and d = log p - log q. */
typedef struct class_terms {
    double p, q, d;
    bool no_p, no_q; /* u, v infinite */
} class_terms;

static class_terms class_of(const sk_rows *r, const sk_arg *u, const sk_arg *v, double T,
                            saved_row row, int64_t i, int64_t c) {
    const double a = sk_load_one(u, sk_class_at(r, u, i, c)) / T,
                 b = sk_load_one(v, sk_class_at(r, v, i, c)) / T;
    return (class_terms){exp(a - row.lse_u), exp(b - (row.lse_u - row.dl)), a - b - row.dl,
                         isinf(a), isinf(b)};
}

/* Both KL of a row that is far or holds infinities, with 0 log 0 = 0; NaN for a row with a NaN or
 * nothing but -inf. */
static void careful_divergence(const forward_params *p, const sk_rows *r, int64_t i,
                               saved_row *row) {
    double sum_p = 0, sum_q = 0; /* 1, but for the float rounding of lse */
    for (int64_t c = 0; c < r->C; c++) {
        const class_terms k = class_of(r, &p->u, &p->v, p->temperature, *row, i, c);
        sum_p += k.p;
        sum_q += k.q;
    }
    row->lse_u += log(sum_p);
    row->dl += log(sum_p / sum_q);
    row->forward = row->reverse = 0 * (row->lse_u + row->dl);
    for (int64_t c = 0; c < r->C; c++) {
        const class_terms k = class_of(r, &p->u, &p->v, p->temperature, *row, i, c);
        if (k.no_p && k.no_q) continue;
        row->forward += k.no_p ? k.q : k.no_q ? INFINITY : k.p * k.d - (k.p - k.q);
        row->reverse += k.no_q ? k.p : k.no_p ? INFINITY : (k.p - k.q) - k.q * k.d;
    }
}

/* ---- Forward ---- */

/* The results that follow from the sums; NaN as KL(p||q) of a row that is not good. */
SK_SPECIAL void conclude(enum sk_form form, const sk_rows *r, const sk_scale *scale,
                         const sk_comparison *m, results *to) {
    const sk_scale t = *scale;
#pragma omp simd
    for (int64_t i = 0; i < r->width; i++) {
        const sk_concluded x = sk_conclude(form, true, m, i, &t, &t);
        const bool near = (x.forward < FAR) & (x.reverse < FAR);
        to->dl[i] = x.dl;
        to->forward[i] = near ? x.forward : (double)NAN;
        to->reverse[i] = x.reverse;
    }
#pragma omp simd
    for (int64_t i = 0; i < r->width; i++) to->lse[i] = m->hu[i] * t.per_T + sk_level(m, i);
}

/* Both visits to a task's logits, the first of them for the anchors: only for the PLAIN form. */
static void compare(const forward_params *p, const sk_rows *r, const sk_scale *t, enum sk_form form,
                    sk_comparison *m) {
    SK_ALIGNED real tile[2][SK_TILE];
    const sk_arg *logits[2] = {&p->u, &p->v};
    const real *x[2][SK_GROUPS];
    real *top[2] = {m->hu, m->hv};
    const int64_t step = sk_tile_classes(r);
    for (int64_t c = 0; c < r->C; c += step) {
        const int64_t classes = sk_min(step, r->C - c);
        for (int i = U; i <= V; i++) {
            sk_load_tile(r, logits[i], c, classes, tile[i], x[i]);
            for (int64_t g = 0; g < r->groups && form == SK_PLAIN; g++)
                sk_raise(r, x[i][g], sk_depth(r, classes), g, top[i]);
        }
    }
    for (int64_t i = 0; i < sk_scalars(r) && form == SK_PLAIN; i++) {
        m->hu[i] = sk_anchor(m->hu[i]);
        m->hv[i] = sk_anchor(m->hv[i]);
    }
    for (int64_t c = 0; c < r->C; c += step) {
        const int64_t classes = sk_min(step, r->C - c), depth = sk_depth(r, classes);
        for (int i = U; i <= V && r->C > step; i++)
            sk_load_tile(r, logits[i], c, classes, tile[i], x[i]);
        for (int64_t g = 0; g < r->groups; g++) {
            const sk_ahead next_u = sk_next_tile(r, &p->u, g, c),
                           next_v = sk_next_tile(r, &p->v, g, c);
            if (form == SK_PLAIN)
                sk_compare_group(SK_PLAIN, true, SK_FRESH, r, t, t, x[U][g], x[V][g], next_u,
                                 next_v, depth, g, NULL, m);
            else
                sk_compare_group(SK_EXACT, true, SK_FRESH, r, t, t, x[U][g], x[V][g], next_u,
                                 next_v, depth, g, NULL, m);
        }
    }
}

/* Compares again, in the exact form and against T lse, what the first results left open. Rows that
 * differ by a constant keep their anchors: against them they differ by exactly 0. */
static void compare_again(const forward_params *p, const sk_rows *r, const sk_scale *t,
                          sk_comparison *m, results *to) {
    results again;
    sk_clear_sums(r, m);
    for (int64_t i = 0; i < r->width; i++) {
        if (to->dl[i] == sk_gap(SK_EXACT, m, i, t, t)) continue;
        m->hu[i] = (real)(to->lse[i] * t->T);
        m->hv[i] = (real)((to->lse[i] - to->dl[i]) * t->T);
    }
    compare(p, r, t, SK_EXACT, m);
    conclude(SK_EXACT, r, t, m, &again);
    for (int64_t i = 0; i < r->width; i++) {
        if (!isnan(to->forward[i])) continue;
        to->lse[i] = again.lse[i];
        to->dl[i] = again.dl[i];
        to->forward[i] = again.forward[i];
        to->reverse[i] = again.reverse[i];
    }
}

static void diverge(const forward_params *p, const sk_rows *r, const sk_scale *t,
                    const real *weight, results *to) {
    sk_comparison m;
    sk_clear_sums(r, &m);
    for (int64_t i = 0; i < sk_scalars(r); i++) m.hu[i] = m.hv[i] = -INFINITY;
    compare(p, r, t, SK_PLAIN, &m);
    conclude(SK_PLAIN, r, t, &m, to);
    int64_t open = 0;
    for (int64_t i = 0; i < r->width; i++) open += weight[i] != 0 && isnan(to->forward[i]);
    if (open == 0) return;
    compare_again(p, r, t, &m, to);
    for (int64_t i = 0; i < r->width; i++) {
        if (weight[i] == 0 || !isnan(to->forward[i])) continue;
        saved_row row = {to->lse[i], to->dl[i], 0, 0};
        careful_divergence(p, r, i, &row);
        to->lse[i] = row.lse_u;
        to->dl[i] = row.dl;
        to->forward[i] = row.forward;
        to->reverse[i] = row.reverse;
    }
}

static void forward_task(const forward_params *p, const sk_rows *r, const sk_scale *t) {
    results x;
    SK_ALIGNED real weight[SK_PITCH];
    bool any = false;
    sk_load_scalars(r, &p->weight, weight);
    for (int64_t i = 0; i < r->width; i++) any |= weight[i] != 0;
    if (any) diverge(p, r, t, weight, &x);

    const double TT = p->temperature * p->temperature;
    const double wf = p->forward_weight, wr = p->reverse_weight;
    const int64_t plane = p->saved.stride[0], at = r->n * r->S + r->s; /* outputs are compact */
    double *restrict saved = (double *)p->saved.data + at;
    real *restrict rows = (real *)p->rows.data + at;
#pragma omp simd
    for (int64_t i = 0; i < r->width; i++) {
        const bool used = any && weight[i] != 0;
        const double forward = used ? x.forward[i] : 0, reverse = used ? x.reverse[i] : 0;
        const double sum = (wf != 0 ? wf * forward : 0) + (wr != 0 ? wr * reverse : 0);
        rows[i] = used ? (real)(weight[i] * TT * sum) : 0;
        saved[i] = used ? x.lse[i] : 0;
        saved[plane + i] = used ? x.dl[i] : 0;
        saved[2 * plane + i] = forward;
        saved[3 * plane + i] = reverse;
    }
}

/* ---- Backward ---- */

/* What the gradients of a row need: p = U_FACTOR e^((u - U_SHIFT)/T) and q likewise, both times the
 * row's factor (0: no gradient); d = (u - v - gap)/T; both KL. */
enum { U_SHIFT, U_FACTOR, V_SHIFT, V_FACTOR, GAP_HIGH, GAP_LOW, KL_FORWARD, KL_REVERSE, SCALARS };
typedef real row_scalars[SCALARS][SK_PITCH];

/* wf and wr, and the same for the terms that detach_target drops. */
typedef struct term_weights {
    real forward, reverse, target_forward, target_reverse;
} term_weights;

/* Leaves the gradients of a run. */
SK_SPECIAL void gradients(bool positions, const sk_scale *scale, term_weights w, sk_run run,
                          row_scalars m, const real *u, const real *v, sk_ahead next_u,
                          sk_ahead next_v, real *restrict grad_u, real *restrict grad_v) {
    const sk_scale t = *scale;
    for (int64_t at = 0; at < run.n; at += SK_LANES) {
        sk_fetch(next_u, at / SK_LANES);
        sk_fetch(next_v, at / SK_LANES);
#pragma omp simd
        for (int k = 0; k < SK_LANES; k++) {
            const int64_t i = positions ? run.row + at + k : run.row;
            const real a = sk_logit(u[at + k]), b = sk_logit(v[at + k]);
            const real p = m[U_FACTOR][i] * sk_exp_of(a - m[U_SHIFT][i], &t);
            const real q = m[V_FACTOR][i] * sk_exp_of(b - m[V_SHIFT][i], &t);
            const sk_split gap = {m[GAP_HIGH][i], m[GAP_LOW][i]};
            const real d = sk_difference(a, b, gap) * t.inverse_T;
            const real p_q = d < (real)0.5 && d > (real)-0.5 ? q * sk_expm1(d) : p - q;
            const real to_u = w.target_forward * (p * (d - m[KL_FORWARD][i])) + w.reverse * p_q;
            const real to_v = -w.target_reverse * (q * (d + m[KL_REVERSE][i])) - w.forward * p_q;
            grad_u[at + k] = m[U_FACTOR][i] != 0 ? to_u : 0;
            grad_v[at + k] = m[U_FACTOR][i] != 0 ? to_v : 0;
        }
    }
}

/* The gradient of a row that is far or holds infinities or NaN: terms of weight 0 are left out, 0
 * log 0 = 0. */
static void careful_gradient(const backward_params *p, const sk_rows *r, int64_t i, saved_row row,
                             double factor, term_weights w) {
    for (int64_t c = 0; c < r->C; c++) {
        const class_terms k = class_of(r, &p->u, &p->v, p->temperature, row, i, c);
        const double forward = k.no_p && !isnan(row.forward) ? 0 : k.p * (k.d - row.forward);
        const double reverse = k.no_q && !isnan(row.reverse) ? 0 : k.q * (k.d + row.reverse);
        double to_u = 0, to_v = 0;
        if (w.target_forward != 0) to_u += w.target_forward * forward;
        if (w.reverse != 0) to_u += w.reverse * (k.p - k.q);
        if (w.target_reverse != 0) to_v -= w.target_reverse * reverse;
        if (w.forward != 0) to_v -= w.forward * (k.p - k.q);
        sk_store_one(&p->grad_u, sk_class_at(r, &p->grad_u, i, c), (real)(factor * to_u));
        sk_store_one(&p->grad_v, sk_class_at(r, &p->grad_v, i, c), (real)(factor * to_v));
    }
}

/* Leaves what was saved, and each row's factor. */
static void load_results(const backward_params *p, const sk_rows *r, results *x, double *factor) {
    SK_ALIGNED real grad[SK_PITCH], weight[SK_PITCH];
    const double per_row = p->temperature / *(const real *)p->denominator.data;
    const int64_t *stride = p->saved.stride;
    sk_load_scalars(r, &p->grad, grad);
    sk_load_scalars(r, &p->weight, weight);
    for (int64_t i = 0; i < r->width; i++) {
        const double *saved = (const double *)p->saved.data + sk_row_at(r, stride[1], stride[2], i);
        x->lse[i] = saved[0];
        x->dl[i] = saved[stride[0]];
        x->forward[i] = saved[2 * stride[0]];
        x->reverse[i] = saved[3 * stride[0]];
        /* No gradient: none comes in, or the row has no loss, for its weight or because p = q. */
        const bool none =
            (grad[i] == 0) | (weight[i] == 0) | ((x->forward[i] == 0) & (x->reverse[i] == 0));
        factor[i] = none ? 0 : per_row * grad[i] * weight[i];
    }
    for (int64_t i = r->width; i < sk_scalars(r); i++)
        x->lse[i] = x->dl[i] = x->forward[i] = x->reverse[i] = factor[i] = 0;
}

static void set_scalars(const sk_rows *r, const sk_scale *t, const results *x, const double *factor,
                        row_scalars m) {
#pragma omp simd
    for (int64_t i = 0; i < sk_scalars(r); i++) {
        const double u = x->lse[i] * t->T, v = (x->lse[i] - x->dl[i]) * t->T;
        const sk_split gap = sk_split_of(x->dl[i] * t->T);
        m[U_SHIFT][i] = (real)u;
        m[V_SHIFT][i] = (real)v;
        m[U_FACTOR][i] = (real)factor[i] * sk_exp_of((real)((real)u - u), t);
        m[V_FACTOR][i] = (real)factor[i] * sk_exp_of((real)((real)v - v), t);
        m[GAP_HIGH][i] = gap.high;
        m[GAP_LOW][i] = gap.low;
        m[KL_FORWARD][i] = (real)x->forward[i];
        m[KL_REVERSE][i] = (real)x->reverse[i];
    }
}

static void backward_task(const backward_params *p, const sk_rows *r, const sk_scale *t,
                          term_weights w) {
    SK_ALIGNED real buffer[4][SK_RUN];
    SK_ALIGNED row_scalars m;
    SK_ALIGNED double factor[SK_PITCH];
    results x;
    load_results(p, r, &x, factor);
    set_scalars(r, t, &x, factor, m);
    for (sk_run run = {0}; sk_next_run(r, &run);) {
        const real *u = sk_read_run(r, &p->u, run, buffer[0]);
        const real *v = sk_read_run(r, &p->v, run, buffer[1]);
        const sk_ahead next_u = sk_next_read(r, &p->u, run), next_v = sk_next_read(r, &p->v, run);
        real *grad_u = sk_begin_run(r, &p->grad_u, run, buffer[2]);
        real *grad_v = sk_begin_run(r, &p->grad_v, run, buffer[3]);
        if (r->positions)
            gradients(true, t, w, run, m, u, v, next_u, next_v, grad_u, grad_v);
        else
            gradients(false, t, w, run, m, u, v, next_u, next_v, grad_u, grad_v);
        sk_end_run(r, &p->grad_u, run, grad_u);
        sk_end_run(r, &p->grad_v, run, grad_v);
    }
    for (int64_t i = 0; i < r->width; i++) {
        const saved_row row = {x.lse[i], x.dl[i], x.forward[i], x.reverse[i]};
        if (factor[i] != 0 && !is_ordinary(row.forward, row.reverse))
            careful_gradient(p, r, i, row, factor[i], w);
    }
}

/* ---- The kernels ---- */

static sk_rows forward_all(const forward_params *p) {
    return sk_rows_of(&p->u, SK_DIM(p, N), SK_DIM(p, C), SK_DIM(p, S));
}

static sk_work forward_work(const void *params) {
    const sk_rows all = forward_all(params);
    return sk_work_of(&all, 2);
}

static void sd_dropout_kl_rows(const void *params, int64_t begin, int64_t end) {
    const forward_params *p = params;
    const sk_rows all = forward_all(p);
    const sk_scale t = sk_scale_of(p->temperature);
    for (int64_t i = begin; i < end; i++) {
        const sk_rows r = sk_task(&all, i);
        forward_task(p, &r, &t);
    }
}

static void forward_finish(const void *params) {
    const forward_params *p = params;
    sk_reduce_rows(&p->rows, &p->weight, &p->divisor, p->reduction, SK_DIM(p, N), SK_DIM(p, S),
                   &p->loss, &p->denominator);
}

static sk_rows backward_all(const backward_params *p) {
    return sk_rows_of(&p->u, SK_DIM(p, N), SK_DIM(p, C), SK_DIM(p, S));
}

static sk_work backward_work(const void *params) {
    const sk_rows all = backward_all(params);
    return sk_work_of(&all, 2);
}

static void sd_dropout_kl_backward_rows(const void *params, int64_t begin, int64_t end) {
    const backward_params *p = params;
    const sk_rows all = backward_all(p);
    const sk_scale t = sk_scale_of(p->temperature);
    const real forward = (real)p->forward_weight, reverse = (real)p->reverse_weight;
    const term_weights w = {forward, reverse, p->detach_target ? 0 : forward,
                            p->detach_target ? 0 : reverse};
    for (int64_t i = begin; i < end; i++) {
        const sk_rows r = sk_task(&all, i);
        backward_task(p, &r, &t, w);
    }
}

const sk_cpu_kernel SK_CPU(sd_dropout_kl) = {forward_work, sd_dropout_kl_rows, forward_finish,
                                             NULL};
const sk_cpu_kernel SK_CPU(sd_dropout_kl_backward) = {backward_work, sd_dropout_kl_backward_rows,
                                                      NULL, NULL};
