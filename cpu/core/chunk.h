/* Load and store: the one place on the CPU that looks at dtypes and layouts. Kernels see `real` in
 * tiles of lanes.
 *
 * f16 and bf16 are converted by integer selects, exactly in both directions (round to nearest even;
 * subnormals, infinities and NaN included), so that every variant vectorises them. */
#pragma once
#include <stdbool.h>

#include "cpu/core/kernel.h"
#include "cpu/core/math.h"

/* Loops run over whole groups of lanes (one 64-byte vector of floats), so that none ends in a
 * scalar remainder. Where vectors have 16 bytes too: on AArch64 groups of 4 would take 13 % less
 * instructions for the KL of 100 classes, and up to 10 % more for everything else. */
enum { SK_LANES = 16 };
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

/* ---- Rows of classes ----
 *
 * A tensor of shape (N, C, S) holds N x S rows of C classes. A task is a few of them, and the same
 * loops serve two layouts, which differ in what the SK_LANES lanes of a vector are. "positions"
 * (images): each lane is a position, with a row of its own. "classes" (anything else): all lanes
 * share one row, lane k taking classes k, k + SK_LANES, ...; a task takes several short rows so
 * that their latencies overlap. */
enum {
    SK_ROW_C = 1024,   /* classes of a row taken at a time */
    SK_SHORT_ROWS = 8, /* in a task of rows no longer than that */
    SK_WIDTH = 256,    /* rows in a task of positions */
    SK_PITCH =
        SK_WIDTH + SK_LANES, /* not a power of 2, which maps all classes to the same cache sets */
    SK_TILE_C = 32,          /* classes of positions taken at a time */
    SK_TILE = SK_TILE_C * SK_PITCH,
    SK_GROUPS = SK_WIDTH / SK_LANES,
    SK_RUN = 1024 /* elements written at a time */
};

/* Rows [n, s], [n, s + 1], ...: `width` of them, in `groups` groups of lanes. */
typedef struct sk_rows {
    int64_t N, C, S, n, s, width, groups;
    bool positions;
} sk_rows;

/* The rows of a call whose first tensor is x: its layout decides, whatever that of the others;
 * width is that of the largest task. */
static inline sk_rows sk_rows_of(const sk_arg *x, int64_t N, int64_t C, int64_t S) {
    sk_rows r = {.N = N,
                 .C = C,
                 .S = S,
                 .positions = S >= SK_LANES && x->stride[2] == 1 && x->stride[1] != 1};
    r.width = r.positions ? sk_min(SK_WIDTH, S) : C > SK_ROW_C ? 1 : SK_SHORT_ROWS;
    return r;
}

/* Tasks of one sample (positions) or of all (classes): a task of positions stays within a sample.
 */
static inline int64_t sk_tasks_in_run(const sk_rows *all) {
    return ((all->positions ? all->S : all->N * all->S) + all->width - 1) / all->width;
}

/* Each task reads `tensors` elements a class. */
static inline sk_work sk_work_of(const sk_rows *all, int tensors) {
    if (all->N == 0 || all->S == 0) return (sk_work){0, 0, "classes"};
    const int64_t tasks = sk_tasks_in_run(all);
    return (sk_work){all->positions ? all->N * tasks : tasks, tensors * all->C * all->width,
                     all->positions ? "positions" : "classes"};
}

static inline sk_rows sk_task(const sk_rows *all, int64_t i) {
    sk_rows r = *all;
    const int64_t tasks = sk_tasks_in_run(all), at = i % tasks * all->width;
    r.n = r.positions ? i / tasks : at / r.S;
    r.s = r.positions ? at : at % r.S;
    r.width = sk_min(r.width, (r.positions ? r.S : r.N * r.S) - at);
    r.groups = r.positions ? sk_groups(r.width) : r.width;
    return r;
}

/* Row i in a tensor of shape (N, S). */
static inline int64_t sk_row_at(const sk_rows *r, int64_t stride_n, int64_t stride_s, int64_t i) {
    int64_t n = r->n, s = r->s + i;
    for (; s >= r->S; s -= r->S) n++; /* a few steps at most, cheaper than a division */
    return n * stride_n + s * stride_s;
}

/* Class c of row i. */
static inline int64_t sk_class_at(const sk_rows *r, const sk_arg *x, int64_t i, int64_t c) {
    return sk_row_at(r, x->stride[0], x->stride[2], i) + c * x->stride[1];
}

/* Elements from one row to the next, or 0 where that varies. */
static inline int64_t sk_row_step(const sk_rows *r, int64_t stride_n, int64_t stride_s) {
    if (r->positions || stride_n == r->S * stride_s) return stride_s;
    return r->S == 1 ? stride_n : 0;
}

/* One element of a tensor of shape (N, S) for each row. */
#define SK_ROW_LOADER(name, type)                                                       \
    static inline void name(const sk_rows *r, const void *data, int64_t stride_n,       \
                            int64_t stride_s, type *restrict to) {                      \
        const type *const x = (const type *)data + sk_row_at(r, stride_n, stride_s, 0); \
        const int64_t step = sk_row_step(r, stride_n, stride_s);                        \
        if (step == 1)                                                                  \
            for (int64_t i = 0; i < r->width; i++) to[i] = x[i];                        \
        else if (step != 0)                                                             \
            for (int64_t i = 0; i < r->width; i++) to[i] = x[i * step];                 \
        else                                                                            \
            for (int64_t i = 0; i < r->width; i++)                                      \
                to[i] = ((const type *)data)[sk_row_at(r, stride_n, stride_s, i)];      \
    }
SK_ROW_LOADER(sk_load_reals, real)
SK_ROW_LOADER(sk_load_doubles, double)
SK_ROW_LOADER(sk_load_indices, int64_t)

/* The same of a weight (1 where none is given) or of an incoming gradient. */
static inline void sk_load_scalars(const sk_rows *r, const sk_arg *x, real *to) {
    if (!x->data)
        for (int64_t i = 0; i < r->width; i++) to[i] = 1;
    else if (x->dtype != SK_DT_BOOL)
        sk_load_reals(r, x->data, x->stride[0], x->stride[1], to);
    else
        for (int64_t i = 0; i < r->width; i++)
            to[i] = sk_load_one(x, sk_row_at(r, x->stride[0], x->stride[1], i));
}

/* Class c[i] of row i. */
static inline void sk_load_classes(const sk_rows *r, const sk_arg *x, const int32_t *c, real *to) {
    const int64_t at = sk_class_at(r, x, 0, 0), step = sk_row_step(r, x->stride[0], x->stride[2]);
    if (x->dtype == SK_DT_F32 && step != 0)
        for (int64_t i = 0; i < r->width; i++)
            to[i] = ((const float *)x->data)[at + i * step + c[i] * x->stride[1]];
    else
        for (int64_t i = 0; i < r->width; i++) to[i] = sk_load_one(x, sk_class_at(r, x, i, c[i]));
}

/* ---- Reading: tiles ----
 *
 * A tile holds SK_ROW_C classes of each row, or SK_TILE_C classes of each position. Positions are
 * copied to the stack, because a class stride such as 256 KB would map every class to the same
 * cache sets; rows are read in place where that can be. */
static inline int64_t sk_tile_classes(const sk_rows *r) {
    return r->positions ? SK_TILE_C : SK_ROW_C;
}

/* From one vector of a group to the next, and how many there are. */
static inline int64_t sk_pitch(const sk_rows *r) { return r->positions ? SK_PITCH : SK_LANES; }
static inline int64_t sk_depth(const sk_rows *r, int64_t classes) {
    return r->positions ? classes : sk_groups(classes);
}

/* Whether n elements are whole groups of lanes besides. */
static inline bool sk_in_place(const sk_arg *x, int64_t stride, int64_t n) {
    return n % SK_LANES == 0 && sk_is_plain(x, stride);
}

/* From one row of a tile of "classes" to the next. */
static inline int64_t sk_row_pitch(const sk_rows *r) {
    return sk_groups(sk_min(r->C, SK_ROW_C)) * SK_LANES;
}

/* Copies n elements of x from `at`, rounded up to whole groups of lanes with -inf. */
static inline void sk_fill(const sk_arg *x, int64_t at, int64_t stride, int64_t n, real *to) {
    const int64_t rest = n % SK_LANES;
    for (int k = 0; k < SK_LANES && rest > 0; k++) to[n - rest + k] = -INFINITY;
    sk_copy(x, at, stride, n, to);
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

/* Leaves in lanes where classes c .. c + classes of each group are to be read. */
static inline void sk_load_tile(const sk_rows *r, const sk_arg *x, int64_t c, int64_t classes,
                                real *tile, const real **lanes) {
    for (int64_t i = 0; i < classes && r->positions; i++)
        sk_fill(x, sk_class_at(r, x, 0, c + i), x->stride[2], r->width, tile + i * SK_PITCH);
    const int64_t row = sk_row_pitch(r);
    for (int64_t g = 0; g < r->groups; g++)
        lanes[g] = r->positions
                       ? tile + g * SK_LANES
                       : sk_read(x, sk_class_at(r, x, g, c), x->stride[1], classes, tile + g * row);
}

/* lane[k] = what x, one scalar for each row, holds for lane k of group g. */
static inline void sk_to_lanes(const sk_rows *r, int64_t g, const real *x, real *lane) {
    for (int k = 0; k < SK_LANES; k++) lane[k] = x[r->positions ? g * SK_LANES + k : g];
}

/* How many elements such an x has: in "positions", all lanes' rows. */
static inline int64_t sk_scalars(const sk_rows *r) {
    return r->positions ? r->groups * SK_LANES : r->width;
}

/* Where the next tile of a group of lanes lies: its vectors are asked for while this one is
 * computed with, for no hardware follows strides between pages. Numbers, as they may lie past the
 * end. */
typedef struct sk_ahead {
    uintptr_t at;
    int64_t step;
} sk_ahead;

static inline sk_ahead sk_next_tile(const sk_rows *r, const sk_arg *x, int64_t g, int64_t c) {
    const int64_t row = r->positions ? g * SK_LANES : g, next = c + sk_tile_classes(r);
    const int64_t at =
        next < r->C ? sk_class_at(r, x, row, next) : sk_class_at(r, x, row + r->width, 0);
    return (sk_ahead){(uintptr_t)x->data + (uintptr_t)(at * sk_bytes(x)),
                      (r->positions ? x->stride[1] : SK_LANES) * sk_bytes(x)};
}

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

/* Raises top to the largest of x, of each row. Four vectors at a time, for a chain of one maximum
 * after the other would take longer than the exponentials. */
static inline void sk_raise(const sk_rows *r, const real *x, int64_t depth, int64_t g, real *top) {
    const int64_t pitch = sk_pitch(r);
    real lane[SK_LANES];
    sk_to_lanes(r, g, top, lane);
    for (int64_t i = 0; i < depth; i += 4) {
        const real *a = x + i * pitch, *b = x + sk_min(i + 1, depth - 1) * pitch;
        const real *c = x + sk_min(i + 2, depth - 1) * pitch,
                   *d = x + sk_min(i + 3, depth - 1) * pitch;
#pragma omp simd
        for (int k = 0; k < SK_LANES; k++) {
            const real ab = a[k] > b[k] ? a[k] : b[k], cd = c[k] > d[k] ? c[k] : d[k],
                       abcd = ab > cd ? ab : cd;
            lane[k] = abcd > lane[k] ? abcd : lane[k];
        }
    }
    for (int k = 0; k < SK_LANES && r->positions; k++) top[g * SK_LANES + k] = lane[k];
    if (r->positions) return;
    real largest = lane[0];
#pragma omp simd reduction(max : largest)
    for (int k = 0; k < SK_LANES; k++) largest = lane[k] > largest ? lane[k] : largest;
    top[g] = largest;
}

/* sum += part, lane k of group g being part of its row. */
static inline void sk_add_lanes(const sk_rows *r, int64_t g, const real *part, double *sum) {
    for (int k = 0; k < SK_LANES && r->positions; k++) sum[g * SK_LANES + k] += part[k];
    if (r->positions) return;
    double all = 0;
#pragma omp simd reduction(+ : all)
    for (int k = 0; k < SK_LANES; k++) all += part[k];
    sum[g] += all;
}

/* ---- Writing: runs ----
 *
 * What is written class by class goes through memory in runs: n classes of one row from class c or,
 * in "positions", class c of n rows from `row`. */
typedef struct sk_run {
    int64_t row, c, n;
} sk_run;

/* What gradients are added to that there are none of yet. */
SK_ALIGNED static const real sk_zeros[SK_RUN];

/* The run after this one, {0, 0, 0} being before the first; whole groups of lanes wherever there is
 * one. */
static inline bool sk_next_run(const sk_rows *r, sk_run *run) {
    int64_t *along = r->positions ? &run->row : &run->c,
            *across = r->positions ? &run->c : &run->row;
    const int64_t length = r->positions ? r->width : r->C;
    *along += run->n;
    if (*along == length) {
        *along = 0;
        if (++*across == (r->positions ? r->C : r->width)) return false;
    }
    const int64_t left = sk_min(length - *along, SK_RUN);
    run->n = left > SK_LANES ? left - left % SK_LANES : left;
    return true;
}

static inline int64_t sk_run_at(const sk_rows *r, const sk_arg *x, sk_run run) {
    return sk_class_at(r, x, run.row, run.c);
}
static inline int64_t sk_run_stride(const sk_rows *r, const sk_arg *x) {
    return x->stride[r->positions ? 2 : 1];
}

static inline const real *sk_read_run(const sk_rows *r, const sk_arg *x, sk_run run, real *buffer) {
    return sk_read(x, sk_run_at(r, x, run), sk_run_stride(r, x), run.n, buffer);
}

/* The run after it, as above. */
static inline sk_ahead sk_next_read(const sk_rows *r, const sk_arg *x, sk_run run) {
    const int64_t at = sk_run_at(r, x, run) + (r->positions ? x->stride[1] : SK_RUN);
    return (sk_ahead){(uintptr_t)x->data + (uintptr_t)(at * sk_bytes(x)), SK_LANES * sk_bytes(x)};
}

/* Where a run is to be written: its place or the buffer, from which sk_end_run takes it there. */
static inline real *sk_begin_run(const sk_rows *r, const sk_arg *x, sk_run run, real *buffer) {
    return sk_in_place(x, sk_run_stride(r, x), run.n) ? (real *)x->data + sk_run_at(r, x, run)
                                                      : buffer;
}
static inline void sk_end_run(const sk_rows *r, const sk_arg *x, sk_run run, const real *buffer) {
    if (!sk_in_place(x, sk_run_stride(r, x), run.n))
        sk_put(x, sk_run_at(r, x, run), sk_run_stride(r, x), run.n, buffer);
}
