/* ops/core/philox.h by itself: the published vectors, and where dropout takes its words. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>

#include "core/philox.h"

static void assert_words(sk_words found, sk_words expected) {
    assert_int_equal(found.x, expected.x);
    assert_int_equal(found.y, expected.y);
    assert_int_equal(found.z, expected.z);
    assert_int_equal(found.w, expected.w);
}

/* Random123 (the generator's authors), tests/kat_vectors, "philox4x32 10". */
static void known_answers(void **state) {
    (void)state;
    const struct {
        sk_words counter;
        uint64_t key;
        sk_words expected;
    } vectors[] = {
        {{0, 0, 0, 0}, 0, {0x6627e8d5, 0xe169c58d, 0xbc57ac4c, 0x9b00dbd8}},
        {{0xffffffff, 0xffffffff, 0xffffffff, 0xffffffff},
         0xffffffffffffffff,
         {0x408f276d, 0x41c83b0e, 0xa20bc7c6, 0x6d5451fd}},
        {{0x243f6a88, 0x85a308d3, 0x13198a2e, 0x03707344},
         0x299f31d0a4093822,
         {0xd16cfe09, 0x94fdcceb, 0x5001e420, 0x24126ea1}},
    };
    for (size_t i = 0; i < sizeof vectors / sizeof *vectors; i++)
        assert_words(sk_philox(vectors[i].counter, vectors[i].key), vectors[i].expected);
}

static void dropout_counts_blocks_and_samples(void **state) {
    (void)state;
    const sk_words counter = {0x89abcdef, 0x01234567, 1, 0};
    assert_words(sk_dropout_words(42, 1, 0x0123456789abcdef), sk_philox(counter, 42));
}

static void threshold_and_scale(void **state) {
    (void)state;
    const double below_one = nextafter(1, 0);
    assert_int_equal(sk_dropout_of(0).threshold, 0);
    assert_int_equal(sk_dropout_of(0.5).threshold, 0x80000000);
    assert_int_equal(sk_dropout_of(0.1).threshold, 429496729); /* 2^32 / 10 = 429496729.6 */
    assert_int_equal(sk_dropout_of(below_one).threshold, 0xffffffff);
    assert_true(sk_dropout_of(0).scale == 1);
    assert_true(sk_dropout_of(0.75).scale == 4);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(known_answers),
        cmocka_unit_test(dropout_counts_blocks_and_samples),
        cmocka_unit_test(threshold_and_scale),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
