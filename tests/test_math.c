/* cpu/core/math.h by itself, and the like of ops/core/side.h: what SK_ERRORS claims, and what the
 * comments promise of special values and exact differences. Built for both types of `real`, with
 * fused multiply-add (SK_FUSED) and without. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>

#include <stdlib.h>

#include "core/side.h"
#include "cpu/core/math.h"

/* A float's exact value in double, a double's in long double: of 64 bits at least, but under
 * valgrind. */
#ifdef SK_REAL_IS_DOUBLE
typedef long double wide;
typedef int64_t word;
#define WIDE(name) name##l
enum { DIGITS = DBL_MANT_DIG, LEAST = DBL_MIN_EXP };
#else
typedef double wide;
typedef int32_t word;
#define WIDE(name) name
enum { DIGITS = FLT_MANT_DIG, LEAST = FLT_MIN_EXP };
#endif

/* The names by which SK_ERRORS calls what is exact. */
static inline wide exact_exp2(wide x) { return WIDE(exp2)(x); }
static inline wide exact_exp(wide x) { return WIDE(exp)(x); }
static inline wide exact_expm1(wide x) { return WIDE(expm1)(x); }
static inline wide exact_log(wide x) { return WIDE(log)(x); }
static inline wide exact_log1p(wide x) { return WIDE(log1p)(x); }
static inline wide exact_exp_rest(wide x) { /* sum of x^n / (n + 2)! */
    wide sum = 0;
    for (int n = 24; n >= 0; n--) sum = 1 + x / (n + 3) * sum;
    return sum / 2;
}

static double ulps(double found, wide exact) {
    int exponent;
    (void)WIDE(frexp)(exact, &exponent);
    const wide off = WIDE(ldexp)(found - exact, DIGITS - (exponent < LEAST ? LEAST : exponent));
    return (double)WIDE(fabs)(off);
}

/* Numbers of type real in their order, as integers and back. */
static word place_of(real x) {
    word bits;
    memcpy(&bits, &x, sizeof bits);
    return bits < 0 ? (word) - (bits & (sizeof(real) == 8 ? INT64_MAX : INT32_MAX)) : bits;
}
static real at_place(word place) {
    real x;
    const word magnitude = place < 0 ? (word)-place : place;
    memcpy(&x, &magnitude, sizeof x);
    return place < 0 ? -x : x;
}

typedef struct claim {
    const char *name;
    real (*found)(real x);
    wide (*exact)(wide x);
    double low, high, ulp, worst;
    uint64_t bits;
} claim;

#define SK_CLAIM_FUNCTION(name, call, exact, low, high, ulp, worst, bits) \
    static real find_##name(real x) { return (real)(call); }
SK_ERRORS(SK_CLAIM_FUNCTION)
#define SK_CLAIM(name, call, exact, low, high, ulp, worst, bits) \
    {#name, find_##name, exact_##exact, low, high, ulp, worst, bits},
static const claim claims[] = {SK_ERRORS(SK_CLAIM)};

/* The largest error found, where it is, and a sum over the bits of what was found. */
typedef struct swept {
    double most, worst;
    uint64_t bits;
} swept;

static void look(const claim *c, real x, swept *to) {
    const real found = c->found(x);
    const double off = ulps((double)found, c->exact(x));
    if (!(off <= to->most)) {
        to->most = off;
        to->worst = (double)x;
    }
    to->bits = to->bits * 0x9e3779b97f4a7c15u + (uint64_t)place_of(found);
}

/* `count` numbers of the range at most, spaced evenly by their bits; where there are fewer, all
 * that are not so small that a function is its first term. */
static void sweep_bits(const claim *c, int64_t count, swept *to) {
    const int64_t last = place_of((real)c->high), first = place_of((real)c->low);
    const int64_t step = (last - first) / count + 1;
    for (int64_t i = first; i <= last - step; i += step) {
        const real x = at_place((word)i);
        if (step > 1 || c->low > 0 || x > (real)0x1p-30 || x < (real)-0x1p-30) look(c, x, to);
    }
    look(c, at_place((word)last), to);
}

/* And by their value. */
static void sweep_values(const claim *c, int64_t count, swept *to) {
    for (int64_t i = 0; i <= count; i++)
        look(c, (real)(c->low + (c->high - c->low) / (double)count * (double)i), to);
}

static void errors_are_as_claimed(void **state) {
    (void)state;
    const bool full = getenv("SELFKD_FULL") != NULL, doubles = sizeof(real) == 8;
    int wrong = 0;
    for (size_t i = 0; i < sizeof claims / sizeof *claims; i++) {
        const claim *const c = &claims[i];
        swept few = {0, NAN, 0}, all = {0, NAN, 0};
        sweep_bits(c, 1 << 20, &few);
        sweep_values(c, 1 << 20, &few);
        if (full) sweep_bits(c, doubles ? 1 << 26 : INT64_C(1) << 32, &all);
        const double there = ulps((double)c->found((real)c->worst), c->exact((wide)c->worst));
        bool good = few.most <= c->ulp && all.most <= c->ulp && there <= c->ulp;
#ifndef SK_FUSED
        good = good && there > c->ulp - 0.02 && few.bits == c->bits;
#endif
        if (good) continue;
        wrong++;
        print_error("%s: %.4f ULP at %a; %.4f at %a, where %.2f is claimed; bits %#018jx\n",
                    c->name, fmax(few.most, all.most), all.most > few.most ? all.worst : few.worst,
                    there, c->worst, c->ulp, (uintmax_t)few.bits);
    }
    assert_int_equal(wrong, 0);
}

/* ---- what is no number, and what is left of a number that is none ---- */

static void special_values(void **state) {
    (void)state;
    const real tiny = sizeof(real) == 8 ? (real)DBL_MIN : FLT_MIN, infinity = INFINITY;
    const real lowest = -127;
    assert_true(isnan(sk_exp2_scaled(NAN, 1, lowest)) && isnan(sk_exp_below(NAN)));
    assert_true(sk_exp2_scaled(-infinity, 1, lowest) == 0 && sk_exp_below(-infinity) == 0);
    assert_true(sk_exp2_scaled(0, 1, lowest) == 1 && sk_exp_below(0) == 1);
    assert_true(sk_exp2_scaled(-SK_REAL_MAX, 1, lowest) == 0 && sk_exp_below(-SK_REAL_MAX) == 0);
    assert_true(isnan(sk_log(NAN)) && isnan(sk_log(-1)) && isnan(sk_log(0)));
    assert_true(sk_log(1) == 0 && sk_log_of(1) == 0);
    assert_true(isnan(sk_log_of(NAN)) && isnan(sk_log_of(-1)) && isnan(sk_log_of(-tiny / 2)));
    assert_true(sk_log_of(0) == -infinity && sk_log_of(tiny / 2) == -infinity);
    assert_true(sk_log_of(tiny) > -infinity);
    assert_true(isnan(sk_log1p(NAN)) && sk_log1p(0) == 0);
    assert_true(isnan(sk_expm1(NAN)) && sk_expm1(0) == 0 && isnan(sk_exp_rest(NAN)));
#ifndef SK_REAL_IS_DOUBLE /* either side of the last exponents that there are */
    assert_true(sk_exp2_scaled(-126.49f, 1, lowest) > 0);
    assert_true(sk_exp2_scaled(-126.51f, 1, lowest) == 0);
    assert_true(sk_exp2_scaled(127.49f, 1, lowest) < infinity);
    assert_true(sk_exp_below(-103.9f) == 0x1p-149f && sk_exp_below(-104.0f) == 0);
    assert_true(sk_exp_below(-110.0f) == 0 && sk_exp_below(-109.9f) == 0);
#endif
}

/* ---- numbers in two parts ---- */

static uint64_t seed = 1;
static double uniform(void) { /* -1 .. 1 */
    seed = seed * 6364136223846793005u + 1442695040888963407u;
    return (double)(seed >> 11) * 0x1p-52 - 1;
}

static void splits_are_exact(void **state) {
    (void)state;
    for (int i = 0; i < 100000; i++) {
        const double x = ldexp(uniform(), i % 20 - 10);
        const sk_split k = sk_split_of(x);
        const double off = (double)k.high + k.low - x;
        assert_true(k.high == (real)x && fabs(off) <= fabs(x) * 0x1p-48);
        /* a difference has no more bits than `wide` */
        const real a = (real)ldexp(uniform(), i % 9), b = (real)ldexp(uniform(), i % 7);
        const sk_split d = sk_split_difference(a, b);
        assert_true((wide)d.high + d.low == (wide)a - b && d.high == a - b);
        const sk_two e = sk_two_of((double)a, (double)b);
        assert_true((wide)e.high + e.low == (wide)a - b && e.high == (double)a - (double)b);
    }
}

/* a - b - k where what is left is small against all three; and of equal numbers. */
static void differences_are_rounded_once(void **state) {
    (void)state;
    for (int i = 0; i < 100000; i++) {
        const real a = (real)ldexp(2 + uniform(), i % 30), b = (real)ldexp(uniform(), i % 30);
        const double gap = ((double)a - b) * (1 + ldexp(uniform(), -(i % 20)));
        const sk_split k = sk_split_of(gap);
        const wide exact = ((wide)a - b) - ((wide)k.high + k.low);
        const double ulp = sizeof(real) == 8 ? DBL_EPSILON : (double)FLT_EPSILON;
        const double bound = ulp * (double)WIDE(fabs)(exact) + ulp * ulp * fabs(gap);
        const wide off = sk_difference(a, b, k, 1) - exact;
        assert_true((double)WIDE(fabs)(off) <= bound);
        assert_true(sk_difference(a, b, k, 0) == (a - b) - k.high);
        assert_true(sk_difference(a, a, k, 0) == -k.high);
        assert_true(sk_difference(a, a, (sk_split){0, 0}, 1) == 0);
    }
    const real large = SK_REAL_MAX / 2, less = large * (1 - 1 / (real)1024);
    const sk_split k = sk_split_difference(large, less);
    assert_true(sk_difference(large, less, k, 1) == 0);
}

/* ---- ops/core/side.h ---- */

/* r - log(1 + r), whose series is used where log(1 + r) would leave few digits. */
static long double exact_log_gap(double x) {
    const long double r = x;
    long double sum = 0;
    if (fabs(x) > 0.3) return r - log1pl(r);
    for (int k = 60; k >= 2; k--) sum = 1.0L / k - r * sum;
    return r * r * sum;
}

static void log_gap(void **state) {
    (void)state;
    for (int i = 0; i < 200000; i++) {
        const double r = i % 2 ? ldexp(uniform(), -(i % 50)) : 0.1 * (1 + uniform() / 100);
        if (r < -0.999) continue;
        const double found = sk_log_gap(r, log1p(r)), exact = (double)exact_log_gap(r);
        if (!(fabs(found - exact) <= 5e-15 * exact))
            fail_msg("h(%a) = %a, not %a", r, found, exact);
    }
}

int main(void) {
#if defined __x86_64__ && defined __FMA__
    if (!__builtin_cpu_supports("fma")) return 0;
#endif
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(errors_are_as_claimed),
        cmocka_unit_test(special_values),
        cmocka_unit_test(splits_are_exact),
        cmocka_unit_test(differences_are_rounded_once),
        cmocka_unit_test(log_gap),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
