/* Tasks: which rows of a call are done together, and where a row lies in each tensor.
 *
 * A tensor of shape (N, C, S) holds N x S rows of C classes. A task is a few of them, and the same
 * loops serve two layouts, which differ in what the SK_LANES lanes of a vector are. "positions"
 * (images): each lane is a position, with a row of its own. "classes" (anything else): all lanes
 * share one row, lane k taking classes k, k + SK_LANES, ...; a task takes several short rows so
 * that their latencies overlap. */
#pragma once
#include "cpu/core/load.h"

enum {
    SK_ROW_C = 1024,   /* classes of a row taken at a time */
    SK_SHORT_ROWS = 8, /* in a task of rows no longer than that */
    SK_WIDTH = 256,    /* rows in a task of positions */
    SK_PITCH =
        SK_WIDTH + SK_LANES, /* not a power of 2, which maps all classes to the same cache sets */
    SK_TILE_C = 32,          /* classes of positions taken at a time */
    SK_TILE = SK_TILE_C * SK_PITCH,
    SK_GROUPS = SK_WIDTH / SK_LANES
};

/* Rows [n, s], [n, s + 1], ...: `width` of them, in `groups` groups of lanes. */
typedef struct sk_task {
    int64_t N, C, S, n, s, width, groups;
    bool positions;
    const char *path; /* the name of the loop, for selfkd_last_path() */
} sk_task;

/* The rows of a call whose first tensor is x: its layout decides, whatever that of the others;
 * width is that of the largest task. */
static inline sk_task sk_tasks_of(const sk_arg *x, int64_t N, int64_t C, int64_t S) {
    sk_task r = {.N = N,
                 .C = C,
                 .S = S,
                 .positions = S >= SK_LANES && x->stride[2] == 1 && x->stride[1] != 1};
    r.width = r.positions ? sk_min(SK_WIDTH, S) : C > SK_ROW_C ? 1 : SK_SHORT_ROWS;
    r.path = r.positions ? "positions" : "classes";
    return r;
}
#define SK_TASKS_OF(p, x) sk_tasks_of(&(p)->x, SK_DIM(p, N), SK_DIM(p, C), SK_DIM(p, S))

/* Tasks of one sample (positions) or of all (classes): a task of positions stays within a sample.
 */
static inline int64_t sk_tasks_in_run(const sk_task *all) {
    return ((all->positions ? all->S : all->N * all->S) + all->width - 1) / all->width;
}

/* Each task reads `tensors` elements a class. */
static inline sk_work sk_work_of(const sk_task *all, int tensors) {
    const bool empty = all->N == 0 || all->S == 0; /* a width may be 0 then */
    const int64_t samples = all->positions ? all->N : 1;
    return (sk_work){empty ? 0 : samples * sk_tasks_in_run(all), tensors * all->C * all->width,
                     all->path};
}

static inline sk_task sk_task_at(const sk_task *all, int64_t i) {
    sk_task r = *all;
    const int64_t tasks = sk_tasks_in_run(all), at = i % tasks * all->width;
    r.n = r.positions ? i / tasks : at / r.S;
    r.s = r.positions ? at : at % r.S;
    r.width = sk_min(r.width, (r.positions ? r.S : r.N * r.S) - at);
    r.groups = r.positions ? sk_groups(r.width) : r.width;
    return r;
}

/* What is found of the rows of a task: planes of numbers, one for each row. The first are saved for
 * backward, at most 32 bytes a row. */
enum { SK_SAVED = 4, SK_FOUND = 5 };
typedef double sk_found[SK_FOUND][SK_PITCH];

/* How many scalars of a task there are, one for each row; in "positions" one for each lane. */
static inline int64_t sk_scalars(const sk_task *r) {
    return r->positions ? r->groups * SK_LANES : r->width;
}

/* Row i in a tensor of shape (N, S). */
static inline int64_t sk_row_at(const sk_task *r, int64_t stride_n, int64_t stride_s, int64_t i) {
    int64_t n = r->n, s = r->s + i;
    for (; s >= r->S; s -= r->S) n++; /* a few steps at most, cheaper than a division */
    return n * stride_n + s * stride_s;
}

/* Class c of row i. */
static inline int64_t sk_class_at(const sk_task *r, const sk_arg *x, int64_t i, int64_t c) {
    return sk_row_at(r, x->stride[0], x->stride[2], i) + c * x->stride[1];
}

/* Elements from one row to the next, or 0 where that varies. */
static inline int64_t sk_row_step(const sk_task *r, int64_t stride_n, int64_t stride_s) {
    if (r->positions || stride_n == r->S * stride_s) return stride_s;
    return r->S == 1 ? stride_n : 0;
}

/* Asks for the bytes behind x: those of the next task. */
static inline void sk_fetch_after(const void *x, int64_t bytes) {
    for (int64_t at = 0; at < bytes; at += 64)
        __builtin_prefetch((const char *)x + bytes + at, 0, 2);
}

/* One element of a tensor of shape (N, S) for each row, and 0 in lanes beyond the last. */
#define SK_ROW_LOADER(name, type)                                                          \
    static inline void name(const sk_task *r, const void *data, int64_t stride_n,          \
                            int64_t stride_s, type *restrict to) {                         \
        const type *const x = (const type *)data + sk_row_at(r, stride_n, stride_s, 0);    \
        const int64_t step = sk_row_step(r, stride_n, stride_s);                           \
        if (step == 1 && r->positions) sk_fetch_after(x, r->width *(int64_t)sizeof(type)); \
        if (step == 1)                                                                     \
            for (int64_t i = 0; i < r->width; i++) to[i] = x[i];                           \
        else if (step != 0)                                                                \
            for (int64_t i = 0; i < r->width; i++) to[i] = x[i * step];                    \
        else                                                                               \
            for (int64_t i = 0; i < r->width; i++)                                         \
                to[i] = ((const type *)data)[sk_row_at(r, stride_n, stride_s, i)];         \
        for (int64_t i = r->width; i < sk_scalars(r); i++) to[i] = 0;                      \
    }
SK_ROW_LOADER(sk_load_reals, real)
SK_ROW_LOADER(sk_load_doubles, double)
SK_ROW_LOADER(sk_load_indices, int64_t)

/* A weight of each row (1 where none is given), or its incoming gradient. */
static inline void sk_load_scalars(const sk_task *r, const sk_arg *x, real *to) {
    if (x->data && x->dtype != SK_DT_BOOL) {
        sk_load_reals(r, x->data, x->stride[0], x->stride[1], to);
        return;
    }
    for (int64_t i = 0; i < r->width && !x->data; i++) to[i] = 1;
    for (int64_t i = 0; i < r->width && x->data; i++)
        to[i] = sk_load_one(x, sk_row_at(r, x->stride[0], x->stride[1], i));
    for (int64_t i = r->width; i < sk_scalars(r); i++) to[i] = 0;
}

/* Class c[i] of row i. */
static inline void sk_load_classes(const sk_task *r, const sk_arg *x, const int32_t *c, real *to) {
    const int64_t at = sk_class_at(r, x, 0, 0), step = sk_row_step(r, x->stride[0], x->stride[2]);
    if (x->dtype == SK_DT_F32 && step != 0)
        for (int64_t i = 0; i < r->width; i++)
            to[i] = ((const float *)x->data)[at + i * step + c[i] * x->stride[1]];
    else
        for (int64_t i = 0; i < r->width; i++) to[i] = sk_load_one(x, sk_class_at(r, x, i, c[i]));
}
