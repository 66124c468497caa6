/* The rules of the contracts themselves: what the core and the kernels take for granted of the
 * items of an operator. A contract that breaks one would read memory that is not there. They are
 * looked at once, when the library is loaded, and by the tests of random contracts
 * (tests/fuzz/contracts.c). */
#include "catalogue.h"

#include <stdio.h>
#include <string.h>

#include "library.h"

#define FAIL(op, it, expected) fail_item(op, (it)->name, expected)

static int fail_item(const sk_op *op, const char *item, const char *expected) {
    return sk_fail(SELFKD_ERROR_VALUE, "%s: the contract of %s is wrong: expected %s", op->name,
                   item, expected);
}

/* The item of that name, or NULL. */
static const sk_item *item_of(const sk_op *op, const char *name) {
    const int i = name ? sk_find_item(op, name) : -1;
    return i < 0 ? NULL : &op->items[i];
}

/* The shape of an input or output; of a LIKE, that of its input. */
static const char *shape_of(const sk_op *op, const sk_item *it) {
    return it->kind == SK_LIKE ? item_of(op, it->shape)->shape : it->shape;
}

static bool has_shape(const sk_item *it) { return it->kind >= SK_IN && it->kind <= SK_OUT; }
static bool is_required(const sk_item *it) { return it->kind == SK_IN || it->kind == SK_INOUT; }

/* Whether a call always has an input with this character in its shape. */
static bool is_bound(const sk_op *op, char c) {
    for (int i = 0; i < op->count; i++)
        if (is_required(&op->items[i]) && strchr(op->items[i].shape, c)) return true;
    return false;
}

/* ---- tensors ---- */

static int check_shape(const sk_op *op, const sk_item *it) {
    const char *const shape = it->shape;
    const size_t n = strlen(shape);
    if (n > sizeof((sk_arg){0}.stride) / sizeof(int64_t))
        return FAIL(op, it, "a shape of at most 4 characters");
    for (size_t k = 0; k < n; k++) {
        const char c = shape[k];
        if (c == '*' && k + 1 == n) continue;
        if (c == '#' && it->kind != SK_OUT) continue;
        if (c == 'S' || !((c >= 'A' && c <= 'Z') || (c >= '0' && c <= '9')))
            return FAIL(
                op, it,
                "a shape of capital letters but S, digits, '#' of an input and a final '*'");
    }
    if (it->kind != SK_OUT) return SELFKD_OK;
    for (size_t k = 0; k < n; k++)
        if (shape[k] > '9' ? !is_bound(op, shape[k]) : shape[k] == '*' && !is_bound(op, '*'))
            return FAIL(op, it, "dimensions that an IN or INOUT has");
    return SELFKD_OK;
}

static int check_rule(const sk_op *op, const sk_item *it) {
    char kind[64];
    switch (it->rule) {
    case SK_FLOATING:
    case SK_CONSTANT:
    case SK_TEACHER:
    case SK_SEED:
        if (it->kind == SK_GRAD || it->kind == SK_OUT)
            return FAIL(op, it, "the dtype SAME, ACC or F64");
        if (it->rule == SK_FLOATING && it->kind == SK_OPT)
            return FAIL(op, it, "an IN or INOUT, as the first FLOATING tensor may not be absent");
        if (it->rule != SK_TEACHER) return SELFKD_OK;
        snprintf(kind, sizeof kind, "%s_kind", it->name);
        const sk_item *const named = item_of(op, kind);
        return named && named->kind == SK_CHOICE ? SELFKD_OK
                                                 : FAIL(op, it, "a CHOICE <name>_kind beside it");
    case SK_SAME:
    case SK_ACC:
    case SK_F64:
        return SELFKD_OK;
    case SK_WEIGHT:
    case SK_INDEX:
        if (it->kind != SK_IN && it->kind != SK_OPT) return FAIL(op, it, "an IN or OPT");
        if (it->rule == SK_INDEX && !is_bound(op, 'C'))
            return FAIL(op, it, "an IN or INOUT with classes, C");
        if (strcmp(it->shape, "N") == 0 || strcmp(it->shape, "N*") == 0) return SELFKD_OK;
        return FAIL(op, it, "the shape N or N*");
    case SK_CLASSES:
        if (it->kind == SK_IN && is_bound(op, 'C') &&
            (strcmp(it->shape, "NK") == 0 || strcmp(it->shape, "NK*") == 0))
            return SELFKD_OK;
        return FAIL(op, it, "an IN of shape NK or NK*, and an IN or INOUT with classes, C");
    default:
        return FAIL(op, it, "a dtype that there is");
    }
}

/* What a LIKE or RESIZE names is an input. */
static int check_named(const sk_op *op, const sk_item *it, const char *name) {
    const sk_item *const of = item_of(op, name);
    if (!of || !(is_required(of) || of->kind == SK_OPT) || of != &op->items[it->place])
        return FAIL(op, it, "the name of an IN, INOUT or OPT, and its place");
    return SELFKD_OK;
}

/* ---- numbers ---- */

static int check_range(const sk_op *op, const sk_item *it) {
    const bool any = it->rule == SK_ANY || it->kind == SK_REAL || it->kind == SK_INT;
    return any && it->rule >= SK_ANY && it->rule <= SK_BELOW_ONE
               ? SELFKD_OK
               : FAIL(op, it, "a range that there is, of a BOOL ANY");
}

static int check_choices(const sk_op *op, const sk_item *it) {
    const char *const names = it->shape;
    if (!names || !*names || *names == '|' || names[strlen(names) - 1] == '|' ||
        strstr(names, "||") || strlen(names) > 64)
        return FAIL(op, it, "names with a | between them, 64 characters at most");
    if (it->kind == SK_CHOICE) return SELFKD_OK;
    if (strcmp(names, "none|nearest|bilinear|maxpool") != 0)
        return FAIL(op, it, "the names none|nearest|bilinear|maxpool");
    const int status = check_named(op, it, it->of);
    if (status) return status;
    for (int i = 0; i < op->count; i++) { /* its input, and the first FLOATING tensor */
        const sk_item *const x = &op->items[i];
        const bool image = strcmp(x->name, it->of) == 0 || (has_shape(x) && x->rule == SK_FLOATING);
        if (image && (strlen(x->shape) != 4 || strchr(x->shape, '*')))
            return FAIL(op, it, "images, of shape NCHW");
    }
    return SELFKD_OK;
}

/* ---- an operator ---- */

static int check_item(const sk_op *op, const sk_item *it) {
    if (item_of(op, it->name) != it) return FAIL(op, it, "a name of its own");
    if (it->in_params > SK_PARAMS_MAX - sizeof(sk_arg) || it->in_params < sizeof(sk_dims))
        return FAIL(op, it, "a place in the kernel's parameters");
    switch (it->kind) {
    case SK_IN:
    case SK_INOUT:
    case SK_OPT:
    case SK_GRAD:
    case SK_OUT: {
        const int status = check_shape(op, it);
        return status ? status : check_rule(op, it);
    }
    case SK_LIKE:
        return check_named(op, it, it->shape);
    case SK_SCRATCH:
        return it->bytes > 0 ? SELFKD_OK : FAIL(op, it, "some bytes");
    case SK_REAL:
    case SK_INT:
    case SK_BOOL:
        return check_range(op, it);
    default:
        return check_choices(op, it);
    }
}

int sk_check_contract(const sk_op *op) {
    int count[SK_RESIZE + 1] = {0};
    bool floating = false, index = false;
    if (op->count < 1 || op->count > SK_MAX_ITEMS)
        return sk_fail(SELFKD_ERROR_VALUE, "%s: the contract has %d items, expected 1 to %d",
                       op->name, op->count, SK_MAX_ITEMS);
    for (int i = 0; i < op->count; i++) {
        const sk_item *const it = &op->items[i];
        if (!it->name) return fail_item(op, "an item", "a name");
        if (it->kind < SK_IN || it->kind > SK_RESIZE) return FAIL(op, it, "a kind that there is");
        if (has_shape(it) && !it->shape) return FAIL(op, it, "a shape");
    }
    for (int i = 0; i < op->count; i++) {
        const sk_item *const it = &op->items[i];
        const int status = check_item(op, it);
        if (status) return status;
        if (++count[it->kind] > 1 && (it->kind == SK_GRAD || it->kind == SK_SCRATCH))
            return FAIL(op, it, "one GRAD and one SCRATCH at most");
        floating = floating || (is_required(it) && it->rule == SK_FLOATING);
        index = index || (has_shape(it) && it->rule == SK_INDEX);
        if (it->kind == SK_LIKE || it->kind >= SK_REAL || it->rule != SK_SAME) continue;
        if (!floating && has_shape(it) && it->kind != SK_GRAD && it->kind != SK_OUT)
            return FAIL(op, it, "the first FLOATING tensor before it");
    }
    if (!floating) return fail_item(op, "its tensors", "an IN or INOUT that is FLOATING");
    if (count[SK_OUT] + count[SK_LIKE] + count[SK_INOUT] == 0)
        return fail_item(op, "its tensors", "an OUT, LIKE or INOUT");
    const sk_item *const reduction = item_of(op, "reduction"), *const rows = item_of(op, "rows");
    if (reduction && count[SK_GRAD] == 0 && !(rows && rows->kind == SK_OUT))
        return FAIL(op, reduction, "an OUT rows beside it");
    const sk_item *const ignored = item_of(op, "ignore_index");
    if (index && !(ignored && ignored->kind == SK_INT))
        return fail_item(op, "its tensors", "an INT ignore_index beside an INDEX");
    return SELFKD_OK;
}

/* The shape of the result: of `rows`, one for each row, where there is a reduction, else of the
 * first output. */
static const char *result_shape(const sk_op *op) {
    const int rows = item_of(op, "reduction") ? sk_find_item(op, "rows") : -1;
    for (int i = 0; i < op->count && rows < 0; i++)
        if (sk_is_output(&op->items[i])) return shape_of(op, &op->items[i]);
    return rows < 0 ? "" : op->items[rows].shape;
}

/* A BOOL needs_<input> stands beside an output LIKE that input. */
static int check_needs(const sk_op *op, const sk_item *it) {
    if (it->kind != SK_BOOL || strncmp(it->name, "needs_", 6) != 0) return SELFKD_OK;
    for (int i = 0; i < op->count; i++) {
        const sk_item *const like = &op->items[i];
        if (like->kind == SK_LIKE && like->shape && sk_needs(it, like->shape)) return SELFKD_OK;
    }
    return FAIL(op, it, "the name of an input, after needs_, that an output is LIKE");
}

int sk_check_gradient(const sk_op *op, const sk_op *forward) {
    char grad[128];
    for (int i = 0; i < op->count; i++) {
        const sk_item *const it = &op->items[i], *other = item_of(forward, it->name);
        if (it->kind == SK_GRAD) {
            if (strcmp(it->shape, result_shape(forward)) != 0)
                return FAIL(op, it, "the shape of the forward operator's result");
        } else if (it->kind == SK_LIKE) {
            snprintf(grad, sizeof grad, "grad_%s", it->shape);
            other = item_of(forward, it->shape);
            if (strcmp(it->name, grad) != 0 || !other || !sk_is_input(other))
                return FAIL(op, it,
                            "the name grad_<input>, LIKE that input of the forward operator");
        } else if (it->kind >= SK_REAL) { /* one that is its own has a default */
            if (other && (other->kind != it->kind || other->rule != it->rule))
                return FAIL(op, it, "the kind and range that it has in the forward operator");
        } else if (sk_is_input(it)) {
            if (!other || other->kind > SK_LIKE)
                return FAIL(op, it, "the name of an input or output of the forward operator");
            if (strcmp(it->shape, shape_of(forward, other)) != 0)
                return FAIL(op, it, "the shape that it has in the forward operator");
        }
    }
    for (int i = 0; i < op->count; i++) {
        const int status = check_needs(op, &op->items[i]);
        if (status) return status;
    }
    return SELFKD_OK;
}

int sk_check_catalogue(void) {
    int status = SELFKD_OK;
    for (int i = 0; sk_ops[i] && !status; i++) {
        char name[128];
        const char *const end = strstr(sk_ops[i]->name, "_backward");
        status = sk_check_contract(sk_ops[i]);
        if (status || !end || strcmp(end, "_backward") != 0) continue;
        snprintf(name, sizeof name, "%.*s", (int)(end - sk_ops[i]->name), sk_ops[i]->name);
        const sk_op *const forward = sk_find(name);
        status = forward ? sk_check_gradient(sk_ops[i], forward)
                         : fail_item(sk_ops[i], "the operator", "a forward operator");
    }
    return status;
}

/* A library with such a contract is of no use to anybody, and its author looks at the terminal. */
__attribute__((constructor)) static void at_load(void) {
    if (sk_check_catalogue() == SELFKD_OK) return;
    fprintf(stderr, "selfkd: %s\n", selfkd_message());
    __builtin_trap();
}
