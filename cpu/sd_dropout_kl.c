/* SD-Dropout on the CPU: see ops/sd_dropout_kl.h for the formula, cpu/core/chunk.h for rows, groups
 * of lanes and tiles.
 *
 * Forward visits the logits twice (sums of exponentials; both KL and a correction of dl), backward
 * once. */
#include "sd_dropout_kl.h"
#include "cpu/core/chunk.h"
#include "cpu/core/kernel.h"
#include "cpu/core/math.h"
#include "cpu/core/reduce.h"

SK_PARAMS(sd_dropout_kl)
SK_PARAMS(sd_dropout_kl_backward)
typedef struct sd_dropout_kl_params forward_params;
typedef struct sd_dropout_kl_backward_params backward_params;

enum { U, V };

/* What the elements of a call share: 1/T; e^(x/T) is 2^(x log2e_T); and the T that log2e_T, being
 * rounded, stands for. */
typedef struct units {
    double T, rounded_T;
    real inverse_T, log2e_T;
} units;

static units units_of(double T) {
    const real log2e_T = (real)(SK_LOG2E / T);
    return (units){T, SK_LOG2E / log2e_T, (real)(1 / T), log2e_T};
}

static double sum_of_lanes(const double *x) {
    double sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int k = 0; k < SK_LANES; k++) sum += x[k];
    return sum;
}

/* Rows with a KL beyond this are computed in double (careful_*): in float, d would be too coarse
 * for d - KL. */
enum { FAR = 64 };

static bool is_ordinary(double kl_forward, double kl_reverse) {
    return kl_forward < FAR && kl_reverse < FAR;
}

/* ---- First visit: softmax ---- */

/* Per lane, the same in all lanes of one row: the largest logit so far; the sum of e^((x -
 * largest)/T); in the end T lse(x/T). */
typedef struct softmax {
    real largest[SK_LANES];
    double sum[SK_LANES], lse[SK_LANES];
} softmax;

/* Raises top to the largest of x, within each lane or, where the lanes are one row, over all. Four
 * vectors at a time, for a chain of one maximum after the other would take longer than all the
 * exponentials. */
static void raise(const sk_rows *r, const real *x, int64_t depth, real *top) {
    for (int64_t i = 0; i < depth; i += 4) {
        const real *a = x + i * r->pitch, *b = x + sk_min(i + 1, depth - 1) * r->pitch;
        const real *c = x + sk_min(i + 2, depth - 1) * r->pitch,
                   *d = x + sk_min(i + 3, depth - 1) * r->pitch;
#pragma omp simd
        for (int k = 0; k < SK_LANES; k++) {
            const real ab = a[k] > b[k] ? a[k] : b[k], cd = c[k] > d[k] ? c[k] : d[k],
                       abcd = ab > cd ? ab : cd;
            top[k] = abcd > top[k] ? abcd : top[k];
        }
    }
    if (r->positions) return;
    real largest = top[0];
#pragma omp simd reduction(max : largest)
    for (int k = 0; k < SK_LANES; k++) largest = top[k] > largest ? top[k] : largest;
    for (int k = 0; k < SK_LANES; k++) top[k] = largest;
}

/* Leaves e = 2^((x - largest) log2e_T) and their sum. */
static inline void exponentials(const sk_rows *r, real log2e_T, const real *x, int64_t depth,
                                const real *largest, real *e, real *sum) {
    real part[SK_LANES] = {0}; /* not sum itself, which the compiler would keep in memory */
    for (int64_t i = 0; i < depth; i++) {
        const int64_t at = i * r->pitch;
#pragma omp simd
        for (int k = 0; k < SK_LANES; k++) {
            e[at + k] = sk_exp2((x[at + k] - largest[k]) * log2e_T);
            part[k] += e[at + k];
        }
    }
    for (int k = 0; k < SK_LANES; k++) sum[k] = part[k];
}

/* Adds a tile's group of lanes to m, or begins m with the first; leaves their exponentials in e. */
static void add_to_softmax(const sk_rows *r, real log2e_T, bool first, const real *x, int64_t depth,
                           real *e, softmax *m) {
    real before[SK_LANES], sum[SK_LANES];
    /* Not -inf: a lane that is all -inf so far must get 2^-inf, not 2^NaN. */
    for (int k = 0; k < SK_LANES && first; k++) m->largest[k] = (real)-1e30;
    for (int k = 0; k < SK_LANES; k++) before[k] = m->largest[k];
    raise(r, x, depth, m->largest);
    exponentials(r, log2e_T, x, depth, m->largest, e, sum);
    if (first) {
        for (int k = 0; k < SK_LANES; k++) m->sum[k] = sum[k];
        return;
    }
#pragma omp simd
    for (int k = 0; k < SK_LANES; k++)
        m->sum[k] = m->sum[k] * sk_exp2((before[k] - m->largest[k]) * log2e_T) + sum[k];
}

static void finish_softmax(const sk_rows *r, const units *unit, softmax *m) {
    const double T = unit->rounded_T;
    if (!r->positions) {
        const double sum = sum_of_lanes(m->sum), lse = m->largest[0] + T * sk_log(sum);
        for (int k = 0; k < SK_LANES; k++) {
            m->sum[k] = sum;
            m->lse[k] = lse;
        }
        return;
    }
#pragma omp simd
    for (int k = 0; k < SK_LANES; k++) m->lse[k] = m->largest[k] + T * sk_log(m->sum[k]);
}

/* ---- Second visit: both KL ---- */

/* Per lane: sums over classes, as multiples of u's sum of exponentials; excess is the sum of p - q.
 */
typedef struct divergence {
    double forward[SK_LANES], reverse[SK_LANES], excess[SK_LANES];
} divergence;

/* Adds a tile's group of lanes. A class adds p (e^-d - 1 + d) to KL(p||q) and q (e^d - 1 - d) to
 * KL(q||p): by series where d is small, so that nothing cancels, and with e^d = p/q elsewhere, so
 * that nothing overflows. */
static void add_to_divergence(const sk_rows *r, const units *unit, bool first, const real *u,
                              const real *v, const real *e_u, const real *e_v, int64_t depth,
                              const softmax *m_u, const softmax *m_v, divergence *sums) {
    real forward[SK_LANES] = {0}, reverse[SK_LANES] = {0}, excess[SK_LANES] = {0};
    real dl_high[SK_LANES], dl_low[SK_LANES], ratio[SK_LANES];
    for (int k = 0; k < SK_LANES; k++) {
        const sk_split dl = sk_split_of(m_u->lse[k] - m_v->lse[k]);
        dl_high[k] = dl.high;
        dl_low[k] = dl.low;
        ratio[k] = (real)(m_u->sum[k] / m_v->sum[k]);
    }
    for (int64_t i = 0; i < depth; i++) {
        const int64_t at = i * r->pitch;
#pragma omp simd
        for (int k = 0; k < SK_LANES; k++) {
            const real p = e_u[at + k], q = e_v[at + k] * ratio[k], p_q = p - q;
            const sk_split dl = {dl_high[k], dl_low[k]};
            const real d = sk_difference(u[at + k], v[at + k], dl) * unit->inverse_T, dd = d * d;
            const bool near = dd < 1;
            const sk_parts series = sk_exp_rest(d);
            const real to_forward = near ? p * dd * (series.even - series.odd) : p * d - p_q;
            const real to_reverse = near ? q * dd * (series.even + series.odd) : p_q - q * d;
            forward[k] += to_forward;
            reverse[k] += to_reverse;
            excess[k] += to_reverse + q * d;
        }
    }
    for (int k = 0; k < SK_LANES; k++) {
        sums->forward[k] = forward[k] + (first ? 0 : sums->forward[k]);
        sums->reverse[k] = reverse[k] + (first ? 0 : sums->reverse[k]);
        sums->excess[k] = excess[k] + (first ? 0 : sums->excess[k]);
    }
}

/* A row as saved for backward. */
typedef struct saved_row {
    double lse_u, dl, forward, reverse;
} saved_row;

/* Element c of row i of both logits, over T; p, q and d of that row. */
typedef struct class_terms {
    double p, q, d;
    bool no_p, no_q; /* u, v infinite */
} class_terms;

static class_terms class_of(const sk_rows *r, const sk_arg *u, const sk_arg *v, double T,
                            saved_row row, int64_t i, int64_t c) {
    const double a = sk_load_one(u, sk_class_at(r, u, i, c)) / T,
                 b = sk_load_one(v, sk_class_at(r, v, i, c)) / T;
    return (class_terms){exp(a - row.lse_u), exp(b - (row.lse_u - row.dl)), a - b - row.dl,
                         isinf(a), isinf(b)};
}

/* Both KL of a row that is far or holds infinities, with 0 log 0 = 0; NaN for a row with a NaN or
 * nothing but -inf. */
static void careful_divergence(const forward_params *p, const sk_rows *r, int64_t i,
                               saved_row *row) {
    double sum_p = 0, sum_q = 0; /* 1, but for the float rounding of lse */
    for (int64_t c = 0; c < r->C; c++) {
        const class_terms k = class_of(r, &p->u, &p->v, p->temperature, *row, i, c);
        sum_p += k.p;
        sum_q += k.q;
    }
    row->lse_u += log(sum_p);
    row->dl += log(sum_p / sum_q);
    row->forward = row->reverse = 0 * (row->lse_u + row->dl);
    for (int64_t c = 0; c < r->C; c++) {
        const class_terms k = class_of(r, &p->u, &p->v, p->temperature, *row, i, c);
        if (k.no_p && k.no_q) continue;
        row->forward += k.no_p ? k.q : k.no_q ? INFINITY : k.p * k.d - (k.p - k.q);
        row->reverse += k.no_q ? k.p : k.no_p ? INFINITY : (k.p - k.q) - k.q * k.d;
    }
}

/* ---- Forward ---- */

/* Both visits to a task's logits. The second finds the exponentials of the first if they were but
 * one tile. */
static void diverge(const forward_params *p, const sk_rows *r, const units *unit,
                    softmax m[2][SK_GROUPS], divergence *sums) {
    SK_ALIGNED real tile[2][SK_TILE], e[2][SK_TILE];
    const sk_arg *logits[2] = {&p->u, &p->v};
    real *x[2][SK_GROUPS];
    for (int64_t c = 0; c < r->C; c += r->step) {
        const int64_t classes = sk_min(r->step, r->C - c), depth = sk_depth(r, classes);
        for (int i = U; i <= V; i++) {
            sk_load_tile(r, logits[i], c, classes, tile[i], x[i]);
            for (int64_t g = 0; g < r->groups; g++)
                add_to_softmax(r, unit->log2e_T, c == 0, x[i][g], depth, e[i] + g * r->gap,
                               &m[i][g]);
        }
    }
    for (int64_t g = 0; g < r->groups; g++) {
        finish_softmax(r, unit, &m[U][g]);
        finish_softmax(r, unit, &m[V][g]);
    }
    for (int64_t c = 0; c < r->C; c += r->step) {
        const int64_t classes = sk_min(r->step, r->C - c), depth = sk_depth(r, classes);
        for (int i = U; i <= V && r->C > r->step; i++) {
            real unused[SK_LANES];
            sk_load_tile(r, logits[i], c, classes, tile[i], x[i]);
            for (int64_t g = 0; g < r->groups; g++)
                exponentials(r, unit->log2e_T, x[i][g], depth, m[i][g].largest, e[i] + g * r->gap,
                             unused);
        }
        for (int64_t g = 0, at = 0; g < r->groups; g++, at += r->gap)
            add_to_divergence(r, unit, c == 0, x[U][g], x[V][g], e[U] + at, e[V] + at, depth,
                              &m[U][g], &m[V][g], &sums[g]);
    }
}

/* Row i of a task, from the sums of its lane or, where the lanes are one row, of all. */
static saved_row row_of(const forward_params *p, const sk_rows *r, int64_t i,
                        softmax m[2][SK_GROUPS], const divergence *sums) {
    const int64_t g = sk_group(r, i), k = sk_lane(r, i);
    const double factor = 1 / m[U][g].sum[k], inverse_T = 1 / p->temperature;
    const double lse_u = m[U][g].lse[k] * inverse_T;
    const double dl = (m[U][g].lse[k] - m[V][g].lse[k]) * inverse_T;
    double forward = sums[g].forward[k], reverse = sums[g].reverse[k], excess = sums[g].excess[k];
    if (!r->positions) {
        forward = sum_of_lanes(sums[g].forward);
        reverse = sum_of_lanes(sums[g].reverse);
        excess = sum_of_lanes(sums[g].excess);
    }
    /* The sum of p - q would be 0, were it not for the rounding error of dl: it is that very error,
     * of which both KL hold half the square too much. */
    excess *= factor;
    forward = factor * forward - excess * excess / 2;
    reverse = factor * reverse - excess * excess / 2;
    saved_row row = {lse_u, dl + excess, forward < 0 ? 0 : forward, reverse < 0 ? 0 : reverse};
    if (!is_ordinary(row.forward, row.reverse)) {
        row.dl = dl;
        careful_divergence(p, r, i, &row);
    }
    return row;
}

static void save_row(const forward_params *p, const sk_rows *r, int64_t i, double weight,
                     saved_row row) {
    const double TT = p->temperature * p->temperature;
    const double forward = p->forward_weight != 0 ? p->forward_weight * row.forward : 0;
    const double reverse = p->reverse_weight != 0 ? p->reverse_weight * row.reverse : 0;
    const int64_t *stride = p->saved.stride;
    double *saved = (double *)p->saved.data + sk_row_at(r, stride[1], stride[2], i);
    ((real *)p->rows.data)[sk_row_at(r, p->rows.stride[0], p->rows.stride[1], i)] =
        (real)(weight * TT * (forward + reverse));
    saved[0] = row.lse_u;
    saved[stride[0]] = row.dl;
    saved[2 * stride[0]] = row.forward;
    saved[3 * stride[0]] = row.reverse;
}

static void forward_task(const forward_params *p, const sk_rows *r, const units *unit) {
    SK_ALIGNED softmax m[2][SK_GROUPS];
    SK_ALIGNED divergence sums[SK_GROUPS];
    real weight[SK_TILE_S];
    bool any = false;
    sk_load_scalars(r, &p->weight, weight);
    for (int64_t i = 0; i < r->width; i++) any |= weight[i] != 0;
    if (any) diverge(p, r, unit, m, sums);
    for (int64_t i = 0; i < r->width; i++)
        save_row(p, r, i, weight[i],
                 weight[i] != 0 ? row_of(p, r, i, m, sums) : (saved_row){0, 0, 0, 0});
}

/* ---- Backward ---- */

/* What the gradients of a lane's row need: p = U_FACTOR 2^((u - U_SHIFT) log2e_T) and q likewise,
 * both times the row's factor; d; both KL. */
enum { U_SHIFT, U_FACTOR, V_SHIFT, V_FACTOR, DL_HIGH, DL_LOW, KL_FORWARD, KL_REVERSE, SCALARS };
typedef real row_scalars[SCALARS][SK_LANES];

/* wf and wr, and the same for the terms that detach_target drops. */
typedef struct term_weights {
    real forward, reverse, target_forward, target_reverse;
} term_weights;

static void set_lane(const units *unit, saved_row row, double factor, row_scalars m, int64_t k) {
    const double u = row.lse_u * unit->T, v = (row.lse_u - row.dl) * unit->T;
    const sk_split dl = sk_split_of(row.dl * unit->T);
    m[U_SHIFT][k] = (real)u;
    m[V_SHIFT][k] = (real)v;
    m[U_FACTOR][k] = (real)factor * sk_exp2((real)(m[U_SHIFT][k] - u) * unit->log2e_T);
    m[V_FACTOR][k] = (real)factor * sk_exp2((real)(m[V_SHIFT][k] - v) * unit->log2e_T);
    m[DL_HIGH][k] = dl.high;
    m[DL_LOW][k] = dl.low;
    m[KL_FORWARD][k] = (real)row.forward;
    m[KL_REVERSE][k] = (real)row.reverse;
}

/* Leaves the gradients of a tile's group of lanes. */
static void gradients(const sk_rows *r, const units *unit, term_weights w, const real *u,
                      const real *v, int64_t depth, row_scalars m, real *grad_u, real *grad_v) {
    for (int64_t i = 0; i < depth; i++) {
        const int64_t at = i * r->pitch;
#pragma omp simd
        for (int k = 0; k < SK_LANES; k++) {
            const real p = m[U_FACTOR][k] * sk_exp2((u[at + k] - m[U_SHIFT][k]) * unit->log2e_T);
            const real q = m[V_FACTOR][k] * sk_exp2((v[at + k] - m[V_SHIFT][k]) * unit->log2e_T);
            const sk_split dl = {m[DL_HIGH][k], m[DL_LOW][k]};
            const real d = sk_difference(u[at + k], v[at + k], dl) * unit->inverse_T;
            const real p_q = d * d < (real)0.25 ? q * sk_expm1(d) : p - q;
            grad_u[at + k] = w.target_forward * (p * (d - m[KL_FORWARD][k])) + w.reverse * p_q;
            grad_v[at + k] = -w.target_reverse * (q * (d + m[KL_REVERSE][k])) - w.forward * p_q;
        }
    }
}

/* Sets the gradients of rows with factor 0 to 0, whatever their logits hold. */
static void clear_gradients(const sk_rows *r, int64_t depth, row_scalars m, real *grad_u,
                            real *grad_v) {
    for (int64_t i = 0; i < depth; i++) {
        const int64_t at = i * r->pitch;
#pragma omp simd
        for (int k = 0; k < SK_LANES; k++) {
            const real a = grad_u[at + k], b = grad_v[at + k];
            grad_u[at + k] = m[U_FACTOR][k] != 0 ? a : 0;
            grad_v[at + k] = m[U_FACTOR][k] != 0 ? b : 0;
        }
    }
}

static int live_lanes(row_scalars m) {
    int live = 0;
    for (int k = 0; k < SK_LANES; k++) live += m[U_FACTOR][k] != 0;
    return live;
}

static saved_row load_row(const backward_params *p, const sk_rows *r, int64_t i) {
    const int64_t *stride = p->saved.stride;
    const double *saved = (const double *)p->saved.data + sk_row_at(r, stride[1], stride[2], i);
    return (saved_row){saved[0], saved[stride[0]], saved[2 * stride[0]], saved[3 * stride[0]]};
}

/* The gradient of a row that is far or holds infinities or NaN: terms of weight 0 are left out, 0
 * log 0 = 0. */
static void careful_gradient(const backward_params *p, const sk_rows *r, int64_t i, double factor,
                             term_weights w) {
    const saved_row row = load_row(p, r, i);
    for (int64_t c = 0; c < r->C; c++) {
        const class_terms k = class_of(r, &p->u, &p->v, p->temperature, row, i, c);
        const double forward = k.no_p && !isnan(row.forward) ? 0 : k.p * (k.d - row.forward);
        const double reverse = k.no_q && !isnan(row.reverse) ? 0 : k.q * (k.d + row.reverse);
        double to_u = 0, to_v = 0;
        if (w.target_forward != 0) to_u += w.target_forward * forward;
        if (w.reverse != 0) to_u += w.reverse * (k.p - k.q);
        if (w.target_reverse != 0) to_v -= w.target_reverse * reverse;
        if (w.forward != 0) to_v -= w.forward * (k.p - k.q);
        sk_store_one(&p->grad_u, sk_class_at(r, &p->grad_u, i, c), (real)(factor * to_u));
        sk_store_one(&p->grad_v, sk_class_at(r, &p->grad_v, i, c), (real)(factor * to_v));
    }
}

/* Leaves each row's factor and scalars, in lanes without a row those of some other. */
static void load_lanes(const backward_params *p, const sk_rows *r, const units *unit,
                       double *factor, row_scalars *m) {
    real grad[SK_TILE_S], weight[SK_TILE_S];
    const double per_row = p->temperature / *(const real *)p->denominator.data;
    sk_load_scalars(r, &p->grad, grad);
    sk_load_scalars(r, &p->weight, weight);
    for (int64_t i = 0; i < r->width; i++) {
        const saved_row row = weight[i] != 0 ? load_row(p, r, i) : (saved_row){0, 0, 0, 0};
        /* No gradient: none comes in, or the row has no loss, for its weight or because p = q. */
        const bool none = grad[i] == 0 || (row.forward == 0 && row.reverse == 0);
        factor[i] = none ? 0 : per_row * grad[i] * weight[i];
        set_lane(unit, none ? (saved_row){0, 0, 0, 0} : row, factor[i], m[sk_group(r, i)],
                 sk_lane(r, i));
    }
    for (int64_t g = 0; g < r->groups; g++) {
        const int64_t used = r->positions ? sk_min(SK_LANES, r->width - g * SK_LANES) : 1;
        for (int i = 0; i < SCALARS && used < SK_LANES; i++) {
            const real x = m[g][i][0];
            for (int k = 0; k < SK_LANES; k++) m[g][i][k] = k < used ? m[g][i][k] : x;
        }
    }
}

static void backward_task(const backward_params *p, const sk_rows *r, const units *unit,
                          term_weights w) {
    SK_ALIGNED real tile[2][SK_TILE], tile_grad[2][SK_TILE];
    SK_ALIGNED row_scalars m[SK_GROUPS];
    real *u[SK_GROUPS], *v[SK_GROUPS], *grad_u[SK_GROUPS], *grad_v[SK_GROUPS];
    double factor[SK_TILE_S];
    load_lanes(p, r, unit, factor, m);
    for (int64_t c = 0, classes; c < r->C; c += classes) {
        classes = sk_min(r->step, r->C - c);
        if (!r->positions && classes > SK_LANES)
            classes -= classes % SK_LANES; /* in place; the rest of the row after it */
        const int64_t depth = sk_depth(r, classes);
        sk_load_tile(r, &p->u, c, classes, tile[U], u);
        sk_load_tile(r, &p->v, c, classes, tile[V], v);
        sk_open_tile(r, &p->grad_u, c, classes, tile_grad[U], grad_u);
        sk_open_tile(r, &p->grad_v, c, classes, tile_grad[V], grad_v);
        for (int64_t g = 0; g < r->groups; g++) {
            const int live = live_lanes(m[g]);
            if (live > 0) gradients(r, unit, w, u[g], v[g], depth, m[g], grad_u[g], grad_v[g]);
            if (live < SK_LANES) clear_gradients(r, depth, m[g], grad_u[g], grad_v[g]);
        }
        sk_store_tile(r, &p->grad_u, c, classes, tile_grad[U]);
        sk_store_tile(r, &p->grad_v, c, classes, tile_grad[V]);
    }
    for (int64_t i = 0; i < r->width; i++) {
        const int64_t g = sk_group(r, i), k = sk_lane(r, i);
        if (factor[i] != 0 && !is_ordinary(m[g][KL_FORWARD][k], m[g][KL_REVERSE][k]))
            careful_gradient(p, r, i, factor[i], w);
    }
}

/* ---- The kernels ---- */

static sk_rows forward_all(const forward_params *p) {
    return sk_rows_of(&p->u, &p->v, SK_DIM(p, N), SK_DIM(p, C), SK_DIM(p, S), 32);
}

static sk_work forward_work(const void *params) {
    const sk_rows all = forward_all(params);
    return sk_work_of(&all);
}

static void sd_dropout_kl_rows(const void *params, int64_t begin, int64_t end) {
    const forward_params *p = params;
    const sk_rows all = forward_all(p);
    const units unit = units_of(p->temperature);
    for (int64_t i = begin; i < end; i++) {
        const sk_rows r = sk_task(&all, i);
        forward_task(p, &r, &unit);
    }
}

static void forward_finish(const void *params) {
    const forward_params *p = params;
    sk_reduce_rows(&p->rows, &p->weight, &p->divisor, p->reduction, SK_DIM(p, N), SK_DIM(p, S),
                   &p->loss, &p->denominator);
}

static sk_rows backward_all(const backward_params *p) {
    return sk_rows_of(&p->u, &p->v, SK_DIM(p, N), SK_DIM(p, C), SK_DIM(p, S), 8);
}

static sk_work backward_work(const void *params) {
    const sk_rows all = backward_all(params);
    return sk_work_of(&all);
}

static void sd_dropout_kl_backward_rows(const void *params, int64_t begin, int64_t end) {
    const backward_params *p = params;
    const sk_rows all = backward_all(p);
    const units unit = units_of(p->temperature);
    const real forward = (real)p->forward_weight, reverse = (real)p->reverse_weight;
    const term_weights w = {forward, reverse, p->detach_target ? 0 : forward,
                            p->detach_target ? 0 : reverse};
    for (int64_t i = begin; i < end; i++) {
        const sk_rows r = sk_task(&all, i);
        backward_task(p, &r, &unit, w);
    }
}

const sk_cpu_kernel SK_CPU(sd_dropout_kl) = {forward_work, sd_dropout_kl_rows, forward_finish};
const sk_cpu_kernel SK_CPU(sd_dropout_kl_backward) = {backward_work, sd_dropout_kl_backward_rows,
                                                      NULL};
