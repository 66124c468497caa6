/* Calls every operator with any descriptors. Memory is exactly what a descriptor spans, so that
 * AddressSanitizer sees what lies outside; what lies between the elements is compared. The rules of
 * ops/selfkd.h are asked a second time here, element by element: a call that breaks one must be
 * refused, and a call that is refused must have written nothing. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "core/memory.h"
#include "fuzz.h"
#include "selfkd.h"

long reached, inputs;

#define REQUIRE(condition, f, ...)                                        \
    do {                                                                  \
        if (condition) break;                                             \
        fprintf(stderr, "%s: not true: %s: ", (f)->op->name, #condition); \
        fprintf(stderr, __VA_ARGS__);                                     \
        fprintf(stderr, " (%s)\n", selfkd_message());                     \
        abort();                                                          \
    } while (0)

/* ---- memory ---- */

enum verdict { FINE, REFUSED, TOO_LARGE }; /* REFUSED: must be */

__extension__ typedef __int128 wide; /* no product of two sizes leaves it */

typedef struct extent {
    wide begin, end; /* bytes, from element 0 */
    wide count;
} extent;

static int64_t stride_of(const argument *a, int k) {
    if (a->tensor.strides) return a->strides[k];
    int64_t next = 1;
    for (int j = k + 1; j < a->tensor.ndim; j++)
        if (__builtin_mul_overflow(next, a->shape[j], &next)) return 0;
    return next;
}

/* What a descriptor spans, or why it describes no tensor. */
static enum verdict measure(const argument *a, extent *e) {
    const selfkd_tensor *const t = &a->tensor;
    const wide limit = INT64_MAX;
    const enum sk_dtype dtype = sk_dtype_of(t->dtype);
    *e = (extent){0, 0, 1};
    if (t->ndim < 0 || t->ndim > SK_MAX_RANK || (t->ndim > 0 && !t->shape)) return REFUSED;
    if (dtype == SK_DT_OTHER || t->device.device_type != SELFKD_CPU) return REFUSED;
    const int64_t item = sk_dtype_size(dtype);
    wide product = item;
    for (int k = 0; k < t->ndim; k++) {
        if (a->shape[k] < 0) return REFUSED;
        e->count = a->shape[k] ? e->count : 0;
        product *= a->shape[k] ? a->shape[k] : 1;
        if (product > limit) return REFUSED;
    }
    if (e->count == 0) return FINE;
    e->count = product / item;
    for (int k = 0; k < t->ndim; k++) {
        const wide reach = (wide)stride_of(a, k) * (a->shape[k] - 1) * item;
        *(reach < 0 ? &e->begin : &e->end) += reach;
        if (e->end > limit || -e->begin > limit) return REFUSED;
    }
    e->end += item;
    if (a->no_data) return REFUSED;
    if (a->misplaced % item != 0) return REFUSED;
    return e->count > MOST_ELEMENTS || e->end - e->begin > MOST_BYTES ? TOO_LARGE : FINE;
}

static void fill(argument *a, unsigned char *to, size_t bytes) {
    const enum sk_dtype dtype = sk_dtype_of(a->tensor.dtype);
    uint64_t seed = a->values;
    for (size_t at = 0; at < bytes; at++) {
        seed = seed * 6364136223846793005u + 1442695040888963407u;
        const uint8_t raw = (uint8_t)(seed >> 56);
        to[at] = a->values % 4 == 0 ? 0 : raw;
        if (a->values % 4 == 1 && dtype == SK_DT_I64) to[at] = at % 8 == 0 ? raw % 3 : 0;
        if (a->values % 4 == 1 && dtype != SK_DT_I64 && at % 2 == 1) /* floats about 1 */
            to[at] = (uint8_t)((raw & 0x80) | 0x3f);
        if (a->values % 4 == 2 && dtype == SK_DT_F32) { /* 1/3: classes that sum to 1, often */
            const float third = 1.0f / 3;
            to[at] = ((const unsigned char *)&third)[at % 4];
        }
    }
}

/* Gives a tensor its memory: a block of its own, or a place in another's. */
static void allocate(fuzzed *f, int i, const extent *e) {
    argument *const a = &f->argument[i];
    selfkd_tensor *const t = &a->tensor;
    argument *const other = a->shares >= 0 && a->shares != i ? &f->argument[a->shares] : NULL;
    const size_t bytes = (size_t)(e->end - e->begin);
    if (other && other->block && other->bytes >= bytes + a->misplaced) {
        t->data = other->block + a->misplaced - (int64_t)e->begin;
    } else {
        a->bytes = bytes + a->misplaced;
        a->block = malloc(a->bytes ? a->bytes : 1);
        a->before = malloc(a->bytes ? a->bytes : 1);
        a->mark = calloc(a->bytes ? a->bytes : 1, 1);
        fill(a, a->block, a->bytes);
        memcpy(a->before, a->block, a->bytes);
        t->data = a->block + a->misplaced - (int64_t)e->begin;
        a->shares = -1;
    }
    t->data = (void *)((uintptr_t)t->data - t->byte_offset);
    if (a->no_data) t->data = NULL;
}

/* Visits the bytes of every element; false where an output finds one that is marked. */
static bool mark(fuzzed *f, int i, bool output) {
    argument *const a = &f->argument[i];
    const argument *const in = a->shares >= 0 ? &f->argument[a->shares] : a;
    const int64_t item = sk_dtype_size(sk_dtype_of(a->tensor.dtype));
    int64_t at[SK_MAX_RANK] = {0};
    bool alone = true;
    for (int k = 0; k < a->tensor.ndim; k++)
        if (a->shape[k] == 0) return true;
    for (int k = 0; k >= 0;) {
        int64_t offset =
            (unsigned char *)((uintptr_t)a->tensor.data + a->tensor.byte_offset) - in->block;
        for (int j = 0; j < a->tensor.ndim; j++) offset += at[j] * stride_of(a, j) * item;
        for (int64_t b = offset; b < offset + item; b++) {
            alone = alone && !(output && in->mark[b]);
            in->mark[b] |= output ? 2 : 1;
        }
        for (k = a->tensor.ndim - 1; k >= 0 && ++at[k] == a->shape[k]; k--) at[k] = 0;
    }
    return alone;
}

/* Whether the library must refuse the call for what its descriptors say. */
static enum verdict prepare(fuzzed *f) {
    enum verdict all = FINE;
    extent e[SK_MAX_ITEMS];
    for (int i = 0; i < f->op->count && all != TOO_LARGE; i++) {
        if (!f->argument[i].given || f->op->items[i].kind >= SK_SCRATCH) continue;
        const enum verdict one = measure(&f->argument[i], &e[i]);
        if (one != FINE) e[i].begin = e[i].end = 0;
        if (one != FINE) all = one;
    }
    if (all == TOO_LARGE) return all;
    for (int i = 0; i < f->op->count; i++)
        if (f->argument[i].given && f->op->items[i].kind < SK_SCRATCH) allocate(f, i, &e[i]);
    if (all == REFUSED) return all;
    for (int pass = 0; pass < 2; pass++) /* what is only read comes first */
        for (int i = 0; i < f->op->count; i++) {
            const bool output = sk_is_output(&f->op->items[i]) || f->op->items[i].kind == SK_INOUT;
            if (!f->argument[i].given || f->op->items[i].kind >= SK_SCRATCH || output != pass)
                continue;
            if (!mark(f, i, output)) all = REFUSED;
        }
    return all;
}

/* ---- the call ---- */

/* The arrays of a descriptor are as long as its ndim says, at most 8, too. */
static int64_t *exactly(const selfkd_tensor *t, const int64_t *of) {
    const size_t n = (size_t)(t->ndim < 0 ? 0 : t->ndim > SK_MAX_RANK ? SK_MAX_RANK : t->ndim);
    int64_t *const copy = malloc(n ? n * sizeof *copy : 1);
    memcpy(copy, of, n * sizeof *copy);
    return copy;
}

static int call(fuzzed *f) {
    unsigned char *const args = calloc(1, f->op->args_size);
    memcpy(args, &f->struct_size, sizeof f->struct_size);
    for (int i = 0; i < f->op->count; i++) {
        const sk_item *const it = &f->op->items[i];
        argument *const a = &f->argument[i];
        const selfkd_tensor *const t = &a->tensor;
        if (it->kind >= SK_REAL) memcpy(args + it->in_args, &f->number[i], sizeof f->number[i]);
        if (it->kind >= SK_SCRATCH || !a->given) continue;
        memcpy(args + it->in_args, &t, sizeof t);
        if (t->shape) a->tensor.shape = exactly(t, a->shape);
        if (t->strides) a->tensor.strides = exactly(t, a->strides);
    }
    const int status = sk_call_from_c(f->op, args, NULL);
    for (int i = 0; i < f->op->count; i++) {
        if (f->op->items[i].kind >= SK_SCRATCH || !f->argument[i].given) continue;
        free(f->argument[i].tensor.shape);
        free(f->argument[i].tensor.strides);
    }
    free(args);
    return status;
}

static void check_writes(const fuzzed *f, int status) {
    for (int i = 0; i < f->op->count; i++) {
        const argument *const a = &f->argument[i];
        for (size_t b = 0; a->block && b < a->bytes; b++)
            REQUIRE(a->block[b] == a->before[b] || (status == SELFKD_OK && (a->mark[b] & 2)), f,
                    "status %d, byte %zu in the memory of %s is written", status, b,
                    f->op->items[i].name);
    }
}

static void free_all(fuzzed *f) {
    for (int i = 0; i < f->op->count; i++) {
        free(f->argument[i].block);
        free(f->argument[i].before);
        free(f->argument[i].mark);
    }
}

/* The functions that take a word of the user's. */
static void call_others(const uint8_t *data, size_t size) {
    char text[16] = "";
    memcpy(text, data, size < 15 ? size : 15);
    selfkd_describe(text);
    selfkd_call_count(text);
    if (selfkd_set_isa(text)) selfkd_set_isa("base");
    selfkd_set_num_threads((int8_t)text[0]);
    selfkd_set_num_threads(1);
    sk_call_from_c(sk_ops[0], NULL, NULL);
    if (!strchr(selfkd_operators(), '\n') || !selfkd_version()[0] || selfkd_abi() != SELFKD_ABI ||
        !selfkd_isa()[0] || !selfkd_last_path())
        abort();
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
    if (size > 0 && data[0] == 255) {
        call_others(data + 1, size - 1);
        return 0;
    }
    static fuzzed f;
    decode(data, size, &f);
    const enum verdict verdict = prepare(&f);
    if (verdict == TOO_LARGE) {
        free_all(&f);
        return -1;
    }
    const int64_t before = selfkd_call_count(f.op->name);
    const int status = call(&f);
    inputs++;
    reached += selfkd_call_count(f.op->name) - before;
    REQUIRE(status == SELFKD_OK || strncmp(selfkd_message(), f.op->name, strlen(f.op->name)) == 0,
            &f, "status %d without a sentence", status);
    REQUIRE(verdict == FINE || status != SELFKD_OK, &f, "accepted");
    check_writes(&f, status);
    free_all(&f);
    return 0;
}
