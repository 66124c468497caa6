/* Load and store: the one place on the CPU that looks at dtypes. Kernels see `real` in memory order, a chunk at a time.
 *
 * f16 and bf16 are converted by integer selects, exactly in both directions (round to nearest even; subnormals,
 * infinities and NaN included), so that every variant vectorises them. */
#pragma once
#include <stdbool.h>

#include "cpu/core/kernel.h"
#include "cpu/core/math.h"

enum { SK_CHUNK = 1024 }; /* elements between two carries into double; the size of stack buffers */

static inline int64_t sk_min(int64_t a, int64_t b) { return a < b ? a : b; }

static inline float sk_from_f16(uint16_t h)
{
    const uint32_t magnitude = (uint32_t)(h & 0x7fff) << 13, bias = 112u << 23, smallest = 113u << 23;
    const float subnormal = sk_float(magnitude + smallest) - sk_float(smallest);
    const uint32_t normal = magnitude + (magnitude >= 0x7c00u << 13 ? 2 * bias : bias); /* inf and NaN: twice */
    const uint32_t bits = magnitude < 0x400u << 13 ? sk_float_bits(subnormal) : normal;
    return sk_float(bits | (uint32_t)(h & 0x8000) << 16);
}

static inline uint16_t sk_to_f16(float x)
{
    const uint32_t bits = sk_float_bits(x) & 0x7fffffff, sign = (sk_float_bits(x) >> 16) & 0x8000;
    const float half_ulp_place = 0.5f; /* its ULP is f16's smallest subnormal: the addition rounds */
    const uint32_t subnormal = sk_float_bits(sk_float(bits) + half_ulp_place) - sk_float_bits(half_ulp_place);
    const uint32_t normal = (bits - (112u << 23) + 0xfff + ((bits >> 13) & 1)) >> 13;
    const uint32_t special = bits > 0x7f800000 ? 0x7e00 : 0x7c00;
    const uint32_t finite = bits < 113u << 23 ? subnormal : normal;
    return (uint16_t)(sign | (bits >= 143u << 23 ? special : finite));
}

static inline float sk_from_bf16(uint16_t h) { return sk_float((uint32_t)h << 16); }

static inline uint16_t sk_to_bf16(float x)
{
    const uint32_t bits = sk_float_bits(x);
    const uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16, nan = (bits >> 16) | 0x40;
    return (uint16_t)((bits & 0x7fffffff) > 0x7f800000 ? nan : rounded);
}

/* to[i] = element at + i * stride of t, for i < n. An absent tensor (a weight) reads as 1. */
static inline void sk_copy(const sk_arg *t, int64_t at, int64_t stride, int64_t n, real *to)
{
    if (!t->data) {
        for (int64_t i = 0; i < n; i++) to[i] = 1;
        return;
    }
    const uint16_t *half = (const uint16_t *)t->data + at;
    const uint8_t *truth = (const uint8_t *)t->data + at;
    const real *full = (const real *)t->data + at;
    switch (t->dtype) {
    case SK_DT_F16:
        for (int64_t i = 0; i < n; i++) to[i] = sk_from_f16(half[i * stride]);
        break;
    case SK_DT_BF16:
        for (int64_t i = 0; i < n; i++) to[i] = sk_from_bf16(half[i * stride]);
        break;
    case SK_DT_BOOL:
        for (int64_t i = 0; i < n; i++) to[i] = truth[i * stride] != 0;
        break;
    default:
        for (int64_t i = 0; i < n; i++) to[i] = full[i * stride];
    }
}

static inline bool sk_in_place(const sk_arg *t, int64_t stride)
{
    return t->data && stride == 1 && t->dtype == (sizeof(real) == 8 ? SK_DT_F64 : SK_DT_F32);
}

/* The same elements for reading: where they lie if they can be read there, else copied to the buffer. */
static inline const real *sk_load(const sk_arg *t, int64_t at, int64_t stride, int64_t n, real *buffer)
{
    if (sk_in_place(t, stride)) return (const real *)t->data + at;
    sk_copy(t, at, stride, n, buffer);
    return buffer;
}

static inline real sk_load_one(const sk_arg *t, int64_t at)
{
    real x;
    sk_copy(t, at, 1, 1, &x);
    return x;
}

/* Where to write elements: in place, or in the buffer that sk_store then takes there. */
static inline real *sk_room(const sk_arg *t, int64_t at, int64_t stride, real *buffer)
{
    return sk_in_place(t, stride) ? (real *)t->data + at : buffer;
}

/* element at + i * stride of t = from[i], for i < n; nothing to do when sk_room gave their own place. */
static inline void sk_store(const sk_arg *t, int64_t at, int64_t stride, int64_t n, const real *from)
{
    uint16_t *half = (uint16_t *)t->data + at;
    real *full = (real *)t->data + at;
    if (from == full) return;
    switch (t->dtype) {
    case SK_DT_F16:
        for (int64_t i = 0; i < n; i++) half[i * stride] = sk_to_f16((float)from[i]);
        break;
    case SK_DT_BF16:
        for (int64_t i = 0; i < n; i++) half[i * stride] = sk_to_bf16((float)from[i]);
        break;
    default:
        for (int64_t i = 0; i < n; i++) full[i * stride] = from[i];
    }
}
