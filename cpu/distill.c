/* Distillation on the CPU: see ops/distill.h for the formula, cpu/core/ce.h and teacher.h for what
 * is done to a row. The gradient is in distill_backward.c.
 *
 * The logits are visited twice: for the largest of them, and for the sums that cross-entropy and KL
 * follow from.
 *
 * Test: python -m pytest tests/test_distill.py    Time: selfkd bench distill */
#include "distill.h"
#include "cpu/core/row_loss.h"
#include "cpu/core/teacher.h"
#include "cpu/core/values.h"

SK_PARAMS(distill)
typedef struct distill_params forward_params;

/* Per row: results of the visits. */
typedef struct results {
    SK_ALIGNED real h[SK_PITCH];                     /* the largest logit */
    SK_ALIGNED double ce[SK_PITCH], level[SK_PITCH]; /* -sum y log p; log P at T = 1 */
    SK_ALIGNED double level_T[SK_TEACHERS][SK_PITCH], dl[SK_TEACHERS][SK_PITCH],
        kl[SK_TEACHERS][SK_PITCH];
} results;

typedef struct sums {
    sk_softmax softmax;
    sk_comparison pair[SK_TEACHERS];
} sums;

/* What is read at a time of the logits of each teacher and, behind them, of the student. */
enum { STUDENT = SK_TEACHERS };
typedef struct tiles {
    SK_ALIGNED real of[SK_TEACHERS + 1][SK_TILE];
    sk_vectors x[SK_TEACHERS + 1][SK_GROUPS];
} tiles;

static void load_tiles(const forward_params *p, const sk_task *r, const sk_terms *k, int64_t c,
                       tiles *t) {
    const int64_t classes = sk_min(sk_tile_classes(r), r->C - c);
    sk_load_tile(r, &p->logits, c, classes, t->of[STUDENT], t->x[STUDENT]);
    for (int j = 0; j < SK_TEACHERS; j++)
        if (k->of[j].weight != 0) sk_load_teacher(r, &k->of[j], c, classes, t->of[j], t->x[j]);
}

/* The first visit: leaves the anchors. */
static void find_anchors(const forward_params *p, const sk_task *r, const sk_terms *k, tiles *t,
                         sums *m) {
    const int64_t step = sk_tile_classes(r);
    for (int64_t i = 0; i < sk_scalars(r); i++)
        m->softmax.h[i] = m->pair[0].hv[i] = m->pair[1].hv[i] = -INFINITY;
    for (int64_t c = 0; c < r->C; c += step) {
        load_tiles(p, r, k, c, t);
        for (int64_t g = 0; g < r->groups; g++) sk_raise(r, t->x[STUDENT][g], g, m->softmax.h);
        for (int j = 0; j < SK_TEACHERS; j++)
            for (int64_t g = 0; g < r->groups && k->of[j].weight != 0; g++)
                sk_raise(r, t->x[j][g], g, m->pair[j].hv);
    }
    for (int64_t i = 0; i < sk_scalars(r); i++) {
        m->softmax.h[i] = sk_anchor(m->softmax.h[i]);
        for (int j = 0; j < SK_TEACHERS; j++) {
            m->pair[j].hu[i] = m->softmax.h[i];
            m->pair[j].hv[i] = sk_anchor(m->pair[j].hv[i]);
        }
    }
}

/* The second visit: leaves the sums. */
SK_OUTLINE void add_up(const forward_params *p, const sk_task *r, const sk_terms *k, tiles *t,
                       sums *m) {
    SK_ALIGNED real e[SK_ROW_C];
    const int64_t step = sk_tile_classes(r);
    for (int64_t c = 0; c < r->C; c += step) {
        const int64_t classes = sk_min(step, r->C - c);
        if (r->C > step) load_tiles(p, r, k, c, t);
        for (int64_t g = 0; g < r->groups; g++) {
            const sk_vectors z = t->x[STUDENT][g];
            const sk_ahead next = sk_next_tile(r, &p->logits, g, c);
            for (int j = 0; j < SK_TEACHERS; j++) {
                if (k->of[j].weight == 0) continue;
                const sk_ahead next_x = sk_next_tile(r, k->of[j].x, g, c);
                const sk_two_tiles both = {z, t->x[j][g], next, next_x, g, e};
                sk_compare_teacher(&k->of[j], r, &both, &m->pair[j]);
            }
            if (!k->has_ce) continue;
            sk_to_power(e, z.depth * SK_LANES, k->ce_power);
            if (k->ce_power != 0)
                sk_add_exponentials(SK_REUSE, r, z, next, g, e, &m->softmax);
            else
                sk_add_exponentials(SK_FRESH, r, z, next, g, e, &m->softmax);
            if (p->label_smoothing != 0) sk_add_above(r, z, classes, g, &m->softmax);
        }
    }
}

/* Compares again what the first results left open: in the exact form, against T lse, or, where that
 * does not help, in double. */
static void compare_again(const forward_params *p, const sk_task *r, const sk_terms *k, int j,
                          const real *weight, tiles *t, sums *m, results *to) {
    double *const level = to->level_T[j], *const dl = to->dl[j], *const kl = to->kl[j];
    const sk_teacher *const of = &k->of[j];
    const real *const h = m->softmax.h;
    const double T = of->t.T;
    sk_comparison *const pair = &m->pair[j];
    double open = 0;
#pragma omp simd reduction(+ : open)
    for (int64_t i = 0; i < r->width; i++) open += (weight[i] != 0) & (kl[i] != kl[i]) ? 1 : 0;
    if (open > 0 && of->form == SK_PLAIN) {
        SK_ALIGNED double again[3][SK_PITCH];
        sk_terms only = *k;
        only.has_ce = false;
        only.of[j].form = SK_EXACT;
        only.of[j].power = 0;
        only.of[1 - j].weight = 0;
        for (int64_t i = 0; i < r->width; i++) { /* 0 stays 0 where they differ by a constant */
            if (dl[i] == sk_gap(SK_EXACT, pair, i, &of->t, &of->t)) continue;
            pair->hu[i] = (real)(level[i] * T + h[i]);
            pair->hv[i] = (real)(level[i] * T + h[i] - dl[i] * T);
        }
        sk_clear_sums(r, pair);
        add_up(p, r, &only, t, m);
        sk_conclude_teacher(SK_EXACT, r, of, h, pair, again[0], again[1], again[2]);
        for (int64_t i = 0; i < r->width; i++) {
            if (!isnan(kl[i])) continue;
            level[i] = again[0][i];
            dl[i] = again[1][i];
            kl[i] = again[2][i];
        }
    }
    for (int64_t i = 0; i < r->width && open > 0; i++) {
        if (weight[i] == 0 || !isnan(kl[i])) continue;
        const sk_taught_row row = sk_careful_taught_row(r, &p->logits, of, i);
        level[i] = row.level;
        dl[i] = row.dl;
        kl[i] = row.kl;
    }
}

/* Leaves the task's rows and what is saved; without m all weights are 0. */
static void save(const forward_params *p, const sk_task *r, const sk_terms *k, const real *weight,
                 const int32_t *target, const sums *m, const results *x) {
    SK_ALIGNED double kl[SK_PITCH] = {0};
    const int64_t plane = p->levels.stride[0], at = sk_row_in_plane(r);
    real *restrict const levels = (real *)p->levels.data + at;
    real *restrict const rows = (real *)p->rows.data + at;
    real *restrict const ce_rows = (real *)p->ce_rows.data + at;
    real *restrict const kl_rows = (real *)p->kl_rows.data + at;
    double *restrict const ratios = (double *)p->ratios.data + at;
    const bool all_taught = !p->mask_teachers || !p->target.data;
    for (int j = 0; j < SK_TEACHERS; j++) {
        const bool there = m && k->of[j].weight != 0;
        const double factor = k->of[j].weight * k->of[j].t.T * k->of[j].t.T;
        for (int64_t i = 0; i < r->width && !there; i++)
            levels[(SK_LEVEL_T + j) * plane + i] = (real)(ratios[j * plane + i] = 0);
        if (!there) continue;
#pragma omp simd
        for (int64_t i = 0; i < r->width; i++) {
            const bool used = weight[i] != 0;
            levels[(SK_LEVEL_T + j) * plane + i] = used ? (real)x->level_T[j][i] : 0;
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
        const double ce = k->has_ce & (w != 0) & (class >= 0) ? to_ce : 0;
        const real to_kl = w != 0 ? (real)(w * kl[i]) : 0;
        levels[SK_LARGEST_LOGIT * plane + i] = w != 0 ? x->h[i] : 0;
        levels[SK_LEVEL * plane + i] = k->has_ce & (w != 0) ? (real)x->level[i] : 0;
        ce_rows[i] = (real)ce;
        kl_rows[i] = to_kl;
        rows[i] = (real)ce + to_kl;
    }
}

static void forward_task(const forward_params *p, const sk_task *r) {
    const sk_terms k = SK_TERMS_OF(p);
    SK_ALIGNED real weight[SK_PITCH];
    SK_ALIGNED int32_t target[SK_PITCH];
    tiles t;
    sums m;
    results to;
    const bool any = sk_load_weights(r, &p->weight, weight);
    sk_load_targets(r, &p->target, p->ignore_index, target);
    if (any) {
        for (int i = 0; i < SK_CE_SUMS; i++)
            memset(m.softmax.sum[i], 0, (size_t)sk_scalars(r) * sizeof(double));
        for (int j = 0; j < SK_TEACHERS; j++) sk_clear_sums(r, &m.pair[j]);
        find_anchors(p, r, &k, &t, &m);
        add_up(p, r, &k, &t, &m);
        if (k.has_ce) {
            SK_ALIGNED real z[SK_PITCH];
            sk_load_target_logits(r, &p->logits, target, z);
            sk_conclude_ce(r, &m.softmax, z, p->label_smoothing, to.level, to.ce);
        } else {
            memset(to.ce, 0, (size_t)r->width * sizeof to.ce[0]);
        }
        for (int j = 0; j < SK_TEACHERS; j++) {
            const sk_teacher *const of = &k.of[j];
            if (of->weight == 0) continue;
            if (of->form == SK_PLAIN)
                sk_conclude_teacher(SK_PLAIN, r, of, m.softmax.h, &m.pair[j], to.level_T[j],
                                    to.dl[j], to.kl[j]);
            else
                sk_conclude_teacher(SK_APART, r, of, m.softmax.h, &m.pair[j], to.level_T[j],
                                    to.dl[j], to.kl[j]);
            compare_again(p, r, &k, j, weight, &t, &m, &to);
        }
        memcpy(to.h, m.softmax.h, (size_t)r->width * sizeof to.h[0]);
        sk_mend_ce(r, &p->logits, weight, target, p->label_smoothing, to.h, to.level, to.ce);
    }
    save(p, r, &k, weight, target, any ? &m : NULL, &to);
}

/* ---- the sum ---- */

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
    const sk_terms k = SK_TERMS_OF(p);
    const sk_task r = sk_one_row(SK_DIM(p, N), SK_DIM(p, C), SK_DIM(p, S), n, s);
    double sum = 0;
    for (int j = 0; j < SK_TEACHERS; j++) {
        const sk_teacher *const of = &k.of[j];
        if (of->weight != 0)
            sum += of->weight * of->t.T * of->t.T * sk_careful_taught_row(&r, &p->logits, of, 0).kl;
    }
    return sk_weight_at(&p->weight, n, s) * sum;
}

static void forward_finish(const void *params) {
    const forward_params *p = params;
    const int64_t N = SK_DIM(p, N), S = SK_DIM(p, S);
    const sk_terms k = SK_TERMS_OF(p);
    const bool has[2] = {k.has_ce, k.of[0].weight != 0 || k.of[1].weight != 0};
    const sk_sum_of sum[2] = {{&p->ce_rows, N, S, ce_value, p}, {&p->kl_rows, N, S, kl_value, p}};
    double part[2];
    for (int i = 0; i < 2; i++) {
        const bool labelled = i == 0 || p->mask_teachers;
        const double denominator = p->reduction != SELFKD_MEAN ? 1
                                   : p->divisor.data           ? sk_load_one(&p->divisor, 0)
                                                               : sum_of_weights(p, labelled);
        part[i] = has[i] ? sk_sum_rows(sum[i]) / denominator : 0;
        ((real *)p->denominators.data)[i] = (real)denominator;
    }
    *(real *)p->ce.data = (real)part[0];
    *(real *)p->kl.data = (real)part[1];
    *(real *)p->loss.data = (real)(part[0] + part[1]);
}

static sk_bad forward_first_bad(const void *params) {
    const forward_params *p = params;
    const int64_t N = SK_DIM(p, N), C = SK_DIM(p, C), S = SK_DIM(p, S);
    sk_bad bad =
        sk_bad_target(&p->target, p->ignore_index, N, C, S, offsetof(forward_params, target));
    if (bad.row < 0 && p->teacher_kind != SK_LOGITS)
        bad = sk_bad_sum(&p->teacher, p->teacher_kind == SK_LOG_PROBS, N, C, S,
                         offsetof(forward_params, teacher));
    if (bad.row < 0 && p->second_teacher_kind != SK_LOGITS)
        bad = sk_bad_sum(&p->second_teacher, p->second_teacher_kind == SK_LOG_PROBS, N, C, S,
                         offsetof(forward_params, second_teacher));
    return bad;
}

static sk_task forward_rows(const forward_params *p) { return SK_TASKS_OF(p, logits); }

SK_ROW_KERNEL(distill, forward_rows, 2, forward_task, forward_finish, forward_first_bad);
