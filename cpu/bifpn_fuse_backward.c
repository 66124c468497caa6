/* BiFPN fusion on the CPU, backward: see cpu/core/fusion.h.
 *
 * The gradient is folded back row by row: each source pixel gathers its own, none is scattered to,
 * so that no two tasks write to one place. */
#include "cpu/core/fusion.h"

SK_PARAMS(bifpn_fuse_backward)
typedef struct bifpn_fuse_backward_params backward_params;

enum { RUN = 64 }; /* rows whose gradients are added up before they go to double */

typedef struct folding {
    sk_resizing w;
    sk_taps taps[SK_MAPS];
    SK_ALIGNED real x[SK_SOURCE], folded[SK_SOURCE], grad[SK_SOURCE], sum[SK_STRIP];
    double wide[SK_SOURCE];
    sk_dealt rows[3], grads[3];
    sk_winners winners;
} folding;

SK_SPECIAL void slope_run(int64_t activation, const real *x, const real *g, int64_t n, real *to) {
#pragma omp simd
    for (int64_t k = 0; k < n; k++) to[k] = sk_act_slope(activation, x[k], g[k]);
}

/* The gradient of the sum at a block: where it lies or, if it must be computed, in a buffer. */
SK_OUTLINE const real *grad_of(const sk_fusion *f, sk_resizing *w, const sk_place *s,
                               const sk_block *b) {
    const real *g = sk_read_block(&f->grad, s, b, w->grad);
    if (!f->late || f->activation == SK_IDENTITY) return g;
    sk_fuse(f, w, s, b, w->fused);
    const int64_t n = b->rows * b->columns * s->lanes;
    SK_SWITCH_ACTIVATION(f->activation, A, slope_run(A, w->fused, g, n, w->grad));
    return w->grad;
}

/* Leaves the gradient of map i from that folded back to a block of it; returns the sum of x g. */
SK_SPECIAL double conclude_run(int64_t activation, real factor, const real *x, const real *g,
                               int64_t n, real *to) {
    real sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t k = 0; k < n; k++) {
        const real v = x[k], h = g[k];
        sum += h == 0 ? 0 : h * sk_act(activation, v);
        to[k] = sk_act_slope(activation, v, factor * h);
    }
    if (isfinite(sum)) return sum;
    double again = 0; /* too large for a float, perhaps */
    for (int64_t k = 0; k < n; k++)
        again += g[k] == 0 ? 0 : (double)g[k] * sk_act(activation, x[k]);
    return again;
}

SK_OUTLINE double conclude(const sk_fusion *f, folding *m, const sk_arg *grad, const sk_place *s,
                           int i, const sk_block *b, const real *g) {
    const int64_t n = b->rows * b->columns * s->lanes;
    const real *x = sk_read_block(&f->x[i], s, b, m->x), factor = (real)f->factor[i];
    real *const to = sk_begin_block(grad, s, b, m->grad);
    double sum = 0;
    SK_SWITCH_ACTIVATION(sk_early(f), A, sum = conclude_run(A, factor, x, g, n, to));
    sk_end_block(grad, s, b, to);
    return sum;
}

/* A strip's share of map i. */
static sk_block share_of(const sk_fusion *f, int i, const sk_block *strip) {
    const sk_axis v = f->rows[i], h = f->columns[i];
    const int64_t y = strip->y * v.from / v.to, x = strip->x * h.from / h.to;
    return (sk_block){y, (strip->y + strip->rows) * v.from / v.to - y, x,
                      (strip->x + strip->columns) * h.from / h.to - x};
}

/* Leaves the gradients of some rows of the result, of columns x .. x + count - 1, each times the
 * share of it that row `of` of map i has. */
static void add_rows(const sk_fusion *f, folding *m, const sk_place *s, int i, int64_t of,
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
static void fold_row(const sk_fusion *f, folding *m, const sk_place *s, int i, const sk_block *b,
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
SK_OUTLINE double unfold_strip(const sk_fusion *f, folding *m, const sk_arg *grad,
                               const sk_place *s, int i, const sk_block *strip) {
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
static void deal_row(const sk_fusion *f, folding *m, const sk_place *s, int i, const sk_block *b,
                     int k, sk_dealt *to) {
    const int64_t y = sk_window(f->rows[i], b->y) + k;
    sk_windows h = sk_windows_of(f->columns[i], b->x, b->columns);
    const real *x = m->x;
    if (y < 0 || y >= f->rows[i].from)
        for (int64_t e = 0; e < (h.end - h.begin) * s->lanes; e++) m->x[e] = -INFINITY;
    else
        x = sk_source_row(f, s, i, &(sk_block){y, 1, h.begin, h.end - h.begin}, m->x);
    sk_deal_windows(x, h, s->lanes, b->columns, to);
}

/* Leaves the winners of a block of one row, whose windows are dealt out, and their gradients. The
 * block may begin with column -1, which has none. */
static void find_winners(const sk_fusion *f, folding *m, const sk_place *s, int i,
                         const sk_block *b, const sk_dealt *const *rows) {
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
SK_OUTLINE double unpool_strip(const sk_fusion *f, folding *m, const sk_arg *grad,
                               const sk_place *s, int i, const sk_block *strip) {
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
static double same_strip(const sk_fusion *f, folding *m, const sk_arg *grad, const sk_place *s,
                         int i, const sk_block *strip) {
    double sum = 0;
    for (sk_block b = {strip->y, 0, strip->x, strip->columns};
         sk_next_block(strip, s->lanes, SK_STRIP, &b);)
        sum += conclude(f, m, grad, s, i, &b, grad_of(f, &m->w, s, &b));
    return sum;
}

static void backward_strip(const sk_fusion *f, folding *m, const backward_params *p,
                           const sk_place *s, const sk_block *strip, double *d) {
    const sk_arg *const grad[SK_MAPS] = {&p->grad_a, &p->grad_b, &p->grad_c};
    for (int i = 0; i < f->count; i++) {
        const int64_t way = f->rows[i].way;
        d[i] += way == SK_RESIZE_NONE      ? same_strip(f, m, grad[i], s, i, strip)
                : way == SK_RESIZE_MAXPOOL ? unpool_strip(f, m, grad[i], s, i, strip)
                                           : unfold_strip(f, m, grad[i], s, i, strip);
    }
}

/* ---- the kernel ---- */

static sk_fusion backward_fusion(const backward_params *p) {
    sk_fusion f = SK_FUSION_OF(p);
    f.grad = p->grad;
    sk_set_factors(&f, &p->weight, p->eps);
    sk_set_strips(&f);
    return f;
}

static sk_work backward_work(const void *params) {
    const sk_fusion f = backward_fusion(params);
    return sk_fusion_work(&f);
}

/* Leaves the gradients of the maps and, of each task, its part of d. */
static void bifpn_fuse_backward_rows(const void *params, int64_t begin_task, int64_t end_task) {
    const backward_params *p = params;
    const sk_fusion f = backward_fusion(p);
    const int64_t strips = sk_strips_of(&f), tasks = sk_min(strips, SK_FUSION_TASKS);
    folding m;
    for (int i = 0; i < SK_MAPS; i++) m.taps[i].count = m.w.taps[i].count = 0;
    for (int64_t task = begin_task; task < end_task; task++) {
        double *const d = (double *)p->scratch.data + SK_MAPS * task;
        for (int i = 0; i < SK_MAPS; i++) d[i] = 0;
        for (int64_t i = task * strips / tasks; i < (task + 1) * strips / tasks; i++) {
            sk_place s;
            const sk_block strip = sk_strip_of(&f, i, &s);
            backward_strip(&f, &m, p, &s, &strip, d);
        }
    }
}

/* Leaves the gradient of the weights. */
static void backward_finish(const void *params) {
    const backward_params *p = params;
    if (!p->weight.data) return;
    const sk_fusion f = backward_fusion(p);
    const int64_t tasks = sk_min(sk_strips_of(&f), SK_FUSION_TASKS);
    double d[SK_MAPS] = {0};
    for (int64_t task = 0; task < tasks; task++)
        for (int i = 0; i < f.count; i++)
            d[i] += ((const double *)p->scratch.data)[SK_MAPS * task + i];
    for (int i = 0; i < f.count; i++) {
        double grad = d[i] * (p->eps * f.part) / f.total;
        for (int j = 0; j < f.count; j++) grad += f.factor[j] * (d[i] - d[j]);
        const bool off = sk_load_one(&p->weight, i * p->weight.stride[0]) <= 0;
        sk_store_one(&p->grad_weight, i * p->grad_weight.stride[0],
                     off ? 0 : (real)(grad / f.total * f.part));
    }
}

const sk_cpu_kernel SK_CPU(bifpn_fuse_backward) = {backward_work, bifpn_fuse_backward_rows,
                                                   backward_finish, NULL};
