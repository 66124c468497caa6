/* Distillation on the GPU: one kernel forward (two visits to a row, the second of which finds it in
 * cache), one backward. Formulas in ops/distill.h; how a KL keeps its digits in core/kl.cuh. */
#include "core/ce.cuh"
#include "core/device.cuh"
#include "core/kl.cuh"
#include "distill.h"

extern "C" {
SK_PARAMS(distill)
SK_PARAMS(distill_backward)
}
typedef struct distill_params forward_params;
typedef struct distill_backward_params backward_params;

enum { LOGITS, PROBS };
enum { kTeachers = 2 };
enum { LARGEST, LEVEL, LEVEL_T }; /* planes of `levels` */

/* ---- teachers ---- */

struct teacher {
    const sk_arg *x;
    double weight, T, own; /* weight 0: not there */
    bool probs;
    bool wide; /* of the logits' dtype and as well aligned */
};

/* Which teachers can be read as the logits are. */
struct wideness {
    bool of[kTeachers];
};

template <typename params>
SK_DEVICE void teachers_of(const params &p, const wideness &wide, teacher (&k)[kTeachers]) {
    k[0] = {&p.teacher,
            p.teacher.data ? p.teacher_weight : 0,
            p.temperature,
            p.teacher_temperature,
            p.teacher_kind == PROBS,
            wide.of[0]};
    k[1] = {&p.second_teacher,
            p.second_teacher.data ? p.second_teacher_weight : 0,
            p.second_temperature,
            p.second_teacher_temperature,
            p.second_teacher_kind == PROBS,
            wide.of[1]};
}

template <typename params>
SK_DEVICE bool has_ce(const params &p) {
    return p.target.data && p.ce_weight != 0;
}

/* The class of a row, at most `last`; -1 where it is ignored or there is no target. */
template <typename params>
SK_DEVICE int64_t target_of(const params &p, int64_t n, int64_t s, int64_t last) {
    if (!p.target.data) return -1;
    const int64_t y = *sk_cell<int64_t>(p.target, n, s);
    if (y == p.ignore_index) return -1;
    sk_assert(y >= 0 && y <= last, "distill: target is no class and not ignore_index");
    return y;
}

/* A step of a teacher's logits, the logarithms of its probabilities. */
template <typename T, int kGroup, int kVec>
SK_DEVICE void load_teacher(const teacher &k, int64_t n, int64_t s, int64_t base, int64_t C,
                            sk_real<T> (&to)[sk_items<T>]) {
    typedef sk_real<T> real;
    const real lowest = (real)kLowest;
    if (k.wide) {
        sk_load<T, kGroup, kVec>(sk_row<T>(*k.x, n, s), k.x->stride[1], base, C,
                                 k.probs ? 0 : lowest, to);
    } else {
        const int64_t row = n * k.x->stride[0] + s * k.x->stride[2];
        SK_UNROLL for (int i = 0; i < sk_items<T>; i++) {
            const int64_t c = sk_class<kGroup, kVec>(base, i);
            to[i] = c < C     ? (real)sk_load_any(*k.x, row + c * k.x->stride[1])
                    : k.probs ? 0
                              : lowest;
        }
    }
    SK_UNROLL for (int i = 0; i < sk_items<T>; i++) {
        if (k.probs) to[i] = log(to[i]);
        to[i] = sk_at_least(to[i], lowest);
    }
}

template <typename T, int kGroup, int kVec>
SK_DEVICE void load_logits(const sk_arg &x, int64_t n, int64_t s, int64_t base, int64_t C,
                           sk_real<T> (&to)[sk_items<T>]) {
    const sk_real<T> lowest = (sk_real<T>)kLowest;
    sk_load<T, kGroup, kVec>(sk_row<T>(x, n, s), x.stride[1], base, C, lowest, to);
    SK_UNROLL for (int i = 0; i < sk_items<T>; i++) to[i] = sk_at_least(to[i], lowest);
}

/* A student's and a teacher's logit against anchors, where the temperatures differ. */
template <typename real>
SK_DEVICE pair<real> compare_apart(real a, real b, const anchors<real> &h, const scale<real> &t,
                                   const scale<real> &own) {
    const real from_u = (a - h.u.high) - h.u.low, from_v = (b - h.v.high) - h.v.low;
    pair<real> x;
    x.y = from_u * t.inverse - from_v * own.inverse;
    x.p = sk_exp2(from_u * t.log2e);
    x.q = sk_exp2(from_v * own.log2e);
    real even, odd;
    curvature(x.y, &even, &odd);
    const bool near = fabs(x.y) < (real)0.75;
    const real rest = x.q * (even + odd);
    x.diff = near ? x.q * x.y + rest : x.p - x.q;
    x.gq = near ? rest : x.diff - x.q * x.y;
    return x;
}

/* ---- forward ---- */

/* Sums over a row: of cross-entropy and of each teacher. */
enum { OF_TEACHER = CE_SUMS };
enum { SUM_P, SUM_Q, SUM_D, SUM_GQ, TEACHER_SUMS };
enum { ROW_SUMS = OF_TEACHER + kTeachers * TEACHER_SUMS };

/* The largest logits of the row, at least kLowest: the student's first. */
template <typename T, int kGroup, int kVec>
SK_DEVICE void find_anchors(const forward_params &p, const teacher (&k)[kTeachers], int64_t n,
                            int64_t s, sk_real<T> (&top)[1 + kTeachers]) {
    typedef sk_real<T> real;
    const int64_t C = SK_DIM(&p, C);
    for (int j = 0; j <= kTeachers; j++) top[j] = (real)kLowest;
    for (int64_t base = 0; base < C; base += kGroup * sk_items<T>) {
        real a[sk_items<T>];
        load_logits<T, kGroup, kVec>(p.logits, n, s, base, C, a);
        SK_UNROLL for (int i = 0; i < sk_items<T>; i++) top[0] = sk_max(top[0], a[i]);
        for (int j = 0; j < kTeachers; j++) {
            if (k[j].weight == 0) continue;
            load_teacher<T, kGroup, kVec>(k[j], n, s, base, C, a);
            SK_UNROLL for (int i = 0; i < sk_items<T>; i++) top[1 + j] = sk_max(top[1 + j], a[i]);
        }
    }
    sk_group_reduce<kGroup>(top, sk_larger());
}

/* The sums of one teacher in a step: in float, or once more in double. */
template <typename real, int kItems, int kGroup, int kVec, typename stored>
SK_DEVICE void add_teacher(const teacher &k, const stored (&a)[kItems], const stored (&b)[kItems],
                           int64_t base, int64_t C, real hu, real hv, double *sum) {
    const scale<real> t = scale_of<real>(k.T), own = scale_of<real>(k.own);
    const anchors<real> h = anchors_at(hu, hv);
    real part[TEACHER_SUMS] = {};
    SK_UNROLL for (int i = 0; i < kItems; i++) {
        if (i % kVec == 0 && !sk_any_class<kGroup, kVec>(base, i, C)) break;
        const pair<real> x = k.T == k.own ? compare((real)a[i], (real)b[i], h, t)
                                          : compare_apart((real)a[i], (real)b[i], h, t, own);
        part[SUM_P] += x.p;
        part[SUM_Q] += x.q;
        part[SUM_D] += x.diff;
        part[SUM_GQ] += x.gq;
    }
    for (int j = 0; j < TEACHER_SUMS; j++) sum[j] += part[j];
}

struct teacher_row {
    double level, dl, kl;
    bool poor;
};

/* From a teacher's sums; poor as in core/kl.cuh, or where temperatures apart leave too few digits.
 */
SK_DEVICE teacher_row conclude_teacher(const teacher &k, const double *sum, double hu, double hv) {
    if (hu <= kLowest || hv <= kLowest) {
        const divergence none =
            undefined(lse_of(hu, k.T, sum[SUM_P]), lse_of(hv, k.own, sum[SUM_Q]));
        return {none.lse - hu / k.T, none.dl, none.reverse, none.poor};
    }
    const double gq = sum[SUM_GQ] / sum[SUM_Q], r = sum[SUM_D] / sum[SUM_Q];
    const double log_ratio = fabs(r) < 0.5 ? log1p(r) : log(sum[SUM_P] / sum[SUM_Q]);
    teacher_row x;
    x.level = log(sum[SUM_P]);
    x.dl = (hu / k.T - hv / k.own) + log_ratio;
    x.kl = gq - log_gap(r, log_ratio);
    x.poor = gq > 16 * x.kl || x.kl < 0 || (k.T != k.own && x.kl < 1e-3);
    if (x.kl > kInfinite) x.kl = INFINITY;
    if (x.kl < 0) x.kl = 0;
    return x;
}

/* A teacher's row once more, in double. */
template <typename T, int kGroup, int kVec>
SK_DEVICE teacher_row again(const forward_params &p, const teacher &k, int64_t n, int64_t s,
                            double hu, double hv) {
    const int64_t C = SK_DIM(&p, C);
    double sum[TEACHER_SUMS] = {};
    for (int64_t base = 0; base < C; base += kGroup * sk_items<T>) {
        sk_real<T> a[sk_items<T>], b[sk_items<T>];
        load_logits<T, kGroup, kVec>(p.logits, n, s, base, C, a);
        load_teacher<T, kGroup, kVec>(k, n, s, base, C, b);
        add_teacher<double, sk_items<T>, kGroup, kVec>(k, a, b, base, C, hu, hv, sum);
    }
    sk_group_reduce<kGroup>(sum, sk_add());
    return conclude_teacher(k, sum, hu, hv);
}

/* Leaves loss, parts and denominators from the sums of ce_rows, kl_rows and both weights. */
template <typename real>
SK_DEVICE void finish(const forward_params &p, const teacher (&k)[kTeachers],
                      const double (&total)[4]) {
    const real *const divisor = (const real *)p.divisor.data;
    const bool has[2] = {has_ce(p), k[0].weight != 0 || k[1].weight != 0};
    double part[2];
    for (int i = 0; i < 2; i++) {
        const double denominator = p.reduction != SELFKD_MEAN ? 1
                                   : divisor                  ? *divisor
                                                              : total[2 + i];
        part[i] = has[i] ? total[i] / denominator : 0;
        ((real *)p.denominators.data)[i * p.denominators.stride[0]] = (real)denominator;
    }
    *(real *)p.ce.data = (real)part[0];
    *(real *)p.kl.data = (real)part[1];
    *(real *)p.loss.data = (real)(part[0] + part[1]);
}

/* Leaves rows and what is saved; the block that ends last leaves loss, parts and denominators. */
template <typename T, int kGroup, int kVec>
__global__ void __launch_bounds__(SK_BLOCK)
    distill_kernel(const forward_params params, const wideness wide) {
    typedef sk_real<T> real;
    const forward_params *const p = &params;
    const int64_t C = SK_DIM(p, C), S = SK_DIM(p, S), count = SK_DIM(p, N) * S;
    teacher k[kTeachers];
    teachers_of(params, wide, k);
    double total[4] = {0, 0, 0, 0};
    for (int64_t row = sk_first_row<kGroup>(); row < count; row += sk_row_step<kGroup>()) {
        const int64_t n = row / S, s = row % S, y = target_of(params, n, s, C - 1);
        const real w = sk_weight<real>(p->weight, n, s);
        const bool labelled = w != 0 && y >= 0;
        const bool taught = w != 0 && (y >= 0 || !p->mask_teachers || !p->target.data);
        real top[1 + kTeachers] = {};
        double sum[ROW_SUMS] = {};
        teacher_row x[kTeachers] = {};
        if (w != 0) {
            find_anchors<T, kGroup, kVec>(params, k, n, s, top);
            for (int64_t base = 0; base < C; base += kGroup * sk_items<T>) {
                real a[sk_items<T>], b[sk_items<T>];
                load_logits<T, kGroup, kVec>(p->logits, n, s, base, C, a);
                add_softmax<T, kGroup, kVec>(a, base, C, top[0], sum);
                for (int j = 0; j < kTeachers; j++) {
                    if (k[j].weight == 0) continue;
                    load_teacher<T, kGroup, kVec>(k[j], n, s, base, C, b);
                    add_teacher<real, sk_items<T>, kGroup, kVec>(
                        k[j], a, b, base, C, top[0], top[1 + j],
                        sum + OF_TEACHER + j * TEACHER_SUMS);
                }
            }
            sk_group_reduce<kGroup>(sum, sk_add());
            for (int j = 0; j < kTeachers; j++) {
                if (k[j].weight == 0) continue;
                x[j] =
                    conclude_teacher(k[j], sum + OF_TEACHER + j * TEACHER_SUMS, top[0], top[1 + j]);
                if (x[j].poor)
                    x[j] = again<T, kGroup, kVec>(params, k[j], n, s, top[0], top[1 + j]);
            }
        }
        if (sk_lane<kGroup>() != 0) continue;
        const bool nothing = top[0] <= (real)kLowest; /* but -inf, or NaN */
        const double level = w == 0 ? 0 : nothing ? NAN : log_sum(sum);
        const double ce =
            labelled && has_ce(params)
                ? p->ce_weight * w *
                      conclude_ce(p->label_smoothing, C, sum, level, top[0],
                                  sk_widen(sk_row<T>(p->logits, n, s)[y * p->logits.stride[1]]))
                : 0;
        double kl = 0;
        for (int j = 0; j < kTeachers; j++) {
            if (taught && k[j].weight != 0) kl += k[j].weight * k[j].T * k[j].T * w * x[j].kl;
            *sk_cell<real>(p->levels, LEVEL_T + j, n, s) = (real)x[j].level;
            *sk_cell<double>(p->ratios, j, n, s) = x[j].dl;
        }
        *sk_cell<real>(p->levels, LARGEST, n, s) =
            nothing ? (real)(-INFINITY + 0 * sum[REST]) : top[0];
        *sk_cell<real>(p->levels, LEVEL, n, s) = (real)level;
        *sk_cell<real>(p->ce_rows, n, s) = (real)ce;
        *sk_cell<real>(p->kl_rows, n, s) = (real)kl;
        *sk_cell<real>(p->rows, n, s) = (real)ce + (real)kl;
        total[0] += ce;
        total[1] += kl;
        total[2] += labelled ? w : 0;
        total[3] += p->mask_teachers && p->target.data ? (labelled ? w : 0) : w;
    }
    if (sk_grid_sum(total, p->scratch.data) && threadIdx.x == 0) finish<real>(params, k, total);
}

/* ---- backward ---- */

/* What the gradient of a row needs of one teacher: T lse on both sides, T dl; the row's factor. */
template <typename real>
struct teacher_slope {
    anchors<real> h;
    real factor;
};

template <typename real>
struct slope {
    ce_slope<real> ce;
    teacher_slope<real> of[kTeachers];
    bool zero; /* no gradient, whatever the logits hold */
};

template <typename T>
SK_DEVICE slope<sk_real<T>> slope_of(const backward_params &p, const teacher (&k)[kTeachers],
                                     int64_t n, int64_t s) {
    typedef sk_real<T> real;
    const double w = sk_weight<real>(p.weight, n, s);
    const double factor = *sk_cell<real>(p.grad, n, s) * w;
    const real *const denominator = (const real *)p.denominators.data;
    const double h = *sk_cell<real>(p.levels, LARGEST, n, s);
    const double level = *sk_cell<real>(p.levels, LEVEL, n, s);
    const int64_t C = SK_DIM(&p, C), y = target_of(p, n, s, C);
    const bool labelled = factor != 0 && y >= 0 && has_ce(p);
    const bool taught = factor != 0 && (y >= 0 || !p.mask_teachers || !p.target.data);
    const double z_y =
        labelled && y < C ? (double)sk_widen(sk_row<T>(p.logits, n, s)[y * p.logits.stride[1]]) : h;
    slope<real> x;
    x.ce = ce_slope_of<real>(h, level, labelled ? p.ce_weight * factor / denominator[0] : 0,
                             p.label_smoothing, p.classes > 0 ? p.classes : C, y, z_y);
    x.zero = x.ce.factor == 0;
    for (int j = 0; j < kTeachers; j++) {
        const double T_j = k[j].T, own = k[j].own, dl = *sk_cell<double>(p.ratios, j, n, s);
        const double lse = h / T_j + *sk_cell<real>(p.levels, LEVEL_T + j, n, s);
        x.of[j].h = {split<real>(T_j * lse), split<real>(own * (lse - dl)), split<real>(T_j * dl)};
        x.of[j].factor =
            taught && k[j].weight != 0
                ? (real)(k[j].weight * T_j * factor / denominator[p.denominators.stride[0]])
                : 0;
        x.zero = x.zero && x.of[j].factor == 0;
    }
    return x;
}

/* Leaves grad_logits. */
template <typename T, int kGroup, int kVec>
__global__ void __launch_bounds__(SK_BLOCK)
    distill_backward_kernel(const backward_params params, const wideness wide) {
    typedef sk_real<T> real;
    const backward_params *const p = &params;
    const int64_t S = SK_DIM(p, S), C = SK_DIM(p, C), count = SK_DIM(p, N) * S;
    teacher k[kTeachers];
    teachers_of(params, wide, k);
    for (int64_t row = sk_first_row<kGroup>(); row < count; row += sk_row_step<kGroup>()) {
        const int64_t n = row / S, s = row % S;
        const slope<real> m = slope_of<T>(params, k, n, s);
        for (int64_t base = 0; base < C; base += kGroup * sk_items<T>) {
            real a[sk_items<T>], b[sk_items<T>], grad[sk_items<T>];
            load_logits<T, kGroup, kVec>(p->logits, n, s, base, C, a);
            SK_UNROLL for (int i = 0; i < sk_items<T>; i++) grad[i] =
                ce_gradient(m.ce, a[i], sk_class<kGroup, kVec>(base, i));
            for (int j = 0; j < kTeachers; j++) {
                if (k[j].weight == 0) continue;
                const scale<real> t = scale_of<real>(k[j].T), own = scale_of<real>(k[j].own);
                load_teacher<T, kGroup, kVec>(k[j], n, s, base, C, b);
                SK_UNROLL for (int i = 0; i < sk_items<T>; i++) {
                    const pair<real> x = k[j].T == k[j].own
                                             ? compare(a[i], b[i], m.of[j].h, t)
                                             : compare_apart(a[i], b[i], m.of[j].h, t, own);
                    grad[i] += m.of[j].factor * x.diff;
                }
            }
            SK_UNROLL for (int i = 0; i < sk_items<T>; i++) if (m.zero) grad[i] = 0;
            sk_store<T, kGroup, kVec>(sk_row<T>(p->grad_logits, n, s), p->grad_logits.stride[1],
                                      base, C, grad);
        }
    }
}

/* ---- launches ---- */

/* A teacher as wide as the logits: the same layout would have been chosen for it. */
static bool is_wide(const sk_dims &dims, const sk_arg &logits, const sk_arg &x, int64_t element,
                    sk_layout layout) {
    if (!x.data || x.dtype != logits.dtype) return false;
    return !layout.vector || sk_layout_of(dims, element, {&x}).vector;
}

extern "C" int sk_cuda_distill(const struct distill_params *params, void *stream) {
    const int zeroed = cudaMemsetAsync(params->scratch.data, 0, 16, (cudaStream_t)stream);
    if (zeroed != cudaSuccess) return zeroed;
    const int64_t count = SK_DIM(params, N) * SK_DIM(params, S);
    SK_SWITCH_FLOATING(params->logits.dtype, T, {
        const sk_layout layout = sk_layout_of(params->dims, sizeof(T), {&params->logits});
        const wideness wide = {
            {is_wide(params->dims, params->logits, params->teacher, sizeof(T), layout),
             is_wide(params->dims, params->logits, params->second_teacher, sizeof(T), layout)}};
        const auto kernel = SK_KERNEL(distill_kernel, T, layout);
        SK_LAUNCH(kernel, sk_grid(count, layout), SK_BLOCK, 0, stream, *params, wide);
    })
    return cudaGetLastError();
}

extern "C" int sk_cuda_distill_backward(const struct distill_backward_params *params,
                                        void *stream) {
    const int64_t count = SK_DIM(params, N) * SK_DIM(params, S);
    SK_SWITCH_FLOATING(params->logits.dtype, T, {
        const sk_layout layout =
            sk_layout_of(params->dims, sizeof(T), {&params->logits, &params->grad_logits});
        const wideness wide = {
            {is_wide(params->dims, params->logits, params->teacher, sizeof(T), layout),
             is_wide(params->dims, params->logits, params->second_teacher, sizeof(T), layout)}};
        const auto kernel = SK_KERNEL(distill_backward_kernel, T, layout);
        SK_LAUNCH(kernel, sk_grid(count, layout), SK_BLOCK, 0, stream, *params, wide);
    })
    return cudaGetLastError();
}
