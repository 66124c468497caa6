/* clang-format off */
/* Losses of two rows of logits that are a sum over the classes, l = sum of phi(p, q) with p =
 * softmax(u/T) and q = softmax(v/T'), such as total variation. An operator gives its formula, and
 * everything else is here.
 *
 * ops/formula/<op>.h has <op>_terms(x, k), of a class x (formula/pair_class.h) and of k, the
 * operator's own numbers <op>_NUMBERS(params). It returns
 *
 *   value      phi; 0 where p and q are
 *   slope_p    dphi/dp; where p is 0 it is not looked at
 *   slope_q    dphi/dq; where q is 0 it is not looked at
 *
 * What is NaN must come out NaN, of slopes too. With A the sum of p slope_p and B that of q slope_q
 *
 *   dl/du = p (slope_p - A) / T        dl/dv = q (slope_q - B) / T'
 *
 * All that a class holds is right to 4e-7 of itself (double: 1e-15), however close p and q are; d to
 * the rounding of u/T, v/T' and of the log-sum-exps. Forward visits the logits three times: for the
 * largest, for the log-sum-exps, and for the loss; backward once. */
/* clang-format on */
#pragma once
#include "cpu/core/pair.h"
#include "cpu/core/row_loss.h"

#include "formula/pair_class.h"

typedef sk_pair_result (*sk_pair_terms_of)(sk_pair_class x, const real *k);
typedef struct sk_pair_formula {
    sk_pair_terms_of terms;
    sk_slope add, write; /* passes of sk_add_pair_run and sk_pair_loss_run with this formula */
} sk_pair_formula;

/* Logits of shape (N, C, S), their temperatures, and how log-ratios are found. */
typedef struct sk_two_logits {
    const sk_arg *u, *v;
    sk_scale t, t_v;
    enum sk_form form;
} sk_two_logits;

static inline sk_two_logits sk_two_logits_of(const sk_arg *u, const sk_arg *v, double T,
                                             double T_v) {
    return (sk_two_logits){u, v, sk_scale_of(T), sk_scale_of(T_v), T == T_v ? SK_EXACT : SK_APART};
}

/* What is found of a row: lse(u/T) and dl as in pair.h, A and B, and the loss. */
enum { SK_SLOPE_P = SK_DL + 1, SK_SLOPE_Q, SK_LOSS };

/* ---- A row in double, class by class ---- */

static inline bool sk_is_far_pair(sk_found x, int64_t i, double factor) {
    return (fabs(x[SK_LSE][i]) >= SK_FAR_LSE) | (fabs(x[SK_DL][i]) >= SK_FAR_LSE) |
           sk_is_far_factor(factor);
}

static inline sk_pair_class sk_careful_class(sk_class_terms x) {
    const double d = fabs(x.d), gap = -expm1(-d), larger = x.p > x.q ? x.p : x.q;
    const double rest = d < 0.5 ? d * d * sk_exp_rest(-(real)d) : d - gap; /* infinite with d */
    return (sk_pair_class){(real)x.p,   (real)x.q,     (real)x.d,  (real)larger,
                           (real)exp(-d), (real)gap, (real)rest};
}

/* Leaves what is found of a row. */
SK_RARE void sk_careful_sums(const sk_row_pair *row, const sk_pair_formula *f, const real *k,
                             sk_found x) {
    double loss = sk_is_finite_pair(row) ? 0 : (double)NAN, a = loss, b = loss;
    for (int64_t c = 0; c < row->r->C; c++) {
        const sk_class_terms of = sk_class_of(row, c);
        const sk_pair_result y = f->terms(sk_careful_class(of), k);
        loss += of.no_p && of.no_q ? 0 : (double)y.value;
        a += of.p == 0 ? 0 : of.p * y.slope_p;
        b += of.q == 0 ? 0 : of.q * y.slope_q;
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
        const double slope[2] = {of.p == 0 ? 0 : of.p * (y.slope_p - a),
                                 of.q == 0 ? 0 : of.q * (y.slope_q - b)};
        for (int i = 0; i < 2; i++) {
            const sk_arg *const grad = to->written[i];
            if (!grad) continue;
            const int64_t at = sk_class_at(row->r, grad, row->i, c);
            sk_store_one(grad, at, (real)(factor[i] * slope[i]));
        }
    }
}

/* ---- All rows ---- */

/* The largest logits of each row, and what the other side has in that class. */
typedef struct sk_tops {
    SK_ALIGNED real u[SK_PITCH], v_there[SK_PITCH], v[SK_PITCH], u_there[SK_PITCH];
} sk_tops;

/* Raises them to those of a group of lanes. */
static inline void sk_raise_pair(const sk_task *r, const real *u, const real *v, int64_t depth,
                                 int64_t g, sk_tops *x) {
    const int64_t pitch = sk_pitch(r);
    real top_u[SK_LANES], with_u[SK_LANES], top_v[SK_LANES], with_v[SK_LANES];
    sk_to_lanes(r, g, x->u, top_u);
    sk_to_lanes(r, g, x->v_there, with_u);
    sk_to_lanes(r, g, x->v, top_v);
    sk_to_lanes(r, g, x->u_there, with_v);
    for (int64_t i = 0; i < depth; i++) {
#pragma omp simd
        for (int k = 0; k < SK_LANES; k++) {
            const real a = u[i * pitch + k], b = v[i * pitch + k];
            with_u[k] = a > top_u[k] ? b : with_u[k];
            top_u[k] = a > top_u[k] ? a : top_u[k];
            with_v[k] = b > top_v[k] ? a : with_v[k];
            top_v[k] = b > top_v[k] ? b : top_v[k];
        }
    }
    for (int k = 0; k < SK_LANES; k++) {
        const int64_t i = r->positions ? g * SK_LANES + k : g;
        const bool of_u = r->positions | (top_u[k] > x->u[i]);
        const bool of_v = r->positions | (top_v[k] > x->v[i]);
        x->v_there[i] = of_u ? with_u[k] : x->v_there[i];
        x->u[i] = of_u ? top_u[k] : x->u[i];
        x->u_there[i] = of_v ? with_v[k] : x->u_there[i];
        x->v[i] = of_v ? top_v[k] : x->v[i];
    }
}

/* The first two visits to the logits of a task: tops, and the sums that dl follows from. */
static inline void sk_sum_pair(const sk_task *r, const sk_two_logits *x, sk_tops *tops,
                               sk_comparison *m) {
    SK_ALIGNED real tile[2][SK_TILE];
    const real *u[SK_GROUPS], *v[SK_GROUPS];
    const int64_t step = sk_tile_classes(r);
    sk_clear_sums(r, m);
    for (int64_t i = 0; i < sk_scalars(r); i++) tops->u[i] = tops->v[i] = -INFINITY;
    for (int64_t i = 0; i < sk_scalars(r); i++) tops->u_there[i] = tops->v_there[i] = 0;
    for (int64_t c = 0; c < r->C; c += step) {
        const int64_t classes = sk_min(step, r->C - c);
        sk_load_tile(r, x->u, c, classes, tile[0], u);
        sk_load_tile(r, x->v, c, classes, tile[1], v);
        for (int64_t g = 0; g < r->groups; g++)
            sk_raise_pair(r, u[g], v[g], sk_depth(r, classes), g, tops);
    }
    for (int64_t i = 0; i < sk_scalars(r); i++) {
        m->hu[i] = sk_anchor(tops->u[i]);
        m->hv[i] = sk_anchor(tops->v[i]);
    }
    for (int64_t c = 0; c < r->C; c += step) {
        const int64_t classes = sk_min(step, r->C - c), depth = sk_depth(r, classes);
        if (r->C > step) {
            sk_load_tile(r, x->u, c, classes, tile[0], u);
            sk_load_tile(r, x->v, c, classes, tile[1], v);
        }
        for (int64_t g = 0; g < r->groups; g++) {
            const sk_ahead next_u = sk_next_tile(r, x->u, g, c);
            const sk_ahead next_v = sk_next_tile(r, x->v, g, c);
            const sk_two_tiles tiles = {u[g], v[g], next_u, next_v, depth, g, NULL};
            if (x->form == SK_EXACT)
                sk_compare_group(SK_EXACT, SK_ONLY_DL, SK_FRESH, r, &x->t, &x->t_v, &tiles, m);
            else
                sk_compare_group(SK_APART, SK_ONLY_DL, SK_FRESH, r, &x->t, &x->t_v, &tiles, m);
        }
    }
}

/* What a row's classes need besides (sk_pair_scalars): its factors for u and v; A and B, each as the
 * sum of two reals, for a slope may be as large; and AGREE, a d below which is no more than the
 * rounding of a constant between u and v, and counts as 0. In forward A and B are the slopes of the
 * classes with the largest p and q: of the sum of p (slope_p - A) nothing cancels where one class has
 * nearly all of p and the gradient is as small. */
enum {
    SK_FACTOR_U,
    SK_FACTOR_V,
    SK_A_HIGH,
    SK_A_LOW,
    SK_B_HIGH,
    SK_B_LOW,
    SK_AGREE,
    SK_PAIR_LOSS_SCALARS
};

/* What a pass over the runs of a task needs, and where its sums go: of "classes" those of row i are
 * in lanes from i * SK_LANES. */
typedef struct sk_pair_pass {
    const real *numbers; /* k of the formula */
    const sk_two_logits *of;
    SK_ALIGNED sk_pair_scalars pair;
    SK_ALIGNED real row[SK_PAIR_LOSS_SCALARS][SK_PITCH];
    SK_ALIGNED double loss[SK_PITCH], a[SK_PITCH], b[SK_PITCH];
} sk_pair_pass;

/* The scalars of a row that a class of it needs: loops over classes have them in registers. */
typedef struct sk_pair_sides {
    real u_shift, u_factor, v_shift, v_factor, agree;
    sk_split gap;
} sk_pair_sides;

SK_SPECIAL sk_pair_sides sk_pair_sides_at(const sk_pair_pass *x, int64_t i) {
    return (sk_pair_sides){x->pair[SK_U_SHIFT][i],
                           x->pair[SK_U_FACTOR][i],
                           x->pair[SK_V_SHIFT][i],
                           x->pair[SK_V_FACTOR][i],
                           x->row[SK_AGREE][i],
                           {x->pair[SK_GAP_HIGH][i], x->pair[SK_GAP_LOW][i]}};
}

SK_SPECIAL sk_pair_class sk_pair_class_at(enum sk_form form, const sk_scale *t,
                                          const sk_scale *t_v, sk_pair_sides m, real u, real v) {
    const real a = sk_logit(u, t->least), b = sk_logit(v, t->least);
    const real found = sk_log_ratio(form, a, b, m.gap, t, t_v);
    const bool less = found < 0; /* p is the smaller one */
    const real apart = less ? -found : found;
    const bool agree = apart < m.agree;
    const real d = agree ? 0 : found, size = agree ? 0 : apart;
    const real z = less ? b - m.v_shift : a - m.u_shift;
    const real log2e = less ? t_v->log2e_T : t->log2e_T, lowest = less ? t_v->lowest : t->lowest;
    const real larger =
        (less ? m.v_factor : m.u_factor) * sk_exp2_scaled(z, log2e, lowest);
    const real ratio = sk_exp2_scaled(-size, (real)SK_LOG2E, (real)(-127 / SK_LOG2E));
    const bool near = size < 1;
    const real second = size * size * sk_exp_rest(-size), one_less = near ? size - second : 1 - ratio;
    const real rest = size < (real)0x1p90 ? size - one_less : INFINITY + size; /* NaN stays NaN */
    const real smaller = larger * ratio;
    return (sk_pair_class){less ? smaller : larger, less ? larger : smaller, d,   larger,
                           ratio,                   one_less, near ? second : rest};
}

/* What its gradients need besides. */
typedef struct sk_pair_slopes_of {
    real factor_u, factor_v;
    sk_split a, b;
} sk_pair_slopes_of;

SK_SPECIAL sk_pair_slopes_of sk_pair_slopes_at(const sk_pair_pass *x, int64_t i) {
    return (sk_pair_slopes_of){x->row[SK_FACTOR_U][i],
                               x->row[SK_FACTOR_V][i],
                               {x->row[SK_A_HIGH][i], x->row[SK_A_LOW][i]},
                               {x->row[SK_B_HIGH][i], x->row[SK_B_LOW][i]}};
}

/* Adds a run to the sums. */
SK_SPECIAL void sk_add_pair_run(bool positions, enum sk_form form, sk_pair_terms_of terms,
                                sk_pair_pass *x, const sk_slice *at) {
    const sk_scale t = x->of->t, t_v = x->of->t_v;
    const real *const u = at->x[0], *const v = at->x[1], *const numbers = x->numbers;
    const sk_pair_sides row = sk_pair_sides_at(x, at->run.row);
    const sk_pair_slopes_of slopes = sk_pair_slopes_at(x, at->run.row);
    real loss[SK_LANES] = {0}, a[SK_LANES] = {0}, b[SK_LANES] = {0};
    for (int64_t n = 0; n < at->run.n; n += SK_LANES) {
        const int64_t first = positions ? at->run.row + n : at->run.row * SK_LANES;
#pragma omp simd
        for (int k = 0; k < SK_LANES; k++) {
            const sk_pair_sides m = positions ? sk_pair_sides_at(x, first + k) : row;
            const sk_pair_slopes_of s = positions ? sk_pair_slopes_at(x, first + k) : slopes;
            const sk_pair_class y = sk_pair_class_at(form, &t, &t_v, m, u[n + k], v[n + k]);
            const sk_pair_result of = terms(y, numbers);
            const real to_a = y.p * (of.slope_p - s.a.high), to_b = y.q * (of.slope_q - s.b.high);
            loss[k] = (positions ? 0 : loss[k]) + of.value;
            a[k] = (positions ? 0 : a[k]) + (y.p != 0 ? to_a : 0);
            b[k] = (positions ? 0 : b[k]) + (y.q != 0 ? to_b : 0);
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

/* Leaves the gradients of a run. */
SK_SPECIAL void sk_pair_loss_run(bool positions, enum sk_form form, sk_pair_terms_of terms,
                                 sk_pair_pass *x, const sk_slice *at) {
    const sk_scale t = x->of->t, t_v = x->of->t_v;
    const real *const u = at->x[0], *const v = at->x[1], *const numbers = x->numbers;
    const sk_ahead next_u = sk_next_of(at, 0), next_v = sk_next_of(at, 1);
    real *restrict const grad_u = at->to[0], *restrict const grad_v = at->to[1];
    const sk_pair_sides row = sk_pair_sides_at(x, at->run.row);
    const sk_pair_slopes_of slopes = sk_pair_slopes_at(x, at->run.row);
    for (int64_t n = 0; n < at->run.n; n += SK_LANES) {
        sk_fetch(next_u, n / SK_LANES);
        sk_fetch(next_v, n / SK_LANES);
#pragma omp simd
        for (int k = 0; k < SK_LANES; k++) {
            const int64_t i = at->run.row + n + k;
            const sk_pair_sides m = positions ? sk_pair_sides_at(x, i) : row;
            const sk_pair_slopes_of s = positions ? sk_pair_slopes_at(x, i) : slopes;
            const sk_pair_class y = sk_pair_class_at(form, &t, &t_v, m, u[n + k], v[n + k]);
            const sk_pair_result of = terms(y, numbers);
            const real to_u = s.factor_u * y.p * ((of.slope_p - s.a.high) - s.a.low);
            const real to_v = s.factor_v * y.q * ((of.slope_q - s.b.high) - s.b.low);
            grad_u[n + k] = (s.factor_u != 0) & (y.p != 0) ? to_u : 0;
            grad_v[n + k] = (s.factor_v != 0) & (y.q != 0) ? to_v : 0;
        }
    }
}

/* Sets the scalars of the rows whose log-sum-exps, and A and B in backward, are in x. */
static inline void sk_set_pair_loss(const sk_task *r, const sk_two_logits *of, sk_found x,
                                    sk_pair_pass *to) {
    to->of = of;
    for (int64_t i = 0; i < sk_scalars(r); i++) {
        const sk_split a = sk_split_of(x[SK_SLOPE_P][i]), b = sk_split_of(x[SK_SLOPE_Q][i]);
        sk_set_sides(&of->t, &of->t_v, x[SK_LSE][i], x[SK_DL][i], 1, i, to->pair);
        if (of->form == SK_APART) {
            const sk_split gap = sk_split_of(x[SK_DL][i]);
            to->pair[SK_GAP_HIGH][i] = gap.high;
            to->pair[SK_GAP_LOW][i] = gap.low;
        }
        to->row[SK_A_HIGH][i] = a.high;
        to->row[SK_A_LOW][i] = a.low;
        to->row[SK_B_HIGH][i] = b.high;
        to->row[SK_B_LOW][i] = b.low;
        to->row[SK_AGREE][i] = (real)(4 * DBL_EPSILON * fabs(x[SK_DL][i]));
    }
}

/* Leaves the slopes of the classes with the largest p and q as A and B. */
static inline void sk_set_slopes(const sk_task *r, const sk_pair_formula *f, const sk_tops *tops,
                                 sk_pair_pass *x) {
    const sk_scale *const t = &x->of->t, *const t_v = &x->of->t_v;
    const enum sk_form form = x->of->form;
    for (int64_t i = 0; i < r->width; i++) {
        const sk_pair_sides m = sk_pair_sides_at(x, i);
        const sk_pair_class a = sk_pair_class_at(form, t, t_v, m, tops->u[i], tops->v_there[i]);
        const sk_pair_class b = sk_pair_class_at(form, t, t_v, m, tops->u_there[i], tops->v[i]);
        x->row[SK_A_HIGH][i] = f->terms(a, x->numbers).slope_p;
        x->row[SK_B_HIGH][i] = f->terms(b, x->numbers).slope_q;
    }
}

/* Leaves what is found of the rows of a task. */
SK_OUTLINE void sk_find_pair_loss(const sk_task *r, const sk_two_logits *of, const real *weight,
                                  const sk_pair_formula *f, const real *numbers, sk_found found) {
    const int64_t lanes = r->positions ? 1 : SK_LANES, all = lanes * sk_scalars(r);
    const sk_streams streams = {{of->u, of->v}, {NULL}};
    sk_comparison m;
    sk_tops tops;
    sk_pair_pass x; /* set field by field, for its planes are large */
    x.numbers = numbers;
    sk_sum_pair(r, of, &tops, &m);
    for (int64_t i = 0; i < sk_scalars(r); i++) {
        const double q = m.sum[SK_Q][i], d = m.sum[SK_D][i] / q;
        const double log1p_d = sk_log(d > -0.5 ? 1 + d : m.sum[SK_P][i] / q);
        found[SK_LSE][i] = m.hu[i] * of->t.per_T + sk_log(m.sum[SK_P][i]);
        found[SK_DL][i] = sk_gap(of->form, &m, i, &of->t, &of->t_v) + (d - sk_log_gap(d, log1p_d));
        found[SK_SLOPE_P][i] = found[SK_SLOPE_Q][i] = 0;
    }
    for (int64_t i = r->width; i < sk_scalars(r); i++) found[SK_LSE][i] = found[SK_DL][i] = 0;
    sk_set_pair_loss(r, of, found, &x);
    sk_set_slopes(r, f, &tops, &x);
    for (int64_t i = 0; i < all; i++) x.loss[i] = x.a[i] = x.b[i] = 0;
    sk_write_gradients(r, &streams, f->add, &x);
    for (int64_t i = 0; i < r->width; i++) {
        double loss = 0, a = x.row[SK_A_HIGH][i], b = x.row[SK_B_HIGH][i];
        for (int64_t k = i * lanes; k < (i + 1) * lanes; k++) {
            loss += x.loss[k];
            a += x.a[k];
            b += x.b[k];
        }
        found[SK_LOSS][i] = loss;
        found[SK_SLOPE_P][i] = a;
        found[SK_SLOPE_Q][i] = b;
        const bool good = (loss < SK_INFINITE) & !sk_is_far_pair(found, i, 0);
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
    x.numbers = numbers;
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
        const sk_row_pair both = sk_row_pair_within(pair, in->saved[SK_LSE][i], in->saved[SK_DL][i]);
        sk_careful_slopes(&both, f, numbers, in->saved, factor, streams);
    }
}

/* ---- kernels ---- */

/* Defines name_formula, of the function name_terms. */
#define SK_PAIR_FORMULA(name)                                             \
    static void name##_add(void *pass, const sk_slice *at) {              \
        const bool same_T = ((sk_pair_pass *)pass)->of->form == SK_EXACT; \
        if (at->r->positions && same_T)                                   \
            sk_add_pair_run(true, SK_EXACT, name##_terms, pass, at);      \
        else if (at->r->positions)                                        \
            sk_add_pair_run(true, SK_APART, name##_terms, pass, at);      \
        else if (same_T)                                                  \
            sk_add_pair_run(false, SK_EXACT, name##_terms, pass, at);     \
        else                                                              \
            sk_add_pair_run(false, SK_APART, name##_terms, pass, at);     \
    }                                                                     \
    static void name##_write(void *pass, const sk_slice *at) {            \
        const bool same_T = ((sk_pair_pass *)pass)->of->form == SK_EXACT; \
        if (at->r->positions && same_T)                                   \
            sk_pair_loss_run(true, SK_EXACT, name##_terms, pass, at);     \
        else if (at->r->positions)                                        \
            sk_pair_loss_run(true, SK_APART, name##_terms, pass, at);     \
        else if (same_T)                                                  \
            sk_pair_loss_run(false, SK_EXACT, name##_terms, pass, at);    \
        else                                                              \
            sk_pair_loss_run(false, SK_APART, name##_terms, pass, at);    \
    }                                                                     \
    static const sk_pair_formula name##_formula = {name##_terms, name##_add, name##_write}

/* Defines the kernels op and op_backward of a loss with the inputs u, v and weight, whose
 * temperatures are the parameters T and T_v; formula: a pointer to its formula, which may depend on
 * the parameters p. */
#define SK_PAIR_KERNELS(op, u, v, T, T_v, formula)                                             \
    static sk_task op##_all(const struct op##_params *p) { return SK_TASKS_OF(p, u); }         \
    static void op##_find(const struct op##_params *p, const sk_task *r, const real *weight,   \
                          sk_found found) {                                                    \
        const real k[] = op##_NUMBERS(p);                                                      \
        const sk_two_logits pair = sk_two_logits_of(&p->u, &p->v, p->T, p->T_v);               \
        sk_find_pair_loss(r, &pair, weight, formula, k, found);                                \
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
        const sk_two_logits pair = sk_two_logits_of(&p->u, &p->v, p->T, p->T_v);               \
        const sk_streams streams = {{&p->u, &p->v},                                            \
                                    {p->grad_##u.data ? &p->grad_##u : NULL,                   \
                                     p->grad_##v.data ? &p->grad_##v : NULL}};                 \
        sk_incoming in;                                                                        \
        sk_load_incoming(r, &p->grad, &p->weight, &p->saved, SK_SAVED, &in);                   \
        sk_differentiate_pair_loss(r, &pair, formula, k, &in,                                  \
                                   *(const real *)p->denominator.data, &streams);              \
    }                                                                                          \
    SK_ROW_KERNEL(op##_backward, op##_backward_all, 2, op##_backward_task, NULL, NULL)

/* The same of a loss with one formula. */
#define SK_PAIR_LOSS(op, u, v, T, T_v) \
    SK_PAIR_FORMULA(op);               \
    SK_PAIR_KERNELS(op, u, v, T, T_v, &op##_formula)
