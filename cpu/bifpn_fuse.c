/* BiFPN fusion on the CPU: see ops/bifpn_fuse.h for the formula, cpu/core/resize.h for rows.
 *
 * A task is some strips: all rows and columns of a plane or, where channels are contiguous, of a
 * group of channels, or as much of them as fits. Forward brings the rows of a strip to the size of
 * the result, on the stack, and adds them up. Backward folds the gradient back row by row: each
 * source pixel gathers its own, none is scattered to, so that no two tasks write to one place. */
#include "bifpn_fuse.h"
#include "cpu/core/map.h"
#include "cpu/core/resize.h"

SK_PARAMS(bifpn_fuse)
SK_PARAMS(bifpn_fuse_backward)
typedef struct bifpn_fuse_params forward_params;
typedef struct bifpn_fuse_backward_params backward_params;

enum {
    MAPS = 3,
    TASKS = SK_CPU_SCRATCH / MAPS,
    BAND = 16384, /* elements of a strip */
    RUN = 64      /* rows whose gradients are added up before they go to double */
};

/* What both directions share: map i is x[i], and comes to the size of the result along two axes. */
typedef struct fusion {
    sk_arg x[MAPS], grad;
    sk_axis rows[MAPS], columns[MAPS];
    int64_t N, C, H, W, activation;
    int count;
    bool late;                  /* the output is activated */
    double factor[MAPS], total; /* total: what the weights were divided by */
    double part;   /* 1, or what they were multiplied by first, for their sum is no number */
    int64_t lanes; /* channels taken together, or 1 where positions are contiguous */
    int64_t groups, bands, height, width, pieces; /* of channels; of rows, of columns */
} fusion;

#define FUSION_OF(p)                                                                       \
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
static void add_weights(fusion *f, const sk_arg *weight, double eps, double part) {
    f->part = part;
    f->total = eps * part;
    for (int i = 0; i < f->count; i++) {
        const double w = sk_load_one(weight, i * weight->stride[0]);
        f->factor[i] = w <= 0 ? 0 : w * part; /* NaN stays */
        f->total += f->factor[i];
    }
}

static void set_factors(fusion *f, const sk_arg *weight, double eps) {
    add_weights(f, weight, eps, 1);
    if (isinf(f->total)) add_weights(f, weight, eps, 0.25);
    for (int i = 0; i < f->count && weight->data; i++) f->factor[i] /= f->total;
}

/* How the result is cut in strips. A piece of a row is as wide as its sources let it be. */
static void set_strips(fusion *f) {
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
    f->height = sk_min(f->H, BAND / (f->width * f->lanes));
    if (f->height < 1) f->height = 1;
    f->pieces = (f->W + f->width - 1) / f->width;
    f->bands = (f->H + f->height - 1) / f->height;
}

static int64_t strips_of(const fusion *f) { return f->N * f->groups * f->bands * f->pieces; }

static sk_work work_of(const fusion *f) {
    const int64_t strips = strips_of(f), tasks = sk_min(strips, TASKS);
    const int64_t each = tasks > 0 ? (strips + tasks - 1) / tasks : 1;
    return (sk_work){tasks, 3 * each * f->height * f->width * f->lanes,
                     f->lanes > 1 ? "channels" : "positions"};
}

static sk_block strip_of(const fusion *f, int64_t i, sk_place *s) {
    const int64_t piece = i % f->pieces, band = i / f->pieces % f->bands;
    const int64_t group = i / f->pieces / f->bands % f->groups;
    s->n = i / f->pieces / f->bands / f->groups;
    s->c = group * f->lanes;
    s->lanes = sk_min(f->lanes, f->C - s->c);
    const int64_t y = band * f->height, x = piece * f->width;
    return (sk_block){y, sk_min(f->height, f->H - y), x, sk_min(f->width, f->W - x)};
}

/* ---- activations ---- */

static inline real sigmoid(real x) {
    const real t = sk_exp_below(x < 0 ? x : -x), s = 1 / (1 + t);
    return x < 0 ? t * s : s;
}

static inline real act(int64_t activation, real x) {
    return activation == SK_RELU ? (x <= 0 ? 0 : x) : activation == SK_SILU ? x * sigmoid(x) : x;
}

/* act'(x) times g */
static inline real slope(int64_t activation, real x, real g) {
    if (activation == SK_RELU) return x <= 0 ? 0 : g;
    if (activation != SK_SILU) return g;
    const real s = sigmoid(x);
    return g * (s * (1 + x * (1 - s)));
}

/* Runs the statement with `activation` as a constant. */
#define SWITCH_ACTIVATION(value, ...)      \
    switch (value) {                       \
    case SK_IDENTITY: {                    \
        enum { activation = SK_IDENTITY }; \
        __VA_ARGS__;                       \
        break;                             \
    }                                      \
    case SK_RELU: {                        \
        enum { activation = SK_RELU };     \
        __VA_ARGS__;                       \
        break;                             \
    }                                      \
    default: {                             \
        enum { activation = SK_SILU };     \
        __VA_ARGS__;                       \
    }                                      \
    }

SK_SPECIAL void act_run(int64_t activation, const real *x, int64_t n, real *to) {
#pragma omp simd
    for (int64_t k = 0; k < n; k++) to[k] = act(activation, x[k]);
}

static const real *activated(int64_t code, const real *x, int64_t n, real *to) {
    if (code == SK_IDENTITY) return x;
    SWITCH_ACTIVATION(code, act_run(activation, x, n, to));
    return to;
}

SK_SPECIAL void slope_run(int64_t activation, const real *x, const real *g, int64_t n, real *to) {
#pragma omp simd
    for (int64_t k = 0; k < n; k++) to[k] = slope(activation, x[k], g[k]);
}

/* ---- rows of the maps at the size of the result ---- */

typedef struct workspace {
    sk_taps taps[MAPS];
    SK_ALIGNED real source[3][SK_SOURCE], blend[SK_SOURCE];
    sk_dealt dealt;
    SK_ALIGNED real resized[MAPS][SK_STRIP], fused[SK_STRIP], grad[SK_STRIP];
} workspace;

/* The activation of what is resized. */
static int64_t early(const fusion *f) { return f->late ? SK_IDENTITY : f->activation; }

/* A row of map i, activated; but not by relu before it is pooled, which the largest can wait for.
 */
static const real *source_row(const fusion *f, const sk_place *s, int i, const sk_block *b,
                              real *buffer) {
    const real *x = sk_read_block(&f->x[i], s, b, buffer);
    if (early(f) == SK_RELU && f->rows[i].way == SK_RESIZE_MAXPOOL) return x;
    return activated(early(f), x, b->columns * s->lanes, buffer);
}

static void interpolate_row(const fusion *f, workspace *w, const sk_place *s, int i,
                            const sk_block *b, real *to) {
    const sk_tap v = sk_tap_of(f->rows[i], b->y);
    sk_taps *const taps = &w->taps[i];
    sk_set_taps(taps, f->columns[i], b->x, b->columns);
    const sk_block low = {v.low, 1, taps->first, taps->span},
                   high = {v.high, 1, low.x, low.columns};
    const real *x = source_row(f, s, i, &low, w->source[0]);
    if (v.part > 0) {
        const real *y = source_row(f, s, i, &high, w->source[1]);
        sk_blend(x, y, (real)v.part, taps->span * s->lanes, w->blend);
        x = w->blend;
    }
    sk_expand(taps, f->columns[i].way == SK_RESIZE_BILINEAR, s->lanes, x, to);
}

/* The rows of the windows of output row y; those beyond the edges are next to them. */
static int64_t window_row(sk_axis a, int64_t y, int k) {
    const int64_t at = sk_window(a, y) + k;
    return at < 0 ? 0 : sk_min(at, a.from - 1);
}

static void pool_row(const fusion *f, workspace *w, const sk_place *s, int i, const sk_block *b,
                     real *to) {
    const sk_windows h = sk_windows_of(f->columns[i], b->x, b->columns);
    const real *x[3];
    for (int k = 0; k < 3; k++) {
        const sk_block row = {window_row(f->rows[i], b->y, k), 1, h.begin, h.end - h.begin};
        x[k] = source_row(f, s, i, &row, w->source[k]);
    }
    sk_largest(x[0], x[1], x[2], (h.end - h.begin) * s->lanes, w->blend);
    sk_deal_windows(w->blend, h, s->lanes, b->columns, &w->dealt);
    sk_largest(w->dealt.even, w->dealt.odd, w->dealt.even + s->lanes, b->columns * s->lanes, to);
}

/* Map i at a block of the result. */
SK_OUTLINE const real *resized(const fusion *f, workspace *w, const sk_place *s, int i,
                               const sk_block *b) {
    const int64_t way = f->rows[i].way, row = b->columns * s->lanes;
    real *const to = w->resized[i];
    if (way == SK_RESIZE_NONE)
        return activated(early(f), sk_read_block(&f->x[i], s, b, to), b->rows * row, to);
    int64_t last = -1; /* the source of the row before */
    for (int64_t k = 0; k < b->rows; k++) {
        const sk_block one = {b->y + k, 1, b->x, b->columns};
        const int64_t from = way == SK_RESIZE_NEAREST ? sk_tap_of(f->rows[i], one.y).low : -1;
        if (from >= 0 && from == last)
            memcpy(to + k * row, to + (k - 1) * row, (size_t)row * sizeof *to);
        else if (way == SK_RESIZE_MAXPOOL)
            pool_row(f, w, s, i, &one, to + k * row);
        else
            interpolate_row(f, w, s, i, &one, to + k * row);
        last = from;
    }
    const bool waits = early(f) == SK_RELU && way == SK_RESIZE_MAXPOOL;
    return waits ? activated(SK_RELU, to, b->rows * row, to) : to;
}

/* Leaves the sum at a block. */
SK_OUTLINE void fuse(const fusion *f, workspace *w, const sk_place *s, const sk_block *b,
                     real *restrict to) {
    const int64_t n = b->rows * b->columns * s->lanes;
    const real *x = resized(f, w, s, 0, b), *y = resized(f, w, s, 1, b);
    const real *z = f->count > 2 ? resized(f, w, s, 2, b) : NULL;
    const real p = (real)f->factor[0], q = (real)f->factor[1], r = (real)f->factor[2];
    if (z) {
#pragma omp simd
        for (int64_t k = 0; k < n; k++) to[k] = p * x[k] + q * y[k] + r * z[k];
    } else {
#pragma omp simd
        for (int64_t k = 0; k < n; k++) to[k] = p * x[k] + q * y[k];
    }
}

/* ---- forward ---- */

static void forward_strip(const fusion *f, workspace *w, const sk_arg *fused, const sk_place *s,
                          const sk_block *strip) {
    for (sk_block b = {strip->y, 0, strip->x, strip->columns};
         sk_next_block(strip, s->lanes, SK_STRIP, &b);) {
        real *const to = sk_begin_block(fused, s, &b, w->fused);
        fuse(f, w, s, &b, to);
        if (f->late) activated(f->activation, to, b.rows * b.columns * s->lanes, to);
        sk_end_block(fused, s, &b, to);
    }
}

/* ---- backward ---- */

typedef struct folding {
    workspace w;
    sk_taps taps[MAPS];
    SK_ALIGNED real x[SK_SOURCE], folded[SK_SOURCE], grad[SK_SOURCE], sum[SK_STRIP];
    double wide[SK_SOURCE];
    sk_dealt rows[3], grads[3];
    sk_winners winners;
} folding;

/* The gradient of the sum at a block: where it lies or, if it must be computed, in a buffer. */
SK_OUTLINE const real *grad_of(const fusion *f, workspace *w, const sk_place *s,
                               const sk_block *b) {
    const real *g = sk_read_block(&f->grad, s, b, w->grad);
    if (!f->late || f->activation == SK_IDENTITY) return g;
    fuse(f, w, s, b, w->fused);
    const int64_t n = b->rows * b->columns * s->lanes;
    SWITCH_ACTIVATION(f->activation, slope_run(activation, w->fused, g, n, w->grad));
    return w->grad;
}

/* Leaves the gradient of map i from that folded back to a block of it; returns the sum of x g. */
SK_SPECIAL double conclude_run(int64_t activation, real factor, const real *x, const real *g,
                               int64_t n, real *to) {
    real sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t k = 0; k < n; k++) {
        const real v = x[k], h = g[k];
        sum += h == 0 ? 0 : h * act(activation, v);
        to[k] = slope(activation, v, factor * h);
    }
    if (isfinite(sum)) return sum;
    double again = 0; /* too large for a float, perhaps */
    for (int64_t k = 0; k < n; k++) again += g[k] == 0 ? 0 : (double)g[k] * act(activation, x[k]);
    return again;
}

SK_OUTLINE double conclude(const fusion *f, folding *m, const sk_arg *grad, const sk_place *s,
                           int i, const sk_block *b, const real *g) {
    const int64_t n = b->rows * b->columns * s->lanes;
    const real *x = sk_read_block(&f->x[i], s, b, m->x), factor = (real)f->factor[i];
    real *const to = sk_begin_block(grad, s, b, m->grad);
    double sum = 0;
    SWITCH_ACTIVATION(early(f), sum = conclude_run(activation, factor, x, g, n, to));
    sk_end_block(grad, s, b, to);
    return sum;
}

/* A strip's share of map i. */
static sk_block share_of(const fusion *f, int i, const sk_block *strip) {
    const sk_axis v = f->rows[i], h = f->columns[i];
    const int64_t y = strip->y * v.from / v.to, x = strip->x * h.from / h.to;
    return (sk_block){y, (strip->y + strip->rows) * v.from / v.to - y, x,
                      (strip->x + strip->columns) * h.from / h.to - x};
}

/* Leaves the gradients of some rows of the result, of columns x .. x + count - 1, each times the
 * share of it that row `of` of map i has. */
static void add_rows(const fusion *f, folding *m, const sk_place *s, int i, int64_t of,
                     sk_span rows, int64_t x, int64_t count) {
    real *const sum = m->sum;
    const int64_t n = count * s->lanes;
    for (int64_t y = rows.begin; y < rows.end; y++) {
        const real share = (real)sk_share(f->rows[i], y, of);
        const real *const g = grad_of(f, &m->w, s, &(sk_block){y, 1, x, count});
        if (y == rows.begin) {
#pragma omp simd
            for (int64_t k = 0; k < n; k++) sum[k] = share * g[k];
        } else {
#pragma omp simd
            for (int64_t k = 0; k < n; k++) sum[k] += share * g[k];
        }
    }
}

/* Leaves the gradient folded back to row b.y of map i, of its columns, which are parts of `columns`
 * of the result. */
static void fold_row(const fusion *f, folding *m, const sk_place *s, int i, const sk_block *b,
                     sk_span columns, real *to) {
    const sk_axis h = f->columns[i];
    const sk_span rows = sk_outputs_of(f->rows[i], b->y);
    const int64_t n = b->columns * s->lanes, width = f->width;
    if (h.way == SK_RESIZE_NEAREST && h.to == 2 * h.from && columns.end - columns.begin <= width &&
        rows.end > rows.begin && rows.end - rows.begin <= RUN) {
        add_rows(f, m, s, i, b->y, rows, columns.begin, columns.end - columns.begin);
        sk_fold_pairs(s->lanes, m->sum, b->columns, to);
        return;
    }
    for (int64_t k = 0; k < n; k++) m->wide[k] = 0;
    for (int64_t y = rows.begin; y < rows.end; y += RUN) {
        const sk_span run = {y, sk_min(y + RUN, rows.end)};
        for (int64_t x = columns.begin; x < columns.end; x += width) {
            const int64_t count = sk_min(width, columns.end - x);
            add_rows(f, m, s, i, b->y, run, x, count);
            sk_set_taps(&m->taps[i], h, x, count);
            sk_fold(&m->taps[i], s->lanes, m->sum, b->x, b->columns, m->wide);
        }
    }
    for (int64_t k = 0; k < n; k++) to[k] = (real)m->wide[k];
}

/* The gradient of a strip's share of map i, nearest or bilinear. */
SK_OUTLINE double unfold_strip(const fusion *f, folding *m, const sk_arg *grad, const sk_place *s,
                               int i, const sk_block *strip) {
    const sk_block all = share_of(f, i, strip);
    const int64_t width = SK_SOURCE / s->lanes, end_x = all.x + all.columns;
    double sum = 0;
    for (int64_t x = all.x; x < end_x; x += width) {
        const sk_block piece = {all.y, all.rows, x, sk_min(width, end_x - x)};
        const sk_span columns = {sk_outputs_of(f->columns[i], x).begin,
                                 sk_outputs_of(f->columns[i], x + piece.columns - 1).end};
        for (sk_block b = {all.y, 0, x, piece.columns};
             sk_next_block(&piece, s->lanes, SK_SOURCE, &b);) {
            for (int64_t k = 0; k < b.rows; k++)
                fold_row(f, m, s, i, &(sk_block){b.y + k, 1, x, b.columns}, columns,
                         m->folded + k * b.columns * s->lanes);
            sum += conclude(f, m, grad, s, i, &b, m->folded);
        }
    }
    return sum;
}

/* Deals out row k of the windows of a block of one row of the result. */
static void deal_row(const fusion *f, folding *m, const sk_place *s, int i, const sk_block *b,
                     int k, sk_dealt *to) {
    const int64_t y = sk_window(f->rows[i], b->y) + k;
    sk_windows h = sk_windows_of(f->columns[i], b->x, b->columns);
    const real *x = m->x;
    if (y < 0 || y >= f->rows[i].from)
        for (int64_t e = 0; e < (h.end - h.begin) * s->lanes; e++) m->x[e] = -INFINITY;
    else
        x = source_row(f, s, i, &(sk_block){y, 1, h.begin, h.end - h.begin}, m->x);
    sk_deal_windows(x, h, s->lanes, b->columns, to);
}

/* Leaves the winners of a block of one row, whose windows are dealt out, and their gradients. The
 * block may begin with column -1, which has none. */
static void find_winners(const fusion *f, folding *m, const sk_place *s, int i, const sk_block *b,
                         const sk_dealt *const *rows) {
    sk_winners *const w = &m->winners;
    const int above = sk_window(f->rows[i], b->y) < 0, before = b->x < 0;
    const real none = (real)(3 * above); /* the first that is there, where all are -inf */
    sk_find_winners(rows[0], rows[1], rows[2], s->lanes, b->columns * s->lanes, none, w->at);
    if (b->x <= 0 && sk_window(f->columns[i], 0) < 0)
        for (int64_t e = before * s->lanes; e < (before + 1) * s->lanes; e++)
            w->at[e] = w->at[e] == none ? none + 1 : w->at[e];
    const sk_block there = {b->y, 1, b->x + before, b->columns - before};
    const real *g = grad_of(f, &m->w, s, &there);
    for (int64_t e = 0; e < before * s->lanes; e++) w->grad[e] = 0;
    memcpy(w->grad + before * s->lanes, g, (size_t)(there.columns * s->lanes) * sizeof *g);
}

/* The gradient of a strip's share of map i, maxpool: for each row of the result the first two rows
 * of its windows, the third being the next one's first. */
SK_OUTLINE double unpool_strip(const fusion *f, folding *m, const sk_arg *grad, const sk_place *s,
                               int i, const sk_block *strip) {
    const sk_axis v = f->rows[i], h = f->columns[i];
    const sk_dealt *rows[3] = {&m->rows[0], &m->rows[1], &m->rows[2]};
    sk_dealt *grads[3] = {&m->grads[0], &m->grads[1], &m->grads[2]};
    const int64_t first = sk_window(h, strip->x), x = first < 0 ? 0 : first;
    const int64_t columns = sk_min(first + 2 * strip->columns, h.from) - x;
    const int64_t begin_row = strip->y > 0 ? strip->y - 1 : 0; /* for what it leaves below */
    double sum = 0;
    memset(grads[0], 0, sizeof *grads[0]);
    for (int64_t y = begin_row; y < strip->y + strip->rows; y++) {
        const sk_block b = {y, 1, strip->x - 1, strip->columns + 1};
        for (int k = y == begin_row ? 0 : 1; k < 3; k++)
            deal_row(f, m, s, i, &b, k, &m->rows[rows[k] - m->rows]);
        find_winners(f, m, s, i, &b, rows);
        sk_unpool(&m->winners, s->lanes, strip->columns * s->lanes, grads[0], grads[1], grads[2]);
        const int64_t top = sk_window(v, y), from = top < 0 ? 0 : top;
        const sk_block two = {from, sk_min(top + 2, v.from) - from, x, columns};
        for (int64_t k = 0; k < two.rows && y >= strip->y; k++) {
            const sk_dealt *const g = grads[from - top + k];
            sk_gather(first < 0 ? g->odd : g->even, first < 0 ? g->even + s->lanes : g->odd,
                      s->lanes, columns, m->folded + k * columns * s->lanes);
        }
        if (y >= strip->y) sum += conclude(f, m, grad, s, i, &two, m->folded);
        const sk_dealt *const row = rows[0];
        sk_dealt *const next = grads[0];
        rows[0] = rows[2], rows[2] = row;
        grads[0] = grads[2], grads[2] = next;
    }
    return sum;
}

/* The gradient of a strip of a map that has the size of the result. */
static double same_strip(const fusion *f, folding *m, const sk_arg *grad, const sk_place *s, int i,
                         const sk_block *strip) {
    double sum = 0;
    for (sk_block b = {strip->y, 0, strip->x, strip->columns};
         sk_next_block(strip, s->lanes, SK_STRIP, &b);)
        sum += conclude(f, m, grad, s, i, &b, grad_of(f, &m->w, s, &b));
    return sum;
}

static void backward_strip(const fusion *f, folding *m, const backward_params *p, const sk_place *s,
                           const sk_block *strip, double *d) {
    const sk_arg *const grad[MAPS] = {&p->grad_a, &p->grad_b, &p->grad_c};
    for (int i = 0; i < f->count; i++) {
        const int64_t way = f->rows[i].way;
        d[i] += way == SK_RESIZE_NONE      ? same_strip(f, m, grad[i], s, i, strip)
                : way == SK_RESIZE_MAXPOOL ? unpool_strip(f, m, grad[i], s, i, strip)
                                           : unfold_strip(f, m, grad[i], s, i, strip);
    }
}

/* ---- The kernels ---- */

static fusion forward_fusion(const forward_params *p) {
    fusion f = FUSION_OF(p);
    set_factors(&f, &p->weight, p->eps);
    set_strips(&f);
    return f;
}

static fusion backward_fusion(const backward_params *p) {
    fusion f = FUSION_OF(p);
    f.grad = p->grad;
    set_factors(&f, &p->weight, p->eps);
    set_strips(&f);
    return f;
}

static sk_work forward_work(const void *params) {
    const fusion f = forward_fusion(params);
    return work_of(&f);
}

static sk_work backward_work(const void *params) {
    const fusion f = backward_fusion(params);
    return work_of(&f);
}

static void bifpn_fuse_rows(const void *params, int64_t begin_task, int64_t end_task) {
    const forward_params *p = params;
    const fusion f = forward_fusion(p);
    const int64_t strips = strips_of(&f), tasks = sk_min(strips, TASKS);
    workspace w;
    for (int i = 0; i < MAPS; i++) w.taps[i].count = 0;
    for (int64_t i = begin_task * strips / tasks; i < end_task * strips / tasks; i++) {
        sk_place s;
        const sk_block strip = strip_of(&f, i, &s);
        forward_strip(&f, &w, &p->fused, &s, &strip);
    }
}

/* Leaves the gradients of the maps and, of each task, its part of d. */
static void bifpn_fuse_backward_rows(const void *params, int64_t begin_task, int64_t end_task) {
    const backward_params *p = params;
    const fusion f = backward_fusion(p);
    const int64_t strips = strips_of(&f), tasks = sk_min(strips, TASKS);
    folding m;
    for (int i = 0; i < MAPS; i++) m.taps[i].count = m.w.taps[i].count = 0;
    for (int64_t task = begin_task; task < end_task; task++) {
        double *const d = (double *)p->scratch.data + MAPS * task;
        for (int i = 0; i < MAPS; i++) d[i] = 0;
        for (int64_t i = task * strips / tasks; i < (task + 1) * strips / tasks; i++) {
            sk_place s;
            const sk_block strip = strip_of(&f, i, &s);
            backward_strip(&f, &m, p, &s, &strip, d);
        }
    }
}

/* Leaves the gradient of the weights. */
static void backward_finish(const void *params) {
    const backward_params *p = params;
    if (!p->weight.data) return;
    const fusion f = backward_fusion(p);
    const int64_t tasks = sk_min(strips_of(&f), TASKS);
    double d[MAPS] = {0};
    for (int64_t task = 0; task < tasks; task++)
        for (int i = 0; i < f.count; i++)
            d[i] += ((const double *)p->scratch.data)[MAPS * task + i];
    for (int i = 0; i < f.count; i++) {
        double grad = d[i] * (p->eps * f.part) / f.total;
        for (int j = 0; j < f.count; j++) grad += f.factor[j] * (d[i] - d[j]);
        const bool off = sk_load_one(&p->weight, i * p->weight.stride[0]) <= 0;
        sk_store_one(&p->grad_weight, i * p->grad_weight.stride[0],
                     off ? 0 : (real)(grad / f.total * f.part));
    }
}

const sk_cpu_kernel SK_CPU(bifpn_fuse) = {forward_work, bifpn_fuse_rows, NULL, NULL};
const sk_cpu_kernel SK_CPU(bifpn_fuse_backward) = {backward_work, bifpn_fuse_backward_rows,
                                                   backward_finish, NULL};
