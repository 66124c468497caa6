/* The CUDA runtime as the core needs it: device, errors, work space of C callers. Plain C; built
 * without CUDA, every function says so. */
#include <stdio.h>
#include <string.h>

#include "op.h"

#ifdef SK_WITH_CUDA
#include <cuda_runtime.h>

/* A library built with one major release of CUDA needs a driver that knows it: both versions belong
 * in the message. */
static int check_driver(void) {
    static _Atomic int good = 0;
    if (atomic_load(&good)) return SELFKD_OK;
    int driver = 0, runtime = 0;
    if (cudaRuntimeGetVersion(&runtime) != cudaSuccess ||
        cudaDriverGetVersion(&driver) != cudaSuccess || driver == 0)
        return sk_fail(SELFKD_ERROR_CUDA,
                       "selfkd: no CUDA driver was found; CPU tensors still work");
    if (driver / 1000 < runtime / 1000)
        return sk_fail(SELFKD_ERROR_CUDA,
                       "selfkd: the driver knows CUDA %d.%d, this library was built with CUDA "
                       "%d.%d; update the driver or "
                       "rebuild; CPU tensors still work",
                       driver / 1000, driver % 1000 / 10, runtime / 1000, runtime % 1000 / 10);
    atomic_store(&good, 1);
    return SELFKD_OK;
}

static int check(int error, const char *what) {
    if (error == cudaSuccess) return SELFKD_OK;
    cudaGetLastError(); /* else the next call takes it for an error of its own launch */
    return sk_fail(error == cudaErrorMemoryAllocation ? SELFKD_ERROR_MEMORY : SELFKD_ERROR_CUDA,
                   "%s: CUDA reports %s (%s)", what, cudaGetErrorString((cudaError_t)error),
                   cudaGetErrorName((cudaError_t)error));
}

int sk_cuda_enter(int32_t device, int32_t *previous) {
    int status = check_driver();
    if (!status) status = check(cudaGetDevice(previous), "selfkd");
    if (!status && device != *previous) status = check(cudaSetDevice(device), "selfkd");
    return status;
}

void sk_cuda_leave(int32_t previous) {
    int now = previous;
    if (cudaGetDevice(&now) == cudaSuccess && now != previous) cudaSetDevice(previous);
}

int sk_cuda_error(const sk_op *op, int error) { return check(error, op->name); }

int sk_cuda_allocate(const sk_op *op, void **data, int64_t bytes, void *stream) {
    return check(cudaMallocAsync(data, (size_t)bytes, (cudaStream_t)stream), op->name);
}

void sk_cuda_free(void *data, void *stream) { cudaFreeAsync(data, (cudaStream_t)stream); }

const char *selfkd_cuda(void) {
    static _Thread_local char text[160];
    int driver = 0, runtime = 0, devices = 0;
    cudaRuntimeGetVersion(&runtime);
    if (check_driver() || cudaGetDeviceCount(&devices) != cudaSuccess) {
        cudaGetLastError(); /* asking must not leave an error behind */
        snprintf(text, sizeof text, "kernels for CUDA %d.%d; no usable driver here", runtime / 1000,
                 runtime % 1000 / 10);
        return text;
    }
    cudaDriverGetVersion(&driver);
    snprintf(text, sizeof text, "kernels for CUDA %d.%d; driver for CUDA %d.%d; %d device%s",
             runtime / 1000, runtime % 1000 / 10, driver / 1000, driver % 1000 / 10, devices,
             devices == 1 ? "" : "s");
    return text;
}

#else

int sk_cuda_enter(int32_t device, int32_t *previous) {
    (void)device;
    (void)previous;
    return sk_fail(SELFKD_ERROR_CUDA, "selfkd: this build has no CUDA kernels; rebuild with nvcc");
}
void sk_cuda_leave(int32_t previous) { (void)previous; }
int sk_cuda_error(const sk_op *op, int error) {
    (void)op;
    return error;
}
int sk_cuda_allocate(const sk_op *op, void **data, int64_t bytes, void *stream) {
    (void)op;
    (void)data;
    (void)stream;
    (void)bytes;
    return SELFKD_ERROR_CUDA;
}
void sk_cuda_free(void *data, void *stream) {
    (void)data;
    (void)stream;
}
const char *selfkd_cuda(void) { return "none: built without nvcc"; }

#endif
