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

/* The run after this one, {0, 0, 0} being before the first; whole groups of lanes wherever there is
 * one. */
static inline bool sk_next_run(const sk_task *r, sk_run *run) {
    int64_t *along = r->positions ? &run->row : &run->c,
            *across = r->positions ? &run->c : &run->row;
    const int64_t length = r->positions ? r->width : r->C;
    *along += run->n;
    if (*along == length) {
        *along = 0;
        if (++*across == (r->positions ? r->C : r->width)) return false;
    }
    const int64_t left = sk_min(length - *along, SK_RUN);
    run->n = left > SK_LANES ? left - left % SK_LANES : left;
    return true;
}

static inline int64_t sk_run_at(const sk_task *r, const sk_arg *x, sk_run run) {
    return sk_class_at(r, x, run.row, run.c);
}
static inline int64_t sk_run_stride(const sk_task *r, const sk_arg *x) {
    return x->stride[r->positions ? 2 : 1];
}

static inline const real *sk_read_run(const sk_task *r, const sk_arg *x, sk_run run, real *buffer) {
    return sk_read(x, sk_run_at(r, x, run), sk_run_stride(r, x), run.n, buffer);
}

/* The run after it, as above. */
static inline sk_ahead sk_next_read(const sk_task *r, const sk_arg *x, sk_run run) {
    const int64_t at = sk_run_at(r, x, run) + (r->positions ? x->stride[1] : SK_RUN);
    return (sk_ahead){(uintptr_t)x->data + (uintptr_t)(at * sk_bytes(x)), SK_LANES * sk_bytes(x)};
}

/* Where a run is to be written: its place or the buffer, from which sk_end_run takes it there. */
static inline real *sk_begin_run(const sk_task *r, const sk_arg *x, sk_run run, real *buffer) {
    return sk_in_place(x, sk_run_stride(r, x), run.n) ? (real *)x->data + sk_run_at(r, x, run)
                                                      : buffer;
}
static inline void sk_end_run(const sk_task *r, const sk_arg *x, sk_run run, const real *buffer) {
    if (!sk_in_place(x, sk_run_stride(r, x), run.n))
        sk_put(x, sk_run_at(r, x, run), sk_run_stride(r, x), run.n, buffer);
}
