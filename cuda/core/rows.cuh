/* Rows of memory: where they are, reading and writing them, how a launch serves them.
 *
 * A row of C classes is read by a group of sk_group() threads: 1 (neighbouring threads have
 * neighbouring rows), 32 (a warp) or SK_BLOCK (a block): the width of a block of threads, whose
 * height is its number of rows. In one step each thread of the group takes sk_items<T> elements. */
#pragma once
#include <initializer_list>
#include <type_traits>

#include "core/device.cuh"

/* ---- where things are ---- */

/* A row of an "NC*" tensor; a cell of an "N*" tensor; a cell of the k-th "N*" tensor of a "4N*". */
template <typename T>
SK_DEVICE T *sk_row(const sk_arg &x, int64_t n, int64_t s) {
    return (T *)x.data + n * x.stride[0] + s * x.stride[2];
}
/* Of a gradient, or NULL where it is not wanted; and what stands for that among a launch's tensors.
 */
template <typename T>
SK_DEVICE T *sk_wanted_row(const sk_arg &x, int64_t n, int64_t s) {
    return x.data ? sk_keep(sk_row<T>(x, n, s)) : nullptr;
}
#define SK_OR(x, other) ((x).data ? &(x) : &(other))

template <typename T>
SK_DEVICE T *sk_cell(const sk_arg &x, int64_t n, int64_t s) {
    return (T *)x.data + n * x.stride[0] + s * x.stride[1];
}
template <typename T>
SK_DEVICE T *sk_cell(const sk_arg &x, int k, int64_t n, int64_t s) {
    return (T *)x.data + k * x.stride[0] + n * x.stride[1] + s * x.stride[2];
}

/* A weight is BOOL or ACC, and absent means 1. */
template <typename real>
SK_DEVICE real sk_weight(const sk_arg &weight, int64_t n, int64_t s) {
    if (!weight.data) return 1;
    if (weight.dtype == SK_DT_BOOL) return *sk_cell<uint8_t>(weight, n, s) != 0;
    return *sk_cell<real>(weight, n, s);
}

/* Element `at` of a tensor of any floating dtype. */
SK_DEVICE double sk_load_any(const void *data, int dtype, int64_t at) {
    SK_SWITCH_FLOATING(dtype, T, return sk_widen(((const T *)data)[at]))
}

/* Row [n, s] of an "NC*" tensor of any floating dtype; class by class, for what is rare. */
struct sk_any_row {
    const void *data;
    int dtype;
    int64_t first, stride;
    __device__ double operator()(int64_t c) const {
        return sk_load_any(data, dtype, first + c * stride);
    }
};
SK_DEVICE sk_any_row sk_any_row_of(const sk_arg &x, int64_t n, int64_t s) {
    return {x.data, x.dtype, n * x.stride[0] + s * x.stride[2], x.stride[1]};
}

/* ---- rows ---- */

/* 16 bytes: a thousand threads of a multiprocessor then have 32 KB of two tensors in flight, enough
 * for the latency. */
template <typename T>
constexpr int sk_items = 16 / sizeof(T);

/* Blocks that a multiprocessor should hold of a kernel: a thread then has 80 of its 65,536
 * registers, or 128 where numbers are double or each item has an address of its own. */
template <typename T, int kVec>
constexpr int sk_resident = sizeof(T) == 8 || kVec == 1 ? 2 : 3;

/* The number of this thread in its group. */
SK_DEVICE int sk_lane() { return (int)threadIdx.x; }

/* Elements that a group takes in one step. */
template <typename T>
SK_DEVICE int sk_step() {
    return sk_group() * sk_items<T>;
}

/* The rows of this group are sk_first_row, + sk_row_step, ... */
SK_DEVICE int64_t sk_first_row() { return (int64_t)blockIdx.x * blockDim.y + threadIdx.y; }
SK_DEVICE int64_t sk_row_step() { return (int64_t)gridDim.x * blockDim.y; }

/* Which class item i is, counted from the first of a step; kVec of them are neighbours in memory.
 */
template <int kVec>
SK_DEVICE int sk_offset(int i) {
    return (i / kVec * sk_group() + sk_lane()) * kVec + i % kVec;
}
template <int kVec>
SK_DEVICE int64_t sk_class(int64_t base, int i) {
    return base + sk_offset<kVec>(i);
}

/* How many classes there are from the first of a step on, or more than it takes. */
SK_DEVICE int sk_present(int64_t base, int64_t C) {
    return C - base < 0x10000 ? (int)(C - base) : 0x10000;
}

/* Whether any thread of the group has a class for item i, if it has one for the first: the same
 * answer in all of them. */
template <int kVec>
SK_DEVICE bool sk_any_class(int64_t base, int i, int64_t C) {
    return i < kVec || i / kVec * kVec * sk_group() < sk_present(base, C);
}

/* kVec neighbours, from and to how they lie in memory. */
template <typename Stored, int kVec, typename real>
SK_DEVICE void sk_unpack(const sk_bits<kVec * sizeof(Stored)> &bits, real *to) {
    Stored x[kVec];
    unsigned words[(kVec * sizeof(Stored) + 3) / 4];
    memcpy(x, &bits, sizeof x);
    memcpy(words, &bits, sizeof x);
    SK_UNROLL for (int k = 0; k < kVec; k++) {
        if constexpr (std::is_same<Stored, __nv_bfloat16>::value)
            to[k] = k % 2 ? sk_second_of(words[k / 2]) : sk_first_of(words[k / 2]);
        else
            to[k] = (real)sk_widen(x[k]);
    }
}
template <typename T, int kVec>
SK_DEVICE sk_bits<kVec * sizeof(T)> sk_pack(const sk_real<T> *from) {
    sk_bits<kVec * sizeof(T)> bits;
    if constexpr (sizeof(T) == 2) {
        unsigned words[kVec / 2];
        SK_UNROLL for (int k = 0; k < kVec; k += 2) words[k / 2] =
            sk_narrow_two(from[k], from[k + 1], (T *)0);
        memcpy(&bits, words, sizeof bits);
    } else {
        memcpy(&bits, from, sizeof bits);
    }
    return bits;
}

/* kVec neighbours of memory. */
template <typename T, int kVec>
SK_DEVICE void sk_load_run(const T *from, sk_real<T> *to) {
    if constexpr (kVec == 1) {
        *to = sk_widen(*from);
    } else {
        const sk_bits<kVec * sizeof(T)> bits = *(const sk_bits<kVec * sizeof(T)> *)from;
        sk_unpack<T, kVec>(bits, to);
    }
}
template <typename T, int kVec>
SK_DEVICE void sk_store_run(const sk_real<T> *from, T *to) {
    if constexpr (kVec == 1)
        sk_narrow(*from, to);
    else
        sk_write(sk_pack<T, kVec>(from), to);
}

/* This thread's items of the step; `absent`, or the infinity that it rounds to, for those beyond
 * C. Steps and items are those of T, however the row is stored. */
template <typename T, int kVec, typename Stored>
SK_DEVICE void sk_load(const Stored *row, int64_t stride, int64_t base, int64_t C,
                       sk_real<T> absent, sk_real<T> (&to)[sk_items<T>]) {
    if constexpr (kVec == 1) {
        const int present = sk_present(base, C) - sk_lane(), group = sk_group();
        const int64_t step = group * stride;
        row += (base + sk_lane()) * stride;
        SK_UNROLL for (int i = 0; i < sk_items<T>; i++, row += step) to[i] =
            i * group < present ? (sk_real<T>)sk_widen(*row) : absent;
    } else {
        SK_UNROLL for (int i = 0; i < sk_items<T>; i += kVec) {
            const int64_t c = base + sk_offset<kVec>(i);
            sk_real<Stored> fill[kVec];
            SK_UNROLL for (int k = 0; k < kVec; k++) fill[k] = (sk_real<Stored>)absent;
            auto bits = sk_pack<Stored, kVec>(fill);
            if (c < C) bits = *(const decltype(bits) *)(row + c);
            sk_unpack<Stored, kVec>(bits, &to[i]);
        }
    }
}

/* The same, and nothing below `low`; returns the largest, `low` at least. NaN stays, and is not the
 * largest. A vector of bfloat16 is compared two by two, as it lies in memory. */
template <typename T, int kVec, typename Stored>
SK_DEVICE sk_real<T> sk_load_above(const Stored *row, int64_t stride, int64_t base, int64_t C,
                                   sk_real<T> absent, sk_real<T> low,
                                   sk_real<T> (&to)[sk_items<T>]) {
    typedef sk_real<T> real;
    real largest = low;
    if constexpr (kVec > 1 && std::is_same<Stored, __nv_bfloat16>::value) {
        constexpr int kWords = kVec / 2;
        constexpr __nv_bfloat16 *kStored = 0;
        const unsigned low_two = sk_narrow_two((float)low, (float)low, kStored);
        const unsigned absent_two = sk_narrow_two((float)absent, (float)absent, kStored);
        unsigned top = low_two;
        SK_UNROLL for (int i = 0; i < sk_items<T>; i += kVec) {
            const int64_t c = sk_class<kVec>(base, i);
            unsigned word[kWords];
            SK_UNROLL for (int k = 0; k < kWords; k++) word[k] = absent_two;
            if (c < C) {
                const auto bits = *(const sk_bits<kVec * sizeof(Stored)> *)(row + c);
                memcpy(word, &bits, sizeof word);
            }
            SK_UNROLL for (int k = 0; k < kWords; k++) {
                word[k] = sk_at_least_two(word[k], low_two);
                top = sk_max_two(top, word[k]);
                to[i + 2 * k] = sk_first_of(word[k]);
                to[i + 2 * k + 1] = sk_second_of(word[k]);
            }
        }
        largest = sk_max(sk_first_of(top), sk_second_of(top));
    } else {
        sk_load<T, kVec>(row, stride, base, C, absent, to);
        SK_UNROLL for (int i = 0; i < sk_items<T>; i++) largest =
            sk_max(largest, to[i] = sk_at_least(to[i], low));
    }
    return largest;
}

/* The same of a row with a dtype of its own (CONSTANT). */
template <typename T, int kVec>
SK_DEVICE void sk_load_constant(const sk_any_row &row, int64_t base, int64_t C, sk_real<T> absent,
                                sk_real<T> (&to)[sk_items<T>]) {
    SK_SWITCH_FLOATING(
        row.dtype, Stored,
        sk_load<T, kVec>((const Stored *)row.data + row.first, row.stride, base, C, absent, to));
}

template <typename T, int kVec>
SK_DEVICE void sk_store(T *row, int64_t stride, int64_t base, int64_t C,
                        const sk_real<T> (&from)[sk_items<T>]) {
    if constexpr (kVec == 1) {
        const int present = sk_present(base, C) - sk_lane(), group = sk_group();
        const int64_t step = group * stride;
        row += (base + sk_lane()) * stride;
        SK_UNROLL for (int i = 0; i < sk_items<T>; i++, row += step) {
            if (i * group < present) sk_narrow(from[i], row);
        }
    } else {
        SK_UNROLL for (int i = 0; i < sk_items<T>; i += kVec) {
            const int64_t c = base + sk_offset<kVec>(i);
            if (c < C) sk_store_run<T, kVec>(&from[i], row + c);
        }
    }
}

/* ---- how a launch serves its rows ---- */

struct sk_layout {
    int group;
    bool vector; /* 16-byte accesses */
};

/* Of what is no row: a thread for each. */
constexpr sk_layout kOneEach = {1, false};

/* The layout that suits all of the "NC*" tensors of a call, of `least` threads for a row at least;
 * those not given do not matter. */
static inline sk_layout sk_layout_of(const sk_dims &dims, int64_t element,
                                     std::initializer_list<const sk_arg *> args, int least = 1) {
    const int64_t N = dims.size['N' - 'A'], C = dims.size['C' - 'A'], S = dims.size['S' - 'A'];
    const int64_t wide = 16 / element;
    bool adjacent_rows = true, wide_rows = C % wide == 0;
    for (const sk_arg *arg : args) {
        const int64_t *const stride = arg->stride;
        if (!arg->data) continue;
        adjacent_rows = adjacent_rows && stride[1] != 1 && stride[S > 1 ? 2 : 0] == 1;
        wide_rows = wide_rows && stride[1] == 1 && (uintptr_t)arg->data % 16 == 0 &&
                    (N <= 1 || stride[0] % wide == 0) && (S <= 1 || stride[2] % wide == 0);
    }
    if (adjacent_rows && least == 1) return kOneEach;
    return {C <= 2048 ? SK_WARP : SK_BLOCK, wide_rows};
}

/* Threads of a block, and blocks for that many rows; at least one, for what is done once per call.
 */
static inline dim3 sk_block(sk_layout layout) {
    return dim3((unsigned)layout.group, (unsigned)(SK_BLOCK / layout.group));
}
static inline unsigned sk_grid(int64_t rows, sk_layout layout) {
    const int64_t per_block = SK_BLOCK / layout.group;
    const int64_t blocks = (rows + per_block - 1) / per_block;
    return blocks < 1 ? 1 : blocks > SK_REDUCE_BLOCKS ? SK_REDUCE_BLOCKS : (unsigned)blocks;
}

/* Calls each(i) for the numbers below `count`, of rows or of what else a launch serves, that are
 * this group's. */
template <typename Each>
SK_DEVICE void sk_each(int64_t count, Each each) {
    for (int64_t i = sk_first_row(); i < count; i += sk_row_step()) each(i);
}

/* How many rows there are of an operator whose tensors are "NC*". */
#define SK_ROWS(params) (SK_DIM(params, N) * SK_DIM(params, S))

/* ---- launches ---- */

/* Zeroes the ticket of a call that has scratch; one without sums nothing up over its grid. */
template <typename Params>
static auto sk_zero_ticket(const Params &params, void *stream, int)
    -> decltype(params.scratch, cudaSuccess) {
    return cudaMemsetAsync(params.scratch.data, 0, 16, (cudaStream_t)stream);
}
template <typename Params>
static cudaError_t sk_zero_ticket(const Params &, void *, long) {
    return cudaSuccess;
}

/* The instances of a kernel: of storage type T and, where it is vectorised, of kVec items that are
 * neighbours in memory. A lambda, since no template takes a kernel template. */
#define SK_INSTANCES(kernel, ...) \
    [](auto type, auto vec) { return kernel<decltype(type), decltype(vec)::value, ##__VA_ARGS__>; }
#define SK_INSTANCES_FOR_EACH(kernel) [](auto type) { return kernel<decltype(type)>; }

/* Launches what serves `count` rows of some "NC*" tensors, T being the dtype of the first, with
 * 16-byte accesses where all of them allow it. The kernel is given params, and more. */
template <int kLeast = 1, typename Instances, typename Params, typename... More>
static int sk_launch_rows(Instances instances, int64_t count,
                          std::initializer_list<const sk_arg *> tensors, void *stream,
                          const Params &params, const More &...more) {
    const int zeroed = sk_zero_ticket(params, stream, 0);
    if (zeroed != cudaSuccess) return zeroed;
    SK_SWITCH_FLOATING((*tensors.begin())->dtype, T, {
        const sk_layout layout = sk_layout_of(params.dims, sizeof(T), tensors, kLeast);
        const auto kernel = layout.vector
                                ? instances(T(), std::integral_constant<int, 16 / sizeof(T)>())
                                : instances(T(), std::integral_constant<int, 1>());
        SK_LAUNCH(kernel, sk_grid(count, layout), sk_block(layout), 0, stream, params, more...);
    })
    return cudaGetLastError();
}

/* The same of what is no row: a thread for each of `count`. */
template <typename Instances, typename Params, typename... More>
static int sk_launch_each(Instances instances, int64_t count, int dtype, void *stream,
                          const Params &params, const More &...more) {
    const int zeroed = sk_zero_ticket(params, stream, 0);
    if (zeroed != cudaSuccess) return zeroed;
    SK_SWITCH_FLOATING(dtype, T, {
        SK_LAUNCH(instances(T()), sk_grid(count, kOneEach), sk_block(kOneEach), 0, stream, params,
                  more...);
    })
    return cudaGetLastError();
}
