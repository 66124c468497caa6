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

/* What row [n, s] comes to in double. */
typedef double (*sk_row_value)(const void *params, int64_t n, int64_t s);

/* The sum of rows, of which some may be too large for a float: those are found once more. */
static inline double sk_sum_rows(const sk_arg *rows, int64_t N, int64_t S, sk_row_value value,
                                 const void *params) {
    double sum = sk_sum(rows, N, S);
    if (sizeof(real) == 8 || !isinf(sum)) return sum;
    sum = 0;
    for (int64_t n = 0; n < N; n++) {
        for (int64_t s = 0; s < S; s++) {
            const double x = sk_load_one(rows, n * rows->stride[0] + s * rows->stride[1]);
            sum += isinf(x) ? value(params, n, s) : x;
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

/* loss = sum(rows) / denominator; denominator = divisor, else sum(weight), else N * S for a mean,
 * and 1 otherwise. */
static inline void sk_reduce_rows(const sk_arg *rows, sk_row_value value, const void *params,
                                  const sk_arg *weight, const sk_arg *divisor, int64_t reduction,
                                  int64_t N, int64_t S, const sk_arg *loss,
                                  const sk_arg *denominator) {
    double count = 1;
    if (reduction == SELFKD_MEAN && divisor->data)
        count = sk_load_one(divisor, 0);
    else if (reduction == SELFKD_MEAN)
        count = weight->data ? sk_sum(weight, N, S) : (double)N * (double)S;
    *(real *)loss->data = (real)(sk_sum_rows(rows, N, S, value, params) / count);
    *(real *)denominator->data = (real)count;
}
