/* What C and CUDA kernels share is written once, as SK_BOTH functions. */
#pragma once

#ifdef __cplusplus
#include <cuda_runtime.h>

#define SK_BOTH static __host__ __device__ inline
#else
#define SK_BOTH static inline
#endif
