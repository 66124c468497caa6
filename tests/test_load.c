/* cpu/core/load.h by itself: float16 and bfloat16 to float and back, against arithmetic with their
 * values. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>

#include <math.h>
#include <stdlib.h>

#include "cpu/core/load.h"

/* A format of 16 bits: significant bits, the exponent of its smallest normal number, and the bits
 * of infinity. */
typedef struct format {
    int digits, least;
    uint16_t infinity;
    float (*from)(uint16_t);
    uint16_t (*to)(float);
} format;
static const format f16 = {11, -14, 0x7c00, sk_from_f16, sk_to_f16};
static const format bf16 = {8, -126, 0x7f80, sk_from_bf16, sk_to_bf16};

/* The value of bits that are no NaN: significand times a power of two. */
static double value_of(const format *f, uint16_t bits) {
    const int magnitude = bits & 0x7fff, fraction = 1 << (f->digits - 1);
    const int exponent = magnitude / fraction, significand = magnitude % fraction;
    const double normal = ldexp(significand + fraction, exponent - 1 + f->least - f->digits + 1);
    const double value = magnitude == f->infinity ? INFINITY
                         : exponent > 0           ? normal
                                                  : ldexp(significand, f->least - f->digits + 1);
    return bits & 0x8000 ? -value : value;
}

/* The bits of x rounded to nearest, ties to even: rint does both, of x in units of the last place.
 * Infinity follows the largest number as if it were one more. */
static uint16_t bits_of(const format *f, double x) {
    const uint16_t sign = signbit(x) ? 0x8000 : 0;
    if (isinf(x)) return sign | f->infinity;
    const int exponent = x == 0 || ilogb(x) < f->least ? f->least : ilogb(x);
    const int fraction = 1 << (f->digits - 1);
    const int units = (int)rint(ldexp(fabs(x), f->digits - 1 - exponent));
    const int64_t magnitude = (int64_t)(exponent - f->least) * fraction + units;
    return sign | (uint16_t)(magnitude < f->infinity ? magnitude : f->infinity);
}

static void is_rounded(const format *f, float x) {
    const uint16_t found = f->to(x), expected = bits_of(f, (double)x);
    if (found != expected) fail_msg("%a: %#x, not %#x", (double)x, found, expected);
}

static void all_values(const format *f) {
    for (uint32_t bits = 0; bits < 65536; bits++) {
        const float x = f->from((uint16_t)bits);
        if ((bits & 0x7fff) > f->infinity) continue;
        assert_true((double)x == value_of(f, (uint16_t)bits) && !signbit(x) == !(bits >> 15));
        assert_int_equal(f->to(x), bits);
    }
}

/* Between any two neighbours lies a tie; and the floats beside each of the three. */
static void ties(const format *f) {
    for (uint32_t bits = 0; bits < f->infinity; bits++) {
        const double low = value_of(f, (uint16_t)bits);
        const double past = ldexp(1, f->infinity / (1 << (f->digits - 1)) - 1 + f->least);
        const double high = bits + 1u == f->infinity ? past : value_of(f, (uint16_t)(bits + 1));
        const double points[] = {low, low + (high - low) / 2, high};
        for (int i = 0; i < 3; i++) {
            const float x = (float)points[i],
                        around[] = {nextafterf(x, -1), x, nextafterf(x, INFINITY)};
            for (int k = 0; k < 3; k++) {
                is_rounded(f, around[k]);
                is_rounded(f, -around[k]);
            }
        }
    }
}

/* Every 10,007th float, all of them if SELFKD_FULL is set. */
static void floats(const format *f) {
    const uint32_t step = getenv("SELFKD_FULL") ? 1 : 10007;
    for (uint64_t bits = 0; bits <= 0xffffffff; bits += step)
        if ((bits & 0x7fffffff) <= 0x7f800000) is_rounded(f, sk_float((uint32_t)bits));
}

/* A NaN stays one, of its sign; its payload may be lost. */
static void nans(const format *f) {
    for (uint32_t bits = f->infinity + 1u; bits < 0x8000; bits++) {
        assert_true(isnan(f->from((uint16_t)bits)) && !signbit(f->from((uint16_t)bits)));
        assert_true(isnan(f->from((uint16_t)(bits | 0x8000))));
        assert_true(signbit(f->from((uint16_t)(bits | 0x8000))));
    }
    for (uint32_t payload = 1; payload < 0x800000; payload++) {
        const uint16_t found = f->to(sk_float(0x7f800000 | payload));
        if (found <= f->infinity || found >= 0x8000) fail_msg("payload %#x: %#x", payload, found);
        if (f->to(sk_float(0xff800000 | payload)) != (found | 0x8000)) fail_msg("%#x", payload);
    }
}

#define TESTS(format)                                                                   \
    static void format##_all_values(void **state) { (void)state, all_values(&format); } \
    static void format##_ties(void **state) { (void)state, ties(&format); }             \
    static void format##_floats(void **state) { (void)state, floats(&format); }         \
    static void format##_nans(void **state) { (void)state, nans(&format); }
TESTS(f16)
TESTS(bf16)

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(f16_all_values),  cmocka_unit_test(f16_ties),
        cmocka_unit_test(f16_floats),      cmocka_unit_test(f16_nans),
        cmocka_unit_test(bf16_all_values), cmocka_unit_test(bf16_ties),
        cmocka_unit_test(bf16_floats),     cmocka_unit_test(bf16_nans),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
