/* The rules of the contracts: what is accepted, and the sentence for what is not.
 * The Python package applies the same rules with the same words (bindings/selfkd/contract.py); a
 * test compares them. */
#include <math.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>

#include "op.h"

static _Thread_local char message[512] = "";

const char *selfkd_message(void) { return message; }

int sk_fail(int status, const char *format, ...) {
    va_list list;
    va_start(list, format);
    vsnprintf(message, sizeof message, format, list);
    va_end(list);
    return status;
}

int sk_find_item(const sk_op *op, const char *name) {
    for (int i = 0; i < op->count; i++)
        if (strcmp(op->items[i].name, name) == 0) return i;
    return -1;
}

/* ---- dtypes ---- */

static const struct {
    const char *name;
    selfkd_dtype dtype;
} DTYPES[SK_DT_OTHER] = {
    [SK_DT_F16] = {"float16", {2, 16, 1}}, [SK_DT_BF16] = {"bfloat16", {4, 16, 1}},
    [SK_DT_F32] = {"float32", {2, 32, 1}}, [SK_DT_F64] = {"float64", {2, 64, 1}},
    [SK_DT_BOOL] = {"bool", {6, 8, 1}},    [SK_DT_I64] = {"int64", {0, 64, 1}},
};

enum sk_dtype sk_dtype_of(selfkd_dtype d) {
    for (int i = 0; i < SK_DT_OTHER; i++)
        if (DTYPES[i].dtype.code == d.code && DTYPES[i].dtype.bits == d.bits && d.lanes == 1)
            return i;
    return SK_DT_OTHER;
}

selfkd_dtype sk_dtype_to(enum sk_dtype dtype) { return DTYPES[dtype].dtype; }
int64_t sk_dtype_size(enum sk_dtype dtype) { return DTYPES[dtype].dtype.bits / 8; }

/* As PyTorch and NumPy call it; valid until the next call of this thread. */
static const char *dtype_name(selfkd_dtype d) {
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

static enum sk_dtype accumulator(const sk_call *call) {
    return sk_dtype_of(call->tensor[call->first].dtype) == SK_DT_F64 ? SK_DT_F64 : SK_DT_F32;
}

static int check_dtype(const sk_call *call, int item) {
    const sk_item *const it = &call->op->items[item];
    const enum sk_dtype found = sk_dtype_of(call->tensor[item].dtype);
    const char *const op = call->op->name, *const has = dtype_name(call->tensor[item].dtype);
    enum sk_dtype expected = SK_DT_F64;
    int like;
    switch (it->rule) {
    case SK_FLOATING:
    case SK_CONSTANT:
    case SK_TEACHER:
        if (found <= SK_DT_F64) return SELFKD_OK;
        return sk_fail(SELFKD_ERROR_TYPE,
                       "%s: %s has dtype %s, expected float16, bfloat16, float32 or float64", op,
                       it->name, has);
    case SK_SAME:
        like = it->kind == SK_LIKE ? sk_find_item(call->op, it->shape) : call->first;
        expected = sk_dtype_of(call->tensor[like].dtype);
        if (found == expected) return SELFKD_OK;
        return sk_fail(SELFKD_ERROR_TYPE, "%s: %s has dtype %s, expected %s like %s", op, it->name,
                       has, DTYPES[expected].name, call->op->items[like].name);
    case SK_WEIGHT:
        if (found == SK_DT_BOOL) return SELFKD_OK;
        expected = accumulator(call);
        if (found == expected) return SELFKD_OK;
        return sk_fail(SELFKD_ERROR_TYPE, "%s: %s has dtype %s, expected %s or bool", op, it->name,
                       has, DTYPES[expected].name);
    case SK_ACC:
        expected = accumulator(call);
        break;
    case SK_INDEX:
    case SK_SEED:
        expected = SK_DT_I64;
        break;
    default:
        break;
    }
    if (found == expected) return SELFKD_OK;
    return sk_fail(SELFKD_ERROR_TYPE, "%s: %s has dtype %s, expected %s", op, it->name, has,
                   DTYPES[expected].name);
}

static int check_device(const sk_call *call, int item) {
    const selfkd_device d = call->tensor[item].device, e = call->tensor[call->first].device;
    const char *const kind[] = {"device type 0", "cpu", "cuda"};
    const char *const op = call->op->name, *const name = call->op->items[item].name;
    if (d.device_type != SELFKD_CPU && d.device_type != SELFKD_CUDA)
        return sk_fail(SELFKD_ERROR_TYPE, "%s: %s is on device type %d, expected cpu or cuda", op,
                       name, d.device_type);
    if (d.device_type == e.device_type &&
        (d.device_type == SELFKD_CPU || d.device_id == e.device_id))
        return SELFKD_OK;
    char found[32], expected[32];
    const char *const form[] = {"%s", "%s:%d"};
    snprintf(found, sizeof found, form[d.device_type == SELFKD_CUDA], kind[d.device_type],
             d.device_id);
    snprintf(expected, sizeof expected, form[e.device_type == SELFKD_CUDA], kind[e.device_type],
             e.device_id);
    return sk_fail(SELFKD_ERROR_TYPE, "%s: %s is on %s, expected %s like %s", op, name, found,
                   expected, call->op->items[call->first].name);
}

/* ---- shapes ---- */

/* The number of single dimensions a shape names, before a final '*'. */
static int fixed_rank(const char *shape) {
    const int n = (int)strlen(shape);
    return n > 0 && shape[n - 1] == '*' ? n - 1 : n;
}

static bool has_trailing(const char *shape) { return shape[fixed_rank(shape)] == '*'; }

/* The shape of a tensor; of a LIKE that of its input. */
static const char *shape_of(const sk_op *op, int item) {
    const sk_item *const it = &op->items[item];
    return it->kind == SK_LIKE ? op->items[sk_find_item(op, it->shape)].shape : it->shape;
}

/* How many dimensions the '*' of this call stands for; 0 where no tensor has one. */
static int trailing_rank(const sk_call *call) {
    if (call->trailing < 0) return 0;
    return call->tensor[call->trailing].ndim - fixed_rank(call->op->items[call->trailing].shape);
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

static int check_rank(const sk_call *call, int item, const char *shape) {
    const int fixed = fixed_rank(shape), found = call->tensor[item].ndim;
    int expected = fixed;
    const char *least = "";
    if (has_trailing(shape)) {
        if (call->trailing >= 0) {
            expected += trailing_rank(call);
        } else if (found >= fixed) {
            expected = found;
        } else {
            least = "at least ";
        }
    }
    if (found == expected && found <= SK_MAX_RANK) return SELFKD_OK;
    if (found == expected) {
        expected = SK_MAX_RANK;
        least = "at most ";
    }
    return sk_fail(SELFKD_ERROR_VALUE, "%s: %s has %d dimension%s, expected %s%d", call->op->name,
                   call->op->items[item].name, found, found == 1 ? "" : "s", least, expected);
}

/* Enters the sizes of a tensor's letters, or compares them with what earlier tensors said. */
static int check_sizes(sk_call *call, int item, const char *shape) {
    const selfkd_tensor *const t = &call->tensor[item];
    const char *const op = call->op->name, *const name = call->op->items[item].name;
    const int fixed = fixed_rank(shape);
    for (int k = 0; k < fixed; k++) {
        const int letter = shape[k] - 'A';
        if (letter < 0) {
            const int size = shape[k] == '#' ? count_maps(call) : shape[k] - '0';
            if (t->shape[k] != size)
                return sk_fail(SELFKD_ERROR_VALUE,
                               "%s: %s has size %lld in dimension %d, expected %d", op, name,
                               (long long)t->shape[k], k, size);
        } else if (!call->bound[letter]) {
            if (shape[k] == 'C' && t->shape[k] == 0)
                return sk_fail(SELFKD_ERROR_VALUE,
                               "%s: %s has size 0 in dimension C, expected at least 1", op, name);
            call->bound[letter] = true;
            call->params.dims.size[letter] = t->shape[k];
        } else if (t->shape[k] != call->params.dims.size[letter]) {
            return sk_fail(
                SELFKD_ERROR_VALUE, "%s: %s has size %lld in dimension %c, expected %lld", op, name,
                (long long)t->shape[k], shape[k], (long long)call->params.dims.size[letter]);
        }
    }
    if (!has_trailing(shape)) return SELFKD_OK;
    if (call->trailing < 0) {
        int64_t merged = 1;
        for (int k = fixed; k < t->ndim; k++) merged *= t->shape[k];
        call->trailing = item;
        call->params.dims.size['S' - 'A'] = merged;
        return SELFKD_OK;
    }
    const int base = fixed_rank(call->op->items[call->trailing].shape);
    for (int k = fixed; k < t->ndim; k++) {
        const int64_t expected = call->tensor[call->trailing].shape[base + k - fixed];
        if (t->shape[k] != expected)
            return sk_fail(SELFKD_ERROR_VALUE,
                           "%s: %s has size %lld in dimension %d, expected %lld", op, name,
                           (long long)t->shape[k], k, (long long)expected);
    }
    return SELFKD_OK;
}

static int check_tensor(sk_call *call, int item) {
    const sk_item *const it = &call->op->items[item];
    int status = check_dtype(call, item);
    if (!status) status = check_device(call, item);
    if (!status) status = sk_check_descriptor(call, item);
    if (status || (it->kind == SK_GRAD && call->tensor[item].ndim == 0)) return status;
    const char *const shape = shape_of(call->op, item);
    status = check_rank(call, item, shape);
    if (!status) status = check_sizes(call, item, shape);
    const int64_t classes = call->params.dims.size['C' - 'A'];
    if (!status && it->rule == SK_INDEX && classes > INT32_MAX) /* what kernels keep of a class */
        return sk_fail(SELFKD_ERROR_VALUE, "%s: %s has %lld classes, expected at most %d",
                       call->op->name, it->name, (long long)classes, INT32_MAX);
    return status;
}

/* ---- numbers ---- */

static int count_choices(const char *names) {
    int n = 1;
    while ((names = strchr(names, '|')) != NULL) {
        names++;
        n++;
    }
    return n;
}

/* "none|mean|sum" as "0 (none), 1 (mean) or 2 (sum)" */
static const char *write_choices(const char *names, char *text, size_t room) {
    size_t used = 0;
    for (int n = 0; *names; n++) {
        const size_t length = strcspn(names, "|");
        const char *const before = n == 0 ? "" : names[length] ? ", " : " or ";
        used += (size_t)snprintf(text + used, room - used, "%s%d (%.*s)", before, n, (int)length,
                                 names);
        names += length + (names[length] != 0);
    }
    return text;
}

/* Choice `code` alone. */
static const char *write_choice(const char *names, int code, char *text, size_t room) {
    for (; code > 0; code--) names += strcspn(names, "|") + 1;
    snprintf(text, room, "%.*s", (int)strcspn(names, "|"), names);
    return text;
}

static int check_number(const sk_call *call, int item) {
    const sk_item *const it = &call->op->items[item];
    const double x =
        it->kind == SK_REAL ? call->number[item].real : (double)call->number[item].integer;
    const char *expected = NULL;
    if (it->rule == SK_POSITIVE && !(x > 0 && isfinite(x))) expected = "a finite number > 0";
    if (it->rule == SK_NONNEGATIVE && !(x >= 0 && isfinite(x))) expected = "a finite number >= 0";
    if (it->rule == SK_FRACTION && !(x >= 0 && x <= 1)) expected = "a number from 0 to 1";
    if (it->rule == SK_BELOW_ONE && !(x >= 0 && x < 1)) expected = "a number >= 0 and < 1";
    char choices[128];
    if ((it->kind == SK_CHOICE || it->kind == SK_RESIZE) &&
        !(x >= 0 && x < count_choices(it->shape)))
        expected = write_choices(it->shape, choices, sizeof choices);
    if (!expected) return SELFKD_OK;
    return sk_fail(SELFKD_ERROR_VALUE, "%s: %s is %g, expected %s", call->op->name, it->name, x,
                   expected);
}

/* Height and width of a RESIZE's input. */
static int check_resize(const sk_call *call, int item) {
    const sk_item *const it = &call->op->items[item];
    const int of = sk_find_item(call->op, it->of), code = (int)call->number[item].integer;
    for (int k = 2; k < 4 && call->tensor[of].ndim != SK_ABSENT; k++) {
        const long long found = call->tensor[of].shape[k], to = call->tensor[call->first].shape[k];
        char expected[64] = "";
        if (code == SK_RESIZE_NONE && found != to)
            snprintf(expected, sizeof expected, "%lld", to);
        else if (code == SK_RESIZE_MAXPOOL && (found + 1) / 2 != to)
            snprintf(expected, sizeof expected, "%lld or %lld", 2 * to - 1, 2 * to);
        else if (found == 0 && to > 0)
            snprintf(expected, sizeof expected, "at least 1");
        char choices[128];
        if (*expected)
            return sk_fail(SELFKD_ERROR_VALUE,
                           "%s: %s has size %lld in dimension %d, expected %s with %s %s",
                           call->op->name, it->of, found, k, expected, it->name,
                           write_choice(it->shape, code, choices, sizeof choices));
    }
    return SELFKD_OK;
}

/* ---- values ---- */

/* The sentence for row `row` of a tensor: an INDEX or TEACHER, whose kernel found it to be wrong,
 * or a WEIGHT. */
int sk_fail_value(const sk_call *call, int item, int64_t row, double value) {
    const sk_item *const it = &call->op->items[item];
    const int trailing = has_trailing(it->shape) ? trailing_rank(call) : 0;
    const int64_t *const size = call->tensor[item].shape + call->tensor[item].ndim - trailing;
    char place[SK_MAX_RANK * 24] = "", *end = place + sizeof place - 1;
    for (int k = trailing - 1; k >= -1; k--) { /* from the last dimension to the first, N */
        char digits[24];
        const int64_t at = k < 0 ? row : row % size[k];
        const int length =
            snprintf(digits, sizeof digits, "%lld%s", (long long)at, *end ? ", " : "");
        end -= length;
        memcpy(end, digits, (size_t)length);
        if (k >= 0) row /= size[k];
    }
    const char *const op = call->op->name;
    if (it->rule == SK_TEACHER)
        return sk_fail(SELFKD_ERROR_VALUE,
                       "%s: %s has probabilities that sum to %.4g at position [%s], expected 1", op,
                       it->name, value, end);
    if (it->rule == SK_WEIGHT)
        return sk_fail(SELFKD_ERROR_VALUE, "%s: %s is %g at position [%s], expected a number >= 0",
                       op, it->name, isnan(value) ? (double)NAN : value, end);
    const long long ignored = call->number[sk_find_item(call->op, "ignore_index")].integer;
    return sk_fail(SELFKD_ERROR_VALUE,
                   "%s: %s is %.0f at position [%s], expected 0 to %lld, or ignore_index, %lld", op,
                   it->name, value, end, (long long)call->params.dims.size['C' - 'A'] - 1, ignored);
}

static double weight_at(const sk_arg *x, int64_t at) {
    return x->dtype == SK_DT_F64 ? ((const double *)x->data)[at] : ((const float *)x->data)[at];
}

/* Which of n weights, `step` apart from `at` on, is the first that is negative or NaN; n if none
 * is. */
static int64_t first_negative(const sk_arg *x, int64_t at, int64_t step, int64_t n) {
    const float *const single = (const float *)x->data + at;
    const bool plain = x->dtype == SK_DT_F32 && step == 1; /* a loop that becomes vectors */
    int bad = 0;
    for (int64_t i = 0; i < n && plain; i++) bad |= !(single[i] >= 0);
    int64_t i = plain && !bad ? n : 0;
    while (i < n && weight_at(x, at + i * step) >= 0) i++;
    return i;
}

/* The weights of a checked call. Not those of a gradient's operator, which are the forward's, nor
 * of one that writes over its inputs, whose rows may come times an incoming gradient. */
int sk_check_weights(const sk_call *call) {
    const sk_op *const op = call->op;
    for (int i = 0; i < op->count; i++)
        if (op->items[i].kind == SK_GRAD || op->items[i].kind == SK_INOUT) return SELFKD_OK;
    const int64_t N = call->params.dims.size['N' - 'A'];
    for (int i = 0; i < op->count; i++) {
        const sk_arg *const x = (const sk_arg *)(call->params.bytes + op->items[i].in_params);
        if (!sk_is_input(&op->items[i]) || op->items[i].rule != SK_WEIGHT || !x->data) continue;
        const int64_t S = has_trailing(op->items[i].shape) ? call->params.dims.size['S' - 'A'] : 1;
        const bool merged = S == 1 || x->stride[0] == S * x->stride[1]; /* one run of N * S */
        const int64_t runs = merged ? 1 : N, length = merged ? N * S : S, step = x->stride[S > 1];
        for (int64_t n = 0; n < runs && x->dtype != SK_DT_BOOL; n++) {
            const int64_t at = n * x->stride[0], k = first_negative(x, at, step, length);
            if (k == length) continue;
            return sk_fail_value(call, i, n * S + k, weight_at(x, at + k * step));
        }
    }
    return SELFKD_OK;
}

/* ---- a call ---- */

/* The contract's order, but the first FLOATING tensor comes before those that are measured by it.
 */
int sk_check(sk_call *call) {
    const sk_op *const op = call->op;
    call->trailing = -1;
    memset(call->bound, 0, sizeof call->bound);
    memset(&call->params, 0, op->params_size);
    call->first = 0;
    while (!sk_is_input(&op->items[call->first]) || op->items[call->first].rule != SK_FLOATING)
        call->first++;
    int status = check_tensor(call, call->first);
    for (int i = 0; i < op->count && !status; i++) {
        const sk_item *const it = &op->items[i];
        if (sk_is_input(it) && i != call->first && call->tensor[i].ndim != SK_ABSENT)
            status = check_tensor(call, i);
        if (it->kind >= SK_REAL) {
            status = check_number(call, i);
            if (!status && it->kind == SK_RESIZE) status = check_resize(call, i);
            memcpy(call->params.bytes + it->in_params, &call->number[i], sizeof call->number[i]);
        }
    }
    for (int i = 0; i < op->count && !status; i++) {
        if (sk_is_input(&op->items[i])) status = sk_bind(call, i);
        if (op->items[i].kind == SK_INOUT && !status) status = sk_check_own_memory(call, i);
    }
    return status;
}

/* Strides of a new tensor like `t`, as PyTorch's: its own where it is dense, else compact in the
 * same order of dimensions. */
static void strides_like(const selfkd_tensor *t, int64_t *stride) {
    for (int k = 0; k < t->ndim; k++) {
        if (t->shape[k] > 0) continue;
        memcpy(stride, t->strides, (size_t)t->ndim * sizeof *stride); /* empty: as PyTorch does */
        return;
    }
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
    if (dense) memcpy(stride, t->strides, (size_t)t->ndim * sizeof *stride);
}

void sk_output_like(const sk_call *call, int item, sk_shape *out) {
    const sk_item *const it = &call->op->items[item];
    if (it->kind == SK_LIKE) {
        const selfkd_tensor *const t = &call->tensor[sk_find_item(call->op, it->shape)];
        if (t->ndim == SK_ABSENT) {
            *out = (sk_shape){
                .ndim = 1, .dtype = call->tensor[call->first].dtype, .stride = {1}}; /* empty */
            return;
        }
        out->ndim = t->ndim;
        out->dtype = t->dtype;
        memcpy(out->size, t->shape, (size_t)t->ndim * sizeof *out->size);
        strides_like(t, out->stride);
        return;
    }
    const int fixed = fixed_rank(it->shape);
    out->ndim = fixed;
    out->dtype = sk_dtype_to(it->rule == SK_F64   ? SK_DT_F64
                             : it->rule == SK_ACC ? accumulator(call)
                                                  : sk_dtype_of(call->tensor[call->first].dtype));
    for (int k = 0; k < fixed; k++) {
        const char c = it->shape[k];
        out->size[k] = c <= '9' ? c - '0' : call->params.dims.size[c - 'A'];
    }
    if (has_trailing(it->shape)) {
        const selfkd_tensor *const t = &call->tensor[call->trailing];
        for (int k = fixed_rank(call->op->items[call->trailing].shape); k < t->ndim; k++)
            out->size[out->ndim++] = t->shape[k];
    }
    for (int k = out->ndim - 1; k >= 0; k--) {
        const int64_t inner = k + 1 < out->ndim ? out->size[k + 1] : 1;
        out->stride[k] = k + 1 < out->ndim ? out->stride[k + 1] * (inner > 1 ? inner : 1) : 1;
    }
}

/* Whether an item is a tensor that is not there: an OPT that is not given, or what is LIKE it. */
bool sk_is_absent(const sk_call *call, int item) {
    const sk_item *const it = &call->op->items[item];
    const int of = it->kind == SK_LIKE ? sk_find_item(call->op, it->shape) : item;
    return call->tensor[of].ndim == SK_ABSENT;
}

/* Kernels write outputs one element after the other. */
static int check_compact(const sk_call *call, int item) {
    const selfkd_tensor *const t = &call->tensor[item];
    int64_t expected = 1;
    for (int k = t->ndim - 1; k >= 0 && sk_data(t); k--) {
        if (t->shape[k] > 1 && t->strides[k] != expected)
            return sk_fail(SELFKD_ERROR_VALUE,
                           "%s: %s has stride %lld in dimension %d, expected %lld, of a contiguous "
                           "tensor",
                           call->op->name, call->op->items[item].name, (long long)t->strides[k], k,
                           (long long)expected);
        expected *= t->shape[k];
    }
    return SELFKD_OK;
}

/* Enters a tensor in the kernel's parameters: its address, dtype, and a stride for each character
 * of its shape. */
int sk_bind(sk_call *call, int item) {
    const sk_item *const it = &call->op->items[item];
    const selfkd_tensor *const t = &call->tensor[item];
    sk_arg *const arg = (sk_arg *)(call->params.bytes + it->in_params);
    if (sk_is_absent(call, item)) return SELFKD_OK;
    int status = sk_is_output(it) ? check_tensor(call, item) : SELFKD_OK;
    if (!status && it->kind == SK_OUT) status = check_compact(call, item);
    if (status) return status;
    char *const data = sk_data(t);
    arg->data = data ? data : (void *)arg; /* an empty tensor's; NULL means absent */
    arg->dtype = (int32_t)sk_dtype_of(t->dtype);
    int fixed = t->ndim;
    if (has_trailing(shape_of(call->op, item))) fixed = t->ndim - trailing_rank(call);
    if (it->kind == SK_GRAD && t->ndim == 0) return SELFKD_OK;
    for (int k = 0; k < fixed; k++) arg->stride[k] = t->strides[k];
    if (fixed < t->ndim) arg->stride[fixed] = 1;
    if (!data) return SELFKD_OK;
    bool merged = false;
    int64_t expected = 0; /* the stride that would continue the dimensions merged so far */
    for (int k = t->ndim - 1; k >= fixed; k--) {
        if (t->shape[k] == 1) continue;
        if (!merged)
            arg->stride[fixed] = t->strides[k];
        else if (t->strides[k] != expected)
            return sk_fail(
                SELFKD_ERROR_VALUE,
                "%s: %s has trailing dimensions whose strides cannot be merged; make it contiguous",
                call->op->name, it->name);
        expected = t->strides[k] * t->shape[k];
        merged = true;
    }
    return SELFKD_OK;
}
