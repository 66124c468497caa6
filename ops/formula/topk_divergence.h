/* The formulas of ops/topk_divergence.h, for C and CUDA: a class by its logarithms. */
#pragma once
#include "formula/js_divergence.h"

enum sk_tail { SK_BUCKET, SK_RENORMALIZE, SK_DROP };

/* What q of the tail is at least: that of stored log-probabilities is less than nothing by rounding. */
#define SK_LEAST_TAIL 1e-7

/* The class with log p - log q = d, the larger of p and q, and the ratio e^-|d| of both. */
SK_FORMULA SK_PAIR_CLASS topk_class(real d, real larger, real ratio) {
    const bool less = d < 0;
    const real size = less ? -d : d, smaller = larger * ratio;
    const bool near = size < 1;
    const real second = size * size * sk_exp_rest(-size);
    const real gap = near ? size - second : 1 - ratio, rest = near ? second : size - gap;
    const SK_PAIR_CLASS x = {
        less ? smaller : larger, less ? larger : smaller, d, larger, ratio, gap, rest};
    return x;
}

/* Its term and its slopes. */
SK_FORMULA SK_PAIR_RESULT topk_terms(bool tv, SK_PAIR_CLASS x, const real *k) {
    return tv ? total_variation_terms(x, k) : mixture_terms(x, k);
}

/* What p dphi/dp is where p is too small for a number: -a q where M is p, 0 elsewhere. */
SK_FORMULA real topk_limit(bool tv, SK_PAIR_CLASS x, const real *k) {
    return !tv & (k[SK_BETA] == 0) ? -k[SK_UNEVEN] * x.larger * x.gap : 0;
}
