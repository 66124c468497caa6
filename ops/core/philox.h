/* Dropout masks from Philox4x32-10, a counter-based generator: a mask is a function of the seed
 * and of where an element is, and so the same on every device, in any order, forward and backward.
 *
 * Source: Salmon, Moraes, Dror, Shaw: "Parallel Random Numbers: As Easy as 1, 2, 3", SC 2011. */
#pragma once
#include <math.h>
#include <stdint.h>

#include "both.h"

/* Defines `name`, which makes of counter c, a struct of four words, as many random ones. For one
 * counter, word is uint32_t and product uint64_t; for several, both are vectors of 64 bits for
 * each, of which a word is the lower half. multiply(word, constant) is a product. */
#define SK_PHILOX(name, words, word, product, multiply)                        \
    SK_BOTH words name(words c, uint64_t key) {                                \
        for (uint32_t round = 0; round < 10; round++) {                        \
            const uint32_t low = (uint32_t)key + round * 0x9E3779B9u;          \
            const uint32_t high = (uint32_t)(key >> 32) + round * 0xBB67AE85u; \
            const product from_x = multiply(c.x, 0xD2511F53u),                 \
                          from_z = multiply(c.z, 0xCD9E8D57u);                 \
            c.x = (word)(from_z >> 32) ^ c.y ^ low;                            \
            c.y = (word)from_z;                                                \
            c.z = (word)(from_x >> 32) ^ c.w ^ high;                           \
            c.w = (word)from_x;                                                \
        }                                                                      \
        return c;                                                              \
    }

typedef struct sk_words {
    uint32_t x, y, z, w;
} sk_words;

SK_BOTH uint64_t sk_multiply_words(uint32_t a, uint32_t b) { return (uint64_t)a * b; }
SK_PHILOX(sk_philox, sk_words, uint32_t, uint64_t, sk_multiply_words)

/* Elements 4 block .. 4 block + 3 of one dropout sample have one word each. */
SK_BOTH sk_words sk_dropout_words(uint64_t seed, uint32_t sample, uint64_t block) {
    const sk_words counter = {(uint32_t)block, (uint32_t)(block >> 32), sample, 0};
    return sk_philox(counter, seed);
}

/* An element is kept if its word is at least `threshold`, and then multiplied by `scale`. */
typedef struct sk_dropout {
    uint32_t threshold;
    double scale;
} sk_dropout;

SK_BOTH sk_dropout sk_dropout_of(double p) {
    const sk_dropout d = {(uint32_t)floor(p * 4294967296.0), 1 / (1 - p)};
    return d;
}
