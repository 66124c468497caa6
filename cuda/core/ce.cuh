/* Cross-entropy of a row of logits: sums as in cpu/core/ce.h, which keep the digits of a row that
 * is sure of its class. */
#pragma once
#include "core/kl.cuh"

/* A thread's share of a row, so far: its largest logit, how many are as large, the sum of e^(z - h)
 * over the others, and of -z. The anchor h only ever grows. */
template <typename real>
struct softmax {
    real largest, ties;
    double rest, minus;
};

template <typename real>
SK_DEVICE softmax<real> no_softmax() {
    return {(real)kLowest, 0, 0, 0};
}

/* e^x */
template <typename real>
SK_DEVICE real exponential(real x) {
    return sk_exp2(x * scale_of<real>(1).log2e);
}

/* Adds a step whose largest logit is `most`. Absent items lie so low that they add nothing. */
template <typename T, int kVec>
SK_DEVICE void add_softmax(const sk_real<T> (&a)[sk_items<T>], sk_real<T> h, sk_real<T> most,
                           softmax<sk_real<T>> *x) {
    typedef sk_real<T> real;
    real rest = 0, ties = 0;
    SK_UNROLL for (int i = 0; i < sk_items<T>; i++) {
        ties += a[i] == most ? 1 : 0;
        rest += a[i] == most ? 0 : exponential(a[i] - h);
    }
    const bool higher = most > x->largest, level = most == x->largest;
    const real low = higher ? x->largest : most, lost = higher ? x->ties : level ? 0 : ties;
    x->ties = higher ? ties : level ? x->ties + ties : x->ties;
    x->largest = higher ? most : x->largest;
    x->rest += rest + (lost > 0 ? lost * exponential(low - h) : 0);
}

/* Adds -z of a step, infinite for a class at -inf. */
template <typename T, int kVec>
SK_DEVICE void add_minus(const sk_real<T> (&a)[sk_items<T>], int64_t base, int64_t C, sk_real<T> h,
                         softmax<sk_real<T>> *x) {
    typedef sk_real<T> real;
    real above = 0, count = 0;
    SK_UNROLL for (int i = 0; i < sk_items<T>; i++) {
        const bool present = sk_class<kVec>(base, i) < C;
        above += !present ? 0 : a[i] <= (real)kLowest ? (real)INFINITY : h - a[i];
        count += present ? 1 : 0;
    }
    x->minus += above - (double)count * h;
}

/* Of the whole row: the sum of e^(z - h) over the classes below the largest logit h, how many are
 * at h, and the sum of h - z. */
enum { REST, TIES, ABOVE, CE_SUMS };

/* Leaves them, from the shares of a group and their anchors; returns h, at least kLowest. */
template <typename real>
SK_DEVICE real gather_softmax(const softmax<real> &x, real h, int64_t C, double (&sum)[CE_SUMS]) {
    real top[1] = {x.largest};
    sk_group_reduce(top, sk_larger());
    const bool lower = x.largest < top[0];
    sum[REST] = x.rest * exponential(h - top[0]);
    sum[REST] += lower ? x.ties * exponential(x.largest - top[0]) : 0;
    sum[TIES] = lower ? 0 : x.ties;
    sum[ABOVE] = x.minus;
    sk_group_reduce(sum, sk_add());
    sum[ABOVE] += (double)C * top[0];
    return top[0];
}

/* Leaves the sums of a row class by class, in double, where the first are no numbers: for its
 * logits lie below kLowest, or the sum of h - z is too large for `real`. Returns its largest logit;
 * -inf, and sums as they were, of nothing but -inf. */
template <typename Row>
SK_DEVICE double softmax_again(const Row &row, int64_t C, double (&sum)[CE_SUMS]) {
    double top[1] = {-INFINITY};
    SK_ROLLED for (int64_t c = sk_lane(); c < C; c += sk_group()) top[0] = fmax(top[0], row(c));
    sk_group_reduce(top, sk_larger());
    if (top[0] == -INFINITY) return top[0];
    sum[REST] = sum[TIES] = sum[ABOVE] = 0;
    SK_ROLLED for (int64_t c = sk_lane(); c < C; c += sk_group()) {
        const double z = row(c);
        sum[TIES] += z == top[0] ? 1 : 0;
        sum[REST] += z == top[0] ? 0 : exp(z - top[0]);
        sum[ABOVE] += top[0] - z;
    }
    sk_group_reduce(sum, sk_add());
    return top[0];
}

/* The same in all threads of the group: the largest logit h, with sums that are numbers. */
template <typename T>
SK_DEVICE sk_real<T> mend_softmax(const T *row, int64_t stride, int64_t C, double smooth,
                                  sk_real<T> h, double (&sum)[CE_SUMS]) {
    const bool good = h > (sk_real<T>)kLowest && !(smooth != 0 && isinf(sum[ABOVE]));
    if (good) return h;
    return (sk_real<T>)softmax_again(stored_row<T>{row, stride}, C, sum);
}

/* p - y of a class of logit z, in double. C classes share the smoothing. */
SK_DEVICE double careful_ce_slope(double z, bool is_target, double smooth, int64_t C,
                                  const side &x) {
    const double of = log_p(z, 1, x);
    return (is_target ? expm1(of) + smooth : exp(of)) - smooth / C;
}

/* log sum e^(z - h) */
SK_DEVICE double log_sum(const double *sum) {
    return log(sum[TIES]) + log1p(sum[REST] / sum[TIES]);
}

/* -sum y log p; z_y is the target's logit, level the log_sum. */
SK_DEVICE double conclude_ce(double smooth, int64_t C, const double *sum, double level, double h,
                             double z_y) {
    const double hard = z_y == -INFINITY ? INFINITY + 0 * level : (h - z_y) + level;
    const double soft = smooth != 0 ? smooth * (level + sum[ABOVE] / C) : 0;
    return (smooth != 1 ? (1 - smooth) * hard : 0) + soft;
}

/* What the gradient of a row needs, besides its logits. */
template <typename real>
struct ce_slope {
    real h, of_p, of_all; /* of_p e^(z - h) - of_all is factor (p - smooth / C) */
    real of_target;       /* factor (p - y) of the target */
    int64_t target;
    bool zero; /* no gradient, whatever the logits hold */
};

/* C classes share the smoothing. */
template <typename real>
SK_DEVICE ce_slope<real> ce_slope_of(double h, double level, double factor, double smooth,
                                     int64_t C, int64_t target, double z_y) {
    ce_slope<real> x;
    x.h = sk_keep((real)h);
    x.of_p = sk_keep((real)(factor * exp(-level)));
    x.of_all = sk_keep((real)(factor * (smooth / C)));
    x.of_target = sk_keep((real)(factor * (expm1((z_y - h) - level) + smooth - smooth / C)));
    x.target = target;
    x.zero = factor == 0;
    return x;
}

/* Leaves the gradients of a step of logits. */
template <typename T, int kVec>
SK_DEVICE void ce_gradients(const ce_slope<sk_real<T>> &k, const sk_real<T> (&z)[sk_items<T>],
                            int64_t base, sk_real<T> (&grad)[sk_items<T>]) {
    SK_UNROLL for (int i = 0; i < sk_items<T>; i++) grad[i] =
        k.of_p * exponential(z[i] - k.h) - k.of_all;
    /* one comparison a step, as few steps hold the target */
    if (k.target >= base && k.target < base + sk_step<T>()) {
        SK_UNROLL for (int i = 0; i < sk_items<T>; i++) grad[i] =
            sk_class<kVec>(base, i) == k.target ? k.of_target : grad[i];
    }
    if (!k.zero) return;
    SK_UNROLL for (int i = 0; i < sk_items<T>; i++) grad[i] = 0;
}
