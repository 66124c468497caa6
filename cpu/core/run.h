/* Runs: what is written of the rows of a task at a time.
 *
 * What is written class by class goes through memory in runs: n classes of one row from class c or,
 * in "positions", class c of n rows from `row`. */
#pragma once
#include "cpu/core/task.h"

typedef struct sk_run {
    int64_t row, c, n;
} sk_run;

/* What gradients are added to that there are none of yet. */
SK_ALIGNED static const real sk_zeros[SK_RUN];

/* The run after this one, or one of no elements after the last; whole groups of lanes wherever
 * there is one. */
static inline sk_run sk_run_after(const sk_task *r, sk_run run) {
    int64_t *along = r->positions ? &run.row : &run.c, *across = r->positions ? &run.c : &run.row;
    const int64_t length = r->positions ? r->width : r->C;
    *along += run.n;
    if (*along == length) {
        *along = 0;
        ++*across;
    }
    const int64_t left = *across == (r->positions ? r->C : r->width) ? 0 : length - *along;
    const int64_t most = sk_min(left, SK_RUN);
    run.n = most > SK_LANES ? most - most % SK_LANES : most;
    return run;
}
static inline sk_run sk_first_run(const sk_task *r) { return sk_run_after(r, (sk_run){0}); }

static inline int64_t sk_run_at(const sk_task *r, const sk_arg *x, sk_run run) {
    return sk_class_at(r, x, run.row, run.c);
}
static inline int64_t sk_run_stride(const sk_task *r, const sk_arg *x) {
    return x->stride[r->positions ? 2 : 1];
}

static inline const real *sk_read_run(const sk_task *r, const sk_arg *x, sk_run run, real *buffer) {
    return sk_read(x, sk_run_at(r, x, run), sk_run_stride(r, x), run.n, buffer);
}

/* What is read soon: the next classes of a row, or the same class of the next task's positions,
 * whose target logits are gathered before anything else. */
static inline sk_ahead sk_next_read(const sk_task *r, const sk_arg *x, sk_run run) {
    const int64_t at = sk_run_at(r, x, run) + (r->positions ? r->width * x->stride[2] : SK_RUN);
    return (sk_ahead){(uintptr_t)x->data + (uintptr_t)(at * sk_bytes(x)), SK_LANES * sk_bytes(x)};
}

/* Writes a run. */
static inline void sk_put_run(const sk_task *r, const sk_arg *x, sk_run run, const real *from) {
    sk_put(x, sk_run_at(r, x, run), sk_run_stride(r, x), run.n, from);
}

/* ---- a pass that reads and writes ---- */

/* A gradient that is to be written, or NULL where it is not wanted. */
#define SK_WANTED(x) ((x).data ? &(x) : NULL)

static inline void sk_store_wanted(const sk_task *r, const sk_arg *x, int64_t i, int64_t c,
                                   real value) {
    if (x) sk_store_one(x, sk_class_at(r, x, i, c), value);
}

/* The tensors of a pass, those that are read and those that are written. A NULL is none. */
enum { SK_READ = 3, SK_WRITTEN = 2 };
typedef struct sk_streams {
    const sk_arg *read[SK_READ], *written[SK_WRITTEN];
} sk_streams;

/* A run of them in memory: what is read, and where results are to be left. */
typedef struct sk_slice {
    const sk_task *r;
    const sk_streams *of;
    sk_run run;
    const real *x[SK_READ];
    real *to[SK_WRITTEN];
} sk_slice;

/* Where the next run of the k-th tensor that is read lies. */
static inline sk_ahead sk_next_of(const sk_slice *at, int k) {
    return sk_next_read(at->r, at->of->read[k], at->run);
}

typedef void (*sk_slope)(void *context, const sk_slice *at);

/* Leaves the gradients of a task, run by run: slope() finds those of one. */
SK_SPECIAL void sk_write_gradients(const sk_task *r, const sk_streams *of, sk_slope slope,
                                   void *context) {
    SK_ALIGNED real buffer[SK_READ + SK_WRITTEN][SK_RUN];
    for (sk_run run = sk_first_run(r); run.n > 0; run = sk_run_after(r, run)) {
        sk_slice at = {.r = r, .of = of, .run = run};
#pragma GCC unroll 3
        for (int k = 0; k < SK_READ; k++)
            if (of->read[k]) at.x[k] = sk_read_run(r, of->read[k], run, buffer[k]);
#pragma GCC unroll 3
        for (int k = 0; k < SK_WRITTEN; k++) {
            const sk_arg *const x = of->written[k];
            const bool there = x && sk_in_place(x, sk_run_stride(r, x), run.n);
            at.to[k] = there ? (real *)x->data + sk_run_at(r, x, run) : buffer[SK_READ + k];
        }
        slope(context, &at);
#pragma GCC unroll 3
        for (int k = 0; k < SK_WRITTEN; k++)
            if (of->written[k] && at.to[k] == buffer[SK_READ + k])
                sk_put_run(r, of->written[k], run, at.to[k]);
    }
}
