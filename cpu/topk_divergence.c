/* Divergence from a teacher of K classes on the CPU: see ops/topk_divergence.h for the formula,
 * ops/formula for that of a class, cpu/core/task.h and run.h for rows and runs.
 *
 * Forward visits the logits of a row once, for the sum over the classes that are not listed; those
 * that are listed lie in arrays, and are found in double. Backward visits them once.
 *
 * Test: python -m pytest tests/test_topk_divergence.py
 * Time: selfkd bench topk_divergence --shape 512x32000 */
#include "topk_divergence.h"
#include "cpu/core/kl.h"
#include "cpu/core/row_loss.h"
#include "cpu/core/topk.h"

#include "formula/topk_divergence.h"

SK_PARAMS(topk_divergence)
SK_PARAMS(topk_divergence_backward)
typedef struct topk_divergence_params forward_params;
typedef struct topk_divergence_backward_params backward_params;

/* What both kernels are given. */
typedef struct divergence {
    const sk_arg *logits, *indices, *teacher, *teacher_logsumexp;
    int64_t K, tail;
    double T, T_own; /* that of the teacher */
    bool tv;
    double numbers[SK_UNEVEN + 1];
} divergence;
#define DIVERGENCE_OF(p)                                                                   \
    {                                                                                      \
        &(p)->logits, &(p)->indices, &(p)->teacher, &(p)->teacher_logsumexp, SK_DIM(p, K), \
            (p)->tail, (p)->temperature, (p)->teacher_temperature, (p)->kind == SK_TV,     \
            SK_MIXTURE_OF(double, (p)->beta, (p)->teacher_weight, (p)->student_weight)     \
    }

/* Rows one after the other, at any strides. */
static sk_task rows_of(int64_t N, int64_t C, int64_t S) {
    const int64_t width = C > SK_ROW_C ? 1 : SK_SHORT_ROWS;
    return (sk_task){.N = N, .C = C, .S = S, .width = width, .path = "rows"};
}

/* ---- The classes that are listed ---- */

enum { BUCKETS = 256 };

/* Those of a row, in the order of the buckets that they are in; x and t are their logits and the
 * teacher's values, then log p and log q. Bucket k has 2^shift classes, whole tiles of them. */
typedef struct listed {
    int64_t count, shift;
    int32_t first[BUCKETS + 1], class[SK_MOST_LISTED];
    double x[SK_MOST_TERMS], t[SK_MOST_TERMS];
} listed;

static inline int64_t index_at(const sk_arg *x, int64_t at) {
    return x->dtype == SK_DT_I32 ? ((const int32_t *)x->data)[at] : ((const int64_t *)x->data)[at];
}

static void load_listed(const divergence *d, const sk_task *r, int64_t i, listed *to) {
    const int64_t index = sk_class_at(r, d->indices, i, 0), logit = sk_class_at(r, d->logits, i, 0);
    const int64_t value = sk_class_at(r, d->teacher, i, 0);
    int32_t place[BUCKETS + 1] = {0};
    for (to->shift = 10; (r->C - 1) >> to->shift >= BUCKETS;) to->shift++;
    for (int64_t k = 0; k < d->K; k++) {
        const int64_t c = index_at(d->indices, index + k * d->indices->stride[1]);
        if (c >= 0) place[(c >> to->shift) + 1]++;
    }
    for (int b = 0; b < BUCKETS; b++) place[b + 1] += place[b];
    memcpy(to->first, place, sizeof place);
    to->count = place[BUCKETS];
    for (int64_t k = 0; k < d->K; k++) {
        const int64_t c = index_at(d->indices, index + k * d->indices->stride[1]);
        if (c < 0) continue;
        const int32_t at = place[c >> to->shift]++;
        to->class[at] = (int32_t)c;
        to->x[at] = sk_load_one(d->logits, logit + c * d->logits->stride[1]);
        to->t[at] = sk_load_one(d->teacher, value + k * d->teacher->stride[1]);
    }
}

/* Calls for each listed class of c .. c + n, all of one tile, with its place `k` in the arrays. */
#define EACH_LISTED(x, k, c, n)                                                                   \
    for (int32_t k = (x)->first[(c) >> (x)->shift]; k < (x)->first[((c) >> (x)->shift) + 1]; k++) \
        if ((x)->class[k] >= (c) && (x)->class[k] < (c) + (n))

static double sum_of_exps(const double *x, int64_t n) {
    double sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t k = 0; k < n; k++) sum += sk_exp(x[k]);
    return sum;
}

static double largest_of(double top, const double *x, int64_t n) {
    for (int64_t k = 0; k < n; k++) top = x[k] > top ? x[k] : top;
    return top;
}

/* x becomes (x - h) / T - log_sum. */
static void normalize(double *x, int64_t n, double h, double T, double log_sum) {
    for (int64_t k = 0; k < n; k++) x[k] = (x[k] - h) / T - log_sum;
}

/* The teacher's values become log q. */
static void normalize_teacher(const divergence *d, const sk_task *r, int64_t i, listed *x) {
    const sk_arg *const lse = d->teacher_logsumexp;
    if (d->tail == SK_RENORMALIZE) {
        const double top = largest_of(-INFINITY, x->t, x->count);
        normalize(x->t, x->count, top, d->T_own, 0);
        normalize(x->t, x->count, 0, 1, log(sum_of_exps(x->t, x->count)));
    } else if (lse->data) {
        const int64_t at = sk_row_at(r, lse->stride[0], lse->stride[1], i);
        normalize(x->t, x->count, 0, d->T_own, sk_load_one(lse, at));
    }
}

/* Leaves what the formula makes of n classes. */
static void measure(const divergence *d, int64_t n, const listed *x, sk_topk_terms *to) {
    const bool uneven = d->tail == SK_DROP && !d->tv;
    SK_CPU(measure_topk)(d->tv, d->numbers, uneven ? d->numbers[SK_UNEVEN] : 0, n, x->x, x->t, to);
}

/* ---- Forward ---- */

enum { TOP, LOG_SUM, SLOPE, OTHERS, LOSS };

/* The largest logit, and the sum of exp((x - top) / T), of the classes that are not listed. */
typedef struct tail {
    double top, sum;
} tail;

static real raise(real top, const real *restrict x, int64_t n) {
#pragma omp simd reduction(max : top)
    for (int64_t i = 0; i < n; i++) top = x[i] > top ? x[i] : top;
    return top;
}
static double add_in_real(const real *restrict x, int64_t n, real top, const sk_scale *scale) {
    const sk_scale t = *scale;
    real sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t i = 0; i < n; i++) sum += sk_exp_of(x[i] - top, &t);
    return sum;
}
static double add_in_double(const real *restrict x, int64_t n, double top, double per_T) {
    double sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t i = 0; i < n; i++) sum += sk_exp((x[i] - top) * per_T);
    return sum;
}

static tail sum_tail(const divergence *d, const sk_task *r, int64_t i, const listed *x,
                     bool exact) {
    SK_ALIGNED real tile[SK_ROW_C];
    const sk_scale t = sk_scale_of(d->T);
    tail sum = {-INFINITY, 0};
    for (int64_t c = 0; c < r->C; c += SK_ROW_C) {
        const int64_t n = sk_min(SK_ROW_C, r->C - c), lanes = sk_groups(n) * SK_LANES;
        sk_fill(d->logits, sk_class_at(r, d->logits, i, c), d->logits->stride[1], n, tile);
        EACH_LISTED(x, k, c, n) tile[x->class[k] - c] = -INFINITY;
        const real top = raise((real)sum.top, tile, lanes), anchor = top > -INFINITY ? top : 0;
        if (top > sum.top) sum.sum *= sk_exp((sum.top - top) / d->T);
        sum.top = top;
        sum.sum += exact ? add_in_double(tile, lanes, anchor, t.per_T)
                         : add_in_real(tile, lanes, anchor, &t);
    }
    return sum;
}

/* Leaves what is found of a row; false where the tail, unless it is exact, is not known well
 * enough, for the rows are close: their divergence is of second order, but what it changes by with
 * the sum of the tail, by up to 2e-7 of which that is off in float, is of first. */
static bool find_row(const divergence *d, const sk_task *r, int64_t i, bool exact, sk_found found) {
    listed x;
    sk_topk_terms of;
    load_listed(d, r, i, &x);
    int64_t n = x.count;
    const bool bucket = d->tail == SK_BUCKET && n < r->C;
    const tail rest =
        d->tail == SK_RENORMALIZE ? (tail){-INFINITY, 0} : sum_tail(d, r, i, &x, exact);
    const double h = largest_of(rest.top, x.x, n), below = (rest.top - h) / d->T;
    normalize(x.x, n, h, d->T, 0);
    const double sum = sum_of_exps(x.x, n) + (rest.sum == 0 ? 0 : rest.sum * sk_exp(below));
    const double log_sum = log(sum), log_rest = below + log(rest.sum) - log_sum;
    normalize(x.x, n, 0, 1, log_sum);
    normalize_teacher(d, r, i, &x);
    if (bucket) {
        const double left = 1 - sum_of_exps(x.t, n);
        x.x[n] = rest.sum == 0 ? -INFINITY : log_rest;
        x.t[n++] = log(left < SK_LEAST_TAIL ? SK_LEAST_TAIL : left);
    }
    measure(d, n, &x, &of);
    double loss = 0, most = 0, slope = 0, reference = 0;
    for (int64_t k = 0; k < n; k++) loss += of.value[k];
    if (d->tail == SK_DROP) { /* the others are one class with a term of 0 */
        of.p[n] = rest.sum == 0 ? 0 : sk_exp(log_rest);
        of.slope[n] = of.limit[n] = 0;
        n++;
    }
    for (int64_t k = 0; k < n; k++) { /* nothing cancels where one class has nearly all of p */
        reference = of.p[k] > most ? of.slope[k] : reference;
        most = of.p[k] > most ? of.p[k] : most;
    }
    for (int64_t k = 0; k < n; k++) slope += of.p[k] * (of.slope[k] - reference) + of.limit[k];
    slope += reference;
    const int64_t k = x.count; /* the place of the tail */
    const double of_tail = n > k ? of.p[k] * (of.slope[k] - slope) + of.limit[k] : 0;
    found[TOP][i] = rest.top;
    found[LOG_SUM][i] = log_sum;
    found[SLOPE][i] = slope;
    found[OTHERS][i] = rest.sum == 0 ? 0 : of_tail / rest.sum;
    found[LOSS][i] = loss;
    return !(fabs(of_tail) > 10 * fabs(loss));
}

static sk_task forward_rows(const forward_params *p) {
    return rows_of(SK_DIM(p, N), SK_DIM(p, C), SK_DIM(p, S));
}

static void find(const forward_params *p, const sk_task *r, const real *weight, sk_found found) {
    const divergence d = DIVERGENCE_OF(p);
    for (int64_t i = 0; i < r->width; i++)
        if (weight[i] != 0 && !find_row(&d, r, i, sizeof(real) == 8, found))
            find_row(&d, r, i, true, found);
}

static inline double value(const forward_params *p, double weight, sk_found found, int64_t i) {
    (void)p;
    return weight * found[LOSS][i];
}

/* ---- Values that are wrong ---- */

/* The first row that lists what is no class, or a class twice. */
static sk_bad bad_classes(const sk_arg *x, const sk_dims *dims, size_t item) {
    enum { WINDOW = 1 << 18 }; /* classes that are looked for at a time */
    uint64_t seen[WINDOW / 64] = {0};
    const int64_t N = dims->size['N' - 'A'], K = dims->size['K' - 'A'], C = dims->size['C' - 'A'];
    const int64_t S = dims->size['S' - 'A'];
    for (int64_t row = 0; row < N * S; row++) {
        const int64_t at = row / S * x->stride[0] + row % S * x->stride[2];
        for (int64_t base = 0; base < C; base += WINDOW) {
            for (int64_t k = 0; k < K; k++) {
                const int64_t c = index_at(x, at + k * x->stride[1]), i = c - base;
                if (c < -1 || c >= C) return (sk_bad){row, item, (double)c};
                if (i < 0 || i >= WINDOW) continue;
                if (seen[i / 64] >> i % 64 & 1) return (sk_bad){row, item, (double)c};
                seen[i / 64] |= (uint64_t)1 << i % 64;
            }
            for (int64_t k = 0; k < K; k++) {
                const int64_t i = index_at(x, at + k * x->stride[1]) - base;
                if (i >= 0 && i < WINDOW) seen[i / 64] = 0;
            }
        }
    }
    return (sk_bad){-1, 0, 0};
}

static sk_bad forward_bad(const void *params) {
    const forward_params *const p = params;
    return bad_classes(&p->indices, &p->dims, offsetof(forward_params, indices));
}
static sk_bad backward_bad(const void *params) {
    const backward_params *const p = params;
    return bad_classes(&p->indices, &p->dims, offsetof(backward_params, indices));
}

SK_CHECKED_ROW_FORWARD(topk_divergence, forward_rows, 1, 4, find, value, forward_bad);

/* ---- Backward ---- */

/* What the rows of a task need; the classes and their gradients are those of one row at a time. */
typedef struct pass {
    const divergence *d;
    const sk_incoming *in;
    double denominator;
    sk_scale t;
    listed x;
    sk_topk_terms of;
    real gradient[SK_MOST_LISTED],
        others; /* what exp((x - top) / T) of the others is multiplied by */
} pass;

static void begin_row(pass *x, const sk_task *r, int64_t i) {
    const sk_incoming *const in = x->in;
    const double slope = in->saved[SLOPE][i];
    const bool none = (in->grad[i] == 0) | (in->weight[i] == 0);
    const double factor =
        none ? 0 : (double)in->grad[i] * in->weight[i] / (x->denominator * x->d->T);
    x->others = none ? 0 : (real)(in->saved[OTHERS][i] * factor);
    x->x.count = 0;
    if (none) return;
    load_listed(x->d, r, i, &x->x);
    const double h = largest_of(in->saved[TOP][i], x->x.x, x->x.count);
    normalize(x->x.x, x->x.count, h, x->d->T, in->saved[LOG_SUM][i]);
    normalize_teacher(x->d, r, i, &x->x);
    measure(x->d, x->x.count, &x->x, &x->of);
    for (int64_t k = 0; k < x->x.count; k++)
        x->gradient[k] = (real)((x->of.p[k] * (x->of.slope[k] - slope) + x->of.limit[k]) * factor);
}

static void write_others(real h, real factor, const sk_scale *scale, const real *restrict x,
                         int64_t n, real *restrict to) {
    const sk_scale t = *scale;
#pragma omp simd
    for (int64_t i = 0; i < n; i++) to[i] = sk_exp_of(x[i] - h, &t) * factor;
}

/* Leaves the gradient of a run. */
static void write(void *context, const sk_slice *at) {
    pass *const x = context;
    const int64_t i = at->run.row, c = at->run.c, n = at->run.n;
    if (c == 0) begin_row(x, at->r, i);
    if (x->others != 0)
        write_others((real)x->in->saved[TOP][i], x->others, &x->t, at->x[0], n, at->to[0]);
    else
        memset(at->to[0], 0, (size_t)n * sizeof(real));
    if (x->x.count == 0) return;
    EACH_LISTED(&x->x, k, c, n) at->to[0][x->x.class[k] - c] = x->gradient[k];
}

static sk_task backward_rows(const backward_params *p) {
    return rows_of(SK_DIM(p, N), SK_DIM(p, C), SK_DIM(p, S));
}

static void backward_task(const backward_params *p, const sk_task *r) {
    const divergence d = DIVERGENCE_OF(p);
    const sk_streams streams = {{&p->logits}, {&p->grad_logits}};
    sk_incoming in;
    pass x;
    sk_load_incoming(r, &p->grad, &p->weight, &p->saved, 4, &in);
    x.d = &d;
    x.in = &in;
    x.denominator = *(const real *)p->denominator.data;
    x.t = sk_scale_of(d.T);
    sk_write_gradients(r, &streams, write, &x);
}

SK_ROW_KERNEL(topk_divergence_backward, backward_rows, 1, backward_task, NULL, backward_bad);
