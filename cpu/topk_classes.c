/* The listed classes of topk_divergence.c: see core/topk.h. */
#ifndef SK_REAL_IS_DOUBLE
#define SK_REAL_IS_DOUBLE
#endif
#include "cpu/core/math.h"
#include "cpu/core/topk.h"

#include "formula/topk_divergence.h"

/* The class with this d = log p - log q. */
static inline sk_pair_class class_of(double d, double larger) {
    const bool less = d < 0;
    const double size = fabs(d), ratio = sk_exp(-size), smaller = larger * ratio;
    const bool near = size < 1;
    const double second = size * size * sk_exp_rest(-size), gap = near ? size - second : 1 - ratio;
    return (sk_pair_class){
        less ? smaller : larger,   less ? larger : smaller, d, size, larger, ratio, gap,
        near ? second : size - gap};
}

SK_SPECIAL void apply(bool tv, const double *numbers, double uneven, int64_t n, const double *log_p,
                      const double *log_q, sk_topk_terms *to) {
#pragma omp simd
    for (int64_t i = 0; i < n; i++) {
        const double p = sk_exp(log_p[i]), q = sk_exp(log_q[i]), larger = p > q ? p : q;
        const double apart = log_p[i] - log_q[i], d = larger == 0 ? 0 : apart; /* not -inf - -inf */
        const sk_topk_term y = sk_topk_term_of(tv, class_of(d, larger), numbers, uneven);
        to->value[i] = y.value;
        to->p[i] = y.p;
        to->slope[i] = y.slope;
        to->limit[i] = y.limit;
    }
}

void SK_CPU(measure_topk)(bool tv, const double *numbers, double uneven, int64_t n,
                          const double *log_p, const double *log_q, sk_topk_terms *to) {
    if (tv)
        apply(true, numbers, uneven, n, log_p, log_q, to);
    else
        apply(false, numbers, uneven, n, log_p, log_q, to);
}
