/* Dropout views on the CPU: see ops/dropout_views.h for the masks.
 *
 * A task is a run of elements of the batch, whatever rows they are in: four at a time have their
 * words from one counter, and counters know of no rows.
 *
 * Test: python -m pytest tests/test_dropout_views.py    Time: selfkd bench dropout_views */
#include "dropout_views.h"
#include "cpu/core/load.h"
#include "cpu/core/philox.h"

SK_PARAMS(dropout_views)
SK_PARAMS(dropout_views_backward)
typedef struct dropout_views_params forward_params;
typedef struct dropout_views_backward_params backward_params;

enum {
    SAMPLES = 2,
    WORDS = SK_RUN + 4 * SK_COUNTERS /* of a run that begins within a block, in whole vectors */
};

/* Elements begin .. end - 1 of the rows of this call, and their words. */
typedef struct masks {
    int64_t begin, end;
    uint32_t threshold;
    real scale;
    const uint32_t *first[SAMPLES]; /* the word of element `begin` */
    SK_ALIGNED uint32_t word[SAMPLES][WORDS];
} masks;

/* Leaves in m the run of a task. */
static void begin_run(const sk_arg *seed, double p, int64_t first_row, int64_t N, int64_t C,
                      int64_t task, masks *m) {
    const uint64_t key = *(const uint64_t *)seed->data;
    const sk_dropout drop = sk_dropout_of(p);
    m->begin = task * SK_RUN;
    m->end = sk_min(m->begin + SK_RUN, N * C);
    m->threshold = drop.threshold;
    m->scale = (real)drop.scale;
    const uint64_t e = (uint64_t)first_row * (uint64_t)C + (uint64_t)m->begin;
    for (uint32_t k = 0; k < SAMPLES; k++) {
        sk_draw(key, k, e / 4, ((int64_t)(e % 4) + m->end - m->begin + 3) / 4, m->word[k]);
        m->first[k] = m->word[k] + e % 4;
    }
}

/* n elements of a run from [row, c] on, all in that row; the first is element `at` of the run. */
typedef struct piece {
    int64_t row, c, at, n;
} piece;

static bool next_piece(const masks *m, int64_t C, piece *x) {
    x->at += x->n;
    const int64_t i = m->begin + x->at;
    x->row = i / C;
    x->c = i % C;
    x->n = sk_min(C - x->c, m->end - i);
    return x->n > 0;
}

/* Where a piece is in a tensor whose dimension `rows` is that of the rows. */
static int64_t piece_at(const piece *x, const sk_arg *t, int rows) {
    return x->row * t->stride[rows] + x->c * t->stride[rows + 1];
}

static sk_work work_of(int64_t N, int64_t C) {
    return (sk_work){(N * C + SK_RUN - 1) / SK_RUN, 4 * SK_RUN, "runs"};
}

/* ---- Forward ---- */

static void drop(const masks *m, int sample, const piece *part, const real *restrict x,
                 real *restrict to) {
    const uint32_t *const word = m->first[sample] + part->at, threshold = m->threshold;
    const real scale = m->scale;
    const int64_t n = part->n;
#pragma omp simd
    for (int64_t i = 0; i < n; i++) {
        const real kept = x[i] * scale;
        to[i] = word[i] >= threshold ? kept : 0;
    }
}

static void forward_rows(const void *params, int64_t begin, int64_t end) {
    const forward_params *const p = params;
    const sk_arg *const x = &p->features, *const y = &p->views;
    const int64_t N = SK_DIM(p, N), C = SK_DIM(p, C);
    masks m;
    SK_ALIGNED real buffer[SK_RUN], dropped[SK_RUN];
    for (int64_t task = begin; task < end; task++) {
        begin_run(&p->seed, p->p, p->first_row, N, C, task, &m);
        for (piece part = {0}; next_piece(&m, C, &part);) {
            const int64_t to = piece_at(&part, y, 1);
            const real *const clean =
                sk_read(x, piece_at(&part, x, 0), x->stride[1], part.n, buffer);
            sk_put(y, to, y->stride[2], part.n, clean);
            for (int k = 0; k < SAMPLES; k++) {
                drop(&m, k, &part, clean, dropped);
                sk_put(y, to + (k + 1) * y->stride[0], y->stride[2], part.n, dropped);
            }
        }
    }
}

static sk_work forward_work(const void *params) {
    const forward_params *const p = params;
    return work_of(SK_DIM(p, N), SK_DIM(p, C));
}

const sk_cpu_kernel SK_CPU(dropout_views) = {.work = forward_work, .tasks = forward_rows};

/* ---- Backward ---- */

static void add(const masks *m, const piece *part, const real *const g[1 + SAMPLES],
                real *restrict sum) {
    const uint32_t *const word_u = m->first[0] + part->at, *const word_v = m->first[1] + part->at;
    const real *const clean = g[0], *const u = g[1], *const v = g[2], scale = m->scale;
    const uint32_t threshold = m->threshold;
    const int64_t n = part->n;
#pragma omp simd
    for (int64_t i = 0; i < n; i++) {
        const real kept_u = u[i] * scale, kept_v = v[i] * scale;
        const real sample_u = word_u[i] >= threshold ? kept_u : 0;
        const real sample_v = word_v[i] >= threshold ? kept_v : 0;
        sum[i] = clean[i] + sample_u + sample_v;
    }
}

static void backward_rows(const void *params, int64_t begin, int64_t end) {
    const backward_params *const p = params;
    const sk_arg *const g = &p->grad, *const dx = &p->grad_features;
    const int64_t N = SK_DIM(p, N), C = SK_DIM(p, C);
    masks m;
    SK_ALIGNED real buffer[1 + SAMPLES][SK_RUN], sum[SK_RUN];
    const real *views[1 + SAMPLES];
    for (int64_t task = begin; task < end; task++) {
        begin_run(&p->seed, p->p, p->first_row, N, C, task, &m);
        for (piece part = {0}; next_piece(&m, C, &part);) {
            const int64_t at = piece_at(&part, g, 1);
            for (int k = 0; k < 1 + SAMPLES; k++)
                views[k] = sk_read(g, at + k * g->stride[0], g->stride[2], part.n, buffer[k]);
            add(&m, &part, views, sum);
            sk_put(dx, piece_at(&part, dx, 0), dx->stride[1], part.n, sum);
        }
    }
}

static sk_work backward_work(const void *params) {
    const backward_params *const p = params;
    return work_of(SK_DIM(p, N), SK_DIM(p, C));
}

const sk_cpu_kernel SK_CPU(dropout_views_backward) = {.work = backward_work,
                                                      .tasks = backward_rows};
