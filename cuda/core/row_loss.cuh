/* Row losses: what all losses of rows do alike on the GPU. Every row has a weight; a row of weight
 * 0 is not looked at, whatever it holds. Forward leaves the loss of each row, a few numbers that
 * are saved for its gradient, and, in the block that ends last, the sum. */
#pragma once
#include "core/rows.cuh"

/* Calls row(n, s) for each row of this group. */
template <typename Params, typename Row>
SK_DEVICE void sk_each_row(const Params &params, Row row) {
    const Params *const p = &params;
    const int64_t S = SK_DIM(p, S), count = SK_DIM(p, N) * S;
    for (int64_t i = sk_first_row(); i < count; i += sk_row_step()) row(i / S, i % S);
}

/* Leaves rows, saved, loss and denominator. row(n, s, w, saved) gives the loss of a row of weight
 * w, times w, and what is saved of it: the same in all threads of the group, or in the first of
 * them. */
template <typename T, int kSaved, typename Params, typename Row>
SK_DEVICE void sk_row_forward(const Params &p, Row row) {
    typedef sk_real<T> real;
    double total[2] = {0, 0};
    sk_each_row(p, [&](int64_t n, int64_t s) {
        const real w = sk_weight<real>(p.weight, n, s);
        double saved[kSaved] = {}, value = 0;
        if (w != 0) value = row(n, s, w, saved);
        if (sk_lane() != 0) return;
        *sk_cell<real>(p.rows, n, s) = (real)value;
        SK_UNROLL for (int k = 0; k < kSaved; k++) * sk_cell<double>(p.saved, k, n, s) = saved[k];
        total[0] += value;
        total[1] += w;
    });
    if (!sk_grid_sum(total, p.scratch.data) || sk_thread() != 0) return;
    const real *const divisor = (const real *)p.divisor.data;
    const bool mean = p.reduction == SELFKD_MEAN;
    const double denominator = !mean ? 1 : divisor ? *divisor : total[1];
    *(real *)p.loss.data = (real)(total[0] / denominator);
    *(real *)p.denominator.data = (real)denominator;
}

/* What reaches row [n, s]: its incoming gradient, its weight, and the k-th number that was saved.
 */
template <typename real, typename Params>
struct sk_incoming {
    const Params &p;
    int64_t n, s;
    double grad, weight, denominator;
    __device__ sk_incoming(const Params &params, int64_t row, int64_t position)
        : p(params),
          n(row),
          s(position),
          grad(*sk_cell<real>(p.grad, n, s)),
          weight(sk_weight<real>(p.weight, n, s)),
          denominator(*(const real *)p.denominator.data) {}
    __device__ double saved(int k) const { return *sk_cell<double>(p.saved, k, n, s); }
};

/* ---- launches ---- */

/* Zeroes the ticket of a sum over the grid. */
static inline int sk_zero_ticket(const sk_arg &scratch, void *stream) {
    return cudaMemsetAsync(scratch.data, 0, 16, (cudaStream_t)stream);
}

/* Launches kernel<T, kVec> over the rows of params, in the layout that suits the tensors named
 * last. T is the dtype of the first of them. Ends in a cudaError_t. */
#define SK_LAUNCH_ROWS(kernel, params, stream, first, ...)                          \
    SK_SWITCH_FLOATING((first).dtype, T, {                                          \
        const sk_layout layout =                                                    \
            sk_layout_of((params)->dims, sizeof(T), {&(first), ##__VA_ARGS__});     \
        const auto instance = SK_KERNEL(kernel, T, layout);                         \
        SK_LAUNCH(instance, sk_grid(SK_DIM(params, N) * SK_DIM(params, S), layout), \
                  sk_block(layout), 0, stream, *(params));                          \
    })                                                                              \
    return cudaGetLastError()
