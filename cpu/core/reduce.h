/* The scalar loss of a row loss, from its per-row losses, in an order that depends on nothing but
 * their number. */
#pragma once
#include "cpu/core/chunk.h"

enum { SK_BLOCK = 4096 }; /* elements summed between two additions to the total */

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
            const real *const block = sk_read_exactly(x, at, stride, count, copy);
            double part = 0;
#pragma omp simd reduction(+ : part)
            for (int64_t j = 0; j < count; j++) part += block[j];
            sum += part;
        }
    }
    return sum;
}

/* loss = sum(rows) / denominator; denominator = divisor, else sum(weight), else N * S for a mean,
 * and 1 otherwise. */
static inline void sk_reduce_rows(const sk_arg *rows, const sk_arg *weight, const sk_arg *divisor,
                                  int64_t reduction, int64_t N, int64_t S, const sk_arg *loss,
                                  const sk_arg *denominator) {
    double count = 1;
    if (reduction == SELFKD_MEAN && divisor->data)
        count = sk_load_one(divisor, 0);
    else if (reduction == SELFKD_MEAN)
        count = weight->data ? sk_sum(weight, N, S) : (double)N * (double)S;
    *(real *)loss->data = (real)(sk_sum(rows, N, S) / count);
    *(real *)denominator->data = (real)count;
}
