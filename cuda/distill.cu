/* Distillation on the GPU: one kernel forward, one backward, each reading logits and teachers once.
 * Formulas in ops/distill.h; how a KL keeps its digits in core/kl.cuh. */
#include "core/ce.cuh"
#include "core/rows.cuh"
#include "core/teacher.cuh"
#include "distill.h"

extern "C" {
SK_PARAMS(distill)
SK_PARAMS(distill_backward)
}
typedef struct distill_params forward_params;
typedef struct distill_backward_params backward_params;

enum { LARGEST, LEVEL, LEVEL_T }; /* planes of `levels` */

template <typename params>
static teachers teachers_of(const params &p) {
    const double coldest = fmin(fmin(p.temperature, p.teacher_temperature),
                                fmin(p.second_temperature, p.second_teacher_temperature));
    return {{teacher_of(p.teacher, p.teacher_weight, p.temperature, p.teacher_temperature,
                        p.teacher_kind),
             teacher_of(p.second_teacher, p.second_teacher_weight, p.second_temperature,
                        p.second_teacher_temperature, p.second_teacher_kind)},
            2 * fmin(coldest, 1)};
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

/* ---- forward ---- */

/* A thread's share of a row, so far, against anchors of its own: near its largest logits. */
template <typename real, int kTeachers>
struct share {
    real of_student, of_teacher[kTeachers]; /* the anchors */
    softmax<real> ce;
    double sum[kTeachers][TEACHER_SUMS];
};

/* New anchors. */
template <typename real, int kTeachers>
SK_DEVICE void raise(share<real, kTeachers> *x, const teachers &k, real of_student,
                     const real (&of_teacher)[kTeachers]) {
    x->ce.rest *= exponential(x->of_student - of_student);
    SK_UNROLL for (int j = 0; j < kTeachers; j++) {
        move(x->sum[j], compare(x->of_student, x->of_teacher[j],
                                anchors_at(of_student, of_teacher[j]), warmth_of<real>(k.of[j])));
        x->of_teacher[j] = of_teacher[j];
    }
    x->of_student = of_student;
}

/* Adds a step to a share, whose anchors are raised together, and by `slack` at least. */
template <typename T, int kVec, int kTeachers>
SK_DEVICE void add_step(const forward_params &p, const teachers &k, int64_t n, int64_t s,
                        int64_t base, share<sk_real<T>, kTeachers> *x) {
    typedef sk_real<T> real;
    const int64_t C = SK_DIM(&p, C);
    const real slack = (real)k.slack;
    real a[sk_items<T>], b[kTeachers][sk_items<T>], top[kTeachers];
    const real most =
        load_logits<T, kVec>(sk_row<T>(p.logits, n, s), p.logits.stride[1], base, C, a);
    bool higher = most > x->of_student + slack;
    SK_UNROLL for (int j = 0; j < kTeachers; j++) {
        top[j] = (real)kLowest;
        if (k.of[j].weight == 0) continue;
        top[j] = load_teacher<T, kVec>(k.of[j], n, s, base, C, b[j]);
        higher = higher || top[j] > x->of_teacher[j] + slack;
        top[j] = sk_max(top[j], x->of_teacher[j]);
    }
    if (higher) raise(x, k, sk_max(most, x->of_student), top);
    add_softmax<T, kVec>(a, x->of_student, most, &x->ce);
    if (p.label_smoothing != 0) add_minus<T, kVec>(a, base, C, x->of_student, &x->ce);
    SK_UNROLL for (int j = 0; j < kTeachers; j++) {
        if (k.of[j].weight == 0) continue;
        const anchors<real> h = anchors_at(x->of_student, x->of_teacher[j]);
        const warmth<real> &w = warmth_of<real>(k.of[j]);
        if (w.ratio == 1)
            add_teacher<T, kVec, true>(a, b[j], base, C, h, w, x->sum[j]);
        else
            add_teacher<T, kVec, false>(a, b[j], base, C, h, w, x->sum[j]);
    }
}

/* Leaves what is saved of a teacher; returns its part of kl_rows, without the row's weight. `far`:
 * how far apart anchors were, which costs digits where logits are compared with each other, at one
 * temperature. */
template <typename T>
SK_DEVICE double teach(const forward_params &p, const teacher &k, int j, int64_t n, int64_t s,
                       double h, double hu, double hv, double far, double (&sum)[TEACHER_SUMS]) {
    typedef sk_real<T> real;
    const bool rough = k.T != k.own || k.x.dtype != p.logits.dtype;
    const bool is_far = sizeof(T) == 2 && k.T == k.own && far > kFar * k.T;
    teacher_row x = {0, 0, 0, false};
    if (k.weight != 0) {
        x = conclude(k, sum, hu, hv, rough, is_far);
        x.level += (hu - h) / k.T;
        if (x.poor) {
            const stored_row<T> student = {sk_row<T>(p.logits, n, s), p.logits.stride[1]};
            x = careful(k, student, row_of(k, n, s), SK_DIM(&p, C));
        }
    }
    if (sk_lane() == 0) {
        *sk_cell<real>(p.levels, LEVEL_T + j, n, s) = (real)x.level;
        *sk_cell<double>(p.ratios, j, n, s) = x.dl;
    }
    return k.weight * k.T * k.T * x.kl;
}

/* Leaves the cross-entropy's sums and what is saved of a row; returns its largest logit. */
template <typename T, int kVec, int kTeachers>
SK_DEVICE sk_real<T> visit(const forward_params &p, const teachers &k, int64_t n, int64_t s,
                           double (&sum)[CE_SUMS], double *kl) {
    typedef sk_real<T> real;
    const int64_t C = SK_DIM(&p, C);
    share<real, kTeachers> x = {(real)kLowest, {}, no_softmax<real>(), {}};
    SK_UNROLL for (int j = 0; j < kTeachers; j++) x.of_teacher[j] = (real)kLowest;
    SK_ROLLED for (int64_t base = 0; base < C; base += sk_step<T>())
        add_step<T, kVec, kTeachers>(p, k, n, s, base, &x);
    const real h =
        mend_softmax<T>(sk_row<T>(p.logits, n, s), p.logits.stride[1], C, p.label_smoothing,
                        gather_softmax(x.ce, x.of_student, C, sum), sum);
    real top[1 + 2 * kTeachers] = {x.of_student}, of_teacher[kTeachers];
    SK_UNROLL for (int j = 0; j < kTeachers; j++) {
        top[1 + j] = x.of_teacher[j];
        top[1 + kTeachers + j] = fabs(x.of_student - x.of_teacher[j]);
    }
    sk_group_reduce(top, sk_larger());
    SK_UNROLL for (int j = 0; j < kTeachers; j++) of_teacher[j] = top[1 + j];
    if (sk_group() > 1) raise(&x, k, top[0], of_teacher);
    SK_UNROLL for (int j = 0; j < kTeachers; j++) {
        sk_group_reduce(x.sum[j], sk_add());
        *kl +=
            teach<T>(p, k.of[j], j, n, s, h, top[0], top[1 + j], top[1 + kTeachers + j], x.sum[j]);
    }
    return h;
}

/* Leaves loss, parts and denominators from the sums of ce_rows, kl_rows and both weights. */
template <typename real>
SK_DEVICE void finish(const forward_params &p, const teachers &k, const double (&total)[4]) {
    const real *const divisor = (const real *)p.divisor.data;
    const bool has[2] = {has_ce(p), k.of[0].weight != 0 || k.of[1].weight != 0};
    double part[2];
    SK_UNROLL for (int i = 0; i < 2; i++) {
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

/* Leaves what is saved of teachers where none is looked at. */
template <typename real>
SK_DEVICE void save_none(const forward_params &p, int64_t n, int64_t s) {
    SK_UNROLL for (int j = 0; j < MOST_TEACHERS; j++) {
        *sk_cell<real>(p.levels, LEVEL_T + j, n, s) = 0;
        *sk_cell<double>(p.ratios, j, n, s) = 0;
    }
}

/* Leaves rows and what is saved; the block that ends last leaves loss, parts and denominators. */
template <typename T, int kVec, int kTeachers>
__global__ void __launch_bounds__(SK_BLOCK, 2)
    distill_kernel(const forward_params params, const teachers k) {
    typedef sk_real<T> real;
    const forward_params *const p = &params;
    const int64_t S = SK_DIM(p, S), count = SK_DIM(p, N) * S;
    double total[4] = {0, 0, 0, 0};
    for (int64_t row = sk_first_row(); row < count; row += sk_row_step()) {
        const int64_t n = row / S, s = row % S;
        const real w = sk_weight<real>(p->weight, n, s);
        double sum[CE_SUMS] = {}, kl = 0;
        real h = 0;
        if (sk_lane() == 0) save_none<real>(params, n, s);
        if (w != 0) h = visit<T, kVec, kTeachers>(params, k, n, s, sum, &kl);
        if (sk_lane() != 0) continue;
        const int64_t y = target_of(params, n, s, SK_DIM(p, C) - 1);
        const bool labelled = w != 0 && y >= 0;
        const bool taught = w != 0 && (y >= 0 || !p->mask_teachers || !p->target.data);
        const bool nothing = w != 0 && h == -INFINITY; /* but -inf, or NaN */
        const double level = w == 0 ? 0 : nothing ? NAN : log_sum(sum);
        const double ce =
            labelled && has_ce(params)
                ? p->ce_weight * w *
                      conclude_ce(p->label_smoothing, SK_DIM(p, C), sum, level, h,
                                  sk_widen(sk_row<T>(p->logits, n, s)[y * p->logits.stride[1]]))
                : 0;
        kl = taught ? kl * w : 0;
        *sk_cell<real>(p->levels, LARGEST, n, s) = nothing ? (real)(-INFINITY + 0 * sum[REST]) : h;
        *sk_cell<real>(p->levels, LEVEL, n, s) = (real)level;
        *sk_cell<real>(p->ce_rows, n, s) = (real)ce;
        *sk_cell<real>(p->kl_rows, n, s) = (real)kl;
        *sk_cell<real>(p->rows, n, s) = (real)ce + (real)kl;
        total[0] += ce;
        total[1] += kl;
        total[2] += labelled ? w : 0;
        total[3] += p->mask_teachers && p->target.data ? (labelled ? w : 0) : w;
    }
    if (sk_grid_sum(total, p->scratch.data) && sk_thread() == 0) finish<real>(params, k, total);
}

/* ---- backward ---- */

template <typename real, int kTeachers>
struct slope {
    ce_slope<real> ce;
    teacher_slope<real> of[kTeachers];
    bool zero; /* no gradient, whatever the logits hold */
    bool far;  /* found class by class */
};

template <typename T, int kTeachers>
SK_DEVICE slope<sk_real<T>, kTeachers> slope_of(const backward_params &p, const teachers &k,
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
    slope<real, kTeachers> x;
    const double of_ce = labelled ? p.ce_weight * factor / denominator[0] : 0;
    x.ce = ce_slope_of<real>(h, level, of_ce, p.label_smoothing, p.classes > 0 ? p.classes : C, y,
                             z_y);
    x.zero = x.ce.zero;
    x.far = labelled && ((h < kLowest && h > -INFINITY) || is_beyond(of_ce, kFarFactor<real>));
    SK_UNROLL for (int j = 0; j < kTeachers; j++) {
        const teacher &t = k.of[j];
        const double dl = *sk_cell<double>(p.ratios, j, n, s);
        const double of_teacher =
            taught && t.weight != 0
                ? t.weight * t.T * factor / denominator[p.denominators.stride[0]]
                : 0;
        x.of[j] = teacher_slope_of<real>(t, h / t.T + *sk_cell<real>(p.levels, LEVEL_T + j, n, s),
                                         dl, of_teacher);
        x.zero = x.zero && x.of[j].factor == 0;
        const double large = fabs(h / t.T) + fabs(dl);
        x.far = x.far || (of_teacher != 0 && (is_beyond(large, kFarLse<real>) ||
                                              is_beyond(of_teacher, kFarFactor<real>)));
    }
    return x;
}

/* Leaves the gradient of a far row. */
template <typename T, int kTeachers>
SK_DEVICE void differentiate_far(const backward_params &p, const teachers &k, int64_t n,
                                 int64_t s) {
    typedef sk_real<T> real;
    const int64_t C = SK_DIM(&p, C), y = target_of(p, n, s, C);
    const real *const denominator = (const real *)p.denominators.data;
    const double factor = *sk_cell<real>(p.grad, n, s) * (double)sk_weight<real>(p.weight, n, s);
    const double h = *sk_cell<real>(p.levels, LARGEST, n, s);
    const bool labelled = y >= 0 && has_ce(p);
    const bool taught = y >= 0 || !p.mask_teachers || !p.target.data;
    const double of_ce = labelled ? p.ce_weight * factor / denominator[0] : 0;
    const double of_kl = taught ? factor / denominator[p.denominators.stride[0]] : 0;
    const stored_row<T> student = {sk_row<T>(p.logits, n, s), p.logits.stride[1]};
    T *const to = sk_row<T>(p.grad_logits, n, s);
    side own = {0, 0}, u[kTeachers] = {}, v[kTeachers] = {};
    if (labelled)
        own = whole_side<real>(side_of(student, C, 1), h, *sk_cell<real>(p.levels, LEVEL, n, s));
    SK_UNROLL for (int j = 0; j < kTeachers; j++) {
        const teacher &t = k.of[j];
        if (t.weight == 0) continue;
        const double level = *sk_cell<real>(p.levels, LEVEL_T + j, n, s);
        u[j] = whole_side<real>(side_of(student, C, t.T), h, level);
        v[j] = side_within<real>(side_of(row_of(t, n, s), C, t.own), t.own, h / t.T + level,
                                 *sk_cell<double>(p.ratios, j, n, s));
    }
    SK_ROLLED for (int64_t c = sk_lane(); c < C; c += sk_group()) {
        const double a = student(c);
        double grad = 0;
        if (labelled)
            grad = of_ce * careful_ce_slope(a, c == y, p.label_smoothing,
                                            p.classes > 0 ? p.classes : C, own);
        SK_UNROLL for (int j = 0; j < kTeachers; j++) {
            const teacher &t = k.of[j];
            if (t.weight == 0) continue;
            const double b = row_of(t, n, s)(c), q = exp(log_p(b, t.own, v[j]));
            const double d = log_ratio(a, b, t.T, t.own, u[j], v[j]);
            const double p_q = exp(log_p(a, t.T, u[j])) - q;
            grad += t.weight * t.T * of_kl * (fabs(d) < 0.5 ? q * expm1(d) : p_q);
        }
        sk_narrow((real)grad, to + c * p.grad_logits.stride[1]);
    }
}

/* Leaves grad_logits. */
template <typename T, int kVec, int kTeachers>
__global__ void __launch_bounds__(SK_BLOCK, kTeachers > 1 ? 2 : sk_resident<T, kVec>)
    distill_backward_kernel(const backward_params params, const teachers k) {
    typedef sk_real<T> real;
    const backward_params *const p = &params;
    const int64_t S = SK_DIM(p, S), C = SK_DIM(p, C), count = SK_DIM(p, N) * S;
    for (int64_t row = sk_first_row(); row < count; row += sk_row_step()) {
        const int64_t n = row / S, s = row % S;
        const slope<real, kTeachers> m = slope_of<T, kTeachers>(params, k, n, s);
        if (m.far) {
            differentiate_far<T, kTeachers>(params, k, n, s);
            continue;
        }
        const T *const from = sk_keep(sk_row<T>(p->logits, n, s));
        T *const to = sk_keep(sk_row<T>(p->grad_logits, n, s));
        SK_ROLLED for (int64_t base = 0; base < C; base += sk_step<T>()) {
            real a[sk_items<T>], b[sk_items<T>], grad[sk_items<T>];
            load_logits<T, kVec>(from, p->logits.stride[1], base, C, a);
            ce_gradients<T, kVec>(m.ce, a, base, grad);
            SK_UNROLL for (int j = 0; j < kTeachers; j++) {
                if (k.of[j].weight == 0) continue;
                load_teacher<T, kVec>(k.of[j], n, s, base, C, b);
                const warmth<real> &w = warmth_of<real>(k.of[j]);
                if (w.ratio == 1)
                    add_slopes<T, true>(a, b, m.of[j], w, grad);
                else
                    add_slopes<T, false>(a, b, m.of[j], w, grad);
            }
            SK_UNROLL for (int i = 0; i < sk_items<T>; i++) grad[i] = m.zero ? 0 : grad[i];
            sk_store<T, kVec>(to, p->grad_logits.stride[1], base, C, grad);
        }
    }
}

/* ---- launches ---- */

extern "C" int sk_cuda_distill(const struct distill_params *params, void *stream) {
    const int zeroed = cudaMemsetAsync(params->scratch.data, 0, 16, (cudaStream_t)stream);
    if (zeroed != cudaSuccess) return zeroed;
    const int64_t count = SK_DIM(params, N) * SK_DIM(params, S);
    const teachers k = teachers_of(*params);
    SK_SWITCH_FLOATING(params->logits.dtype, T, {
        const sk_layout layout = sk_layout_of(
            params->dims, sizeof(T), {&params->logits, &params->teacher, &params->second_teacher});
        const auto kernel = k.of[1].weight != 0 ? SK_KERNEL(distill_kernel, T, layout, 2)
                                                : SK_KERNEL(distill_kernel, T, layout, 1);
        SK_LAUNCH(kernel, sk_grid(count, layout), sk_block(layout), 0, stream, *params, k);
    })
    return cudaGetLastError();
}

extern "C" int sk_cuda_distill_backward(const struct distill_backward_params *params,
                                        void *stream) {
    const int64_t count = SK_DIM(params, N) * SK_DIM(params, S);
    const teachers k = teachers_of(*params);
    SK_SWITCH_FLOATING(params->logits.dtype, T, {
        const sk_layout layout = sk_layout_of(
            params->dims, sizeof(T),
            {&params->logits, &params->grad_logits, &params->teacher, &params->second_teacher});
        const auto kernel = k.of[1].weight != 0 ? SK_KERNEL(distill_backward_kernel, T, layout, 2)
                                                : SK_KERNEL(distill_backward_kernel, T, layout, 1);
        SK_LAUNCH(kernel, sk_grid(count, layout), sk_block(layout), 0, stream, *params, k);
    })
    return cudaGetLastError();
}
