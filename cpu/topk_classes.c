/* The listed classes of topk_divergence.c: see core/topk.h. */
#ifndef SK_REAL_IS_DOUBLE
#define SK_REAL_IS_DOUBLE
#endif
#include "cpu/core/math.h"
#include "cpu/core/topk.h"

#include "formula/topk_divergence.h"

SK_SPECIAL void apply(bool tv, const double *numbers, double less, int64_t n, const double *log_p,
                      const double *log_q, sk_topk_terms *to) {
#pragma omp simd
    for (int64_t i = 0; i < n; i++) {
        const double p = sk_exp(log_p[i]), q = sk_exp(log_q[i]);
        const double apart = log_p[i] - log_q[i], larger = p > q ? p : q;
        const double d = larger == 0 ? 0 : apart; /* both may be -inf */
        const sk_pair_class of = topk_class(d, larger, sk_exp(d < 0 ? d : -d));
        const sk_pair_result y = topk_terms(tv, of, numbers);
        const double slope = y.slope_p - less, limit = topk_limit(tv, of, numbers);
        to->value[i] = y.value - less * (of.p - of.q);
        to->p[i] = of.p;
        to->slope[i] = of.p == 0 ? 0 : slope;
        to->limit[i] = of.p == 0 ? limit : 0;
    }
}

void SK_CPU(measure_topk)(bool tv, const double *numbers, double less, int64_t n,
                          const double *log_p, const double *log_q, sk_topk_terms *to) {
    if (tv)
        apply(true, numbers, less, n, log_p, log_q, to);
    else
        apply(false, numbers, less, n, log_p, log_q, to);
}
