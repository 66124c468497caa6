/* A row by itself, class by class, in double: the plainest way to its results, whatever its logits
 * are. Read it first; the tiles of kl.h give the same faster, and rows for which they do not come
 * back here. */
#pragma once
#include "core/side.h"
#include "cpu/core/task.h"

/* Class c of row i; of probabilities the logarithm. */
static inline double sk_logit_at(const sk_task *r, const sk_arg *x, bool probs, int64_t i,
                                 int64_t c) {
    const double z = sk_load_one(x, sk_class_at(r, x, i, c));
    return probs ? log(z) : z;
}

SK_RARE sk_side sk_side_of(const sk_task *r, const sk_arg *x, bool probs, double T, int64_t i) {
    double top = -INFINITY, sum = 0;
    for (int64_t c = 0; c < r->C; c++) top = fmax(top, sk_logit_at(r, x, probs, i, c));
    for (int64_t c = 0; c < r->C; c++) {
        const double z = sk_logit_at(r, x, probs, i, c);
        sum += z == -INFINITY ? 0 : exp((z - top) / T);
    }
    return (sk_side){top, log(sum)};
}

/* What rounding leaves of a number that was saved: see sk_whole_side. */
#define SK_ROUNDED (sizeof(real) == 8 ? 4 * DBL_EPSILON : 1e-6)
