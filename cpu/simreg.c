/* SimReg on the CPU: see ops/simreg.h for the formula, cpu/core/task.h and run.h for rows and runs.
 *
 * Test: python -m pytest tests/test_simreg.py    Time: selfkd bench simreg */
#include "simreg.h"
#include "cpu/core/row_loss.h"
#include "formula/simreg.h"

SK_PARAMS(simreg)
SK_PARAMS(simreg_backward)
typedef struct simreg_params forward_params;
typedef struct simreg_backward_params backward_params;

/* Rows one after the other, at any strides. */
static sk_task rows_of(int64_t N, int64_t C, int64_t S) {
    const int64_t width = C > SK_ROW_C ? 1 : SK_SHORT_ROWS;
    return (sk_task){.N = N, .C = C, .S = S, .width = width, .path = "rows"};
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

enum { SCALE_X, SCALE_T, H, VALUE };

static sk_task forward_rows(const forward_params *p) {
    return rows_of(SK_DIM(p, N), SK_DIM(p, C), SK_DIM(p, S));
}

static void find(const forward_params *p, const sk_task *r, const real *weight, sk_found found) {
    for (int64_t i = 0; i < r->width; i++) {
        sk_simreg_row x = {0, 1, 1, 0};
        if (weight[i] != 0 && p->normalize)
            x = compare(p, r, i);
        else if (weight[i] != 0)
            x.value = visit(p, r, i, 1, NULL);
        found[SCALE_X][i] = x.scale_x;
        found[SCALE_T][i] = x.scale_t;
        found[H][i] = x.h;
        found[VALUE][i] = x.value;
    }
}

static inline double value(const forward_params *p, double weight, sk_found found, int64_t i) {
    (void)p;
    return weight * found[VALUE][i];
}

SK_ROW_FORWARD(simreg, forward_rows, 2, 3, find, value);

/* ---- Backward ---- */

static void gradient(sk_simreg_slope k, const real *restrict x, const real *restrict t, int64_t n,
                     real *restrict to) {
#pragma omp simd
    for (int64_t i = 0; i < n; i++) to[i] = (real)sk_simreg_gradient(k, x[i], t[i]);
}

SK_RARE void far_gradient(sk_simreg_slope k, const real *x, const real *t, int64_t n, real *to) {
    for (int64_t i = 0; i < n; i++)
        to[i] = (real)sk_simreg_gradient(k, x[i] * k.by_x, t[i] * k.by_t);
}

/* Leaves the gradient of a run, by the slopes of the task's rows. */
static void slope(void *slopes, const sk_slice *at) {
    const sk_simreg_slope k = ((const sk_simreg_slope *)slopes)[at->run.row];
    if (k.far)
        far_gradient(k, at->x[0], at->x[1], at->run.n, at->to[0]);
    else
        gradient(k, at->x[0], at->x[1], at->run.n, at->to[0]);
}

static sk_task backward_rows(const backward_params *p) {
    return rows_of(SK_DIM(p, N), SK_DIM(p, C), SK_DIM(p, S));
}

static void backward_task(const backward_params *p, const sk_task *r) {
    const double denominator = *(const real *)p->denominator.data;
    const sk_streams streams = {{&p->student, &p->target}, {&p->grad_student}};
    sk_simreg_slope k[SK_SHORT_ROWS];
    sk_incoming in;
    sk_load_incoming(r, &p->grad, &p->weight, &p->saved, 3, &in);
    for (int64_t i = 0; i < r->width; i++)
        k[i] = sk_simreg_slope_of(in.grad[i], in.weight[i], denominator, in.saved[SCALE_X][i],
                                  in.saved[SCALE_T][i], in.saved[H][i],
                                  sizeof(real) == sizeof(double));
    sk_write_gradients(r, &streams, slope, k);
}

SK_ROW_KERNEL(simreg_backward, backward_rows, 2, backward_task, NULL, NULL);
