/* Elementary functions that the compiler can put into vector loops. All of them work on any number
 * of lanes (no call, no branch, no table), but for exp2, exp and log1p of doubles, which are those
 * of libm, one lane at a time. Ranges, errors and inputs that show them are listed at the foot, in
 * SK_ERRORS, which tests/test_math.c sweeps. */
#pragma once
#include <float.h>
#include <math.h>
#include <stdint.h>
#include <string.h>

#include "cpu/core/variant.h"

#ifdef SK_REAL_IS_DOUBLE
#define SK_REAL_MAX DBL_MAX
#else
#define SK_REAL_MAX FLT_MAX
#endif
#define SK_LOG2E 1.44269504088896340736

static inline float sk_float(uint32_t bits) {
    float x;
    memcpy(&x, &bits, sizeof x);
    return x;
}
static inline uint32_t sk_float_bits(float x) {
    uint32_t bits;
    memcpy(&bits, &x, sizeof bits);
    return bits;
}
static inline double sk_double(uint64_t bits) {
    double x;
    memcpy(&x, &bits, sizeof x);
    return x;
}
static inline uint64_t sk_double_bits(double x) {
    uint64_t bits;
    memcpy(&bits, &x, sizeof bits);
    return bits;
}

/* x, not known to the compiler, which makes a comparison and a selection of a maximum with a
 * constant, but one instruction of that with a variable. */
static inline real sk_opaque(real x) {
    __asm__("" : "+m"(x));
    return x;
}

static inline real sk_abs(real x) {
#ifdef SK_REAL_IS_DOUBLE
    return fabs(x);
#else
    return fabsf(x);
#endif
}

/* 2^(x k) for k > 0 and x k from -126.5 to 127.5, to 2.3 ULP and the rounding of x k: at k = 1 and
 * x = -0x1.7fecf2p+0 it is off by 2.29 ULP. Exactly 0 for a smaller x k, given lowest = -127/k, so
 * that a class at -inf has probability 0; NaN stays NaN. x k = n + f, |f| <= 1/2; 2^f is a minimax
 * polynomial; 2^n is built in the exponent field and multiplied, because adding it to the bits of
 * 2^f would turn a NaN into a number. e^(x/T) has k = SK_LOG2E/T. */
static inline real sk_exp2_scaled(real x, real k, real lowest) {
#ifdef SK_REAL_IS_DOUBLE
    (void)lowest;
    return exp2(x * k);
#else
    x = x < lowest ? lowest : x;
    const float shift = 12582912.0f + 127.0f; /* 1.5 * 2^23: leaves n + 127 in the low bits */
    const float t = x * k + shift;
    const float f = x * k - (t - shift);
    float y = 1.326472731e-3f;
    y = y * f + 9.671512991e-3f;
    y = y * f + 5.550733581e-2f;
    y = y * f + 2.402224243e-1f;
    y = y * f + 6.931470037e-1f;
    y = y * f + 1.0f;
    return y * sk_float(sk_float_bits(t) << 23);
#endif
}

/* e^x for x from -708 to 0, to 1.015 ULP (0.999 at -0x1.c8c75b7ce6a1ap+7; fused, 1.0103 at
 * -0x1.a6bc4ap+6), and to 1.05 up to 709; 0 below, infinite above, NaN stays NaN. x = n log 2 + f,
 * |f| <= 0.35, with log 2 in two parts; e^f is its series. */
static inline double sk_exp(double x) {
    const double shift =
        6755399441055744.0 + 1023.0; /* 1.5 * 2^52: leaves n + 1023 in the low bits */
    const double t = x * SK_LOG2E + shift, n = t - shift;
    const double f = (x - n * 6.93147180369123816490e-01) - n * 1.90821492927058770002e-10;
    const double z = f * f;
    double even = 1.0 / 479001600, odd = 1.0 / 6227020800;
    even = ((even * z + 1.0 / 3628800) * z + 1.0 / 40320) * z + 1.0 / 720;
    odd = ((odd * z + 1.0 / 39916800) * z + 1.0 / 362880) * z + 1.0 / 5040;
    even = (even * z + 1.0 / 24) * z + 0.5;
    odd = (odd * z + 1.0 / 120) * z + 1.0 / 6;
    const double y = 1 + (f + z * (even + odd * f));
    return x < -708 ? 0 : x > 709 ? (double)INFINITY : y * sk_double(sk_double_bits(t) << 52);
}

/* log x for a normal x > 0, to 0.88 ULP (found at 0x1.6955643163433p-1); NaN for 0, negative
 * numbers and NaN. fdlibm's method: x = 2^k (1 + f), sqrt(1/2) <= 1 + f < sqrt(2), a polynomial in
 * s = f / (2 + f). */
static inline double sk_log(double x) {
    const uint64_t root = 0x3fe6a09e667f3bcd, one = 0x3ff0000000000000, two52 = 0x4330000000000000;
    const uint64_t exponent = (sk_double_bits(x) - root + one) >> 52; /* k + 1023 */
    const double k = sk_double(exponent | two52) - (4503599627370496.0 + 1023.0);
    const double f = sk_double(sk_double_bits(x) - (exponent << 52) + one) - 1.0;
    const double s = f / (2.0 + f), z = s * s, half = 0.5 * f * f;
    double r = 1.479819860511658591e-01;
    r = r * z + 1.531383769920937332e-01;
    r = r * z + 1.818357216161805012e-01;
    r = r * z + 2.222219843214978396e-01;
    r = r * z + 2.857142874366239149e-01;
    r = r * z + 3.999999999940941908e-01;
    r = r * z + 6.666666666666735130e-01;
    const double low = s * (half + r * z) + k * 1.90821492927058770002e-10;
    const double y = k * 6.93147180369123816490e-01 - ((half - low) - f);
    return x > 0 ? y : (double)NAN;
}

/* log x for a normal x > 0, to 0.86 ULP (at 0x1.665aa6p-1; of doubles as sk_log); -inf for 0 and
 * subnormal numbers, NaN for negative ones and NaN. The method of sk_log in float, where four terms
 * of the series are enough. */
static inline real sk_log_of(real x) {
#ifdef SK_REAL_IS_DOUBLE
    return x < DBL_MIN && x >= 0 ? -INFINITY : sk_log(x);
#else
    const uint32_t root = 0x3f3504f3, one = 0x3f800000;
    const uint32_t exponent = (sk_float_bits(x) - root + one) >> 23; /* k + 127 */
    const float k = (float)(int32_t)exponent - 127.0f;
    const float f = sk_float(sk_float_bits(x) - (exponent << 23) + one) - 1.0f;
    const float s = f / (2.0f + f), z = s * s, half = 0.5f * f * f;
    float r = 2.0f / 9;
    r = r * z + 2.0f / 7;
    r = r * z + 2.0f / 5;
    r = r * z + 2.0f / 3;
    const float low = s * (half + r * z) + k * 9.05800061e-6f;
    const float y = k * 6.93138123e-1f - ((half - low) - f);
    return x >= FLT_MIN ? y : x >= 0 ? -INFINITY : NAN;
#endif
}

/* (e^x - 1 - x) / x^2 for |x| <= 1, to 3.38 ULP (at -0x1.ff935cp-1): its even and its odd part are
 * a minimax polynomial each. Of doubles they are the series, to 4.67 ULP (found at
 * -0x1.ffcf2f365a9f2p-1). */
static inline real sk_exp_rest(real x) {
    const real z = x * x;
#ifdef SK_REAL_IS_DOUBLE
    double even = (1.0 / 20922789888000 * z + 1.0 / 87178291200) * z + 1.0 / 479001600;
    double odd = (1.0 / 355687428096000 * z + 1.0 / 1307674368000) * z + 1.0 / 6227020800;
    even = (((even * z + 1.0 / 3628800) * z + 1.0 / 40320) * z + 1.0 / 720) * z + 1.0 / 24;
    odd = (((odd * z + 1.0 / 39916800) * z + 1.0 / 362880) * z + 1.0 / 5040) * z + 1.0 / 120;
    return (even * z + 0.5) + (odd * z + 1.0 / 6) * x;
#else
    const float even = (2.53438775e-5f * z + 1.38856715e-3f) * z + 4.16667201e-2f;
    const float odd = (2.03380623e-4f * z + 8.33076797e-3f) * z + 1.66666999e-1f;
    return (even * z + 0.5f) + odd * x;
#endif
}

/* e^x - 1 for |x| <= 1/2, by a minimax polynomial, to 4.58 ULP (at 0x1.c8a9c2p-3; of doubles 1.15,
 * found at -0x1.f45cdac80a9f6p-2). */
static inline real sk_expm1(real x) {
#ifdef SK_REAL_IS_DOUBLE
    return sk_exp_rest(x) * x * x + x;
#else
    float y = 1.38888194e-3f;
    y = y * x + 8.40768311e-3f;
    y = y * x + 4.16687019e-2f;
    y = y * x + 1.66659743e-1f;
    y = y * x + 4.99999821e-1f;
    return (y * x + 1.0f) * x;
#endif
}

/* e^x for x <= 0, to 1.1 ULP (1.08 at -0x1.45c23ap+6; fused, 1.0986 at -0x1.786d32p+2), subnormal
 * results included; 0 from -104 on, NaN stays NaN. x = n log 2 + f, |f| <= 0.35, with log 2 in two
 * parts; 2^n in two factors, for one factor would be no normal float. */
static inline real sk_exp_below(real x) {
#ifdef SK_REAL_IS_DOUBLE
    return exp(x);
#else
    x = x < -110.0f ? -110.0f : x;            /* 0 already */
    const float shift = 12582912.0f + 127.0f; /* 1.5 * 2^23: leaves n + 127 in the low bits */
    const float n = (x * (float)SK_LOG2E + shift) - shift;
    const float f = (x - n * 0.693359375f) + n * 2.12194440e-4f;
    const float y = (sk_exp_rest(f) * f * f + f) + 1.0f;
    const float half = n * 0.5f + shift, rest = (n - (half - shift)) + shift;
    return y * sk_float(sk_float_bits(half) << 23) * sk_float(sk_float_bits(rest) << 23);
#endif
}

/* (2 artanh s - 2 s) / s^3 of z = s^2 for |s| <= 1/3, by a minimax polynomial. */
static inline float sk_artanh_rest(float z) {
    float y = 2.815777957e-1f;
    y = y * z + 2.796515822e-1f;
    y = y * z + 4.002459645e-1f;
    return y * z + 6.666632295e-1f;
}

/* log(1 + x) for 0 <= x <= 1, to 2.93 ULP (at 0x1.06d1ep-4): 2 artanh s with s = x / (2 + x), a
 * minimax polynomial in s^2. */
static inline real sk_log1p(real x) {
#ifdef SK_REAL_IS_DOUBLE
    return log1p(x);
#else
    const float s = x / (2.0f + x), z = s * s;
    return (sk_artanh_rest(z) * z + 2.0f) * s;
#endif
}

/* x - log m for m = 1 + x, which is better known than its sum, of 2 at most: as sk_log_of, but
 * where x is small it is of second order and cancels nothing. Infinite where m is 0 or subnormal.
 */
static inline real sk_log_rest(real x, real m) {
#ifdef SK_REAL_IS_DOUBLE
    const uint64_t root = 0x3fe6a09e667f3bcd, one = 0x3ff0000000000000, two52 = 0x4330000000000000;
    const uint64_t exponent = (sk_double_bits(m) - root + one) >> 52;
    const double k = sk_double(exponent | two52) - (4503599627370496.0 + 1023.0);
    const double f = k == 0 ? x : sk_double(sk_double_bits(m) - (exponent << 52) + one) - 1.0;
    const double s = f / (2.0 + f), z = s * s, half = 0.5 * f * f;
    double r = 1.479819860511658591e-01;
    r = r * z + 1.531383769920937332e-01;
    r = r * z + 1.818357216161805012e-01;
    r = r * z + 2.222219843214978396e-01;
    r = r * z + 2.857142874366239149e-01;
    r = r * z + 3.999999999940941908e-01;
    r = r * z + 6.666666666666735130e-01;
    const double low = s * (half + r * z) + k * 1.90821492927058770002e-10;
    const double y = ((x - f) - k * 6.93147180369123816490e-01) + (half - low);
    return m < DBL_MIN ? INFINITY : y;
#else
    const uint32_t root = 0x3f3504f3, one = 0x3f800000;
    const uint32_t exponent = (sk_float_bits(m) - root + one) >> 23;
    const float k = (float)(int32_t)exponent - 127.0f;
    const float f = k == 0 ? x : sk_float(sk_float_bits(m) - (exponent << 23) + one) - 1.0f;
    const float s = f / (2.0f + f), z = s * s, half = 0.5f * f * f;
    float r = 2.0f / 9;
    r = r * z + 2.0f / 7;
    r = r * z + 2.0f / 5;
    r = r * z + 2.0f / 3;
    const float low = s * (half + r * z) + k * 9.05800061e-6f;
    const float y = ((x - f) - k * 6.93138123e-1f) + (half - low);
    return m < FLT_MIN ? INFINITY : y;
#endif
}

/* x - log(1 + x) for -1/2 <= x <= 1: with s as in sk_log1p it is s x - rest, for x - 2 s = s x. */
static inline real sk_log_rest_near(real x) {
#ifdef SK_REAL_IS_DOUBLE
    return sk_log_rest(x, 1 + x);
#else
    const float s = x / (2.0f + x), z = s * s;
    return x * s - s * z * sk_artanh_rest(z);
#endif
}

/* A number as the sum of two reals, for subtracting it from a real without losing digits. */
typedef struct sk_split {
    real high, low;
} sk_split;

/* x, to 48 bits at least. */
static inline sk_split sk_split_of(double x) {
    const real high = (real)x;
    return (sk_split){high, (real)(x - high)};
}

/* a - b, exactly (Knuth). */
static inline sk_split sk_split_difference(real a, real b) {
    const real high = a - b, minus_b = high - a;
    return (sk_split){high, (a - (high - minus_b)) - (b + minus_b)};
}

/* a - b - k of finite numbers. If exact is 1, it is off by an epsilon of itself, and by the square
 * of an epsilon of k, however large a and b are. If exact is 0, it is (a - b) - k.high: exactly
 * -k.high where a == b, so that equal logits give exactly 0 when k is 0. */
static inline real sk_difference(real a, real b, sk_split k, real exact) {
    const sk_split x = sk_split_difference(a, b);
    return (x.high - k.high) + exact * (x.low - k.low);
}

/* What these functions claim, a line for each: its name, a call, what the call approximates, the
 * range of x, the largest error there in ULP of the exact result, an x that is off by that to 0.02
 * ULP without fused multiply-add, and a sum over the bits of results, which notices the last digit
 * of any coefficient. The largest error is that of all floats, fused or not; of doubles, that of
 * 10^8 numbers and of those around the worst. */
#ifdef SK_REAL_IS_DOUBLE
#define SK_ERRORS(X)                                                                              \
    X(log, sk_log(x), log, DBL_MIN, DBL_MAX, 0.88, 0x1.6955643163433p-1, 0xba117e8f69ef86d9)      \
    X(log_near_1, sk_log(x), log, 0.5, 1.5, 0.88, 0x1.6955643163433p-1, 0x0dca213b8939cf5e)       \
    X(exp, sk_exp(x), exp, -708, 0, 1.015, -0x1.c8c75b7ce6a1ap+7, 0xd955a8843385984d)             \
    X(exp_rest, sk_exp_rest(x), exp_rest, -1, 1, 4.67, -0x1.ffcf2f365a9f2p-1, 0x6c85f0b6eb5c30fa) \
    X(expm1, sk_expm1(x), expm1, -0.5, 0.5, 1.15, -0x1.f45cdac80a9f6p-2, 0x47f3da22f1edbe25)
#else
#define SK_ERRORS(X)                                                                       \
    X(exp2, sk_exp2_scaled(x, 1, -127), exp2, -126.4999, 127.4999, 2.30, -0x1.7fecf2p+0,   \
      0xa7f2e6db3ca32122)                                                                  \
    X(log, sk_log_of(x), log, FLT_MIN, FLT_MAX, 0.86, 0x1.665aa6p-1, 0xf5c1227b021d55c8)   \
    X(log_near_1, sk_log_of(x), log, 0.5, 1.5, 0.86, 0x1.665aa6p-1, 0x744f19379c13a814)    \
    X(exp_rest, sk_exp_rest(x), exp_rest, -1, 1, 3.38, -0x1.ff935cp-1, 0x7b6eed43de413c82) \
    X(expm1, sk_expm1(x), expm1, -0.5, 0.5, 4.58, 0x1.c8a9c2p-3, 0x60697ada32976013)       \
    X(exp_below, sk_exp_below(x), exp, -104, 0, 1.10, -0x1.45c23ap+6, 0xe5c961b56181c597)  \
    X(log1p, sk_log1p(x), log1p, 0, 1, 2.93, 0x1.06d1ep-4, 0x7476e8994092eabe)
#endif
