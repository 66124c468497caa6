/* Load and store: the one place on the CPU that looks at dtypes. Kernels see `real`.
 *
 * f16 and bf16 are converted by integer selects, exactly in both directions (round to nearest even;
 * subnormals, infinities and NaN included), so that every variant vectorises them. */
#pragma once
#include <stdbool.h>

#include "cpu/core/math.h"

/* Loops run over whole groups of lanes (one 64-byte vector of floats), so that none ends in a
 * scalar remainder. Where vectors have 16 bytes too: on AArch64 groups of 4 would take 13 % less
 * instructions for the KL of 100 classes, and up to 10 % more for everything else. */
enum { SK_LANES = 16, SK_RUN = 1024 /* elements written at a time */ };
#define SK_ALIGNED _Alignas(64)

static inline int64_t sk_min(int64_t a, int64_t b) { return a < b ? a : b; }
static inline int64_t sk_groups(int64_t n) { return (n + SK_LANES - 1) / SK_LANES; }

static inline float sk_from_f16(uint16_t h) {
#ifdef __aarch64__ /* one instruction for four numbers, for which the selects take twenty */
    __fp16 x;
    memcpy(&x, &h, sizeof x);
    return x;
#else
    const uint32_t magnitude = (uint32_t)(h & 0x7fff) << 13, bias = 112u << 23,
                   smallest = 113u << 23;
    const float subnormal = sk_float(magnitude + smallest) - sk_float(smallest);
    const uint32_t normal =
        magnitude + (magnitude >= 0x7c00u << 13 ? 2 * bias : bias); /* inf and NaN: twice */
    const uint32_t bits = magnitude < 0x400u << 13 ? sk_float_bits(subnormal) : normal;
    return sk_float(bits | (uint32_t)(h & 0x8000) << 16);
#endif
}

static inline uint16_t sk_to_f16(float x) {
    const uint32_t bits = sk_float_bits(x) & 0x7fffffff, sign = (sk_float_bits(x) >> 16) & 0x8000;
    const int32_t value = (int32_t)bits; /* signed ones are compared in one instruction */
    const float half = 0.5f; /* its ULP is the smallest subnormal of f16: the addition rounds */
    const uint32_t subnormal = sk_float_bits(sk_float(bits) + half) - sk_float_bits(half);
    const uint32_t most = value < 143 << 23 ? bits : 143u << 23; /* 65536: what becomes infinity */
    const uint32_t normal = (most - (112u << 23) + 0xfff + ((most >> 13) & 1)) >> 13;
    const uint32_t number = value < 113 << 23 ? subnormal : normal;
    return (uint16_t)(sign | (value > 0x7f800000 ? 0x7e00 : number));
}

static inline float sk_from_bf16(uint16_t h) { return sk_float((uint32_t)h << 16); }

static inline uint16_t sk_to_bf16(float x) {
    const uint32_t bits = sk_float_bits(x);
    const uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16, nan = (bits >> 16) | 0x40;
    return (uint16_t)((bits & 0x7fffffff) > 0x7f800000 ? nan : rounded);
}

static inline int64_t sk_bytes(const sk_arg *t) {
    return t->dtype == SK_DT_F64 ? 8 : t->dtype == SK_DT_F32 ? 4 : 2;
}

/* Element `at` of t; 1 for an absent tensor (a weight that was not given). */
static inline real sk_load_one(const sk_arg *t, int64_t at) {
    if (!t->data) return 1;
    switch (t->dtype) {
    case SK_DT_F16:
        return sk_from_f16(((const uint16_t *)t->data)[at]);
    case SK_DT_BF16:
        return sk_from_bf16(((const uint16_t *)t->data)[at]);
    case SK_DT_BOOL:
        return ((const uint8_t *)t->data)[at] != 0;
    case SK_DT_F64:
        return (real)((const double *)t->data)[at];
    default:
        return ((const float *)t->data)[at];
    }
}

static inline void sk_store_one(const sk_arg *t, int64_t at, real x) {
    switch (t->dtype) {
    case SK_DT_F16:
        ((uint16_t *)t->data)[at] = sk_to_f16((float)x);
        break;
    case SK_DT_BF16:
        ((uint16_t *)t->data)[at] = sk_to_bf16((float)x);
        break;
    default:
        ((real *)t->data)[at] = x;
    }
}

/* Whether elements can be used where they lie: contiguous and of the kernel's own dtype. */
static inline bool sk_is_plain(const sk_arg *x, int64_t stride) {
    return stride == 1 && x->dtype == (sizeof(real) == 8 ? SK_DT_F64 : SK_DT_F32);
}

/* to[i] = element at + i * stride of t, for i < n. */
SK_SPECIAL void sk_copy_here(const sk_arg *t, int64_t at, int64_t stride, int64_t n, real *to) {
    if (stride != 1 || !t->data || t->dtype == SK_DT_BOOL) {
        for (int64_t i = 0; i < n; i++) to[i] = sk_load_one(t, at + i * stride);
        return;
    }
    const uint16_t *half = (const uint16_t *)t->data + at;
    const float *single = (const float *)t->data + at;
    const double *full = (const double *)t->data + at;
    switch (t->dtype) {
    case SK_DT_F16:
        for (int64_t i = 0; i < n; i++) to[i] = sk_from_f16(half[i]);
        break;
    case SK_DT_BF16:
        for (int64_t i = 0; i < n; i++) to[i] = sk_from_bf16(half[i]);
        break;
    case SK_DT_F64:
        for (int64_t i = 0; i < n; i++) to[i] = (real)full[i];
        break;
    default:
        for (int64_t i = 0; i < n; i++) to[i] = single[i];
    }
}
SK_OUTLINE void sk_copy_apart(const sk_arg *t, int64_t at, int64_t stride, int64_t n, real *to) {
    sk_copy_here(t, at, stride, n, to);
}
/* A short row that needs no conversion is not worth a call. */
static inline void sk_copy(const sk_arg *t, int64_t at, int64_t stride, int64_t n, real *to) {
    if (t->data && sk_is_plain(t, stride))
        for (int64_t i = 0; i < n; i++) to[i] = ((const real *)t->data)[at + i];
    else
        sk_copy_apart(t, at, stride, n, to);
}

/* element at + i * stride of t = from[i], for i < n. */
SK_OUTLINE void sk_put_apart(const sk_arg *t, int64_t at, int64_t stride, int64_t n,
                             const real *from) {
    if (stride != 1) {
        for (int64_t i = 0; i < n; i++) sk_store_one(t, at + i * stride, from[i]);
        return;
    }
    uint16_t *half = (uint16_t *)t->data + at;
    real *full = (real *)t->data + at;
    switch (t->dtype) {
    case SK_DT_F16:
        for (int64_t i = 0; i < n; i++) half[i] = sk_to_f16((float)from[i]);
        break;
    case SK_DT_BF16:
        for (int64_t i = 0; i < n; i++) half[i] = sk_to_bf16((float)from[i]);
        break;
    default:
        for (int64_t i = 0; i < n; i++) full[i] = from[i];
    }
}
static inline void sk_put(const sk_arg *t, int64_t at, int64_t stride, int64_t n,
                          const real *from) {
    if (sk_is_plain(t, stride))
        for (int64_t i = 0; i < n; i++) ((real *)t->data)[at + i] = from[i];
    else
        sk_put_apart(t, at, stride, n, from);
}

/* ---- what can be read in place is not copied ---- */

/* Whether n elements are whole groups of lanes besides. */
static inline bool sk_in_place(const sk_arg *x, int64_t stride, int64_t n) {
    return n % SK_LANES == 0 && sk_is_plain(x, stride);
}

/* Copies n elements of x from `at`, rounded up to whole groups of lanes with -inf. */
static inline void sk_fill(const sk_arg *x, int64_t at, int64_t stride, int64_t n, real *to) {
    const int64_t rest = n % SK_LANES, whole = n - rest;
    if (x->data && sk_is_plain(x, stride)) {
        const real *const from = (const real *)x->data + at;
        for (int64_t i = 0; i < whole; i++) to[i] = from[i];
        if (rest == 0) return;
#pragma omp simd
        for (int k = 0; k < SK_LANES; k++) to[whole + k] = k < rest ? from[whole + k] : -INFINITY;
        return;
    }
    for (int k = 0; k < SK_LANES && rest > 0; k++) to[whole + k] = -INFINITY;
    sk_copy_apart(x, at, stride, n, to);
}

/* n elements of x from `at`, where they lie or, if they cannot be used there, in the buffer. */
static inline const real *sk_read_exactly(const sk_arg *x, int64_t at, int64_t stride, int64_t n,
                                          real *buffer) {
    if (sk_is_plain(x, stride)) return (const real *)x->data + at;
    sk_copy_here(x, at, stride, n, buffer);
    return buffer;
}

/* The same of whole groups of lanes: in the buffer they are rounded up. */
static inline const real *sk_read(const sk_arg *x, int64_t at, int64_t stride, int64_t n,
                                  real *buffer) {
    if (sk_in_place(x, stride, n)) return (const real *)x->data + at;
    sk_fill(x, at, stride, n, buffer);
    return buffer;
}

/* ---- reading ahead ---- */

/* Where the next tile of a group of lanes lies: its vectors are asked for while this one is
 * computed with, for no hardware follows strides between pages. Numbers, as they may lie past the
 * end. */
typedef struct sk_ahead {
    uintptr_t at;
    int64_t step;
} sk_ahead;

static inline void sk_fetch(sk_ahead x, int64_t i) {
    __builtin_prefetch((const void *)(x.at + (uintptr_t)(i * x.step)), 0, 2);
}

/* Asks for what lies a page after n elements of x: where several runs are read at a time, hardware
 * follows each only to the end of its page. */
static inline void sk_fetch_page(const sk_arg *x, int64_t at, int64_t n) {
    const int64_t page = 4096, line = 64, bytes = sk_bytes(x);
    const sk_ahead next = {(uintptr_t)x->data + (uintptr_t)(at * bytes + page), line};
    for (int64_t i = 0; i * line < n * bytes; i++) sk_fetch(next, i);
}
