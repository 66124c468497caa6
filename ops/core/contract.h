/* clang-format off */
/* The contract machinery: an operator is one X-list (see ops/<op>.h); everything else is derived.
 *
 * A row is X(kind, name, ...):
 *   IN      name, shape, dtype   input tensor
 *   INOUT   name, shape, dtype   tensor that is read and written over, in memory of its own (private
 *                                operators only)
 *   OPT     name, shape, dtype   input tensor that may be absent: NULL in C, a flag in torch.ops
 *   GRAD    name, shape, dtype   incoming gradient: that shape, or one 0-d value for all of it
 *   OUT     name, shape, dtype   output tensor, compact
 *   LIKE    name, input          output with the shape, dtype and strides of that input; of an OPT that
 *                                is absent, or where a BOOL needs_<input> is 0: NULL in C, empty in
 *                                torch.ops
 *   SCRATCH name, bytes          work space, one per call, not zeroed: on CUDA `bytes` on the caller's
 *                                stream, on the CPU SK_CPU_SCRATCH doubles
 *   REAL    name, rule, default  double
 *   INT     name, rule, default  int64
 *   BOOL    name, rule, default  int64 in C, bool in torch.ops
 *   CHOICE  name, names, default int64: which of the names ("none|mean|sum"), the first being 0;
 *                                a string in the Python function
 *   RESIZE  name, names, input   CHOICE of how height and width of that input come to those of the
 *                                first FLOATING tensor, default 0: SK_RESIZE_NONE equal already,
 *                                SK_RESIZE_MAXPOOL half of the input's, rounded up, else any
 * Defaults are the Python functions' (a test compares); a C caller fills every field.
 *
 * Shapes: a capital letter is a dimension (equal letters agree; C is at least 1), a digit that very
 * size, '#' (of an input) the number of FLOATING and SAME inputs given, and a final '*' stands for
 * all remaining dimensions, which the kernel sees merged into one, S (of size 1 where there are
 * none).
 *
 * Dtypes: FLOATING float16, bfloat16, float32 or float64; the first FLOATING tensor gives the call
 * its device and what the others are measured by: SAME its dtype, ACC float32 (float64 with
 * float64), WEIGHT ACC or bool. F64 is always float64. CONSTANT is any floating dtype, whatever the
 * call's, of a tensor that never gets a gradient; TEACHER the same, with classes that sum to 1 if
 * CHOICE <name>_kind says that it holds probabilities. INDEX is int64, each a class, 0 .. C - 1, or
 * the INT ignore_index. CLASSES is int32 or int64 of shape NK or NK*: of each row 1 to SK_MOST_LISTED
 * classes, no class twice, and -1 where there is none. A WEIGHT is >= 0 (of an operator with a GRAD or an INOUT it may be anything).
 * Values are looked at on the CPU only: weights by sk_check_weights(), teachers, indices and
 * classes by the kernel's `first_bad`. SEED is int64, of any value.
 *
 * Ranges of numbers: ANY, POSITIVE, NONNEGATIVE, FRACTION (0 to 1), BELOW_ONE (0 to 1, but not 1);
 * all finite. */
/* clang-format on */
#pragma once
#include <stddef.h>
#include <stdint.h>

#include "tensor.h"

enum sk_kind {
    SK_IN,
    SK_INOUT,
    SK_OPT,
    SK_GRAD,
    SK_OUT,
    SK_LIKE,
    SK_SCRATCH,
    SK_REAL,
    SK_INT,
    SK_BOOL,
    SK_CHOICE,
    SK_RESIZE
};

enum sk_dtype_rule {
    SK_FLOATING,
    SK_SAME,
    SK_ACC,
    SK_F64,
    SK_WEIGHT,
    SK_CONSTANT,
    SK_TEACHER,
    SK_INDEX,
    SK_CLASSES,
    SK_SEED
};

enum sk_number_rule { SK_ANY, SK_POSITIVE, SK_NONNEGATIVE, SK_FRACTION, SK_BELOW_ONE };

/* The names of a RESIZE in their order. */
enum sk_resize { SK_RESIZE_NONE, SK_RESIZE_NEAREST, SK_RESIZE_BILINEAR, SK_RESIZE_MAXPOOL };

enum { SK_MOST_LISTED = 4096 };
enum { SK_MAX_ITEMS = 40, SK_MAX_RANK = 8, SK_LETTERS = 26 };

/* Scratch of a reduction inside a kernel: one ticket (16 bytes), then `sums` doubles for each
 * block, of which a launch has at most so many. The emulator has few, so that small cases exceed
 * it. */
#ifndef SK_REDUCE_BLOCKS
#define SK_REDUCE_BLOCKS 4096
#endif
#define SK_REDUCE_BYTES_OF(sums) (16 + (sums)*8 * SK_REDUCE_BLOCKS)
#define SK_REDUCE_BYTES SK_REDUCE_BYTES_OF(2)
/* Before that scratch, tickets of groups of blocks: at most one group for each block. */
#define SK_TICKET_BYTES (4 * SK_REDUCE_BLOCKS)
#define SK_CPU_SCRATCH 1536

/* What a kernel sees of a tensor: strides in elements, one for each character of the shape. */
typedef struct sk_arg {
    void *data; /* NULL when an OPT tensor is absent */
    int64_t stride[4];
    int32_t dtype; /* enum sk_dtype */
} sk_arg;

/* Dimensions by letter; every kernel's parameter struct begins with them. */
typedef struct sk_dims {
    int64_t size[SK_LETTERS];
} sk_dims;
#define SK_DIM(params, letter) ((params)->dims.size[#letter[0] - 'A'])

typedef struct sk_item {
    const char *name;
    const char *shape; /* LIKE: the input's name; CHOICE, RESIZE: the names */
    const char *of;    /* RESIZE: the input's name */
    int32_t place;     /* LIKE, RESIZE: of that input among the items */
    int32_t kind;
    int32_t rule;     /* enum sk_dtype_rule or sk_number_rule */
    int64_t bytes;    /* SCRATCH */
    size_t in_args;   /* offset in the public argument struct */
    size_t in_params; /* offset in the kernel's parameter struct */
} sk_item;

/* clang-format off */

/* The struct a kernel receives: struct <op>_params. */
#define SK_FIELD(kind, ...) SK_FIELD_##kind(__VA_ARGS__)
#define SK_FIELD_IN(name, shape, dtype) sk_arg name;
#define SK_FIELD_INOUT(name, shape, dtype) sk_arg name;
#define SK_FIELD_OPT(name, shape, dtype) sk_arg name;
#define SK_FIELD_GRAD(name, shape, dtype) sk_arg name;
#define SK_FIELD_OUT(name, shape, dtype) sk_arg name;
#define SK_FIELD_LIKE(name, input) sk_arg name;
#define SK_FIELD_SCRATCH(name, bytes) sk_arg name;
#define SK_FIELD_REAL(name, rule, value) double name;
#define SK_FIELD_INT(name, rule, value) int64_t name;
#define SK_FIELD_BOOL(name, rule, value) int64_t name;
#define SK_FIELD_CHOICE(name, names, value) int64_t name;
#define SK_FIELD_RESIZE(name, names, input) int64_t name;
#define SK_PARAMS(op) \
    struct op##_params { \
        sk_dims dims; \
        op##_CONTRACT(SK_FIELD)    \
    };

/* The struct a C caller fills: selfkd_<op>_args; and the function that takes it. */
#define SK_PUBLIC(kind, ...) SK_PUBLIC_##kind(__VA_ARGS__)
#define SK_PUBLIC_IN(name, shape, dtype) const selfkd_tensor *name;
#define SK_PUBLIC_INOUT(name, shape, dtype) const selfkd_tensor *name;
#define SK_PUBLIC_OPT(name, shape, dtype) const selfkd_tensor *name;
#define SK_PUBLIC_GRAD(name, shape, dtype) const selfkd_tensor *name;
#define SK_PUBLIC_OUT(name, shape, dtype) const selfkd_tensor *name;
#define SK_PUBLIC_LIKE(name, input) const selfkd_tensor *name;
#define SK_PUBLIC_SCRATCH(name, bytes)
#define SK_PUBLIC_REAL(name, rule, value) double name;
#define SK_PUBLIC_INT(name, rule, value) int64_t name;
#define SK_PUBLIC_BOOL(name, rule, value) int64_t name;
#define SK_PUBLIC_CHOICE(name, names, value) int64_t name;
#define SK_PUBLIC_RESIZE(name, names, input) int64_t name;
#define SK_DECLARE(op) \
    typedef struct selfkd_##op##_args { \
        uint32_t struct_size; \
        op##_CONTRACT(SK_PUBLIC) \
    } selfkd_##op##_args; \
    SELFKD_API int selfkd_##op(const selfkd_##op##_args *args, void *stream);

/* Where an item is among the others: sk_at_<name>. */
#define SK_PLACE(kind, name, ...) sk_at_##name,

/* One row of the table that the checks, the schema and the bindings read. The op is in scope as
 * sk_args, sk_params and the places of its items. */
#define SK_ITEM(kind, ...) SK_ITEM_##kind(__VA_ARGS__)
#define SK_ITEM_TENSOR(k, n, s, r) \
    {.name = #n, .shape = s, .kind = k, .rule = r, \
     .in_args = offsetof(sk_args, n), .in_params = offsetof(sk_params, n)},
#define SK_ITEM_NUMBER(k, n, r) \
    {.name = #n, .kind = k, .rule = r, \
     .in_args = offsetof(sk_args, n), .in_params = offsetof(sk_params, n)},
#define SK_ITEM_IN(name, shape, dtype) SK_ITEM_TENSOR(SK_IN, name, shape, SK_##dtype)
#define SK_ITEM_INOUT(name, shape, dtype) SK_ITEM_TENSOR(SK_INOUT, name, shape, SK_##dtype)
#define SK_ITEM_OPT(name, shape, dtype) SK_ITEM_TENSOR(SK_OPT, name, shape, SK_##dtype)
#define SK_ITEM_GRAD(name, shape, dtype) SK_ITEM_TENSOR(SK_GRAD, name, shape, SK_##dtype)
#define SK_ITEM_OUT(name, shape, dtype) SK_ITEM_TENSOR(SK_OUT, name, shape, SK_##dtype)
#define SK_ITEM_LIKE(n, input) \
    {.name = #n, .shape = #input, .place = sk_at_##input, .kind = SK_LIKE, .rule = SK_SAME, \
     .in_args = offsetof(sk_args, n), .in_params = offsetof(sk_params, n)},
#define SK_ITEM_SCRATCH(n, b) \
    {.name = #n, .kind = SK_SCRATCH, .bytes = b, .in_params = offsetof(sk_params, n)},
#define SK_ITEM_REAL(name, rule, value) SK_ITEM_NUMBER(SK_REAL, name, SK_##rule)
#define SK_ITEM_INT(name, rule, value) SK_ITEM_NUMBER(SK_INT, name, SK_##rule)
#define SK_ITEM_BOOL(name, rule, value) SK_ITEM_NUMBER(SK_BOOL, name, SK_##rule)
#define SK_ITEM_CHOICE(n, names, value) \
    {.name = #n, .shape = names, .kind = SK_CHOICE, \
     .in_args = offsetof(sk_args, n), .in_params = offsetof(sk_params, n)},
#define SK_ITEM_RESIZE(n, names, input) \
    {.name = #n, .shape = names, .of = #input, .place = sk_at_##input, .kind = SK_RESIZE, \
     .in_args = offsetof(sk_args, n), .in_params = offsetof(sk_params, n)},

/* One line of selfkd_describe(): "IN u \"NC*\" FLOATING". */
#define SK_TEXT(kind, ...) SK_TEXT_(kind, __VA_ARGS__)
#define SK_TEXT_(kind, ...) #kind ", " #__VA_ARGS__ "\n"
