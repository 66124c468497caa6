/* A row by itself, class by class, in double: the plainest way to its results, whatever its logits
 * are. The steps of kl.cuh give the same faster; rows for which they do not come back here. */
#pragma once
#include "core/rows.cuh"
#include "core/side.h"

/* (e^y - 1 - y) / y^2 for |y| < 0.75, from where on e^y - 1 - y, at least a 6th of its largest
 * term, is found as a difference. float: by the polynomial of least relative error, 7.3e-8 as
 * computed; double: by the series, whose terms left out are below 1e-17 of it. */
SK_DEVICE float sk_curvature(float y) {
    constexpr float of[] = {0.5f,          0.16666672f,    0.041666638f, 0.008332572f,
                            0.0013889658f, 0.00020113161f, 2.4891528e-5f};
    float g = of[6];
    SK_UNROLL for (int k = 5; k >= 0; k--) g = g * y + of[k];
    return g;
}
SK_DEVICE double sk_curvature(double y) {
    // clang-format off
    constexpr double inverse_factorial[] = {
        1. / 2,          1. / 6,           1. / 24,           1. / 120,
        1. / 720,        1. / 5040,        1. / 40320,        1. / 362880,
        1. / 3628800,    1. / 39916800,    1. / 479001600,    1. / 6227020800,
        1. / 87178291200, 1. / 1307674368000, 1. / 20922789888000, 1. / 355687428096000};
    // clang-format on
    double g = inverse_factorial[15];
    SK_UNROLL for (int k = 14; k >= 0; k--) g = g * y + inverse_factorial[k];
    return g;
}

/* Logits as they are stored. */
template <typename T>
struct sk_stored_row {
    const T *at;
    int64_t stride;
    __device__ double operator()(int64_t c) const { return sk_widen(at[c * stride]); }
};

/* The same in all threads of the group. */
template <typename Row>
SK_DEVICE sk_side sk_side_of(const Row &row, int64_t C, double temperature) {
    double top[1] = {-INFINITY}, sum[1] = {0};
    SK_ROLLED for (int64_t c = sk_lane(); c < C; c += sk_group()) top[0] = fmax(top[0], row(c));
    sk_group_reduce(top, sk_larger());
    SK_ROLLED for (int64_t c = sk_lane(); c < C; c += sk_group()) {
        const double z = row(c);
        sum[0] += z == -INFINITY ? 0 : exp((z - top[0]) / temperature);
    }
    sk_group_reduce(sum, sk_add());
    return {top[0], log(sum[0])};
}

/* Of two rows, one after the other: the code is long, and rarely runs. */
template <typename Row>
SK_DEVICE void sk_sides_of(const Row &u, const Row &v, int64_t C, double T, double T_v, sk_side *x,
                           sk_side *y) {
    SK_ROLLED for (int i = 0; i < 2; i++) {
        Row row = v; /* a copy stays in registers, which a reference to either does not */
        if (i == 0) row = u;
        *y = sk_side_of(row, C, i == 0 ? T : T_v);
        if (i == 0) *x = *y;
    }
}

/* A log-sum-exp beyond kFarLse does not say what p is to the last digits: it is saved as a double,
 * whose last bit is then 2^-23 (of rows of doubles 2^-43), what the bounds of a gradient allow. A
 * factor beyond kFarFactor may leave the range of `real`, of which it leaves 2^10 for p (d - KL) T.
 * Gradients of such rows are found class by class. */
template <typename real>
constexpr double kFarLse = sizeof(real) == 8 ? 0x1p10 : 0x1p30;
template <typename real>
constexpr double kFarFactor = sizeof(real) == 8 ? 0x1p1014 : 0x1p118;

SK_DEVICE bool sk_is_beyond(double x, double limit) {
    return fabs(x) >= limit && fabs(x) < INFINITY;
}

/* What rounding leaves of a number that was saved: see sk_whole_side in ops/core/side.h. */
template <typename real>
constexpr double kRounded = sizeof(real) == 8 ? 4 * DBL_EPSILON : 1e-6;
