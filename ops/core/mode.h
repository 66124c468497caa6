/* The floating-point mode of a thread: how it rounds, and whether denormals are flushed.
 * SK_FLUSHING lists the modes that flush less or more, for tests: none, then each set of bits. */
#pragma once
#include <stdint.h>

#if defined(__x86_64__)
#include <xmmintrin.h>
#define SK_FLUSHING 0, 0x8000, 0x8040 /* results; also what is read */
static inline uint64_t sk_mode(void) { return _mm_getcsr() & ~(unsigned)_MM_EXCEPT_MASK; }
static inline void sk_set_mode(uint64_t mode) { _mm_setcsr((unsigned)mode); }
#elif defined(__aarch64__)
#define SK_FLUSHING 0, 1 << 24
static inline uint64_t sk_mode(void) {
    uint64_t mode;
    __asm__ volatile("mrs %0, fpcr" : "=r"(mode));
    return mode;
}
static inline void sk_set_mode(uint64_t mode) { __asm__ volatile("msr fpcr, %0" ::"r"(mode)); }
#else
#define SK_FLUSHING 0
static inline uint64_t sk_mode(void) { return 0; }
static inline void sk_set_mode(uint64_t mode) { (void)mode; }
#endif
