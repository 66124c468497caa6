/* What only the values tell: targets that are no class, probabilities that do not sum to 1. `item`
 * is the tensor's offset in the parameters; an absent tensor is never bad. */
#pragma once
#include "cpu/core/kl.h"

/* The first row whose target is no class. */
static inline sk_bad sk_bad_target(const sk_arg *x, int64_t ignored, int64_t N, int64_t C,
                                   int64_t S, size_t item) {
    for (int64_t n = 0; n < N && x->data; n++) {
        const int64_t *const target = (const int64_t *)x->data + n * x->stride[0];
        int bad = 0;
        for (int64_t s = 0; s < S; s++) {
            const int64_t y = target[s * x->stride[1]];
            bad |= ((uint64_t)y >= (uint64_t)C) & (y != ignored);
        }
        for (int64_t s = 0; s < S && bad; s++) {
            const int64_t y = target[s * x->stride[1]];
            if ((uint64_t)y >= (uint64_t)C && y != ignored)
                return (sk_bad){n * S + s, item, (double)y};
        }
    }
    return (sk_bad){-1, 0, 0};
}

/* The first row of a teacher whose probabilities do not sum to 1. */
static inline sk_bad sk_bad_sum(const sk_arg *x, bool logs, int64_t N, int64_t C, int64_t S,
                                size_t item) {
    SK_ALIGNED real tile[SK_TILE];
    SK_ALIGNED double sum[SK_PITCH];
    sk_vectors x_of[SK_GROUPS];
    const sk_scale unit = sk_scale_of(1);
    const sk_task all = sk_tasks_of(x, N, C, S);
    const int64_t count = sk_work_of(&all, 1).count, step = sk_tile_classes(&all);
    for (int64_t task = 0; task < count && x->data; task++) {
        const sk_task r = sk_task_at(&all, task);
        memset(sum, 0, sizeof sum);
        for (int64_t c = 0; c < r.C; c += step) {
            sk_load_tile(&r, x, c, sk_min(step, r.C - c), tile, x_of);
            for (int64_t g = 0; g < r.groups; g++) {
                real part[SK_LANES] = {0};
                for (int64_t i = 0; i < x_of[g].depth; i++) {
                    const real *const a = sk_vector(&r, x_of[g], i);
#pragma omp simd
                    for (int j = 0; j < SK_LANES; j++)
                        part[j] += logs ? sk_exp_of(sk_logit(a[j], unit.least), &unit)
                                   : a[j] == -INFINITY ? 0
                                                       : a[j];
                }
                sk_add_lanes(&r, g, part, sum);
            }
        }
        for (int64_t i = 0; i < r.width; i++)
            if (sum[i] < 0.99 || sum[i] > 1.01) return (sk_bad){r.n * r.S + r.s + i, item, sum[i]};
    }
    return (sk_bad){-1, 0, 0};
}
