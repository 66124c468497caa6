/* SimReg on the CPU: see ops/simreg.h for the formula, cpu/core/task.h and run.h for rows and runs.
 */
#include "simreg.h"
#include "cpu/core/reduce.h"
#include "cpu/core/run.h"
#include "formula/simreg.h"

SK_PARAMS(simreg)
SK_PARAMS(simreg_backward)
typedef struct simreg_params forward_params;
typedef struct simreg_backward_params backward_params;

/* Tasks of "classes" only: rows one after the other, at any strides. */
static sk_task rows_of(int64_t N, int64_t C, int64_t S) {
    return (sk_task){.N = N, .C = C, .S = S, .width = C > SK_ROW_C ? 1 : SK_SHORT_ROWS};
}

static sk_work work_of(int64_t N, int64_t C, int64_t S) {
    const sk_task all = rows_of(N, C, S);
    sk_work work = sk_work_of(&all, 2);
    work.path = "rows";
    return work;
}

/* ---- Forward ---- */

static sk_simreg_sums multiply(sk_simreg_sums sum, const real *restrict x, const real *restrict t,
                               int64_t n) {
    double xx = 0, tt = 0, xt = 0;
#pragma omp simd reduction(+ : xx, tt, xt)
    for (int64_t i = 0; i < n; i++) {
        const double a = x[i], b = t[i];
        xx += a * a;
        tt += b * b;
        xt += a * b;
    }
    return (sk_simreg_sums){sum.xx + xx, sum.tt + tt, sum.xt + xt};
}

/* The sum of (ratio x - t)^2, exactly 0 for equal rows and ratio 1. */
static double distance(double ratio, const real *restrict x, const real *restrict t, int64_t n) {
    double sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t i = 0; i < n; i++) {
        const double d = (double)x[i] * ratio - (double)t[i];
        sum += d * d;
    }
    return sum;
}

/* Both rows are visited in chunks, for `sk_simreg_sums` or, where it is not NULL, for the distance.
 */
static double visit(const forward_params *p, const sk_task *r, int64_t i, double ratio,
                    sk_simreg_sums *sum) {
    SK_ALIGNED real buffer[2][SK_ROW_C];
    const sk_arg *x = &p->student, *t = &p->target;
    double apart = 0;
    for (int64_t c = 0; c < r->C; c += SK_ROW_C) {
        const int64_t n = sk_min(SK_ROW_C, r->C - c);
        const real *a = sk_read(x, sk_class_at(r, x, i, c), x->stride[1], n, buffer[0]);
        const real *b = sk_read(t, sk_class_at(r, t, i, c), t->stride[1], n, buffer[1]);
        if (sum)
            *sum = multiply(*sum, a, b, n);
        else
            apart += distance(ratio, a, b, n);
    }
    return apart;
}

/* ---- Rows of doubles too large or too small to square ---- */

static double power_of(const sk_task *r, const sk_arg *x, int64_t i) {
    double top = 0;
    for (int64_t c = 0; c < r->C; c++)
        top = fmax(top, fabs(sk_load_one(x, sk_class_at(r, x, i, c))));
    return sk_simreg_power(top);
}

SK_RARE sk_simreg_row compare_far(const forward_params *p, const sk_task *r, int64_t i) {
    const sk_arg *const x = &p->student, *const t = &p->target;
    const double by_x = power_of(r, x, i), by_t = power_of(r, t, i);
    sk_simreg_sums sum = {0, 0, 0};
    for (int64_t c = 0; c < r->C; c++) {
        const double a = sk_load_one(x, sk_class_at(r, x, i, c)) * by_x;
        const double b = sk_load_one(t, sk_class_at(r, t, i, c)) * by_t;
        sum = (sk_simreg_sums){sum.xx + a * a, sum.tt + b * b, sum.xt + a * b};
    }
    const sk_simreg_lengths k = sk_simreg_measure(sum, by_x, by_t);
    double apart = 0;
    for (int64_t c = 0; c < r->C && !(k.value >= SK_SIMREG_NEAR(real)); c++) {
        const double a = sk_load_one(x, sk_class_at(r, x, i, c)) * by_x;
        const double b = sk_load_one(t, sk_class_at(r, t, i, c)) * by_t;
        const double d = a * (k.scale_x / k.scale_t) - b;
        apart += d * d;
    }
    const bool good = k.value >= SK_SIMREG_NEAR(real);
    return sk_simreg_finish(k, good ? k.value : apart * k.scale_t * k.scale_t, by_x, by_t);
}

/* ---- All rows ---- */

/* Row i, of unit lengths: by its products or, where 2 - 2 cos would cancel, by its differences. */
static sk_simreg_row compare(const forward_params *p, const sk_task *r, int64_t i) {
    sk_simreg_sums sum = {0, 0, 0};
    visit(p, r, i, 1, &sum);
    if (sizeof(real) == 8 && !(sk_simreg_is_near(sum.xx) && sk_simreg_is_near(sum.tt)))
        return compare_far(p, r, i);
    const sk_simreg_lengths k = sk_simreg_measure(sum, 1, 1);
    double value = k.value;
    if (!(value >= SK_SIMREG_NEAR(real)))
        value = visit(p, r, i, k.scale_x / k.scale_t, NULL) * k.scale_t * k.scale_t;
    return sk_simreg_finish(k, value, 1, 1);
}

/* Leaves rows and saved. */
static void forward_task(const forward_params *p, const sk_task *r) {
    real weight[SK_SHORT_ROWS];
    sk_load_scalars(r, &p->weight, weight);
    const int64_t plane = p->saved.stride[0], at = r->n * r->S + r->s; /* outputs are compact */
    double *saved = (double *)p->saved.data + at;
    real *rows = (real *)p->rows.data + at;
    for (int64_t i = 0; i < r->width; i++) {
        sk_simreg_row x = {0, 1, 1, 0};
        if (weight[i] != 0 && p->normalize)
            x = compare(p, r, i);
        else if (weight[i] != 0)
            x.value = visit(p, r, i, 1, NULL);
        rows[i] = (real)(weight[i] * x.value);
        saved[i] = x.scale_x;
        saved[plane + i] = x.scale_t;
        saved[2 * plane + i] = x.h;
    }
}

/* ---- Backward ---- */

static sk_simreg_slope slope_of(const backward_params *p, const sk_task *r, int64_t i, double grad,
                                double weight) {
    const int64_t *stride = p->saved.stride;
    const double *saved = (const double *)p->saved.data + sk_row_at(r, stride[1], stride[2], i);
    return sk_simreg_slope_of(grad, weight, *(const real *)p->denominator.data, saved[0],
                              saved[stride[0]], saved[2 * stride[0]], sizeof(real) == 8);
}

/* Leaves the gradient of a run. */
static void gradient(sk_simreg_slope k, const real *restrict x, const real *restrict t, int64_t n,
                     real *restrict to) {
#pragma omp simd
    for (int64_t i = 0; i < n; i++) to[i] = (real)sk_simreg_gradient(k, x[i], t[i]);
}

SK_RARE void far_gradient(sk_simreg_slope k, const real *x, const real *t, int64_t n, real *to) {
    for (int64_t i = 0; i < n; i++)
        to[i] = (real)sk_simreg_gradient(k, x[i] * k.by_x, t[i] * k.by_t);
}

/* Leaves the gradients of a task. */
static void backward_task(const backward_params *p, const sk_task *r) {
    SK_ALIGNED real buffer[3][SK_RUN];
    real grad[SK_SHORT_ROWS], weight[SK_SHORT_ROWS];
    sk_load_scalars(r, &p->grad, grad);
    sk_load_scalars(r, &p->weight, weight);
    sk_simreg_slope k[SK_SHORT_ROWS];
    for (int64_t i = 0; i < r->width; i++) k[i] = slope_of(p, r, i, grad[i], weight[i]);
    for (sk_run run = {0}; sk_next_run(r, &run);) {
        const real *x = sk_read_run(r, &p->student, run, buffer[0]);
        const real *t = sk_read_run(r, &p->target, run, buffer[1]);
        real *to = sk_begin_run(r, &p->grad_student, run, buffer[2]);
        if (k[run.row].far)
            far_gradient(k[run.row], x, t, run.n, to);
        else
            gradient(k[run.row], x, t, run.n, to);
        sk_end_run(r, &p->grad_student, run, to);
    }
}

/* ---- The kernels ---- */

static sk_work forward_work(const void *params) {
    const forward_params *p = params;
    return work_of(SK_DIM(p, N), SK_DIM(p, C), SK_DIM(p, S));
}

static void simreg_rows(const void *params, int64_t begin, int64_t end) {
    const forward_params *p = params;
    const sk_task all = rows_of(SK_DIM(p, N), SK_DIM(p, C), SK_DIM(p, S));
    for (int64_t i = begin; i < end; i++) {
        const sk_task r = sk_task_at(&all, i);
        forward_task(p, &r);
    }
}

static double row_value(const void *params, int64_t n, int64_t s) {
    const forward_params *p = params;
    const sk_task r = sk_one_row(SK_DIM(p, N), SK_DIM(p, C), SK_DIM(p, S), n, s);
    const double w = sk_weight_at(&p->weight, n, s);
    return w * (p->normalize ? compare(p, &r, 0).value : visit(p, &r, 0, 1, NULL));
}

static void forward_finish(const void *params) {
    const forward_params *p = params;
    sk_reduce_rows(&p->rows, row_value, p, &p->weight, &p->divisor, p->reduction, SK_DIM(p, N),
                   SK_DIM(p, S), &p->loss, &p->denominator);
}

static sk_work backward_work(const void *params) {
    const backward_params *p = params;
    return work_of(SK_DIM(p, N), SK_DIM(p, C), SK_DIM(p, S));
}

static void simreg_backward_rows(const void *params, int64_t begin, int64_t end) {
    const backward_params *p = params;
    const sk_task all = rows_of(SK_DIM(p, N), SK_DIM(p, C), SK_DIM(p, S));
    for (int64_t i = begin; i < end; i++) {
        const sk_task r = sk_task_at(&all, i);
        backward_task(p, &r);
    }
}

const sk_cpu_kernel SK_CPU(simreg) = {forward_work, simreg_rows, forward_finish, NULL};
const sk_cpu_kernel SK_CPU(simreg_backward) = {backward_work, simreg_backward_rows, NULL, NULL};
