/* Dropout masks from Philox4x32-10, a counter-based generator: a mask is a function of the seed
 * and of where an element is, and so the same on every device, in any order, forward and backward.
 *
 * Source: Salmon, Moraes, Dror, Shaw: "Parallel Random Numbers: As Easy as 1, 2, 3", SC 2011. */
#pragma once
#include <math.h>
#include <stdint.h>

#include "both.h"

/* Four words: a counter and what Philox makes of it. */
typedef struct sk_words {
    uint32_t x, y, z, w;
} sk_words;

SK_BOTH sk_words sk_philox_round(sk_words c, uint32_t low, uint32_t high, uint32_t round) {
    const uint64_t x = (uint64_t)c.x * 0xD2511F53u, z = (uint64_t)c.z * 0xCD9E8D57u;
    const sk_words next = {(uint32_t)(z >> 32) ^ c.y ^ (low + round * 0x9E3779B9u), (uint32_t)z,
                           (uint32_t)(x >> 32) ^ c.w ^ (high + round * 0xBB67AE85u), (uint32_t)x};
    return next;
}

/* The rounds are written out, for a loop around them is not vectorised otherwise. */
SK_BOTH sk_words sk_philox(sk_words c, uint64_t key) {
    const uint32_t low = (uint32_t)key, high = (uint32_t)(key >> 32);
    c = sk_philox_round(c, low, high, 0);
    c = sk_philox_round(c, low, high, 1);
    c = sk_philox_round(c, low, high, 2);
    c = sk_philox_round(c, low, high, 3);
    c = sk_philox_round(c, low, high, 4);
    c = sk_philox_round(c, low, high, 5);
    c = sk_philox_round(c, low, high, 6);
    c = sk_philox_round(c, low, high, 7);
    c = sk_philox_round(c, low, high, 8);
    return sk_philox_round(c, low, high, 9);
}

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
