/* SD-Dropout on the CPU: see ops/sd_dropout_kl.h for the formula.
 *
 * Two loops, by layout. "classes": a row at a time, vectors along C, for contiguous classes and, through a buffer, for
 * any other strides. "positions": TILE_S positions at a time, vectors along S, for images; forward first copies a tile
 * of classes to the stack, because a class stride such as 256 KB maps every class to the same cache sets.
 *
 * Both visit the logits twice forward (sums of exponentials; the two KL and a correction of dl), once backward. */
#include "cpu/core/chunk.h"
#include "cpu/core/kernel.h"
#include "cpu/core/math.h"
#include "cpu/core/reduce.h"
#include "sd_dropout_kl.h"

SK_PARAMS(sd_dropout_kl)
SK_PARAMS(sd_dropout_kl_backward)
typedef struct sd_dropout_kl_params forward_params;
typedef struct sd_dropout_kl_backward_params backward_params;

enum { TILE_C = 32, TILE_S = 512 / sizeof(real) };
typedef real tile[TILE_C][TILE_S];

/* ---- One element ---- */

typedef struct kl_terms {
    real forward, reverse, excess;
} kl_terms;

/* What a class adds to KL(p||q), KL(q||p) and sum(p - q), as p (e^-d - 1 + d), q (e^d - 1 - d) and q (e^d - 1): by series
 * where d is small, so that nothing cancels, and with e^d = p / q elsewhere, so that nothing overflows. */
static inline kl_terms kl_of(real p, real q, real d)
{
    const sk_parts rest = sk_exp_rest(d);
    const bool near = d * d < (real)0.25;
    const real p_q = p - q;
    const real forward = near ? p * (rest.even - rest.odd) : p * d - p_q;
    const real reverse = near ? q * (rest.even + rest.odd) : p_q - q * d;
    return (kl_terms){forward, reverse, reverse + q * d};
}

/* What the gradient of a row needs: T lse(u/T), T lse(v/T), T dl, both KL, and the factor before its bracket. */
typedef struct row_scalars {
    sk_split u, v, dl;
    real kl_forward, kl_reverse, factor;
} row_scalars;

/* What the gradients of a call share: 1/T; wf and wr, and the same for the terms that detach_target drops. */
typedef struct call_scalars {
    real inverse_T, log2e_T, forward, reverse, target_forward, target_reverse;
} call_scalars;

static inline void gradient_of(real u, real v, row_scalars row, call_scalars call, real *grad_u, real *grad_v)
{
    const real p = row.factor * sk_exp2(((u - row.u.high) - row.u.low) * call.log2e_T);
    const real q = row.factor * sk_exp2(((v - row.v.high) - row.v.low) * call.log2e_T);
    const real d = sk_difference(u, v, row.dl) * call.inverse_T;
    const real p_q = d * d < (real)0.25 ? q * d * sk_expm1_ratio(d) : p - q;
    *grad_u = call.target_forward * (p * (d - row.kl_forward)) + call.reverse * p_q;
    *grad_v = -call.target_reverse * (q * (d + row.kl_reverse)) - call.forward * p_q;
}

/* ---- Rows with infinities or NaN: scalar loops in double, for both layouts ---- */

/* A row of logits: element c of u is at at_u + c * u->stride[1]. */
typedef struct row {
    const sk_arg *u, *v;
    int64_t at_u, at_v;
} row;

typedef struct row_saved {
    double lse_u, dl, kl_forward, kl_reverse; /* in units of the logits: T lse(u/T), T dl */
} row_saved;

/* Both KL, with 0 log 0 = 0; NaN where a row holds a NaN or nothing but -inf. */
static void careful_kl(row r, int64_t C, double T, row_saved *k)
{
    const double lse_v = k->lse_u - k->dl;
    k->kl_forward = k->kl_reverse = 0 * (k->lse_u + lse_v);
    for (int64_t c = 0; c < C; c++) {
        const double u = sk_load_one(r.u, r.at_u + c * r.u->stride[1]);
        const double v = sk_load_one(r.v, r.at_v + c * r.v->stride[1]);
        const double p = exp((u - k->lse_u) / T), q = exp((v - lse_v) / T), d = ((u - v) - k->dl) / T;
        const bool no_p = isinf(u), no_q = isinf(v);
        if (no_p && no_q) continue;
        k->kl_forward += no_p ? q : no_q ? INFINITY : p * d - (p - q);
        k->kl_reverse += no_q ? p : no_p ? INFINITY : (p - q) - q * d;
    }
}

/* The gradient of such a row: terms of weight 0 are left out, 0 log 0 = 0. */
static void careful_gradient(row r, int64_t C, double T, row_saved k, double factor, call_scalars call,
                             const sk_arg *grad_u, const sk_arg *grad_v)
{
    for (int64_t c = 0; c < C; c++) {
        const int64_t at_u = r.at_u + c * r.u->stride[1], at_v = r.at_v + c * r.v->stride[1];
        const double u = sk_load_one(r.u, at_u), v = sk_load_one(r.v, at_v);
        const double p = exp((u - k.lse_u) / T), q = exp((v - (k.lse_u - k.dl)) / T), d = ((u - v) - k.dl) / T;
        const double forward = isinf(u) && !isnan(k.kl_forward) ? 0 : p * (d - k.kl_forward);
        const double reverse = isinf(v) && !isnan(k.kl_reverse) ? 0 : q * (d + k.kl_reverse);
        double in_u = 0, in_v = 0;
        if (call.target_forward != 0) in_u += call.target_forward * forward;
        if (call.reverse != 0) in_u += call.reverse * (p - q);
        if (call.target_reverse != 0) in_v -= call.target_reverse * reverse;
        if (call.forward != 0) in_v -= call.forward * (p - q);
        const real g_u = (real)(factor * in_u), g_v = (real)(factor * in_v);
        sk_store(grad_u, at_u, 1, 1, &g_u);
        sk_store(grad_v, at_v, 1, 1, &g_v);
    }
}

/* Writes what forward leaves of a row; k is 0 for a row of weight 0. */
static inline void save(const forward_params *p, int64_t n, int64_t s, double weight, row_saved k)
{
    const double T = p->temperature;
    const double forward = p->forward_weight != 0 ? p->forward_weight * k.kl_forward : 0;
    const double reverse = p->reverse_weight != 0 ? p->reverse_weight * k.kl_reverse : 0;
    const int64_t *stride = p->saved.stride;
    double *saved = (double *)p->saved.data + n * stride[1] + s * stride[2];
    ((real *)p->rows.data)[n * p->rows.stride[0] + s * p->rows.stride[1]] = (real)(weight * T * T * (forward + reverse));
    saved[0] = k.lse_u / T;
    saved[stride[0]] = k.dl / T;
    saved[2 * stride[0]] = k.kl_forward;
    saved[3 * stride[0]] = k.kl_reverse;
}

/* ---- Classes ---- */

/* A row as exponentials: e^((x - reference)/T) * inverse is its softmax; lse is T lse(x/T). */
typedef struct softmax {
    real reference, inverse;
    double lse;
} softmax;

static real highest(const real *x, int64_t n)
{
    real top = -SK_REAL_MAX; /* not -inf: a chunk that is all -inf must give e^-inf, not e^NaN */
#pragma omp simd reduction(max : top)
    for (int64_t c = 0; c < n; c++) top = x[c] > top ? x[c] : top;
    return top;
}

/* Leaves e[c] = e^((x[c] - reference)/T) and the largest x; returns the sum of e. */
static real exponentials(const real *x, int64_t n, real reference, real log2e_T, real *e, real *largest)
{
    real sum = 0, top = -SK_REAL_MAX;
#pragma omp simd reduction(+ : sum) reduction(max : top)
    for (int64_t c = 0; c < n; c++) {
        e[c] = sk_exp2((x[c] - reference) * log2e_T);
        sum += e[c];
        top = x[c] > top ? x[c] : top;
    }
    *largest = top;
    return sum;
}

/* First visit to a row. The reference need not be the maximum, only within 2^90 of it: that of the first few classes
 * serves, and a chunk that exceeds it is done again. Leaves the exponentials of the last chunk in e. */
static softmax softmax_of_row(const sk_arg *x, int64_t at, int64_t C, double T, real *buffer, real *e)
{
    const real log2e_T = (real)(SK_LOG2E / T);
    real reference = -SK_REAL_MAX;
    double sum = 0;
    for (int64_t c0 = 0; c0 < C; c0 += SK_CHUNK) {
        const int64_t n = sk_min(SK_CHUNK, C - c0);
        const real *a = sk_load(x, at + c0 * x->stride[1], x->stride[1], n, buffer);
        if (c0 == 0) reference = highest(a, sk_min(n, 64));
        real largest, part = exponentials(a, n, reference, log2e_T, e, &largest);
        if ((largest - reference) * log2e_T > 90) {
            sum *= exp(((double)reference - largest) / T);
            reference = largest;
            part = exponentials(a, n, reference, log2e_T, e, &largest);
        }
        sum += part;
    }
    return (softmax){reference, (real)(1 / sum), reference + T * sk_log(sum)};
}

/* Adds the KL terms of a chunk to both KL, and sum(p - q) to dl (in units of the logits). */
static void add_kl(const real *u, const real *v, const real *e_u, const real *e_v, int64_t n, softmax s_u, softmax s_v,
                   sk_split dl, real inverse_T, double sums[3])
{
    real forward = 0, reverse = 0, excess = 0;
#pragma omp simd reduction(+ : forward, reverse, excess)
    for (int64_t c = 0; c < n; c++) {
        const real d = sk_difference(u[c], v[c], dl) * inverse_T;
        const kl_terms k = kl_of(e_u[c] * s_u.inverse, e_v[c] * s_v.inverse, d);
        forward += k.forward;
        reverse += k.reverse;
        excess += k.excess;
    }
    sums[0] += forward;
    sums[1] += reverse;
    sums[2] += excess;
}

/* Second visit: both KL, and dl corrected. Rows of one chunk find their exponentials where the first visit left them. */
static row_saved kl_of_row(row r, int64_t C, double T)
{
    real chunk_u[SK_CHUNK], chunk_v[SK_CHUNK], e_u[SK_CHUNK], e_v[SK_CHUNK];
    const softmax s_u = softmax_of_row(r.u, r.at_u, C, T, chunk_u, e_u);
    const softmax s_v = softmax_of_row(r.v, r.at_v, C, T, chunk_v, e_v);
    const sk_split dl = sk_split_of(s_u.lse - s_v.lse);
    const real inverse_T = (real)(1 / T), log2e_T = (real)(SK_LOG2E / T);
    double sums[3] = {0, 0, 0};
    for (int64_t c0 = 0; c0 < C; c0 += SK_CHUNK) {
        const int64_t n = sk_min(SK_CHUNK, C - c0);
        const real *u = sk_load(r.u, r.at_u + c0 * r.u->stride[1], r.u->stride[1], n, chunk_u);
        const real *v = sk_load(r.v, r.at_v + c0 * r.v->stride[1], r.v->stride[1], n, chunk_v);
        real largest;
        if (C > SK_CHUNK) {
            exponentials(u, n, s_u.reference, log2e_T, e_u, &largest);
            exponentials(v, n, s_v.reference, log2e_T, e_v, &largest);
        }
        add_kl(u, v, e_u, e_v, n, s_u, s_v, dl, inverse_T, sums);
    }
    row_saved k = {s_u.lse, (s_u.lse - s_v.lse) + T * sums[2], sums[0], sums[1]};
    if (!isfinite(sums[0] + sums[1])) k.dl = s_u.lse - s_v.lse, careful_kl(r, C, T, &k);
    return k;
}

static void forward_rows(const forward_params *p, int64_t begin, int64_t end)
{
    const int64_t S = SK_DIM(p, S), C = SK_DIM(p, C);
    for (int64_t i = begin; i < end; i++) {
        const int64_t n = i / S, s = i % S;
        const row r = {&p->u, &p->v, n * p->u.stride[0] + s * p->u.stride[2], n * p->v.stride[0] + s * p->v.stride[2]};
        const real w = sk_load_one(&p->weight, n * p->weight.stride[0] + s * p->weight.stride[1]);
        save(p, n, s, w, w != 0 ? kl_of_row(r, C, p->temperature) : (row_saved){0, 0, 0, 0});
    }
}

/* ---- Positions ---- */

/* The softmax of TILE_S rows, as softmax above, the reference being the maximum so far. */
typedef struct softmaxes {
    real reference[TILE_S], inverse[TILE_S];
    double sum[TILE_S], lse[TILE_S];
} softmaxes;

static void load_tile(const sk_arg *x, int64_t at, int64_t classes, int64_t width, tile to)
{
    for (int64_t c = 0; c < classes; c++) sk_copy(x, at + c * x->stride[1], 1, width, to[c]);
}

/* Leaves the exponentials of a tile in e and adds them to sum, class after class. */
static void exponentials_of_tile(tile x, int64_t classes, int64_t width, const real *reference, real log2e_T, tile e,
                                 real *sum)
{
    for (int64_t c = 0; c < classes; c++) {
#pragma omp simd
        for (int64_t s = 0; s < width; s++) {
            e[c][s] = sk_exp2((x[c][s] - reference[s]) * log2e_T);
            sum[s] += e[c][s];
        }
    }
}

/* First visit. Leaves the last tile of classes in x and its exponentials in e. */
static void softmax_of_tiles(const sk_arg *arg, int64_t at, int64_t C, int64_t width, double T, tile x, tile e,
                             softmaxes *m)
{
    const real log2e_T = (real)(SK_LOG2E / T);
    for (int s = 0; s < TILE_S; s++) {
        m->reference[s] = -SK_REAL_MAX;
        m->sum[s] = 0;
    }
    for (int64_t c0 = 0; c0 < C; c0 += TILE_C) {
        const int64_t classes = sk_min(TILE_C, C - c0);
        real top[TILE_S], part[TILE_S] = {0};
        load_tile(arg, at + c0 * arg->stride[1], classes, width, x);
        memcpy(top, m->reference, sizeof top);
        for (int64_t c = 0; c < classes; c++) {
#pragma omp simd
            for (int64_t s = 0; s < width; s++) top[s] = x[c][s] > top[s] ? x[c][s] : top[s];
        }
        exponentials_of_tile(x, classes, width, top, log2e_T, e, part);
#pragma omp simd
        for (int64_t s = 0; s < width; s++) {
            m->sum[s] = m->sum[s] * sk_exp2((m->reference[s] - top[s]) * log2e_T) + part[s];
            m->reference[s] = top[s];
        }
    }
#pragma omp simd
    for (int64_t s = 0; s < width; s++) {
        m->inverse[s] = (real)(1 / m->sum[s]);
        m->lse[s] = m->reference[s] + T * sk_log(m->sum[s]);
    }
}

/* The KL of TILE_S rows, as row_saved. */
typedef struct rows_saved {
    double lse_u[TILE_S], dl[TILE_S], kl_forward[TILE_S], kl_reverse[TILE_S];
} rows_saved;

/* Leaves, per position, the sums over a tile's classes of the KL terms. */
static void kl_of_tile(tile u, tile v, tile e_u, tile e_v, int64_t classes, int64_t width, const softmaxes *m_u,
                       const softmaxes *m_v, const real *dl_high, const real *dl_low, real inverse_T, real sums[3][TILE_S])
{
    memset(sums, 0, 3 * sizeof *sums);
    for (int64_t c = 0; c < classes; c++) {
#pragma omp simd
        for (int64_t s = 0; s < width; s++) {
            const real d = sk_difference(u[c][s], v[c][s], (sk_split){dl_high[s], dl_low[s]}) * inverse_T;
            const kl_terms k = kl_of(e_u[c][s] * m_u->inverse[s], e_v[c][s] * m_v->inverse[s], d);
            sums[0][s] += k.forward;
            sums[1][s] += k.reverse;
            sums[2][s] += k.excess;
        }
    }
}

/* Second visit, as kl_of_row. */
static void kl_of_tiles(row r, int64_t C, int64_t width, double T, rows_saved *k)
{
    tile u, v, e_u, e_v;
    softmaxes m_u, m_v;
    softmax_of_tiles(r.u, r.at_u, C, width, T, u, e_u, &m_u);
    softmax_of_tiles(r.v, r.at_v, C, width, T, v, e_v, &m_v);
    real dl_high[TILE_S], dl_low[TILE_S], sums[3][TILE_S];
    memset(k, 0, sizeof *k);
#pragma omp simd
    for (int64_t s = 0; s < width; s++) {
        k->lse_u[s] = m_u.lse[s];
        k->dl[s] = m_u.lse[s] - m_v.lse[s];
        const sk_split dl = sk_split_of(k->dl[s]);
        dl_high[s] = dl.high;
        dl_low[s] = dl.low;
    }
    const real inverse_T = (real)(1 / T), log2e_T = (real)(SK_LOG2E / T);
    for (int64_t c0 = 0; c0 < C; c0 += TILE_C) {
        const int64_t classes = sk_min(TILE_C, C - c0);
        if (C > TILE_C) {
            load_tile(r.u, r.at_u + c0 * r.u->stride[1], classes, width, u);
            load_tile(r.v, r.at_v + c0 * r.v->stride[1], classes, width, v);
            exponentials_of_tile(u, classes, width, m_u.reference, log2e_T, e_u, sums[0]);
            exponentials_of_tile(v, classes, width, m_v.reference, log2e_T, e_v, sums[0]);
        }
        kl_of_tile(u, v, e_u, e_v, classes, width, &m_u, &m_v, dl_high, dl_low, inverse_T, sums);
#pragma omp simd
        for (int64_t s = 0; s < width; s++) {
            k->kl_forward[s] += sums[0][s];
            k->kl_reverse[s] += sums[1][s];
            k->dl[s] += T * sums[2][s];
        }
    }
}

static void forward_positions(const forward_params *p, int64_t begin, int64_t end)
{
    const int64_t S = SK_DIM(p, S), C = SK_DIM(p, C), tiles = (S + TILE_S - 1) / TILE_S;
    for (int64_t i = begin; i < end; i++) {
        const int64_t n = i / tiles, s0 = i % tiles * TILE_S, width = sk_min(TILE_S, S - s0);
        const row r = {&p->u, &p->v, n * p->u.stride[0] + s0, n * p->v.stride[0] + s0};
        rows_saved k;
        real weight[TILE_S];
        sk_copy(&p->weight, n * p->weight.stride[0] + s0 * p->weight.stride[1], p->weight.stride[1], width, weight);
        kl_of_tiles(r, C, width, p->temperature, &k);
        for (int64_t s = 0; s < width; s++) {
            row_saved one = {k.lse_u[s], k.dl[s], k.kl_forward[s], k.kl_reverse[s]};
            const row at = {r.u, r.v, r.at_u + s, r.at_v + s};
            if (weight[s] == 0) one = (row_saved){0, 0, 0, 0};
            if (!isfinite(one.kl_forward + one.kl_reverse)) careful_kl(at, C, p->temperature, &one);
            save(p, n, s0 + s, weight[s], one);
        }
    }
}

/* ---- Backward ---- */

static call_scalars scalars_of_call(const backward_params *p)
{
    const real forward = (real)p->forward_weight, reverse = (real)p->reverse_weight;
    return (call_scalars){(real)(1 / p->temperature), (real)(SK_LOG2E / p->temperature), forward, reverse, p->detach_target ? 0 : forward,
                          p->detach_target ? 0 : reverse};
}

/* T / denominator times a row's incoming gradient and weight; 0 says that its gradient is exactly 0. */
static inline double factor_of(const backward_params *p, double grad, double weight)
{
    return weight == 0 ? 0 : grad * weight * (p->temperature / *(const real *)p->denominator.data);
}

static inline row_saved load_saved(const backward_params *p, int64_t n, int64_t s)
{
    const int64_t *stride = p->saved.stride;
    const double *saved = (const double *)p->saved.data + n * stride[1] + s * stride[2];
    const double T = p->temperature;
    return (row_saved){T * saved[0], T * saved[stride[0]], saved[2 * stride[0]], saved[3 * stride[0]]};
}

static inline row_scalars scalars_of_row(row_saved k, double factor)
{
    return (row_scalars){sk_split_of(k.lse_u), sk_split_of(k.lse_u - k.dl), sk_split_of(k.dl),
                         (real)k.kl_forward,   (real)k.kl_reverse,          (real)factor};
}

static void gradient_of_row(const backward_params *p, row r, row_scalars scalars, call_scalars call)
{
    const int64_t C = SK_DIM(p, C), stride_u = p->u.stride[1], stride_v = p->v.stride[1];
    real chunk_u[SK_CHUNK], chunk_v[SK_CHUNK], chunk_grad_u[SK_CHUNK], chunk_grad_v[SK_CHUNK];
    for (int64_t c0 = 0; c0 < C; c0 += SK_CHUNK) {
        const int64_t n = sk_min(SK_CHUNK, C - c0), at_u = r.at_u + c0 * stride_u, at_v = r.at_v + c0 * stride_v;
        const real *u = sk_load(&p->u, at_u, stride_u, n, chunk_u);
        const real *v = sk_load(&p->v, at_v, stride_v, n, chunk_v);
        real *grad_u = sk_room(&p->grad_u, at_u, stride_u, chunk_grad_u);
        real *grad_v = sk_room(&p->grad_v, at_v, stride_v, chunk_grad_v);
#pragma omp simd
        for (int64_t c = 0; c < n; c++) gradient_of(u[c], v[c], scalars, call, &grad_u[c], &grad_v[c]);
        sk_store(&p->grad_u, at_u, stride_u, n, grad_u);
        sk_store(&p->grad_v, at_v, stride_v, n, grad_v);
    }
}

static void clear_row(const backward_params *p, row r)
{
    const real zero[SK_CHUNK] = {0};
    const int64_t C = SK_DIM(p, C), stride_u = p->u.stride[1], stride_v = p->v.stride[1];
    for (int64_t c0 = 0; c0 < C; c0 += SK_CHUNK) {
        const int64_t n = sk_min(SK_CHUNK, C - c0);
        sk_store(&p->grad_u, r.at_u + c0 * stride_u, stride_u, n, zero);
        sk_store(&p->grad_v, r.at_v + c0 * stride_v, stride_v, n, zero);
    }
}

static void backward_rows(const backward_params *p, int64_t begin, int64_t end)
{
    const int64_t S = SK_DIM(p, S), C = SK_DIM(p, C);
    const call_scalars call = scalars_of_call(p);
    for (int64_t i = begin; i < end; i++) {
        const int64_t n = i / S, s = i % S;
        const row r = {&p->u, &p->v, n * p->u.stride[0] + s * p->u.stride[2], n * p->v.stride[0] + s * p->v.stride[2]};
        const double grad = sk_load_one(&p->grad, n * p->grad.stride[0] + s * p->grad.stride[1]);
        const double weight = sk_load_one(&p->weight, n * p->weight.stride[0] + s * p->weight.stride[1]);
        const row_saved k = load_saved(p, n, s);
        const double factor = factor_of(p, grad, weight);
        if (factor == 0) clear_row(p, r);
        else if (!isfinite(k.kl_forward + k.kl_reverse))
            careful_gradient(r, C, p->temperature, k, factor, call, &p->grad_u, &p->grad_v);
        else gradient_of_row(p, r, scalars_of_row(k, factor), call);
    }
}

/* The scalars of TILE_S rows, as row_scalars. */
typedef struct rows_scalars {
    real u_high[TILE_S], u_low[TILE_S], v_high[TILE_S], v_low[TILE_S], dl_high[TILE_S], dl_low[TILE_S];
    real kl_forward[TILE_S], kl_reverse[TILE_S], factor[TILE_S];
} rows_scalars;

static void scalars_of_rows(const backward_params *p, int64_t n, int64_t s0, int64_t width, rows_scalars *m)
{
    real grad[TILE_S], weight[TILE_S];
    sk_copy(&p->grad, n * p->grad.stride[0] + s0 * p->grad.stride[1], p->grad.stride[1], width, grad);
    sk_copy(&p->weight, n * p->weight.stride[0] + s0 * p->weight.stride[1], p->weight.stride[1], width, weight);
#pragma omp simd
    for (int64_t s = 0; s < width; s++) {
        const row_scalars one = scalars_of_row(load_saved(p, n, s0 + s), factor_of(p, grad[s], weight[s]));
        m->u_high[s] = one.u.high;
        m->u_low[s] = one.u.low;
        m->v_high[s] = one.v.high;
        m->v_low[s] = one.v.low;
        m->dl_high[s] = one.dl.high;
        m->dl_low[s] = one.dl.low;
        m->kl_forward[s] = one.kl_forward;
        m->kl_reverse[s] = one.kl_reverse;
        m->factor[s] = one.factor;
    }
}

static void gradient_of_tile(const backward_params *p, row r, int64_t width, const rows_scalars *m, call_scalars call)
{
    const int64_t C = SK_DIM(p, C), stride_u = p->u.stride[1], stride_v = p->v.stride[1];
    real line_u[TILE_S], line_v[TILE_S], line_grad_u[TILE_S], line_grad_v[TILE_S];
    for (int64_t c = 0; c < C; c++) {
        const int64_t at_u = r.at_u + c * stride_u, at_v = r.at_v + c * stride_v;
        const real *u = sk_load(&p->u, at_u, 1, width, line_u);
        const real *v = sk_load(&p->v, at_v, 1, width, line_v);
        real *grad_u = sk_room(&p->grad_u, at_u, 1, line_grad_u);
        real *grad_v = sk_room(&p->grad_v, at_v, 1, line_grad_v);
#pragma omp simd
        for (int64_t s = 0; s < width; s++) {
            const row_scalars one = {{m->u_high[s], m->u_low[s]},   {m->v_high[s], m->v_low[s]},
                                     {m->dl_high[s], m->dl_low[s]}, m->kl_forward[s],
                                     m->kl_reverse[s],              m->factor[s]};
            real in_u, in_v;
            gradient_of(u[s], v[s], one, call, &in_u, &in_v);
            grad_u[s] = one.factor == 0 ? 0 : in_u;
            grad_v[s] = one.factor == 0 ? 0 : in_v;
        }
        sk_store(&p->grad_u, at_u, 1, width, grad_u);
        sk_store(&p->grad_v, at_v, 1, width, grad_v);
    }
}

static void backward_positions(const backward_params *p, int64_t begin, int64_t end)
{
    const int64_t S = SK_DIM(p, S), C = SK_DIM(p, C), tiles = (S + TILE_S - 1) / TILE_S;
    const call_scalars call = scalars_of_call(p);
    for (int64_t i = begin; i < end; i++) {
        const int64_t n = i / tiles, s0 = i % tiles * TILE_S, width = sk_min(TILE_S, S - s0);
        const row r = {&p->u, &p->v, n * p->u.stride[0] + s0, n * p->v.stride[0] + s0};
        rows_scalars m;
        scalars_of_rows(p, n, s0, width, &m);
        gradient_of_tile(p, r, width, &m, call);
        for (int64_t s = 0; s < width; s++) {
            if (m.factor[s] == 0 || isfinite(m.kl_forward[s] + m.kl_reverse[s])) continue;
            const row at = {r.u, r.v, r.at_u + s, r.at_v + s};
            careful_gradient(at, C, p->temperature, load_saved(p, n, s0 + s), m.factor[s], call, &p->grad_u, &p->grad_v);
        }
    }
}

/* ---- The kernels ---- */

static bool along_positions(const sk_arg *x) { return x->stride[2] == 1 && x->stride[1] != 1; }

static sk_work work_of(int64_t N, int64_t C, int64_t S, bool positions)
{
    if (!positions) return (sk_work){N * S, 2 * C, "classes"};
    return (sk_work){N * ((S + TILE_S - 1) / TILE_S), 2 * C * sk_min(TILE_S, S), "positions"};
}

static bool forward_by_positions(const forward_params *p)
{
    return SK_DIM(p, S) > 1 && along_positions(&p->u) && along_positions(&p->v);
}

static sk_work forward_work(const void *params)
{
    const forward_params *p = params;
    return work_of(SK_DIM(p, N), SK_DIM(p, C), SK_DIM(p, S), forward_by_positions(p));
}

static void forward(const void *params, int64_t begin, int64_t end)
{
    (forward_by_positions(params) ? forward_positions : forward_rows)(params, begin, end);
}

static void forward_finish(const void *params)
{
    const forward_params *p = params;
    sk_reduce_rows(&p->rows, &p->weight, &p->divisor, p->reduction, SK_DIM(p, N), SK_DIM(p, S), &p->loss,
                   &p->denominator);
}

static bool backward_by_positions(const backward_params *p)
{
    return SK_DIM(p, S) > 1 && along_positions(&p->u) && along_positions(&p->v) && along_positions(&p->grad_u) &&
           along_positions(&p->grad_v);
}

static sk_work backward_work(const void *params)
{
    const backward_params *p = params;
    return work_of(SK_DIM(p, N), SK_DIM(p, C), SK_DIM(p, S), backward_by_positions(p));
}

static void backward(const void *params, int64_t begin, int64_t end)
{
    (backward_by_positions(params) ? backward_positions : backward_rows)(params, begin, end);
}

const sk_cpu_kernel SK_CPU(sd_dropout_kl) = {forward_work, forward, forward_finish};
const sk_cpu_kernel SK_CPU(sd_dropout_kl_backward) = {backward_work, backward, NULL};
