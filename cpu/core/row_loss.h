/* Row losses: what all losses of rows do alike. Every row has a weight; a row of weight 0 is not
 * looked at, whatever it holds. Forward leaves the loss of each row, a few numbers that are saved
 * for its gradient, and the sum; backward reads and writes each class once.
 *
 * An operator gives three functions (cpu/simreg.c is the one to read):
 *   find(p, r, weight, found)    what the rows of a task come to: planes of numbers that are saved,
 *                                and of others, for the rows whose weight is not 0
 *   value(p, weight, found, i)   the loss of row i of them, times its weight
 *   task(p, r)                   backward: from sk_load_incoming() to sk_write_gradients() */
#pragma once
#include "cpu/core/reduce.h"
#include "cpu/core/run.h"

/* Defines kernel `op`: all(p) says which rows there are, task(p, r) does some of them and reads
 * about `tensors` elements a class. finish and first_bad are those of sk_cpu_kernel. */
#define SK_ROW_KERNEL(op, all, tensors, task, finish, first_bad)             \
    static sk_work op##_work(const void *params) {                           \
        const sk_task rows = all(params);                                    \
        return sk_work_of(&rows, tensors);                                   \
    }                                                                        \
    static void op##_tasks(const void *params, int64_t begin, int64_t end) { \
        const sk_task rows = all(params);                                    \
        for (int64_t i = begin; i < end; i++) {                              \
            const sk_task r = sk_task_at(&rows, i);                          \
            task(params, &r);                                                \
        }                                                                    \
    }                                                                        \
    const sk_cpu_kernel SK_CPU(op) = {op##_work, op##_tasks, finish, first_bad}

/* ---- Forward ---- */

/* Leaves the weights of a task; returns whether any is not 0. */
static inline bool sk_load_weights(const sk_task *r, const sk_arg *x, real *weight) {
    real used = 0;
    sk_load_scalars(r, x, weight);
#pragma omp simd reduction(+ : used)
    for (int64_t i = 0; i < r->width; i++) used += weight[i] != 0 ? 1 : 0;
    return used != 0;
}

/* Where row 0 of a task lies in a plane of an output, which is compact. */
static inline int64_t sk_row_in_plane(const sk_task *r) { return r->n * r->S + r->s; }

/* Defines the forward kernel of a row loss with the outputs rows, saved (of `planes` planes), loss
 * and denominator, by find and value; first_bad is that of sk_cpu_kernel. */
#define SK_ROW_FORWARD(op, all, tensors, planes, find, value) \
    SK_CHECKED_ROW_FORWARD(op, all, tensors, planes, find, value, NULL)
#define SK_CHECKED_ROW_FORWARD(op, all, tensors, planes, find, value, first_bad)                  \
    static void op##_task(const struct op##_params *p, const sk_task *r) {                        \
        SK_ALIGNED sk_found found;                                                                \
        SK_ALIGNED real weight[SK_PITCH];                                                         \
        if (sk_load_weights(r, &p->weight, weight)) find(p, r, weight, found);                    \
        const struct op##_params numbers = *p; /* that nothing written may be part of */          \
        const int64_t plane = p->saved.stride[0];                                                 \
        double *restrict const saved = (double *)p->saved.data + sk_row_in_plane(r);              \
        real *restrict const rows = (real *)p->rows.data + sk_row_in_plane(r);                    \
        _Pragma("omp simd") for (int64_t i = 0; i < r->width; i++) {                              \
            const bool used = weight[i] != 0;                                                     \
            rows[i] = used ? (real)value(&numbers, weight[i], found, i) : 0;                      \
            for (int k = 0; k < planes; k++) saved[k * plane + i] = used ? found[k][i] : 0;       \
        }                                                                                         \
    }                                                                                             \
    /* The row once more, alone: its loss is too large for a float. */                            \
    static double op##_row(const void *params, int64_t n, int64_t s) {                            \
        const struct op##_params *const p = params;                                               \
        const sk_task r = sk_one_row(SK_DIM(p, N), SK_DIM(p, C), SK_DIM(p, S), n, s);             \
        SK_ALIGNED sk_found found;                                                                \
        const real weight[1] = {(real)sk_weight_at(&p->weight, n, s)};                            \
        find(p, &r, weight, found);                                                               \
        return value(p, weight[0], found, 0);                                                     \
    }                                                                                             \
    static void op##_finish(const void *params) {                                                 \
        const struct op##_params *const p = params;                                               \
        const sk_sum_of sum = {&p->rows, SK_DIM(p, N), SK_DIM(p, S), op##_row, p};                \
        const double count = sk_denominator(p->reduction, &p->divisor, &p->weight, sum.N, sum.S); \
        *(real *)p->loss.data = (real)(sk_sum_rows(sum) / count);                                 \
        *(real *)p->denominator.data = (real)count;                                               \
    }                                                                                             \
    SK_ROW_KERNEL(op, all, tensors, op##_task, op##_finish, first_bad)

/* ---- Backward ---- */

/* What reaches the rows of a task: gradient, weight, and what was saved. */
typedef struct sk_incoming {
    SK_ALIGNED real grad[SK_PITCH], weight[SK_PITCH];
    SK_ALIGNED sk_found saved;
} sk_incoming;

SK_SPECIAL void sk_load_incoming(const sk_task *r, const sk_arg *grad, const sk_arg *weight,
                                 const sk_arg *saved, int planes, sk_incoming *in) {
    sk_load_scalars(r, grad, in->grad);
    sk_load_scalars(r, weight, in->weight);
    for (int k = 0; k < planes; k++)
        sk_load_doubles(r, (const double *)saved->data + k * saved->stride[0], saved->stride[1],
                        saved->stride[2], in->saved[k]);
}
