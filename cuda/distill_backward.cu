/* The gradient of distillation on the GPU: see distill.cu.
 *
 * Test: python -m pytest tests/test_simt.py -k distill
 * Machine code: make sass OP=distill_backward
 * Time: selfkd bench distill --device cuda */
#include "distill.cuh"

extern "C" {
SK_PARAMS(distill_backward)
}
typedef struct distill_backward_params backward_params;

template <typename real, int kTeachers>
struct slope {
    sk_ce_slope<real> ce;
    sk_teacher_slope<real> of[kTeachers];
    bool zero; /* no gradient, whatever the logits hold */
    bool far;  /* found class by class */
};

template <typename T, int kTeachers>
SK_DEVICE slope<sk_real<T>, kTeachers> slope_of(const backward_params &p, const sk_teachers &k,
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
    x.ce =
        sk_set_ce<real>(h, level, of_ce, p.label_smoothing, p.classes > 0 ? p.classes : C, y, z_y);
    x.zero = x.ce.zero;
    x.far = labelled && ((h < kLowest && h > -INFINITY) || sk_is_beyond(of_ce, kFarFactor<real>));
    SK_UNROLL for (int j = 0; j < kTeachers; j++) {
        const sk_teacher &t = k.of[j];
        const double dl = *sk_cell<double>(p.ratios, j, n, s);
        const double of_teacher =
            taught && t.weight != 0
                ? t.weight * t.T * factor / denominator[p.denominators.stride[0]]
                : 0;
        x.of[j] = sk_teacher_slope_of<real>(
            t, h / t.T + *sk_cell<real>(p.levels, LEVEL_T + j, n, s), dl, of_teacher);
        x.zero = x.zero && x.of[j].factor == 0;
        const double large = fabs(h / t.T) + fabs(dl);
        x.far = x.far || (of_teacher != 0 && (sk_is_beyond(large, kFarLse<real>) ||
                                              sk_is_beyond(of_teacher, kFarFactor<real>)));
    }
    return x;
}

/* Leaves the gradient of a far row. */
template <typename T, int kTeachers>
SK_DEVICE void differentiate_far(const backward_params &p, const sk_teachers &k, int64_t n,
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
    const sk_logits_row student = {sk_any_row_of(p.logits, n, s), false};
    T *const to = sk_row<T>(p.grad_logits, n, s);
    /* the student's at T = 1; then of each teacher the student's at T, and the teacher's own */
    sk_side found[1 + 2 * kTeachers] = {};
    SK_ROLLED for (int i = 0; i < 1 + 2 * kTeachers; i++) {
        const int j = i > 2 ? kTeachers - 1 : 0;
        const sk_teacher &t = k.of[j];
        const bool of_student = i % 2 == 1 || i == 0;
        if (i == 0 ? !labelled : t.weight == 0) continue;
        const double T_i = i == 0 ? 1 : of_student ? t.T : t.own;
        const double level = *sk_cell<real>(p.levels, i == 0 ? LEVEL : LEVEL_T + j, n, s);
        const sk_side x = sk_side_of(of_student ? student : sk_row_of(t, n, s), C, T_i);
        const double dl = of_student ? 0 : *sk_cell<double>(p.ratios, j, n, s);
        const sk_side whole = of_student
                                  ? sk_whole_side(x, h, level, kRounded<real>)
                                  : sk_side_within(x, T_i, h / t.T + level, dl, kRounded<real>);
        SK_UNROLL for (int m = 0; m < 1 + 2 * kTeachers; m++) found[m] = m == i ? whole : found[m];
    }
    SK_ROLLED for (int64_t c = sk_lane(); c < C; c += sk_group()) {
        const double a = student(c);
        double grad = 0;
        if (labelled)
            grad = of_ce * sk_ce_slope_of(a, c == y, p.label_smoothing,
                                          p.classes > 0 ? p.classes : C, found[0]);
        SK_ROLLED for (int j = 0; j < kTeachers; j++) {
            const sk_teacher &t = k.of[j];
            if (t.weight == 0) continue;
            const sk_side u = j == 0 ? found[1] : found[2 * kTeachers - 1];
            const sk_side v = j == 0 ? found[2] : found[2 * kTeachers];
            const double b = sk_row_of(t, n, s)(c), q = exp(sk_log_p(b, t.own, v));
            const double d = sk_log_ratio_of(a, b, t.T, t.own, u, v),
                         p_q = exp(sk_log_p(a, t.T, u)) - q;
            grad += t.weight * t.T * of_kl * (fabs(d) < 0.5 ? q * expm1(d) : p_q);
        }
        sk_narrow((real)grad, to + c * p.grad_logits.stride[1]);
    }
}

/* Leaves grad_logits. */
template <typename T, int kVec, int kTeachers>
__global__ void __launch_bounds__(SK_BLOCK, kTeachers > 1 ? 2 : sk_resident<T, kVec>)
    distill_backward_kernel(const backward_params p, const sk_teachers k) {
    typedef sk_real<T> real;
    sk_each_row(p, [&](int64_t n, int64_t s) {
        const int64_t C = SK_DIM(&p, C);
        const slope<real, kTeachers> m = slope_of<T, kTeachers>(p, k, n, s);
        if (m.far) {
            differentiate_far<T, kTeachers>(p, k, n, s);
            return;
        }
        const T *const from = sk_keep(sk_row<T>(p.logits, n, s));
        T *const to = sk_keep(sk_row<T>(p.grad_logits, n, s));
        SK_ROLLED for (int64_t base = 0; base < C; base += sk_step<T>()) {
            real a[sk_items<T>], b[sk_items<T>], grad[sk_items<T>];
            sk_load_logits<T, kVec>(from, p.logits.stride[1], base, C, a);
            sk_ce_gradients<T, kVec>(m.ce, a, base, grad);
            SK_UNROLL for (int j = 0; j < kTeachers; j++) {
                if (k.of[j].weight == 0) continue;
                sk_load_teacher<T, kVec>(k.of[j], n, s, base, C, b);
                const sk_warmth<real> &w = sk_warmth_of<real>(k.of[j]);
                if (w.ratio == 1)
                    sk_add_slopes<T, true>(a, b, m.of[j], w, grad);
                else
                    sk_add_slopes<T, false>(a, b, m.of[j], w, grad);
            }
            SK_UNROLL for (int i = 0; i < sk_items<T>; i++) grad[i] = m.zero ? 0 : grad[i];
            sk_store<T, kVec>(to, p.grad_logits.stride[1], base, C, grad);
        }
    });
}

extern "C" int sk_cuda_distill_backward(const struct distill_backward_params *p, void *stream) {
    const sk_teachers k = teachers_of(*p);
    const std::initializer_list<const sk_arg *> tensors = {&p->logits, &p->grad_logits, &p->teacher,
                                                           &p->second_teacher};
    if (k.of[1].weight == 0)
        return sk_launch_rows(SK_INSTANCES(distill_backward_kernel, 1), SK_ROWS(p), tensors, stream,
                              *p, k);
    return sk_launch_rows(SK_INSTANCES(distill_backward_kernel, 2), SK_ROWS(p), tensors, stream, *p,
                          k);
}
