/* The part of PyTorch's C shim that selfkd uses, each function once: return type, name, arguments,
 * library, and the release that brought it. PyTorch's own headers are C++ only; tests/abi_check.cpp
 * compares these prototypes with them. The functions are found by dlsym in the running process:
 * nothing here is linked. */
#pragma once
#include <stdbool.h>
#include <stdint.h>

typedef struct AtenTensorOpaque *AtenTensorHandle;
typedef struct TorchLibraryOpaque *TorchLibraryHandle;
typedef int32_t AOTITorchError;
typedef uint64_t StableIValue;

/* clang-format off */

/* Needed: without one of these there is no registration. */
#define SK_SHIM_NEEDED(X) \
    X(AOTITorchError, aoti_torch_get_data_ptr, (AtenTensorHandle, void **), cpu, 2.1) \
    X(AOTITorchError, aoti_torch_get_dim, (AtenTensorHandle, int64_t *), cpu, 2.4) \
    X(AOTITorchError, aoti_torch_get_sizes, (AtenTensorHandle, int64_t **), cpu, 2.1) \
    X(AOTITorchError, aoti_torch_get_strides, (AtenTensorHandle, int64_t **), cpu, 2.1) \
    X(AOTITorchError, aoti_torch_get_dtype, (AtenTensorHandle, int32_t *), cpu, 2.3) \
    X(AOTITorchError, aoti_torch_get_device_type, (AtenTensorHandle, int32_t *), cpu, 2.3) \
    X(AOTITorchError, aoti_torch_get_device_index, (AtenTensorHandle, int32_t *), cpu, 2.3) \
    X(AOTITorchError, aoti_torch_empty_strided, \
      (int64_t, const int64_t *, const int64_t *, int32_t, int32_t, int32_t, \
       AtenTensorHandle *), cpu, 2.1)    \
    X(AOTITorchError, aoti_torch_delete_tensor_object, (AtenTensorHandle), cpu, 2.1) \
    X(bool, aoti_torch_grad_mode_is_enabled, (void), cpu, 2.1) \
    X(void, aoti_torch_check, \
      (bool, const char *, const char *, uint32_t, const char *), cpu, 2.6) \
    X(AOTITorchError, aoti_torch_library_init_fragment, \
      (const char *, const char *, uint32_t, TorchLibraryHandle *), cpu, 2.7) \
    X(AOTITorchError, aoti_torch_library_init_impl, \
      (const char *, const char *, const char *, uint32_t, TorchLibraryHandle *), cpu, 2.7) \
    X(AOTITorchError, aoti_torch_library_def, (TorchLibraryHandle, const char *), cpu, 2.7) \
    X(AOTITorchError, aoti_torch_library_impl, \
      (TorchLibraryHandle, const char *, void (*)(StableIValue *, uint64_t, uint64_t)), cpu, 2.7) \
    X(AOTITorchError, aoti_torch_delete_library_object, (TorchLibraryHandle), cpu, 2.7)

/* Used when found. */
#define SK_SHIM_OPTIONAL(X) \
    X(AOTITorchError, aoti_torch_get_current_cuda_stream, (int32_t, void **), cuda, 2.1) \
    X(AOTITorchError, torch_parallel_for, \
      (int64_t, int64_t, int64_t, void (*)(int64_t, int64_t, void *), void *), cpu, 2.10) \
    X(int32_t, torch_tag_pt2_compliant_tag, (void), cpu, 2.12) \
    X(AOTITorchError, torch_library_def_with_tags, \
      (TorchLibraryHandle, const char *, const int32_t *, int32_t), cpu, 2.12)

/* clang-format on */

#define SK_SHIM(X) SK_SHIM_NEEDED(X) SK_SHIM_OPTIONAL(X)

/* PyTorch's numbers; checked by tests/abi_check.cpp. Dtypes: DLPack's code and bits of
 * c10::ScalarType 0 to 15, and the ScalarType of each enum sk_dtype. */
/* clang-format off */
#define SK_TORCH_SCALARS \
    {{1, 8}, {0, 8}, {0, 16}, {0, 32}, {0, 64}, {2, 16}, {2, 32}, {2, 64}, {5, 32}, {5, 64}, \
     {5, 128}, {6, 8}, {255, 0}, {255, 0}, {255, 0}, {4, 16}}
/* clang-format on */
#define SK_TORCH_DTYPES \
    { 5, 15, 6, 7, 11, 4, 3 } /* Half, BFloat16, Float, Double, Bool, Long, Int */
enum { SK_TORCH_CPU = 0, SK_TORCH_CUDA = 1, SK_TORCH_UINT8 = 0 };

typedef struct sk_shim_table {
#define SK_SHIM_MEMBER(result, name, arguments, library, since) result(*name) arguments;
    SK_SHIM(SK_SHIM_MEMBER)
#undef SK_SHIM_MEMBER
} sk_shim_table;

extern sk_shim_table sk_torch;

/* Looks the functions up among the libraries already loaded. Returns NULL, or what is missing. */
const char *sk_find_torch(void);
