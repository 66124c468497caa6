// Compiles only if our prototypes of PyTorch's C shim are PyTorch's own, and our tensor has
// DLPack's layout.
#include <ATen/dlpack.h>
#include <c10/core/ScalarType.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#if __has_include(<torch/csrc/stable/c/shim.h>)  // not in 2.8
#include <torch/csrc/stable/c/shim.h>
#endif

#include <cstddef>
#include <cstdint>
#include <type_traits>

#include "core/tensor.h"

// Our prototypes again, as declarations: a different return type is an error here, different
// arguments below.
namespace ours {
#include "torch_shim.h"
}

template <class Ours, class Theirs>
struct same_call : std::false_type {};
template <class T>
struct same_call<T, T> : std::true_type {};

// Opaque handles are pointers to types of equal name in two scopes: compare what they are called
// with as void *.
template <class T>
struct plain {
    using type = T;
};
template <>
struct plain<ours::AtenTensorHandle> {
    using type = AtenTensorHandle;
};
template <>
struct plain<ours::AtenTensorHandle *> {
    using type = AtenTensorHandle *;
};
template <>
struct plain<ours::TorchLibraryHandle> {
    using type = TorchLibraryHandle;
};
template <>
struct plain<ours::TorchLibraryHandle *> {
    using type = TorchLibraryHandle *;
};
template <class F>
struct plain_call;
template <class R, class... A>
struct plain_call<R (*)(A...)> {
    using type = R (*)(typename plain<A>::type...);
};

#define CHECK(result, name, arguments, library, since)                             \
    static_assert(same_call<plain_call<decltype(ours::sk_shim_table::name)>::type, \
                            decltype(&::name)>::value,                             \
                  #name " differs from PyTorch's prototype");
SK_SHIM_NEEDED(CHECK)
#ifdef TORCH_VERSION_2_10_0
CHECK(, torch_parallel_for, , , )
#endif
#ifdef TORCH_VERSION_2_12_0
CHECK(, torch_tag_pt2_compliant_tag, , , )
CHECK(, torch_library_def_with_tags, , , )
#endif

constexpr int dtypes[] = SK_TORCH_DTYPES;
using c10::ScalarType;
static_assert(dtypes[SK_DT_F16] == int(ScalarType::Half) &&
              dtypes[SK_DT_BF16] == int(ScalarType::BFloat16));
static_assert(dtypes[SK_DT_F32] == int(ScalarType::Float) &&
              dtypes[SK_DT_F64] == int(ScalarType::Double));
static_assert(dtypes[SK_DT_BOOL] == int(ScalarType::Bool) &&
              dtypes[SK_DT_I64] == int(ScalarType::Long) &&
              dtypes[SK_DT_I32] == int(ScalarType::Int));
constexpr struct { int code, bits; } scalars[] = SK_TORCH_SCALARS;
constexpr bool is(ScalarType type, int code, int bits) {
    return scalars[int(type)].code == code && scalars[int(type)].bits == bits;
}
static_assert(is(ScalarType::Byte, kDLUInt, 8) && is(ScalarType::Char, kDLInt, 8) &&
              is(ScalarType::Short, kDLInt, 16));
static_assert(is(ScalarType::Int, kDLInt, 32) && is(ScalarType::Long, kDLInt, 64) &&
              is(ScalarType::Bool, kDLBool, 8));
static_assert(is(ScalarType::Half, kDLFloat, 16) && is(ScalarType::Float, kDLFloat, 32));
static_assert(is(ScalarType::Double, kDLFloat, 64) && is(ScalarType::BFloat16, kDLBfloat, 16));
static_assert(is(ScalarType::ComplexHalf, kDLComplex, 32) &&
              is(ScalarType::ComplexFloat, kDLComplex, 64));
static_assert(is(ScalarType::ComplexDouble, kDLComplex, 128));
static_assert(ours::SK_TORCH_UINT8 == int(ScalarType::Byte));

#define SAME_PLACE(member) \
    static_assert(offsetof(selfkd_tensor, member) == offsetof(DLTensor, member), #member);
SAME_PLACE(data)
SAME_PLACE(device)
SAME_PLACE(ndim)
SAME_PLACE(dtype)
SAME_PLACE(shape)
SAME_PLACE(strides)
SAME_PLACE(byte_offset)
static_assert(sizeof(selfkd_tensor) == sizeof(DLTensor) &&
              sizeof(selfkd_dtype) == sizeof(DLDataType));
static_assert(SELFKD_CPU == int(kDLCPU) && SELFKD_CUDA == int(kDLCUDA));
