/* Dtypes, addresses and strides of a descriptor. */
#include "memory.h"

#include <stdio.h>
#include <string.h>

static const struct {
    const char *name;
    selfkd_dtype dtype;
} DTYPES[SK_DT_OTHER] = {
#define DTYPE(dtype, name, code, bits) [SK_DT_##dtype] = {name, {code, bits, 1}},
    SK_DTYPES(DTYPE)};

selfkd_dtype sk_dtype_to(enum sk_dtype dtype) { return DTYPES[dtype].dtype; }
int64_t sk_dtype_size(enum sk_dtype dtype) { return DTYPES[dtype].dtype.bits / 8; }

const char *sk_dtype_name(selfkd_dtype d) {
    static const char *const kind[] = {
        [0] = "int", [1] = "uint", [2] = "float", [4] = "bfloat", [5] = "complex"};
    static _Thread_local char name[24];
    const enum sk_dtype known = sk_dtype_of(d);
    if (known != SK_DT_OTHER) return DTYPES[known].name;
    if (d.code >= sizeof kind / sizeof *kind || !kind[d.code] || d.lanes != 1)
        return "an unsupported dtype";
    snprintf(name, sizeof name, "%s%d", kind[d.code], d.bits);
    return name;
}

/* ---- addresses ---- */

static int64_t magnitude(int64_t x) { return x < 0 ? -x : x; }
static int64_t bytes_of(const selfkd_tensor *t) { return sk_dtype_size(sk_dtype_of(t->dtype)); }

bool sk_is_empty(const selfkd_tensor *t) {
    for (int k = 0; k < t->ndim; k++)
        if (t->shape[k] == 0) return true;
    return false;
}

char *sk_data(const selfkd_tensor *t) {
    return sk_is_empty(t) ? NULL : (char *)t->data + t->byte_offset;
}

bool sk_find_window(const selfkd_tensor *t, sk_window *w) {
    const int64_t element = bytes_of(t);
    int64_t reach = element; /* from the first byte to the last, if all strides were positive */
    int64_t below = 0, above = element;
    for (int k = 0; k < t->ndim; k++) {
        int64_t all = t->strides[k];
        if (t->shape[k] == 1) continue;
        if (__builtin_mul_overflow(all, t->shape[k], &all) ||
            __builtin_mul_overflow(all, element, &all) || all == INT64_MIN ||
            __builtin_add_overflow(reach, magnitude(all), &reach))
            return false;
        const int64_t last = all - t->strides[k] * element; /* where the last one begins */
        below += last < 0 ? last : 0;
        above += last < 0 ? 0 : last;
    }
    uint64_t address;
    if (__builtin_add_overflow((uint64_t)(uintptr_t)t->data, t->byte_offset, &address) ||
        address > (uint64_t)(INT64_MAX - reach))
        return false;
    *w = (sk_window){(int64_t)address + below, (int64_t)address + above};
    return true;
}

/* The window of one period of a tensor in a repeated pattern: dimensions that step by whole periods
 * are left out. */
static sk_window window_in(const selfkd_tensor *t, int64_t period) {
    const int64_t data = (int64_t)(uintptr_t)sk_data(t);
    sk_window w = {data, data + bytes_of(t)};
    for (int k = 0; k < t->ndim; k++) {
        const int64_t step = t->strides[k] * bytes_of(t), reach = step * (t->shape[k] - 1);
        if (t->shape[k] == 1 || step % period == 0) continue;
        *(reach < 0 ? &w.begin : &w.end) += reach;
    }
    return w;
}

/* Whether a and b, both in a pattern that repeats with a stride of `of`, are apart in it. */
static bool interleave(const selfkd_tensor *a, const selfkd_tensor *b, const selfkd_tensor *of) {
    for (int k = 0; k < of->ndim; k++) {
        const int64_t period = magnitude(of->strides[k]) * bytes_of(of);
        if (of->shape[k] == 1 || period == 0) continue;
        const sk_window x = window_in(a, period), y = window_in(b, period);
        const int64_t gap = ((y.begin - x.begin) % period + period) % period;
        if (gap >= x.end - x.begin && gap <= period - (y.end - y.begin)) return true;
    }
    return false;
}

bool sk_are_interleaved(const selfkd_tensor *a, const selfkd_tensor *b) {
    return interleave(a, b, a) || interleave(a, b, b);
}

/* Elements are distinct if each dimension steps over all that the dimensions of smaller strides
 * reach. */
bool sk_has_distinct_elements(const selfkd_tensor *t) {
    unsigned left = 0;
    for (int k = 0; k < t->ndim && !sk_is_empty(t); k++) left |= (t->shape[k] > 1 ? 1u : 0u) << k;
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

/* ---- strides ---- */

void sk_compact_strides(int ndim, const int64_t *size, int64_t *stride) {
    int64_t next = 1;
    for (int k = ndim - 1; k >= 0; k--) {
        stride[k] = next;
        if (__builtin_mul_overflow(next, size[k] > 1 ? size[k] : 1, &next)) next = 0;
    }
}

/* Leaves compact strides in the order of the strides of `t`; returns whether `t` has these itself.
 */
static bool compact_in_order(const selfkd_tensor *t, int64_t *stride) {
    int order[SK_MAX_RANK]; /* smallest stride first; a stride of 0 tells nothing */
    for (int k = 0; k < t->ndim; k++) {
        order[k] = t->ndim - 1 - k;
        for (int at = k, before = k - 1; before >= 0; before--) {
            const int one = order[before], other = order[at];
            const int64_t gap = t->strides[one] - t->strides[other];
            if (t->strides[one] == 0 || t->strides[other] == 0) continue;
            if (gap < 0) break;
            if (gap == 0 && t->shape[one] <= t->shape[other]) continue;
            order[before] = other;
            order[at] = one;
            at = before;
        }
    }
    bool dense = true;
    int64_t next = 1;
    for (int k = 0; k < t->ndim; k++) {
        const int64_t size = t->shape[order[k]];
        stride[order[k]] = next;
        dense = dense && (size == 1 || t->strides[order[k]] == next);
        next *= size;
    }
    return dense;
}

/* PyTorch gives a new tensor the strides of `t` where it is empty or dense. A size of 1 has any
 * stride. */
void sk_strides_like(const selfkd_tensor *t, int64_t *stride) {
    if (sk_is_empty(t) || compact_in_order(t, stride))
        memcpy(stride, t->strides, (size_t)t->ndim * sizeof *stride);
}

bool sk_merged_stride(const selfkd_tensor *t, int from, int64_t *stride) {
    int64_t next = 0; /* the stride that would continue the dimensions merged so far */
    bool merged = false;
    *stride = 1;
    for (int k = t->ndim - 1; k >= from && !sk_is_empty(t); k--) {
        if (t->shape[k] == 1) continue;
        if (merged && t->strides[k] != next) return false;
        if (!merged) *stride = t->strides[k];
        merged = true;
        next = t->strides[k] * t->shape[k];
    }
    return true;
}
