/* The vectors of tests/vectors, which its README.md describes, from C: every operator forward and
 * backward, in float32 and in float64. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>

#include <math.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "core/contract.h"
#include "selfkd.h"

enum { MOST_VALUES = 512, MOST_ENTRIES = 48, WORD = 64 };

/* ---- a case, as the file has it ---- */

/* A number, or a tensor with its memory in both types; what is expected of an output. */
typedef struct entry {
    char kind[WORD], name[WORD], measure[WORD];
    int64_t shape[SK_MAX_RANK];
    int rank, count;
    double number, bound[2], value[MOST_VALUES];
    unsigned char memory[MOST_VALUES * sizeof(double)];
    selfkd_tensor tensor;
} entry;

typedef struct test_case {
    char name[2 * WORD], op[WORD];
    entry entry[MOST_ENTRIES];
    int count;
} test_case;

static bool next_word(FILE *file, char *word) { return fscanf(file, "%63s", word) == 1; }

static double next_number(FILE *file) {
    char word[WORD];
    assert_true(next_word(file, word));
    return strtod(word, NULL);
}

static void read_shape(FILE *file, entry *e) {
    char word[WORD];
    assert_true(next_word(file, word));
    e->count = 1;
    for (char *at = word + 1; *at != ']';) {
        e->shape[e->rank] = strtoll(at, &at, 10);
        e->count *= (int)e->shape[e->rank++];
        if (*at == ',') at++;
    }
    assert_in_range(e->count, 0, MOST_VALUES);
}

/* Reads an entry, whose kind was read. */
static void read_entry(FILE *file, entry *e) {
    assert_true(next_word(file, e->name));
    if (strcmp(e->kind, "number") == 0) {
        e->number = next_number(file);
        return;
    }
    read_shape(file, e);
    if (strcmp(e->kind, "passed") == 0) return;
    if (strcmp(e->kind, "output") == 0) {
        assert_true(next_word(file, e->measure));
        for (int i = 0; i < 2; i++) e->bound[i] = next_number(file);
    }
    for (int i = 0; i < e->count; i++) e->value[i] = next_number(file);
}

static bool read_case(FILE *file, test_case *c) {
    char word[WORD];
    memset(c, 0, sizeof *c);
    while (next_word(file, word)) {
        if (word[0] == '#') {
            while (fgetc(file) != '\n') continue;
        } else if (strcmp(word, "case") == 0) {
            assert_non_null(fgets(c->name, sizeof c->name, file));
            c->name[strcspn(c->name, "\n")] = 0;
        } else if (strcmp(word, "operator") == 0) {
            assert_true(next_word(file, c->op));
        } else if (strcmp(word, "end") == 0) {
            return true;
        } else {
            assert_in_range(c->count, 0, MOST_ENTRIES - 1);
            entry *const e = &c->entry[c->count++];
            memcpy(e->kind, word, sizeof word);
            read_entry(file, e);
        }
    }
    return false;
}

/* ---- a call of an operator with what a case holds ---- */

/* An argument of a contract: where it is in the arguments' struct, its kind, the rule of its type.
 */
typedef struct field {
    const char *name;
    size_t at;
    enum sk_kind kind;
    int rule;
} field;

#define FIELD(kind, ...) FIELD_##kind(__VA_ARGS__)
#define FIELD_TENSOR(kind, n, rule) {#n, offsetof(sk_args, n), kind, rule},
#define FIELD_IN(n, shape, dtype) FIELD_TENSOR(SK_IN, n, SK_##dtype)
#define FIELD_INOUT(n, shape, dtype) FIELD_TENSOR(SK_INOUT, n, SK_##dtype)
#define FIELD_OPT(n, shape, dtype) FIELD_TENSOR(SK_OPT, n, SK_##dtype)
#define FIELD_GRAD(n, shape, dtype) FIELD_TENSOR(SK_GRAD, n, SK_##dtype)
#define FIELD_OUT(n, shape, dtype) FIELD_TENSOR(SK_OUT, n, SK_##dtype)
#define FIELD_LIKE(n, input) FIELD_TENSOR(SK_LIKE, n, SK_SAME)
#define FIELD_SCRATCH(n, bytes)
#define FIELD_REAL(n, rule, value) {#n, offsetof(sk_args, n), SK_REAL, 0},
#define FIELD_INT(n, rule, value) {#n, offsetof(sk_args, n), SK_INT, 0},
#define FIELD_BOOL(n, rule, value) FIELD_INT(n, rule, value)
#define FIELD_CHOICE(n, names, value) FIELD_INT(n, names, value)
#define FIELD_RESIZE(n, names, input) FIELD_INT(n, names, input)

static entry *find(test_case *c, const char *name, const char *kind) {
    for (int i = 0; i < c->count; i++) {
        entry *const e = &c->entry[i];
        if (strcmp(e->name, name) == 0 && (!kind || strcmp(e->kind, kind) == 0)) return e;
    }
    return NULL;
}

static size_t element_size(const field *f, bool doubles) {
    return f->rule == SK_F64 || f->rule == SK_INDEX || f->rule == SK_CLASSES ||
                   f->rule == SK_SEED || doubles
               ? 8
               : 4;
}

/* The tensor of an entry: an input gets its numbers, an output NaN, so that none is left out. */
static selfkd_tensor *tensor_of(entry *e, const field *f, bool doubles) {
    const bool integer = f->rule == SK_INDEX || f->rule == SK_CLASSES || f->rule == SK_SEED;
    const size_t size = element_size(f, doubles);
    if (e->tensor.data) return &e->tensor; /* of the forward pass */
    memset(e->memory, 0xff, sizeof e->memory);
    for (int i = 0; i < e->count && strcmp(e->kind, "input") == 0; i++) {
        const int64_t whole = integer ? (int64_t)e->value[i] : 0;
        const float single = (float)e->value[i];
        const void *const from = integer     ? (const void *)&whole
                                 : size == 8 ? (const void *)&e->value[i]
                                             : (const void *)&single;
        memcpy(e->memory + size * (size_t)i, from, size);
    }
    e->tensor = (selfkd_tensor){.data = e->memory,
                                .device = {SELFKD_CPU, 0},
                                .ndim = e->rank,
                                .dtype = {integer ? 0 : 2, (uint8_t)(8 * size), 1},
                                .shape = e->shape};
    return &e->tensor;
}

static void fill(test_case *c, const field *fields, size_t count, bool doubles, void *args) {
    for (size_t i = 0; i < count; i++) {
        const field *const f = &fields[i];
        unsigned char *const to = (unsigned char *)args + f->at;
        entry *e = find(c, f->name, f->kind <= SK_GRAD ? "input" : NULL);
        if (!e) e = find(c, f->name, NULL);
        if (f->kind == SK_REAL || f->kind == SK_INT) {
            const int64_t whole = e ? (int64_t)e->number : 0;
            if (!e) fail_msg("%s has no %s", c->name, f->name);
            memcpy(to, f->kind == SK_REAL ? (const void *)&e->number : (const void *)&whole, 8);
        } else if (e) {
            selfkd_tensor *const tensor = tensor_of(e, f, doubles);
            memcpy(to, &tensor, sizeof tensor);
        }
    }
}

/* CALLS is a CALL(op) for each operator, which CMake knows. */
#define CALL(op)                                                         \
    static int call_##op(test_case *c, bool doubles) {                   \
        typedef selfkd_##op##_args sk_args;                              \
        static const field fields[] = {op##_CONTRACT(FIELD)};            \
        sk_args args = {.struct_size = sizeof args};                     \
        fill(c, fields, sizeof fields / sizeof *fields, doubles, &args); \
        return selfkd_##op(&args, NULL);                                 \
    }
CALLS
#undef CALL
#define CALL(op) {#op, call_##op},
static const struct {
    const char *op;
    int (*call)(test_case *c, bool doubles);
} operators[] = {CALLS};

/* Whether there is an operator of that name; it is called. */
static bool call(test_case *c, const char *op, bool doubles) {
    for (size_t i = 0; i < sizeof operators / sizeof *operators; i++) {
        if (strcmp(operators[i].op, op) != 0) continue;
        if (operators[i].call(c, doubles) != 0) fail_msg("%s: %s", c->name, selfkd_message());
        return true;
    }
    return false;
}

/* ---- what is compared ---- */

static double found_at(const selfkd_tensor *x, int i) {
    return x->dtype.bits == 64 ? ((const double *)x->data)[i] : ((const float *)x->data)[i];
}

/* What the error of element i is measured against: the number itself, or the largest of its row (of
 * all that have its place but along dimension 1), or the largest of all. */
static double measure(const entry *e, int i) {
    double most = 0;
    int length = 1;
    for (int k = 2; k < e->rank; k++) length *= (int)e->shape[k];
    const int classes = e->rank > 1 ? (int)e->shape[1] : 1;
    for (int j = 0; j < e->count; j++) {
        const bool in_row =
            j / (classes * length) == i / (classes * length) && j % length == i % length;
        if (e->measure[0] == 'e' ? j == i : e->measure[0] == 'r' ? in_row : true)
            most = fmax(most, fabs(e->value[j]));
    }
    return most;
}

static void compare(test_case *c, const entry *e, bool doubles) {
    entry *const given = find(c, e->name, "input"); /* an INOUT */
    const selfkd_tensor *const x = given ? &given->tensor : &e->tensor;
    if (e->count > 0) assert_non_null(x->data);
    for (int i = 0; i < e->count; i++) {
        const double off = fabs(found_at(x, i) - e->value[i]);
        const double bound = e->bound[doubles] * measure(e, i);
        if (!(off <= bound))
            fail_msg("%s: %s[%d] is %a, expected %a", c->name, e->name, i, found_at(x, i),
                     e->value[i]);
    }
}

static int check_file(const char *path, bool doubles) {
    static test_case c;
    int cases = 0;
    char backward[2 * WORD];
    FILE *const file = fopen(path, "r");
    if (!file) fail_msg("%s cannot be read", path);
    for (; read_case(file, &c); cases++) {
        assert_true(call(&c, c.op, doubles));
        snprintf(backward, sizeof backward, "%s_backward", c.op);
        call(&c, backward, doubles);
        for (int i = 0; i < c.count; i++)
            if (strcmp(c.entry[i].kind, "output") == 0) compare(&c, &c.entry[i], doubles);
    }
    fclose(file);
    return cases;
}

static void check_all(bool doubles) {
    char path[1024];
    for (size_t i = 0; i < sizeof operators / sizeof *operators; i++) {
        if (strstr(operators[i].op, "_backward")) continue;
        snprintf(path, sizeof path, "%s/%s.txt", VECTORS, operators[i].op);
        assert_true(check_file(path, doubles) >= 3);
    }
}

static void in_float32(void **state) {
    (void)state;
    check_all(false);
}
static void in_float64(void **state) {
    (void)state;
    check_all(true);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(in_float32),
        cmocka_unit_test(in_float64),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
