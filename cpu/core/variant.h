/* What differs between the builds of one kernel file: its names, its arithmetic, and what gcc
 * inlines.
 *
 * Every cpu/<op>.c is compiled once for each variant: SK_VARIANT is base, v3, v4 (f16, bf16 and f32
 * tensors, arithmetic in `real` = float) or f64 (float64 tensors, `real` = double,
 * SK_REAL_IS_DOUBLE). */
#pragma once
#include "core/kernel.h"

#define SK_JOIN_(a, b) a##_##b
#define SK_JOIN(a, b) SK_JOIN_(a, b)
/* SK_CPU(sd_dropout_kl) is sk_cpu_sd_dropout_kl_v3 in the v3 build of the file. */
#define SK_CPU(op) SK_JOIN(sk_cpu_##op, SK_VARIANT)

/* A function whose calls each get a copy of their own, with constant arguments folded in. */
#define SK_SPECIAL static inline __attribute__((always_inline))

/* A function that is never inlined: it has loops for every dtype or layout, or is large itself, and
 * gcc takes long over copies of it, and longer over what they make of a function. */
#define SK_OUTLINE static __attribute__((noinline, unused))

/* A function that few rows need: it is kept out of the loops of the others. */
#define SK_RARE static __attribute__((noinline, cold, unused))

#ifdef SK_REAL_IS_DOUBLE
typedef double real;
#else
typedef float real;
#endif
