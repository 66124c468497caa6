/* What a descriptor says of its elements, whatever the operator: their dtype, and the memory that
 * they take. No function here fails. */
#pragma once
#include <stdbool.h>

#include "contract.h"

/* ---- dtypes ---- */

/* X(dtype, name in PyTorch and NumPy, code, bits) of each that kernels know. */
#define SK_DTYPES(X)           \
    X(F16, "float16", 2, 16)   \
    X(BF16, "bfloat16", 4, 16) \
    X(F32, "float32", 2, 32)   \
    X(F64, "float64", 2, 64)   \
    X(BOOL, "bool", 6, 8)      \
    X(I64, "int64", 0, 64)     \
    X(I32, "int32", 0, 32)

/* SK_DT_OTHER: one that no kernel knows. */
static inline enum sk_dtype sk_dtype_of(selfkd_dtype d) {
    switch ((uint32_t)d.lanes << 16 | (uint32_t)d.bits << 8 | d.code) {
#define SK_DTYPE(dtype, name, code, bits) \
    case 1 << 16 | (bits) << 8 | (code):  \
        return SK_DT_##dtype;
        SK_DTYPES(SK_DTYPE)
#undef SK_DTYPE
    default:
        return SK_DT_OTHER;
    }
}
selfkd_dtype sk_dtype_to(enum sk_dtype dtype);
int64_t sk_dtype_size(enum sk_dtype dtype); /* bytes */
/* The name that PyTorch and NumPy have for a dtype; valid until the next call of this thread. */
const char *sk_dtype_name(selfkd_dtype dtype);

/* ---- addresses ---- */

bool sk_is_empty(const selfkd_tensor *t);
char *sk_data(const selfkd_tensor *t); /* the address of element 0; NULL: the tensor is empty */
bool sk_has_distinct_elements(const selfkd_tensor *t); /* no two are known to share memory */

/* The memory of a tensor that is not empty, from its lowest address to where its last byte ends. */
typedef struct sk_window {
    int64_t begin, end;
} sk_window;

/* Leaves the window of a tensor; false: not all of it lies between 0 and 2^63. */
bool sk_find_window(const selfkd_tensor *t, sk_window *window);
static inline bool sk_are_apart(sk_window a, sk_window b) {
    return a.end <= b.begin || b.end <= a.begin;
}
/* Whether two tensors that are not empty are apart although their windows are not: two column
 * blocks of one matrix, or every other element. */
bool sk_are_interleaved(const selfkd_tensor *a, const selfkd_tensor *b);

/* ---- strides ---- */

/* Strides of a new contiguous tensor; 0 where they leave 64 bits, which a check refuses later. */
void sk_compact_strides(int ndim, const int64_t *size, int64_t *stride);
/* Strides of a new tensor like `t`, as PyTorch gives them. */
void sk_strides_like(const selfkd_tensor *t, int64_t *stride);
/* Whether one stride steps through the dimensions from `from` on; leaves it (1 for one element). */
bool sk_merged_stride(const selfkd_tensor *t, int from, int64_t *stride);
