/* What the contract says of the tensors of a call: shapes and dtypes. */
#include "call.h"

#include <string.h>

#include "memory.h"

bool sk_is_unwanted(const sk_call *call, int item) {
    const sk_op *const op = call->op;
    for (int i = 0; i < op->count && op->items[item].kind == SK_LIKE; i++) {
        const sk_item *const it = &op->items[i];
        if (sk_needs(it, op->items[item].shape) && call->number[i].integer == 0) return true;
    }
    return false;
}

/* The number of maps that a '#' stands for. */
static int count_maps(const sk_call *call) {
    int count = 0;
    for (int i = 0; i < call->op->count; i++) {
        const sk_item *const it = &call->op->items[i];
        const bool map = it->kind <= SK_OPT && (it->rule == SK_FLOATING || it->rule == SK_SAME);
        count += map && call->tensor[i].ndim != SK_ABSENT;
    }
    return count;
}

int64_t sk_size_at(const sk_call *call, const char *shape, int k) {
    const int fixed = sk_fixed_rank(shape);
    if (k >= fixed) return call->trailing[k - fixed];
    if (shape[k] == '#') return count_maps(call);
    return shape[k] <= '9' ? shape[k] - '0' : call->params.dims.size[shape[k] - 'A'];
}

enum sk_dtype sk_expected_dtype(const sk_call *call, int item) {
    const sk_item *const it = &call->op->items[item];
    const enum sk_dtype dtype = sk_dtype_of(call->tensor[call->first].dtype);
    switch (it->rule) {
    case SK_ACC:
    case SK_WEIGHT:
        return dtype == SK_DT_F64 ? SK_DT_F64 : SK_DT_F32;
    case SK_F64:
        return SK_DT_F64;
    case SK_INDEX:
    case SK_CLASSES:
    case SK_SEED:
        return SK_DT_I64;
    default:
        if (it->kind != SK_LIKE) return dtype;
        return sk_dtype_of(call->tensor[it->place].dtype);
    }
}

void sk_output_like(const sk_call *call, int item, selfkd_tensor *out) {
    const sk_item *const it = &call->op->items[item];
    out->device = sk_device_of(call);
    out->byte_offset = 0;
    if (it->kind == SK_OUT) {
        const int trailing = sk_has_trailing(it->shape) ? call->trailing_rank : 0;
        out->ndim = sk_fixed_rank(it->shape) + trailing;
        out->dtype = sk_dtype_to(sk_expected_dtype(call, item));
        for (int k = 0; k < out->ndim; k++) out->shape[k] = sk_size_at(call, it->shape, k);
        sk_compact_strides(out->ndim, out->shape, out->strides);
        return;
    }
    const selfkd_tensor *const t = &call->tensor[it->place];
    if (sk_is_absent(call, item)) {
        out->ndim = 1;
        out->dtype = call->tensor[call->first].dtype;
        out->shape[0] = 0;
        out->strides[0] = 1;
        return;
    }
    out->ndim = t->ndim;
    out->dtype = t->dtype;
    memcpy(out->shape, t->shape, (size_t)t->ndim * sizeof *t->shape);
    sk_strides_like(t, out->strides);
}
