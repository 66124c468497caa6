/* Cross-entropy of rows of logits. With h its largest logit, `ties` classes at h and `rest` the
 * sum of exp(z - h) over those below, log P = log(ties + rest)     -log p_y = (h - z_y) + log P
 * keep their digits however sure the row is of its class, where log of 1 + rest would drop them. */
#pragma once
#include "cpu/core/kl.h"
#include "cpu/core/run.h"

enum { SK_REST, SK_TIES, SK_ABOVE, SK_CE_SUMS }; /* ABOVE: sum of h - z over all classes */

/* For each row. */
typedef struct sk_softmax {
    SK_ALIGNED real h[SK_PITCH];
    SK_ALIGNED double sum[SK_CE_SUMS][SK_PITCH];
} sk_softmax;

/* Adds a tile's group of lanes, whose exponentials are found or, reused, lie in e; asks for the
 * next ones. */
SK_SPECIAL void sk_add_exponentials(enum sk_exps exps, const sk_task *r, sk_vectors z,
                                    sk_ahead next, int64_t g, const real *e, sk_softmax *m) {
    const sk_scale t = sk_scale_of(1);
    const int64_t pitch = sk_pitch(r);
    real h[SK_LANES], rest[SK_LANES] = {0}, ties[SK_LANES] = {0};
    sk_to_lanes(r, g, m->h, h);
    for (int64_t i = 0, end = z.whole; i < z.depth; end = z.depth) {
        const real *of = sk_part(z, i);
        for (; i < end; i++, of += pitch) {
            sk_fetch(next, i);
#pragma omp simd
            for (int k = 0; k < SK_LANES; k++) {
                const real x = sk_logit(of[k], t.least) - h[k];
                const real y = exps == SK_REUSE ? e[i * SK_LANES + k] : sk_exp_of(x, &t);
                const real tie = x == 0 ? 1 : 0; /* where y is exactly 1 */
                rest[k] += y - tie;
                ties[k] += tie;
            }
        }
    }
    sk_add_lanes(r, g, rest, m->sum[SK_REST]);
    sk_add_lanes(r, g, ties, m->sum[SK_TIES]);
}

/* Adds h - z; infinite for a class at -inf, as the loss with label smoothing is. */
static inline void sk_add_above(const sk_task *r, sk_vectors z, int64_t classes, int64_t g,
                                sk_softmax *m) {
    real h[SK_LANES], above[SK_LANES] = {0};
    sk_to_lanes(r, g, m->h, h);
    for (int64_t i = 0; i < z.depth; i++) {
        const real *const of = sk_vector(r, z, i);
#pragma omp simd
        for (int k = 0; k < SK_LANES; k++) {
            const bool there = r->positions || i * SK_LANES + k < classes;
            above[k] += there ? h[k] - of[k] : 0;
        }
    }
    sk_add_lanes(r, g, above, m->sum[SK_ABOVE]);
}

/* log P */
static inline real sk_log_sum(const sk_softmax *m, int64_t i) {
    const real x = (real)((m->sum[SK_TIES][i] - 1) + m->sum[SK_REST][i]);
    const real within = x < 1 ? x : 1; /* NaN stays NaN in one of the two */
    return x <= 1 ? sk_log1p(within) : sk_log_of(1 + x);
}

/* ---- rows with a target ---- */

/* The class of each row, -1 where there is none: it is ignored, or there is no target. */
static inline void sk_load_targets(const sk_task *r, const sk_arg *x, int64_t ignored,
                                   int32_t *to) {
    SK_ALIGNED int64_t y[SK_PITCH];
#pragma omp simd
    for (int64_t i = 0; i < sk_scalars(r); i++) to[i] = -1;
    if (!x->data) return;
    sk_load_indices(r, x->data, x->stride[0], x->stride[1], y);
#pragma omp simd
    for (int64_t i = 0; i < r->width; i++) to[i] = y[i] == ignored ? -1 : (int32_t)y[i];
}

/* The logits of the targets; of class 0 where there is none, or none of these classes. */
static inline void sk_load_target_logits(const sk_task *r, const sk_arg *x, const int32_t *target,
                                         real *to) {
    SK_ALIGNED int32_t c[SK_PITCH];
    const int32_t C = (int32_t)r->C;
#pragma omp simd
    for (int64_t i = 0; i < r->width; i++)
        c[i] = (target[i] >= 0) & (target[i] < C) ? target[i] : 0;
    sk_load_classes(r, x, c, to);
}

/* Leaves log P and the loss of each row whose target has logit z: -sum y log p with y = (1 -
 * smooth) onehot + smooth/C. */
static inline void sk_conclude_ce(const sk_task *r, const sk_softmax *m, const real *z,
                                  double smooth, double *level, double *ce) {
    const double per_class = 1 / (double)r->C;
#pragma omp simd
    for (int64_t i = 0; i < r->width; i++) {
        const real log_sum = sk_log_sum(m, i);
        const double below = (double)m->h[i] - z[i],
                     above = m->sum[SK_ABOVE][i]; /* 0: not smooth */
        const double hard = z[i] == -INFINITY ? INFINITY + 0 * log_sum : below + log_sum;
        const double soft = smooth != 0 ? smooth * (log_sum + above * per_class) : 0;
        level[i] = log_sum;
        ce[i] = (smooth != 1 ? (1 - smooth) * hard : 0) + soft;
    }
}

/* The same of a row class by class, in double: where the first results are not finite, for its
 * logits lie below SK_LEAST or the sum of h - z is too large for a real. */
SK_RARE double sk_careful_ce(const sk_task *r, const sk_arg *logits, int64_t i, int32_t target,
                             double smooth, sk_side x) {
    const double z = sk_logit_at(r, logits, false, i, target), C = (double)r->C;
    const double hard = z == -INFINITY ? INFINITY + 0 * x.log_sum : (x.top - z) + x.log_sum;
    double above = 0;
    for (int64_t c = 0; c < r->C && smooth != 0; c++)
        above += (x.top - sk_logit_at(r, logits, false, i, c)) / C;
    return (smooth != 1 ? (1 - smooth) * hard : 0) +
           (smooth != 0 ? smooth * (x.log_sum + above) : 0);
}

/* Leaves h of rows that have no anchor, -inf of nothing but -inf; and level and loss of those and
 * of rows with a class whose loss is not finite. */
SK_RARE void sk_mend_ce_rows(const sk_task *r, const sk_arg *logits, const real *weight,
                             const int32_t *target, double smooth, real *h, double *level,
                             double *ce) {
    for (int64_t i = 0; i < r->width; i++) {
        const bool lost = target[i] >= 0 && !(ce[i] < INFINITY);
        if (weight[i] == 0 || !(isnan(h[i]) || lost)) continue;
        const sk_side x = sk_side_of(r, logits, false, 1, i);
        if (isnan(h[i]) && !isnan(x.log_sum)) h[i] = (real)x.top;
        level[i] = isinf(x.log_sum) ? NAN : x.log_sum;
        if (lost) ce[i] = sk_careful_ce(r, logits, i, target[i], smooth, x);
    }
}
static inline void sk_mend_ce(const sk_task *r, const sk_arg *logits, const real *weight,
                              const int32_t *target, double smooth, real *h, double *level,
                              double *ce) {
    double open = 0;
#pragma omp simd reduction(+ : open)
    for (int64_t i = 0; i < r->width; i++) {
        const bool lost = (target[i] >= 0) & !(ce[i] < (double)INFINITY);
        open += (weight[i] != 0) & ((h[i] != h[i]) | lost) ? 1 : 0;
    }
    if (open != 0) sk_mend_ce_rows(r, logits, weight, target, smooth, h, level, ce);
}

/* What the gradients of a row need: p - y is FACTOR e^(z - LARGEST) + OTHER, OF_TARGET for the
 * target, all times the row's factor. */
enum { SK_LARGEST, SK_FACTOR, SK_OTHER, SK_OF_TARGET, SK_CE_SCALARS };
typedef real sk_ce_scalars[SK_CE_SCALARS][SK_PITCH];

/* Leaves all but LARGEST, which it finds there; z are the targets' logits, level is log P;
 * `classes` share the smoothing. */
static inline void sk_set_ce(const sk_task *r, const double *factors, const real *z,
                             const real *level, double label_smoothing, int64_t classes,
                             sk_ce_scalars m) {
    const sk_scale unit = sk_scale_of(1);
    const real smooth = (real)label_smoothing, other = smooth / (real)classes;
#pragma omp simd
    for (int64_t i = 0; i < sk_scalars(r); i++) {
        const real factor = (real)factors[i], ce = (m[SK_LARGEST][i] - z[i]) + level[i];
        const real p_1 = ce < (real)0.5 ? sk_expm1(-ce) : sk_exp_of(-ce, &unit) - 1;
        m[SK_FACTOR][i] = factor * sk_exp_of(-level[i], &unit);
        m[SK_OTHER][i] = -factor * other;
        m[SK_OF_TARGET][i] = factor != 0 ? factor * (p_1 + smooth - other) : 0;
    }
}

/* Adds the gradient of cross-entropy of a run to base, which may be where it goes. The exponentials
 * of its logits are found or, reused, lie in e. */
SK_SPECIAL void sk_ce_run(bool positions, enum sk_exps exps, const sk_slice *of,
                          const int32_t *target, sk_ce_scalars m, const real *e, const real *base) {
    const sk_scale t = sk_scale_of(1);
    const real *const z = of->x[0];
    real *const grad = of->to[0];
    const sk_ahead next = sk_next_of(of, 0);
    for (int64_t at = 0; at < of->run.n; at += SK_LANES) {
        const int32_t first = (int32_t)(positions ? of->run.c : of->run.c + at);
        sk_fetch(next, at / SK_LANES);
#pragma omp simd
        for (int k = 0; k < SK_LANES; k++) {
            const int64_t i = positions ? of->run.row + at + k : of->run.row;
            const int32_t c = positions ? first : first + k;
            const real y = exps == SK_REUSE
                               ? e[at + k]
                               : sk_exp_of(sk_logit(z[at + k], t.least) - m[SK_LARGEST][i], &t);
            const real of_target = m[SK_OF_TARGET][i], other = m[SK_FACTOR][i] * y + m[SK_OTHER][i];
            grad[at + k] = base[at + k] + (c == target[i] ? of_target : other);
        }
    }
}
