/* The rules for numbers and values, and the sentences for those that are refused. */
#include "values.h"

#include <math.h>
#include <stdio.h>
#include <string.h>

/* ---- numbers ---- */

/* Whether there are more names than `code`; those after it are not looked at. */
static bool has_choice(const char *names, int64_t code) {
    for (; code > 0 && *names; names++) code -= *names == '|';
    return code == 0;
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

/* The name of choice `code` alone. */
static const char *write_choice(const char *names, int code, char *text, size_t room) {
    for (; code > 0; code--) names += strcspn(names, "|") + 1;
    snprintf(text, room, "%.*s", (int)strcspn(names, "|"), names);
    return text;
}

static int check_range(const sk_call *call, int item) {
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
        !has_choice(it->shape, call->number[item].integer))
        expected = write_choices(it->shape, choices, sizeof choices);
    if (!expected) return SELFKD_OK;
    return sk_fail(SELFKD_ERROR_VALUE, "%s: %s is %g, expected %s", call->op->name, it->name, x,
                   expected);
}

/* Height and width of the input of a RESIZE. */
static int check_size(const sk_call *call, int item) {
    const sk_item *const it = &call->op->items[item];
    const int of = it->place, code = (int)call->number[item].integer;
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

int sk_check_number(const sk_call *call, int item) {
    const int status = check_range(call, item);
    if (status || call->op->items[item].kind != SK_RESIZE) return status;
    return check_size(call, item);
}

/* ---- values ---- */

int sk_fail_value(const sk_call *call, int item, int64_t row, double value) {
    const sk_item *const it = &call->op->items[item];
    const int trailing = sk_has_trailing(it->shape) ? call->trailing_rank : 0;
    char place[SK_MAX_RANK * 24] = "", *end = place + sizeof place - 1;
    for (int k = trailing; k >= 0; k--) { /* from the last dimension to the first, N */
        const int64_t size = k > 0 ? call->trailing[k - 1] : INT64_MAX;
        char digits[24];
        const int length =
            snprintf(digits, sizeof digits, "%lld%s", (long long)(row % size), *end ? ", " : "");
        end -= length;
        memcpy(end, digits, (size_t)length);
        row /= size;
    }
    const char *const op = call->op->name;
    if (it->rule == SK_TEACHER)
        return sk_fail(SELFKD_ERROR_VALUE,
                       "%s: %s has probabilities that sum to %.4g at position [%s], expected 1", op,
                       it->name, value, end);
    if (it->rule == SK_WEIGHT)
        return sk_fail(SELFKD_ERROR_VALUE, "%s: %s is %g at position [%s], expected a number >= 0",
                       op, it->name, isnan(value) ? (double)NAN : value, end);
    const long long most = (long long)call->params.dims.size['C' - 'A'] - 1;
    if (it->rule == SK_CLASSES && value >= 0 && value <= (double)most)
        return sk_fail(SELFKD_ERROR_VALUE, "%s: %s has %.0f twice at position [%s], expected once",
                       op, it->name, value, end);
    if (it->rule == SK_CLASSES)
        return sk_fail(SELFKD_ERROR_VALUE,
                       "%s: %s has %.0f at position [%s], expected 0 to %lld, or -1", op, it->name,
                       value, end, most);
    const long long ignored = call->number[sk_find_item(call->op, "ignore_index")].integer;
    return sk_fail(SELFKD_ERROR_VALUE,
                   "%s: %s is %.0f at position [%s], expected 0 to %lld, or ignore_index, %lld", op,
                   it->name, value, end, most, ignored);
}

static double weight_at(const sk_arg *x, int64_t at) {
    return x->dtype == SK_DT_F64 ? ((const double *)x->data)[at] : ((const float *)x->data)[at];
}

/* Which of n weights, `step` apart from `at` on, is the first that is negative or NaN; n: none is.
 */
static int64_t first_negative(const sk_arg *x, int64_t at, int64_t step, int64_t n) {
    const float *const single = (const float *)x->data + at;
    const bool plain = x->dtype == SK_DT_F32 && step == 1; /* a loop that becomes vectors */
    int bad = 0;
    for (int64_t i = 0; i < n && plain; i++) bad |= !(single[i] >= 0);
    int64_t i = plain && !bad ? n : 0;
    while (i < n && weight_at(x, at + i * step) >= 0) i++;
    return i;
}

/* An operator with a GRAD has the weights that its forward operator was given. An operator with an
 * INOUT may get weights that were multiplied by an incoming gradient. Neither is looked at. */
static bool takes_any_weight(const sk_op *op) {
    for (int i = 0; i < op->count; i++)
        if (op->items[i].kind == SK_GRAD || op->items[i].kind == SK_INOUT) return true;
    return false;
}

int sk_check_weights(const sk_call *call) {
    const sk_op *const op = call->op;
    const int64_t N = call->params.dims.size['N' - 'A'];
    for (int i = 0; i < op->count; i++) {
        const sk_arg *const x = sk_arg_of(call, i);
        if (!sk_is_input(&op->items[i]) || op->items[i].rule != SK_WEIGHT || !x->data) continue;
        if (takes_any_weight(op)) return SELFKD_OK;
        const int64_t S =
            sk_has_trailing(op->items[i].shape) ? call->params.dims.size['S' - 'A'] : 1;
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
