/* From a checked call to a kernel: picks the device, the CPU variant and the threads. And the C
 * interface, which fills, checks and binds a call first. */
#include "run.h"

#include <stdio.h>
#include <string.h>

#include "bind.h"
#include "check.h"
#include "device.h"
#include "memory.h"
#include "threads.h"
#include "values.h"

enum { GRAIN = 32768 }; /* elements below which a second thread costs more than it brings */

/* How the last call of this thread ran: words that are put together when somebody asks. */
static _Thread_local struct { const char *device, *variant, *loop; } path = {"", "", ""};

const char *selfkd_last_path(void) {
    static _Thread_local char text[64];
    snprintf(text, sizeof text, "%s%s%s", path.device, path.variant, path.loop);
    return text;
}

static int run_cpu(sk_call *call) {
    static const char *const names[] = {"base ", "v3 ", "v4 ", "f64 "};
    const void *const params = call->params.bytes;
    double scratch[SK_CPU_SCRATCH];
    for (int i = 0; i < call->op->count; i++)
        if (call->op->items[i].kind == SK_SCRATCH) sk_arg_of(call, i)->data = scratch;
    const bool f64 = sk_dtype_of(call->tensor[call->first].dtype) == SK_DT_F64;
    const enum sk_isa isa = f64 ? SK_ISA_F64 : sk_current_isa();
    const sk_cpu_kernel *const kernel = call->op->cpu[isa];
    const sk_work work = kernel->work(params);
    path.device = "cpu ", path.variant = names[isa], path.loop = work.path;
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

int sk_run(sk_call *call, void *stream) {
    const bool cpu = sk_device_of(call).device_type == SELFKD_CPU;
    const int status = cpu ? run_cpu(call) : sk_run_cuda(call, stream);
    if (status) return status;
    if (!cpu) path.device = "cuda", path.variant = path.loop = "";
    atomic_fetch_add_explicit(call->op->calls, 1, memory_order_relaxed);
    return SELFKD_OK;
}

/* ---- the C interface ---- */

static int missing(const sk_op *op, const char *name) {
    return sk_fail(SELFKD_ERROR_VALUE, "%s: %s is NULL", op->name, name);
}

/* Copies a caller's descriptor into the call; compact strides are written out, so that the rest
 * need not ask. */
static void fill(selfkd_tensor *t, const selfkd_tensor *given, int64_t *compact) {
    *t = given ? *given : (selfkd_tensor){.ndim = SK_ABSENT};
    if (t->strides || t->ndim < 0 || t->ndim > SK_MAX_RANK || !t->shape) return;
    sk_compact_strides(t->ndim, t->shape, compact);
    t->strides = compact;
}

int sk_call_from_c(const sk_op *op, const void *args, void *stream) {
    if (!args) return missing(op, "args");
    uint32_t size;
    memcpy(&size, args, sizeof size);
    if (size < op->args_size)
        return sk_fail(SELFKD_ERROR_VALUE, "%s: struct_size is %u, expected at least %u", op->name,
                       (unsigned)size, (unsigned)op->args_size);
    sk_call call; /* 5 KB, of which a call writes what it has; none is read before that */
    call.op = op;
    int64_t compact[SK_MAX_ITEMS][SK_MAX_RANK];
    for (int i = 0; i < op->count; i++) {
        const sk_item *const it = &op->items[i];
        const char *const field = (const char *)args + it->in_args;
        if (it->kind >= SK_REAL) memcpy(&call.number[i], field, sizeof call.number[i]);
        if (it->kind >= SK_SCRATCH) continue;
        const selfkd_tensor *given;
        memcpy(&given, field, sizeof given);
        fill(&call.tensor[i], given, compact[i]);
        if (!given && it->kind != SK_OPT && it->kind != SK_LIKE) return missing(op, it->name);
    }
    for (int i = 0; i < op->count; i++)
        if (op->items[i].kind == SK_LIKE && call.tensor[i].ndim == SK_ABSENT &&
            !sk_is_absent(&call, i))
            return missing(op, op->items[i].name);
    int status = sk_check(&call);
    for (int i = 0; i < op->count && !status; i++) {
        if (!sk_is_output(&op->items[i])) continue;
        if (sk_is_unwanted(&call, i) && call.tensor[i].ndim != SK_ABSENT)
            return sk_fail(SELFKD_ERROR_VALUE, "%s: %s is given, expected NULL, as needs_%s is 0",
                           op->name, op->items[i].name, op->items[i].shape);
        status = sk_bind(&call, i);
        if (!status) status = sk_check_own_memory(&call, i);
    }
    return status ? status : sk_run(&call, stream);
}
