/* The gradient of distillation on the CPU: see distill.c. The logits are visited once.
 *
 * Test: python -m pytest tests/test_distill.py    Time: selfkd bench distill */
#include "cpu/core/row_loss.h"
#include "cpu/core/teacher.h"
#include "cpu/core/values.h"
#include "distill.h"

SK_PARAMS(distill_backward)
typedef struct distill_backward_params backward_params;

/* What reaches a row: the factors of its cross-entropy and of each teacher; and its target's logit.
 */
typedef struct incoming {
    SK_ALIGNED double ce[SK_PITCH], kl[SK_TEACHERS][SK_PITCH];
    SK_ALIGNED real of_target[SK_PITCH], live[SK_PITCH]; /* live 0: the gradient is 0 in any case */
    SK_ALIGNED int32_t target[SK_PITCH];
    bool all_live;
} incoming;

/* to[i] = what reaches row i, times `per`, where its class is `least` or more; else 0. */
static inline void mask(const sk_task *r, const real *grad, const real *weight,
                        const int32_t *target, double least, double per, double *to) {
#pragma omp simd
    for (int64_t i = 0; i < sk_scalars(r); i++) {
        const double factor = (double)grad[i] * weight[i];
        to[i] = (factor != 0) & (target[i] >= least) ? per * factor : 0;
    }
}

static void load_incoming(const backward_params *p, const sk_task *r, const sk_terms *k,
                          incoming *in) {
    SK_ALIGNED real grad[SK_PITCH], weight[SK_PITCH];
    const real *const denominator = (const real *)p->denominators.data;
    const double per_ce = k->has_ce ? p->ce_weight / denominator[0] : 0;
    const double per_kl = 1 / (double)denominator[p->denominators.stride[0]];
    const double taught = p->mask_teachers && p->target.data ? 0 : -1; /* the least class that is */
    double per_teacher[SK_TEACHERS];
    for (int j = 0; j < SK_TEACHERS; j++)
        per_teacher[j] = k->of[j].weight != 0 ? per_kl * k->of[j].weight * k->of[j].t.T : 0;
    sk_load_scalars(r, &p->grad, grad);
    sk_load_scalars(r, &p->weight, weight);
    sk_load_targets(r, &p->target, p->ignore_index, in->target);
    memset(in->of_target, 0, (size_t)sk_scalars(r) * sizeof(real));
    if (k->has_ce) sk_load_target_logits(r, &p->logits, in->target, in->of_target);
    mask(r, grad, weight, in->target, 0, per_ce, in->ce);
    for (int j = 0; j < SK_TEACHERS; j++)
        mask(r, grad, weight, in->target, taught, per_teacher[j], in->kl[j]);
    double dead = 0;
#pragma omp simd reduction(+ : dead)
    for (int64_t i = 0; i < sk_scalars(r); i++) {
        const double live = (in->ce[i] != 0) | (in->kl[0][i] != 0) | (in->kl[1][i] != 0) ? 1 : 0;
        in->live[i] = (real)live;
        dead += 1 - live;
    }
    in->all_live = dead == 0;
}

static void load_plane(const sk_task *r, const sk_arg *x, int plane, real *to) {
    sk_load_reals(r, (const real *)x->data + plane * x->stride[0], x->stride[1], x->stride[2], to);
}

/* Where h does not say what p is, or a factor is too large for a real. */
static inline bool is_far_ce(double h, double factor) {
    return ((h < SK_LEAST) & (h > -INFINITY)) | sk_is_far_factor(factor);
}

static bool any_far_ce(const sk_task *r, const real *h, const double *factor) {
    double far = 0;
#pragma omp simd reduction(+ : far)
    for (int64_t i = 0; i < sk_scalars(r); i++) far += is_far_ce(h[i], factor[i]) ? 1 : 0;
    return far != 0;
}

/* ---- what the gradients of a task need ---- */

typedef struct slopes {
    sk_terms terms;
    incoming in;
    int64_t classes; /* that share the smoothing */
    SK_ALIGNED real level[1 + SK_TEACHERS][SK_PITCH];
    SK_ALIGNED double dl[SK_TEACHERS][SK_PITCH];
    SK_ALIGNED sk_ce_scalars ce; /* of which LARGEST serves the teachers too */
    SK_ALIGNED sk_teacher_scalars of[SK_TEACHERS];
} slopes;

/* Leaves them; returns whether any row is far. */
static bool set_slopes(const backward_params *p, const sk_task *r, slopes *k) {
    const int64_t *const stride = p->ratios.stride;
    k->terms = SK_TERMS_OF(p);
    k->classes = p->classes > 0 ? p->classes : r->C;
    load_incoming(p, r, &k->terms, &k->in);
    load_plane(r, &p->levels, SK_LARGEST_LOGIT, k->ce[SK_LARGEST]);
    load_plane(r, &p->levels, SK_LEVEL, k->level[0]);
    if (k->terms.has_ce)
        sk_set_ce(r, k->in.ce, k->in.of_target, k->level[0], p->label_smoothing, k->classes, k->ce);
    bool far = k->terms.has_ce && any_far_ce(r, k->ce[SK_LARGEST], k->in.ce);
    for (int j = 0; j < SK_TEACHERS; j++) {
        const double *const dl = (const double *)p->ratios.data + j * stride[0];
        sk_load_doubles(r, dl, stride[1], stride[2], k->dl[j]);
        if (k->terms.of[j].weight == 0) continue;
        load_plane(r, &p->levels, SK_LEVEL_T + j, k->level[1 + j]);
        far |= sk_set_teacher(r, &k->terms.of[j], k->ce[SK_LARGEST], k->level[1 + j], k->dl[j],
                              k->in.kl[j], k->of[j]);
    }
    return far;
}

/* ---- rows in double, class by class ---- */

static bool is_far(const slopes *k, int64_t i) {
    const double h = k->ce[SK_LARGEST][i];
    bool far = k->terms.has_ce && is_far_ce(h, k->in.ce[i]);
    for (int j = 0; j < SK_TEACHERS; j++) {
        const sk_teacher *const of = &k->terms.of[j];
        far |= of->weight != 0 && sk_is_far_teacher(h, of->t.per_T, k->dl[j][i], k->in.kl[j][i]);
    }
    return k->in.live[i] != 0 && far && isfinite(h + k->dl[0][i] + k->dl[1][i]);
}

/* Leaves the gradients of row i. */
SK_RARE void differentiate_far(const backward_params *p, const sk_task *r, const slopes *k,
                               int64_t i) {
    const sk_arg *const z = &p->logits, *const to = &p->grad_logits;
    const incoming *const in = &k->in;
    const double h = k->ce[SK_LARGEST][i];
    sk_side u[SK_TEACHERS], v[SK_TEACHERS];
    const sk_side x = sk_whole_side(sk_side_of(r, z, false, 1, i), h, k->level[0][i], SK_ROUNDED);
    for (int j = 0; j < SK_TEACHERS; j++) {
        const sk_teacher *const of = &k->terms.of[j];
        if (of->weight == 0) continue;
        const double level = k->level[1 + j][i], lse = h / of->t.T + level;
        u[j] = sk_whole_side(sk_student_side(r, z, of, i), h, level, SK_ROUNDED);
        v[j] = sk_side_within(sk_teacher_side(r, of, i), of->own.T, lse, k->dl[j][i], SK_ROUNDED);
    }
    for (int64_t c = 0; c < r->C; c++) {
        const double z_c = sk_logit_at(r, z, false, i, c);
        double grad = 0;
        if (k->terms.has_ce && in->ce[i] != 0)
            grad += in->ce[i] *
                    sk_ce_slope_of(z_c, c == in->target[i], p->label_smoothing, k->classes, x);
        for (int j = 0; j < SK_TEACHERS; j++) {
            const sk_teacher *const of = &k->terms.of[j];
            if (of->weight == 0 || in->kl[j][i] == 0) continue;
            const double t_c = sk_logit_at(r, of->x, of->is_probs, i, c);
            const double q = exp(sk_log_p(t_c, of->own.T, v[j]));
            const double d = sk_log_ratio_at(r, z, of, i, c, u[j], v[j]);
            const double p_q = exp(sk_log_p(z_c, of->t.T, u[j])) - q;
            grad += in->kl[j][i] * (fabs(d) < 0.5 ? q * expm1(d) : p_q);
        }
        sk_store_one(to, sk_class_at(r, to, i, c), (real)grad);
    }
}

/* ---- all rows ---- */

static void add_ce(slopes *k, const sk_slice *at, real *e, const real *base) {
    const int power = k->terms.ce_power;
    sk_to_power(e, at->run.n, power);
    if (at->r->positions && power != 0)
        sk_ce_run(true, SK_REUSE, at, k->in.target, k->ce, e, base);
    else if (at->r->positions)
        sk_ce_run(true, SK_FRESH, at, k->in.target, k->ce, e, base);
    else if (power != 0)
        sk_ce_run(false, SK_REUSE, at, k->in.target, k->ce, e, base);
    else
        sk_ce_run(false, SK_FRESH, at, k->in.target, k->ce, e, base);
}

static void clear_dead(const sk_task *r, sk_run run, const real *live, real *grad) {
    const real *const of = live + run.row;
    if (!r->positions) {
        if (of[0] == 0) memset(grad, 0, (size_t)run.n * sizeof *grad);
        return;
    }
#pragma omp simd
    for (int64_t i = 0; i < run.n; i++) grad[i] = of[i] != 0 ? grad[i] : 0;
}

/* Leaves the gradients of a run: those of each teacher are added up, then that of cross-entropy. */
static void slope(void *context, const sk_slice *at) {
    SK_ALIGNED real e[SK_RUN], logs[SK_RUN];
    slopes *const k = context;
    const real *base = sk_zeros;
    for (int j = 0; j < SK_TEACHERS; j++) {
        const sk_teacher *const of = &k->terms.of[j];
        if (of->weight == 0) continue;
        const real *const x =
            of->is_probs ? sk_to_logs(at->x[1 + j], at->run.n, logs) : at->x[1 + j];
        const sk_streams streams = {{at->of->read[0], of->x}, {NULL}};
        const sk_slice both = {at->r, &streams, at->run, {at->x[0], x}, {at->to[0]}};
        sk_teacher_run(of, &both, k->of[j], k->ce[SK_LARGEST], e, base);
        base = at->to[0];
    }
    if (k->terms.has_ce)
        add_ce(k, at, e, base);
    else if (base == sk_zeros)
        memset(at->to[0], 0, (size_t)at->run.n * sizeof(real));
    if (!k->in.all_live) clear_dead(at->r, at->run, k->in.live, at->to[0]);
}

static void backward_task(const backward_params *p, const sk_task *r) {
    slopes k;
    const bool far = set_slopes(p, r, &k);
    const bool first = k.terms.of[0].weight != 0, second = k.terms.of[1].weight != 0;
    const sk_streams streams = {
        {&p->logits, first ? &p->teacher : NULL, second ? &p->second_teacher : NULL},
        {&p->grad_logits}};
    sk_write_gradients(r, &streams, slope, &k);
    for (int64_t i = 0; i < r->width && far; i++)
        if (is_far(&k, i)) differentiate_far(p, r, &k, i);
}

/* ---- the kernel ---- */

/* What is no class would be read out of bounds; probabilities only come out wrong. In a part of the
 * classes, C stands for one that is elsewhere. */
static sk_bad backward_first_bad(const void *params) {
    const backward_params *p = params;
    const int64_t C = SK_DIM(p, C) + (p->classes != 0);
    return sk_bad_target(&p->target, p->ignore_index, SK_DIM(p, N), C, SK_DIM(p, S),
                         offsetof(backward_params, target));
}

static sk_task backward_rows(const backward_params *p) { return SK_TASKS_OF(p, logits); }

SK_ROW_KERNEL(distill_backward, backward_rows, 2, backward_task, NULL, backward_first_bad);
