/* SD-Dropout on the CPU: see ops/sd_dropout_kl.h for the formula, cpu/core/pair.h and kl.h for
 * what is done to a row, cpu/core/task.h, tile.h and run.h for how rows are visited. */
#include "sd_dropout_kl.h"
#include "cpu/core/pair.h"
#include "cpu/core/reduce.h"

SK_PARAMS(sd_dropout_kl)
SK_PARAMS(sd_dropout_kl_backward)
typedef struct sd_dropout_kl_params forward_params;
typedef struct sd_dropout_kl_backward_params backward_params;

/* What a row's loss is made of: T^2 and the weights of both KL. */
typedef struct terms {
    double TT, pq, qp;
} terms;

static inline terms terms_of(const forward_params *p) {
    return (terms){p->temperature * p->temperature, p->forward_weight, p->reverse_weight};
}
static inline double value_of(terms w, double weight, double kl_pq, double kl_qp) {
    const double sum = (w.pq != 0 ? w.pq * kl_pq : 0) + (w.qp != 0 ? w.qp * kl_qp : 0);
    return weight * w.TT * sum;
}

static void forward_task(const forward_params *p, const sk_task *r, const sk_pair *pair) {
    sk_divergences x;
    SK_ALIGNED real weight[SK_PITCH];
    bool any = false;
    sk_load_scalars(r, &p->weight, weight);
    for (int64_t i = 0; i < r->width; i++) any |= weight[i] != 0;
    if (any) sk_diverge(r, pair, weight, &x);

    const terms w = terms_of(p);
    const int64_t plane = p->saved.stride[0], at = r->n * r->S + r->s; /* outputs are compact */
    double *restrict saved = (double *)p->saved.data + at;
    real *restrict rows = (real *)p->rows.data + at;
#pragma omp simd
    for (int64_t i = 0; i < r->width; i++) {
        const bool used = any && weight[i] != 0;
        const double kl_pq = used ? x.kl_pq[i] : 0, kl_qp = used ? x.kl_qp[i] : 0;
        rows[i] = used ? (real)value_of(w, weight[i], kl_pq, kl_qp) : 0;
        saved[i] = used ? x.lse[i] : 0;
        saved[plane + i] = used ? x.dl[i] : 0;
        saved[2 * plane + i] = kl_pq;
        saved[3 * plane + i] = kl_qp;
    }
}

/* ---- Backward ---- */

/* Leaves what was saved, and each row's factor. */
static void load_results(const backward_params *p, const sk_task *r, sk_divergences *x,
                         double *factor) {
    SK_ALIGNED real grad[SK_PITCH], weight[SK_PITCH];
    const double per_row = p->temperature / *(const real *)p->denominator.data;
    const int64_t *stride = p->saved.stride;
    sk_load_scalars(r, &p->grad, grad);
    sk_load_scalars(r, &p->weight, weight);
    for (int64_t i = 0; i < r->width; i++) {
        const double *saved = (const double *)p->saved.data + sk_row_at(r, stride[1], stride[2], i);
        x->lse[i] = saved[0];
        x->dl[i] = saved[stride[0]];
        x->kl_pq[i] = saved[2 * stride[0]];
        x->kl_qp[i] = saved[3 * stride[0]];
        /* No gradient: none comes in, or the row has no loss, for its weight or because p = q. */
        const bool none =
            (grad[i] == 0) | (weight[i] == 0) | ((x->kl_pq[i] == 0) & (x->kl_qp[i] == 0));
        factor[i] = none ? 0 : per_row * grad[i] * weight[i];
    }
    for (int64_t i = r->width; i < sk_scalars(r); i++)
        x->lse[i] = x->dl[i] = x->kl_pq[i] = x->kl_qp[i] = factor[i] = 0;
}

/* Whether the gradient of a row is found in double, class by class. */
static inline bool is_careful(const sk_divergences *x, const double *factor, int64_t i) {
    const sk_diverged_row row = {x->lse[i], x->dl[i], x->kl_pq[i], x->kl_qp[i]};
    return (factor[i] != 0) & !sk_is_ordinary(row, factor[i]);
}

static void backward_task(const backward_params *p, const sk_task *r, const sk_pair *pair,
                          sk_term_weights w) {
    SK_ALIGNED real buffer[4][SK_RUN];
    SK_ALIGNED sk_pair_scalars m;
    SK_ALIGNED double factor[SK_PITCH];
    sk_divergences x;
    load_results(p, r, &x, factor);
    const bool all_close = sk_set_pair(r, &pair->t, w, &x, factor, m);
    for (sk_run run = {0}; sk_next_run(r, &run);) {
        const real *u = sk_read_run(r, &p->u, run, buffer[0]);
        const real *v = sk_read_run(r, &p->v, run, buffer[1]);
        const sk_ahead next_u = sk_next_read(r, &p->u, run), next_v = sk_next_read(r, &p->v, run);
        real *grad_u = sk_begin_run(r, &p->grad_u, run, buffer[2]);
        real *grad_v = sk_begin_run(r, &p->grad_v, run, buffer[3]);
        sk_pair_run(r, all_close, &pair->t, w, run, m, u, v, next_u, next_v, grad_u, grad_v);
        sk_end_run(r, &p->grad_u, run, grad_u);
        sk_end_run(r, &p->grad_v, run, grad_v);
    }
    double careful = 0;
#pragma omp simd reduction(+ : careful)
    for (int64_t i = 0; i < r->width; i++) careful += is_careful(&x, factor, i) ? 1 : 0;
    for (int64_t i = 0; i < r->width && careful != 0; i++) {
        const sk_diverged_row row = {x.lse[i], x.dl[i], x.kl_pq[i], x.kl_qp[i]};
        if (is_careful(&x, factor, i))
            sk_careful_gradient(r, pair, i, row, factor[i], w, &p->grad_u, &p->grad_v);
    }
}

/* ---- The kernels ---- */

static sk_task forward_all(const forward_params *p) {
    return sk_tasks_of(&p->u, SK_DIM(p, N), SK_DIM(p, C), SK_DIM(p, S));
}

static sk_work forward_work(const void *params) {
    const sk_task all = forward_all(params);
    return sk_work_of(&all, 2);
}

static void sd_dropout_kl_rows(const void *params, int64_t begin, int64_t end) {
    const forward_params *p = params;
    const sk_task all = forward_all(p);
    const sk_pair pair = {&p->u, &p->v, sk_scale_of(p->temperature)};
    for (int64_t i = begin; i < end; i++) {
        const sk_task r = sk_task_at(&all, i);
        forward_task(p, &r, &pair);
    }
}

static double row_value(const void *params, int64_t n, int64_t s) {
    const forward_params *p = params;
    const int64_t *const stride = p->saved.stride;
    const double *const saved = (const double *)p->saved.data + n * stride[1] + s * stride[2];
    return value_of(terms_of(p), sk_weight_at(&p->weight, n, s), saved[2 * stride[0]],
                    saved[3 * stride[0]]);
}

static void forward_finish(const void *params) {
    const forward_params *p = params;
    sk_reduce_rows(&p->rows, row_value, p, &p->weight, &p->divisor, p->reduction, SK_DIM(p, N),
                   SK_DIM(p, S), &p->loss, &p->denominator);
}

static sk_task backward_all(const backward_params *p) {
    return sk_tasks_of(&p->u, SK_DIM(p, N), SK_DIM(p, C), SK_DIM(p, S));
}

static sk_work backward_work(const void *params) {
    const sk_task all = backward_all(params);
    return sk_work_of(&all, 2);
}

static void sd_dropout_kl_backward_rows(const void *params, int64_t begin, int64_t end) {
    const backward_params *p = params;
    const sk_task all = backward_all(p);
    const sk_pair pair = {&p->u, &p->v, sk_scale_of(p->temperature)};
    const real pq = (real)p->forward_weight, qp = (real)p->reverse_weight;
    const sk_term_weights w = {pq, qp, p->detach_target ? 0 : pq, p->detach_target ? 0 : qp};
    for (int64_t i = begin; i < end; i++) {
        const sk_task r = sk_task_at(&all, i);
        backward_task(p, &r, &pair, w);
    }
}

const sk_cpu_kernel SK_CPU(sd_dropout_kl) = {forward_work, sd_dropout_kl_rows, forward_finish,
                                             NULL};
const sk_cpu_kernel SK_CPU(sd_dropout_kl_backward) = {backward_work, sd_dropout_kl_backward_rows,
                                                      NULL, NULL};
