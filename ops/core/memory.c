/* What a descriptor says of memory: that there is some, within the address space, aligned; and that
 * what is written has memory of its own. */
#include "op.h"

static bool is_empty(const selfkd_tensor *t) {
    for (int k = 0; k < t->ndim; k++)
        if (t->shape[k] == 0) return true;
    return false;
}

static int64_t magnitude(int64_t x) { return x < 0 ? -x : x; }
static int64_t bytes_of(const selfkd_tensor *t) { return sk_dtype_size(sk_dtype_of(t->dtype)); }

/* Of element 0; an empty tensor has none. */
char *sk_data(const selfkd_tensor *t) {
    return is_empty(t) ? NULL : (char *)t->data + t->byte_offset;
}

/* Whether all elements lie between the addresses 0 and 2^63, with room to count in. */
static bool has_addresses(const selfkd_tensor *t, int64_t *reach) {
    *reach = bytes_of(t);
    for (int k = 0; k < t->ndim; k++) {
        int64_t step = t->strides[k];
        if (t->shape[k] == 1) continue;
        if (__builtin_mul_overflow(step, t->shape[k], &step) ||
            __builtin_mul_overflow(step, bytes_of(t), &step) || step == INT64_MIN ||
            __builtin_add_overflow(*reach, magnitude(step), reach))
            return false;
    }
    uint64_t address;
    return !__builtin_add_overflow((uint64_t)(uintptr_t)t->data, t->byte_offset, &address) &&
           address <= (uint64_t)(INT64_MAX - *reach);
}

/* What only a C caller can get wrong: a descriptor that describes no memory. Its dtype is known;
 * more than 8 dimensions are not looked at, its rank being wrong. */
int sk_check_descriptor(const sk_call *call, int item) {
    const selfkd_tensor *const t = &call->tensor[item];
    const char *const op = call->op->name, *const name = call->op->items[item].name;
    if (t->ndim < 0 || (t->ndim > 0 && !t->shape))
        return sk_fail(SELFKD_ERROR_VALUE, "%s: %s is no tensor (ndim %d)", op, name, t->ndim);
    if (t->ndim > SK_MAX_RANK) return SELFKD_OK;
    int64_t bytes = bytes_of(t), reach;
    for (int k = 0; k < t->ndim; k++) {
        const int64_t size = t->shape[k];
        if (size < 0 || __builtin_mul_overflow(bytes, size > 1 ? size : 1, &bytes))
            return sk_fail(SELFKD_ERROR_VALUE,
                           "%s: %s has size %lld in dimension %d, which is negative or too large",
                           op, name, (long long)size, k);
    }
    if (is_empty(t)) return SELFKD_OK;
    if (!t->data) return sk_fail(SELFKD_ERROR_VALUE, "%s: %s has no data", op, name);
    if (!has_addresses(t, &reach))
        return sk_fail(SELFKD_ERROR_VALUE,
                       "%s: %s has strides or a byte_offset that leave the address space", op,
                       name);
    if ((uintptr_t)sk_data(t) % (uintptr_t)bytes_of(t) != 0)
        return sk_fail(SELFKD_ERROR_VALUE,
                       "%s: %s has data that is not aligned to its elements of %d bytes", op, name,
                       (int)bytes_of(t));
    return SELFKD_OK;
}

/* ---- memory of its own ---- */

/* From the lowest byte of a tensor, all of its bytes; or, of one that lies in a repeated pattern,
 * those of one period, which the dimensions that step by whole periods leave out. */
typedef struct window {
    int64_t begin, bytes;
} window;

static window window_of(const selfkd_tensor *t, int64_t period) {
    window w = {(int64_t)(uintptr_t)sk_data(t), bytes_of(t)};
    for (int k = 0; k < t->ndim; k++) {
        const int64_t step = t->strides[k] * bytes_of(t), reach = step * (t->shape[k] - 1);
        if (t->shape[k] == 1 || (period && step % period == 0)) continue;
        if (reach < 0) w.begin += reach;
        w.bytes += magnitude(reach);
    }
    return w;
}

/* Whether a and b, both in a pattern that repeats with a stride of `of`, are apart in it: two
 * column blocks of one matrix, every other element. */
static bool interleave(const selfkd_tensor *a, const selfkd_tensor *b, const selfkd_tensor *of) {
    for (int k = 0; k < of->ndim; k++) {
        const int64_t period = magnitude(of->strides[k]) * bytes_of(of);
        if (of->shape[k] == 1 || period == 0) continue;
        const window x = window_of(a, period), y = window_of(b, period);
        const int64_t gap = ((y.begin - x.begin) % period + period) % period;
        if (gap >= x.bytes && gap <= period - y.bytes) return true;
    }
    return false;
}

static bool apart(const selfkd_tensor *a, const selfkd_tensor *b) {
    if (is_empty(a) || is_empty(b)) return true;
    const window x = window_of(a, 0), y = window_of(b, 0);
    return x.begin + x.bytes <= y.begin || y.begin + y.bytes <= x.begin || interleave(a, b, a) ||
           interleave(a, b, b);
}

/* Whether each dimension steps over all that those of smaller strides reach. */
static bool has_distinct_elements(const selfkd_tensor *t) {
    unsigned left = 0;
    for (int k = 0; k < t->ndim && !is_empty(t); k++) left |= (t->shape[k] > 1 ? 1u : 0u) << k;
    for (int64_t reach = 0; left;) {
        int least = -1;
        for (int k = 0; k < t->ndim; k++)
            if (left >> k & 1 &&
                (least < 0 || magnitude(t->strides[k]) < magnitude(t->strides[least])))
                least = k;
        if (magnitude(t->strides[least]) <= reach) return false;
        reach += magnitude(t->strides[least]) * (t->shape[least] - 1);
        left &= ~(1u << least);
    }
    return true;
}

/* What is written has memory of its own for each element: none of an input's, none of an output's
 * that was checked before. */
int sk_check_own_memory(const sk_call *call, int item) {
    const sk_op *const op = call->op;
    const char *const name = op->items[item].name;
    if (sk_is_absent(call, item)) return SELFKD_OK;
    if (!has_distinct_elements(&call->tensor[item]))
        return sk_fail(SELFKD_ERROR_VALUE,
                       "%s: %s has elements that share memory, expected memory of its own",
                       op->name, name);
    for (int i = 0; i < op->count; i++) {
        const bool input = sk_is_input(&op->items[i]), output = sk_is_output(&op->items[i]);
        const bool checked = output && i < item && !sk_is_input(&op->items[item]);
        if (i == item || !(input || checked) || sk_is_absent(call, i) ||
            apart(&call->tensor[item], &call->tensor[i]))
            continue;
        return sk_fail(SELFKD_ERROR_VALUE,
                       "%s: %s shares memory with %s, expected memory of its own", op->name, name,
                       op->items[i].name);
    }
    return SELFKD_OK;
}
