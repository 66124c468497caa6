/* Attention transfer on the GPU: formulas in ops/attention.h; summed in double, for the reasons in
 * cpu/attention.c. Forward: a kernel for the map of each network, which reads its features once,
 * and one that concludes the samples, for which all positions of a sample must be there. Backward:
 * one kernel, which reads the student once.
 *
 * Features come in two forms. "planes": neighbours in memory are positions. "rows": they are
 * channels, and a group of threads shares those of a position. */
#include "attention.h"
#include "core/rows.cuh"

extern "C" {
SK_PARAMS(attention)
SK_PARAMS(attention_backward)
}
typedef struct attention_params forward_params;
typedef struct attention_backward_params backward_params;

/* ---- planes ---- */

/* A run is kVec neighbouring positions, one access; a tile is `width` runs of a sample. A block
 * takes a tile, with `slices` threads for each run, which share its channels: so few positions
 * still keep a block busy, and its threads read whole lines of memory. */
struct tiling {
    int64_t S, per_sample;
    int width, slices;
    unsigned count; /* blocks */
};

static tiling tiling_of(int64_t N, int64_t S, int64_t vec) {
    const int64_t runs = S / vec, width = runs >= 2 * SK_WARP ? SK_WARP : runs < 1 ? 1 : runs;
    const int64_t per_sample = (runs + width - 1) / width, count = N * per_sample;
    return {S, per_sample, (int)width, SK_BLOCK / (int)width,
            count < UINT32_MAX ? (unsigned)count : UINT32_MAX}; /* more is an error at the launch */
}

/* What this thread does of its block's tile. */
struct place {
    int64_t n, s; /* its first position */
    int slice;    /* its first channel */
    bool present;
};

template <int kVec>
SK_DEVICE place place_of(const tiling &t) {
    const int64_t tile = blockIdx.x % t.per_sample;
    const int slice = threadIdx.x / t.width;
    const int64_t s = (tile * t.width + threadIdx.x % t.width) * kVec;
    return {blockIdx.x / t.per_sample, s, slice, slice < t.slices && s < t.S};
}

/* This thread's run of channel c; the items from kVec on do not count. */
template <typename T, int kVec>
SK_DEVICE void load_run(const sk_arg &x, const place &at, int64_t c,
                        sk_real<T> (&to)[sk_items<T>]) {
    sk_load<T, 1, kVec>(sk_row<T>(x, at.n, at.s) + c * x.stride[1], 1, 0, kVec, 0, to);
}

/* ---- forward ---- */

/* Leaves the means of squares over C channels. */
template <typename T, int kVec>
__global__ void __launch_bounds__(SK_BLOCK)
    attention_planes_kernel(const sk_arg x, const tiling t, int64_t C, double *map) {
    SK_SHARED(double, sums, SK_BLOCK *kVec);
    const place at = place_of<kVec>(t);
    double sum[kVec] = {0};
    for (int64_t c = at.slice; at.present && c < C; c += t.slices) {
        sk_real<T> run[sk_items<T>];
        load_run<T, kVec>(x, at, c, run);
        SK_UNROLL for (int k = 0; k < kVec; k++) sum[k] += (double)run[k] * (double)run[k];
    }
    SK_UNROLL for (int k = 0; k < kVec; k++) sums[threadIdx.x * kVec + k] = sum[k];
    __syncthreads();
    const int positions = t.width * kVec;
    const int64_t first = blockIdx.x % t.per_sample * positions;
    for (int i = threadIdx.x; i < positions && first + i < t.S; i += SK_BLOCK) {
        double total = 0;
        for (int slice = 0; slice < t.slices; slice++) total += sums[slice * positions + i];
        map[at.n * t.S + first + i] = total / (double)C;
    }
}

/* The same of rows. */
template <typename T, int kGroup, int kVec>
__global__ void __launch_bounds__(SK_BLOCK)
    attention_rows_kernel(const sk_arg x, int64_t count, int64_t S, int64_t C, double *map) {
    for (int64_t row = sk_first_row<kGroup>(); row < count; row += sk_row_step<kGroup>()) {
        const T *const from = sk_row<T>(x, row / S, row % S);
        double sum[1] = {0};
        for (int64_t base = 0; base < C; base += kGroup * sk_items<T>) {
            sk_real<T> item[sk_items<T>];
            sk_load<T, kGroup, kVec>(from, x.stride[1], base, C, 0, item);
            SK_UNROLL for (int i = 0; i < sk_items<T>; i++) sum[0] +=
                (double)item[i] * (double)item[i];
        }
        sk_group_reduce<kGroup>(sum, sk_add());
        if (sk_lane<kGroup>() == 0) map[row] = sum[0] / (double)C;
    }
}

/* Leaves the slopes of sample n; every thread returns its |Q - P|^2. */
SK_DEVICE double conclude(const forward_params &params, int64_t n) {
    const forward_params *const p = &params;
    const int64_t N = SK_DIM(p, N), S = SK_DIM(p, S);
    const double *const a = (const double *)p->maps.data + n * S, *const b = a + N * S;
    double squares[2] = {0, 0};
    for (int64_t s = threadIdx.x; s < S; s += SK_BLOCK) {
        squares[0] += a[s] * a[s];
        squares[1] += b[s] * b[s];
    }
    sk_group_reduce<SK_BLOCK>(squares, sk_add());
    const double long_a = sqrt(squares[0]), long_b = sqrt(squares[1]);
    const bool unit_a = !(long_a < p->eps), unit_b = !(long_b < p->eps);
    const double scale_a = 1 / (unit_a ? long_a : p->eps), scale_b = 1 / (unit_b ? long_b : p->eps);
    double apart[1] = {0}; /* exactly 0 for equal maps */
    for (int64_t s = threadIdx.x; s < S; s += SK_BLOCK) {
        const double d = scale_a / scale_b * a[s] - b[s];
        apart[0] += d * d;
    }
    sk_group_reduce<SK_BLOCK>(apart, sk_add());
    const double value = apart[0] * scale_b * scale_b;
    const double bb = unit_b ? 1 : squares[1] * scale_b * scale_b; /* |P|^2 */
    const double h = unit_a ? (value + (1 - bb)) / 2 : 0;
    if (threadIdx.x == 0) {
        *sk_cell<double>(p->slopes, 0, n) = scale_a / scale_b * (1 - h);
        *sk_cell<double>(p->slopes, 1, n) = scale_a * scale_b;
    }
    return value;
}

/* Leaves the slopes; the block that ends last leaves the loss. */
__global__ void __launch_bounds__(SK_BLOCK) attention_kernel(const forward_params params) {
    const forward_params *const p = &params;
    const int64_t N = SK_DIM(p, N);
    double total[1] = {0};
    for (int64_t n = blockIdx.x; n < N; n += gridDim.x) {
        const double value = conclude(params, n);
        if (threadIdx.x == 0) total[0] += value;
    }
    if (!sk_grid_sum(total, p->scratch.data) || threadIdx.x != 0) return;
    const double loss = total[0] / ((double)N * (double)SK_DIM(p, S));
    if (p->loss.dtype == SK_DT_F64)
        *(double *)p->loss.data = loss;
    else
        *(float *)p->loss.data = (float)loss;
}

/* ---- backward ---- */

/* What the student's features at a position are multiplied by. */
template <typename real>
SK_DEVICE double factor_of(const backward_params &params, int64_t n, int64_t s) {
    const backward_params *const p = &params;
    const double a = *sk_cell<double>(p->maps, 0, n, s), b = *sk_cell<double>(p->maps, 1, n, s);
    const double ratio = *sk_cell<double>(p->slopes, 0, n),
                 factor = *sk_cell<double>(p->slopes, 1, n);
    const double count = (double)SK_DIM(p, N) * (double)SK_DIM(p, S) * (double)SK_DIM(p, C);
    return factor * *(const real *)p->grad.data * 4 / count * (ratio * a - b);
}

/* Leaves grad_student. */
template <typename T, int kVec>
__global__ void __launch_bounds__(SK_BLOCK)
    attention_backward_planes_kernel(const backward_params params, const tiling t) {
    const backward_params *const p = &params;
    const int64_t C = SK_DIM(p, C);
    const place at = place_of<kVec>(t);
    if (!at.present) return;
    double factor[kVec];
    SK_UNROLL for (int k = 0; k < kVec; k++) factor[k] =
        factor_of<sk_real<T>>(params, at.n, at.s + k);
    for (int64_t c = at.slice; c < C; c += t.slices) {
        sk_real<T> run[sk_items<T>];
        load_run<T, kVec>(p->student, at, c, run);
        SK_UNROLL for (int k = 0; k < kVec; k++) run[k] = (sk_real<T>)(factor[k] * run[k]);
        T *const to = sk_row<T>(p->grad_student, at.n, at.s) + c * p->grad_student.stride[1];
        sk_store<T, 1, kVec>(to, 1, 0, kVec, run);
    }
}

/* The same of rows. */
template <typename T, int kGroup, int kVec>
__global__ void __launch_bounds__(SK_BLOCK)
    attention_backward_rows_kernel(const backward_params params) {
    const backward_params *const p = &params;
    const int64_t C = SK_DIM(p, C), S = SK_DIM(p, S), count = SK_DIM(p, N) * S;
    for (int64_t row = sk_first_row<kGroup>(); row < count; row += sk_row_step<kGroup>()) {
        const int64_t n = row / S, s = row % S;
        const double factor = factor_of<sk_real<T>>(params, n, s);
        for (int64_t base = 0; base < C; base += kGroup * sk_items<T>) {
            sk_real<T> x[sk_items<T>];
            sk_load<T, kGroup, kVec>(sk_row<T>(p->student, n, s), p->student.stride[1], base, C, 0,
                                     x);
            SK_UNROLL for (int i = 0; i < sk_items<T>; i++) x[i] = (sk_real<T>)(factor * x[i]);
            sk_store<T, kGroup, kVec>(sk_row<T>(p->grad_student, n, s), p->grad_student.stride[1],
                                      base, C, x);
        }
    }
}

/* ---- launches ---- */

/* How some "NC*" tensors are served together. */
struct form {
    bool planes;
    sk_layout rows; /* where they are no planes */
    int64_t vec;    /* elements in an access of planes */
    tiling tiles;
};

static form form_of(const sk_dims &dims, int64_t C, int64_t element,
                    std::initializer_list<const sk_arg *> args) {
    const int64_t N = dims.size['N' - 'A'], S = dims.size['S' - 'A'], wide = 16 / element;
    sk_dims own = dims;
    own.size['C' - 'A'] = C;
    const sk_layout rows = sk_layout_of(own, element, args);
    bool planes = S > 1, aligned = S % wide == 0;
    for (const sk_arg *x : args) {
        planes = planes && x->stride[2] == 1 && x->stride[1] != 1;
        aligned = aligned && (uintptr_t)x->data % 16 == 0 && x->stride[1] % wide == 0 &&
                  (N <= 1 || x->stride[0] % wide == 0);
    }
    const int64_t vec = aligned ? wide : 1;
    return {planes, rows, vec, tiling_of(N, S, vec)};
}

static void launch_map(const forward_params &params, const sk_arg &x, int64_t C, double *map,
                       void *stream) {
    const forward_params *const p = &params;
    const int64_t S = SK_DIM(p, S), count = SK_DIM(p, N) * S;
    SK_SWITCH_FLOATING(x.dtype, T, {
        const form f = form_of(params.dims, C, sizeof(T), {&x});
        if (f.planes) {
            const auto kernel = f.vec > 1 ? attention_planes_kernel<T, 16 / sizeof(T)>
                                          : attention_planes_kernel<T, 1>;
            SK_LAUNCH(kernel, f.tiles.count, SK_BLOCK, 0, stream, x, f.tiles, C, map);
        } else {
            const auto kernel = SK_KERNEL(attention_rows_kernel, T, f.rows);
            SK_LAUNCH(kernel, sk_grid(count, f.rows), SK_BLOCK, 0, stream, x, count, S, C, map);
        }
    })
}

extern "C" int sk_cuda_attention(const struct attention_params *params, void *stream) {
    const forward_params *const p = params;
    const int zeroed = cudaMemsetAsync(p->scratch.data, 0, 16, (cudaStream_t)stream);
    if (zeroed != cudaSuccess) return zeroed;
    const int64_t N = SK_DIM(p, N), S = SK_DIM(p, S);
    double *const maps = (double *)p->maps.data;
    if (N * S > 0) launch_map(*p, p->student, SK_DIM(p, C), maps, stream);
    if (N * S > 0) launch_map(*p, p->teacher, SK_DIM(p, D), maps + N * S, stream);
    SK_LAUNCH(attention_kernel, sk_grid(N, {SK_BLOCK, false}), SK_BLOCK, 0, stream, *p);
    return cudaGetLastError();
}

extern "C" int sk_cuda_attention_backward(const struct attention_backward_params *params,
                                          void *stream) {
    const backward_params *const p = params;
    const int64_t count = SK_DIM(p, N) * SK_DIM(p, S);
    if (count == 0) return cudaSuccess;
    SK_SWITCH_FLOATING(p->student.dtype, T, {
        const form f = form_of(p->dims, SK_DIM(p, C), sizeof(T), {&p->student, &p->grad_student});
        if (f.planes) {
            const auto kernel = f.vec > 1 ? attention_backward_planes_kernel<T, 16 / sizeof(T)>
                                          : attention_backward_planes_kernel<T, 1>;
            SK_LAUNCH(kernel, f.tiles.count, SK_BLOCK, 0, stream, *p, f.tiles);
        } else {
            const auto kernel = SK_KERNEL(attention_backward_rows_kernel, T, f.rows);
            SK_LAUNCH(kernel, sk_grid(count, f.rows), SK_BLOCK, 0, stream, *p);
        }
    })
    return cudaGetLastError();
}
