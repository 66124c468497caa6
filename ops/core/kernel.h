/* What a CPU kernel is to the core, which runs it. A kernel is pure: pointers, counts and strides
 * in, results out. */
#pragma once
#include <stdint.h>

#include "contract.h"

/* The work of one call: `count` independent tasks of about `cost` elements. `path`, a literal,
 * names the loop that runs. */
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
    void (*tasks)(const void *params, int64_t begin, int64_t end);
    void (*finish)(const void *params);      /* on one thread, after all tasks; may be NULL */
    sk_bad (*first_bad)(const void *params); /* before all tasks; may be NULL */
} sk_cpu_kernel;

enum sk_isa { SK_ISA_BASE, SK_ISA_V3, SK_ISA_V4, SK_ISA_F64, SK_ISA_COUNT };
