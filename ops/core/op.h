/* An operator as the core sees it: its contract, which is a table of items, and its kernels. An
 * item is a row of the contract (contract.h): one argument or result, a tensor or a number. */
#pragma once
#include <stdatomic.h>
#include <stdbool.h>
#include <string.h>

#include "kernel.h"

enum { SK_PARAMS_MAX = 2048 }; /* bytes of a kernel's parameters */

typedef struct sk_op {
    const char *name;
    const char *text; /* what selfkd_describe() returns */
    const sk_item *items;
    int count;
    size_t args_size;
    size_t params_size;
    const sk_cpu_kernel *const *cpu; /* by enum sk_isa; NULL: not built for this machine */
    int (*cuda)(const void *params, void *stream); /* a cudaError_t; NULL: built without CUDA */
    void (*torch)(uint64_t *stack, uint64_t inputs, uint64_t outputs); /* PyTorch calls this */
    void (*torch_guard)(uint64_t *stack, uint64_t inputs,
                        uint64_t outputs); /* refuses calls in grad mode */
    _Atomic int64_t *calls;
} sk_op;

/* All operators, and a NULL after the last; CMake generates the table (cmake/operators.c.in). */
extern const sk_op *const sk_ops[];

static inline bool sk_is_input(const sk_item *it) { return it->kind <= SK_GRAD; }
static inline bool sk_is_output(const sk_item *it) {
    return it->kind == SK_OUT || it->kind == SK_LIKE;
}

/* Whether an item says if the output LIKE an input is wanted. */
static inline bool sk_needs(const sk_item *it, const char *input) {
    return it->kind == SK_BOOL && strncmp(it->name, "needs_", 6) == 0 &&
           strcmp(it->name + 6, input) == 0;
}
