/* Checks the items of a call in their order, and enters them in the kernel's parameters. */
#include "bind.h"

#include <string.h>

#include "check.h"
#include "memory.h"
#include "values.h"

/* The order is the contract's, but the first FLOATING tensor comes before the tensors that are
 * measured by it. */
int sk_check(sk_call *call) {
    const sk_op *const op = call->op;
    call->trailing_rank = -1;
    memset(call->bound, 0, sizeof call->bound);
    call->windows = 0;
    memset(&call->params, 0, op->params_size);
    call->first = 0;
    while (!sk_is_input(&op->items[call->first]) || op->items[call->first].rule != SK_FLOATING)
        call->first++;
    int status = sk_check_tensor(call, call->first);
    for (int i = 0; i < op->count && !status; i++) {
        const sk_item *const it = &op->items[i];
        if (sk_is_input(it) && i != call->first && call->tensor[i].ndim != SK_ABSENT)
            status = sk_check_tensor(call, i);
        if (it->kind < SK_REAL) continue;
        status = sk_check_number(call, i);
        memcpy(call->params.bytes + it->in_params, &call->number[i], sizeof call->number[i]);
    }
    for (int i = 0; i < op->count && !status; i++) {
        if (sk_is_input(&op->items[i])) status = sk_bind(call, i);
        if (op->items[i].kind == SK_INOUT && !status) status = sk_check_own_memory(call, i);
    }
    return status;
}

int sk_bind(sk_call *call, int item) {
    const sk_item *const it = &call->op->items[item];
    const selfkd_tensor *const t = &call->tensor[item];
    sk_arg *const arg = sk_arg_of(call, item);
    if (sk_is_absent(call, item)) return SELFKD_OK;
    int status = sk_is_output(it) ? sk_check_tensor(call, item) : SELFKD_OK;
    if (!status && it->kind == SK_OUT) status = sk_check_contiguous(call, item);
    if (status) return status;
    char *const data = sk_data(t);
    arg->data = data ? data : (void *)arg; /* of an empty tensor, since NULL means absent */
    arg->dtype = (int32_t)sk_dtype_of(t->dtype);
    if (it->kind == SK_GRAD && t->ndim == 0) return SELFKD_OK; /* strides of 0 */
    const int fixed = sk_fixed_rank(sk_shape_of(call->op, item));
    for (int k = 0; k < fixed; k++) arg->stride[k] = t->strides[k];
    if (fixed == t->ndim || sk_merged_stride(t, fixed, &arg->stride[fixed])) return SELFKD_OK;
    return sk_fail(
        SELFKD_ERROR_VALUE,
        "%s: %s has trailing dimensions whose strides cannot be merged; make it contiguous",
        call->op->name, it->name);
}
