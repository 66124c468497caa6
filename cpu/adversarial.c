/* Adversarial losses on the CPU: see ops/adversarial.h for the formulas.
 *
 * Test: python -m pytest tests/test_adversarial.py    Time: selfkd bench adversarial */
#include "cpu/core/row_loss.h"

#include "formula/adversarial.h"

SK_PARAMS(adversarial)
SK_PARAMS(adversarial_backward)
typedef struct adversarial_params forward_params;
typedef struct adversarial_backward_params backward_params;

enum { SCORES = 1024 }; /* of each side in a task */

/* The scores of one side: y = sign * score, and lsgan's target for y. */
typedef struct side {
    real sign, target;
} side;
static const side REAL = {1, 1}, FAKE = {-1, 0};

/* ---- Forward ---- */

SK_SPECIAL void values(int64_t term, side of, int64_t n, const real *score, real *restrict to) {
#pragma omp simd
    for (int64_t i = 0; i < n; i++)
        to[i] = sk_adversarial_value(term, of.sign * score[i], of.target);
}

/* Leaves in `to` the terms of scores at .. at + n. */
static void load_values(int64_t term, side of, const sk_arg *x, int64_t at, int64_t n, real *to) {
    SK_ALIGNED real buffer[SCORES];
    const real *score = sk_read(x, at * x->stride[0], x->stride[0], n, buffer);
    const int64_t lanes = sk_groups(n) * SK_LANES;
    switch (term) {
    case SK_BCE:
        values(SK_BCE, of, lanes, score, to);
        break;
    case SK_HINGE:
        values(SK_HINGE, of, lanes, score, to);
        break;
    case SK_LSGAN:
        values(SK_LSGAN, of, lanes, score, to);
        break;
    default:
        values(SK_WGAN, of, lanes, score, to);
    }
}

/* How many of the scores at .. at + SCORES there are. */
static inline int64_t part(int64_t count, int64_t at) {
    const int64_t left = count - at;
    return left < 0 ? 0 : sk_min(left, SCORES);
}

/* Leaves rows and fake_rows of one task. */
static void forward_task(const forward_params *p, const sk_task *r) {
    SK_ALIGNED real real_rows[SCORES], fake_rows[SCORES];
    const int64_t term = sk_adversarial_term(p->mode, p->side), at = r->n;
    const int64_t n = part(SK_DIM(p, N), at), m = part(SK_DIM(p, M), at);
    if (n > 0) load_values(term, REAL, &p->real, at, n, real_rows);
    if (m > 0) {
        load_values(term, FAKE, &p->fake, at, m, fake_rows);
        sk_put(&p->fake_rows, at, 1, m, fake_rows);
        for (int64_t i = 0; i < sk_min(n, m) && p->reduction == SELFKD_NONE; i++)
            real_rows[i] += fake_rows[i];
    }
    if (n > 0) sk_put(&p->rows, at, 1, n, real_rows);
}

/* ---- Backward ---- */

SK_SPECIAL void slopes(int64_t term, side of, int64_t n, const real *score, const real *factor,
                       real *restrict to) {
#pragma omp simd
    for (int64_t i = 0; i < n; i++)
        to[i] = of.sign * factor[i] * sk_adversarial_slope(term, of.sign * score[i], of.target);
}

/* Leaves the gradient of scores at .. at + n, whose incoming gradient is grad / denominator. */
static void differentiate(int64_t term, side of, const sk_arg *x, const sk_arg *grad,
                          double denominator, int64_t rows, int64_t at, int64_t n,
                          const sk_arg *to) {
    SK_ALIGNED real buffer[SCORES], factor[SCORES], result[SCORES];
    const real *score = sk_read(x, at * x->stride[0], x->stride[0], n, buffer);
    const int64_t lanes = sk_groups(n) * SK_LANES, stride = grad->stride[0];
    const int64_t known = sk_min(n, part(rows, at));
    const real all = stride == 0 ? (real)(sk_load_one(grad, 0) / denominator) : 0;
    for (int64_t i = 0; i < lanes; i++) factor[i] = all; /* 0-d: one for all */
    for (int64_t i = 0; i < known && stride != 0; i++)
        factor[i] = (real)(sk_load_one(grad, (at + i) * stride) / denominator);
    switch (term) {
    case SK_BCE:
        slopes(SK_BCE, of, lanes, score, factor, result);
        break;
    case SK_HINGE:
        slopes(SK_HINGE, of, lanes, score, factor, result);
        break;
    case SK_LSGAN:
        slopes(SK_LSGAN, of, lanes, score, factor, result);
        break;
    default:
        slopes(SK_WGAN, of, lanes, score, factor, result);
    }
    sk_put(to, at * to->stride[0], to->stride[0], n, result);
}

static void backward_task(const backward_params *p, const sk_task *r) {
    const int64_t term = sk_adversarial_term(p->mode, p->side), N = SK_DIM(p, N), M = SK_DIM(p, M);
    const int64_t at = r->n, n = part(N, at), m = part(M, at);
    const bool mean = p->reduction == SELFKD_MEAN;
    if (n > 0)
        differentiate(term, REAL, &p->real, &p->grad, mean ? (double)N : 1, N, at, n,
                      &p->grad_real);
    if (m > 0)
        differentiate(term, FAKE, &p->fake, &p->grad, mean ? (double)M : 1, N, at, m,
                      &p->grad_fake);
}

/* ---- The kernels ---- */

/* Tasks of SCORES scores of each side; r->n is the first of them. */
static sk_task tasks_of(int64_t N, int64_t M) {
    return (sk_task){.N = N > M ? N : M, .C = 1, .S = 1, .width = SCORES, .path = "scores"};
}
static sk_task forward_tasks(const forward_params *p) {
    return tasks_of(SK_DIM(p, N), SK_DIM(p, M));
}
static sk_task backward_tasks(const backward_params *p) {
    return tasks_of(SK_DIM(p, N), SK_DIM(p, M));
}

/* The term of score i of a side, as its sum takes it. */
static double value_of(const forward_params *p, side of, const sk_arg *x, int64_t i) {
    const int64_t term = sk_adversarial_term(p->mode, p->side);
    const real y = of.sign * sk_load_one(x, i * x->stride[0]);
    return sk_adversarial_summand(term, y, of.target, sk_adversarial_value(term, y, of.target));
}
static double real_value(const void *params, int64_t n, int64_t s) {
    const forward_params *p = params;
    (void)s;
    return value_of(p, REAL, &p->real, n);
}
static double fake_value(const void *params, int64_t n, int64_t s) {
    const forward_params *p = params;
    (void)s;
    return value_of(p, FAKE, &p->fake, n);
}

static void forward_finish(const void *params) {
    const forward_params *p = params;
    const int64_t N = SK_DIM(p, N), M = SK_DIM(p, M);
    const bool mean = p->reduction == SELFKD_MEAN, fakes = M > 0 || p->side == SK_DISCRIMINATOR;
    double loss;
    if (p->reduction == SELFKD_NONE) {
        loss = sk_sum(&p->rows, N, 1);
    } else {
        const sk_sum_of of_real = {&p->rows, N, 1, real_value, p};
        const sk_sum_of of_fake = {&p->fake_rows, M, 1, fake_value, p};
        loss = sk_sum_rows(of_real) / (mean ? (double)N : 1);
        if (fakes) loss += sk_sum_rows(of_fake) / (mean ? (double)M : 1);
    }
    *(real *)p->loss.data = (real)loss;
}

SK_ROW_KERNEL(adversarial, forward_tasks, 2, forward_task, forward_finish, NULL);
SK_ROW_KERNEL(adversarial_backward, backward_tasks, 2, backward_task, NULL, NULL);
