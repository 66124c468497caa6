/* The rules for tensors: which are accepted, and the sentence for a tensor that is not.
 * The Python package applies the same rules with the same words (bindings/selfkd/contract.py); a
 * test compares them. */
#include "check.h"

#include <stdio.h>

#include "memory.h"

/* ---- dtype and device ---- */

static int check_dtype(const sk_call *call, int item) {
    const sk_item *const it = &call->op->items[item];
    const enum sk_dtype found = sk_dtype_of(call->tensor[item].dtype);
    const enum sk_dtype expected = sk_expected_dtype(call, item);
    const bool floating =
        it->rule == SK_FLOATING || it->rule == SK_CONSTANT || it->rule == SK_TEACHER;
    const bool weight = it->rule == SK_WEIGHT, same = it->rule == SK_SAME;
    const bool classes = it->rule == SK_CLASSES;
    if (floating ? found <= SK_DT_F64
                 : found == expected || (weight && found == SK_DT_BOOL) ||
                       (classes && found == SK_DT_I32))
        return SELFKD_OK;
    char has[32]; /* sk_dtype_name() is called twice */
    snprintf(has, sizeof has, "%s", sk_dtype_name(call->tensor[item].dtype));
    const int like = it->kind == SK_LIKE ? it->place : call->first;
    return sk_fail(SELFKD_ERROR_TYPE, "%s: %s has dtype %s, expected %s%s%s", call->op->name,
                   it->name, has,
                   floating  ? "float16, bfloat16, float32 or float64"
                   : classes ? "int32 or int64"
                             : sk_dtype_name(sk_dtype_to(expected)),
                   weight ? " or bool"
                   : same ? " like "
                          : "",
                   same ? call->op->items[like].name : "");
}

/* "cpu" or "cuda:1" */
static const char *write_device(selfkd_device d, char *text, size_t room) {
    snprintf(text, room, d.device_type == SELFKD_CUDA ? "cuda:%d" : "cpu", d.device_id);
    return text;
}

static int check_device(const sk_call *call, int item) {
    const selfkd_device d = call->tensor[item].device, e = sk_device_of(call);
    const char *const op = call->op->name, *const name = call->op->items[item].name;
    if (d.device_type != SELFKD_CPU && d.device_type != SELFKD_CUDA)
        return sk_fail(SELFKD_ERROR_TYPE, "%s: %s is on device type %d, expected cpu or cuda", op,
                       name, d.device_type);
    if (d.device_type == e.device_type &&
        (d.device_type == SELFKD_CPU || d.device_id == e.device_id))
        return SELFKD_OK;
    char found[32], expected[32];
    return sk_fail(SELFKD_ERROR_TYPE, "%s: %s is on %s, expected %s like %s", op, name,
                   write_device(d, found, sizeof found), write_device(e, expected, sizeof expected),
                   call->op->items[call->first].name);
}

/* ---- memory ---- */

/* Only a C caller can get this wrong: a descriptor that describes no memory. Its dtype is known. Of
 * more than SK_MAX_RANK dimensions none is looked at, since check_rank() refuses them. */
static int check_descriptor(sk_call *call, int item) {
    const selfkd_tensor *const t = &call->tensor[item];
    const char *const op = call->op->name, *const name = call->op->items[item].name;
    const int64_t element = sk_dtype_size(sk_dtype_of(t->dtype));
    if (t->ndim < 0 || (t->ndim > 0 && !t->shape))
        return sk_fail(SELFKD_ERROR_VALUE, "%s: %s is no tensor (ndim %d)", op, name, t->ndim);
    if (t->ndim > SK_MAX_RANK) return SELFKD_OK;
    int64_t bytes = element;
    bool empty = false;
    for (int k = 0; k < t->ndim; k++) {
        const int64_t size = t->shape[k];
        empty = empty || size == 0;
        if (size < 0 || __builtin_mul_overflow(bytes, size > 1 ? size : 1, &bytes))
            return sk_fail(SELFKD_ERROR_VALUE,
                           "%s: %s has size %lld in dimension %d, which is negative or too large",
                           op, name, (long long)size, k);
    }
    if (empty) return SELFKD_OK;
    if (!t->data) return sk_fail(SELFKD_ERROR_VALUE, "%s: %s has no data", op, name);
    call->window_of[call->windows] = item;
    if (!sk_find_window(t, &call->window[call->windows++]))
        return sk_fail(SELFKD_ERROR_VALUE,
                       "%s: %s has strides or a byte_offset that leave the address space", op,
                       name);
    if (((uintptr_t)t->data + t->byte_offset) & (uintptr_t)(element - 1)) /* a power of two */
        return sk_fail(SELFKD_ERROR_VALUE,
                       "%s: %s has data that is not aligned to its elements of %d bytes", op, name,
                       (int)element);
    return SELFKD_OK;
}

int sk_check_contiguous(const sk_call *call, int item) {
    const selfkd_tensor *const t = &call->tensor[item];
    int64_t expected[SK_MAX_RANK];
    sk_compact_strides(t->ndim, t->shape, expected);
    for (int k = t->ndim - 1; k >= 0 && !sk_is_empty(t); k--)
        if (t->shape[k] > 1 && t->strides[k] != expected[k])
            return sk_fail(SELFKD_ERROR_VALUE,
                           "%s: %s has stride %lld in dimension %d, expected %lld, of a contiguous "
                           "tensor",
                           call->op->name, call->op->items[item].name, (long long)t->strides[k], k,
                           (long long)expected[k]);
    return SELFKD_OK;
}

int sk_check_own_memory(const sk_call *call, int item) {
    const sk_item *const items = call->op->items;
    int own = call->windows - 1, shared = SK_MAX_ITEMS;
    while (own >= 0 && call->window_of[own] != item) own--;
    if (own < 0) return SELFKD_OK; /* absent or empty */
    if (items[item].kind != SK_OUT && !sk_has_distinct_elements(&call->tensor[item]))
        return sk_fail(SELFKD_ERROR_VALUE,
                       "%s: %s has elements that share memory, expected memory of its own",
                       call->op->name, items[item].name);
    for (int k = 0; k < call->windows; k++) {
        const int other = call->window_of[k];
        if (sk_are_apart(call->window[own], call->window[k]) || k == own ||
            sk_are_interleaved(&call->tensor[item], &call->tensor[other]))
            continue;
        if (other < shared) shared = other;
    }
    if (shared == SK_MAX_ITEMS) return SELFKD_OK;
    return sk_fail(SELFKD_ERROR_VALUE, "%s: %s shares memory with %s, expected memory of its own",
                   call->op->name, items[item].name, items[shared].name);
}

/* ---- shape ---- */

static int check_rank(const sk_call *call, int item, int fixed, bool trailing) {
    const int found = call->tensor[item].ndim;
    const bool open = trailing && call->trailing_rank < 0; /* any number follows */
    const int least = fixed + (trailing && !open ? call->trailing_rank : 0);
    const bool fits = open ? found >= least : found == least;
    if (fits && found <= SK_MAX_RANK) return SELFKD_OK;
    return sk_fail(SELFKD_ERROR_VALUE, "%s: %s has %d dimension%s, expected %s%d", call->op->name,
                   call->op->items[item].name, found, found == 1 ? "" : "s",
                   fits   ? "at most "
                   : open ? "at least "
                          : "",
                   fits ? SK_MAX_RANK : least);
}

/* The sentence for dimension k, which has a letter, as kernels and formulas call it, or a number.
 */
static int wrong_size(const sk_call *call, int item, const char *shape, int k, const char *least,
                      int64_t expected) {
    const bool letter = k < sk_fixed_rank(shape) && shape[k] >= 'A';
    char dimension[16];
    snprintf(dimension, sizeof dimension, letter ? "%c" : "%d", letter ? shape[k] : k);
    return sk_fail(SELFKD_ERROR_VALUE, "%s: %s has size %lld in dimension %s, expected %s%lld",
                   call->op->name, call->op->items[item].name,
                   (long long)call->tensor[item].shape[k], dimension, least, (long long)expected);
}

/* Enters the sizes of letters and trailing dimensions that are not known yet; compares the others.
 */
static int check_sizes(sk_call *call, int item, const char *shape, int fixed, bool trailing) {
    const selfkd_tensor *const t = &call->tensor[item];
    for (int k = 0; k < t->ndim; k++) {
        const int letter = k < fixed ? shape[k] - 'A' : -1;
        if (letter >= 0 && !call->bound[letter]) {
            call->bound[letter] = true;
            call->params.dims.size[letter] = t->shape[k];
            if (shape[k] == 'C' && t->shape[k] == 0)
                return wrong_size(call, item, shape, k, "at least ", 1);
            continue;
        }
        if (k >= fixed && call->trailing_rank < 0) break;
        const int64_t expected =
            letter >= 0 ? call->params.dims.size[letter] : sk_size_at(call, shape, k);
        if (t->shape[k] != expected) return wrong_size(call, item, shape, k, "", expected);
    }
    if (!trailing || call->trailing_rank >= 0) return SELFKD_OK;
    call->trailing_rank = t->ndim - fixed;
    call->trailing = t->ndim > fixed ? t->shape + fixed : NULL;
    int64_t *const merged = &call->params.dims.size['S' - 'A'];
    *merged = 1;
    for (int k = fixed; k < t->ndim; k++) *merged *= t->shape[k];
    return SELFKD_OK;
}

int sk_check_tensor(sk_call *call, int item) {
    const sk_item *const it = &call->op->items[item];
    int status = check_dtype(call, item);
    if (!status) status = check_device(call, item);
    if (!status) status = check_descriptor(call, item);
    if (status || (it->kind == SK_GRAD && call->tensor[item].ndim == 0)) return status;
    const char *const shape = sk_shape_of(call->op, item);
    const int fixed = sk_fixed_rank(shape);
    const bool trailing = shape[fixed] == '*';
    status = check_rank(call, item, fixed, trailing);
    if (!status) status = check_sizes(call, item, shape, fixed, trailing);
    const int64_t classes = call->params.dims.size['C' - 'A'];
    if (!status && it->rule == SK_CLASSES &&
        (call->tensor[item].shape[1] < 1 || call->tensor[item].shape[1] > SK_MOST_LISTED))
        return sk_fail(SELFKD_ERROR_VALUE, "%s: %s has size %lld in dimension K, expected 1 to %d",
                       call->op->name, it->name, (long long)call->tensor[item].shape[1],
                       SK_MOST_LISTED);
    if (!status && (it->rule == SK_INDEX || it->rule == SK_CLASSES) &&
        classes > INT32_MAX) /* kernels keep a class in 32 bits */
        return sk_fail(SELFKD_ERROR_VALUE, "%s: %s has %lld classes, expected at most %d",
                       call->op->name, it->name, (long long)classes, INT32_MAX);
    return status;
}
