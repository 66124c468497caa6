/* The rows of the SD-Dropout objective on the CPU: see ops/sd_dropout_head.h for the formula,
 * cpu/core/ce.h, pair.h and kl.h for what is done to a row. A row is finished before the next
 * begins: its gradients replace logits that are still in cache.
 *
 * Test: python -m pytest tests/test_sd_dropout_head.py    Time: selfkd bench sd_dropout_head */
#include "sd_dropout_head.h"
#include "cpu/core/ce.h"
#include "cpu/core/pair.h"
#include "cpu/core/row_loss.h"
#include "cpu/core/values.h"

SK_PARAMS(sd_dropout_head_rows)
typedef struct sd_dropout_head_rows_params row_params;

/* The rows of a task: their weights, 0 where the target is ignored, and classes. */
typedef struct labels {
    SK_ALIGNED real weight[SK_PITCH];
    SK_ALIGNED int32_t target[SK_PITCH];
    SK_ALIGNED real of_target[SK_PITCH]; /* the logits of the targets */
} labels;

static bool load_labels(const row_params *p, const sk_task *r, labels *to) {
    bool any = false;
    sk_load_scalars(r, &p->weight, to->weight);
    sk_load_targets(r, &p->target, p->ignore_index, to->target);
    sk_load_target_logits(r, &p->z, to->target, to->of_target);
    for (int64_t i = 0; i < r->width; i++) {
        if (to->target[i] < 0) to->weight[i] = 0;
        any |= to->weight[i] != 0;
    }
    return any;
}

/* ---- cross-entropy ---- */

/* Leaves each row's largest logit, log P and loss, from two visits to z. */
SK_OUTLINE void cross_entropy(const row_params *p, const sk_task *r, const labels *of,
                              sk_softmax *m, double *level, double *ce) {
    SK_ALIGNED real tile[SK_TILE];
    sk_vectors x[SK_GROUPS];
    const int64_t step = sk_tile_classes(r);
    for (int i = 0; i < SK_CE_SUMS; i++)
        memset(m->sum[i], 0, (size_t)sk_scalars(r) * sizeof(double));
    for (int64_t i = 0; i < r->width; i++) m->h[i] = -INFINITY;
    for (int64_t c = 0; c < r->C; c += step) {
        const int64_t classes = sk_min(step, r->C - c);
        sk_load_tile(r, &p->z, c, classes, tile, x);
        for (int64_t g = 0; g < r->groups; g++) sk_raise(r, x[g], g, m->h);
    }
    for (int64_t i = 0; i < r->width; i++) m->h[i] = sk_anchor(m->h[i]);
    for (int64_t c = 0; c < r->C; c += step) {
        const int64_t classes = sk_min(step, r->C - c);
        if (r->C > step) sk_load_tile(r, &p->z, c, classes, tile, x);
        for (int64_t g = 0; g < r->groups; g++) {
            sk_add_exponentials(SK_FRESH, r, x[g], sk_next_tile(r, &p->z, g, c), g, NULL, m);
            if (p->label_smoothing != 0) sk_add_above(r, x[g], classes, g, m);
        }
    }
    sk_conclude_ce(r, m, of->of_target, p->label_smoothing, level, ce);
    sk_mend_ce(r, &p->z, of->weight, of->target, p->label_smoothing, m->h, level, ce);
}

/* Writes its gradient over row i of z, in double, class by class. */
SK_RARE void careful_z(const row_params *p, const sk_task *r, const labels *of, int64_t i) {
    const sk_side x = sk_side_of(r, &p->z, false, 1, i);
    for (int64_t c = 0; c < r->C; c++) {
        const double z = sk_logit_at(r, &p->z, false, i, c);
        const double slope = sk_ce_slope_of(z, c == of->target[i], p->label_smoothing, r->C, x);
        sk_store_one(&p->z, sk_class_at(r, &p->z, i, c), (real)(of->weight[i] * slope));
    }
}

/* Writes its gradient over z. */
SK_OUTLINE void differentiate_z(const row_params *p, const sk_task *r, const labels *of,
                                const sk_softmax *m, const double *log_sum) {
    SK_ALIGNED real buffer[2][SK_RUN], level[SK_PITCH] = {0};
    SK_ALIGNED sk_ce_scalars ce = {{0}};
    SK_ALIGNED double factor[SK_PITCH] = {0};
    for (int64_t i = 0; i < r->width; i++) {
        factor[i] = of->weight[i];
        ce[SK_LARGEST][i] = m->h[i];
        level[i] = (real)log_sum[i];
    }
    const sk_streams streams = {{&p->z}, {&p->z}};
    sk_set_ce(r, factor, of->of_target, level, p->label_smoothing, r->C, ce);
    for (sk_run run = sk_first_run(r); run.n > 0; run = sk_run_after(r, run)) {
        const real *const z = sk_read_run(r, &p->z, run, buffer[0]);
        const sk_slice at = {r, &streams, run, {z}, {buffer[1]}};
        const real w = of->weight[run.row];
        const bool used = w != 0, far = m->h[run.row] < SK_LEAST || sk_is_far_factor(w);
        if (used && far && isfinite(m->h[run.row])) {
            if (run.c == 0) careful_z(p, r, of, run.row);
            continue;
        }
        if (used) sk_ce_run(false, SK_FRESH, &at, of->target, ce, NULL, sk_zeros);
        sk_put_run(r, &p->z, run, used ? buffer[1] : sk_zeros);
    }
}

/* ---- divergence ---- */

/* Writes their gradients over u and v. */
SK_OUTLINE void differentiate_views(const row_params *p, const sk_task *r, const sk_pair *pair,
                                    const labels *of, sk_found x) {
    SK_ALIGNED real buffer[4][SK_RUN];
    SK_ALIGNED double factor[SK_PITCH] = {0};
    sk_pair_slopes k; /* set field by field, for its planes are large */
    k.t = &pair->t;
    k.w = sk_term_weights_of(p->forward_weight, p->reverse_weight, p->detach_target);
    for (int64_t i = 0; i < r->width; i++)
        factor[i] = x[SK_KL_PQ][i] == 0 && x[SK_KL_QP][i] == 0
                        ? 0
                        : p->kl_weight * p->temperature * of->weight[i];
    const sk_streams streams = {{&p->u, &p->v}, {&p->u, &p->v}};
    sk_set_pair(r, x, factor, &k);
    for (sk_run run = sk_first_run(r); run.n > 0; run = sk_run_after(r, run)) {
        const sk_divergence row = sk_found_row(x, run.row);
        if (factor[run.row] != 0 && !sk_is_ordinary(row, factor[run.row])) {
            if (run.c == 0)
                sk_careful_gradient(r, pair, run.row, row, factor[run.row], k.w, streams.written);
            continue;
        }
        const real *const u = sk_read_run(r, &p->u, run, buffer[0]);
        const real *const v = sk_read_run(r, &p->v, run, buffer[1]);
        const sk_slice at = {r, &streams, run, {u, v}, {buffer[2], buffer[3]}};
        sk_pair_run(&k, &at);
        sk_put_run(r, &p->u, run, buffer[2]);
        sk_put_run(r, &p->v, run, buffer[3]);
    }
}

/* ---- the task ---- */

static void row_task(const row_params *p, const sk_task *r) {
    const sk_pair pair = {&p->u, &p->v, sk_scale_of(p->temperature)};
    labels of;
    sk_softmax softmax;
    SK_ALIGNED sk_found kl;
    SK_ALIGNED double level[SK_PITCH] = {0}, ce[SK_PITCH] = {0};
    for (int k = 0; k < SK_SAVED; k++) memset(kl[k], 0, (size_t)r->width * sizeof(double));
    if (load_labels(p, r, &of)) {
        cross_entropy(p, r, &of, &softmax, level, ce);
        if (p->kl_weight != 0) sk_diverge(r, &pair, of.weight, kl);
    } else {
        memset(softmax.h, 0, sizeof softmax.h);
    }
    const double TT = p->temperature * p->temperature;
    for (int64_t i = 0; i < r->width; i++) {
        for (int k = 0; k < SK_SAVED && of.weight[i] == 0; k++) kl[k][i] = 0;
        const double sum = sk_weighted_kl(kl, i, p->forward_weight, p->reverse_weight);
        const double loss = ce[i] + (p->kl_weight != 0 ? p->kl_weight * TT * sum : 0);
        ((real *)p->rows.data)[r->n + i] = of.weight[i] != 0 ? (real)(of.weight[i] * loss) : 0;
    }
    if (!p->differentiate) return;
    differentiate_z(p, r, &of, &softmax, level);
    differentiate_views(p, r, &pair, &of, kl);
}

/* ---- the kernel ---- */

static sk_task all_rows(const row_params *p) {
    return sk_tasks_of(&p->z, SK_DIM(p, N), SK_DIM(p, C), 1);
}

static sk_bad first_bad(const void *params) {
    const row_params *const p = params;
    return sk_bad_target(&p->target, p->ignore_index, SK_DIM(p, N), SK_DIM(p, C), 1,
                         offsetof(row_params, target));
}

SK_ROW_KERNEL(sd_dropout_head_rows, all_rows, 3, row_task, NULL, first_bad);
