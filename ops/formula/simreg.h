/* What follows from the sums of a row, and what its gradient needs: ops/simreg.h, for C and CUDA.
 *
 * Everything is computed in double, whatever the dtype: to convert costs less than to read, no
 * square of a float overflows or underflows, and the 2 - 2 cos of floats keeps its digits down to
 * rows 1e-3 apart. Closer rows are visited again for their differences. So are rows of doubles
 * whose squares are no numbers, "far" ones: as x by_x and t by_t, by powers of two. */
#pragma once
#include <math.h>
#include <stdbool.h>

#include "core/both.h"

/* The least length that a row is divided by. */
#define SK_SIMREG_EPS 1e-12

/* 2 - 2 cos is off by some 1e-15: below this the differences are summed up instead. */
#define SK_SIMREG_NEAR(real) (sizeof(real) == 8 ? 0.03 : 1e-6)

typedef struct sk_simreg_sums {
    double xx, tt, xt;
} sk_simreg_sums;

/* A row's loss and, as saved for backward, x_hat = x scale_x, t_hat = t scale_t and h. */
typedef struct sk_simreg_row {
    double value, scale_x, scale_t, h;
} sk_simreg_row;

/* Squares of lengths that are sure to be good, and factors of features that are not. */
SK_BOTH bool sk_simreg_is_near(double square) { return square > 0x1p-900 && square < 0x1p900; }
SK_BOTH bool sk_simreg_is_far(double scale) { return scale > 0 && scale < 0x1p-450; }

/* The power of two that brings a row whose largest element is `top` to between 1 and 2; 1 where
 * there is none. */
SK_BOTH double sk_simreg_power(double top) {
    const int exponent = top > 0 && isfinite(top) ? -ilogb(top) : 0;
    return ldexp(1.0, exponent < 1023 ? exponent : 1023);
}

/* From the sums of x by_x and t by_t; h and scales follow with sk_simreg_finish(). */
typedef struct sk_simreg_lengths {
    double value, scale_x, scale_t, tt; /* tt: |t_hat|^2 */
    bool unit_x;                        /* whether the length of x_hat is 1 */
} sk_simreg_lengths;

SK_BOTH sk_simreg_lengths sk_simreg_measure(sk_simreg_sums sum, double by_x, double by_t) {
    const double eps_x = SK_SIMREG_EPS * by_x, eps_t = SK_SIMREG_EPS * by_t;
    const double x = sqrt(sum.xx), t = sqrt(sum.tt);
    const bool unit_x = !(x < eps_x), unit_t = !(t < eps_t);
    const double scale_x = 1 / (unit_x ? x : eps_x), scale_t = 1 / (unit_t ? t : eps_t);
    const double xx = unit_x ? 1 : sum.xx * scale_x * scale_x;
    const double tt = unit_t ? 1 : sum.tt * scale_t * scale_t;
    const sk_simreg_lengths k = {xx + tt - 2 * (sum.xt * scale_x * scale_t), scale_x, scale_t, tt,
                                 unit_x};
    return k;
}

/* value: that of k or, where it cancels, the sum of (ratio x by_x - t by_t)^2 scale_t^2 with ratio
 * = scale_x / scale_t. */
SK_BOTH sk_simreg_row sk_simreg_finish(sk_simreg_lengths k, double value, double by_x,
                                       double by_t) {
    const sk_simreg_row row = {value, k.scale_x * by_x, k.scale_t * by_t,
                               k.unit_x ? (value + (1 - k.tt)) / 2 : 0};
    return row;
}

/* What the gradient of a row needs: dl/dx = factor ((ratio x - t) - along x), of a far row with x
 * by_x and t by_t. */
typedef struct sk_simreg_slope {
    bool zero, far; /* zero: no gradient, whatever the features hold */
    double factor, ratio, along, by_x, by_t;
} sk_simreg_slope;

/* scale_x, scale_t and h are what was saved; far rows are those of `doubles`. */
SK_BOTH sk_simreg_slope sk_simreg_slope_of(double grad, double weight, double denominator,
                                           double scale_x, double scale_t, double h, bool doubles) {
    const double of_row = 2 * grad * weight / denominator;
    sk_simreg_slope k = {grad == 0 || weight == 0, false, 0, 0, 0, 1, 1};
    k.far = doubles && (sk_simreg_is_far(scale_x) || sk_simreg_is_far(scale_t));
    if (k.far) {
        k.by_x = ldexp(1.0, ilogb(scale_x));
        k.by_t = ldexp(1.0, ilogb(scale_t));
    }
    k.ratio = (scale_x / k.by_x) / (scale_t / k.by_t);
    k.factor = of_row * scale_x * (scale_t / k.by_t);
    k.along = k.ratio * h;
    return k;
}

/* The gradient of a feature; exactly 0 for equal ones of rows of one length. */
SK_BOTH double sk_simreg_gradient(sk_simreg_slope k, double x, double t) {
    const double apart = x * k.ratio - t;
    return k.zero ? 0 : k.factor * (apart - x * k.along);
}
