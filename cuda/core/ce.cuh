/* Cross-entropy of a row of logits: sums as in cpu/core/ce.h, which keep the digits of a row that
 * is sure of its class. */
#pragma once
#include "core/kl.cuh"

/* The sum of e^(z - h) over the classes below the largest logit h, how many are at h, and the sum
 * of h - z. */
enum { REST, TIES, ABOVE, CE_SUMS };

/* Adds a step. */
template <typename T, int kGroup, int kVec>
SK_DEVICE void add_softmax(const sk_real<T> (&a)[sk_items<T>], int64_t base, int64_t C,
                           sk_real<T> h, double *sum) {
    typedef sk_real<T> real;
    const scale<real> t = scale_of<real>(1);
    real part[CE_SUMS] = {};
    SK_UNROLL for (int i = 0; i < sk_items<T>; i++) {
        if (sk_class<kGroup, kVec>(base, i) >= C) break;
        const real x = a[i] - h;
        part[REST] += x == 0 ? 0 : sk_exp2(x * t.log2e);
        part[TIES] += x == 0 ? 1 : 0;
        part[ABOVE] += a[i] <= (real)kLowest ? (real)INFINITY : -x;
    }
    for (int j = 0; j < CE_SUMS; j++) sum[j] += part[j];
}

/* log sum e^(z - h) */
SK_DEVICE double log_sum(const double *sum) {
    return log(sum[TIES]) + log1p(sum[REST] / sum[TIES]);
}

/* -sum y log p; z_y is the target's logit, level the log_sum. */
SK_DEVICE double conclude_ce(double smooth, int64_t C, const double *sum, double level, double h,
                             double z_y) {
    const double hard = z_y <= kLowest ? INFINITY + 0 * level : (h - z_y) + level;
    const double soft = smooth != 0 ? smooth * (level + sum[ABOVE] / C) : 0;
    return (smooth != 1 ? (1 - smooth) * hard : 0) + soft;
}

/* What the gradient of a row needs, besides its logits. */
template <typename real>
struct ce_slope {
    real h, inverse_p;            /* p = e^(z - h) inverse_p */
    real factor, rest, of_target; /* rest: smooth / C; of_target: p - y of the target */
    int64_t target;
};

/* Factor 0: no gradient, whatever the logits hold. C classes share the smoothing. */
template <typename real>
SK_DEVICE ce_slope<real> ce_slope_of(double h, double level, double factor, double smooth,
                                     int64_t C, int64_t target, double z_y) {
    ce_slope<real> x;
    x.h = (real)h;
    x.inverse_p = (real)exp(-level);
    x.factor = (real)factor;
    x.rest = (real)(smooth / C);
    x.of_target = (real)(expm1((z_y - h) - level) + smooth - x.rest);
    x.target = target;
    return x;
}

/* The gradient at class c. */
template <typename real>
SK_DEVICE real ce_gradient(const ce_slope<real> &k, real z, int64_t c) {
    const real p = sk_exp2((z - k.h) * scale_of<real>(1).log2e) * k.inverse_p;
    return k.factor != 0 ? k.factor * (c == k.target ? k.of_target : p - k.rest) : 0;
}
