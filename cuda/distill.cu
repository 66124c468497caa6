/* Distillation on the GPU: one kernel forward, one backward, each reading logits and teachers once.
 * Formulas in ops/distill.h; how a KL keeps its digits in core/kl.cuh. The kernels are large: the
 * backward one has a file of its own, so that both compile side by side.
 *
 * Test: python -m pytest tests/test_simt.py -k distill
 * Machine code: make sass OP=distill
 * Time: selfkd bench distill --device cuda */
#include "distill.cuh"

extern "C" {
SK_PARAMS(distill)
}
typedef struct distill_params forward_params;

/* A thread's share of a row, so far, against anchors of its own: near its largest logits. */
template <typename real, int kTeachers>
struct share {
    real of_student, of_teacher[kTeachers]; /* the anchors */
    sk_softmax<real> ce;
    double sum[kTeachers][SK_TEACHER_SUMS];
};

/* New anchors. */
template <typename real, int kTeachers>
SK_DEVICE void raise(share<real, kTeachers> *x, const sk_teachers &k, real of_student,
                     const real (&of_teacher)[kTeachers]) {
    x->ce.rest *= sk_exponential(x->of_student - of_student);
    SK_UNROLL for (int j = 0; j < kTeachers; j++) {
        sk_move_sums(x->sum[j], sk_compare(x->of_student, x->of_teacher[j],
                                           sk_anchors_at(of_student, of_teacher[j]),
                                           sk_warmth_of<real>(k.of[j])));
        x->of_teacher[j] = of_teacher[j];
    }
    x->of_student = of_student;
}

/* Adds a step to a share, whose anchors are raised together, and by `slack` at least. */
template <typename T, int kVec, int kTeachers>
SK_DEVICE void add_step(const forward_params &p, const sk_teachers &k, int64_t n, int64_t s,
                        int64_t base, share<sk_real<T>, kTeachers> *x) {
    typedef sk_real<T> real;
    const int64_t C = SK_DIM(&p, C);
    const real slack = (real)k.slack;
    real a[sk_items<T>], b[kTeachers][sk_items<T>], top[kTeachers];
    const real most =
        sk_load_logits<T, kVec>(sk_row<T>(p.logits, n, s), p.logits.stride[1], base, C, a);
    bool higher = most > x->of_student + slack;
    SK_UNROLL for (int j = 0; j < kTeachers; j++) {
        top[j] = (real)kLowest;
        if (k.of[j].weight == 0) continue;
        top[j] = sk_load_teacher<T, kVec>(k.of[j], n, s, base, C, b[j]);
        higher = higher || top[j] > x->of_teacher[j] + slack;
        top[j] = sk_max(top[j], x->of_teacher[j]);
    }
    if (higher) raise(x, k, sk_max(most, x->of_student), top);
    sk_add_softmax<T, kVec>(a, x->of_student, most, &x->ce);
    if (p.label_smoothing != 0) sk_add_minus<T, kVec>(a, base, C, x->of_student, &x->ce);
    SK_UNROLL for (int j = 0; j < kTeachers; j++) {
        if (k.of[j].weight == 0) continue;
        const sk_anchors<real> h = sk_anchors_at(x->of_student, x->of_teacher[j]);
        const sk_warmth<real> &w = sk_warmth_of<real>(k.of[j]);
        if (w.ratio == 1)
            sk_add_teacher<T, kVec, true>(a, b[j], base, C, h, w, x->sum[j]);
        else
            sk_add_teacher<T, kVec, false>(a, b[j], base, C, h, w, x->sum[j]);
    }
}

/* The anchors of a row for one teacher, and how far apart those of its threads were at most. */
struct anchor_tops {
    double hu, hv, apart;
};

/* Leaves what is saved of teacher j; returns its part of kl_rows, without the row's weight. Anchors
 * far apart cost digits where logits are compared with each other, which is at one temperature. */
template <typename T>
SK_DEVICE double teach(const forward_params &p, const sk_teacher &k, int j, int64_t n, int64_t s,
                       double h, const anchor_tops &top, double (&sum)[SK_TEACHER_SUMS]) {
    typedef sk_real<T> real;
    const bool rough = k.T != k.own || k.x.dtype != p.logits.dtype;
    const bool far = sizeof(T) == 2 && k.T == k.own && top.apart > kFar * k.T;
    sk_teacher_row x = {0, 0, 0, false};
    if (k.weight != 0) {
        x = sk_conclude(k, sum, top.hu, top.hv, rough, far);
        x.level += (top.hu - h) / k.T;
        if (x.poor) {
            const sk_logits_row student = {sk_any_row_of(p.logits, n, s), false};
            x = sk_careful(k, student, sk_row_of(k, n, s), SK_DIM(&p, C));
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
SK_DEVICE sk_real<T> visit(const forward_params &p, const sk_teachers &k, int64_t n, int64_t s,
                           double (&sum)[SK_CE_SUMS], double *kl) {
    typedef sk_real<T> real;
    const int64_t C = SK_DIM(&p, C);
    share<real, kTeachers> x = {(real)kLowest, {}, sk_no_softmax<real>(), {}};
    SK_UNROLL for (int j = 0; j < kTeachers; j++) x.of_teacher[j] = (real)kLowest;
    SK_ROLLED for (int64_t base = 0; base < C; base += sk_step<T>())
        add_step<T, kVec, kTeachers>(p, k, n, s, base, &x);
    const real h =
        sk_mend_softmax<T>(sk_row<T>(p.logits, n, s), p.logits.stride[1], C, p.label_smoothing,
                           sk_gather_softmax(x.ce, x.of_student, C, sum), sum);
    real top[1 + 2 * kTeachers] = {x.of_student}, of_teacher[kTeachers];
    SK_UNROLL for (int j = 0; j < kTeachers; j++) {
        top[1 + j] = x.of_teacher[j];
        top[1 + kTeachers + j] = fabs(x.of_student - x.of_teacher[j]);
    }
    sk_group_reduce(top, sk_larger());
    SK_UNROLL for (int j = 0; j < kTeachers; j++) of_teacher[j] = top[1 + j];
    if (sk_group() > 1) raise(&x, k, top[0], of_teacher);
    SK_ROLLED for (int j = 0; j < kTeachers; j++) {
        double of_one[SK_TEACHER_SUMS];
        SK_UNROLL for (int i = 0; i < SK_TEACHER_SUMS; i++) of_one[i] =
            j == 0 ? x.sum[0][i] : x.sum[kTeachers - 1][i];
        sk_group_reduce(of_one, sk_add());
        const real hv = j == 0 ? top[1] : top[kTeachers];
        const real apart = j == 0 ? top[1 + kTeachers] : top[2 * kTeachers];
        *kl += teach<T>(p, k.of[j], j, n, s, h, {top[0], hv, apart}, of_one);
    }
    return h;
}

/* Leaves loss, parts and denominators from the sums of ce_rows, kl_rows and both weights. */
template <typename real>
SK_DEVICE void finish(const forward_params &p, const sk_teachers &k, const double (&total)[4]) {
    const bool has[2] = {has_ce(p), k.of[0].weight != 0 || k.of[1].weight != 0};
    double part[2];
    SK_UNROLL for (int i = 0; i < 2; i++) {
        const double denominator = sk_denominator<real>(p, total[2 + i]);
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
    SK_UNROLL for (int j = 0; j < SK_TEACHERS; j++) {
        *sk_cell<real>(p.levels, LEVEL_T + j, n, s) = 0;
        *sk_cell<double>(p.ratios, j, n, s) = 0;
    }
}

/* Leaves rows and what is saved; the block that ends last leaves loss, parts and denominators. */
template <typename T, int kVec, int kTeachers>
__global__ void __launch_bounds__(SK_BLOCK, 2)
    distill_kernel(const forward_params p, const sk_teachers k) {
    typedef sk_real<T> real;
    double total[4] = {0, 0, 0, 0};
    /* not sk_each_row: as a lambda the loop leaves two words of a row in local memory on sm_90 */
    for (int64_t row = sk_first_row(); row < SK_ROWS(&p); row += sk_row_step()) {
        const int64_t C = SK_DIM(&p, C), n = row / SK_DIM(&p, S), s = row % SK_DIM(&p, S);
        const real w = sk_weight<real>(p.weight, n, s);
        double sum[SK_CE_SUMS] = {}, kl = 0;
        real h = 0;
        if (sk_lane() == 0) save_none<real>(p, n, s);
        if (w != 0) h = visit<T, kVec, kTeachers>(p, k, n, s, sum, &kl);
        if (sk_lane() != 0) continue;
        const int64_t y = target_of(p, n, s, C - 1);
        const bool labelled = w != 0 && y >= 0;
        const bool taught = w != 0 && (y >= 0 || !p.mask_teachers || !p.target.data);
        const bool nothing = w != 0 && h == -INFINITY; /* but -inf, or NaN */
        const double level = w == 0 ? 0 : nothing ? NAN : sk_log_sum(sum);
        double ce = 0;
        if (labelled && has_ce(p))
            ce = p.ce_weight * w *
                 sk_conclude_ce(p.label_smoothing, C, sum, level, h,
                                sk_widen(sk_row<T>(p.logits, n, s)[y * p.logits.stride[1]]));
        kl = taught ? kl * w : 0;
        *sk_cell<real>(p.levels, LARGEST, n, s) =
            nothing ? (real)(-INFINITY + 0 * sum[SK_REST]) : h;
        *sk_cell<real>(p.levels, LEVEL, n, s) = (real)level;
        *sk_cell<real>(p.ce_rows, n, s) = (real)ce;
        *sk_cell<real>(p.kl_rows, n, s) = (real)kl;
        *sk_cell<real>(p.rows, n, s) = (real)ce + (real)kl;
        total[0] += ce;
        total[1] += kl;
        total[2] += labelled ? w : 0;
        total[3] += p.mask_teachers && p.target.data ? (labelled ? w : 0) : w;
    }
    if (sk_grid_sum(total, p.scratch.data) && sk_thread() == 0) finish<real>(p, k, total);
}

extern "C" int sk_cuda_distill(const struct distill_params *p, void *stream) {
    const sk_teachers k = teachers_of(*p);
    const std::initializer_list<const sk_arg *> tensors = {&p->logits, &p->teacher,
                                                           &p->second_teacher};
    if (k.of[1].weight == 0)
        return sk_launch_rows(SK_INSTANCES(distill_kernel, 1), SK_ROWS(p), tensors, stream, *p, k);
    return sk_launch_rows(SK_INSTANCES(distill_kernel, 2), SK_ROWS(p), tensors, stream, *p, k);
}
