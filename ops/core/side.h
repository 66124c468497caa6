/* The sides of a row of logits in double: what C and CUDA kernels do alike where arithmetic of
 * float leaves too few digits, class by class. */
#pragma once
#include <float.h>
#include <math.h>
#include <stdbool.h>
#include <stdint.h>

#include "both.h"

/* A side of a row: its largest logit, and the logarithm of the sum of e^((z - top)/T). Kept apart,
 * for log_sum would be lost in the log-sum-exp of large logits. */
typedef struct sk_side {
    double top, log_sum; /* -inf of nothing but -inf, NaN of a row that holds NaN or inf */
} sk_side;

SK_BOTH bool sk_is_finite_side(sk_side x) { return isfinite(x.log_sum); }

SK_BOTH double sk_lse_of(sk_side x, double T) { return x.top / T + x.log_sum; }

/* log p of a class of logit z. */
SK_BOTH double sk_log_p(double z, double T, sk_side x) { return (z - x.top) / T - x.log_sum; }

/* What was saved says of which row the classes are a part: a log_sum; or lse(u/T) and dl, of which
 * follows lse(v/T). But where that is no more than what they are, to `rounded`, x knows the digits
 * that were rounded away. */
SK_BOTH sk_side sk_whole_side(sk_side x, double top, double log_sum, double rounded) {
    const bool same = fabs(log_sum - x.log_sum) <= rounded * (1 + fabs(x.log_sum));
    const sk_side whole = {top, log_sum};
    return x.top == top && same ? x : whole;
}
SK_BOTH sk_side sk_side_within(sk_side x, double T, double lse_u, double dl, double rounded) {
    const double log_sum = (lse_u - dl) - x.top / T;
    const double off = rounded + 4 * DBL_EPSILON * (fabs(lse_u) + fabs(dl));
    const bool same = fabs(log_sum - x.log_sum) <= off, nothing = x.top == -INFINITY;
    const sk_side within = {nothing ? 0 : x.top, nothing ? lse_u - dl : same ? x.log_sum : log_sum};
    return within;
}

/* A difference as the sum of two doubles, exactly (Knuth). */
typedef struct sk_two {
    double high, low;
} sk_two;

SK_BOTH sk_two sk_two_of(double a, double b) {
    const double high = a - b, minus_b = high - a;
    const sk_two x = {high, (a - (high - minus_b)) - (b + minus_b)};
    return x;
}

/* log p - log q of a class, infinite where it is at -inf on one side. At one temperature from the
 * exact difference of (u - v) and (top - top), however large they are. */
SK_BOTH double sk_log_ratio_of(double u, double v, double T, double T_v, sk_side x, sk_side y) {
    if (isinf(u) || isinf(v)) return u - v;
    if (T != T_v) return sk_log_p(u, T, x) - sk_log_p(v, T_v, y);
    const sk_two a = sk_two_of(u, v), b = sk_two_of(x.top, y.top);
    return ((a.high - b.high) + (a.low - b.low)) / T - (x.log_sum - y.log_sum);
}

/* p - y of a class of logit z, y being the smoothed target; `classes` share the smoothing. */
SK_BOTH double sk_ce_slope_of(double z, bool is_target, double smooth, int64_t classes, sk_side x) {
    const double log_p = sk_log_p(z, 1, x);
    return (is_target ? expm1(log_p) + smooth : exp(log_p)) - smooth / (double)classes;
}

/* h(r) = r - log(1 + r), given log(1 + r) for an r that is not small: log(1 + r) = 2 atanh(s). */
SK_BOTH double sk_log_gap(double r, double log1p_r) {
    const double s = r / (2 + r), z = s * s;
    double series = 1.0 / 15;
    series = series * z + 1.0 / 13;
    series = series * z + 1.0 / 11;
    series = series * z + 1.0 / 9;
    series = series * z + 1.0 / 7;
    series = series * z + 1.0 / 5;
    series = series * z + 1.0 / 3;
    return r < 0.1 && r > -0.1 ? s * (r - 2 * z * series) : r - log1p_r;
}
