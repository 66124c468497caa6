/* Distillation on the CPU: see ops/distill.h for the formula, cpu/core/kl.h and ce.h for the
 * numerics, cpu/core/task.h, tile.h and run.h for how rows are visited.
 *
 * Forward visits the logits twice (largest logits; sums that cross-entropy and KL follow from),
 * backward once. */
#include "distill.h"
#include "cpu/core/ce.h"
#include "cpu/core/reduce.h"
#include "cpu/core/tile.h"
#include "cpu/core/values.h"

SK_PARAMS(distill)
SK_PARAMS(distill_backward)
typedef struct distill_params forward_params;
typedef struct distill_backward_params backward_params;

enum { LOGITS, PROBS, LOG_PROBS };
enum { TEACHERS = 2 };
enum { LARGEST, LEVEL, LEVEL_T }; /* planes of `levels` */

/* ---- the arguments of a teacher ---- */

typedef struct teacher {
    const sk_arg *x;
    double weight; /* 0: not there */
    sk_scale t, own;
    enum sk_form form; /* where nothing speaks for the exact one */
    int power; /* e^(z/T) is what was kept before it to this power; 0: it is found, and kept */
    bool is_probs;
} teacher;

static teacher teacher_of(const sk_arg *x, double weight, double T, double own, int64_t kind) {
    return (teacher){
        x, x->data ? weight : 0, sk_scale_of(T), sk_scale_of(own), T == own ? SK_PLAIN : SK_APART,
        0, kind == PROBS};
}

/* The power that makes e^(z/T) of e^(z/kept), if it is a small one, else 0. */
static int power_of(double kept, double T) {
    for (int power = 1; power <= 4; power++)
        if (kept == power * T) return power;
    return 0;
}

/* Lets a teacher take the exponentials of the one before it, and returns the power by which
 * cross-entropy, at T = 1, takes those of the last. */
static int share(teacher *k) {
    double kept = 0;
    for (int i = 0; i < TEACHERS; i++) {
        if (k[i].weight == 0) continue;
        k[i].power = power_of(kept, k[i].t.T);
        kept = k[i].t.T;
    }
    return power_of(kept, 1);
}

#define TEACHERS_OF(p, k)                                                                          \
    const bool has_ce = (p)->target.data && (p)->ce_weight != 0;                                   \
    teacher k[TEACHERS] = {                                                                        \
        teacher_of(&(p)->teacher, (p)->teacher_weight, (p)->temperature, (p)->teacher_temperature, \
                   (p)->teacher_kind),                                                             \
        teacher_of(&(p)->second_teacher, (p)->second_teacher_weight, (p)->second_temperature,      \
                   (p)->second_teacher_temperature, (p)->second_teacher_kind)};                    \
    const int ce_power = share(k)

/* Replaces probabilities by their logarithms: n values, whole groups of lanes, in the buffer. */
static const real *to_logs(const real *x, int64_t n, real *buffer) {
    for (int64_t i = 0; i < n; i += SK_LANES) {
#pragma omp simd
        for (int k = 0; k < SK_LANES; k++) buffer[i + k] = sk_log_of(x[i + k]);
    }
    return buffer;
}

/* A tile of a teacher's logits. */
static void load_teacher(const sk_task *r, const teacher *k, int64_t c, int64_t classes, real *tile,
                         const real **lanes) {
    sk_load_tile(r, k->x, c, classes, tile, lanes);
    if (!k->is_probs) return;
    const int64_t row = sk_row_pitch(r);
    for (int64_t i = 0; i < classes && r->positions; i++)
        to_logs(tile + i * SK_PITCH, sk_scalars(r), tile + i * SK_PITCH);
    for (int64_t g = 0; g < r->groups && !r->positions; g++)
        lanes[g] = to_logs(lanes[g], sk_groups(classes) * SK_LANES, tile + g * row);
}

/* ---- forward ---- */

/* Per row: results of the visits. */
typedef struct results {
    SK_ALIGNED real h[SK_PITCH];                     /* the largest logit */
    SK_ALIGNED double ce[SK_PITCH], level[SK_PITCH]; /* -sum y log p; log P at T = 1 */
    SK_ALIGNED double level_T[TEACHERS][SK_PITCH], dl[TEACHERS][SK_PITCH], kl[TEACHERS][SK_PITCH];
} results;

typedef struct sums {
    sk_softmax softmax;
    sk_comparison pair[TEACHERS];
} sums;

/* The first visit: leaves the anchors. */
static void find_anchors(const forward_params *p, const sk_task *r, const teacher *k,
                         real tile[][SK_TILE], const real *x[][SK_GROUPS], sums *m) {
    const int64_t step = sk_tile_classes(r);
    for (int64_t i = 0; i < sk_scalars(r); i++)
        m->softmax.h[i] = m->pair[0].hv[i] = m->pair[1].hv[i] = -INFINITY;
    for (int64_t c = 0; c < r->C; c += step) {
        const int64_t classes = sk_min(step, r->C - c), depth = sk_depth(r, classes);
        sk_load_tile(r, &p->logits, c, classes, tile[TEACHERS], x[TEACHERS]);
        for (int64_t g = 0; g < r->groups; g++) sk_raise(r, x[TEACHERS][g], depth, g, m->softmax.h);
        for (int j = 0; j < TEACHERS; j++) {
            if (k[j].weight == 0) continue;
            load_teacher(r, &k[j], c, classes, tile[j], x[j]);
            for (int64_t g = 0; g < r->groups; g++) sk_raise(r, x[j][g], depth, g, m->pair[j].hv);
        }
    }
    for (int64_t i = 0; i < sk_scalars(r); i++) {
        m->softmax.h[i] = sk_anchor(m->softmax.h[i]);
        for (int j = 0; j < TEACHERS; j++) {
            m->pair[j].hu[i] = m->softmax.h[i];
            m->pair[j].hv[i] = sk_anchor(m->pair[j].hv[i]);
        }
    }
}

static void compare_group(const teacher *k, const sk_task *r, const real *u, const real *v,
                          sk_ahead next_u, sk_ahead next_v, int64_t depth, int64_t g, real *e,
                          sk_comparison *m) {
    sk_to_power(e, depth * SK_LANES, k->power);
#define COMPARE(form, exps) \
    sk_compare_group(form, false, exps, r, &k->t, &k->own, u, v, next_u, next_v, depth, g, e, m)
    if (k->form == SK_EXACT)
        COMPARE(SK_EXACT, SK_FRESH);
    else if (k->form == SK_APART && k->power != 0)
        COMPARE(SK_APART, SK_REUSE);
    else if (k->form == SK_APART)
        COMPARE(SK_APART, SK_KEEP);
    else if (k->power != 0)
        COMPARE(SK_PLAIN, SK_REUSE);
    else
        COMPARE(SK_PLAIN, SK_KEEP);
#undef COMPARE
}

/* The second visit: leaves the sums. */
SK_OUTLINE void add_up(const forward_params *p, const sk_task *r, bool has_ce, int ce_power,
                       const teacher *k, real tile[][SK_TILE], const real *x[][SK_GROUPS],
                       sums *m) {
    SK_ALIGNED real e[SK_ROW_C];
    const int64_t step = sk_tile_classes(r);
    for (int64_t c = 0; c < r->C; c += step) {
        const int64_t classes = sk_min(step, r->C - c), depth = sk_depth(r, classes);
        if (r->C > step) sk_load_tile(r, &p->logits, c, classes, tile[TEACHERS], x[TEACHERS]);
        for (int j = 0; j < TEACHERS && r->C > step; j++)
            if (k[j].weight != 0) load_teacher(r, &k[j], c, classes, tile[j], x[j]);
        for (int64_t g = 0; g < r->groups; g++) {
            const real *const z = x[TEACHERS][g];
            const sk_ahead next = sk_next_tile(r, &p->logits, g, c);
            for (int j = 0; j < TEACHERS; j++)
                if (k[j].weight != 0)
                    compare_group(&k[j], r, z, x[j][g], next, sk_next_tile(r, k[j].x, g, c), depth,
                                  g, e, &m->pair[j]);
            if (!has_ce) continue;
            sk_to_power(e, depth * SK_LANES, ce_power);
            if (ce_power != 0)
                sk_add_exponentials(SK_REUSE, r, z, next, depth, g, e, &m->softmax);
            else
                sk_add_exponentials(SK_FRESH, r, z, next, depth, g, e, &m->softmax);
            if (p->label_smoothing != 0) sk_add_above(r, z, classes, g, &m->softmax);
        }
    }
}

/* The results that follow from a teacher's sums; NaN as KL of a row that is not good. */
SK_SPECIAL void conclude(enum sk_form form, const sk_task *r, const teacher *k, const real *h,
                         const sk_comparison *m, double *level, double *dl, double *kl) {
    const sk_scale t = k->t, own = k->own;
#pragma omp simd
    for (int64_t i = 0; i < r->width; i++) {
        const sk_concluded x = sk_conclude(form, false, m, i, &t, &own);
        level[i] = (m->hu[i] - h[i]) * t.per_T + sk_level(m, i);
        dl[i] = x.dl;
        kl[i] = x.kl_qp;
    }
}

static sk_side student_side(const sk_task *r, const sk_arg *logits, const teacher *k, int64_t i) {
    return sk_side_of(r, logits, false, k->t.T, i);
}
static sk_side teacher_side(const sk_task *r, const teacher *k, int64_t i) {
    return sk_side_of(r, k->x, k->is_probs, k->own.T, i);
}

/* log p - log q of class c of row i. */
static double log_ratio_at(const sk_task *r, const sk_arg *logits, const teacher *k, int64_t i,
                           int64_t c, sk_side u, sk_side v) {
    return sk_log_ratio_of(sk_logit_at(r, logits, false, i, c),
                           sk_logit_at(r, k->x, k->is_probs, i, c), k->t.T, k->own.T, u, v);
}

/* A row in double, class by class, with 0 log 0 = 0. */
SK_RARE void careful_row(const forward_params *p, const sk_task *r, const teacher *k, int64_t i,
                         double *level, double *dl, double *kl) {
    const double T = k->t.T, own = k->own.T;
    const sk_side u = student_side(r, &p->logits, k, i), v = teacher_side(r, k, i);
    const bool nothing = u.log_sum == -INFINITY;
    *level = nothing ? NAN : u.log_sum;
    *dl = nothing ? sk_lse_of(v, own) : (u.top / T - v.top / own) + (u.log_sum - v.log_sum);
    *kl = sk_is_finite_side(u) && sk_is_finite_side(v) ? 0 : NAN;
    for (int64_t c = 0; c < r->C && !isnan(*kl); c++) {
        const double z = sk_logit_at(r, &p->logits, false, i, c), p_c = exp(sk_log_p(z, T, u));
        const double q = exp(sk_log_p(sk_logit_at(r, k->x, k->is_probs, i, c), own, v));
        const double d = log_ratio_at(r, &p->logits, k, i, c, u, v);
        if (q == 0)
            *kl += p_c;
        else
            *kl += fabs(d) < 0.5 ? q * d * d * sk_exp_rest((real)d) : (p_c - q) - q * d;
    }
}

/* Compares again what the first results left open: in the exact form, against T lse, or, where that
 * does not help, in double. */
static void compare_again(const forward_params *p, const sk_task *r, const teacher *k, int j,
                          const real *weight, real tile[][SK_TILE], const real *x[][SK_GROUPS],
                          sums *m, results *to) {
    double *const level = to->level_T[j], *const dl = to->dl[j], *const kl = to->kl[j];
    const real *const h = m->softmax.h;
    const double T = k[j].t.T;
    sk_comparison *const pair = &m->pair[j];
    int64_t open = 0;
    for (int64_t i = 0; i < r->width; i++) open += weight[i] != 0 && isnan(kl[i]);
    if (open > 0 && k[j].form == SK_PLAIN) {
        SK_ALIGNED double again[3][SK_PITCH];
        teacher only[TEACHERS] = {k[0], k[1]};
        only[j].form = SK_EXACT;
        only[j].power = 0;
        only[1 - j].weight = 0;
        for (int64_t i = 0; i < r->width; i++) { /* 0 stays 0 where they differ by a constant */
            if (dl[i] == sk_gap(SK_EXACT, pair, i, &k[j].t, &k[j].t)) continue;
            pair->hu[i] = (real)(level[i] * T + h[i]);
            pair->hv[i] = (real)(level[i] * T + h[i] - dl[i] * T);
        }
        sk_clear_sums(r, pair);
        add_up(p, r, false, 0, only, tile, x, m);
        conclude(SK_EXACT, r, &k[j], h, pair, again[0], again[1], again[2]);
        for (int64_t i = 0; i < r->width; i++) {
            if (!isnan(kl[i])) continue;
            level[i] = again[0][i];
            dl[i] = again[1][i];
            kl[i] = again[2][i];
        }
    }
    for (int64_t i = 0; i < r->width && open > 0; i++)
        if (weight[i] != 0 && isnan(kl[i])) careful_row(p, r, &k[j], i, &level[i], &dl[i], &kl[i]);
}

/* Leaves the task's rows and what is saved; without m all weights are 0. */
static void save(const forward_params *p, const sk_task *r, bool has_ce, const teacher *k,
                 const real *weight, const int32_t *target, const sums *m, const results *x) {
    SK_ALIGNED double kl[SK_PITCH] = {0};
    const int64_t plane = p->levels.stride[0], at = r->n * r->S + r->s; /* outputs are compact */
    real *restrict const levels = (real *)p->levels.data + at;
    real *restrict const rows = (real *)p->rows.data + at;
    real *restrict const ce_rows = (real *)p->ce_rows.data + at;
    real *restrict const kl_rows = (real *)p->kl_rows.data + at;
    double *restrict const ratios = (double *)p->ratios.data + at;
    const bool all_taught = !p->mask_teachers || !p->target.data;
    for (int j = 0; j < TEACHERS; j++) {
        const bool there = m && k[j].weight != 0;
        const double factor = k[j].weight * k[j].t.T * k[j].t.T;
        for (int64_t i = 0; i < r->width && !there; i++)
            levels[(LEVEL_T + j) * plane + i] = (real)(ratios[j * plane + i] = 0);
        if (!there) continue;
#pragma omp simd
        for (int64_t i = 0; i < r->width; i++) {
            const bool used = weight[i] != 0;
            levels[(LEVEL_T + j) * plane + i] = used ? (real)x->level_T[j][i] : 0;
            ratios[j * plane + i] = used ? x->dl[j][i] : 0;
            kl[i] += used & ((target[i] >= 0) | all_taught) ? factor * x->kl[j][i] : 0;
        }
    }
    for (int64_t i = 0; i < r->width && !m; i++)
        levels[i] = levels[plane + i] = ce_rows[i] = kl_rows[i] = rows[i] = 0;
    if (!m) return;
#pragma omp simd
    for (int64_t i = 0; i < r->width; i++) {
        const double w = weight[i], class = target[i], to_ce = p->ce_weight * w * x->ce[i];
        const double ce = has_ce & (w != 0) & (class >= 0) ? to_ce : 0;
        const real to_kl = w != 0 ? (real)(w * kl[i]) : 0;
        levels[LARGEST * plane + i] = w != 0 ? x->h[i] : 0;
        levels[LEVEL * plane + i] = has_ce & (w != 0) ? (real)x->level[i] : 0;
        ce_rows[i] = (real)ce;
        kl_rows[i] = to_kl;
        rows[i] = (real)ce + to_kl;
    }
}

static void forward_task(const forward_params *p, const sk_task *r) {
    TEACHERS_OF(p, k);
    SK_ALIGNED real tile[TEACHERS + 1][SK_TILE], weight[SK_PITCH];
    SK_ALIGNED int32_t target[SK_PITCH];
    const real *x[TEACHERS + 1][SK_GROUPS];
    sums m;
    results to;
    bool any = false;
    sk_load_scalars(r, &p->weight, weight);
    sk_load_targets(r, &p->target, p->ignore_index, target);
    for (int64_t i = 0; i < r->width; i++) any |= weight[i] != 0;
    if (any) {
        for (int i = 0; i < SK_CE_SUMS; i++)
            memset(m.softmax.sum[i], 0, (size_t)sk_scalars(r) * sizeof(double));
        for (int j = 0; j < TEACHERS; j++) sk_clear_sums(r, &m.pair[j]);
        find_anchors(p, r, k, tile, x, &m);
        add_up(p, r, has_ce, ce_power, k, tile, x, &m);
        if (has_ce) {
            SK_ALIGNED real z[SK_PITCH];
            sk_load_target_logits(r, &p->logits, target, z);
            sk_conclude_ce(r, &m.softmax, z, p->label_smoothing, to.level, to.ce);
        } else {
            memset(to.ce, 0, (size_t)r->width * sizeof to.ce[0]);
        }
        for (int j = 0; j < TEACHERS; j++) {
            if (k[j].weight == 0) continue;
            if (k[j].form == SK_PLAIN)
                conclude(SK_PLAIN, r, &k[j], m.softmax.h, &m.pair[j], to.level_T[j], to.dl[j],
                         to.kl[j]);
            else
                conclude(SK_APART, r, &k[j], m.softmax.h, &m.pair[j], to.level_T[j], to.dl[j],
                         to.kl[j]);
            compare_again(p, r, k, j, weight, tile, x, &m, &to);
        }
        memcpy(to.h, m.softmax.h, (size_t)r->width * sizeof to.h[0]);
        sk_mend_ce(r, &p->logits, weight, target, p->label_smoothing, to.h, to.level, to.ce);
    }
    save(p, r, has_ce, k, weight, target, any ? &m : NULL, &to);
}

/* The sum of the weights of all rows, or of those with a target. */
static double sum_of_weights(const forward_params *p, bool with_target) {
    real weight[SK_BLOCK];
    const int64_t N = SK_DIM(p, N), S = SK_DIM(p, S), step = p->target.stride[1];
    double sum = 0;
    if (!with_target || !p->target.data)
        return p->weight.data ? sk_sum(&p->weight, N, S) : (double)N * (double)S;
    for (int64_t i = 0; i < SK_BLOCK && !p->weight.data; i++) weight[i] = 1;
    for (int64_t n = 0; n < N; n++) {
        for (int64_t s = 0; s < S; s += SK_BLOCK) {
            const int64_t count = sk_min(SK_BLOCK, S - s);
            const int64_t *const target =
                (const int64_t *)p->target.data + n * p->target.stride[0] + s * step;
            double part = 0;
            if (p->weight.data)
                sk_copy(&p->weight, n * p->weight.stride[0] + s * p->weight.stride[1],
                        p->weight.stride[1], count, weight);
#pragma omp simd reduction(+ : part)
            for (int64_t i = 0; i < count; i++)
                part += target[i * step] == p->ignore_index ? 0 : (double)weight[i];
            sum += part;
        }
    }
    return sum;
}

/* The class of row [n, s], -1 where there is none. */
static int32_t target_at(const forward_params *p, int64_t n, int64_t s) {
    const int64_t *const stride = p->target.stride, *const target = p->target.data;
    const int64_t y = target ? target[n * stride[0] + s * stride[1]] : p->ignore_index;
    return y == p->ignore_index ? -1 : (int32_t)y;
}

/* What rows of cross-entropy and of the teachers come to, class by class. */
static double ce_value(const void *params, int64_t n, int64_t s) {
    const forward_params *p = params;
    const sk_task r = sk_one_row(SK_DIM(p, N), SK_DIM(p, C), SK_DIM(p, S), n, s);
    const double w = sk_weight_at(&p->weight, n, s);
    const sk_side x = sk_side_of(&r, &p->logits, false, 1, 0);
    return p->ce_weight * w *
           sk_careful_ce(&r, &p->logits, 0, target_at(p, n, s), p->label_smoothing, x);
}
static double kl_value(const void *params, int64_t n, int64_t s) {
    const forward_params *p = params;
    TEACHERS_OF(p, k);
    (void)has_ce, (void)ce_power;
    const sk_task r = sk_one_row(SK_DIM(p, N), SK_DIM(p, C), SK_DIM(p, S), n, s);
    const double w = sk_weight_at(&p->weight, n, s);
    double sum = 0;
    for (int j = 0; j < TEACHERS; j++) {
        double level, dl, kl = 0;
        if (k[j].weight != 0) careful_row(p, &r, &k[j], 0, &level, &dl, &kl);
        sum += k[j].weight * k[j].t.T * k[j].t.T * kl;
    }
    return w * sum;
}

static void forward_finish(const void *params) {
    const forward_params *p = params;
    const int64_t N = SK_DIM(p, N), S = SK_DIM(p, S);
    const bool has_kl = (p->teacher.data && p->teacher_weight != 0) ||
                        (p->second_teacher.data && p->second_teacher_weight != 0);
    const bool has[2] = {p->target.data && p->ce_weight != 0, has_kl};
    const sk_arg *const rows[2] = {&p->ce_rows, &p->kl_rows};
    const sk_row_value value[2] = {ce_value, kl_value};
    double part[2], denominator[2] = {1, 1};
    for (int i = 0; i < 2; i++) {
        if (p->reduction == SELFKD_MEAN)
            denominator[i] = p->divisor.data ? sk_load_one(&p->divisor, 0)
                                             : sum_of_weights(p, i == 0 || p->mask_teachers);
        part[i] = has[i] ? sk_sum_rows(rows[i], N, S, value[i], p) / denominator[i] : 0;
        ((real *)p->denominators.data)[i] = (real)denominator[i];
    }
    *(real *)p->ce.data = (real)part[0];
    *(real *)p->kl.data = (real)part[1];
    *(real *)p->loss.data = (real)(part[0] + part[1]);
}

/* ---- backward ---- */

/* What the gradients of a row need of a teacher: p is P_FACTOR e^((z - h)/T), q is Q_FACTOR e^((t -
 * SHIFT)/T'), h the largest logit; GAP as for sk_log_ratio. All times the row's factor. */
enum { P_FACTOR, Q_FACTOR, SHIFT, GAP_HIGH, GAP_LOW, TEACHER_SCALARS };
typedef real teacher_scalars[TEACHER_SCALARS][SK_PITCH];

/* Adds a teacher's p - q to base, which may be grad. */
SK_SPECIAL void teacher_run(bool positions, bool apart, bool reuse, const teacher *k, sk_run run,
                            teacher_scalars m, const real *h, const real *z, const real *x,
                            sk_ahead next, real *restrict e, const real *base, real *grad) {
    const sk_scale t = k->t, own = k->own;
    for (int64_t at = 0; at < run.n; at += SK_LANES) {
        sk_fetch(next, at / SK_LANES);
#pragma omp simd
        for (int j = 0; j < SK_LANES; j++) {
            const int64_t i = positions ? run.row + at + j : run.row;
            const real a = sk_logit(z[at + j], t.least), b = sk_logit(x[at + j], t.least);
            const real y = reuse ? e[at + j] : sk_exp_of(a - h[i], &t);
            const real p = m[P_FACTOR][i] * y;
            const real q = m[Q_FACTOR][i] * sk_exp_of(b - m[SHIFT][i], &own);
            const sk_split gap = {m[GAP_HIGH][i], m[GAP_LOW][i]};
            const real d = sk_log_ratio(apart ? SK_APART : SK_EXACT, a, b, gap, &t, &own);
            e[at + j] = y;
            grad[at + j] = base[at + j] + (d * d < (real)0.25 ? q * sk_expm1(d) : p - q);
        }
    }
}

static void add_teacher(const sk_task *r, const teacher *k, sk_run run, teacher_scalars m,
                        const real *h, const real *z, const real *x, sk_ahead next, real *e,
                        const real *base, real *grad) {
    sk_to_power(e, run.n, k->power);
#define RUN(positions, apart, reuse) \
    teacher_run(positions, apart, reuse, k, run, m, h, z, x, next, e, base, grad)
    const int which = 4 * r->positions + 2 * (k->form == SK_APART) + (k->power != 0);
    switch (which) {
    case 0:
        RUN(false, false, false);
        break;
    case 1:
        RUN(false, false, true);
        break;
    case 2:
        RUN(false, true, false);
        break;
    case 3:
        RUN(false, true, true);
        break;
    case 4:
        RUN(true, false, false);
        break;
    case 5:
        RUN(true, false, true);
        break;
    case 6:
        RUN(true, true, false);
        break;
    default:
        RUN(true, true, true);
    }
#undef RUN
}

static void add_ce(const sk_task *r, sk_run run, int power, const int32_t *target, sk_ce_scalars m,
                   const real *z, sk_ahead next, real *e, const real *base, real *grad) {
    sk_to_power(e, run.n, power);
    if (r->positions && power != 0)
        sk_ce_run(true, SK_REUSE, run, target, m, z, next, e, base, grad);
    else if (r->positions)
        sk_ce_run(true, SK_FRESH, run, target, m, z, next, e, base, grad);
    else if (power != 0)
        sk_ce_run(false, SK_REUSE, run, target, m, z, next, e, base, grad);
    else
        sk_ce_run(false, SK_FRESH, run, target, m, z, next, e, base, grad);
}

/* What reaches a row: the factors of its cross-entropy and of each teacher; and its target's logit.
 */
typedef struct incoming {
    SK_ALIGNED double ce[SK_PITCH], kl[TEACHERS][SK_PITCH];
    SK_ALIGNED real of_target[SK_PITCH], live[SK_PITCH]; /* live 0: the gradient is 0 in any case */
    SK_ALIGNED int32_t target[SK_PITCH];
    bool all_live;
} incoming;

static void load_incoming(const backward_params *p, const sk_task *r, bool has_ce, const teacher *k,
                          incoming *in) {
    SK_ALIGNED real grad[SK_PITCH] = {0}, weight[SK_PITCH] = {0};
    const real *const denominator = (const real *)p->denominators.data;
    const double per_ce = has_ce ? p->ce_weight / denominator[0] : 0;
    const double per_kl = 1 / (double)denominator[p->denominators.stride[0]];
    const double taught = p->mask_teachers && p->target.data ? 0 : -1; /* the least class that is */
    double per_teacher[TEACHERS];
    for (int j = 0; j < TEACHERS; j++)
        per_teacher[j] = k[j].weight != 0 ? per_kl * k[j].weight * k[j].t.T : 0;
    sk_load_scalars(r, &p->grad, grad);
    sk_load_scalars(r, &p->weight, weight);
    sk_load_targets(r, &p->target, p->ignore_index, in->target);
    memset(in->of_target, 0, sizeof in->of_target);
    if (has_ce) sk_load_target_logits(r, &p->logits, in->target, in->of_target);
    double dead = 0;
#pragma omp simd reduction(+ : dead)
    for (int64_t i = 0; i < sk_scalars(r); i++) {
        const double factor = (double)grad[i] * weight[i], target = in->target[i];
        const double ce = per_ce * factor, first = per_teacher[0] * factor,
                     second = per_teacher[1] * factor;
        const double to_ce = (factor != 0) & (target >= 0) ? ce : 0;
        const double to_first = (factor != 0) & (target >= taught) ? first : 0;
        const double to_second = (factor != 0) & (target >= taught) ? second : 0;
        const double live = (to_ce != 0) | (to_first != 0) | (to_second != 0) ? 1 : 0;
        in->ce[i] = to_ce;
        in->kl[0][i] = to_first;
        in->kl[1][i] = to_second;
        in->live[i] = (real)live;
        dead += 1 - live;
    }
    in->all_live = dead == 0;
}

static void load_plane(const sk_task *r, const sk_arg *x, int plane, real *to) {
    sk_load_reals(r, (const real *)x->data + plane * x->stride[0], x->stride[1], x->stride[2], to);
}

/* Where h, level and dl do not say what p and q are, or a factor is too large for a real. */
static inline bool is_far_ce(double h, double factor) {
    return ((h < SK_LEAST) & (h > -INFINITY)) | sk_is_far_factor(factor);
}
static inline bool is_far_teacher(double h, double per_T, double dl, double factor) {
    const double large = fabs(h * per_T) + fabs(dl);
    return ((large >= SK_FAR_LSE) & (large < (double)INFINITY)) | sk_is_far_factor(factor);
}

static bool any_far_ce(const sk_task *r, const real *h, const double *factor) {
    double far = 0;
#pragma omp simd reduction(+ : far)
    for (int64_t i = 0; i < sk_scalars(r); i++) far += is_far_ce(h[i], factor[i]) ? 1 : 0;
    return far != 0;
}

/* Returns whether any row is far. */
static bool set_teacher_scalars(const backward_params *p, const sk_task *r, const teacher *k, int j,
                                const double *factor, const real *h, teacher_scalars m) {
    SK_ALIGNED real level[SK_PITCH] = {0};
    SK_ALIGNED double dl[SK_PITCH] = {0};
    const sk_scale unit = sk_scale_of(1), own = k->own;
    const double T = k->t.T, per_T = k->t.per_T;
    const bool apart = k->form == SK_APART;
    load_plane(r, &p->levels, LEVEL_T + j, level);
    sk_load_doubles(r, (const double *)p->ratios.data + j * p->ratios.stride[0],
                    p->ratios.stride[1], p->ratios.stride[2], dl);
    double far = 0;
#pragma omp simd reduction(+ : far)
    for (int64_t i = 0; i < sk_scalars(r); i++) {
        const double lse = (h[i] * per_T + level[i]) - dl[i]; /* the teacher's */
        const real shift = (real)(lse * own.T);
        const double off = shift - lse * own.T;
        const sk_split gap = sk_split_of(apart ? dl[i] : dl[i] * T);
        m[P_FACTOR][i] = (real)factor[i] * sk_exp_of(-level[i], &unit);
        m[Q_FACTOR][i] = (real)factor[i] * sk_exp_of((real)off, &own);
        m[SHIFT][i] = shift;
        m[GAP_HIGH][i] = gap.high;
        m[GAP_LOW][i] = gap.low;
        far += is_far_teacher(h[i], per_T, dl[i], factor[i]) ? 1 : 0;
    }
    return far != 0;
}

static void clear_dead(const sk_task *r, sk_run run, const real *live, real *grad) {
    const real *const of = live + run.row;
    if (!r->positions) {
        if (of[0] == 0) memset(grad, 0, (size_t)run.n * sizeof *grad);
        return;
    }
#pragma omp simd
    for (int64_t i = 0; i < run.n; i++) grad[i] = of[i] != 0 ? grad[i] : 0;
}

/* The gradient of such a row, in double, class by class. */
SK_RARE void careful_gradient(const backward_params *p, const sk_task *r, bool has_ce,
                              const teacher *k, const incoming *in, int64_t i, int64_t classes,
                              double h, const double *level, const double *dl) {
    const sk_arg *const z = &p->logits, *const to = &p->grad_logits;
    sk_side u[TEACHERS], v[TEACHERS];
    const sk_side x = sk_whole_side(sk_side_of(r, z, false, 1, i), h, level[0], SK_ROUNDED);
    for (int j = 0; j < TEACHERS; j++) {
        if (k[j].weight == 0) continue;
        const double lse = h / k[j].t.T + level[1 + j];
        u[j] = sk_whole_side(student_side(r, z, &k[j], i), h, level[1 + j], SK_ROUNDED);
        v[j] = sk_side_within(teacher_side(r, &k[j], i), k[j].own.T, lse, dl[j], SK_ROUNDED);
    }
    for (int64_t c = 0; c < r->C; c++) {
        const double z_c = sk_logit_at(r, z, false, i, c);
        double grad = 0;
        if (has_ce && in->ce[i] != 0)
            grad +=
                in->ce[i] * sk_ce_slope_of(z_c, c == in->target[i], p->label_smoothing, classes, x);
        for (int j = 0; j < TEACHERS; j++) {
            if (k[j].weight == 0 || in->kl[j][i] == 0) continue;
            const double t_c = sk_logit_at(r, k[j].x, k[j].is_probs, i, c);
            const double q = exp(sk_log_p(t_c, k[j].own.T, v[j]));
            const double d = log_ratio_at(r, z, &k[j], i, c, u[j], v[j]);
            const double p_q = exp(sk_log_p(z_c, k[j].t.T, u[j])) - q;
            grad += in->kl[j][i] * (fabs(d) < 0.5 ? q * expm1(d) : p_q);
        }
        sk_store_one(to, sk_class_at(r, to, i, c), (real)grad);
    }
}

/* Leaves the gradients of all such rows of a task. */
SK_RARE void differentiate_far(const backward_params *p, const sk_task *r, bool has_ce,
                               const teacher *k, const incoming *in, int64_t classes,
                               const real *h) {
    const int64_t *const of_level = p->levels.stride, *const of_dl = p->ratios.stride;
    for (int64_t i = 0; i < r->width; i++) {
        const int64_t at = sk_row_at(r, of_dl[1], of_dl[2], i),
                      level_at = sk_row_at(r, of_level[1], of_level[2], i);
        bool far = has_ce && is_far_ce(h[i], in->ce[i]);
        double dl[TEACHERS], level[1 + TEACHERS];
        for (int j = 0; j < TEACHERS; j++) {
            dl[j] = ((const double *)p->ratios.data)[j * of_dl[0] + at];
            far |= k[j].weight != 0 && is_far_teacher(h[i], k[j].t.per_T, dl[j], in->kl[j][i]);
        }
        if (in->live[i] == 0 || !far || !isfinite(h[i] + dl[0] + dl[1])) continue;
        for (int j = 0; j < 1 + TEACHERS; j++)
            level[j] = ((const real *)p->levels.data)[(LEVEL + j) * of_level[0] + level_at];
        careful_gradient(p, r, has_ce, k, in, i, classes, h[i], level, dl);
    }
}

static void backward_task(const backward_params *p, const sk_task *r) {
    TEACHERS_OF(p, k);
    SK_ALIGNED real buffer[4][SK_RUN];
    SK_ALIGNED real level[SK_PITCH] = {0};
    SK_ALIGNED sk_ce_scalars ce = {{0}};
    SK_ALIGNED teacher_scalars of[TEACHERS];
    incoming in;
    load_incoming(p, r, has_ce, k, &in);
    load_plane(r, &p->levels, LARGEST, ce[SK_LARGEST]);
    load_plane(r, &p->levels, LEVEL, level);
    const int64_t classes = p->classes > 0 ? p->classes : r->C;
    if (has_ce) sk_set_ce(r, in.ce, in.of_target, level, p->label_smoothing, classes, ce);
    bool far = has_ce && any_far_ce(r, ce[SK_LARGEST], in.ce);
    for (int j = 0; j < TEACHERS; j++)
        if (k[j].weight != 0)
            far |= set_teacher_scalars(p, r, &k[j], j, in.kl[j], ce[SK_LARGEST], of[j]);
    for (sk_run run = {0}; sk_next_run(r, &run);) {
        const real *const z = sk_read_run(r, &p->logits, run, buffer[0]);
        const sk_ahead next = sk_next_read(r, &p->logits, run);
        real *const e = buffer[2], *const grad = sk_begin_run(r, &p->grad_logits, run, buffer[3]);
        const real *base = sk_zeros;
        for (int j = 0; j < TEACHERS; j++) {
            if (k[j].weight == 0) continue;
            const real *x = sk_read_run(r, k[j].x, run, buffer[1]);
            if (k[j].is_probs) x = to_logs(x, run.n, buffer[1]);
            add_teacher(r, &k[j], run, of[j], ce[SK_LARGEST], z, x, sk_next_read(r, k[j].x, run), e,
                        base, grad);
            base = grad;
        }
        if (has_ce)
            add_ce(r, run, ce_power, in.target, ce, z, next, e, base, grad);
        else if (base == sk_zeros)
            memset(grad, 0, (size_t)run.n * sizeof *grad);
        if (!in.all_live) clear_dead(r, run, in.live, grad);
        sk_end_run(r, &p->grad_logits, run, grad);
    }
    if (far) differentiate_far(p, r, has_ce, k, &in, classes, ce[SK_LARGEST]);
}

static sk_bad forward_first_bad(const void *params) {
    const forward_params *p = params;
    const int64_t N = SK_DIM(p, N), C = SK_DIM(p, C), S = SK_DIM(p, S);
    sk_bad bad =
        sk_bad_target(&p->target, p->ignore_index, N, C, S, offsetof(forward_params, target));
    if (bad.row < 0 && p->teacher_kind != LOGITS)
        bad = sk_bad_sum(&p->teacher, p->teacher_kind == LOG_PROBS, N, C, S,
                         offsetof(forward_params, teacher));
    if (bad.row < 0 && p->second_teacher_kind != LOGITS)
        bad = sk_bad_sum(&p->second_teacher, p->second_teacher_kind == LOG_PROBS, N, C, S,
                         offsetof(forward_params, second_teacher));
    return bad;
}

/* What is no class would be read out of bounds; probabilities only come out wrong. In a part of the
 * classes, C stands for one that is elsewhere. */
static sk_bad backward_first_bad(const void *params) {
    const backward_params *p = params;
    const int64_t C = SK_DIM(p, C) + (p->classes != 0);
    return sk_bad_target(&p->target, p->ignore_index, SK_DIM(p, N), C, SK_DIM(p, S),
                         offsetof(backward_params, target));
}

/* ---- the kernels ---- */

static sk_work forward_work(const void *params) {
    const forward_params *p = params;
    const sk_task all = sk_tasks_of(&p->logits, SK_DIM(p, N), SK_DIM(p, C), SK_DIM(p, S));
    return sk_work_of(&all, 2);
}

static void distill_rows(const void *params, int64_t begin, int64_t end) {
    const forward_params *p = params;
    const sk_task all = sk_tasks_of(&p->logits, SK_DIM(p, N), SK_DIM(p, C), SK_DIM(p, S));
    for (int64_t i = begin; i < end; i++) {
        const sk_task r = sk_task_at(&all, i);
        forward_task(p, &r);
    }
}

static sk_work backward_work(const void *params) {
    const backward_params *p = params;
    const sk_task all = sk_tasks_of(&p->logits, SK_DIM(p, N), SK_DIM(p, C), SK_DIM(p, S));
    return sk_work_of(&all, 2);
}

static void distill_backward_rows(const void *params, int64_t begin, int64_t end) {
    const backward_params *p = params;
    const sk_task all = sk_tasks_of(&p->logits, SK_DIM(p, N), SK_DIM(p, C), SK_DIM(p, S));
    for (int64_t i = begin; i < end; i++) {
        const sk_task r = sk_task_at(&all, i);
        backward_task(p, &r);
    }
}

const sk_cpu_kernel SK_CPU(distill) = {forward_work, distill_rows, forward_finish,
                                       forward_first_bad};
const sk_cpu_kernel SK_CPU(distill_backward) = {backward_work, distill_backward_rows, NULL,
                                                backward_first_bad};
