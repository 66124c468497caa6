/* An operator as the core sees it, and a call of it on its way from a binding to a kernel. */
#pragma once
#include <stdatomic.h>
#include <stdbool.h>

#include "kernel.h"
#include "selfkd.h"

typedef struct sk_op {
    const char *name;
    const char *text; /* what selfkd_describe() returns */
    const sk_item *items;
    int count;
    size_t args_size;
    size_t params_size;
    const sk_cpu_kernel *const *cpu; /* by enum sk_isa; NULL: not built for this machine */
    int (*cuda)(const void *params, void *stream); /* a cudaError_t; NULL: built without CUDA */
    void (*torch)(uint64_t *stack, uint64_t inputs, uint64_t outputs); /* boxed kernel */
    void (*torch_guard)(uint64_t *stack, uint64_t inputs,
                        uint64_t outputs); /* refuses calls in grad mode */
    _Atomic int64_t *calls;
} sk_op;

extern const sk_op
    *const sk_ops[]; /* NULL-terminated; generated from ops/ (cmake/operators.c.in) */
const sk_op *sk_find(const char *name);

/* One call. A binding fills tensor[] and number[] for the inputs, sk_check() accepts or refuses
 * them, sk_output_like() gives the outputs' descriptors, and sk_bind() enters each tensor in the
 * kernel's parameters. */
enum { SK_PARAMS_MAX = 2048, SK_ABSENT = INT32_MIN };

typedef struct sk_call {
    const sk_op *op;
    selfkd_tensor tensor[SK_MAX_ITEMS]; /* ndim SK_ABSENT: an OPT that is not given */
    union {
        double real;
        int64_t integer;
    } number[SK_MAX_ITEMS];
    int first;    /* index of the first FLOATING tensor: dtype, device and trailing dimensions */
    int trailing; /* index of the first tensor with '*', or -1 */
    bool bound[SK_LETTERS]; /* letters whose size is known */
    union {
        sk_dims dims;
        max_align_t align;
        unsigned char bytes[SK_PARAMS_MAX];
    } params;
} sk_call;

static inline bool sk_is_input(const sk_item *it) { return it->kind <= SK_GRAD; }
static inline bool sk_is_output(const sk_item *it) {
    return it->kind == SK_OUT || it->kind == SK_LIKE;
}

typedef struct sk_shape {
    int32_t ndim;
    selfkd_dtype dtype;
    int64_t size[SK_MAX_RANK];
    int64_t stride[SK_MAX_RANK];
} sk_shape;

/* The index of the item of that name; -1: there is none, which of a name in a contract cannot be.
 */
int sk_find_item(const sk_op *op, const char *name);

/* Whether a contract, or each of the catalogue, can be relied on (catalogue.c). */
int sk_check_contract(const sk_op *op);
int sk_check_catalogue(void);

int sk_check(sk_call *call);
void sk_output_like(const sk_call *call, int item, sk_shape *shape);
bool sk_is_absent(const sk_call *call, int item);
char *sk_data(const selfkd_tensor *tensor);
int sk_check_descriptor(const sk_call *call, int item);
int sk_check_own_memory(const sk_call *call, int item);
int sk_bind(sk_call *call, int item);
int sk_run(sk_call *call, void *stream);
int sk_check_weights(const sk_call *call);
int sk_fail_value(const sk_call *call, int item, int64_t row, double value);
int sk_call_from_c(const sk_op *op, const void *args, void *stream);
void sk_call_from_torch(const sk_op *op, uint64_t *stack);
void sk_guard_from_torch(const sk_op *op, uint64_t *stack);

enum sk_dtype sk_dtype_of(selfkd_dtype dtype);
selfkd_dtype sk_dtype_to(enum sk_dtype dtype);
int64_t sk_dtype_size(enum sk_dtype dtype);

/* Stores the sentence "<op>: ..." for selfkd_message() and returns `status`. */
int sk_fail(int status, const char *format, ...) __attribute__((format(printf, 2, 3)));

/* Runs tasks(params, begin, end) over [0, count) in pieces of at least `grain`, on PyTorch's
 * threads or our own. */
typedef void (*sk_part)(const void *params, int64_t begin, int64_t end);
typedef void (*sk_range)(int64_t begin, int64_t end, void *context);
void sk_parallel(int64_t count, int64_t grain, sk_part tasks, const void *params);
void sk_use_parallel_for(int (*parallel_for)(int64_t, int64_t, int64_t, sk_range, void *));
int sk_num_threads(void);

enum sk_isa sk_current_isa(void);

/* ops/core/device.c; without CUDA, sentences that say so. */
int sk_cuda_enter(int32_t device, int32_t *previous);
void sk_cuda_leave(int32_t previous);
int sk_cuda_error(const sk_op *op, int error);
int sk_cuda_allocate(const sk_op *op, void **data, int64_t bytes, void *stream);
void sk_cuda_free(void *data, void *stream);
