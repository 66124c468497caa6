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
 * scalar remainder. */
enum { SK_LANES = 16 };
#define SK_ALIGNED _Alignas(64)

static inline int64_t sk_min(int64_t a, int64_t b) { return a < b ? a : b; }
static inline int64_t sk_groups(int64_t n) { return (n + SK_LANES - 1) / SK_LANES; }

static inline float sk_from_f16(uint16_t h) {
    const uint32_t magnitude = (uint32_t)(h & 0x7fff) << 13, bias = 112u << 23,
                   smallest = 113u << 23;
    const float subnormal = sk_float(magnitude + smallest) - sk_float(smallest);
    const uint32_t normal =
        magnitude + (magnitude >= 0x7c00u << 13 ? 2 * bias : bias); /* inf and NaN: twice */
    const uint32_t bits = magnitude < 0x400u << 13 ? sk_float_bits(subnormal) : normal;
    return sk_float(bits | (uint32_t)(h & 0x8000) << 16);
}

static inline uint16_t sk_to_f16(float x) {
    const uint32_t bits = sk_float_bits(x) & 0x7fffffff, sign = (sk_float_bits(x) >> 16) & 0x8000;
    const float half = 0.5f; /* its ULP is the smallest subnormal of f16: the addition rounds */
    const uint32_t subnormal = sk_float_bits(sk_float(bits) + half) - sk_float_bits(half);
    const uint32_t normal = (bits - (112u << 23) + 0xfff + ((bits >> 13) & 1)) >> 13;
    const uint32_t special = bits > 0x7f800000 ? 0x7e00 : 0x7c00;
    const uint32_t finite = bits < 113u << 23 ? subnormal : normal;
    return (uint16_t)(sign | (bits >= 143u << 23 ? special : finite));
}

static inline float sk_from_bf16(uint16_t h) { return sk_float((uint32_t)h << 16); }

static inline uint16_t sk_to_bf16(float x) {
    const uint32_t bits = sk_float_bits(x);
    const uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16, nan = (bits >> 16) | 0x40;
    return (uint16_t)((bits & 0x7fffffff) > 0x7f800000 ? nan : rounded);
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
    default:
        return ((const real *)t->data)[at];
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

/* to[i] = element at + i * stride of t, for i < n. */
static inline void sk_copy(const sk_arg *t, int64_t at, int64_t stride, int64_t n, real *to) {
    if (stride != 1 || !t->data || t->dtype == SK_DT_BOOL) {
        for (int64_t i = 0; i < n; i++) to[i] = sk_load_one(t, at + i * stride);
        return;
    }
    const uint16_t *half = (const uint16_t *)t->data + at;
    const real *full = (const real *)t->data + at;
    switch (t->dtype) {
    case SK_DT_F16:
        for (int64_t i = 0; i < n; i++) to[i] = sk_from_f16(half[i]);
        break;
    case SK_DT_BF16:
        for (int64_t i = 0; i < n; i++) to[i] = sk_from_bf16(half[i]);
        break;
    default:
        memcpy(to, full, (size_t)n * sizeof *to);
    }
}

/* element at + i * stride of t = from[i], for i < n. */
static inline void sk_put(const sk_arg *t, int64_t at, int64_t stride, int64_t n,
                          const real *from) {
    if (stride != 1) {
        for (int64_t i = 0; i < n; i++) sk_store_one(t, at + i * stride, from[i]);
        return;
    }
    uint16_t *half = (uint16_t *)t->data + at;
    switch (t->dtype) {
    case SK_DT_F16:
        for (int64_t i = 0; i < n; i++) half[i] = sk_to_f16((float)from[i]);
        break;
    case SK_DT_BF16:
        for (int64_t i = 0; i < n; i++) half[i] = sk_to_bf16((float)from[i]);
        break;
    default:
        memcpy((real *)t->data + at, from, (size_t)n * sizeof *from);
    }
}

/* ---- Rows of classes, in tiles ----
 *
 * A tensor of shape (N, C, S) holds N x S rows of C classes. A task is a few of them, and one set
 * of loops serves two layouts, which differ in what the SK_LANES lanes of a vector are. "positions"
 * (images): each lane is a position, with a row of its own; tiles of a few classes and many
 * positions are copied to the stack, because a class stride such as 256 KB would map every class to
 * the same cache sets. "classes" (anything else): all lanes share one row, lane k taking classes k,
 * k + SK_LANES, ...; tiles of SK_ROW_C classes are read and written in place where that can be, and
 * a task takes several short rows so that their latencies overlap. */
enum {
    SK_TILE = 16384 / sizeof(real),
    SK_ROW_C = 1024,
    SK_ROWS = 8,
    SK_TILE_S = 512,
    SK_GROUPS = SK_TILE_S / SK_LANES
};

/* Rows [n, s], [n, s + 1], ... (`width` of them) in `groups` groups of lanes; a tile holds `step`
 * classes, a group's vectors lie `pitch` apart in it, and groups `gap`. */
typedef struct sk_rows {
    int64_t N, C, S, n, s, width, groups, step, pitch, gap;
    bool positions;
} sk_rows;

/* The rows of a call that reads u and v; width is that of its largest task. Tiles of positions hold
 * tile_c classes: the fewer, the longer the runs of memory; the more, the more often a tile has all
 * classes and can be used twice. */
static inline sk_rows sk_rows_of(const sk_arg *u, const sk_arg *v, int64_t N, int64_t C, int64_t S,
                                 int64_t tile_c) {
    const bool strided = u->stride[1] != 1 && v->stride[1] != 1;
    const int64_t row = sk_groups(sk_min(C, SK_ROW_C)) * SK_LANES;
    sk_rows r = {.N = N,
                 .C = C,
                 .S = S,
                 .positions = S > 1 && strided && u->stride[2] == 1 && v->stride[2] == 1};
    r.step = r.positions ? tile_c : SK_ROW_C;
    r.pitch = r.positions ? sk_min(SK_TILE / tile_c, SK_TILE_S) : SK_LANES;
    r.gap = r.positions ? SK_LANES : row;
    r.width = r.positions ? sk_min(r.pitch, S) : C > SK_ROW_C ? 1 : sk_min(SK_TILE / row, SK_ROWS);
    return r;
}

/* Tasks of one sample (positions) or of all (classes): a task of positions stays within a sample.
 */
static inline int64_t sk_tasks_in_run(const sk_rows *all) {
    return ((all->positions ? all->S : all->N * all->S) + all->width - 1) / all->width;
}

static inline sk_work sk_work_of(const sk_rows *all) {
    if (all->N == 0 || all->S == 0) return (sk_work){0, 0, "classes"};
    const int64_t tasks = sk_tasks_in_run(all);
    return (sk_work){all->positions ? all->N * tasks : tasks, 2 * all->C * all->width,
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

/* The group and lane of row i; in "classes", where all lanes of a row end up alike, lane 0. */
static inline int64_t sk_group(const sk_rows *r, int64_t i) {
    return r->positions ? i / SK_LANES : i;
}
static inline int64_t sk_lane(const sk_rows *r, int64_t i) {
    return r->positions ? i % SK_LANES : 0;
}
static inline int64_t sk_depth(const sk_rows *r, int64_t classes) {
    return r->positions ? classes : sk_groups(classes);
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

/* One scalar for each row. */
static inline void sk_load_scalars(const sk_rows *r, const sk_arg *x, real *to) {
    if (r->positions)
        sk_copy(x, sk_row_at(r, x->stride[0], x->stride[1], 0), x->stride[1], r->width, to);
    for (int64_t i = 0; i < r->width && !r->positions; i++)
        to[i] = sk_load_one(x, sk_row_at(r, x->stride[0], x->stride[1], i));
}

/* Whether a row's classes can be used where they lie: contiguous, of the kernel's own dtype and in
 * whole groups of lanes. */
static inline bool sk_in_place(const sk_rows *r, const sk_arg *x, int64_t classes) {
    return !r->positions && x->stride[1] == 1 && classes % SK_LANES == 0 &&
           x->dtype == (sizeof(real) == 8 ? SK_DT_F64 : SK_DT_F32);
}

/* Leaves in lanes where classes c .. c + classes of each group are to be read or written. */
static inline void sk_open_tile(const sk_rows *r, const sk_arg *x, int64_t c, int64_t classes,
                                real *tile, real *lanes[SK_GROUPS]) {
    const bool in_place = sk_in_place(r, x, classes);
    for (int64_t g = 0; g < r->groups; g++)
        lanes[g] = in_place ? (real *)x->data + sk_class_at(r, x, g, c) : tile + g * r->gap;
}

/* The same, and copies to the tile what is not in place, with -inf in the lanes that a group leaves
 * empty. */
static inline void sk_load_tile(const sk_rows *r, const sk_arg *x, int64_t c, int64_t classes,
                                real *tile, real *lanes[SK_GROUPS]) {
    sk_open_tile(r, x, c, classes, tile, lanes);
    const int64_t runs = r->positions ? classes : r->width,
                  length = r->positions ? r->width : classes;
    for (int64_t i = 0; i < runs && !sk_in_place(r, x, classes); i++) {
        real *run = tile + i * (r->positions ? r->pitch : r->gap);
        const int64_t at = r->positions ? sk_class_at(r, x, 0, c + i) : sk_class_at(r, x, i, c);
        sk_copy(x, at, x->stride[r->positions ? 2 : 1], length, run);
        for (int64_t j = length; j % SK_LANES != 0; j++) run[j] = -INFINITY;
    }
}

/* Takes to its place what was written to a tile that is not in place. */
static inline void sk_store_tile(const sk_rows *r, const sk_arg *x, int64_t c, int64_t classes,
                                 const real *tile) {
    const int64_t runs = r->positions ? classes : r->width,
                  length = r->positions ? r->width : classes;
    for (int64_t i = 0; i < runs && !sk_in_place(r, x, classes); i++) {
        const int64_t at = r->positions ? sk_class_at(r, x, 0, c + i) : sk_class_at(r, x, i, c);
        sk_put(x, at, x->stride[r->positions ? 2 : 1], length,
               tile + i * (r->positions ? r->pitch : r->gap));
    }
}
