/* Random contracts: what sk_check_contract() accepts can be called with any tensors, and the core
 * reads and writes no memory but theirs (AddressSanitizer sees it). The kernel of these operators
 * touches the first and the last element of every tensor it is given. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "core/catalogue.h"
#include "core/library.h"
#include "core/memory.h"
#include "core/run.h"

enum { ITEMS = 8, ARGUMENT = 8, PARAMETER = 64 };

static uint64_t state = 1;
static unsigned below(unsigned n) {
    state = state * 6364136223846793005u + 1442695040888963407u;
    return (unsigned)(state >> 33) % n;
}

/* ---- a contract ---- */

static sk_op op;
static sk_item items[ITEMS];
static char shapes[ITEMS][8];

static void random_shape(char *to) {
    static const char *const usual[] = {"NC*", "N*", "NC", "N", "", "4N*", "#", "NCHW", "NK*"};
    static const char any[] = "NCHWSZan0149#*?";
    strcpy(to, usual[below(9)]);
    if (below(8) == 0) {
        const unsigned length = below(7);
        for (unsigned k = 0; k < length; k++) to[k] = any[below(sizeof any - 1)];
        to[length] = 0;
    }
    if (below(16) == 0 && *to) to[below((unsigned)strlen(to))] = any[below(sizeof any - 1)];
}

static void random_contract(void) {
    static const char *const names[] = {
        "u",    "v",    "weight", "target", "teacher",      "target",  "teacher_kind",
        "grad", "loss", "rows",   "p",      "ignore_index", "scratch", "second"};
    static const char *const choices[] = {"none|mean|sum", "none|nearest|bilinear|maxpool", "a",
                                          "|a", ""};
    op.count = 1 + (int)below(ITEMS);
    for (int i = 0; i < op.count; i++) {
        sk_item *const it = &items[i];
        random_shape(shapes[i]);
        *it = (sk_item){.name = names[below(14)],
                        .shape = shapes[i],
                        .of = names[below(14)],
                        .kind = below(3) ? (int)below(6) : (int)below(13),
                        .rule = (int)below(11),
                        .bytes = below(4) ? 8 : 0,
                        .in_args = (size_t)(ARGUMENT * (i + 1)),
                        .in_params = sizeof(sk_dims) + (size_t)(PARAMETER * i)};
        if (i == 0 && below(8)) it->name = "u", it->kind = SK_IN, it->rule = SK_FLOATING;
        if (it->kind == SK_LIKE) it->shape = below(2) ? "u" : names[below(14)];
        if (it->kind >= SK_CHOICE) it->shape = choices[below(5)];
        if (it->kind >= SK_REAL && it->kind < SK_CHOICE && below(2)) it->rule = SK_ANY;
        if (below(200) == 0) it->name = NULL;
        if (below(200) == 0) it->shape = NULL;
        if (below(200) == 0) it->in_params = SK_PARAMS_MAX - 8;
    }
    for (int i = 0; i < op.count; i++) {
        const char *const named = items[i].kind == SK_LIKE ? items[i].shape : items[i].of;
        for (int k = op.count - 1; k >= 0 && named; k--)
            if (items[k].name && strcmp(items[k].name, named) == 0) items[i].place = k;
        if (below(200) == 0) items[i].place = (int)below(ITEMS);
    }
}

/* ---- its kernel ---- */

static void touch(const sk_dims *dims, const sk_item *it) {
    const sk_arg *const arg = (const sk_arg *)((const char *)dims + it->in_params);
    if (!arg->data || it->kind >= SK_LIKE || !it->shape) return;
    int64_t last = 0, count = 1;
    for (int k = 0; it->shape[k]; k++) {
        const char c = it->shape[k];
        if (c == '#') return;
        const int64_t size = c == '*'   ? dims->size['S' - 'A']
                             : c <= '9' ? c - '0'
                                        : dims->size[c - 'A'];
        count *= size;
        last += arg->stride[k] * (size - 1);
    }
    const int64_t bytes = sk_dtype_size((enum sk_dtype)arg->dtype);
    volatile char *const data = arg->data;
    if (count <= 0) return;
    if (it->kind == SK_OUT || it->kind == SK_INOUT) data[0] = data[last * bytes] = 1;
    (void)data[0];
    (void)data[last * bytes + bytes - 1];
}

static sk_work work(const void *params) {
    (void)params;
    return (sk_work){1, 1, "any"};
}
static void rows(const void *params, int64_t begin, int64_t end) {
    for (int i = 0; i < op.count && begin < end; i++) touch(params, &items[i]);
}
static sk_bad first_bad(const void *params) {
    for (int i = 0; i < op.count; i++) {
        const sk_arg *const arg = (const sk_arg *)((const char *)params + items[i].in_params);
        const bool value =
            items[i].rule == SK_INDEX || items[i].rule == SK_CLASSES || items[i].rule == SK_TEACHER;
        if (items[i].kind <= SK_OPT && value && arg->data && below(2))
            return (sk_bad){(int64_t)below(3), items[i].in_params, 7};
    }
    return (sk_bad){-1, 0, 0};
}

/* ---- a call ---- */

/* A tensor for an item, most often one that fits; NULL: not given. */
static selfkd_tensor *random_tensor(const sk_item *it, const int64_t *size) {
    static const selfkd_dtype dtypes[] = {{2, 32, 1}, {2, 64, 1}, {2, 16, 1},
                                          {6, 8, 1},  {0, 64, 1}, {0, 32, 1}};
    static const unsigned fitting[] = {0, 0, 0, 1, 0, 0, 0, 4, 5, 4, 0};
    if (below(it->kind == SK_OPT ? 2 : 40) == 0) return NULL;
    const char *shape = it->shape;
    for (int i = 0; it->kind == SK_LIKE && i < op.count; i++)
        if (strcmp(items[i].name, it->shape) == 0) shape = items[i].shape;
    selfkd_tensor *const t = calloc(1, sizeof *t);
    t->shape = malloc(SK_MAX_RANK * sizeof *t->shape);
    t->dtype = dtypes[below(12) ? fitting[it->rule] : below(6)];
    t->device.device_type = SELFKD_CPU;
    int64_t count = 1;
    for (; shape[t->ndim] && shape[t->ndim] != '*'; t->ndim++) {
        const char c = shape[t->ndim];
        t->shape[t->ndim] = c >= 'A' ? size[c - 'A'] : c == '#' ? (int64_t)below(4) : c - '0';
    }
    for (unsigned k = 0; shape[t->ndim] == '*' && k < (unsigned)size['S' - 'A']; k++)
        t->shape[t->ndim + (int)k] = 2;
    if (shape[t->ndim] == '*') t->ndim += (int)size['S' - 'A'];
    if (below(16) == 0) t->ndim = (int)below(SK_MAX_RANK);
    if (it->kind == SK_GRAD && below(2)) t->ndim = 0;
    for (int k = 0; k < t->ndim; k++) {
        if (below(40) == 0) t->shape[k] = (int64_t)below(4);
        if (t->shape[k] < 0 || t->shape[k] > 9) t->shape[k] = 1;
        count *= t->shape[k];
    }
    const size_t bytes = (size_t)count * t->dtype.bits / 8;
    t->data = calloc(bytes ? bytes : 1, 1);
    return t;
}

static int random_call(void) {
    unsigned char args[ARGUMENT * (ITEMS + 1)] = {0};
    const uint32_t struct_size = sizeof args;
    int64_t size[SK_LETTERS];
    selfkd_tensor *tensor[ITEMS] = {NULL};
    memcpy(args, &struct_size, sizeof struct_size);
    for (int k = 0; k < SK_LETTERS; k++) size[k] = 1 + (int64_t)below(3);
    size['S' - 'A'] = (int64_t)below(3); /* so many trailing dimensions */
    for (int i = 0; i < op.count; i++) {
        const int64_t number = below(8) ? 0 : (int64_t)below(5);
        const double half = 0.5;
        unsigned char *const to = args + items[i].in_args;
        if (items[i].kind < SK_SCRATCH) tensor[i] = random_tensor(&items[i], size);
        if (items[i].kind < SK_SCRATCH) memcpy(to, &tensor[i], sizeof tensor[i]);
        if (items[i].kind > SK_REAL) memcpy(to, &number, sizeof number);
        if (items[i].kind == SK_REAL) memcpy(to, &half, sizeof half);
    }
    const int status = sk_call_from_c(&op, args, NULL);
    for (int i = 0; i < op.count; i++) {
        if (!tensor[i]) continue;
        free(tensor[i]->data);
        free(tensor[i]->shape);
        free(tensor[i]);
    }
    return status;
}

static void write_contract(FILE *file) {
    rewind(file);
    for (int i = 0; i < op.count; i++)
        fprintf(file, "kind %d, %s, shape \"%s\", rule %d, of %s\n", items[i].kind, items[i].name,
                items[i].shape, items[i].rule, items[i].of);
    fprintf(file, "(what follows is older)\n");
    fflush(file);
}

/* ---- single faults ---- */

/* Whether an item with that fault is refused, by its name. */
static bool is_refused(const sk_op *of, sk_item *copy, int i, sk_item wrong) {
    const sk_op broken = {.name = of->name, .items = copy, .count = of->count};
    char start[128];
    snprintf(start, sizeof start, "%s: the contract of %s is wrong: ", of->name, wrong.name);
    copy[i] = wrong;
    const int status = sk_check_contract(&broken);
    copy[i] = of->items[i];
    return status == SELFKD_ERROR_VALUE && strncmp(selfkd_message(), start, strlen(start)) == 0;
}

/* Every fault that an item of that kind can have, in every contract that there is. */
static int every_fault(void) {
    static const char *const bad_shapes[] = {"n*", "NSC", "N*C", "NCHWD", "N?", "N "};
    static const char *const bad_names[] = {"", "|a", "a|", "a||b"};
    int tried = 0, missed = 0;
    for (int k = 0; sk_ops[k]; k++) {
        const sk_op *const of = sk_ops[k];
        sk_item copy[SK_MAX_ITEMS];
        memcpy(copy, of->items, (size_t)of->count * sizeof *copy);
        for (int i = 0; i < of->count; i++) {
            sk_item faults[12];
            int n = 0;
            for (int f = 0; f < 12; f++) faults[f] = of->items[i];
            faults[n++].in_params = SK_PARAMS_MAX;
            faults[n++].in_params = 0;
            faults[n++].kind = SK_RESIZE + 1;
            if (of->items[i].kind <= SK_OUT) {
                for (int f = 0; f < 6; f++) faults[n++].shape = bad_shapes[f];
                faults[n++].rule = SK_SEED + 1;
                faults[n++].shape = NULL;
            } else if (of->items[i].kind == SK_LIKE) {
                faults[n++].shape = "no_such_input";
                faults[n++].shape = of->items[i].name;
                faults[n++].place++;
            } else if (of->items[i].kind == SK_SCRATCH) {
                faults[n++].bytes = 0;
            } else if (of->items[i].kind >= SK_CHOICE) {
                for (int f = 0; f < 4; f++) faults[n++].shape = bad_names[f];
                if (of->items[i].kind == SK_RESIZE) faults[n++].of = "no_such_input";
                if (of->items[i].kind == SK_RESIZE) faults[n++].place++;
            } else {
                faults[n++].rule = SK_BELOW_ONE + 1;
            }
            for (int f = 0; f < n; f++, tried++) {
                if (is_refused(of, copy, i, faults[f])) continue;
                fprintf(stderr, "%s, %s: fault %d is not refused: %s\n", of->name,
                        of->items[i].name, f, selfkd_message());
                missed++;
            }
        }
    }
    printf("faults: %d tried\n", tried);
    return missed;
}

/* Every item of every gradient's contract as the forward operator does not have it: a tensor under
 * another name or of another shape, a number of another kind. */
static int every_stranger(void) {
    int tried = 0, missed = 0;
    for (int k = 0; sk_ops[k]; k++) {
        const sk_op *const of = sk_ops[k];
        sk_item copy[SK_MAX_ITEMS];
        char name[128], item[64];
        snprintf(name, sizeof name, "%.*s", (int)(strlen(of->name) - strlen("_backward")),
                 of->name);
        const sk_op *const forward = strstr(of->name, "_backward") ? sk_find(name) : NULL;
        memcpy(copy, of->items, (size_t)of->count * sizeof *copy);
        const sk_op broken = {.name = of->name, .items = copy, .count = of->count};
        for (int i = 0; forward && i < of->count; i++) {
            sk_item faults[2] = {copy[i], copy[i]};
            int n = 0;
            if (copy[i].kind != SK_GRAD && copy[i].kind < SK_OUT) faults[n++].name = "stranger";
            if (copy[i].kind == SK_LIKE) faults[n++].name = "grad_stranger";
            if (copy[i].kind < SK_OUT) faults[n++].shape = "9";
            if (copy[i].kind >= SK_REAL && sk_find_item(forward, copy[i].name) >= 0)
                faults[n++].kind = copy[i].kind == SK_REAL ? SK_INT : SK_REAL;
            for (int f = 0; f < n; f++, tried++) {
                copy[i] = faults[f];
                snprintf(item, sizeof item, "contract of %s is wrong", copy[i].name);
                if (sk_check_gradient(&broken, forward) == SELFKD_OK ||
                    !strstr(selfkd_message(), item))
                    missed += fprintf(stderr, "%s, item %d: fault %d\n", of->name, i, f) > 0;
                copy[i] = of->items[i];
            }
        }
    }
    printf("gradients: %d faults tried, %d missed\n", tried, missed);
    return missed;
}

/* contracts COUNT FILE: how many are drawn, and where each is written before it is called, so that
 * the one that failed is there */
int main(int n, char **given) {
    static const sk_cpu_kernel kernel = {work, rows, NULL, first_bad};
    static const sk_cpu_kernel *const cpu[] = {&kernel, &kernel, &kernel, &kernel};
    static _Atomic int64_t calls;
    op = (sk_op){.name = "random",
                 .items = items,
                 .args_size = sizeof(uint32_t),
                 .params_size = sizeof(sk_dims) + PARAMETER * ITEMS,
                 .cpu = cpu,
                 .calls = &calls};
    FILE *const last = n > 2 ? fopen(given[2], "w") : NULL;
    if (!last) return fprintf(stderr, "contracts COUNT FILE\n"), 1;
    long accepted = 0, drawn = atol(given[1]);
    for (long k = 0; k < drawn; k++) {
        random_contract();
        if (sk_check_contract(&op) != SELFKD_OK) {
            if (strncmp(selfkd_message(), "random: ", 8) != 0) abort();
            continue;
        }
        accepted++;
        write_contract(last);
        for (int call = 0; call < 20; call++) random_call();
    }
    if (sk_check_catalogue() != SELFKD_OK || every_fault() || every_stranger()) return 1;
    printf("contracts: %ld drawn, %ld accepted, %ld calls ran\n", drawn, accepted, (long)calls);
    fclose(last);
    return 0;
}
