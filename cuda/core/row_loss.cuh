/* Row losses: what all losses of rows do alike on the GPU. Every row has a weight; a row of weight
 * 0 is not looked at, whatever it holds. Forward leaves the loss of each row, a few numbers that
 * are saved for its gradient, and, in the block that ends last, the sum. */
#pragma once
#include "core/rows.cuh"

/* Calls row(n, s) for each row of this group. */
template <typename Params, typename Row>
SK_DEVICE void sk_each_row(const Params &p, Row row) {
    const int64_t S = SK_DIM(&p, S);
    sk_each(SK_ROWS(&p), [&](int64_t i) { row(i / S, i % S); });
}

/* What the sum of rows is divided by; their weights sum to `weights`. */
template <typename real, typename Params>
SK_DEVICE double sk_denominator(const Params &p, double weights) {
    if (p.reduction != SELFKD_MEAN) return 1;
    return p.divisor.data ? *(const real *)p.divisor.data : weights;
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
    const double denominator = sk_denominator<real>(p, total[1]);
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
