/* BiFPN fusion on the CPU: see ops/bifpn_fuse.h for the formula. */
#include "bifpn_fuse.h"
#include "core/resize.h"
#include "cpu/core/chunk.h"
#include "cpu/core/kernel.h"

SK_PARAMS(bifpn_fuse)
SK_PARAMS(bifpn_fuse_backward)
typedef struct bifpn_fuse_params forward_params;
typedef struct bifpn_fuse_backward_params backward_params;

enum { MAPS = 3, TASKS = SK_CPU_SCRATCH / MAPS };

/* What both directions share. */
typedef struct fusion {
    sk_arg x[MAPS];
    sk_axis rows[MAPS], columns[MAPS];
    double factor[MAPS], total; /* total: what the weights were divided by */
    int64_t N, C, H, W, activation;
    int count;
    bool late; /* the output is activated */
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

static void set_factors(fusion *f, const sk_arg *weight, double eps) {
    f->total = eps;
    for (int i = 0; i < f->count; i++) {
        f->factor[i] = sk_load_one(weight, i * weight->stride[0]);
        f->factor[i] = f->factor[i] <= 0 ? 0 : f->factor[i]; /* NaN stays */
        f->total += f->factor[i];
    }
    for (int i = 0; i < f->count && weight->data; i++) f->factor[i] /= f->total;
}

static real act(int64_t activation, real x) {
    if (activation == SK_RELU) return x <= 0 ? 0 : x;
    return activation == SK_SILU ? x / (1 + (real)exp(-x)) : x;
}

/* act' times g */
static real slope(int64_t activation, real x, real g) {
    if (activation == SK_RELU) return x <= 0 ? 0 : g;
    const real s = 1 / (1 + (real)exp(-x));
    return activation == SK_SILU ? g * (s * (1 + x * (1 - s))) : g;
}

typedef struct place {
    int64_t n, c;
} place;

static real load(const fusion *f, int i, place p, int64_t y, int64_t x) {
    const sk_arg *t = &f->x[i];
    const real v = sk_load_one(
        t, p.n * t->stride[0] + p.c * t->stride[1] + y * t->stride[2] + x * t->stride[3]);
    return f->late ? v : act(f->activation, v);
}

/* The winner of a window: its value and position. */
typedef struct winner {
    real value;
    int64_t y, x;
} winner;

static winner pool(const fusion *f, int i, place p, int64_t y, int64_t x) {
    const int64_t top = sk_window(f->rows[i], y), left = sk_window(f->columns[i], x);
    winner w = {-INFINITY, -1, -1};
    for (int64_t a = top < 0 ? 0 : top; a < sk_min(top + 3, f->rows[i].from); a++)
        for (int64_t b = left < 0 ? 0 : left; b < sk_min(left + 3, f->columns[i].from); b++) {
            const real v = load(f, i, p, a, b);
            if (w.y < 0 || v > w.value || v != v) w = (winner){v, a, b};
        }
    return w;
}

static real sample(const fusion *f, int i, place p, int64_t y, int64_t x) {
    if (f->rows[i].way == SK_RESIZE_MAXPOOL) return pool(f, i, p, y, x).value;
    const sk_tap v = sk_tap_of(f->rows[i], y), h = sk_tap_of(f->columns[i], x);
    const real low = load(f, i, p, v.low, h.low) * (real)(1 - h.part) +
                     (h.part > 0 ? load(f, i, p, v.low, h.high) * (real)h.part : 0);
    if (!(v.part > 0)) return low;
    const real high = load(f, i, p, v.high, h.low) * (real)(1 - h.part) +
                      (h.part > 0 ? load(f, i, p, v.high, h.high) * (real)h.part : 0);
    return low * (real)(1 - v.part) + high * (real)v.part;
}

static real fuse(const fusion *f, place p, int64_t y, int64_t x) {
    real sum = 0;
    for (int i = 0; i < f->count; i++) sum += (real)f->factor[i] * sample(f, i, p, y, x);
    return sum;
}

static sk_work work_of(int64_t planes, int64_t plane) {
    return (sk_work){sk_min(planes, TASKS), 3 * plane * (planes / TASKS + 1), "elements"};
}

static sk_work forward_work(const void *params) {
    const forward_params *p = params;
    return work_of(SK_DIM(p, N) * SK_DIM(p, C), SK_DIM(p, H) * SK_DIM(p, W));
}

static void bifpn_fuse_rows(const void *params, int64_t begin, int64_t end) {
    const forward_params *p = params;
    fusion f = FUSION_OF(p);
    set_factors(&f, &p->weight, p->eps);
    const int64_t planes = f.N * f.C, tasks = sk_min(planes, TASKS);
    for (int64_t plane = begin * planes / tasks; plane < end * planes / tasks; plane++) {
        const place at = {plane / f.C, plane % f.C};
        for (int64_t y = 0; y < f.H; y++)
            for (int64_t x = 0; x < f.W; x++) {
                const int64_t *s = p->fused.stride;
                const real v = fuse(&f, at, y, x);
                sk_store_one(&p->fused, at.n * s[0] + at.c * s[1] + y * s[2] + x * s[3],
                             f.late ? act(f.activation, v) : v);
            }
    }
}

static real grad_at(const backward_params *p, const fusion *f, place at, int64_t y, int64_t x) {
    const int64_t *s = p->grad.stride;
    const real g = sk_load_one(&p->grad, at.n * s[0] + at.c * s[1] + y * s[2] + x * s[3]);
    return f->late ? slope(f->activation, fuse(f, at, y, x), g) : g;
}

/* The gradient of input i's pixel (y, x), resized or not. */
static real fold(const backward_params *p, const fusion *f, int i, place at, int64_t y, int64_t x) {
    const sk_axis v = f->rows[i], h = f->columns[i];
    real sum = 0;
    if (v.way == SK_RESIZE_MAXPOOL) {
        for (int64_t a = (y + v.from % 2) / 2; a >= 0 && sk_window(v, a) + 2 >= y; a--)
            for (int64_t b = (x + h.from % 2) / 2; b >= 0 && sk_window(h, b) + 2 >= x; b--) {
                if (a >= v.to || b >= h.to) continue;
                const winner w = pool(f, i, at, a, b);
                if (w.y == y && w.x == x) sum += grad_at(p, f, at, a, b);
            }
        return sum;
    }
    const sk_span rows = sk_outputs_of(v, y), columns = sk_outputs_of(h, x);
    for (int64_t a = rows.begin; a < rows.end; a++)
        for (int64_t b = columns.begin; b < columns.end; b++)
            sum += (real)(sk_share(v, a, y) * sk_share(h, b, x)) * grad_at(p, f, at, a, b);
    return sum;
}

static sk_work backward_work(const void *params) {
    const backward_params *p = params;
    return work_of(SK_DIM(p, N) * SK_DIM(p, C), SK_DIM(p, H) * SK_DIM(p, W));
}

static void backward_plane(const backward_params *p, const fusion *f, place at, double *sum) {
    const sk_arg *grads[MAPS] = {&p->grad_a, &p->grad_b, &p->grad_c};
    for (int i = 0; i < f->count; i++) {
        for (int64_t y = 0; y < f->H; y++)
            for (int64_t x = 0; x < f->W; x++)
                sum[i] += (double)(grad_at(p, f, at, y, x) * sample(f, i, at, y, x));
        for (int64_t y = 0; y < f->rows[i].from; y++)
            for (int64_t x = 0; x < f->columns[i].from; x++) {
                const real g = (real)f->factor[i] * fold(p, f, i, at, y, x);
                const int64_t *s = f->x[i].stride, *to = grads[i]->stride;
                const real v =
                    sk_load_one(&f->x[i], at.n * s[0] + at.c * s[1] + y * s[2] + x * s[3]);
                sk_store_one(grads[i], at.n * to[0] + at.c * to[1] + y * to[2] + x * to[3],
                             f->late ? g : slope(f->activation, v, g));
            }
    }
}

static void bifpn_fuse_backward_rows(const void *params, int64_t begin, int64_t end) {
    const backward_params *p = params;
    fusion f = FUSION_OF(p);
    set_factors(&f, &p->weight, p->eps);
    const int64_t planes = f.N * f.C, tasks = sk_min(planes, TASKS);
    for (int64_t task = begin; task < end; task++) {
        double *const sum = (double *)p->scratch.data + MAPS * task;
        for (int i = 0; i < MAPS; i++) sum[i] = 0;
        for (int64_t plane = task * planes / tasks; plane < (task + 1) * planes / tasks; plane++)
            backward_plane(p, &f, (place){plane / f.C, plane % f.C}, sum);
    }
}

static void backward_finish(const void *params) {
    const backward_params *p = params;
    if (!p->weight.data) return;
    fusion f = FUSION_OF(p);
    set_factors(&f, &p->weight, p->eps);
    const int64_t tasks = sk_min(f.N * f.C, TASKS);
    double sum[MAPS] = {0};
    for (int64_t task = 0; task < tasks; task++)
        for (int i = 0; i < f.count; i++)
            sum[i] += ((const double *)p->scratch.data)[MAPS * task + i];
    for (int i = 0; i < f.count; i++) {
        double slope_of_weight = sum[i] * p->eps / f.total;
        for (int j = 0; j < f.count; j++) slope_of_weight += f.factor[j] * (sum[i] - sum[j]);
        const real w = sk_load_one(&p->weight, i * p->weight.stride[0]);
        sk_store_one(&p->grad_weight, i * p->grad_weight.stride[0],
                     w <= 0 ? 0 : (real)(slope_of_weight / f.total));
    }
}

const sk_cpu_kernel SK_CPU(bifpn_fuse) = {forward_work, bifpn_fuse_rows, NULL, NULL};
const sk_cpu_kernel SK_CPU(bifpn_fuse_backward) = {backward_work, bifpn_fuse_backward_rows,
                                                   backward_finish, NULL};
