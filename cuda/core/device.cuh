/* How kernels talk to the hardware: launches, dtypes, registers, accesses, reductions. Kernels use
 * nothing else; core/rows.cuh is made of it. */
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#include <math.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "core/contract.h"
#include "core/side.h"

enum { SK_WARP = 32, SK_BLOCK = 256 };

/* ---- launch and shared memory: all that differs where g++ compiles the kernels for tests/simt.
 * nvcc names the shared variables of static functions after the folder it works in, and a build
 * would not be reproducible ---- */

#ifdef __CUDACC__
#define SK_DEVICE __device__ __forceinline__
#define SK_LAUNCH(kernel, grid, block, shared_bytes, stream, ...) \
    (kernel)<<<(grid), (block), (shared_bytes), (cudaStream_t)(stream)>>>(__VA_ARGS__)
#define SK_UNROLL _Pragma("unroll")
#define SK_UNROLL_4 _Pragma("unroll 4")
#define SK_ROLLED _Pragma("unroll 1")
#define SK_SHARED(type, name, count) __shared__ type name[count]
#define SK_SHARED_DYNAMIC(type, name) extern __shared__ type name[]
#else
#define SK_DEVICE static inline
#define SK_LAUNCH(kernel, grid, block, shared_bytes, stream, ...) \
    simt_launch((grid), (block), (shared_bytes), (stream), [=] { (kernel)(__VA_ARGS__); })
#define SK_UNROLL
#define SK_UNROLL_4
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

/* The bytes of an element. */
static inline int64_t sk_element(int dtype){SK_SWITCH_FLOATING(dtype, T, return sizeof(T))}

SK_DEVICE float sk_widen(__half x) {
    return __half2float(x);
}
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

/* Each of two neighbours of bfloat16. */
SK_DEVICE float sk_first_of(unsigned word) { return sk_float(word << 16); }
SK_DEVICE float sk_second_of(unsigned word) { return sk_float(word & 0xffff0000u); }

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

/* What formulas of ops/formula use: e^x for x <= 0, log(1 + x), and x - log m for m = 1 + x, near:
 * for x from -1/2 to 1 (cpu/core/math.h). */
template <typename real>
SK_DEVICE real sk_exp_below(real x) {
    return exp(x);
}
template <typename real>
SK_DEVICE real sk_log1p(real x) {
    return log1p(x);
}

SK_DEVICE float sk_log_rest_near(float x) {
    const float s = x / (2 + x), z = s * s;
    const float y =
        ((2.815777957e-1f * z + 2.796515822e-1f) * z + 4.002459645e-1f) * z + 6.666632295e-1f;
    return x * s - s * z * y;
}
SK_DEVICE double sk_log_rest_near(double x) { return sk_log_gap(x, log1p(x)); }
SK_DEVICE float sk_log_rest(float x, float m) {
    return x < -0.5f ? x - log(m) : sk_log_rest_near(x);
}
SK_DEVICE double sk_log_rest(double x, double m) { return sk_log_gap(x, log(m)); }

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

/* The same of two neighbours of bfloat16. */
SK_DEVICE unsigned sk_at_least_two(unsigned x, unsigned low) {
#ifdef __CUDA_ARCH__
    asm("max.NaN.bf16x2 %0, %0, %1;" : "+r"(x) : "r"(low));
    return x;
#else
    return sk_narrow_two(sk_at_least(sk_first_of(x), sk_first_of(low)),
                         sk_at_least(sk_second_of(x), sk_second_of(low)), (__nv_bfloat16 *)0);
#endif
}
SK_DEVICE unsigned sk_max_two(unsigned x, unsigned y) {
#ifdef __CUDA_ARCH__
    asm("max.bf16x2 %0, %0, %1;" : "+r"(x) : "r"(y));
    return x;
#else
    return sk_narrow_two(sk_max(sk_first_of(x), sk_first_of(y)),
                         sk_max(sk_second_of(x), sk_second_of(y)), (__nv_bfloat16 *)0);
#endif
}

/* ---- memory ---- */

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

/* ---- threads: a block is sk_group() x rows of them, SK_BLOCK in all ---- */

/* How many threads share a row: 1, SK_WARP or SK_BLOCK; or, of a kernel that knows no rows, all. */
SK_DEVICE int sk_group() { return (int)blockDim.x; }

/* The number of this thread in its block. */
SK_DEVICE unsigned sk_thread() { return threadIdx.y * blockDim.x + threadIdx.x; }

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

/* Over a warp. */
template <typename T, int kCount, typename Op>
SK_DEVICE void sk_warp_reduce(T (&x)[kCount], Op op) {
    SK_ROLLED for (int step = SK_WARP / 2; step; step /= 2) {
        SK_UNROLL for (int k = 0; k < kCount; k++) x[k] =
            op(x[k], __shfl_xor_sync(0xffffffffu, x[k], step));
    }
}

/* Over the warps of a block, whose threads have the same x. */
template <typename T, int kCount, typename Op>
SK_DEVICE void sk_join_warps(T (&x)[kCount], Op op) {
    SK_SHARED(T, warps, SK_BLOCK / SK_WARP * kCount);
    const unsigned thread = sk_thread();
    if (thread % SK_WARP == 0)
        for (int k = 0; k < kCount; k++) warps[thread / SK_WARP * kCount + k] = x[k];
    __syncthreads();
    SK_UNROLL for (int k = 0; k < kCount; k++) x[k] = warps[k];
    SK_ROLLED for (int w = 1; w < SK_BLOCK / SK_WARP; w++) {
        SK_UNROLL for (int k = 0; k < kCount; k++) x[k] = op(x[k], warps[w * kCount + k]);
    }
    __syncthreads(); /* the next reduction writes `warps` again */
}

template <typename T, int kCount, typename Op>
SK_DEVICE void sk_block_reduce(T (&x)[kCount], Op op) {
    sk_warp_reduce(x, op);
    sk_join_warps(x, op);
}

/* Over the threads of a row. */
template <typename T, int kCount, typename Op>
SK_DEVICE void sk_group_reduce(T (&x)[kCount], Op op) {
    if (sk_group() >= SK_WARP) sk_warp_reduce(x, op);
    if (sk_group() > SK_WARP) sk_join_warps(x, op);
}

/* Whether this block is the last of `count` that come here: it sees what the others have written.
 * The same answer in all threads. */
SK_DEVICE bool sk_is_last(unsigned *ticket, unsigned count) {
    SK_SHARED(bool, last, 1);
    __syncthreads();
    if (sk_thread() == 0) {
        __threadfence(); /* what the block wrote is visible before the ticket says so */
        *last = atomicAdd(ticket, 1u) == count - 1;
    }
    __syncthreads();
    if (!*last) return false;
    __threadfence();
    return true;
}

/* Sums x over all threads of `count` blocks, of which this is number `block`. True, with the sums
 * in x, in the block that comes last; the others leave their part in scratch: a zeroed ticket, then
 * kCount doubles for each block. */
template <int kCount>
SK_DEVICE bool sk_sum_blocks(double (&x)[kCount], unsigned block, unsigned count, void *scratch) {
    volatile double *const parts = (volatile double *)((char *)scratch + 16);
    sk_block_reduce(x, sk_add());
    if (sk_thread() == 0)
        for (int k = 0; k < kCount; k++) parts[kCount * block + k] = x[k];
    if (!sk_is_last((unsigned *)scratch, count)) return false;
    for (int k = 0; k < kCount; k++) {
        x[k] = 0;
        for (unsigned i = sk_thread(); i < count; i += SK_BLOCK) x[k] += parts[kCount * i + k];
    }
    sk_block_reduce(x, sk_add());
    return true;
}

/* The same over the grid. */
template <int kCount>
SK_DEVICE bool sk_grid_sum(double (&x)[kCount], void *scratch) {
    return sk_sum_blocks(x, blockIdx.x, gridDim.x, scratch);
}
