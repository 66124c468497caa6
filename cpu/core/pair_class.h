/* The classes of two rows of logits, as a formula of them takes them (formula/pair_class.h): a run
 * at a time, or one in double. */
#pragma once
#include "cpu/core/pair_sums.h"

#include "formula/pair_class.h"

enum { SK_PAIR_NUMBERS = 5 }; /* of an operator's own, at most */

/* What is found of a row: lse(u/T) and dl as in pair.h, A and B, and the loss. */
enum { SK_SLOPE_P = SK_DL + 1, SK_SLOPE_Q, SK_LOSS };

static inline sk_pair_class sk_careful_class(sk_class_terms x) {
    const double d = fabs(x.d), gap = -expm1(-d), larger = x.p > x.q ? x.p : x.q;
    const double rest = d < 0.5 ? d * d * sk_exp_rest(-(real)d) : d - gap; /* infinite with d */
    return (sk_pair_class){(real)x.p,    (real)x.q,     (real)x.d, (real)d,
                           (real)larger, (real)exp(-d), (real)gap, (real)rest};
}

/* What a row's classes need besides (sk_pair_scalars): its factors for u and v; A and B, each as
 * the sum of two reals, for a slope may be as large; and AGREE, a d below which is no more than the
 * rounding of a constant between u and v, and counts as 0. In forward A and B are the slopes of the
 * classes with the largest p and q: of the sum of p (slope_p - A) nothing cancels where one class
 * has nearly all of p and the gradient is as small. */
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
    return (sk_pair_sides){
        x->pair[SK_U_SHIFT][i], x->pair[SK_U_FACTOR][i],
        x->pair[SK_V_SHIFT][i], x->pair[SK_V_FACTOR][i],
        x->row[SK_AGREE][i],    {x->pair[SK_GAP_HIGH][i], x->pair[SK_GAP_LOW][i]}};
}

/* The classes of a run. d, the rest, and what a formula makes of it are three loops, each of which
 * leaves arrays for the next: one chain of so many instructions, each waiting for the one before,
 * fills the window of a processor before the next chain begins. One loop took 1.5 times as long. */
typedef struct sk_pair_classes {
    SK_ALIGNED real d[SK_RUN], larger[SK_RUN], ratio[SK_RUN], gap[SK_RUN], rest[SK_RUN];
} sk_pair_classes;

SK_SPECIAL void sk_set_classes(bool positions, enum sk_form form, const sk_pair_pass *x, sk_run run,
                               const real *u, const real *v, sk_pair_classes *to) {
    const sk_scale t = x->of->t, t_v = x->of->t_v;
    const sk_pair_sides of_row = sk_pair_sides_at(x, run.row);
    for (int64_t n = 0; n < run.n; n += SK_LANES) {
#pragma omp simd
        for (int k = 0; k < SK_LANES; k++) {
            const sk_pair_sides m = positions ? sk_pair_sides_at(x, run.row + n + k) : of_row;
            const real a = sk_logit(u[n + k], t.least), b = sk_logit(v[n + k], t.least);
            const real found = sk_log_ratio(form, a, b, m.gap, &t, &t_v);
            const real counts = sk_abs(found) < m.agree ? 0 : 1, d = found * counts;
            const bool nowhere = (form == SK_APART) & (a == t.least) & (b == t.least);
            to->d[n + k] = nowhere ? 0 : d;
        }
    }
    for (int64_t n = 0; n < run.n; n += SK_LANES) {
#pragma omp simd
        for (int k = 0; k < SK_LANES; k++) {
            const sk_pair_sides m = positions ? sk_pair_sides_at(x, run.row + n + k) : of_row;
            const real d = to->d[n + k], size = sk_abs(d), to_2 = (real)SK_LOG2E;
            const bool less = d < 0, own = (form == SK_APART) & less;
            const real z = less ? v[n + k] - m.v_shift : u[n + k] - m.u_shift;
            const real log2e = own ? t_v.log2e_T : t.log2e_T, low = own ? t_v.lowest : t.lowest;
            const real factor = less ? m.v_factor : m.u_factor;
            const real ratio = sk_exp2_scaled(-size, to_2, -127 / to_2);
            const real second = size * size * sk_exp_rest(-size);
            const real gap = size < 1 ? size - second : 1 - ratio;
            to->larger[n + k] = factor * sk_exp2_scaled(z, log2e, low);
            to->ratio[n + k] = ratio;
            to->gap[n + k] = gap;
            const real far = size >= (real)0x1p90 ? INFINITY : size - gap; /* excluded */
            to->rest[n + k] = size < 1 ? second : far;
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
