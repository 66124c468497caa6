/* What cpu/<op>.c implements and core runs. A kernel is pure: pointers, counts and strides in,
 * results out.
 *
 * Every cpu/<op>.c is compiled once per variant: SK_VARIANT is base, v3, v4 (f16, bf16 and f32
 * tensors, arithmetic in `real` = float) or f64 (float64 tensors, `real` = double,
 * SK_REAL_IS_DOUBLE). */
#pragma once
#include <stdint.h>

#include "core/contract.h"

/* The work of one call: `count` independent tasks of about `cost` elements. `path` names the loop
 * that runs. */
typedef struct sk_work {
    int64_t count;
    int64_t cost;
    const char *path;
} sk_work;

/* A row whose value is wrong, in the tensor at offset `item` of the parameters; row -1: none. */
typedef struct sk_bad {
    int64_t row;
    size_t item;
    double value;
} sk_bad;

typedef struct sk_cpu_kernel {
    sk_work (*work)(const void *params);
    void (*rows)(const void *params, int64_t begin, int64_t end);
    void (*finish)(const void *params);      /* on one thread, after all tasks; may be NULL */
    sk_bad (*first_bad)(const void *params); /* before all tasks; may be NULL */
} sk_cpu_kernel;

enum sk_isa { SK_ISA_BASE, SK_ISA_V3, SK_ISA_V4, SK_ISA_F64, SK_ISA_COUNT };

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
