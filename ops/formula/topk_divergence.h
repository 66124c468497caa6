/* The formulas of ops/topk_divergence.h, for C and CUDA. */
#pragma once
#include "formula/js_divergence.h"

enum sk_tail { SK_BUCKET, SK_RENORMALIZE, SK_DROP };

/* What q of the tail is at least: of stored log-probabilities 1 - sum q may be negative by
 * rounding. */
#define SK_LEAST_TAIL 1e-7

/* The term of a class: the gradient is p (slope - A) + limit, with A the sum of p slope + limit. */
#define SK_TOPK_TERM_FIELDS real value, p, slope, limit
#ifdef __cplusplus
template <typename real>
struct sk_topk_term {
    SK_TOPK_TERM_FIELDS;
};
#define SK_TOPK_TERM sk_topk_term<real>
#else
typedef struct sk_topk_term {
    SK_TOPK_TERM_FIELDS;
} sk_topk_term;
#define SK_TOPK_TERM sk_topk_term
#endif

/* Where classes are left out the terms - q + M and - p + M, which come to nothing over all classes,
 * are taken back: `uneven` is what (p - q) is multiplied by in them, else 0. */
SK_FORMULA SK_TOPK_TERM sk_topk_term_of(bool tv, SK_PAIR_CLASS x, const real *k, real uneven) {
    const SK_PAIR_RESULT of = tv ? total_variation_terms(x, k) : mixture_terms(x, k);
    const real value = of.value - uneven * (x.p - x.q), slope = of.slope_p - uneven;
    const real limit = of.limit_p;
    const bool none = x.p == 0;
    const SK_TOPK_TERM y = {value, x.p, none ? 0 : slope, none ? limit : 0};
    return y;
}
