/* Cross-entropy of a row of logits. With h its largest logit, `ties` classes at h and `rest` the
 * sum of exp(z - h) over those below, log P = log(ties + rest)     -log p_y = (h - z_y) + log P
 * keep their digits however sure the row is of its class, where log of 1 + rest would drop them. */
#pragma once
#include "cpu/core/kl.h"

enum { SK_REST, SK_TIES, SK_ABOVE, SK_CE_SUMS }; /* ABOVE: sum of h - z over all classes */

/* For each row. */
typedef struct sk_softmax {
    SK_ALIGNED real h[SK_PITCH];
    SK_ALIGNED double sum[SK_CE_SUMS][SK_PITCH];
} sk_softmax;

/* Adds a tile's group of lanes, and leaves its exponentials in e; asks for the next ones. */
static inline void sk_add_exponentials(const sk_rows *r, const sk_scale *unit, const real *z,
                                       sk_ahead next, int64_t depth, int64_t g, real *restrict e,
                                       sk_softmax *m) {
    const sk_scale t = *unit;
    const int64_t pitch = sk_pitch(r);
    real h[SK_LANES], rest[SK_LANES] = {0}, ties[SK_LANES] = {0};
    sk_to_lanes(r, g, m->h, h);
    for (int64_t i = 0; i < depth; i++) {
        sk_fetch(next, i);
#pragma omp simd
        for (int k = 0; k < SK_LANES; k++) {
            const real x = sk_logit(z[i * pitch + k]) - h[k], y = sk_exp_of(x, &t);
            e[i * SK_LANES + k] = y;
            const real tie = x == 0 ? 1 : 0; /* where y is exactly 1 */
            rest[k] += y - tie;
            ties[k] += tie;
        }
    }
    sk_add_lanes(r, g, rest, m->sum[SK_REST]);
    sk_add_lanes(r, g, ties, m->sum[SK_TIES]);
}

/* Adds h - z; infinite for a class at -inf, as the loss with label smoothing is. */
static inline void sk_add_above(const sk_rows *r, const real *z, int64_t classes, int64_t g,
                                sk_softmax *m) {
    const int64_t pitch = sk_pitch(r), depth = sk_depth(r, classes);
    real h[SK_LANES], above[SK_LANES] = {0};
    sk_to_lanes(r, g, m->h, h);
    for (int64_t i = 0; i < depth; i++) {
#pragma omp simd
        for (int k = 0; k < SK_LANES; k++) {
            const bool there = r->positions || i * SK_LANES + k < classes;
            above[k] += there ? h[k] - z[i * pitch + k] : 0;
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
