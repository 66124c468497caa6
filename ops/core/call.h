/* A call is one use of an operator on its way from a binding to a kernel, in four steps:
 *
 *   fill    the binding enters tensor[] and number[] of every input
 *   check   sk_check() accepts the inputs by the rules of the contract, or refuses the call with
 * one sentence; an accepted call knows its dtype, its device and the size of every letter bind
 * sk_bind() enters a tensor in `params`, as the kernel sees it: address, dtype, and a stride for
 * each character of its shape (sk_check() binds the inputs; the binding asks sk_output_like() what
 * each output must be, makes it and binds it) run     sk_run() hands `params` to the kernel of the
 * device
 */
#pragma once
#include "library.h"
#include "memory.h"

enum { SK_ABSENT = INT32_MIN };

typedef struct sk_call {
    const sk_op *op;
    selfkd_tensor tensor[SK_MAX_ITEMS]; /* ndim SK_ABSENT: an OPT that is not given */
    union {
        double real;
        int64_t integer;
    } number[SK_MAX_ITEMS];
    int first; /* index of the first FLOATING tensor, which gives the call its dtype and device */
    int trailing_rank;              /* how many dimensions a '*' stands for; -1: not known yet */
    const int64_t *trailing;        /* their sizes */
    bool bound[SK_LETTERS];         /* the letters whose size is known */
    int windows;                    /* how many tensors that are not empty were checked, */
    sk_window window[SK_MAX_ITEMS]; /* where they lie, */
    int window_of[SK_MAX_ITEMS];    /* and which items they are */
    union {
        sk_dims dims;
        max_align_t align;
        unsigned char bytes[SK_PARAMS_MAX];
    } params;
} sk_call;

/* What the kernel sees of a tensor. */
static inline sk_arg *sk_arg_of(const sk_call *call, int item) {
    return (sk_arg *)(call->params.bytes + call->op->items[item].in_params);
}

static inline selfkd_device sk_device_of(const sk_call *call) {
    return call->tensor[call->first].device;
}

/* The tensor that an item is measured by: itself; for a LIKE, its input. */
static inline int sk_model_of(const sk_op *op, int item) {
    return op->items[item].kind == SK_LIKE ? op->items[item].place : item;
}

/* Whether an item is an output LIKE an input that a BOOL needs_<input> says is not wanted. */
bool sk_is_unwanted(const sk_call *call, int item);

/* Whether an item is a tensor that is not there: an OPT that is not given, an output LIKE it, or
 * one that is not wanted. */
static inline bool sk_is_absent(const sk_call *call, int item) {
    return call->tensor[sk_model_of(call->op, item)].ndim == SK_ABSENT ||
           sk_is_unwanted(call, item);
}

/* The shape that the contract gives a tensor: its letters; for a LIKE, those of its input. */
static inline const char *sk_shape_of(const sk_op *op, int item) {
    return op->items[sk_model_of(op, item)].shape;
}

/* The number of its dimensions before a '*', and whether it ends with one. A shape is 4 characters
 * at most, for which string functions are a long way. */
static inline int sk_fixed_rank(const char *shape) {
    int k = 0;
    while (shape[k] && shape[k] != '*') k++;
    return k;
}
static inline bool sk_has_trailing(const char *shape) { return shape[sk_fixed_rank(shape)] == '*'; }

/* The size of dimension k of such a shape, and the dtype of an item that may have only one, in this
 * call. */
int64_t sk_size_at(const sk_call *call, const char *shape, int k);
enum sk_dtype sk_expected_dtype(const sk_call *call, int item);

/* Describes an output of a checked call: all but data. Its shape and strides point to SK_MAX_RANK
 * sizes each, which are written. An output LIKE an absent tensor is empty. */
void sk_output_like(const sk_call *call, int item, selfkd_tensor *output);
