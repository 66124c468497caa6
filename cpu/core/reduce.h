/* The scalar loss of a row loss, from its per-row losses, in an order that depends on nothing but
 * their number. */
#pragma once
#include "cpu/core/task.h"

enum { SK_BLOCK = 4096 }; /* elements summed between two additions to the total */

SK_OUTLINE double sk_sum_block(const real *x, int64_t n) {
    double sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t i = 0; i < n; i++) sum += x[i];
    return sum;
}

/* The sum of N x S elements, in double. */
static inline double sk_sum(const sk_arg *x, int64_t N, int64_t S) {
    real copy[SK_BLOCK];
    const bool merged = S == 1 || x->stride[0] == S * x->stride[1]; /* one run of N * S */
    const int64_t runs = merged ? 1 : N, length = merged ? N * S : S,
                  stride = x->stride[S == 1 ? 0 : 1];
    double sum = 0;
    for (int64_t n = 0; n < runs; n++) {
        for (int64_t i = 0; i < length; i += SK_BLOCK) {
            const int64_t count = sk_min(SK_BLOCK, length - i);
            const int64_t at = n * x->stride[0] + i * stride;
            sum += sk_sum_block(sk_read_exactly(x, at, stride, count, copy), count);
        }
    }
    return sum;
}

/* Rows that are summed up: N x S of them. value() is what row [n, s] comes to in double. */
typedef struct sk_sum_of {
    const sk_arg *rows;
    int64_t N, S;
    double (*value)(const void *params, int64_t n, int64_t s);
    const void *params;
} sk_sum_of;

/* The sum of rows, of which some may be too large for a float: those are found once more. */
static inline double sk_sum_rows(sk_sum_of x) {
    double sum = sk_sum(x.rows, x.N, x.S);
    if (sizeof(real) == 8 || !isinf(sum)) return sum;
    sum = 0;
    for (int64_t n = 0; n < x.N; n++) {
        for (int64_t s = 0; s < x.S; s++) {
            const double row = sk_load_one(x.rows, n * x.rows->stride[0] + s * x.rows->stride[1]);
            sum += isinf(row) ? x.value(x.params, n, s) : row;
        }
    }
    return sum;
}

/* Row [n, s] of N x C x S by itself. */
static inline sk_task sk_one_row(int64_t N, int64_t C, int64_t S, int64_t n, int64_t s) {
    return (sk_task){.N = N, .C = C, .S = S, .n = n, .s = s, .width = 1, .groups = 1};
}

/* Its weight, 1 where none is given. */
static inline double sk_weight_at(const sk_arg *weight, int64_t n, int64_t s) {
    return sk_load_one(weight, n * weight->stride[0] + s * weight->stride[1]);
}

/* What a sum of rows is divided by: for a mean the divisor, else the sum of the weights, else N *
 * S. */
static inline double sk_denominator(int64_t reduction, const sk_arg *divisor, const sk_arg *weight,
                                    int64_t N, int64_t S) {
    if (reduction != SELFKD_MEAN) return 1;
    if (divisor->data) return sk_load_one(divisor, 0);
    return weight->data ? sk_sum(weight, N, S) : (double)N * (double)S;
}
