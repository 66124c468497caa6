/* Tiles: what is read of the rows of a task at a time, in groups of lanes.
 *
 * A tile holds SK_ROW_C classes of each row, or SK_TILE_C classes of each position. Positions are
 * copied to the stack, because a class stride such as 256 KB would map every class to the same
 * cache sets; rows are read in place where that can be. */
#pragma once
#include "cpu/core/task.h"

static inline int64_t sk_tile_classes(const sk_task *r) {
    return r->positions ? SK_TILE_C : SK_ROW_C;
}

/* From one vector of a group to the next. */
static inline int64_t sk_pitch(const sk_task *r) { return r->positions ? SK_PITCH : SK_LANES; }

/* From one row of a tile of "classes" to the next. */
static inline int64_t sk_row_pitch(const sk_task *r) {
    return sk_groups(sk_min(r->C, SK_ROW_C)) * SK_LANES;
}

/* The vectors of a group of lanes. `whole` of them lie one after the other from `first`: all, or
 * all but the last, which is a copy where the classes are no whole vector. */
typedef struct sk_vectors {
    const real *first, *last;
    int64_t depth, whole;
} sk_vectors;

static inline sk_vectors sk_vectors_of(const sk_task *r, const real *first, int64_t depth) {
    return (sk_vectors){first, first + (depth - 1) * sk_pitch(r), depth, depth};
}

static inline const real *sk_vector(const sk_task *r, sk_vectors x, int64_t i) {
    return i < x.whole ? x.first + i * sk_pitch(r) : x.last;
}

/* Where the part begins whose first vector is i: 0, or the one that is a copy. Loops over a part
 * know its pitch; choosing an address for each vector takes them 5 % longer. */
static inline const real *sk_part(sk_vectors x, int64_t i) {
    return i == 0 && x.depth > 1 ? x.first : x.last;
}

/* Classes c .. c + classes of row g: where they lie, or in the buffer. */
static inline sk_vectors sk_read_row(const sk_task *r, const sk_arg *x, int64_t g, int64_t c,
                                     int64_t classes, real *buffer) {
    const int64_t at = sk_class_at(r, x, g, c), depth = sk_groups(classes);
    const int64_t whole = classes - classes % SK_LANES;
    if (!sk_is_plain(x, x->stride[1])) {
        sk_fill(x, at, x->stride[1], classes, buffer);
        return sk_vectors_of(r, buffer, depth);
    }
    const real *const first = (const real *)x->data + at;
    if (whole == classes) return sk_vectors_of(r, first, depth);
    sk_fill(x, at + whole, 1, classes - whole, buffer);
    return (sk_vectors){first, buffer, depth, depth - 1};
}

/* Leaves where classes c .. c + classes of each group are to be read. */
static inline void sk_load_tile(const sk_task *r, const sk_arg *x, int64_t c, int64_t classes,
                                real *tile, sk_vectors *to) {
    for (int64_t i = 0; i < classes && r->positions; i++)
        sk_fill(x, sk_class_at(r, x, 0, c + i), x->stride[2], r->width, tile + i * SK_PITCH);
    const int64_t row = sk_row_pitch(r);
    for (int64_t g = 0; g < r->groups; g++)
        to[g] = r->positions ? sk_vectors_of(r, tile + g * SK_LANES, classes)
                             : sk_read_row(r, x, g, c, classes, tile + g * row);
}

/* lane[k] = what x, one scalar for each row, holds for lane k of group g. It is stored as a vector:
 * a load of a vector waits for lanes that were stored one by one, longer than a short row takes. */
static inline void sk_to_lanes(const sk_task *r, int64_t g, const real *x, real *lane) {
    if (r->positions) {
#pragma omp simd
        for (int k = 0; k < SK_LANES; k++) lane[k] = x[g * SK_LANES + k];
        return;
    }
    const real of_row = x[g];
#pragma omp simd
    for (int k = 0; k < SK_LANES; k++) lane[k] = of_row;
}

static inline sk_ahead sk_next_tile(const sk_task *r, const sk_arg *x, int64_t g, int64_t c) {
    const int64_t row = r->positions ? g * SK_LANES : g, next = c + sk_tile_classes(r);
    const int64_t at =
        next < r->C ? sk_class_at(r, x, row, next) : sk_class_at(r, x, row + r->width, 0);
    return (sk_ahead){(uintptr_t)x->data + (uintptr_t)(at * sk_bytes(x)),
                      (r->positions ? x->stride[1] : SK_LANES) * sk_bytes(x)};
}

/* Raises top to the largest of x, of each row. Four vectors at a time, for a chain of one maximum
 * after the other would take longer than the exponentials. */
static inline void sk_raise(const sk_task *r, sk_vectors x, int64_t g, real *top) {
    const int64_t pitch = sk_pitch(r), end = x.whole;
    real lane[SK_LANES];
    sk_to_lanes(r, g, top, lane);
    for (int64_t i = 0; i < end; i += 4) {
        const real *a = x.first + i * pitch, *b = x.first + sk_min(i + 1, end - 1) * pitch;
        const real *c = x.first + sk_min(i + 2, end - 1) * pitch,
                   *d = x.first + sk_min(i + 3, end - 1) * pitch;
#pragma omp simd
        for (int k = 0; k < SK_LANES; k++) {
            const real ab = a[k] > b[k] ? a[k] : b[k], cd = c[k] > d[k] ? c[k] : d[k],
                       abcd = ab > cd ? ab : cd;
            lane[k] = abcd > lane[k] ? abcd : lane[k];
        }
    }
#pragma omp simd
    for (int k = 0; k < SK_LANES; k++) lane[k] = x.last[k] > lane[k] ? x.last[k] : lane[k];
    if (r->positions) {
#pragma omp simd
        for (int k = 0; k < SK_LANES; k++) top[g * SK_LANES + k] = lane[k];
        return;
    }
    real largest = lane[0];
#pragma omp simd reduction(max : largest)
    for (int k = 0; k < SK_LANES; k++) largest = lane[k] > largest ? lane[k] : largest;
    top[g] = largest;
}

/* sum += part, lane k of group g being part of its row. */
static inline void sk_add_lanes(const sk_task *r, int64_t g, const real *part, double *sum) {
    if (r->positions) {
#pragma omp simd
        for (int k = 0; k < SK_LANES; k++) sum[g * SK_LANES + k] += part[k];
        return;
    }
    double all = 0;
#pragma omp simd reduction(+ : all)
    for (int k = 0; k < SK_LANES; k++) all += part[k];
    sum[g] += all;
}
