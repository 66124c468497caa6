/* A row by itself, class by class, in double: the plainest way to its results, whatever its logits
 * are. The steps of kl.cuh give the same faster; rows for which they do not come back here. */
#pragma once
#include "core/rows.cuh"
#include "core/side.h"

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
