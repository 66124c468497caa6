/* SimReg on the CPU: see ops/simreg.h for the formula, cpu/core/chunk.h for rows and runs.
 *
 * Each pass reads the features once and computes with them in double, whatever their dtype: to
 * convert costs less than to read, no square of a float overflows or underflows, and the 2 - 2 cos
 * of floats keeps its digits down to rows 1e-3 apart. Closer ones are visited again, while they are
 * in the cache; and so are rows of doubles whose squares are no numbers. */
#include "simreg.h"
#include "cpu/core/chunk.h"
#include "cpu/core/kernel.h"
#include "cpu/core/reduce.h"

SK_PARAMS(simreg)
SK_PARAMS(simreg_backward)
typedef struct simreg_params forward_params;
typedef struct simreg_backward_params backward_params;

/* The least length that a row is divided by. */
#define EPS 1e-12

/* 2 - 2 cos is off by some 1e-15: below this the differences are summed up instead. */
#define NEAR (sizeof(real) == 8 ? 0.03 : 1e-6)

/* A row's loss and, as saved for backward, x_hat = x scale_x, t_hat = t scale_t and h. */
typedef struct result {
    double value, scale_x, scale_t, h;
} result;

/* Tasks of "classes" only: rows one after the other, at any strides. */
static sk_rows rows_of(int64_t N, int64_t C, int64_t S) {
    return (sk_rows){.N = N, .C = C, .S = S, .width = C > SK_ROW_C ? 1 : SK_SHORT_ROWS};
}

static sk_work work_of(int64_t N, int64_t C, int64_t S) {
    const sk_rows all = rows_of(N, C, S);
    sk_work work = sk_work_of(&all, 2);
    work.path = "rows";
    return work;
}

/* ---- Forward ---- */

typedef struct products {
    double xx, tt, xt;
} products;

static products multiply(products sum, const real *restrict x, const real *restrict t, int64_t n) {
    double xx = 0, tt = 0, xt = 0;
#pragma omp simd reduction(+ : xx, tt, xt)
    for (int64_t i = 0; i < n; i++) {
        const double a = x[i], b = t[i];
        xx += a * a;
        tt += b * b;
        xt += a * b;
    }
    return (products){sum.xx + xx, sum.tt + tt, sum.xt + xt};
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

/* Both rows are visited in chunks, for `products` or, where it is not NULL, for the distance. */
static double visit(const forward_params *p, const sk_rows *r, int64_t i, double ratio,
                    products *sum) {
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

/* ---- Rows of doubles too large or too small to square: times powers of two, one by one ---- */

/* Squares of lengths, and factors of features, that are sure to be good. */
static inline bool is_near(double square) { return square > 0x1p-900 && square < 0x1p900; }
static inline bool is_far_scale(double scale) { return scale > 0 && scale < 0x1p-450; }

/* What brings the largest element of row i to between 1 and 2; 1 where there is none. */
static double power_of(const sk_rows *r, const sk_arg *x, int64_t i) {
    double top = 0;
    for (int64_t c = 0; c < r->C; c++)
        top = fmax(top, fabs(sk_load_one(x, sk_class_at(r, x, i, c))));
    const int exponent = top > 0 && isfinite(top) ? -ilogb(top) : 0;
    return ldexp(1, exponent < 1023 ? exponent : 1023);
}

SK_RARE result compare_far(const forward_params *p, const sk_rows *r, int64_t i) {
    const sk_arg *const student = &p->student, *const target = &p->target;
    const double by_x = power_of(r, student, i), by_t = power_of(r, target, i);
    products sum = {0, 0, 0};
    for (int64_t c = 0; c < r->C; c++) {
        const double a = sk_load_one(student, sk_class_at(r, student, i, c)) * by_x;
        const double b = sk_load_one(target, sk_class_at(r, target, i, c)) * by_t;
        sum = (products){sum.xx + a * a, sum.tt + b * b, sum.xt + a * b};
    }
    const double x = sqrt(sum.xx), t = sqrt(sum.tt);
    const bool unit_x = !(x < EPS * by_x), unit_t = !(t < EPS * by_t);
    const double scale_x = 1 / (unit_x ? x : EPS * by_x), scale_t = 1 / (unit_t ? t : EPS * by_t);
    const double xx = unit_x ? 1 : sum.xx * scale_x * scale_x;
    const double tt = unit_t ? 1 : sum.tt * scale_t * scale_t;
    double value = xx + tt - 2 * (sum.xt * scale_x * scale_t);
    if (!(value >= NEAR)) {
        double apart = 0;
        for (int64_t c = 0; c < r->C; c++) {
            const double a = sk_load_one(student, sk_class_at(r, student, i, c)) * by_x;
            const double b = sk_load_one(target, sk_class_at(r, target, i, c)) * by_t;
            const double d = a * (scale_x / scale_t) - b;
            apart += d * d;
        }
        value = apart * scale_t * scale_t;
    }
    return (result){value, scale_x * by_x, scale_t * by_t, unit_x ? (value + (1 - tt)) / 2 : 0};
}

/* ---- all rows ---- */

/* Row i, of unit lengths: by its products or, where 2 - 2 cos would cancel, by its differences. */
static result compare(const forward_params *p, const sk_rows *r, int64_t i) {
    products sum = {0, 0, 0};
    visit(p, r, i, 1, &sum);
    if (sizeof(real) == 8 && !(is_near(sum.xx) && is_near(sum.tt))) return compare_far(p, r, i);
    const double x = sqrt(sum.xx), t = sqrt(sum.tt);
    const bool unit_x = !(x < EPS), unit_t = !(t < EPS);
    const double scale_x = 1 / (unit_x ? x : EPS), scale_t = 1 / (unit_t ? t : EPS);
    const double xx = unit_x ? 1 : sum.xx * scale_x * scale_x; /* |x_hat|^2 */
    const double tt = unit_t ? 1 : sum.tt * scale_t * scale_t;
    double value = xx + tt - 2 * (sum.xt * scale_x * scale_t);
    if (!(value >= NEAR)) value = visit(p, r, i, scale_x / scale_t, NULL) * scale_t * scale_t;
    return (result){value, scale_x, scale_t, unit_x ? (value + (1 - tt)) / 2 : 0};
}

/* Leaves rows and saved. */
static void forward_task(const forward_params *p, const sk_rows *r) {
    real weight[SK_SHORT_ROWS];
    sk_load_scalars(r, &p->weight, weight);
    const int64_t plane = p->saved.stride[0], at = r->n * r->S + r->s; /* outputs are compact */
    double *saved = (double *)p->saved.data + at;
    real *rows = (real *)p->rows.data + at;
    for (int64_t i = 0; i < r->width; i++) {
        result x = {0, 1, 1, 0};
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

/* What the gradient of a row needs: dl/dx = factor ((ratio x - t) - along x), of a far row with x
 * times by_x and t times by_t. */
typedef struct slope {
    bool zero, far; /* zero: no gradient, whatever the features hold */
    double factor, ratio, along, by_x, by_t;
} slope;

static slope slope_of(const backward_params *p, const sk_rows *r, int64_t i, double grad,
                      double weight) {
    const int64_t *stride = p->saved.stride;
    const double *saved = (const double *)p->saved.data + sk_row_at(r, stride[1], stride[2], i);
    const double scale_x = saved[0], scale_t = saved[stride[0]], h = saved[2 * stride[0]];
    const double of_row = 2 * grad * weight / *(const real *)p->denominator.data;
    slope k = {.zero = grad == 0 || weight == 0, .by_x = 1, .by_t = 1};
    k.far = sizeof(real) == 8 && (is_far_scale(scale_x) || is_far_scale(scale_t));
    if (k.far) {
        k.by_x = ldexp(1, ilogb(scale_x));
        k.by_t = ldexp(1, ilogb(scale_t));
    }
    k.ratio = (scale_x / k.by_x) / (scale_t / k.by_t);
    k.factor = of_row * scale_x * (scale_t / k.by_t);
    k.along = k.ratio * h;
    return k;
}

/* Leaves the gradient of a run; exactly 0 for equal features. */
static void gradient(slope k, const real *restrict x, const real *restrict t, int64_t n,
                     real *restrict to) {
#pragma omp simd
    for (int64_t i = 0; i < n; i++) {
        const double a = x[i], apart = a * k.ratio - (double)t[i];
        const double g = k.factor * (apart - a * k.along);
        to[i] = k.zero ? 0 : (real)g;
    }
}

SK_RARE void far_gradient(slope k, const real *x, const real *t, int64_t n, real *to) {
    for (int64_t i = 0; i < n; i++) {
        const double a = x[i] * k.by_x, apart = a * k.ratio - t[i] * k.by_t;
        to[i] = k.zero ? 0 : (real)(k.factor * (apart - a * k.along));
    }
}

/* Leaves the gradients of a task. */
static void backward_task(const backward_params *p, const sk_rows *r) {
    SK_ALIGNED real buffer[3][SK_RUN];
    real grad[SK_SHORT_ROWS], weight[SK_SHORT_ROWS];
    sk_load_scalars(r, &p->grad, grad);
    sk_load_scalars(r, &p->weight, weight);
    slope k[SK_SHORT_ROWS];
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
    const sk_rows all = rows_of(SK_DIM(p, N), SK_DIM(p, C), SK_DIM(p, S));
    for (int64_t i = begin; i < end; i++) {
        const sk_rows r = sk_task(&all, i);
        forward_task(p, &r);
    }
}

static double row_value(const void *params, int64_t n, int64_t s) {
    const forward_params *p = params;
    const sk_rows r = sk_one_row(SK_DIM(p, N), SK_DIM(p, C), SK_DIM(p, S), n, s);
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
    const sk_rows all = rows_of(SK_DIM(p, N), SK_DIM(p, C), SK_DIM(p, S));
    for (int64_t i = begin; i < end; i++) {
        const sk_rows r = sk_task(&all, i);
        backward_task(p, &r);
    }
}

const sk_cpu_kernel SK_CPU(simreg) = {forward_work, simreg_rows, forward_finish, NULL};
const sk_cpu_kernel SK_CPU(simreg_backward) = {backward_work, simreg_backward_rows, NULL, NULL};
