/* Philox for a vector of counters: ops/core/philox.h with 64 bits for each word, of which the
 * multiplication reads the lower half. gcc has an instruction for that and does not find it: it
 * widens and narrows words around a product of 64 bits, and takes 1.4 (base) to 2.3 times as long
 * (v3, v4). */
#pragma once
#include <stdint.h>
#include <string.h>

#include "core/philox.h"

#if defined __SSE2__
#include <immintrin.h>
#elif defined __ARM_NEON
#include <arm_neon.h>
#endif

#if defined __AVX512F__
typedef uint64_t sk_wide __attribute__((vector_size(64)));
static inline sk_wide sk_multiply_wide(sk_wide a, sk_wide b) {
    return (sk_wide)_mm512_mul_epu32((__m512i)a, (__m512i)b);
}
#elif defined __AVX2__
typedef uint64_t sk_wide __attribute__((vector_size(32)));
static inline sk_wide sk_multiply_wide(sk_wide a, sk_wide b) {
    return (sk_wide)_mm256_mul_epu32((__m256i)a, (__m256i)b);
}
#else
typedef uint64_t sk_wide __attribute__((vector_size(16)));
static inline sk_wide sk_multiply_wide(sk_wide a, sk_wide b) {
#if defined __SSE2__
    return (sk_wide)_mm_mul_epu32((__m128i)a, (__m128i)b);
#elif defined __ARM_NEON
    return (sk_wide)vmull_u32(vmovn_u64((uint64x2_t)a), vmovn_u64((uint64x2_t)b));
#else
    return (a & 0xffffffffu) * (b & 0xffffffffu);
#endif
}
#endif

static inline sk_wide sk_wide_of(uint64_t x) { return x - (sk_wide){0}; }

enum { SK_COUNTERS = sizeof(sk_wide) / 8 };

typedef struct sk_wide_words {
    sk_wide x, y, z, w;
} sk_wide_words;

#define SK_MULTIPLY_BY(a, constant) sk_multiply_wide(a, sk_wide_of(constant))
SK_PHILOX(sk_philox_wide, sk_wide_words, sk_wide, sk_wide, SK_MULTIPLY_BY)

/* The words of `blocks` blocks from `first` on, four each, and of those that complete a vector. */
static inline void sk_draw(uint64_t seed, uint32_t sample, uint64_t first, int64_t blocks,
                           uint32_t *word) {
    sk_wide block;
    for (uint64_t k = 0; k < SK_COUNTERS; k++) block[k] = first + k;
    for (int64_t i = 0; i < blocks; i += SK_COUNTERS) {
        const sk_wide_words counters = {block, block >> 32, sk_wide_of(sample), sk_wide_of(0)};
        const sk_wide_words c = sk_philox_wide(counters, seed);
        const sk_wide pair[2] = {(c.x & 0xffffffffu) | c.y << 32, (c.z & 0xffffffffu) | c.w << 32};
        uint64_t to[2 * SK_COUNTERS];
        for (int k = 0; k < SK_COUNTERS; k++) {
            to[2 * k] = pair[0][k];
            to[2 * k + 1] = pair[1][k];
        }
        memcpy(word + 4 * i, to, sizeof to);
        block += SK_COUNTERS;
    }
}
