/* From a checked call to a kernel: picks device, CPU variant and threads. And the C interface over
 * it. */
#include <stdio.h>
#include <string.h>

#include "op.h"

enum { GRAIN = 32768 }; /* elements below which a second thread costs more than it brings */

static _Thread_local char path[64] = "";

const char *selfkd_last_path(void) { return path; }

static int run_cpu(sk_call *call) {
    static const char *const names[] = {"base", "v3", "v4", "f64"};
    const void *const params = call->params.bytes;
    double scratch[SK_CPU_SCRATCH];
    for (int i = 0; i < call->op->count; i++)
        if (call->op->items[i].kind == SK_SCRATCH)
            ((sk_arg *)(call->params.bytes + call->op->items[i].in_params))->data = scratch;
    const bool f64 = sk_dtype_of(call->tensor[call->first].dtype) == SK_DT_F64;
    const enum sk_isa isa = f64 ? SK_ISA_F64 : sk_current_isa();
    const sk_cpu_kernel *const kernel = call->op->cpu[isa];
    const sk_work work = kernel->work(params);
    snprintf(path, sizeof path, "cpu %s %s", names[isa], work.path);
    const int status = sk_check_weights(call);
    if (status) return status;
    if (kernel->first_bad) {
        const sk_bad bad = kernel->first_bad(params);
        for (int i = 0; i < call->op->count && bad.row >= 0; i++)
            if (call->op->items[i].in_params == bad.item)
                return sk_fail_value(call, i, bad.row, bad.value);
    }
    sk_parallel(work.count, GRAIN / (work.cost + 1) + 1, kernel->tasks, params);
    if (kernel->finish) kernel->finish(params);
    return SELFKD_OK;
}

static int run_cuda(sk_call *call, void *stream) {
    const sk_op *const op = call->op;
    if (!op->cuda)
        return sk_fail(SELFKD_ERROR_CUDA, "%s: this build has no CUDA kernels; rebuild with nvcc",
                       op->name);
    int32_t previous = 0;
    int status = sk_cuda_enter(call->tensor[call->first].device.device_id, &previous);
    if (status) return status;
    snprintf(path, sizeof path, "cuda");
    void *scratch =
        NULL; /* given by the binding (PyTorch's allocator), or taken here for a C caller */
    for (int i = 0; i < op->count && !status; i++) {
        sk_arg *const arg = (sk_arg *)(call->params.bytes + op->items[i].in_params);
        if (op->items[i].kind != SK_SCRATCH || arg->data) continue;
        status = sk_cuda_allocate(op, &scratch, op->items[i].bytes, stream);
        arg->data = scratch;
    }
    if (!status) status = sk_cuda_error(op, op->cuda(call->params.bytes, stream));
    if (scratch) sk_cuda_free(scratch, stream);
    sk_cuda_leave(previous);
    return status;
}

int sk_run(sk_call *call, void *stream) {
    const int device = call->tensor[call->first].device.device_type;
    const int status = device == SELFKD_CPU ? run_cpu(call) : run_cuda(call, stream);
    if (!status) atomic_fetch_add_explicit(call->op->calls, 1, memory_order_relaxed);
    return status;
}

/* ---- the C interface ---- */

static int missing(const sk_op *op, const char *name) {
    return sk_fail(SELFKD_ERROR_VALUE, "%s: %s is NULL", op->name, name);
}

/* Copies a caller's descriptor into the call; compact strides are written out, so that the rest
 * need not ask. */
static void take(sk_call *call, int i, const selfkd_tensor *given, int64_t *compact) {
    selfkd_tensor *const t = &call->tensor[i];
    if (!given) {
        t->ndim = SK_ABSENT;
        return;
    }
    *t = *given;
    if (t->strides || t->ndim < 0 || t->ndim > SK_MAX_RANK || !t->shape) return;
    for (int64_t k = t->ndim - 1, next = 1; k >= 0; k--) {
        compact[k] = next;
        if (__builtin_mul_overflow(next, t->shape[k], &next)) next = 0; /* sk_check refuses it */
    }
    t->strides = compact;
}

/* The generated functions selfkd_<op>() end here. */
int sk_call_from_c(const sk_op *op, const void *args, void *stream) {
    if (!args) return missing(op, "args");
    uint32_t size;
    memcpy(&size, args, sizeof size);
    if (size < op->args_size)
        return sk_fail(SELFKD_ERROR_VALUE, "%s: struct_size is %u, expected at least %u", op->name,
                       (unsigned)size, (unsigned)op->args_size);
    sk_call call = {.op = op};
    int64_t compact[SK_MAX_ITEMS][SK_MAX_RANK];
    for (int i = 0; i < op->count; i++) {
        const sk_item *const it = &op->items[i];
        const char *const field = (const char *)args + it->in_args;
        if (it->kind >= SK_REAL) memcpy(&call.number[i], field, sizeof call.number[i]);
        if (it->kind >= SK_SCRATCH) continue;
        const selfkd_tensor *given;
        memcpy(&given, field, sizeof given);
        take(&call, i, given, compact[i]);
        if (!given && it->kind != SK_OPT && !(it->kind == SK_LIKE && sk_is_absent(&call, i)))
            return missing(op, it->name);
    }
    int status = sk_check(&call);
    for (int i = 0; i < op->count && !status; i++) {
        if (!sk_is_output(&op->items[i])) continue;
        status = sk_bind(&call, i);
        if (!status) status = sk_check_own_memory(&call, i);
    }
    return status ? status : sk_run(&call, stream);
}
