/* Attention transfer on the CPU: see ops/attention.h for the formula, cpu/core/task.h for rows.
 *
 * A task is a run of positions of one sample; the few numbers of all positions are put together
 * when the tasks are done. Squares are summed in double, whatever the dtype: to convert costs less
 * than to read, no square of a float overflows, and maps that nearly agree keep the digits of their
 * difference. Samples of doubles whose squares are no numbers are visited again.
 *
 * Test: python -m pytest tests/test_attention.py    Time: selfkd bench attention */
#include "attention.h"
#include "cpu/core/row_loss.h"

SK_PARAMS(attention)
SK_PARAMS(attention_backward)
typedef struct attention_params forward_params;
typedef struct attention_backward_params backward_params;

enum {
    CHANNELS = 4,   /* added up at a time */
    TOGETHER = 256, /* elements of short planes that are taken as one */
    MANY_TASKS = 64 /* enough for all threads: the runs may be long */
};

/* Runs of equal length, long enough for the hardware to follow. */
static sk_task rows_of(int64_t N, int64_t C, int64_t S) {
    const int64_t most = N * S < MANY_TASKS * SK_RUN ? SK_WIDTH : SK_RUN;
    const int64_t runs = (S - 1) / most + 1;
    return (sk_task){.N = N,
                     .C = C,
                     .S = S,
                     .width = sk_groups((S + runs - 1) / runs) * SK_LANES,
                     .positions = true,
                     .path = "maps"};
}

/* Whether neighbours in memory are positions, not channels. */
static bool has_planes(const sk_arg *x, int64_t S) {
    return S > 1 && x->stride[2] == 1 && x->stride[1] != 1;
}

/* ---- Forward ---- */

static void add_squares(const real *const x[CHANNELS], int64_t n, double *restrict sum) {
    const real *restrict a = x[0], *restrict b = x[1], *restrict c = x[2], *restrict d = x[3];
#pragma omp simd
    for (int64_t i = 0; i < n; i++) {
        const double p = a[i], q = b[i], r = c[i], s = d[i];
        sum[i] += (p * p + q * q) + (r * r + s * s);
    }
}

static double squares(const real *x, int64_t n) {
    double sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t i = 0; i < n; i++) sum += (double)x[i] * (double)x[i];
    return sum;
}

/* How many planes of a task are taken as one: a plane of 16 positions by itself would be mostly the
 * way to it. They need not follow each other, so that the bits are those of any layout. */
static int64_t planes_in_run(const sk_task *r) {
    return r->width == r->S && 2 * r->S <= TOGETHER ? TOGETHER / r->S : 1;
}

static bool are_adjacent(const sk_task *r, const sk_arg *x) {
    return x->stride[1] == r->S && x->stride[2] == 1;
}

/* Planes from channel c on, where they lie one after the other or in the buffer. */
static const real *read_planes(const sk_task *r, const sk_arg *x, int64_t c, int64_t planes,
                               real *buffer) {
    const int64_t at = sk_class_at(r, x, 0, c);
    if (planes == 1 || are_adjacent(r, x))
        return sk_read_exactly(x, at, 1, planes * r->width, buffer);
    for (int64_t k = 0; k < planes; k++)
        sk_copy_apart(x, at + k * x->stride[1], 1, r->width, buffer + k * r->width);
    return buffer;
}

/* Adds the squares of C runs of planes from channel c on. */
static void add_runs(const sk_task *r, const sk_arg *x, int64_t c, int64_t C, int64_t planes,
                     double *sum) {
    static const real zeros[SK_RUN]; /* the runs beyond C */
    SK_ALIGNED real buffer[CHANNELS][SK_RUN];
    for (int64_t i = 0; i < C; i += CHANNELS) {
        const real *run[CHANNELS];
        for (int64_t k = 0; k < CHANNELS; k++)
            run[k] = i + k < C ? read_planes(r, x, c + (i + k) * planes, planes, buffer[k]) : zeros;
        add_squares(run, planes * r->width, sum);
    }
}

/* Leaves the means of squares over C channels of x, at the positions of a task. */
static void mean_squares(const sk_task *r, const sk_arg *x, int64_t C, double *to) {
    SK_ALIGNED double sum[SK_RUN] = {0};
    if (has_planes(x, r->S)) {
        const int64_t planes = planes_in_run(r), whole = C / planes, rest = C % planes;
        add_runs(r, x, 0, whole, planes, sum);
        if (rest > 0) add_runs(r, x, whole * planes, 1, rest, sum);
        for (int64_t k = 1; k < planes; k++)
            for (int64_t i = 0; i < r->width; i++) sum[i] += sum[k * r->width + i];
    } else {
        SK_ALIGNED real buffer[SK_RUN];
        for (int64_t i = 0; i < r->width; i++) {
            for (int64_t c = 0; c < C; c += SK_RUN) {
                const int64_t n = sk_min(SK_RUN, C - c), at = sk_class_at(r, x, i, c);
                sk_fetch_page(x, at, n);
                sum[i] += squares(sk_read_exactly(x, at, x->stride[1], n, buffer), n);
            }
        }
    }
    for (int64_t i = 0; i < r->width; i++) to[i] = sum[i] / (double)C;
}

static double length(const double *x, int64_t n) {
    double sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t i = 0; i < n; i++) sum += x[i] * x[i];
    return sqrt(sum);
}

/* The sum of (ratio a - b)^2, exactly 0 for equal maps and ratio 1. */
static double distance(double ratio, const double *restrict a, const double *restrict b,
                       int64_t n) {
    double sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t i = 0; i < n; i++) {
        const double d = ratio * a[i] - b[i];
        sum += d * d;
    }
    return sum;
}

/* ---- Samples of doubles too large or too small to square twice: times powers of two ---- */

/* Lengths of maps whose products are sure to be good. */
static inline bool is_near(double length) { return length > 0x1p-400 && length < 0x1p400; }

/* Replaces a map by its directions, a / max(|a|, eps); returns max(|a|, eps)^(-1/2), and whether
 * the length is 1. */
SK_RARE double far_map(const sk_task *r, const sk_arg *x, double eps, double *a, bool *unit) {
    double top = 0, square = 0;
    for (int64_t s = 0; s < r->S; s++)
        for (int64_t c = 0; c < r->C; c++)
            top = fmax(top, fabs(sk_load_one(x, sk_class_at(r, x, s, c))));
    const int exponent = top > 0 && isfinite(top) ? -ilogb(top) : 0;
    const double by = ldexp(1, exponent < 1023 ? exponent : 1023), least = eps * by * by;
    for (int64_t s = 0; s < r->S; s++) {
        a[s] = 0;
        for (int64_t c = 0; c < r->C; c++) {
            const double z = sk_load_one(x, sk_class_at(r, x, s, c)) * by;
            a[s] += z * z / (double)r->C;
        }
        square += a[s] * a[s];
    }
    *unit = !(sqrt(square) < least);
    for (int64_t s = 0; s < r->S; s++) a[s] /= *unit ? sqrt(square) : least;
    return *unit ? by / sqrt(sqrt(square)) : 1 / sqrt(eps);
}

/* Leaves directions and slopes of such a sample; returns its |Q - P|^2. */
SK_RARE double conclude_far(const forward_params *p, int64_t n) {
    const int64_t N = SK_DIM(p, N), S = SK_DIM(p, S);
    double *const q = (double *)p->maps.data + n * S, *const t = q + N * S;
    double *const slopes = p->slopes.data;
    const sk_task of_x = {.N = N, .C = SK_DIM(p, C), .S = S, .n = n},
                  of_t = {.N = N, .C = SK_DIM(p, D), .S = S, .n = n};
    bool unit_q, unit_t;
    const double root = far_map(&of_x, &p->student, p->eps, q, &unit_q);
    far_map(&of_t, &p->teacher, p->eps, t, &unit_t);
    const double value = distance(1, q, t, S), long_t = length(t, S);
    const double h = unit_q ? (value + (unit_t ? 0 : 1 - long_t * long_t)) / 2 : 0;
    slopes[n] = 1 - h;
    slopes[N + n] = -root;
    return value;
}

/* ---- all samples ---- */

/* Leaves the slopes of sample n; returns its |Q - P|^2. */
static double conclude(const forward_params *p, int64_t n) {
    const int64_t N = SK_DIM(p, N), S = SK_DIM(p, S);
    const double *const a = (const double *)p->maps.data + n * S, *const b = a + N * S;
    const double long_a = length(a, S), long_b = length(b, S);
    if (sizeof(real) == 8 && !(is_near(long_a) && is_near(long_b))) return conclude_far(p, n);
    const bool unit_a = !(long_a < p->eps), unit_b = !(long_b < p->eps);
    const double scale_a = 1 / (unit_a ? long_a : p->eps), scale_b = 1 / (unit_b ? long_b : p->eps);
    const double value = distance(scale_a / scale_b, a, b, S) * scale_b * scale_b;
    const double bb = unit_b ? 1 : long_b * long_b * scale_b * scale_b; /* |P|^2 */
    const double h = unit_a ? (value + (1 - bb)) / 2 : 0;
    double *const slopes = p->slopes.data;
    slopes[n] = scale_a / scale_b * (1 - h);
    slopes[N + n] = scale_a * scale_b;
    return value;
}

/* ---- Backward ---- */

/* Leaves, for each position of a task, what the features are multiplied by; returns what they are
 * multiplied by once more. */
static double factors_of(const backward_params *p, const sk_task *r, double *restrict to) {
    const int64_t *const stride = p->maps.stride;
    const double *const a = (const double *)p->maps.data + r->n * stride[1] + r->s * stride[2];
    const double *const b = a + stride[0];
    const double *const slopes = (const double *)p->slopes.data + r->n * p->slopes.stride[1];
    const double ratio = slopes[0], grad = *(const real *)p->grad.data;
    const double slope = slopes[p->slopes.stride[0]], once_more = slope < 0 ? -slope : 1;
    const double factor = fabs(slope) * grad * 4 / ((double)r->N * (double)r->S * (double)r->C);
    for (int64_t i = 0; i < r->width; i++)
        to[i] = factor * (ratio * a[i * stride[2]] - b[i * stride[2]]);
    return once_more;
}

static void scale_row(double factor, const real *restrict x, int64_t n, real *restrict to) {
#pragma omp simd
    for (int64_t i = 0; i < n; i++) to[i] = (real)(factor * (double)x[i]);
}

/* In a plane each element has a factor of its own. */
static void scale_plane(const double *restrict factor, const real *restrict x, int64_t n,
                        real *restrict to) {
#pragma omp simd
    for (int64_t i = 0; i < n; i++) to[i] = (real)(factor[i] * (double)x[i]);
}

/* The factors of a task's positions; in planes that follow each other they come again. */
typedef struct factors {
    SK_ALIGNED double of[2 * SK_RUN];
    int64_t period;
} factors;

static void slope(void *context, const sk_slice *at) {
    const factors *const f = context;
    const double *const factor = f->of + at->run.row % f->period;
    if (at->r->positions)
        scale_plane(factor, at->x[0], at->run.n, at->to[0]);
    else
        scale_row(*factor, at->x[0], at->run.n, at->to[0]);
}

/* Planes that follow each other, in both tensors, as one plane whose factors come again. */
static sk_task merge_planes(const sk_task *r, const backward_params *p, double *factor) {
    if (planes_in_run(r) < 2 || !are_adjacent(r, &p->student) || !are_adjacent(r, &p->grad_student))
        return *r;
    sk_task one = *r;
    one.S = one.width = r->C * r->S;
    one.C = 1;
    for (int64_t i = r->S; i < sk_min(one.S, SK_RUN) + r->S; i++) factor[i] = factor[i - r->S];
    return one;
}

/* Multiplies the gradients of a task. */
SK_RARE void multiply(const sk_arg *grad, const sk_task *r, double by) {
    for (int64_t i = 0; i < r->width; i++) {
        for (int64_t c = 0; c < r->C; c++) {
            const int64_t at = sk_class_at(r, grad, i, c);
            sk_store_one(grad, at, (real)(sk_load_one(grad, at) * by));
        }
    }
}

/* Leaves the gradients of a task, in the order of their addresses. */
static void backward_task(const backward_params *p, const sk_task *task) {
    factors f = {.period = task->S};
    const sk_streams streams = {{&p->student}, {&p->grad_student}};
    sk_task r = *task;
    r.positions = has_planes(&p->grad_student, r.S);
    const double once_more = factors_of(p, &r, f.of);
    const sk_task merged = r.positions ? merge_planes(&r, p, f.of) : r;
    sk_write_gradients(&merged, &streams, slope, &f);
    if (once_more != 1) multiply(&p->grad_student, &r, once_more);
}

/* ---- The kernels ---- */

static sk_task forward_rows(const forward_params *p) {
    return rows_of(SK_DIM(p, N), SK_DIM(p, C) + SK_DIM(p, D), SK_DIM(p, S));
}
static sk_task backward_rows(const backward_params *p) {
    return rows_of(SK_DIM(p, N), SK_DIM(p, C), SK_DIM(p, S));
}

static void forward_task(const forward_params *p, const sk_task *r) {
    double *const maps = (double *)p->maps.data + sk_row_in_plane(r);
    mean_squares(r, &p->student, SK_DIM(p, C), maps);
    mean_squares(r, &p->teacher, SK_DIM(p, D), maps + r->N * r->S);
}

static void forward_finish(const void *params) {
    const forward_params *p = params;
    const int64_t N = SK_DIM(p, N);
    double sum = 0;
    for (int64_t n = 0; n < N; n++) sum += conclude(p, n);
    *(real *)p->loss.data = (real)(sum / ((double)N * (double)SK_DIM(p, S)));
}

SK_ROW_KERNEL(attention, forward_rows, 1, forward_task, forward_finish, NULL);
SK_ROW_KERNEL(attention_backward, backward_rows, 1, backward_task, NULL, NULL);
