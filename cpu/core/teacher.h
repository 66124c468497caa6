/* Teachers of distillation: their arguments, their logits, and the KL divergence from each of them,
 * with a temperature for each side. */
#pragma once
#include "cpu/core/ce.h"

enum { SK_LOGITS, SK_PROBS, SK_LOG_PROBS }; /* what a teacher holds */
enum { SK_TEACHERS = 2 };
enum { SK_LARGEST_LOGIT, SK_LEVEL, SK_LEVEL_T }; /* planes of `levels` */

/* ---- arguments ---- */

typedef struct sk_teacher {
    const sk_arg *x;
    double weight; /* 0: not there */
    sk_scale t, own;
    enum sk_form form; /* where nothing speaks for the exact one */
    int power; /* e^(z/T) is what was kept before it to this power; 0: it is found, and kept */
    bool is_probs;
} sk_teacher;

/* The terms of a call: cross-entropy, if it is wanted, and teachers. */
typedef struct sk_terms {
    bool has_ce;
    int ce_power; /* as sk_teacher.power, at T = 1 */
    sk_teacher of[SK_TEACHERS];
} sk_terms;

static inline sk_teacher sk_teacher_of(const sk_arg *x, double weight, double T, double own,
                                       int64_t kind) {
    return (sk_teacher){
        x, x->data ? weight : 0, sk_scale_of(T), sk_scale_of(own), T == own ? SK_PLAIN : SK_APART,
        0, kind == SK_PROBS};
}

/* The power that makes e^(z/T) of e^(z/kept), if it is a small one, else 0. */
static inline int sk_power_of(double kept, double T) {
    for (int power = 1; power <= 4; power++)
        if (kept == power * T) return power;
    return 0;
}

/* Lets a teacher take the exponentials of the one before it, and cross-entropy those of the last.
 */
static inline sk_terms sk_terms_of(bool has_ce, sk_teacher first, sk_teacher second) {
    sk_terms k = {has_ce, 0, {first, second}};
    double kept = 0;
    for (int i = 0; i < SK_TEACHERS; i++) {
        if (k.of[i].weight == 0) continue;
        k.of[i].power = sk_power_of(kept, k.of[i].t.T);
        kept = k.of[i].t.T;
    }
    k.ce_power = sk_power_of(kept, 1);
    return k;
}

/* Those of the parameters of either pass. */
#define SK_TERMS_OF(p)                                                                           \
    sk_terms_of(                                                                                 \
        (p)->target.data && (p)->ce_weight != 0,                                                 \
        sk_teacher_of(&(p)->teacher, (p)->teacher_weight, (p)->temperature,                      \
                      (p)->teacher_temperature, (p)->teacher_kind),                              \
        sk_teacher_of(&(p)->second_teacher, (p)->second_teacher_weight, (p)->second_temperature, \
                      (p)->second_teacher_temperature, (p)->second_teacher_kind))

/* ---- logits ---- */

/* Replaces probabilities by their logarithms: n values, whole groups of lanes, in the buffer. */
static inline const real *sk_to_logs(const real *x, int64_t n, real *buffer) {
    for (int64_t i = 0; i < n; i += SK_LANES) {
#pragma omp simd
        for (int k = 0; k < SK_LANES; k++) buffer[i + k] = sk_log_of(x[i + k]);
    }
    return buffer;
}

/* A tile of a teacher's logits. */
static inline void sk_load_teacher(const sk_task *r, const sk_teacher *k, int64_t c,
                                   int64_t classes, real *tile, sk_vectors *to) {
    sk_load_tile(r, k->x, c, classes, tile, to);
    if (!k->is_probs) return;
    for (int64_t i = 0; i < classes && r->positions; i++)
        sk_to_logs(tile + i * SK_PITCH, sk_scalars(r), tile + i * SK_PITCH);
    for (int64_t g = 0; g < r->groups && !r->positions; g++) {
        real *const row = tile + g * sk_row_pitch(r);
        const int64_t whole = (to[g].depth - 1) * SK_LANES;
        sk_to_logs(to[g].last, SK_LANES, row + whole);
        sk_to_logs(to[g].first, whole, row);
        to[g] = sk_vectors_of(r, row, to[g].depth);
    }
}

/* ---- comparison ---- */

/* Adds a group of lanes to the sums of a teacher. */
SK_OUTLINE void sk_compare_teacher(const sk_teacher *k, const sk_task *r, const sk_two_tiles *x,
                                   sk_comparison *m) {
    sk_to_power(x->e, x->u.depth * SK_LANES, k->power);
    if (k->form == SK_EXACT)
        sk_compare_group(SK_EXACT, SK_ONE_KL, SK_FRESH, r, &k->t, &k->own, x, m);
    else if (k->form == SK_APART && k->power != 0)
        sk_compare_group(SK_APART, SK_ONE_KL, SK_REUSE, r, &k->t, &k->own, x, m);
    else if (k->form == SK_APART)
        sk_compare_group(SK_APART, SK_ONE_KL, SK_KEEP, r, &k->t, &k->own, x, m);
    else if (k->power != 0)
        sk_compare_group(SK_PLAIN, SK_ONE_KL, SK_REUSE, r, &k->t, &k->own, x, m);
    else
        sk_compare_group(SK_PLAIN, SK_ONE_KL, SK_KEEP, r, &k->t, &k->own, x, m);
}

/* The results that follow from a teacher's sums; NaN as KL of a row that is not good. */
SK_SPECIAL void sk_conclude_teacher(enum sk_form form, const sk_task *r, const sk_teacher *k,
                                    const real *h, const sk_comparison *m, double *level,
                                    double *dl, double *kl) {
    const sk_scale t = k->t, own = k->own;
#pragma omp simd
    for (int64_t i = 0; i < r->width; i++) {
        const sk_concluded x = sk_conclude(form, false, m, i, &t, &own);
        level[i] = (m->hu[i] - h[i]) * t.per_T + sk_level(m, i);
        dl[i] = x.dl;
        kl[i] = x.kl_qp;
    }
}

/* ---- a row in double, class by class ---- */

static inline sk_side sk_student_side(const sk_task *r, const sk_arg *logits, const sk_teacher *k,
                                      int64_t i) {
    return sk_side_of(r, logits, false, k->t.T, i);
}
static inline sk_side sk_teacher_side(const sk_task *r, const sk_teacher *k, int64_t i) {
    return sk_side_of(r, k->x, k->is_probs, k->own.T, i);
}

/* log p - log q of class c of row i. */
static inline double sk_log_ratio_at(const sk_task *r, const sk_arg *logits, const sk_teacher *k,
                                     int64_t i, int64_t c, sk_side u, sk_side v) {
    return sk_log_ratio_of(sk_logit_at(r, logits, false, i, c),
                           sk_logit_at(r, k->x, k->is_probs, i, c), k->t.T, k->own.T, u, v);
}

/* What is found of a row and its teacher: log P of the student, dl and KL(q||p). */
typedef struct sk_taught_row {
    double level, dl, kl;
} sk_taught_row;

/* A row in double, class by class, with 0 log 0 = 0. */
SK_RARE sk_taught_row sk_careful_taught_row(const sk_task *r, const sk_arg *logits,
                                            const sk_teacher *k, int64_t i) {
    const double T = k->t.T, own = k->own.T;
    const sk_side u = sk_student_side(r, logits, k, i), v = sk_teacher_side(r, k, i);
    const bool nothing = u.log_sum == -INFINITY;
    sk_taught_row row = {
        nothing ? NAN : u.log_sum,
        nothing ? sk_lse_of(v, own) : (u.top / T - v.top / own) + (u.log_sum - v.log_sum),
        sk_is_finite_side(u) && sk_is_finite_side(v) ? 0 : NAN};
    for (int64_t c = 0; c < r->C && !isnan(row.kl); c++) {
        const double z = sk_logit_at(r, logits, false, i, c), p_c = exp(sk_log_p(z, T, u));
        const double q = exp(sk_log_p(sk_logit_at(r, k->x, k->is_probs, i, c), own, v));
        const double d = sk_log_ratio_at(r, logits, k, i, c, u, v);
        if (q == 0)
            row.kl += p_c;
        else
            row.kl += fabs(d) < 0.5 ? q * d * d * sk_exp_rest((real)d) : (p_c - q) - q * d;
    }
    return row;
}

/* ---- gradients ---- */

/* What the gradients of a row need of a teacher: p is P_FACTOR e^((z - h)/T), q is Q_FACTOR e^((t -
 * SHIFT)/T'), h the largest logit; GAP as for sk_log_ratio. All times the row's factor. */
enum {
    SK_P_FACTOR,
    SK_Q_FACTOR,
    SK_SHIFT,
    SK_TEACHER_GAP_HIGH,
    SK_TEACHER_GAP_LOW,
    SK_TEACHER_SCALARS
};
typedef real sk_teacher_scalars[SK_TEACHER_SCALARS][SK_PITCH];

/* Adds a teacher's p - q to base, which may be where it goes. at->x are the logits of student and
 * teacher, h the student's anchors; e holds or gets the exponentials. */
SK_SPECIAL void sk_teacher_run_of(bool positions, bool apart, bool reuse, const sk_teacher *k,
                                  const sk_slice *of, sk_teacher_scalars m, const real *h,
                                  real *restrict e, const real *base) {
    const sk_scale t = k->t, own = k->own;
    const real *const z = of->x[0], *const x = of->x[1];
    real *const grad = of->to[0];
    const sk_ahead next = sk_next_of(of, 1);
    for (int64_t at = 0; at < of->run.n; at += SK_LANES) {
        sk_fetch(next, at / SK_LANES);
#pragma omp simd
        for (int j = 0; j < SK_LANES; j++) {
            const int64_t i = positions ? of->run.row + at + j : of->run.row;
            const real a = sk_logit(z[at + j], t.least), b = sk_logit(x[at + j], t.least);
            const real y = reuse ? e[at + j] : sk_exp_of(a - h[i], &t);
            const real p = m[SK_P_FACTOR][i] * y;
            const real q = m[SK_Q_FACTOR][i] * sk_exp_of(b - m[SK_SHIFT][i], &own);
            const sk_split gap = {m[SK_TEACHER_GAP_HIGH][i], m[SK_TEACHER_GAP_LOW][i]};
            const real d = sk_log_ratio(apart ? SK_APART : SK_EXACT, a, b, gap, &t, &own);
            e[at + j] = y;
            grad[at + j] = base[at + j] + (d * d < (real)0.25 ? q * sk_expm1(d) : p - q);
        }
    }
}

static inline void sk_teacher_run(const sk_teacher *k, const sk_slice *at, sk_teacher_scalars m,
                                  const real *h, real *e, const real *base) {
    sk_to_power(e, at->run.n, k->power);
    switch (4 * at->r->positions + 2 * (k->form == SK_APART) + (k->power != 0)) {
    case 0:
        sk_teacher_run_of(false, false, false, k, at, m, h, e, base);
        break;
    case 1:
        sk_teacher_run_of(false, false, true, k, at, m, h, e, base);
        break;
    case 2:
        sk_teacher_run_of(false, true, false, k, at, m, h, e, base);
        break;
    case 3:
        sk_teacher_run_of(false, true, true, k, at, m, h, e, base);
        break;
    case 4:
        sk_teacher_run_of(true, false, false, k, at, m, h, e, base);
        break;
    case 5:
        sk_teacher_run_of(true, false, true, k, at, m, h, e, base);
        break;
    case 6:
        sk_teacher_run_of(true, true, false, k, at, m, h, e, base);
        break;
    default:
        sk_teacher_run_of(true, true, true, k, at, m, h, e, base);
    }
}

/* Where h, level and dl do not say what p and q are, or a factor is too large for a real. */
static inline bool sk_is_far_teacher(double h, double per_T, double dl, double factor) {
    const double large = fabs(h * per_T) + fabs(dl);
    return ((large >= SK_FAR_LSE) & (large < (double)INFINITY)) | sk_is_far_factor(factor);
}

/* Leaves what the gradients of rows need; returns whether any row is far. */
static inline bool sk_set_teacher(const sk_task *r, const sk_teacher *k, const real *h,
                                  const real *level, const double *dl, const double *factor,
                                  sk_teacher_scalars m) {
    const sk_scale unit = sk_scale_of(1), own = k->own;
    const double T = k->t.T, per_T = k->t.per_T;
    const bool apart = k->form == SK_APART;
    double far = 0;
#pragma omp simd reduction(+ : far)
    for (int64_t i = 0; i < sk_scalars(r); i++) {
        const double lse = (h[i] * per_T + level[i]) - dl[i]; /* the teacher's */
        const real shift = (real)(lse * own.T);
        const double off = shift - lse * own.T;
        const sk_split gap = sk_split_of(apart ? dl[i] : dl[i] * T);
        m[SK_P_FACTOR][i] = (real)factor[i] * sk_exp_of(-level[i], &unit);
        m[SK_Q_FACTOR][i] = (real)factor[i] * sk_exp_of((real)off, &own);
        m[SK_SHIFT][i] = shift;
        m[SK_TEACHER_GAP_HIGH][i] = gap.high;
        m[SK_TEACHER_GAP_LOW][i] = gap.low;
        far += sk_is_far_teacher(h[i], per_T, dl[i], factor[i]) ? 1 : 0;
    }
    return far != 0;
}
