/* The tensor descriptor users pass (the memory layout of DLPack's DLTensor) and the dtypes kernels
 * know. */
#pragma once
#include <stdint.h>

#define SELFKD_API __attribute__((visibility("default")))

typedef struct selfkd_device {
    int32_t device_type; /* 1 = CPU, 2 = CUDA */
    int32_t device_id;
} selfkd_device;

typedef struct selfkd_dtype {
    uint8_t code; /* 0 = int, 1 = unsigned, 2 = float, 4 = bfloat, 6 = bool */
    uint8_t bits;
    uint16_t lanes; /* must be 1 */
} selfkd_dtype;

typedef struct selfkd_tensor {
    void *data;
    selfkd_device device;
    int32_t ndim;
    selfkd_dtype dtype;
    int64_t *shape;
    int64_t *strides; /* in elements; NULL means compact */
    uint64_t byte_offset;
} selfkd_tensor;

enum { SELFKD_CPU = 1, SELFKD_CUDA = 2 };

/* Values of an argument `reduction`. */
enum selfkd_reduction { SELFKD_NONE = 0, SELFKD_MEAN = 1, SELFKD_SUM = 2 };

enum sk_dtype {
    SK_DT_F16,
    SK_DT_BF16,
    SK_DT_F32,
    SK_DT_F64,
    SK_DT_BOOL,
    SK_DT_I64,
    SK_DT_I32,
    SK_DT_OTHER
};
