/* clang-format off */
/* Losses of two rows of logits that are a sum over the classes, l = sum of phi(p, q) with p =
 * softmax(u/T) and q = softmax(v/T'), such as total variation. An operator gives its formula, and
 * everything else is here.
 *
 * ops/formula/<op>.h has <op>_terms(x, k), of a class x (formula/pair_class.h) and of k, the
 * operator's own numbers <op>_NUMBERS(params). It returns
 *
 *   value               phi; 0 where p and q are
 *   slope_p, slope_q    dphi/dp and dphi/dq
 *   limit_p, limit_q    p dphi/dp and q dphi/dq where p or q is 0 or the slope infinite
 *
 * What is NaN must come out NaN, of slopes too. With A the sum of p slope_p and B that of q slope_q
 *
 *   dl/du = p (slope_p - A) / T        dl/dv = q (slope_q - B) / T'
 *
 * All that a class holds is right to 4e-7 of itself (double: 1e-15), however close p and q are. Where
 * one class has nearly all of p, its slope_p - A is a small difference: forward sums slope_p less that
 * of this class, and backward finds the same slope to the last bit. For that, a product that the
 * slopes only add to something must not go into the value: gcc would fuse it in one pass alone.
 *
 * Forward visits the logits twice, for the log-sum-exps and for the loss, backward once. The dl that
 * the first visit leaves is off by some 1e-7. That does no harm to a formula with A and B of second
 * order, unless the rows are close; those, and all rows where the formula is not `smooth`, such as
 * total variation, are visited for dl alone in between. */
/* clang-format on */
#pragma once
#include "cpu/core/pair_class.h"
#include "cpu/core/row_loss.h"

struct sk_tops;
struct sk_pair_pass;
typedef sk_pair_result (*sk_pair_terms_of)(sk_pair_class x, const real *k);
typedef struct sk_pair_formula {
    bool smooth;
    sk_pair_terms_of terms;
    void (*set)(const sk_task *r, const struct sk_tops *tops, struct sk_pair_pass *x);
    sk_slope add, write; /* passes of sk_add_pair_run and sk_pair_loss_run with this formula */
} sk_pair_formula;

/* ---- A row in double, class by class ---- */

static inline bool sk_is_far_pair(sk_found x, int64_t i, double factor) {
    return (fabs(x[SK_LSE][i]) >= SK_FAR_LSE) | (fabs(x[SK_DL][i]) >= SK_FAR_LSE) |
           sk_is_far_factor(factor);
}

/* Leaves what is found of a row. */
SK_RARE void sk_careful_sums(const sk_row_pair *row, const sk_pair_formula *f, const real *k,
                             sk_found x) {
    double loss = sk_is_finite_pair(row) ? 0 : (double)NAN, a = loss, b = loss;
    for (int64_t c = 0; c < row->r->C; c++) {
        const sk_class_terms of = sk_class_of(row, c);
        const sk_pair_result y = f->terms(sk_careful_class(of), k);
        const bool infinite = isnan(y.value) && isinf(of.d); /* times a p or q that is no real */
        loss += of.no_p && of.no_q ? 0 : infinite ? (double)INFINITY : (double)y.value;
        a += of.p == 0 || isinf(y.slope_p) ? (double)y.limit_p : of.p * y.slope_p;
        b += of.q == 0 || isinf(y.slope_q) ? (double)y.limit_q : of.q * y.slope_q;
    }
    x[SK_LSE][row->i] = sk_lse_of(row->of_u, row->T);
    x[SK_DL][row->i] = sk_log_ratio_of_sums(row);
    x[SK_SLOPE_P][row->i] = a;
    x[SK_SLOPE_Q][row->i] = b;
    x[SK_LOSS][row->i] = loss;
}

/* Leaves its gradients, those that are asked for, times their factors. */
SK_RARE void sk_careful_slopes(const sk_row_pair *row, const sk_pair_formula *f, const real *k,
                               sk_found x, const double *factor, const sk_streams *to) {
    const double a = x[SK_SLOPE_P][row->i], b = x[SK_SLOPE_Q][row->i];
    for (int64_t c = 0; c < row->r->C; c++) {
        const sk_class_terms of = sk_class_of(row, c);
        const sk_pair_result y = f->terms(sk_careful_class(of), k);
        const bool no_p = of.p == 0 || isinf(y.slope_p), no_q = of.q == 0 || isinf(y.slope_q);
        const double slope[2] = {no_p ? (double)y.limit_p : of.p * (y.slope_p - a),
                                 no_q ? (double)y.limit_q : of.q * (y.slope_q - b)};
        sk_store_wanted(row->r, to->written[0], row->i, c, (real)(factor[0] * slope[0]));
        sk_store_wanted(row->r, to->written[1], row->i, c, (real)(factor[1] * slope[1]));
    }
}

/* ---- All rows ---- */

/* Rows of a larger loss are found class by class. */
#define SK_LARGE_LOSS 1e13

/* Whether p times its slope is no limit: neither has left the range of a real. */
SK_SPECIAL bool sk_counts(real p, real slope) {
    return (p != 0) & !(sk_abs(slope) == (real)INFINITY);
}

/* Adds a run to the sums. */
SK_SPECIAL void sk_add_pair_run(bool positions, sk_pair_terms_of terms, sk_pair_pass *x,
                                const sk_slice *at) {
    real numbers[SK_PAIR_NUMBERS]; /* a copy that nothing written may be part of */
    real loss[SK_LANES] = {0}, a[SK_LANES] = {0}, b[SK_LANES] = {0};
    sk_pair_classes classes;
    const sk_pair_slopes_of of_row = sk_pair_slopes_at(x, at->run.row);
    memcpy(numbers, x->numbers, sizeof numbers);
    sk_make_classes(positions, x, at->run, at->x[0], at->x[1], &classes);
    for (int64_t n = 0; n < at->run.n; n += SK_LANES) {
        const int64_t first = positions ? at->run.row + n : at->run.row * SK_LANES;
#pragma omp simd
        for (int k = 0; k < SK_LANES; k++) {
            const sk_pair_slopes_of s = positions ? sk_pair_slopes_at(x, first + k) : of_row;
            const sk_pair_class y = sk_class_in(&classes, n + k);
            const sk_pair_result of = terms(y, numbers);
            const real to_a = y.p * (of.slope_p - s.a.high), to_b = y.q * (of.slope_q - s.b.high);
            loss[k] = (positions ? 0 : loss[k]) + of.value;
            a[k] = (positions ? 0 : a[k]) + (sk_counts(y.p, of.slope_p) ? to_a : of.limit_p);
            b[k] = (positions ? 0 : b[k]) + (sk_counts(y.q, of.slope_q) ? to_b : of.limit_q);
        }
        if (!positions && n + SK_LANES < at->run.n) continue;
#pragma omp simd
        for (int k = 0; k < SK_LANES; k++) {
            x->loss[first + k] += loss[k];
            x->a[first + k] += a[k];
            x->b[first + k] += b[k];
        }
    }
}

/* Leaves the gradients of a run, that of v only if it is wanted. */
SK_SPECIAL void sk_pair_loss_run(bool positions, bool of_v, sk_pair_terms_of terms, sk_pair_pass *x,
                                 const sk_slice *at) {
    real numbers[SK_PAIR_NUMBERS]; /* a copy that nothing written may be part of */
    sk_pair_classes classes;
    const sk_ahead next_u = sk_next_of(at, 0), next_v = sk_next_of(at, 1);
    real *restrict const grad_u = at->to[0], *restrict const grad_v = at->to[1];
    const sk_pair_slopes_of of_row = sk_pair_slopes_at(x, at->run.row);
    memcpy(numbers, x->numbers, sizeof numbers);
    sk_make_classes(positions, x, at->run, at->x[0], at->x[1], &classes);
    for (int64_t n = 0; n < at->run.n; n += SK_LANES) {
        sk_fetch(next_u, n / SK_LANES);
        sk_fetch(next_v, n / SK_LANES);
#pragma omp simd
        for (int k = 0; k < SK_LANES; k++) {
            const sk_pair_slopes_of s =
                positions ? sk_pair_slopes_at(x, at->run.row + n + k) : of_row;
            const sk_pair_class y = sk_class_in(&classes, n + k);
            const sk_pair_result of = terms(y, numbers);
            const real of_p = y.p * ((of.slope_p - s.a.high) - s.a.low);
            const real of_q = y.q * ((of.slope_q - s.b.high) - s.b.low);
            const real to_u = s.factor_u * (sk_counts(y.p, of.slope_p) ? of_p : of.limit_p);
            const real to_v = s.factor_v * (sk_counts(y.q, of.slope_q) ? of_q : of.limit_q);
            grad_u[n + k] = s.factor_u != 0 ? to_u : 0;
            if (of_v) grad_v[n + k] = s.factor_v != 0 ? to_v : 0;
        }
    }
}

/* Leaves the slopes of the classes with the largest p and q as A and B: whole groups of lanes, as
 * in the passes, so that the bits are those of the passes. */
SK_SPECIAL void sk_set_slopes(sk_pair_terms_of terms, const sk_task *r, const sk_tops *tops,
                              sk_pair_pass *x) {
    const sk_run rows = {0, 0, sk_groups(r->width) * SK_LANES};
    sk_pair_classes of_u, of_v;
    sk_make_classes(true, x, rows, tops->u, tops->v_there, &of_u);
    sk_make_classes(true, x, rows, tops->u_there, tops->v, &of_v);
    for (int64_t n = 0; n < rows.n; n += SK_LANES) {
#pragma omp simd
        for (int64_t i = n; i < n + SK_LANES; i++) {
            x->row[SK_A_HIGH][i] = terms(sk_class_in(&of_u, i), x->numbers).slope_p;
            x->row[SK_B_HIGH][i] = terms(sk_class_in(&of_v, i), x->numbers).slope_q;
        }
    }
}

/* Leaves A, B and the loss of the rows of a task, whose lse and dl are there. */
static inline void sk_add_pair_loss(const sk_task *r, const sk_two_logits *of,
                                    const sk_pair_formula *f, const sk_tops *tops, sk_pair_pass *x,
                                    sk_found found) {
    const int64_t lanes = r->positions ? 1 : SK_LANES;
    const sk_streams streams = {{of->u, of->v}, {NULL}};
    for (int64_t i = 0; i < sk_scalars(r); i++) found[SK_SLOPE_P][i] = found[SK_SLOPE_Q][i] = 0;
    sk_set_pair_loss(r, of, found, x);
    f->set(r, tops, x);
    for (int64_t i = 0; i < lanes * sk_scalars(r); i++) x->loss[i] = x->a[i] = x->b[i] = 0;
    sk_write_gradients(r, &streams, f->add, x);
    for (int64_t i = 0; i < r->width; i++) {
        double loss = 0, a = x->row[SK_A_HIGH][i], b = x->row[SK_B_HIGH][i];
        for (int64_t k = i * lanes; k < (i + 1) * lanes; k++) {
            loss += x->loss[k];
            a += x->a[k];
            b += x->b[k];
        }
        found[SK_LOSS][i] = loss;
        found[SK_SLOPE_P][i] = a;
        found[SK_SLOPE_Q][i] = b;
    }
}

/* Rows with a smaller loss are close: a millionth of phi at p = 1 and q = 1/e, where all d are
 * about 1e-3. */
static inline double sk_close_loss(const sk_pair_formula *f, const real *k) {
    const real e = (real)0.36787944117144233;
    const sk_pair_class x = {1, e, 1, 1, 1, e, 1 - e, e};
    return f->smooth ? 1e-6 * f->terms(x, k).value : 0;
}

/* Leaves what is found of the rows of a task. */
SK_OUTLINE void sk_find_pair_loss(const sk_task *r, const sk_two_logits *of, const real *weight,
                                  const sk_pair_formula *f, const real *numbers, sk_found found) {
    const double close = sk_close_loss(f, numbers);
    sk_comparison m;
    sk_tops tops;
    sk_pair_pass x; /* set field by field, for its planes are large */
    int64_t open = 0;
    memcpy(x.numbers, numbers, sizeof x.numbers);
    sk_sum_pair(r, of, &tops, &m);
    if (!f->smooth) sk_sum_differences(r, of, &m);
    sk_set_sums(r, of, &m, !f->smooth, found);
    sk_add_pair_loss(r, of, f, &tops, &x, found);
    for (int64_t i = 0; i < r->width; i++) open += weight[i] != 0 && found[SK_LOSS][i] < close;
    if (open > 0) {
        SK_ALIGNED sk_found again;
        sk_sum_differences(r, of, &m);
        sk_set_sums(r, of, &m, true, again);
        sk_add_pair_loss(r, of, f, &tops, &x, again);
        for (int64_t i = 0; i < r->width; i++) {
            const bool is_close = found[SK_LOSS][i] < close;
            for (int k = 0; k < SK_FOUND && is_close; k++) found[k][i] = again[k][i];
        }
    }
    for (int64_t i = 0; i < r->width; i++) {
        const bool good = (found[SK_LOSS][i] < SK_LARGE_LOSS) & !sk_is_far_pair(found, i, 0);
        if (weight[i] == 0 || good) continue;
        const sk_row_pair row = sk_row_pair_of(r, of->u, of->v, of->t.T, of->t_v.T, i);
        sk_careful_sums(&row, f, numbers, found);
    }
}

/* Leaves the gradients of a task. */
SK_OUTLINE void sk_differentiate_pair_loss(const sk_task *r, const sk_two_logits *of,
                                           const sk_pair_formula *f, const real *numbers,
                                           sk_incoming *in, double denominator,
                                           const sk_streams *streams) {
    sk_pair_pass x; /* set field by field, for its planes are large */
    memcpy(x.numbers, numbers, sizeof x.numbers);
    sk_set_pair_loss(r, of, in->saved, &x);
    for (int64_t i = 0; i < sk_scalars(r); i++) {
        const bool none = (in->grad[i] == 0) | (in->weight[i] == 0);
        const double factor = none ? 0 : (double)in->grad[i] * in->weight[i] / denominator;
        x.row[SK_FACTOR_U][i] = (real)(factor * of->t.per_T);
        x.row[SK_FACTOR_V][i] = (real)(factor * of->t_v.per_T);
        in->saved[SK_LOSS][i] = factor;
    }
    sk_write_gradients(r, streams, f->write, &x);
    for (int64_t i = 0; i < r->width; i++) {
        const double row = in->saved[SK_LOSS][i];
        const double factor[2] = {row * of->t.per_T, row * of->t_v.per_T};
        const double most = fabs(factor[0]) > fabs(factor[1]) ? factor[0] : factor[1];
        if (row == 0 || !sk_is_far_pair(in->saved, i, most)) continue;
        const sk_row_pair pair = sk_row_pair_of(r, of->u, of->v, of->t.T, of->t_v.T, i);
        const sk_row_pair both =
            sk_row_pair_within(pair, in->saved[SK_LSE][i], in->saved[SK_DL][i]);
        sk_careful_slopes(&both, f, numbers, in->saved, factor, streams);
    }
}

/* ---- kernels ---- */

/* Defines name_formula, of the function name_terms. */
#define SK_PAIR_FORMULA(name, is_smooth)                                                \
    static void name##_set(const sk_task *r, const sk_tops *tops, sk_pair_pass *x) {    \
        sk_set_slopes(name##_terms, r, tops, x);                                        \
    }                                                                                   \
    static void name##_add(void *pass, const sk_slice *at) {                            \
        if (at->r->positions)                                                           \
            sk_add_pair_run(true, name##_terms, pass, at);                              \
        else                                                                            \
            sk_add_pair_run(false, name##_terms, pass, at);                             \
    }                                                                                   \
    static void name##_write(void *pass, const sk_slice *at) {                          \
        const bool of_v = at->of->written[1] != NULL;                                   \
        if (at->r->positions && of_v)                                                   \
            sk_pair_loss_run(true, true, name##_terms, pass, at);                       \
        else if (at->r->positions)                                                      \
            sk_pair_loss_run(true, false, name##_terms, pass, at);                      \
        else if (of_v)                                                                  \
            sk_pair_loss_run(false, true, name##_terms, pass, at);                      \
        else                                                                            \
            sk_pair_loss_run(false, false, name##_terms, pass, at);                     \
    }                                                                                   \
    static const sk_pair_formula name##_formula = {is_smooth, name##_terms, name##_set, \
                                                   name##_add, name##_write}

/* Defines the kernels op and op_backward of a loss with the inputs u, v and weight, whose
 * temperatures are the parameters T and T_v; formula: a pointer to its formula, which may depend on
 * the parameters p. */
#define SK_PAIR_KERNELS(op, u, v, T, T_v, formula)                                                \
    static sk_task op##_all(const struct op##_params *p) { return SK_TASKS_OF(p, u); }            \
    static void op##_find(const struct op##_params *p, const sk_task *r, const real *weight,      \
                          sk_found found) {                                                       \
        const real k[SK_PAIR_NUMBERS] = op##_NUMBERS(p);                                          \
        const sk_two_logits pair = sk_two_logits_of(&p->u, &p->v, p->T, p->T_v);                  \
        sk_find_pair_loss(r, &pair, weight, formula, k, found);                                   \
    }                                                                                             \
    static inline double op##_loss(const struct op##_params *p, double weight, sk_found found,    \
                                   int64_t i) {                                                   \
        (void)p;                                                                                  \
        return weight * found[SK_LOSS][i];                                                        \
    }                                                                                             \
    SK_ROW_FORWARD(op, op##_all, 2, SK_SAVED, op##_find, op##_loss);                              \
    static sk_task op##_backward_all(const struct op##_backward_params *p) {                      \
        return SK_TASKS_OF(p, u);                                                                 \
    }                                                                                             \
    static void op##_backward_task(const struct op##_backward_params *p, const sk_task *r) {      \
        const real k[SK_PAIR_NUMBERS] = op##_NUMBERS(p);                                          \
        const sk_two_logits pair = sk_two_logits_of(&p->u, &p->v, p->T, p->T_v);                  \
        const sk_streams streams = {{&p->u, &p->v},                                               \
                                    {SK_WANTED(p->grad_##u), SK_WANTED(p->grad_##v)}};            \
        sk_incoming in;                                                                           \
        sk_load_incoming(r, &p->grad, &p->weight, &p->saved, SK_SAVED, &in);                      \
        sk_differentiate_pair_loss(r, &pair, formula, k, &in, *(const real *)p->denominator.data, \
                                   &streams);                                                     \
    }                                                                                             \
    SK_ROW_KERNEL(op##_backward, op##_backward_all, 2, op##_backward_task, NULL, NULL)

/* The same of a loss with one formula. */
#define SK_PAIR_LOSS(op, u, v, T, T_v) \
    SK_PAIR_FORMULA(op, false);        \
    SK_PAIR_KERNELS(op, u, v, T, T_v, &op##_formula)
