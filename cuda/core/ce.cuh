/* Cross-entropy of a row of logits: sums as in cpu/core/ce.h, which keep the digits of a row that
 * is sure of its class. */
#pragma once
#include "core/kl.cuh"

/* A thread's share of a row, so far: its largest logit, how many are as large, the sum of e^(z - h)
 * over the others, and of -z. The anchor h only ever grows. */
template <typename real>
struct sk_softmax {
    real largest, ties;
    double rest, minus;
};

template <typename real>
SK_DEVICE sk_softmax<real> sk_no_softmax() {
    return {(real)kLowest, 0, 0, 0};
}

/* e^x */
template <typename real>
SK_DEVICE real sk_exponential(real x) {
    return sk_exp2(x * sk_scale_of<real>(1).log2e);
}

/* Adds a step whose largest logit is `most`. Absent items lie so low that they add nothing. */
template <typename T, int kVec>
SK_DEVICE void sk_add_softmax(const sk_real<T> (&a)[sk_items<T>], sk_real<T> h, sk_real<T> most,
                              sk_softmax<sk_real<T>> *x) {
    typedef sk_real<T> real;
    real rest = 0, ties = 0;
    SK_UNROLL for (int i = 0; i < sk_items<T>; i++) {
        ties += a[i] == most ? 1 : 0;
        rest += a[i] == most ? 0 : sk_exponential(a[i] - h);
    }
    const bool higher = most > x->largest, level = most == x->largest;
    const real low = higher ? x->largest : most, lost = higher ? x->ties : level ? 0 : ties;
    x->ties = higher ? ties : level ? x->ties + ties : x->ties;
    x->largest = higher ? most : x->largest;
    x->rest += rest + (lost > 0 ? lost * sk_exponential(low - h) : 0);
}

/* Adds -z of a step, infinite for a class at -inf. */
template <typename T, int kVec>
SK_DEVICE void sk_add_minus(const sk_real<T> (&a)[sk_items<T>], int64_t base, int64_t C,
                            sk_real<T> h, sk_softmax<sk_real<T>> *x) {
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
enum { SK_REST, SK_TIES, SK_ABOVE, SK_CE_SUMS };

/* Leaves them, from the shares of a group and their anchors; returns h, at least kLowest. */
template <typename real>
SK_DEVICE real sk_gather_softmax(const sk_softmax<real> &x, real h, int64_t C,
                                 double (&sum)[SK_CE_SUMS]) {
    real top[1] = {x.largest};
    sk_group_reduce(top, sk_larger());
    const bool lower = x.largest < top[0];
    sum[SK_REST] = x.rest * sk_exponential(h - top[0]);
    sum[SK_REST] += lower ? x.ties * sk_exponential(x.largest - top[0]) : 0;
    sum[SK_TIES] = lower ? 0 : x.ties;
    sum[SK_ABOVE] = x.minus;
    sk_group_reduce(sum, sk_add());
    sum[SK_ABOVE] += (double)C * top[0];
    return top[0];
}

/* Leaves the sums of a row class by class, in double, where the first are no numbers: for its
 * logits lie below kLowest, or the sum of h - z is too large for `real`. Returns its largest logit;
 * -inf, and sums as they were, of nothing but -inf. */
template <typename Row>
SK_DEVICE double sk_softmax_again(const Row &row, int64_t C, double (&sum)[SK_CE_SUMS]) {
    double top[1] = {-INFINITY};
    SK_ROLLED for (int64_t c = sk_lane(); c < C; c += sk_group()) top[0] = fmax(top[0], row(c));
    sk_group_reduce(top, sk_larger());
    if (top[0] == -INFINITY) return top[0];
    sum[SK_REST] = sum[SK_TIES] = sum[SK_ABOVE] = 0;
    SK_ROLLED for (int64_t c = sk_lane(); c < C; c += sk_group()) {
        const double z = row(c);
        sum[SK_TIES] += z == top[0] ? 1 : 0;
        sum[SK_REST] += z == top[0] ? 0 : exp(z - top[0]);
        sum[SK_ABOVE] += top[0] - z;
    }
    sk_group_reduce(sum, sk_add());
    return top[0];
}

/* The same in all threads of the group: the largest logit h, with sums that are numbers. */
template <typename T>
SK_DEVICE sk_real<T> sk_mend_softmax(const T *row, int64_t stride, int64_t C, double smooth,
                                     sk_real<T> h, double (&sum)[SK_CE_SUMS]) {
    const bool good = h > (sk_real<T>)kLowest && !(smooth != 0 && isinf(sum[SK_ABOVE]));
    if (good) return h;
    return (sk_real<T>)sk_softmax_again(sk_stored_row<T>{row, stride}, C, sum);
}

/* log sum e^(z - h) */
SK_DEVICE double sk_log_sum(const double *sum) {
    return log(sum[SK_TIES]) + log1p(sum[SK_REST] / sum[SK_TIES]);
}

/* -sum y log p; z_y is the target's logit, level the log_sum. */
SK_DEVICE double sk_conclude_ce(double smooth, int64_t C, const double *sum, double level, double h,
                                double z_y) {
    const double hard = z_y == -INFINITY ? INFINITY + 0 * level : (h - z_y) + level;
    const double soft = smooth != 0 ? smooth * (level + sum[SK_ABOVE] / C) : 0;
    return (smooth != 1 ? (1 - smooth) * hard : 0) + soft;
}

/* What the gradient of a row needs, besides its logits. */
template <typename real>
struct sk_ce_slope {
    real h, of_p, of_all; /* of_p e^(z - h) - of_all is factor (p - smooth / C) */
    real of_target;       /* factor (p - y) of the target */
    int64_t target;
    bool zero; /* no gradient, whatever the logits hold */
};

/* C classes share the smoothing. */
template <typename real>
SK_DEVICE sk_ce_slope<real> sk_set_ce(double h, double level, double factor, double smooth,
                                      int64_t C, int64_t target, double z_y) {
    sk_ce_slope<real> x;
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
SK_DEVICE void sk_ce_gradients(const sk_ce_slope<sk_real<T>> &k, const sk_real<T> (&z)[sk_items<T>],
                               int64_t base, sk_real<T> (&grad)[sk_items<T>]) {
    SK_UNROLL for (int i = 0; i < sk_items<T>; i++) grad[i] =
        k.of_p * sk_exponential(z[i] - k.h) - k.of_all;
    /* one comparison a step, as few steps hold the target */
    if (k.target >= base && k.target < base + sk_step<T>()) {
        SK_UNROLL for (int i = 0; i < sk_items<T>; i++) grad[i] =
            sk_class<kVec>(base, i) == k.target ? k.of_target : grad[i];
    }
    if (!k.zero) return;
    SK_UNROLL for (int i = 0; i < sk_items<T>; i++) grad[i] = 0;
}
