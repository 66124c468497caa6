/* The formulas of ops/js_divergence.h, for C and CUDA: those of a mixture, and total variation. */
#pragma once
#include "formula/mixture.h"

enum sk_js_kind { SK_JS, SK_TV };

/* clang-format off */
#define js_divergence_NUMBERS(p) SK_MIXTURE_OF(real, (p)->beta, (p)->teacher_weight, (p)->student_weight)
/* clang-format on */

/* Jensen-Shannon; generalised, or one of the KL divergences; any mixture. */
SK_FORMULA SK_PAIR_RESULT jensen_shannon_terms(SK_PAIR_CLASS x, const real *k) {
    return sk_mixture_of(true, true, x, k);
}
SK_FORMULA SK_PAIR_RESULT generalised_terms(SK_PAIR_CLASS x, const real *k) {
    return sk_mixture_of(false, true, x, k);
}
SK_FORMULA SK_PAIR_RESULT mixture_terms(SK_PAIR_CLASS x, const real *k) {
    return sk_mixture_of(false, false, x, k);
}

SK_FORMULA SK_PAIR_RESULT total_variation_terms(SK_PAIR_CLASS x, const real *k) {
    const real equal = 0 * x.d; /* NaN stays NaN */
    const real slope = x.d > 0 ? (real)0.5 : x.d < 0 ? (real)-0.5 : equal;
    const SK_PAIR_RESULT result = {(real)0.5 * x.larger * x.gap, slope, -slope, 0, 0};
    (void)k;
    return result;
}

/* Which of them a call needs. */
enum sk_js_formula { SK_JENSEN_SHANNON, SK_GENERALISED, SK_MIXTURE, SK_TOTAL_VARIATION };
SK_BOTH enum sk_js_formula sk_js_formula_of(int64_t kind, double beta, double a, double b) {
    if (kind == SK_TV) return SK_TOTAL_VARIATION;
    if (a * (1 - beta) != b * beta) return SK_MIXTURE;
    return beta == 0.5 ? SK_JENSEN_SHANNON : SK_GENERALISED;
}
