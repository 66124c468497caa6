/* clang-format off */
/* Losses of two rows of logits that are a sum over the classes, l = sum of phi(p, q) with p =
 * softmax(u/T) and q = softmax(v/T), such as total variation. An operator gives its formula, and
 * everything else is here.
 *
 * ops/formula/<op>.h has three functions of a class, each of (p, q, d, p_q, k):
 *
 *   <op>_value      phi
 *   <op>_slope_p    dphi/dp; where p is 0 its result is not used
 *   <op>_slope_q    dphi/dq; where q is 0 its result is not used
 *
 * d = log p - log q and p_q = p - q are right to the last digits however close the rows are. k holds
 * the operator's own numbers, <op>_NUMBERS(params). A class that one side excludes (its logit is -inf)
 * has p or q exactly 0 and a d that is large but finite; one that both exclude does not count. What
 * is NaN must come out NaN, of slopes too. With A the sum of p slope_p and B that of q slope_q
 *
 *   dl/du = p (slope_p - A) / T        dl/dv = q (slope_q - B) / T
 *
 * p and q are right to 3e-7 of themselves (double: 1e-15), d to the rounding of u/T, v/T and of the
 * log-sum-exps, which are found as for sd_dropout_kl (pair.h). A and B are saved as one double each:
 * where all but 1e-9 of p is on one class, the gradient, which is as small, keeps fewer digits
 * (7e-5 of the row's largest where the rest is 6e-14). Forward visits the logits three times,
 * backward once. */
/* clang-format on */
#pragma once
#include "cpu/core/pair.h"
#include "cpu/core/row_loss.h"

typedef real (*sk_of_class)(real p, real q, real d, real p_q, const real *k);
typedef struct sk_pair_formula {
    sk_of_class value, slope_p, slope_q;
    const real *k;
} sk_pair_formula;

/* What is found of a row: lse(u/T) and dl as in pair.h, A and B, and the loss. */
enum { SK_SLOPE_P = SK_DL + 1, SK_SLOPE_Q, SK_LOSS };

/* ---- A row in double, class by class ---- */

static inline bool sk_is_far_pair(sk_found x, int64_t i, double factor) {
    return (fabs(x[SK_LSE][i]) >= SK_FAR_LSE) | (fabs(x[SK_DL][i]) >= SK_FAR_LSE) |
           sk_is_far_factor(factor);
}

/* The formula's result for class c of row i: by one of its functions, or 0. */
static inline double sk_careful_class(const sk_pair_formula *f, sk_of_class of, sk_class_terms x) {
    const bool near = fabs(x.d) < 0.5, nowhere = x.no_p && x.no_q;
    const real d = (real)(x.no_p ? SK_LEAST : x.no_q ? -SK_LEAST : x.d);
    const real p_q = (real)(near ? x.q * expm1(x.d) : x.p - x.q);
    return nowhere ? 0 : of((real)x.p, (real)x.q, d, p_q, f->k);
}

/* Row i, of which x holds the log-sum-exps. */
static inline sk_row_pair sk_found_pair(const sk_task *r, const sk_pair *x, sk_found found,
                                        int64_t i) {
    const sk_row_pair both = sk_row_pair_of(r, x->u, x->v, x->t.T, i);
    return sk_row_pair_within(both, found[SK_LSE][i], found[SK_DL][i]);
}

SK_RARE void sk_careful_sums(const sk_row_pair *row, const sk_pair_formula *f, sk_found x) {
    double loss = 0, a = 0, b = 0;
    for (int64_t c = 0; c < row->r->C; c++) {
        const sk_class_terms of = sk_class_of(row, c);
        loss += sk_careful_class(f, f->value, of);
        a += of.p == 0 ? 0 : of.p * sk_careful_class(f, f->slope_p, of);
        b += of.q == 0 ? 0 : of.q * sk_careful_class(f, f->slope_q, of);
    }
    x[SK_LOSS][row->i] = loss;
    x[SK_SLOPE_P][row->i] = a;
    x[SK_SLOPE_Q][row->i] = b;
}

SK_RARE void sk_careful_slopes(const sk_row_pair *row, const sk_pair_formula *f, sk_found x,
                               double factor, const sk_streams *to) {
    const sk_arg *const grad_u = to->written[0], *const grad_v = to->written[1];
    const double a = x[SK_SLOPE_P][row->i], b = x[SK_SLOPE_Q][row->i];
    for (int64_t c = 0; c < row->r->C; c++) {
        const sk_class_terms of = sk_class_of(row, c);
        const double to_u = of.p == 0 ? 0 : of.p * (sk_careful_class(f, f->slope_p, of) - a);
        const double to_v = of.q == 0 ? 0 : of.q * (sk_careful_class(f, f->slope_q, of) - b);
        sk_store_one(grad_u, sk_class_at(row->r, grad_u, row->i, c), (real)(factor * to_u));
        sk_store_one(grad_v, sk_class_at(row->r, grad_v, row->i, c), (real)(factor * to_v));
    }
}

/* ---- All rows ---- */

/* A sum of p dphi/dp that stays exact where one class has nearly all of p, so that the gradient is
 * a small difference: with `slope` that of the class with the largest p so far, the rest of the sum
 * of p (dphi/dp - slope), and the sum of p. One for each lane. */
typedef struct sk_slope_sum {
    SK_ALIGNED real largest[SK_PITCH], slope[SK_PITCH], mass[SK_PITCH];
    SK_ALIGNED double rest[SK_PITCH];
} sk_slope_sum;

/* What a row's gradient needs besides: its factor; A and B, each as the sum of two reals, for
 * dphi/dp may be as large; and AGREE, a d below which is no more than the rounding of a constant
 * between u and v, and counts as 0. */
enum { SK_ROW_FACTOR, SK_A_HIGH, SK_A_LOW, SK_B_HIGH, SK_B_LOW, SK_AGREE, SK_PAIR_LOSS_SCALARS };

/* What a pass over the runs of a task needs, and where its sums go: of "classes" those of row i are
 * in lanes from i * SK_LANES. */
typedef struct sk_pair_pass {
    const real *numbers; /* k of the formula */
    const sk_scale *t;
    SK_ALIGNED sk_pair_scalars pair;
    sk_slope_sum a, b;
    SK_ALIGNED double loss[SK_PITCH];
    SK_ALIGNED real of[SK_PAIR_LOSS_SCALARS][SK_PITCH];
} sk_pair_pass;

SK_SPECIAL sk_pair_class sk_pair_class_at(const sk_scale *t, sk_pair_pass *x, int64_t i, real u,
                                          real v) {
    sk_pair_class y = sk_pair_at(false, t, x->pair, i, u, v);
    const bool agree = (y.d < x->of[SK_AGREE][i]) & (y.d > -x->of[SK_AGREE][i]);
    y.d = agree ? 0 : y.d;
    y.p_q = agree ? 0 : y.p_q;
    return y;
}

/* Adds p and its slope to lane `at`; rest is added up in real for the length of a run. */
SK_SPECIAL real sk_add_slope(sk_slope_sum *to, int64_t at, real p, real slope) {
    const bool there = p != 0;
    const real before = to->slope[at], now = there & (p > to->largest[at]) ? slope : before;
    const real rest = (before - now) * to->mass[at] + (there ? p * (slope - now) : 0);
    to->largest[at] = there & (p > to->largest[at]) ? p : to->largest[at];
    to->slope[at] = now;
    to->mass[at] += p;
    return rest;
}

/* Adds a run to the sums. */
SK_SPECIAL void sk_add_pair_run(bool positions, sk_pair_formula f, sk_pair_pass *x,
                                const sk_slice *at) {
    const sk_scale t = *x->t;
    const real *const u = at->x[0], *const v = at->x[1];
    real loss[SK_LANES] = {0}, rest_a[SK_LANES] = {0}, rest_b[SK_LANES] = {0};
    for (int64_t n = 0; n < at->run.n; n += SK_LANES) {
        const int64_t first = positions ? at->run.row + n : at->run.row * SK_LANES;
#pragma omp simd
        for (int k = 0; k < SK_LANES; k++) {
            const int64_t i = positions ? first + k : at->run.row;
            const sk_pair_class y = sk_pair_class_at(&t, x, i, u[n + k], v[n + k]);
            const bool nowhere = (u[n + k] < t.least) & (v[n + k] < t.least);
            const real value = f.value(y.p, y.q, y.d, y.p_q, f.k);
            const real a =
                sk_add_slope(&x->a, first + k, y.p, f.slope_p(y.p, y.q, y.d, y.p_q, f.k));
            const real b =
                sk_add_slope(&x->b, first + k, y.q, f.slope_q(y.p, y.q, y.d, y.p_q, f.k));
            loss[k] = (positions ? 0 : loss[k]) + (nowhere ? 0 : value);
            rest_a[k] = (positions ? 0 : rest_a[k]) + a;
            rest_b[k] = (positions ? 0 : rest_b[k]) + b;
        }
        if (!positions && n + SK_LANES < at->run.n) continue;
        for (int k = 0; k < SK_LANES; k++) {
            x->loss[first + k] += loss[k];
            x->a.rest[first + k] += rest_a[k];
            x->b.rest[first + k] += rest_b[k];
        }
    }
}

/* The sum of `lanes` lanes from `first`, with the slope of the largest of all. */
static inline double sk_slope_total(const sk_slope_sum *x, int64_t first, int64_t lanes) {
    int64_t best = first;
    double sum = 0;
    for (int64_t i = first; i < first + lanes; i++)
        if (x->largest[i] > x->largest[best]) best = i;
    for (int64_t i = first; i < first + lanes; i++)
        sum += x->rest[i] + (double)x->mass[i] * ((double)x->slope[i] - (double)x->slope[best]);
    return x->slope[best] + sum;
}

/* Leaves the gradients of a run. */
SK_SPECIAL void sk_pair_loss_run(bool positions, sk_pair_formula f, sk_pair_pass *x,
                                 const sk_slice *at) {
    const sk_scale t = *x->t;
    const real *const u = at->x[0], *const v = at->x[1];
    const sk_ahead next_u = sk_next_of(at, 0), next_v = sk_next_of(at, 1);
    real *restrict const grad_u = at->to[0], *restrict const grad_v = at->to[1];
    for (int64_t n = 0; n < at->run.n; n += SK_LANES) {
        sk_fetch(next_u, n / SK_LANES);
        sk_fetch(next_v, n / SK_LANES);
#pragma omp simd
        for (int k = 0; k < SK_LANES; k++) {
            const int64_t i = positions ? at->run.row + n + k : at->run.row;
            const sk_pair_class y = sk_pair_class_at(&t, x, i, u[n + k], v[n + k]);
            const real factor = x->of[SK_ROW_FACTOR][i];
            const real of_p = f.slope_p(y.p, y.q, y.d, y.p_q, f.k) - x->of[SK_A_HIGH][i];
            const real of_q = f.slope_q(y.p, y.q, y.d, y.p_q, f.k) - x->of[SK_B_HIGH][i];
            const real to_u = factor * y.p * (of_p - x->of[SK_A_LOW][i]);
            const real to_v = factor * y.q * (of_q - x->of[SK_B_LOW][i]);
            grad_u[n + k] = (factor != 0) & (y.p != 0) ? to_u : 0;
            grad_v[n + k] = (factor != 0) & (y.q != 0) ? to_v : 0;
        }
    }
}

/* Sets the scalars of the rows whose log-sum-exps, and A and B in backward, are in x. */
static inline void sk_set_pair_loss(const sk_task *r, const sk_pair *pair, sk_found x,
                                    const double *factor, sk_pair_pass *to) {
    to->t = &pair->t;
    for (int64_t i = 0; i < sk_scalars(r); i++) {
        const sk_split a = sk_split_of(x[SK_SLOPE_P][i]), b = sk_split_of(x[SK_SLOPE_Q][i]);
        sk_set_sides(&pair->t, x[SK_LSE][i], x[SK_DL][i], 1, i, to->pair);
        to->pair[SK_EXACTLY][i] = 1;
        to->of[SK_ROW_FACTOR][i] = (real)factor[i];
        to->of[SK_A_HIGH][i] = a.high;
        to->of[SK_A_LOW][i] = a.low;
        to->of[SK_B_HIGH][i] = b.high;
        to->of[SK_B_LOW][i] = b.low;
        to->of[SK_AGREE][i] = (real)(4 * DBL_EPSILON * fabs(x[SK_DL][i]));
    }
}

/* Leaves what is found of the rows of a task: add() is a pass of sk_add_pair_run. */
static inline void sk_find_pair_loss(const sk_task *r, const sk_pair *pair, const real *weight,
                                     const sk_pair_formula *f, sk_slope add, sk_found found) {
    const int64_t lanes = r->positions ? 1 : SK_LANES;
    const sk_streams streams = {{pair->u, pair->v}, {NULL}};
    sk_pair_pass x; /* set field by field, for its planes are large */
    x.numbers = f->k;
    sk_diverge(r, pair, weight, found);
    for (int64_t i = r->width; i < sk_scalars(r); i++) found[SK_LSE][i] = found[SK_DL][i] = 0;
    for (int64_t i = 0; i < sk_scalars(r); i++) found[SK_SLOPE_P][i] = found[SK_SLOPE_Q][i] = 0;
    sk_set_pair_loss(r, pair, found, found[SK_SLOPE_P], &x);
    memset(&x.a, 0, sizeof x.a);
    memset(&x.b, 0, sizeof x.b);
    memset(x.loss, 0, sizeof x.loss);
    sk_write_gradients(r, &streams, add, &x);
    for (int64_t i = 0; i < r->width; i++) {
        double loss = 0;
        for (int64_t k = 0; k < lanes; k++) loss += x.loss[i * lanes + k];
        found[SK_LOSS][i] = loss;
        found[SK_SLOPE_P][i] = sk_slope_total(&x.a, i * lanes, lanes);
        found[SK_SLOPE_Q][i] = sk_slope_total(&x.b, i * lanes, lanes);
        if (weight[i] == 0 || !sk_is_far_pair(found, i, 0)) continue;
        const sk_row_pair row = sk_found_pair(r, pair, found, i);
        sk_careful_sums(&row, f, found);
    }
}

/* Leaves the gradients of a task: write() is a pass of sk_pair_loss_run. per_row: what the rows'
 * gradients are multiplied by, besides their weights. */
static inline void sk_differentiate_pair_loss(const sk_task *r, const sk_pair *pair,
                                              const sk_pair_formula *f, sk_slope write,
                                              sk_incoming *in, double per_row,
                                              const sk_streams *streams) {
    SK_ALIGNED double factor[SK_PITCH];
    sk_pair_pass x; /* set field by field, for its planes are large */
    x.numbers = f->k;
    for (int64_t i = 0; i < sk_scalars(r); i++) {
        const bool none = (in->grad[i] == 0) | (in->weight[i] == 0);
        factor[i] = none ? 0 : per_row * in->grad[i] * in->weight[i];
    }
    sk_set_pair_loss(r, pair, in->saved, factor, &x);
    sk_write_gradients(r, streams, write, &x);
    for (int64_t i = 0; i < r->width; i++) {
        if (factor[i] == 0 || !sk_is_far_pair(in->saved, i, factor[i])) continue;
        const sk_row_pair row = sk_found_pair(r, pair, in->saved, i);
        sk_careful_slopes(&row, f, in->saved, factor[i], streams);
    }
}

/* Defines the kernels op and op_backward of a loss with the inputs u, v and weight and a
 * temperature, by its formula. */
#define SK_PAIR_LOSS(op)                                                                       \
    static void op##_add(void *pass, const sk_slice *at) {                                     \
        sk_pair_pass *const x = pass;                                                          \
        const sk_pair_formula f = {op##_value, op##_slope_p, op##_slope_q, x->numbers};        \
        if (at->r->positions)                                                                  \
            sk_add_pair_run(true, f, x, at);                                                   \
        else                                                                                   \
            sk_add_pair_run(false, f, x, at);                                                  \
    }                                                                                          \
    static void op##_write(void *pass, const sk_slice *at) {                                   \
        sk_pair_pass *const x = pass;                                                          \
        const sk_pair_formula f = {op##_value, op##_slope_p, op##_slope_q, x->numbers};        \
        if (at->r->positions)                                                                  \
            sk_pair_loss_run(true, f, x, at);                                                  \
        else                                                                                   \
            sk_pair_loss_run(false, f, x, at);                                                 \
    }                                                                                          \
    static sk_task op##_all(const struct op##_params *p) { return SK_TASKS_OF(p, u); }         \
    static void op##_find(const struct op##_params *p, const sk_task *r, const real *weight,   \
                          sk_found found) {                                                    \
        const real k[] = op##_NUMBERS(p);                                                      \
        const sk_pair pair = {&p->u, &p->v, sk_scale_of(p->temperature)};                      \
        const sk_pair_formula f = {op##_value, op##_slope_p, op##_slope_q, k};                 \
        sk_find_pair_loss(r, &pair, weight, &f, op##_add, found);                              \
    }                                                                                          \
    static inline double op##_loss(const struct op##_params *p, double weight, sk_found found, \
                                   int64_t i) {                                                \
        (void)p;                                                                               \
        return weight * found[SK_LOSS][i];                                                     \
    }                                                                                          \
    SK_ROW_FORWARD(op, op##_all, 2, SK_SAVED, op##_find, op##_loss);                           \
    static sk_task op##_backward_all(const struct op##_backward_params *p) {                   \
        return SK_TASKS_OF(p, u);                                                              \
    }                                                                                          \
    static void op##_backward_task(const struct op##_backward_params *p, const sk_task *r) {   \
        const real k[] = op##_NUMBERS(p);                                                      \
        const sk_pair pair = {&p->u, &p->v, sk_scale_of(p->temperature)};                      \
        const sk_pair_formula f = {op##_value, op##_slope_p, op##_slope_q, k};                 \
        const sk_streams streams = {{&p->u, &p->v}, {&p->grad_u, &p->grad_v}};                 \
        const double per_row = 1 / (p->temperature * *(const real *)p->denominator.data);      \
        sk_incoming in;                                                                        \
        sk_load_incoming(r, &p->grad, &p->weight, &p->saved, SK_SAVED, &in);                   \
        sk_differentiate_pair_loss(r, &pair, &f, op##_write, &in, per_row, &streams);          \
    }                                                                                          \
    SK_ROW_KERNEL(op##_backward, op##_backward_all, 2, op##_backward_task, NULL, NULL)
