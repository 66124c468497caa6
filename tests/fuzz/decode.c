/* From bytes to a call: first one as the contract wants it, so that kernels are reached, then any
 * number of faults in it. */
#include <math.h>
#include <string.h>

#include "core/bind.h"
#include "core/memory.h"
#include "fuzz.h"

typedef struct source {
    const uint8_t *data;
    size_t left;
} source;

static uint8_t byte(source *s) {
    if (s->left == 0) return 0;
    s->left--;
    return *s->data++;
}

static int64_t word(source *s) {
    uint64_t x = 0;
    for (int i = 0; i < 8; i++) x = x << 8 | byte(s);
    return (int64_t)x;
}

/* Sizes may be anything: what no int64_t holds wraps around. */
static int64_t times(int64_t a, int64_t b) { return (int64_t)((uint64_t)a * (uint64_t)b); }

/* ---- as the contract wants it ---- */

typedef struct plan {
    int64_t size[SK_LETTERS];
    int64_t trailing[4];
    int trailing_rank;
    enum sk_dtype dtype;
    int maps; /* what '#' stands for */
} plan;

static int item_of(const sk_op *op, const char *name) {
    int i = 0;
    while (strcmp(op->items[i].name, name) != 0) i++;
    return i;
}

static int count_choices(const char *names) {
    int n = 1;
    for (; *names; names++) n += *names == '|';
    return n;
}

static void decode_number(source *s, fuzzed *f, int i) {
    static const double reals[] = {0.5, 1, 3, 0, 1e-6, 1e-30, 1e30, -1, NAN, INFINITY};
    static const int64_t integers[] = {0, -100, 1, 3, INT64_MAX, INT64_MIN};
    const sk_item *const it = &f->op->items[i];
    const uint8_t b = byte(s);
    if (it->kind == SK_REAL)
        f->number[i].real = reals[b % (sizeof reals / sizeof *reals)];
    else if (it->kind == SK_INT)
        f->number[i].integer = integers[b % (sizeof integers / sizeof *integers)];
    else if (it->kind == SK_BOOL)
        f->number[i].integer = b % 2;
    else
        f->number[i].integer = b % count_choices(it->shape);
}

/* Height and width of a resized input, such that its RESIZE accepts them. */
static void plan_resize(source *s, const fuzzed *f, int i, int first, plan *p) {
    const char *const of = f->op->items[item_of(f->op, f->op->items[i].of)].shape;
    for (int k = 2; k < 4; k++) {
        const int64_t to = p->size[f->op->items[first].shape[k] - 'A'];
        int64_t *const from = &p->size[of[k] - 'A'];
        if (f->number[i].integer == SK_RESIZE_NONE) *from = to;
        if (f->number[i].integer == SK_RESIZE_MAXPOOL)
            *from = times(2, to) - (to > 0 && to < MOST_BYTES && byte(s) % 2);
    }
}

static enum sk_dtype dtype_by_rule(source *s, int rule, enum sk_dtype call) {
    const enum sk_dtype acc = call == SK_DT_F64 ? SK_DT_F64 : SK_DT_F32;
    switch (rule) {
    case SK_ACC:
        return acc;
    case SK_F64:
        return SK_DT_F64;
    case SK_WEIGHT:
        return byte(s) % 2 ? SK_DT_BOOL : acc;
    case SK_CONSTANT:
    case SK_TEACHER:
        return byte(s) % 4;
    case SK_CLASSES:
        return byte(s) % 2 ? SK_DT_I32 : SK_DT_I64;
    case SK_INDEX:
    case SK_SEED:
        return SK_DT_I64;
    default:
        return call;
    }
}

static void shape_by_letters(const plan *p, const char *shape, argument *a) {
    int n = 0;
    for (; *shape && *shape != '*'; shape++)
        a->shape[n++] = *shape == '#'   ? p->maps
                        : *shape <= '9' ? *shape - '0'
                                        : p->size[*shape - 'A'];
    for (int k = 0; *shape == '*' && k < p->trailing_rank; k++) a->shape[n++] = p->trailing[k];
    a->tensor.ndim = n;
}

/* Strides that any caller may have: compact in some order of dimensions, with gaps, expanded,
 * reversed, or unspoken. */
static void lay_out(uint8_t layout, argument *a) {
    const int n = a->tensor.ndim;
    int64_t next = 1;
    for (int i = n - 1; i >= 0; i--) {
        const int k = layout % 8 == 1 && n > 1 ? (i + 1) % n : i; /* 1: dimension 0 last */
        a->strides[k] = next;
        next = times(next, a->shape[k] > 1 ? a->shape[k] : 1);
        if (layout % 8 == 2 && next < INT32_MAX) next += 1 + layout / 64;
        if (layout % 8 == 6 && n > 1 && i > 1) { /* 6: dimension 1 last, as channels_last */
            a->strides[i] = times(a->strides[i], a->shape[1] > 1 ? a->shape[1] : 1);
            next = times(a->strides[i], a->shape[i] > 1 ? a->shape[i] : 1);
        } else if (layout % 8 == 6 && n > 1 && i == 1) {
            a->strides[1] = 1;
        }
    }
    for (int k = 0; k < n; k++) {
        if (layout % 8 == 3) a->strides[k] = times(a->strides[k], 2);
        if (layout % 8 == 4 && layout >> (3 + k) & 1) a->strides[k] = 0;
        if (layout % 8 == 5 && layout >> (3 + k) & 1) a->strides[k] = times(a->strides[k], -1);
    }
    a->tensor.strides = layout % 8 == 7 ? NULL : a->strides;
}

static void decode_input(source *s, fuzzed *f, int i, const plan *p) {
    const sk_item *const it = &f->op->items[i];
    argument *const a = &f->argument[i];
    a->tensor.dtype = sk_dtype_to(dtype_by_rule(s, it->rule, p->dtype));
    shape_by_letters(p, it->shape, a);
    const uint8_t layout = byte(s);
    if (it->kind == SK_GRAD && layout >= 192) a->tensor.ndim = 0;
    lay_out(layout, a);
    a->values = byte(s);
}

/* As the binding makes them, if the core accepts the inputs. */
static void decode_outputs(source *s, fuzzed *f, const plan *p) {
    static sk_call call; /* for its outputs' shapes; addresses are not followed */
    memset(&call, 0, sizeof call);
    call.op = f->op;
    for (int i = 0; i < f->op->count; i++) {
        argument *const a = &f->argument[i];
        if (f->op->items[i].kind >= SK_REAL) memcpy(&call.number[i], &f->number[i], 8);
        call.tensor[i] = a->tensor;
        call.tensor[i].data = (void *)((uintptr_t)(i + 1) << 32);
        call.tensor[i].strides = a->strides;
        if (!a->given) call.tensor[i].ndim = SK_ABSENT;
    }
    const bool accepted = sk_check(&call) == SELFKD_OK;
    for (int i = 0; i < f->op->count; i++) {
        const sk_item *const it = &f->op->items[i];
        argument *const a = &f->argument[i];
        if (!sk_is_output(it)) continue;
        const int of = it->kind == SK_LIKE ? item_of(f->op, it->shape) : i;
        a->given = it->kind != SK_LIKE || f->argument[of].given;
        const uint8_t layout = byte(s);
        if (accepted) {
            a->tensor.strides = a->strides;
            sk_output_like(&call, i, &a->tensor);
        } else {
            a->tensor.dtype = sk_dtype_to(dtype_by_rule(s, it->rule, p->dtype));
            shape_by_letters(p, f->op->items[of].shape, a);
        }
        if (!accepted || layout >= 128) lay_out(layout, a);
    }
}

/* ---- faults ---- */

typedef struct fault {
    uint8_t kind, item, dimension, small;
    int64_t large;
} fault;

static void add_fault(const fault *of, fuzzed *f) {
    const int i = of->item % f->op->count, k = of->dimension % SK_MAX_RANK;
    argument *const a = &f->argument[i];
    selfkd_tensor *const t = &a->tensor;
    const uint8_t small = of->small;
    const int64_t large = of->large;
    /* clang-format off */
    switch (of->kind % 20) {
    case 0: a->given = !a->given; break;
    case 1: a->no_data = true; break;
    case 2: t->ndim = (int8_t)small; break;
    case 3: t->ndim = (int32_t)large; break;
    case 4: a->shape[k] = large; break;
    case 5: a->shape[k] = (int8_t)small; break;
    case 6: a->strides[k] = large; break;
    case 7: a->strides[k] = (int8_t)small; break;
    case 8: t->dtype.code = small; break;
    case 9: t->dtype.bits = small; break;
    case 10: t->dtype.lanes = small; break;
    case 11: t->device.device_type = (int8_t)(small < 128 ? small % 4 : small); break;
    case 12: t->device.device_id = (int8_t)small; break;
    case 13: t->byte_offset = (uint64_t)large; break;
    case 14: t->byte_offset = small; break;
    case 15: a->misplaced = small; break;
    case 16: a->shares = small % f->op->count; break;
    case 17: t->shape = NULL; break;
    case 18: t->strides = t->strides ? NULL : a->strides; break;
    default: f->number[i].integer = large; break;
    }
    /* clang-format on */
}

void decode(const uint8_t *data, size_t size, fuzzed *f) {
    source s = {data, size};
    plan p = {.maps = 0};
    int operators = 0, first = 0;
    while (sk_ops[operators]) operators++;
    memset(f, 0, sizeof *f);
    f->op = sk_ops[byte(&s) % operators];
    f->struct_size = (uint32_t)f->op->args_size;
    const uint8_t faults = byte(&s);
    fault add[4];
    for (int n = 0; n < faults % 4; n++) {
        add[n].kind = byte(&s), add[n].item = byte(&s), add[n].dimension = byte(&s);
        add[n].small = byte(&s);
        add[n].large = add[n].kind & 0x80 ? word(&s) : 0;
    }
    if (faults == 254) f->struct_size = byte(&s);
    p.dtype = byte(&s) % 4;
    p.trailing_rank = byte(&s) % 5;
    for (int k = 0; k < SK_LETTERS; k++) p.size[k] = 3;
    for (int k = 0; k < 4; k++) p.trailing[k] = byte(&s) % 6;
    while (f->op->items[first].rule != SK_FLOATING) first++;
    const char *letters = f->op->items[first].shape;
    for (; *letters >= 'A'; letters++) {
        const uint8_t b = byte(&s);
        static const int64_t odd[] = {-1, INT64_MIN, INT64_MAX, INT64_MAX / 2, (int64_t)1 << 61};
        p.size[*letters - 'A'] = b < 128 ? b % 24 : b < 250 ? b : odd[b % 5];
    }
    for (int k = 0; k < 4; k++) p.size["DIKM"[k] - 'A'] = p.size["EJLQ"[k] - 'A'] = byte(&s) % 12;
    for (int i = 0; i < f->op->count; i++) {
        const sk_item *const it = &f->op->items[i];
        f->argument[i].shares = -1;
        f->argument[i].tensor.device.device_type = SELFKD_CPU;
        f->argument[i].tensor.shape = f->argument[i].shape;
        f->argument[i].given = sk_is_input(it) && (it->kind != SK_OPT || byte(&s) % 2);
        p.maps += f->argument[i].given && (it->rule == SK_FLOATING || it->rule == SK_SAME) &&
                  it->kind <= SK_OPT;
        if (it->kind >= SK_REAL) decode_number(&s, f, i);
    }
    for (int i = 0; i < f->op->count; i++)
        if (f->op->items[i].kind == SK_RESIZE) plan_resize(&s, f, i, first, &p);
    for (int i = 0; i < f->op->count; i++)
        if (sk_is_input(&f->op->items[i])) decode_input(&s, f, i, &p);
    decode_outputs(&s, f, &p);
    for (int i = 0; i < f->op->count && faults == 252; i++)
        f->argument[i].tensor.device.device_type = SELFKD_CUDA;
    for (int n = 0; n < faults % 4; n++) add_fault(&add[n], f);
}
