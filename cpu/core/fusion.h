/* Fusion of maps: two or three of them, each brought to the size of the result on the stack and
 * added up. Formula in ops/bifpn_fuse.h, rows in resize.h.
 *
 * The result is cut in strips: all rows and columns of a plane or, where channels are contiguous,
 * of a group of channels, or as much of them as fits. A task is some strips. */
#pragma once
#include "bifpn_fuse.h"
#include "cpu/core/map.h"
#include "cpu/core/resize.h"

enum {
    SK_MAPS = 3,
    SK_FUSION_TASKS = SK_CPU_SCRATCH / SK_MAPS,
    SK_BAND = 16384 /* elements of a strip */
};

/* Map i is x[i], and comes to the size of the result along two axes. */
typedef struct sk_fusion {
    sk_arg x[SK_MAPS], grad;
    sk_axis rows[SK_MAPS], columns[SK_MAPS];
    int64_t N, C, H, W, activation;
    int count;
    bool late;                     /* the output is activated */
    double factor[SK_MAPS], total; /* total: what the weights were divided by */
    double part;   /* 1, or what weights were multiplied by first, as their sum overflows */
    int64_t lanes; /* channels taken together, or 1 where positions are contiguous */
    int64_t groups, bands, height, width, pieces; /* of channels; of rows, of columns */
} sk_fusion;

/* Of the parameters of either pass, without factors and strips. */
#define SK_FUSION_OF(p)                                                                    \
    {                                                                                      \
        .x = {(p)->a, (p)->b, (p)->c},                                                     \
        .rows = {{SK_DIM(p, H), SK_DIM(p, H), SK_RESIZE_NONE},                             \
                 {SK_DIM(p, I), SK_DIM(p, H), (p)->resize_b},                              \
                 {SK_DIM(p, K), SK_DIM(p, H), (p)->resize_c}},                             \
        .columns = {{SK_DIM(p, W), SK_DIM(p, W), SK_RESIZE_NONE},                          \
                    {SK_DIM(p, J), SK_DIM(p, W), (p)->resize_b},                           \
                    {SK_DIM(p, L), SK_DIM(p, W), (p)->resize_c}},                          \
        .N = SK_DIM(p, N), .C = SK_DIM(p, C), .H = SK_DIM(p, H), .W = SK_DIM(p, W),        \
        .activation = (p)->activation, .count = (p)->c.data ? 3 : 2, .late = (p)->activate \
    }

/* Leaves the weights, times part, and their sum. */
static inline void sk_add_weights(sk_fusion *f, const sk_arg *weight, double eps, double part) {
    f->part = part;
    f->total = eps * part;
    for (int i = 0; i < f->count; i++) {
        const double w = sk_load_one(weight, i * weight->stride[0]);
        f->factor[i] = w <= 0 ? 0 : w * part; /* NaN stays */
        f->total += f->factor[i];
    }
}

static inline void sk_set_factors(sk_fusion *f, const sk_arg *weight, double eps) {
    sk_add_weights(f, weight, eps, 1);
    if (isinf(f->total)) sk_add_weights(f, weight, eps, 0.25);
    for (int i = 0; i < f->count && weight->data; i++) f->factor[i] /= f->total;
}

/* How the result is cut in strips. A piece of a row is as wide as its sources let it be. */
static inline void sk_set_strips(sk_fusion *f) {
    const int64_t *const stride = f->x[0].stride;
    const bool channels = f->C > 1 && stride[1] == 1 && (f->W == 1 || stride[3] != 1);
    f->lanes = channels ? sk_min(f->C, SK_STRIP_LANES) : 1;
    f->groups = (f->C + f->lanes - 1) / f->lanes;
    int64_t width = sk_min(f->W, SK_STRIP / f->lanes);
    for (int i = 1; i < f->count; i++) {
        const sk_axis a = f->columns[i];
        const int64_t room = SK_SOURCE / f->lanes - 2;
        if (a.way == SK_RESIZE_MAXPOOL) /* two source rows, and a window more */
            width = sk_min(width, SK_STRIP / 2 / f->lanes - 1);
        else if (a.from > a.to && a.to > 0)
            width = sk_min(width, (int64_t)((double)room / (double)a.from * (double)a.to));
    }
    f->width = width > 1 ? width : 1;
    f->height = sk_min(f->H, SK_BAND / (f->width * f->lanes));
    if (f->height < 1) f->height = 1;
    f->pieces = (f->W + f->width - 1) / f->width;
    f->bands = (f->H + f->height - 1) / f->height;
}

static inline int64_t sk_strips_of(const sk_fusion *f) {
    return f->N * f->groups * f->bands * f->pieces;
}

static inline sk_work sk_fusion_work(const sk_fusion *f) {
    const int64_t strips = sk_strips_of(f), tasks = sk_min(strips, SK_FUSION_TASKS);
    const int64_t each = tasks > 0 ? (strips + tasks - 1) / tasks : 1;
    return (sk_work){tasks, 3 * each * f->height * f->width * f->lanes,
                     f->lanes > 1 ? "channels" : "positions"};
}

static inline sk_block sk_strip_of(const sk_fusion *f, int64_t i, sk_place *s) {
    const int64_t piece = i % f->pieces, band = i / f->pieces % f->bands;
    const int64_t group = i / f->pieces / f->bands % f->groups;
    s->n = i / f->pieces / f->bands / f->groups;
    s->c = group * f->lanes;
    s->lanes = sk_min(f->lanes, f->C - s->c);
    const int64_t y = band * f->height, x = piece * f->width;
    return (sk_block){y, sk_min(f->height, f->H - y), x, sk_min(f->width, f->W - x)};
}

/* ---- activations ---- */

static inline real sk_sigmoid(real x) {
    const real t = sk_exp_below(x < 0 ? x : -x), s = 1 / (1 + t);
    return x < 0 ? t * s : s;
}

static inline real sk_act(int64_t activation, real x) {
    return activation == SK_RELU ? (x <= 0 ? 0 : x) : activation == SK_SILU ? x * sk_sigmoid(x) : x;
}

/* act'(x) times g */
static inline real sk_act_slope(int64_t activation, real x, real g) {
    if (activation == SK_RELU) return x <= 0 ? 0 : g;
    if (activation != SK_SILU) return g;
    const real s = sk_sigmoid(x);
    return g * (s * (1 + x * (1 - s)));
}

/* Runs the statement with the constant that is named, one of enum sk_activation. */
#define SK_SWITCH_ACTIVATION(value, name, ...) \
    switch (value) {                           \
    case SK_IDENTITY: {                        \
        enum { name = SK_IDENTITY };           \
        __VA_ARGS__;                           \
        break;                                 \
    }                                          \
    case SK_RELU: {                            \
        enum { name = SK_RELU };               \
        __VA_ARGS__;                           \
        break;                                 \
    }                                          \
    default: {                                 \
        enum { name = SK_SILU };               \
        __VA_ARGS__;                           \
    }                                          \
    }

SK_SPECIAL void sk_act_run(int64_t activation, const real *x, int64_t n, real *to) {
#pragma omp simd
    for (int64_t k = 0; k < n; k++) to[k] = sk_act(activation, x[k]);
}

static inline const real *sk_activated(int64_t code, const real *x, int64_t n, real *to) {
    if (code == SK_IDENTITY) return x;
    SK_SWITCH_ACTIVATION(code, A, sk_act_run(A, x, n, to));
    return to;
}

/* ---- rows of the maps at the size of the result ---- */

typedef struct sk_resizing {
    sk_taps taps[SK_MAPS];
    SK_ALIGNED real source[3][SK_SOURCE], blend[SK_SOURCE];
    sk_dealt dealt;
    SK_ALIGNED real resized[SK_MAPS][SK_STRIP], fused[SK_STRIP], grad[SK_STRIP];
} sk_resizing;

/* The activation of what is resized. */
static inline int64_t sk_early(const sk_fusion *f) { return f->late ? SK_IDENTITY : f->activation; }

/* A row of map i, activated; but not by relu before it is pooled, which the largest can wait for.
 */
static inline const real *sk_source_row(const sk_fusion *f, const sk_place *s, int i,
                                        const sk_block *b, real *buffer) {
    const real *x = sk_read_block(&f->x[i], s, b, buffer);
    if (sk_early(f) == SK_RELU && f->rows[i].way == SK_RESIZE_MAXPOOL) return x;
    return sk_activated(sk_early(f), x, b->columns * s->lanes, buffer);
}

static inline void sk_interpolate_row(const sk_fusion *f, sk_resizing *w, const sk_place *s, int i,
                                      const sk_block *b, real *to) {
    const sk_tap v = sk_tap_of(f->rows[i], b->y);
    sk_taps *const taps = &w->taps[i];
    sk_set_taps(taps, f->columns[i], b->x, b->columns);
    const sk_block low = {v.low, 1, taps->first, taps->span},
                   high = {v.high, 1, low.x, low.columns};
    const real *x = sk_source_row(f, s, i, &low, w->source[0]);
    if (v.part > 0) {
        const real *y = sk_source_row(f, s, i, &high, w->source[1]);
        sk_blend(x, y, (real)v.part, taps->span * s->lanes, w->blend);
        x = w->blend;
    }
    sk_expand(taps, f->columns[i].way == SK_RESIZE_BILINEAR, s->lanes, x, to);
}

/* The rows of the windows of output row y; those beyond the edges are next to them. */
static inline int64_t sk_window_row(sk_axis a, int64_t y, int k) {
    const int64_t at = sk_window(a, y) + k;
    return at < 0 ? 0 : sk_min(at, a.from - 1);
}

static inline void sk_pool_row(const sk_fusion *f, sk_resizing *w, const sk_place *s, int i,
                               const sk_block *b, real *to) {
    const sk_windows h = sk_windows_of(f->columns[i], b->x, b->columns);
    const real *x[3];
    for (int k = 0; k < 3; k++) {
        const sk_block row = {sk_window_row(f->rows[i], b->y, k), 1, h.begin, h.end - h.begin};
        x[k] = sk_source_row(f, s, i, &row, w->source[k]);
    }
    sk_largest(x[0], x[1], x[2], (h.end - h.begin) * s->lanes, w->blend);
    sk_deal_windows(w->blend, h, s->lanes, b->columns, &w->dealt);
    sk_largest(w->dealt.even, w->dealt.odd, w->dealt.even + s->lanes, b->columns * s->lanes, to);
}

/* Map i at a block of the result. */
SK_OUTLINE const real *sk_resized(const sk_fusion *f, sk_resizing *w, const sk_place *s, int i,
                                  const sk_block *b) {
    const int64_t way = f->rows[i].way, row = b->columns * s->lanes;
    real *const to = w->resized[i];
    if (way == SK_RESIZE_NONE)
        return sk_activated(sk_early(f), sk_read_block(&f->x[i], s, b, to), b->rows * row, to);
    int64_t last = -1; /* the source of the row before */
    for (int64_t k = 0; k < b->rows; k++) {
        const sk_block one = {b->y + k, 1, b->x, b->columns};
        const int64_t from = way == SK_RESIZE_NEAREST ? sk_tap_of(f->rows[i], one.y).low : -1;
        if (from >= 0 && from == last)
            memcpy(to + k * row, to + (k - 1) * row, (size_t)row * sizeof *to);
        else if (way == SK_RESIZE_MAXPOOL)
            sk_pool_row(f, w, s, i, &one, to + k * row);
        else
            sk_interpolate_row(f, w, s, i, &one, to + k * row);
        last = from;
    }
    const bool waits = sk_early(f) == SK_RELU && way == SK_RESIZE_MAXPOOL;
    return waits ? sk_activated(SK_RELU, to, b->rows * row, to) : to;
}

/* Leaves the sum at a block. */
SK_OUTLINE void sk_fuse(const sk_fusion *f, sk_resizing *w, const sk_place *s, const sk_block *b,
                        real *restrict to) {
    const int64_t n = b->rows * b->columns * s->lanes;
    const real *x = sk_resized(f, w, s, 0, b), *y = sk_resized(f, w, s, 1, b);
    const real *z = f->count > 2 ? sk_resized(f, w, s, 2, b) : NULL;
    const real p = (real)f->factor[0], q = (real)f->factor[1], r = (real)f->factor[2];
    if (z) {
#pragma omp simd
        for (int64_t k = 0; k < n; k++) to[k] = p * x[k] + q * y[k] + r * z[k];
    } else {
#pragma omp simd
        for (int64_t k = 0; k < n; k++) to[k] = p * x[k] + q * y[k];
    }
}
