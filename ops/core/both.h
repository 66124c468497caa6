/* What C and CUDA kernels share is written once: as SK_BOTH functions of given types, or as
 * SK_FORMULA functions of `real`, the type that is computed with. A C file is compiled for each
 * `real`; in CUDA it is a parameter of the function. A formula may use sk_exp_below(),
 * sk_log1p() and sk_log_rest(), which both sides have (cpu/core/math.h, cuda/core/device.cuh), but
 * neither fabs nor sqrt, which in C are those of double: it writes x < 0 ? -x : x, and numbers as
 * (real)0.5. */
#pragma once

#ifdef __cplusplus
#include <cuda_runtime.h>

#define SK_BOTH static __host__ __device__ inline
#define SK_FORMULA           \
    template <typename real> \
    static __device__ inline
#else
#define SK_BOTH static inline
#define SK_FORMULA static inline __attribute__((always_inline)) /* into vector loops */
#endif
