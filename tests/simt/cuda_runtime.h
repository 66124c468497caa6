/* CUDA on the CPU, for tests: compiles the .cu files with g++, unchanged. "Device memory" is host
 * memory; each thread of a block is a fiber (simt.cpp), and a barrier or warp operation switches
 * fibers. What the hardware leaves undefined aborts with a sentence: threads missing at a barrier,
 * lanes missing in a mask, reads from lanes that do not take part. Shared memory starts as 0xff
 * bytes and is allocated at its exact size, so that AddressSanitizer sees one element past it.
 * Blocks and threads run in an order drawn from SELFKD_SIMT_SEED (default 1).
 *
 * Usable from C for the runtime functions that the library's core calls. */
#pragma once
#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

typedef enum cudaError {
    cudaSuccess = 0,
    cudaErrorInvalidValue = 1,
    cudaErrorMemoryAllocation = 2,
    cudaErrorInvalidConfiguration = 9,
    cudaErrorInvalidDevice = 101,
    cudaErrorLaunchOutOfResources = 701
} cudaError_t;
typedef struct CUstream_st *cudaStream_t;
enum cudaDeviceAttr {
    cudaDevAttrMultiProcessorCount = 16,
    cudaDevAttrComputeCapabilityMajor = 75,
    cudaDevAttrComputeCapabilityMinor = 76,
    cudaDevAttrMaxSharedMemoryPerBlockOptin = 97
};
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize = 8 };

cudaError_t cudaMallocAsync(void **data, size_t bytes, cudaStream_t stream);
cudaError_t cudaFreeAsync(void *data, cudaStream_t stream);
cudaError_t cudaMemsetAsync(void *data, int value, size_t bytes, cudaStream_t stream);
cudaError_t cudaGetDevice(int *device);
cudaError_t cudaSetDevice(int device);
cudaError_t cudaGetDeviceCount(int *count);
cudaError_t cudaDeviceGetAttribute(int *value, enum cudaDeviceAttr attribute, int device);
cudaError_t cudaFuncSetAttribute(const void *kernel, enum cudaFuncAttribute attribute, int value);
cudaError_t cudaDriverGetVersion(int *version);
cudaError_t cudaRuntimeGetVersion(int *version);
cudaError_t cudaGetLastError(void);
cudaError_t cudaPeekAtLastError(void);
const char *cudaGetErrorName(cudaError_t error);
const char *cudaGetErrorString(cudaError_t error);

/* What tests may have refused: the n-th request of a kind from now on (1: the next one, 0: none).
 * How many were made since then, and how many blocks were allocated and not freed. */
enum simt_request { SIMT_ALLOCATION, SIMT_MEMSET, SIMT_LAUNCH, SIMT_REQUESTS };
void simt_refuse(enum simt_request kind, long n);
long simt_asked(enum simt_request kind);
long simt_live_blocks(void);

#ifdef __cplusplus
} /* extern "C" */

#include <string.h>

#define __global__
#define __device__
#define __host__
#define __launch_bounds__(...)

struct uint3 {
    unsigned x, y, z;
};
struct alignas(8) uint2 {
    unsigned x, y;
};
struct alignas(16) uint4 {
    unsigned x, y, z, w;
};
struct dim3 {
    unsigned x, y, z;
    dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};

/* Where the running fiber stands in its grid. */
struct simt_place {
    uint3 thread, block;
    dim3 block_size, grid_size;
};
extern simt_place simt_here;
#define threadIdx (simt_here.thread)
#define blockIdx (simt_here.block)
#define blockDim (simt_here.block_size)
#define gridDim (simt_here.grid_size)
static const int warpSize = 32;

/* ---- launch and shared memory, as cuda/core/device.cuh asks for them ---- */

void simt_run(dim3 grid, dim3 block, size_t shared_bytes, void (*call)(const void *),
              const void *kernel);
template <typename F>
void simt_launch(dim3 grid, dim3 block, size_t shared_bytes, void *, const F &kernel) {
    simt_run(
        grid, block, shared_bytes, [](const void *f) { (*(const F *)f)(); }, &kernel);
}
void *simt_shared(const void *key, size_t bytes); /* this block's array for a declaration */
void *simt_shared_dynamic(void);

/* ---- what switches fibers ---- */

struct simt_site {
    const char *file;
    int line;
};
#define SIMT_SITE simt_site site = {__builtin_FILE(), __builtin_LINE()}

enum simt_operation { SIMT_SHUFFLE, SIMT_BALLOT, SIMT_SYNCWARP };

void simt_barrier(simt_site site);
/* Waits for the lanes in `mask`, then gives a SHUFFLE the value of lane `source`, a BALLOT the
 * lanes of value != 0. */
uint64_t simt_warp(simt_operation operation, unsigned mask, uint64_t value, int source,
                   simt_site site);
int simt_lane(void);

inline void __syncthreads(SIMT_SITE) { simt_barrier(site); }
inline void __syncwarp(unsigned mask = 0xffffffffu, SIMT_SITE) {
    simt_warp(SIMT_SYNCWARP, mask, 0, 0, site);
}
inline unsigned __ballot_sync(unsigned mask, int predicate, SIMT_SITE) {
    return (unsigned)simt_warp(SIMT_BALLOT, mask, predicate != 0, 0, site);
}
inline int __any_sync(unsigned mask, int predicate, SIMT_SITE) {
    return __ballot_sync(mask, predicate, site) != 0;
}
inline int __all_sync(unsigned mask, int predicate, SIMT_SITE) {
    return __ballot_sync(mask, predicate, site) == mask;
}

template <typename T>
T simt_shuffle(unsigned mask, T value, int source, simt_site site) {
    static_assert(sizeof(T) <= 8, "shuffles move at most 8 bytes");
    uint64_t bits = 0;
    memcpy(&bits, &value, sizeof value);
    bits = simt_warp(SIMT_SHUFFLE, mask, bits, source, site);
    memcpy(&value, &bits, sizeof value);
    return value;
}
/* A source outside the segment of `width` lanes gives a lane its own value back. */
template <typename T>
T __shfl_sync(unsigned mask, T value, int source, int width = 32, SIMT_SITE) {
    return simt_shuffle(mask, value, (simt_lane() & -width) | (source & (width - 1)), site);
}
template <typename T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = 32, SIMT_SITE) {
    const int lane = simt_lane(), source = lane - (int)delta;
    return simt_shuffle(mask, value, source < (lane & -width) ? lane : source, site);
}
template <typename T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32, SIMT_SITE) {
    const int lane = simt_lane(), source = lane + (int)delta;
    return simt_shuffle(mask, value, source > (lane | (width - 1)) ? lane : source, site);
}
template <typename T>
T __shfl_xor_sync(unsigned mask, T value, int lanes, int width = 32, SIMT_SITE) {
    const int lane = simt_lane(), source = lane ^ lanes;
    return simt_shuffle(mask, value, source > (lane | (width - 1)) ? lane : source, site);
}

/* ---- what does not: one fiber runs at a time ---- */

inline void __threadfence() {}
template <typename T>
T atomicAdd(T *at, T value) {
    const T old = *at;
    *at = old + value;
    return old;
}
inline unsigned atomicOr(unsigned *at, unsigned value) {
    const unsigned old = *at;
    *at = old | value;
    return old;
}
#endif
