/* How kernels talk to the hardware: launches, rows of memory, reductions, dtypes. Kernels use
 * nothing else.
 *
 * A row of C classes is read by a group of kGroup threads: 1 (neighbouring threads have
 * neighbouring rows), 32 (a warp) or SK_BLOCK (a block). In one step each thread of the group takes
 * sk_items<T> elements. */
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#include <math.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <initializer_list>
#include <type_traits>

#include "core/contract.h"

#define SK_DEVICE static __device__ __forceinline__

enum { SK_WARP = 32, SK_BLOCK = 256 };

/* ---- launch and shared memory: all that differs where g++ compiles the kernels for tests/simt
 * ---- */

#ifdef __CUDACC__
#define SK_LAUNCH(kernel, grid, block, shared_bytes, stream, ...) \
    (kernel)<<<(grid), (block), (shared_bytes), (cudaStream_t)(stream)>>>(__VA_ARGS__)
#define SK_UNROLL _Pragma("unroll")
#define SK_ROLLED _Pragma("unroll 1")
#define SK_SHARED(type, name, count) __shared__ type name[count]
#define SK_SHARED_DYNAMIC(type, name) extern __shared__ type name[]
#else
#define SK_LAUNCH(kernel, grid, block, shared_bytes, stream, ...) \
    simt_launch((grid), (block), (shared_bytes), (stream), [=] { (kernel)(__VA_ARGS__); })
#define SK_UNROLL
#define SK_ROLLED
#define SK_SHARED(type, name, count) \
    static char name##_key;          \
    type *const name = (type *)simt_shared(&name##_key, sizeof(type) * (count))
#define SK_SHARED_DYNAMIC(type, name) type *const name = (type *)simt_shared_dynamic()
#endif

/* ---- dtypes: T is how a tensor is stored, sk_real<T> what is computed with ---- */

template <typename T>
struct sk_real_of {
    typedef float type;
};
template <>
struct sk_real_of<double> {
    typedef double type;
};
template <typename T>
using sk_real = typename sk_real_of<T>::type;

/* Runs the statement with `T` as the storage type of a FLOATING tensor. */
#define SK_SWITCH_FLOATING(dtype, T, ...) \
    switch (dtype) {                      \
    case SK_DT_F16: {                     \
        typedef __half T;                 \
        __VA_ARGS__;                      \
        break;                            \
    }                                     \
    case SK_DT_BF16: {                    \
        typedef __nv_bfloat16 T;          \
        __VA_ARGS__;                      \
        break;                            \
    }                                     \
    case SK_DT_F32: {                     \
        typedef float T;                  \
        __VA_ARGS__;                      \
        break;                            \
    }                                     \
    default: {                            \
        typedef double T;                 \
        __VA_ARGS__;                      \
    }                                     \
    }

SK_DEVICE float sk_widen(__half x) { return __half2float(x); }
SK_DEVICE float sk_widen(__nv_bfloat16 x) { return __bfloat162float(x); }
SK_DEVICE float sk_widen(float x) { return x; }
SK_DEVICE double sk_widen(double x) { return x; }

SK_DEVICE void sk_narrow(float x, __half *to) { *to = __float2half_rn(x); }
SK_DEVICE void sk_narrow(float x, __nv_bfloat16 *to) { *to = __float2bfloat16_rn(x); }
SK_DEVICE void sk_narrow(float x, float *to) { *to = x; }
SK_DEVICE void sk_narrow(double x, double *to) { *to = x; }

/* Two neighbours of a two-byte dtype, the first in the low half. */
SK_DEVICE unsigned sk_narrow_two(float first, float second, __half *) {
    unsigned word;
#ifdef __CUDA_ARCH__
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(second), "f"(first));
#else
    const __half two[2] = {__float2half_rn(first), __float2half_rn(second)};
    memcpy(&word, two, sizeof word);
#endif
    return word;
}
SK_DEVICE unsigned sk_narrow_two(float first, float second, __nv_bfloat16 *) {
    unsigned word;
#ifdef __CUDA_ARCH__
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(second), "f"(first));
#else
    const __nv_bfloat16 two[2] = {__float2bfloat16_rn(first), __float2bfloat16_rn(second)};
    memcpy(&word, two, sizeof word);
#endif
    return word;
}

SK_DEVICE float sk_float(unsigned bits) {
    float x;
    memcpy(&x, &bits, sizeof x);
    return x;
}

/* ---- registers: what a loop needs is found before it, though the compiler thinks it cheap ---- */

SK_DEVICE float sk_keep(float x) {
#ifdef __CUDA_ARCH__
    asm("" : "+f"(x));
#endif
    return x;
}
SK_DEVICE double sk_keep(double x) {
#ifdef __CUDA_ARCH__
    asm("" : "+d"(x));
#endif
    return x;
}
/* An address in global memory. */
template <typename T>
SK_DEVICE T *sk_keep(T *x) {
#ifdef __CUDA_ARCH__
    size_t at = __cvta_generic_to_global(x);
    asm("" : "+l"(at));
    x = (T *)__cvta_global_to_generic(at);
#endif
    return x;
}

/* ---- where things are ---- */

/* A row of an "NC*" tensor; a cell of an "N*" tensor; a cell of the k-th "N*" tensor of a "4N*". */
template <typename T>
SK_DEVICE T *sk_row(const sk_arg &x, int64_t n, int64_t s) {
    return (T *)x.data + n * x.stride[0] + s * x.stride[2];
}
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

/* A tensor of any floating dtype, element by element. */
SK_DEVICE double sk_load_any(const sk_arg &x, int64_t at) {
    switch (x.dtype) {
    case SK_DT_F16:
        return sk_widen(((const __half *)x.data)[at]);
    case SK_DT_BF16:
        return sk_widen(((const __nv_bfloat16 *)x.data)[at]);
    case SK_DT_F32:
        return ((const float *)x.data)[at];
    default:
        return ((const double *)x.data)[at];
    }
}

/* Ends the kernel with an error, as PyTorch's device assertions do. */
SK_DEVICE void sk_assert(bool holds, const char *what) {
#ifdef __CUDA_ARCH__
    if (!holds) __assert_fail(what, __FILE__, __LINE__, "selfkd");
#else
    if (!holds) {
        fprintf(stderr, "selfkd: %s\n", what);
        abort();
    }
#endif
}

/* ---- arithmetic ---- */

/* 2^x. float: at most 2 ulp off, results below 2^-126 become 0. */
SK_DEVICE float sk_exp2(float x) {
#ifdef __CUDA_ARCH__
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
#else
    return exp2f(x);
#endif
}
SK_DEVICE double sk_exp2(double x) { return exp2(x); }

/* The larger of both; NaN where x is NaN (fmax would drop it). */
SK_DEVICE float sk_at_least(float x, float low) {
#ifdef __CUDA_ARCH__
    float y;
    asm("max.NaN.f32 %0, %1, %2;" : "=f"(y) : "f"(x), "f"(low));
    return y;
#else
    return x < low ? low : x;
#endif
}
SK_DEVICE double sk_at_least(double x, double low) { return x < low ? low : x; }

SK_DEVICE float sk_max(float x, float y) { return fmaxf(x, y); }
SK_DEVICE double sk_max(double x, double y) { return fmax(x, y); }

/* ---- rows ---- */

/* 16 bytes: a thousand threads of a multiprocessor then have 32 KB of two tensors in flight, enough
 * for the latency. */
template <typename T>
constexpr int sk_items = 16 / sizeof(T);

/* Blocks that a multiprocessor should hold of a kernel: a thread then has 80 of its 65,536
 * registers, or 128 where numbers are double or each item has an address of its own. */
template <typename T, int kVec>
constexpr int sk_resident = sizeof(T) == 8 || kVec == 1 ? 2 : 3;

template <int kGroup>
SK_DEVICE int sk_lane() {
    return threadIdx.x % kGroup;
}

/* The rows of this group are sk_first_row, + sk_row_step, ... */
template <int kGroup>
SK_DEVICE int64_t sk_first_row() {
    return (int64_t)blockIdx.x * (SK_BLOCK / kGroup) + threadIdx.x / kGroup;
}
template <int kGroup>
SK_DEVICE int64_t sk_row_step() {
    return (int64_t)gridDim.x * (SK_BLOCK / kGroup);
}

/* In the step at `base`, the class of item i. kVec neighbouring items are neighbours in memory. */
template <int kGroup, int kVec>
SK_DEVICE int64_t sk_class(int64_t base, int i) {
    return base + (int64_t)(i / kVec) * kGroup * kVec + sk_lane<kGroup>() * kVec + i % kVec;
}

/* Whether any thread of the group has a class for item i: the same answer in all of them. */
template <int kGroup, int kVec>
SK_DEVICE bool sk_any_class(int64_t base, int i, int64_t C) {
    return base + (int64_t)(i / kVec) * kGroup * kVec < C;
}

/* kBytes of memory in one access, or in several of 16 bytes. */
template <int kBytes>
struct sk_bits {
    uint4 part[kBytes / 16];
};
template <>
struct sk_bits<8> {
    uint2 part;
};
template <>
struct sk_bits<4> {
    unsigned part;
};

/* In one access: the compiler takes an assignment apart. */
SK_DEVICE void sk_write(const sk_bits<16> &bits, void *to) {
#ifdef __CUDA_ARCH__
    const uint4 x = bits.part[0];
    asm volatile("st.global.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(__cvta_generic_to_global(to)),
                 "r"(x.x), "r"(x.y), "r"(x.z), "r"(x.w)
                 : "memory");
#else
    memcpy(to, &bits, sizeof bits);
#endif
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
            to[k] = sk_float(k % 2 ? words[k / 2] & 0xffff0000u : words[k / 2] << 16);
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

/* This thread's items of the step; `absent`, or the infinity that it rounds to, for those beyond
 * C. Steps and items are those of T, however the row is stored. */
template <typename T, int kGroup, int kVec, typename Stored>
SK_DEVICE void sk_load(const Stored *row, int64_t stride, int64_t base, int64_t C,
                       sk_real<T> absent, sk_real<T> (&to)[sk_items<T>]) {
    SK_UNROLL for (int i = 0; i < sk_items<T>; i += kVec) {
        const int64_t c = sk_class<kGroup, kVec>(base, i);
        if constexpr (kVec == 1) {
            to[i] = c < C ? (sk_real<T>)sk_widen(row[c * stride]) : absent;
        } else {
            sk_real<Stored> fill[kVec];
            SK_UNROLL for (int k = 0; k < kVec; k++) fill[k] = (sk_real<Stored>)absent;
            auto bits = sk_pack<Stored, kVec>(fill);
            if (c < C) bits = *(const decltype(bits) *)(row + c);
            sk_unpack<Stored, kVec>(bits, &to[i]);
        }
    }
}

/* The same of row [n, s] of a tensor with a dtype of its own (CONSTANT). */
template <typename T, int kGroup, int kVec>
SK_DEVICE void sk_load_constant(const sk_arg &x, int64_t n, int64_t s, int64_t base, int64_t C,
                                sk_real<T> absent, sk_real<T> (&to)[sk_items<T>]) {
    SK_SWITCH_FLOATING(
        x.dtype, Stored,
        sk_load<T, kGroup, kVec>(sk_row<Stored>(x, n, s), x.stride[1], base, C, absent, to));
}

template <typename T, int kGroup, int kVec>
SK_DEVICE void sk_store(T *row, int64_t stride, int64_t base, int64_t C,
                        const sk_real<T> (&from)[sk_items<T>]) {
    SK_UNROLL for (int i = 0; i < sk_items<T>; i += kVec) {
        const int64_t c = sk_class<kGroup, kVec>(base, i);
        if (c >= C) continue;
        if constexpr (kVec == 1)
            sk_narrow(from[i], row + c * stride);
        else
            sk_write(sk_pack<T, kVec>(&from[i]), row + c);
    }
}

/* ---- reductions: fixed order, and every thread of the group gets the same bits ---- */

struct sk_add {
    template <typename T>
    __device__ T operator()(T x, T y) const {
        return x + y;
    }
};
struct sk_larger {
    template <typename T>
    __device__ T operator()(T x, T y) const {
        return sk_max(x, y);
    }
};

template <int kGroup, typename T, int kCount, typename Op>
SK_DEVICE void sk_group_reduce(T (&x)[kCount], Op op) {
    SK_UNROLL for (int step = (kGroup < SK_WARP ? kGroup : SK_WARP) / 2; step; step /= 2) {
        for (int k = 0; k < kCount; k++) x[k] = op(x[k], __shfl_xor_sync(0xffffffffu, x[k], step));
    }
    if (kGroup <= SK_WARP) return;
    SK_SHARED(T, warps, SK_BLOCK / SK_WARP * kCount);
    if (threadIdx.x % SK_WARP == 0)
        for (int k = 0; k < kCount; k++) warps[threadIdx.x / SK_WARP * kCount + k] = x[k];
    __syncthreads();
    for (int k = 0; k < kCount; k++) {
        x[k] = warps[k];
        for (int w = 1; w < SK_BLOCK / SK_WARP; w++) x[k] = op(x[k], warps[w * kCount + k]);
    }
    __syncthreads(); /* the next reduction writes `warps` again */
}

/* Sums x over all threads of the grid. True, with the sums in x, in the block that finishes last;
 * the others leave their part in scratch: a zeroed ticket, then kCount doubles for each block. */
template <int kCount>
SK_DEVICE bool sk_grid_sum(double (&x)[kCount], void *scratch) {
    unsigned *const ticket = (unsigned *)scratch;
    volatile double *const parts = (volatile double *)((char *)scratch + 16);
    sk_group_reduce<SK_BLOCK>(x, sk_add());
    SK_SHARED(bool, last, 1);
    if (threadIdx.x == 0) {
        for (int k = 0; k < kCount; k++) parts[kCount * blockIdx.x + k] = x[k];
        __threadfence(); /* the part is visible before the ticket says so */
        *last = atomicAdd(ticket, 1u) == gridDim.x - 1;
    }
    __syncthreads();
    if (!*last) return false;
    __threadfence();
    for (int k = 0; k < kCount; k++) {
        x[k] = 0;
        for (unsigned i = threadIdx.x; i < gridDim.x; i += SK_BLOCK) x[k] += parts[kCount * i + k];
    }
    sk_group_reduce<SK_BLOCK>(x, sk_add());
    return true;
}

/* ---- how a launch serves its rows ---- */

struct sk_layout {
    int group;
    bool vector; /* 16-byte accesses */
};

/* The layout that suits all of the "NC*" tensors of a call; those not given do not matter. */
static inline sk_layout sk_layout_of(const sk_dims &dims, int64_t element,
                                     std::initializer_list<const sk_arg *> args) {
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
    if (adjacent_rows) return {1, false};
    return {C <= 2048 ? SK_WARP : SK_BLOCK, wide_rows};
}

/* Blocks for that many rows; at least one, for what is done once per call. */
static inline unsigned sk_grid(int64_t rows, sk_layout layout) {
    const int64_t per_block = SK_BLOCK / layout.group;
    const int64_t blocks = (rows + per_block - 1) / per_block;
    return blocks < 1 ? 1 : blocks > SK_REDUCE_BLOCKS ? SK_REDUCE_BLOCKS : (unsigned)blocks;
}

/* The instance kernel<T, kGroup, kVec, ...> for a layout. */
#define SK_KERNEL(kernel, T, layout, ...)                                               \
    ((layout).group == 1 ? kernel<T, 1, 1, ##__VA_ARGS__>                               \
     : (layout).group == SK_WARP                                                        \
         ? ((layout).vector ? kernel<T, SK_WARP, 16 / sizeof(T), ##__VA_ARGS__>         \
                            : kernel<T, SK_WARP, 1, ##__VA_ARGS__>)                     \
         : ((layout).vector ? kernel<T, SK_BLOCK, 16 / sizeof(T), ##__VA_ARGS__>        \
                            : kernel<T, SK_BLOCK, 1, ##__VA_ARGS__>))
