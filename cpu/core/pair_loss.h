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
 *   limit_p, limit_q    where p or q is 0, p dphi/dp or q dphi/dq, and the slope is not looked at
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
#include "cpu/core/pair.h"
#include "cpu/core/row_loss.h"

#include "formula/pair_class.h"

struct sk_tops;
struct sk_pair_pass;
typedef sk_pair_result (*sk_pair_terms_of)(sk_pair_class x, const real *k);
typedef struct sk_pair_formula {
    bool smooth;
    sk_pair_terms_of terms;
    void (*set)(const sk_task *r, const struct sk_tops *tops, struct sk_pair_pass *x);
    sk_slope add, write; /* passes of sk_add_pair_run and sk_pair_loss_run with this formula */
} sk_pair_formula;

enum { SK_PAIR_NUMBERS = 4 }; /* of an operator's own, at most */

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
    return (sk_pair_class){(real)x.p,    (real)x.q,     (real)x.d, (real)d,
                           (real)larger, (real)exp(-d), (real)gap, (real)rest};
}

/* Leaves what is found of a row. */
SK_RARE void sk_careful_sums(const sk_row_pair *row, const sk_pair_formula *f, const real *k,
                             sk_found x) {
    double loss = sk_is_finite_pair(row) ? 0 : (double)NAN, a = loss, b = loss;
    for (int64_t c = 0; c < row->r->C; c++) {
        const sk_class_terms of = sk_class_of(row, c);
        const sk_pair_result y = f->terms(sk_careful_class(of), k);
        loss += of.no_p && of.no_q ? 0 : (double)y.value;
        a += of.p == 0 ? (double)y.limit_p : of.p * y.slope_p;
        b += of.q == 0 ? (double)y.limit_q : of.q * y.slope_q;
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
        const double slope[2] = {of.p == 0 ? (double)y.limit_p : of.p * (y.slope_p - a),
                                 of.q == 0 ? (double)y.limit_q : of.q * (y.slope_q - b)};
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

/* Adds a group of lanes to P and Q. */
SK_SPECIAL void sk_add_to_sums(const sk_task *r, const sk_two_logits *x, const real *u,
                               const real *v, int64_t depth, int64_t g, sk_comparison *m) {
    const sk_scale t = x->t, t_v = x->t_v;
    const int64_t pitch = sk_pitch(r);
    real hu[SK_LANES], hv[SK_LANES], p[SK_LANES] = {0}, q[SK_LANES] = {0};
    sk_to_lanes(r, g, m->hu, hu);
    sk_to_lanes(r, g, m->hv, hv);
    for (int64_t i = 0; i < depth; i++) {
#pragma omp simd
        for (int k = 0; k < SK_LANES; k++) {
            p[k] += sk_exp_of(u[i * pitch + k] - hu[k], &t);
            q[k] += sk_exp_of(v[i * pitch + k] - hv[k], &t_v);
        }
    }
    sk_add_lanes(r, g, p, m->sum[SK_P]);
    sk_add_lanes(r, g, q, m->sum[SK_Q]);
}

/* Raises anchors to the tops, and moves the sums against them. */
static inline void sk_move_anchors(const sk_task *r, const sk_scale *t, const real *top, real *h,
                                   double *sum) {
    const sk_scale scale = *t;
#pragma omp simd
    for (int64_t i = 0; i < sk_scalars(r); i++) {
        const real now = sk_logit(top[i], scale.least);
        sum[i] *= sk_exp_of(h[i] - now, &scale);
        h[i] = now;
    }
}

/* The first visit to the logits of a task: tops, and P and Q against them. */
static inline void sk_sum_pair(const sk_task *r, const sk_two_logits *x, sk_tops *tops,
                               sk_comparison *m) {
    SK_ALIGNED real tile[2][SK_TILE];
    const real *u[SK_GROUPS], *v[SK_GROUPS];
    const int64_t step = sk_tile_classes(r);
    sk_clear_sums(r, m);
    for (int64_t i = 0; i < sk_scalars(r); i++) {
        tops->u[i] = tops->v[i] = m->hu[i] = m->hv[i] = -INFINITY;
        tops->u_there[i] = tops->v_there[i] = 0;
    }
    for (int64_t c = 0; c < r->C; c += step) {
        const int64_t classes = sk_min(step, r->C - c), depth = sk_depth(r, classes);
        sk_load_tile(r, x->u, c, classes, tile[0], u);
        sk_load_tile(r, x->v, c, classes, tile[1], v);
        for (int64_t g = 0; g < r->groups; g++) sk_raise_pair(r, u[g], v[g], depth, g, tops);
        sk_move_anchors(r, &x->t, tops->u, m->hu, m->sum[SK_P]);
        sk_move_anchors(r, &x->t_v, tops->v, m->hv, m->sum[SK_Q]);
        for (int64_t g = 0; g < r->groups; g++) sk_add_to_sums(r, x, u[g], v[g], depth, g, m);
    }
    for (int64_t i = 0; i < sk_scalars(r); i++) {
        m->hu[i] = sk_anchor(tops->u[i]);
        m->hv[i] = sk_anchor(tops->v[i]);
    }
}

/* One more visit, for the sums against these anchors that dl follows from. */
static inline void sk_sum_differences(const sk_task *r, const sk_two_logits *x, sk_comparison *m) {
    SK_ALIGNED real tile[2][SK_TILE];
    const real *u[SK_GROUPS], *v[SK_GROUPS];
    const int64_t step = sk_tile_classes(r);
    sk_clear_sums(r, m);
    for (int64_t c = 0; c < r->C; c += step) {
        const int64_t classes = sk_min(step, r->C - c), depth = sk_depth(r, classes);
        sk_load_tile(r, x->u, c, classes, tile[0], u);
        sk_load_tile(r, x->v, c, classes, tile[1], v);
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
    real numbers[SK_PAIR_NUMBERS]; /* k of the formula */
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

/* The classes of a run. They are made in three steps, of which each leaves arrays for the next: one
 * chain of so many instructions, each waiting for the one before, fills the window of a processor
 * before the next chain begins. */
typedef struct sk_pair_classes {
    SK_ALIGNED real d[SK_RUN], larger[SK_RUN], ratio[SK_RUN], gap[SK_RUN], rest[SK_RUN];
} sk_pair_classes;

SK_SPECIAL void sk_set_classes(bool positions, enum sk_form form, const sk_pair_pass *x,
                               sk_run run, const real *u, const real *v, sk_pair_classes *to) {
    const sk_scale t = x->of->t, t_v = x->of->t_v;
    const sk_pair_sides of_row = sk_pair_sides_at(x, run.row);
    for (int64_t n = 0; n < run.n; n += SK_LANES) {
#pragma omp simd
        for (int k = 0; k < SK_LANES; k++) {
            const sk_pair_sides m = positions ? sk_pair_sides_at(x, run.row + n + k) : of_row;
            const real a = sk_logit(u[n + k], t.least), b = sk_logit(v[n + k], t.least);
            const real found = sk_log_ratio(form, a, b, m.gap, &t, &t_v);
            const real counts = sk_abs(found) < m.agree ? 0 : 1, d = found * counts;
            const bool less = d < 0, own = (form == SK_APART) & less;
            const real z = less ? b - m.v_shift : a - m.u_shift;
            const real log2e = own ? t_v.log2e_T : t.log2e_T, low = own ? t_v.lowest : t.lowest;
            const real factor = less ? m.v_factor : m.u_factor;
            to->d[n + k] = d;
            to->larger[n + k] = factor * sk_exp2_scaled(z, log2e, low);
        }
    }
    for (int64_t n = 0; n < run.n; n += SK_LANES) {
#pragma omp simd
        for (int k = 0; k < SK_LANES; k++) {
            const real size = sk_abs(to->d[n + k]), log2e = (real)SK_LOG2E;
            const real ratio = sk_exp2_scaled(-size, log2e, -127 / log2e);
            const real second = size * size * sk_exp_rest(-size);
            const real gap = size < 1 ? size - second : 1 - ratio;
            to->ratio[n + k] = ratio;
            to->gap[n + k] = gap;
            to->rest[n + k] = size < 1 ? second : size - gap;
        }
    }
}

SK_OUTLINE void sk_make_classes(bool positions, const sk_pair_pass *x, sk_run run, const real *u,
                                const real *v, sk_pair_classes *to) {
    if (positions && x->of->form == SK_EXACT)
        sk_set_classes(true, SK_EXACT, x, run, u, v, to);
    else if (positions)
        sk_set_classes(true, SK_APART, x, run, u, v, to);
    else if (x->of->form == SK_EXACT)
        sk_set_classes(false, SK_EXACT, x, run, u, v, to);
    else
        sk_set_classes(false, SK_APART, x, run, u, v, to);
}

SK_SPECIAL sk_pair_class sk_class_in(const sk_pair_classes *x, int64_t i) {
    const real d = x->d[i], larger = x->larger[i], ratio = x->ratio[i], smaller = larger * ratio;
    return (sk_pair_class){.p = d < 0 ? smaller : larger,
                           .q = d < 0 ? larger : smaller,
                           .d = d,
                           .size = sk_abs(d),
                           .larger = larger,
                           .ratio = ratio,
                           .gap = x->gap[i],
                           .rest = x->rest[i]};
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
            a[k] = (positions ? 0 : a[k]) + (y.p != 0 ? to_a : of.limit_p);
            b[k] = (positions ? 0 : b[k]) + (y.q != 0 ? to_b : of.limit_q);
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
SK_SPECIAL void sk_pair_loss_run(bool positions, sk_pair_terms_of terms, sk_pair_pass *x,
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
            const real to_u = s.factor_u * (y.p != 0 ? of_p : of.limit_p);
            const real to_v = s.factor_v * (y.q != 0 ? of_q : of.limit_q);
            grad_u[n + k] = s.factor_u != 0 ? to_u : 0;
            grad_v[n + k] = s.factor_v != 0 ? to_v : 0;
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

/* Leaves the slopes of the classes with the largest p and q as A and B: whole groups of lanes, as in
 * the passes, so that the bits are those of the passes. */
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

/* Leaves lse and dl of each row: dl by the difference D where it has been summed up. */
static inline void sk_set_sums(const sk_task *r, const sk_two_logits *of, const sk_comparison *m,
                               bool differences, sk_found to) {
    for (int64_t i = 0; i < sk_scalars(r); i++) {
        const double P = m->sum[SK_P][i], Q = m->sum[SK_Q][i], d = m->sum[SK_D][i] / Q;
        const double log_p = sk_log(P), gap = sk_gap(of->form, m, i, &of->t, &of->t_v);
        const double log_ratio = differences && d > -0.5 ? d - sk_log_gap(d, sk_log(1 + d))
                                                         : log_p - sk_log(Q);
        to[SK_LSE][i] = i < r->width ? m->hu[i] * of->t.per_T + log_p : 0;
        to[SK_DL][i] = i < r->width ? gap + log_ratio : 0;
    }
}

/* Leaves A, B and the loss of the rows of a task, whose lse and dl are there. */
static inline void sk_add_pair_loss(const sk_task *r, const sk_two_logits *of,
                                    const sk_pair_formula *f, const sk_tops *tops,
                                    sk_pair_pass *x, sk_found found) {
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

/* Rows with a smaller loss are close: a millionth of phi at p = 1 and q = 1/e, where all d are about
 * 1e-3. */
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
        const bool good = (found[SK_LOSS][i] < SK_INFINITE) & !sk_is_far_pair(found, i, 0);
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
        const sk_row_pair both = sk_row_pair_within(pair, in->saved[SK_LSE][i], in->saved[SK_DL][i]);
        sk_careful_slopes(&both, f, numbers, in->saved, factor, streams);
    }
}

/* ---- kernels ---- */

/* Defines name_formula, of the function name_terms. */
#define SK_PAIR_FORMULA(name, is_smooth)                                                 \
    static void name##_set(const sk_task *r, const sk_tops *tops, sk_pair_pass *x) {     \
        sk_set_slopes(name##_terms, r, tops, x);                                         \
    }                                                                                    \
    static void name##_add(void *pass, const sk_slice *at) {                             \
        if (at->r->positions)                                                            \
            sk_add_pair_run(true, name##_terms, pass, at);                               \
        else                                                                             \
            sk_add_pair_run(false, name##_terms, pass, at);                              \
    }                                                                                    \
    static void name##_write(void *pass, const sk_slice *at) {                           \
        if (at->r->positions)                                                            \
            sk_pair_loss_run(true, name##_terms, pass, at);                              \
        else                                                                             \
            sk_pair_loss_run(false, name##_terms, pass, at);                             \
    }                                                                                    \
    static const sk_pair_formula name##_formula = {is_smooth, name##_terms, name##_set,  \
                                                   name##_add, name##_write}

/* Defines the kernels op and op_backward of a loss with the inputs u, v and weight, whose
 * temperatures are the parameters T and T_v; formula: a pointer to its formula, which may depend on
 * the parameters p. */
#define SK_PAIR_KERNELS(op, u, v, T, T_v, formula)                                             \
    static sk_task op##_all(const struct op##_params *p) { return SK_TASKS_OF(p, u); }         \
    static void op##_find(const struct op##_params *p, const sk_task *r, const real *weight,   \
                          sk_found found) {                                                    \
        const real k[SK_PAIR_NUMBERS] = op##_NUMBERS(p);                                       \
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
        const real k[SK_PAIR_NUMBERS] = op##_NUMBERS(p);                                       \
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
    SK_PAIR_FORMULA(op, false);        \
    SK_PAIR_KERNELS(op, u, v, T, T_v, &op##_formula)
