/* The CUDA runtime as the core needs it: devices, errors, and the work space of C callers. Built
 * without CUDA, each function says so. */
#include "device.h"

#include <stdio.h>

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

int sk_run_cuda(sk_call *call, void *stream) {
    const sk_op *const op = call->op;
    const int device = sk_device_of(call).device_id;
    int before = 0;
    int status = check_driver();
    if (!status) status = check(cudaGetDevice(&before), "selfkd");
    if (!status && device != before) status = check(cudaSetDevice(device), "selfkd");
    if (status) return status;
    void *scratch = NULL;
    for (int i = 0; i < op->count && !status; i++) {
        void **const data = &sk_arg_of(call, i)->data;
        if (op->items[i].kind != SK_SCRATCH || *data) continue;
        status = check(cudaMallocAsync(&scratch, (size_t)op->items[i].bytes, stream), op->name);
        *data = scratch;
    }
    if (!status) status = check(op->cuda(call->params.bytes, stream), op->name);
    if (scratch) cudaFreeAsync(scratch, stream);
    int now = before;
    if (cudaGetDevice(&now) == cudaSuccess && now != before) cudaSetDevice(before);
    return status;
}

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

int sk_run_cuda(sk_call *call, void *stream) {
    (void)stream;
    return sk_fail(SELFKD_ERROR_CUDA, "%s: this build has no CUDA kernels; rebuild with nvcc",
                   call->op->name);
}

const char *selfkd_cuda(void) { return "none: built without nvcc"; }

#endif
