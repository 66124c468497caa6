/* Divergence from a teacher of K classes on the GPU: one kernel forward, one backward, each reading
 * the logits once. See ops/topk_divergence.h and ops/formula/topk_divergence.h.
 *
 * Forward sums over the classes that are not listed: a bit of shared memory for each class of a
 * window says which are. Backward writes all classes as those that are not, then the listed ones
 * again.
 *
 * Test: python -m pytest tests/test_simt.py -k topk_divergence
 * Machine code: make sass OP=topk_divergence
 * Time: selfkd bench topk_divergence --device cuda */
#include "core/pair_loss.cuh"
#include "topk_divergence.h"

#include "formula/topk_divergence.h"

extern "C" {
SK_PARAMS(topk_divergence)
SK_PARAMS(topk_divergence_backward)
}
typedef struct topk_divergence_params forward_params;
typedef struct topk_divergence_backward_params backward_params;

enum { TOP, LOG_SUM, SLOPE, OTHERS, SAVED };

/* Everything in a group has been written that is read from here on. */
SK_DEVICE void sk_sync_group() {
    if (sk_group() > SK_WARP)
        __syncthreads();
    else
        __syncwarp();
}

/* ---- the classes that are listed ---- */

/* A row of them; T_q and the sides are those of the teacher's values. */
struct topk_row {
    sk_any_row logits, teacher;
    const sk_arg &indices;
    int64_t first, K, C;
    double T, T_q;

    /* The class at place k, -1 for none. */
    __device__ int64_t at(int64_t k) const {
        const int64_t i = first + k * indices.stride[1];
        const int64_t c = indices.dtype == SK_DT_I32 ? ((const int32_t *)indices.data)[i]
                                                     : ((const int64_t *)indices.data)[i];
        sk_assert(c >= -1 && c < C, "topk_divergence: indices has a class that there is not");
        return c;
    }
    /* Calls each(c, k) for the classes that are this thread's. */
    template <typename Each>
    __device__ void each(Each call) const {
        SK_ROLLED for (int64_t k = sk_lane(); k < K; k += sk_group()) {
            const int64_t c = at(k);
            if (c >= 0) call(c, k);
        }
    }
};

template <typename Params>
SK_DEVICE topk_row row_at(const Params &p, int64_t n, int64_t s) {
    return {sk_any_row_of(p.logits, n, s),
            sk_any_row_of(p.teacher, n, s),
            p.indices,
            n * p.indices.stride[0] + s * p.indices.stride[2],
            SK_DIM(&p, K),
            SK_DIM(&p, C),
            p.temperature,
            p.tail == SK_RENORMALIZE || p.teacher_logsumexp.data ? p.teacher_temperature : 1};
}

/* What the teacher's values are less: those that are renormalised their log-sum-exp, in the form of
 * a side; stored logits theirs; stored log-probabilities nothing. */
template <typename Params>
SK_DEVICE sk_side teacher_side(const Params &p, const topk_row &r, int64_t n, int64_t s) {
    const sk_arg &lse = p.teacher_logsumexp;
    if (p.tail != SK_RENORMALIZE) {
        const int64_t at = n * lse.stride[0] + s * lse.stride[1];
        return {0, lse.data ? sk_load_any(lse.data, lse.dtype, at) : 0};
    }
    double top[1] = {-INFINITY}, sum[1] = {0};
    r.each([&](int64_t, int64_t k) { top[0] = fmax(top[0], r.teacher(k)); });
    sk_group_reduce(top, sk_larger());
    r.each([&](int64_t, int64_t k) { sum[0] += exp((r.teacher(k) - top[0]) / r.T_q); });
    sk_group_reduce(sum, sk_add());
    return {top[0], log(sum[0])};
}

SK_DEVICE double log_of(double x, double T, const sk_side &side) {
    return (x - side.top) / T - side.log_sum;
}

/* The formula of a call, and its numbers. */
struct topk_formula {
    bool tv;
    double numbers[SK_UNEVEN + 1], uneven;
    __device__ sk_topk_term<double> at(double log_p, double log_q) const {
        const double larger = fmax(exp(log_p), exp(log_q)); /* NaN if d is */
        const double d = larger == 0 ? 0 : log_p - log_q;   /* not -inf - -inf */
        return sk_topk_term_of(tv, sk_class_from(d, larger), numbers, uneven);
    }
};
template <typename Params>
SK_DEVICE topk_formula formula_of(const Params &p) {
    topk_formula f = {p.kind == SK_TV,
                      SK_MIXTURE_OF(double, p.beta, p.teacher_weight, p.student_weight), 0};
    if (p.tail == SK_DROP && !f.tv) f.uneven = f.numbers[SK_UNEVEN];
    return f;
}

/* ---- forward ---- */

/* Bits for 128 classes for each thread of a group: a window of them, whole steps. */
enum { WORDS = 4 };

/* Leaves in `bits` which classes from `window` on are listed. */
SK_DEVICE void mark(const topk_row &r, int64_t window, unsigned *bits) {
    const int words = WORDS * sk_group();
    SK_ROLLED for (int w = sk_lane(); w < words; w += sk_group()) bits[w] = 0;
    sk_sync_group();
    r.each([&](int64_t c, int64_t) {
        const int64_t i = c - window;
        if (i < 0 || i >= 32 * words) return;
        const unsigned bit = 1u << (i % 32);
        sk_assert(!(atomicOr(&bits[i / 32], bit) & bit),
                  "topk_divergence: indices has a class twice");
    });
    sk_sync_group();
}

/* Calls each(window, end) for the windows of a row, whose bits are there. */
template <typename Each>
SK_DEVICE void each_window(const topk_row &r, unsigned *bits, Each each) {
    const int64_t width = 32 * WORDS * sk_group();
    SK_ROLLED for (int64_t window = 0; window < r.C; window += width) {
        mark(r, window, bits);
        each(window, window + width < r.C ? window + width : r.C);
        sk_sync_group(); /* the next window writes them again */
    }
}

/* The largest logit, and the sum of exp((x - top) / T), of the classes that are not listed. */
struct topk_tail {
    double top, sum;
};

template <typename T, int kVec>
SK_DEVICE topk_tail sum_tail(const forward_params &p, const topk_row &r, int64_t n, int64_t s,
                             unsigned *bits) {
    typedef sk_real<T> real;
    const T *const row = sk_keep(sk_row<T>(p.logits, n, s));
    const real log2e = sk_keep((real)(1.4426950408889634 / r.T));
    real top = sizeof(real) == 8 ? (real)-DBL_MAX : (real)-FLT_MAX; /* x - top is no NaN */
    double sum = 0;
    each_window(r, bits, [&](int64_t window, int64_t end) {
        SK_ROLLED for (int64_t base = window; base < end; base += sk_step<T>()) {
            real x[sk_items<T>], largest = top, part = 0;
            sk_load<T, kVec>(row, p.logits.stride[1], base, r.C, -INFINITY, x);
            SK_UNROLL for (int i = 0; i < sk_items<T>; i += kVec) {
                const int at = (int)(base - window) + sk_offset<kVec>(i);
                const unsigned listed = bits[at / 32] >> at % 32;
                SK_UNROLL for (int k = 0; k < kVec; k++) {
                    if (listed >> k & 1) x[i + k] = -INFINITY;
                    largest = sk_max(largest, x[i + k]);
                }
            }
            if (largest > top) sum *= sk_exp2((top - largest) * log2e);
            top = largest;
            SK_UNROLL for (int i = 0; i < sk_items<T>; i++) part += sk_exp2((x[i] - top) * log2e);
            sum += part;
        }
    });
    real most[1] = {top};
    sk_group_reduce(most, sk_larger());
    double total[1] = {sum == 0 ? 0 : sum * exp(((double)top - most[0]) / r.T)};
    sk_group_reduce(total, sk_add());
    return {most[0], total[0]};
}

/* The same sum once more in double. */
SK_DEVICE void sum_tail_again(const topk_row &r, unsigned *bits, topk_tail *tail) {
    double sum[1] = {0};
    each_window(r, bits, [&](int64_t window, int64_t end) {
        SK_ROLLED for (int64_t c = window + sk_lane(); c < end; c += sk_group()) {
            const int at = (int)(c - window);
            if (!(bits[at / 32] >> at % 32 & 1)) sum[0] += exp((r.logits(c) - tail->top) / r.T);
        }
    });
    sk_group_reduce(sum, sk_add());
    tail->sum = sum[0];
}

/* The loss of a row by the tail's largest logit and sum, and what is saved of it; whether the tail
 * is known well enough: see cpu/topk_divergence.c. */
SK_DEVICE bool conclude(const forward_params &p, const topk_row &r, const topk_tail &tail,
                        const sk_side &teacher, double (&saved)[SAVED], double *loss) {
    const topk_formula formula = formula_of(p);
    double top[1] = {tail.sum == 0 ? -INFINITY : tail.top}, sum[3] = {0, 0, 0};
    r.each([&](int64_t c, int64_t) { top[0] = fmax(top[0], r.logits(c)); });
    sk_group_reduce(top, sk_larger());
    r.each([&](int64_t c, int64_t k) {
        sum[0] += exp((r.logits(c) - top[0]) / r.T);
        sum[1] += exp(log_of(r.teacher(k), r.T_q, teacher));
        sum[2] += 1;
    });
    sk_group_reduce(sum, sk_add());
    const double below = (tail.top - top[0]) / r.T;
    const double rest = tail.sum == 0 ? 0 : tail.sum * exp(below);
    const sk_side student = {top[0], log(sum[0] + rest)};
    const double log_rest = tail.sum == 0 ? -INFINITY : below + log(tail.sum) - student.log_sum;
    sk_slope_sum<double> slope = {0, 0, 0, 0};
    double value[1] = {0}, part = 0;
    r.each([&](int64_t c, int64_t k) {
        const sk_topk_term<double> y =
            formula.at(log_of(r.logits(c), r.T, student), log_of(r.teacher(k), r.T_q, teacher));
        value[0] += y.value;
        sk_add_slope(&slope, y.p, y.slope, y.limit, &part);
    });
    sk_topk_term<double> others = {0, 0, 0, 0};
    if (p.tail == SK_BUCKET && sum[2] < r.C) {
        const double left = 1 - sum[1];
        others = formula.at(log_rest, log(left < SK_LEAST_TAIL ? SK_LEAST_TAIL : left));
    } else if (p.tail == SK_DROP) {
        others.p = exp(log_rest);
    }
    if (sk_lane() == 0) {
        value[0] += others.value;
        sk_add_slope(&slope, others.p, others.slope, others.limit, &part);
    }
    slope.rest = part;
    double slopes[2];
    sk_slope_totals(slope, slope, slopes);
    sk_group_reduce(value, sk_add());
    const double of_tail = others.p * (others.slope - slopes[0]) + others.limit;
    saved[TOP] = tail.sum == 0 ? -INFINITY : tail.top;
    saved[LOG_SUM] = student.log_sum;
    saved[SLOPE] = slopes[0];
    saved[OTHERS] = tail.sum == 0 ? 0 : of_tail / tail.sum;
    *loss = value[0];
    return !(fabs(of_tail) > 10 * fabs(value[0]));
}

/* Leaves rows, saved, loss and denominator. */
template <typename T, int kVec>
__global__ void __launch_bounds__(SK_BLOCK, 2) topk_divergence_kernel(const forward_params p) {
    sk_row_forward<T, SAVED>(p, [&](int64_t n, int64_t s, double w, double(&saved)[SAVED]) {
        SK_SHARED(unsigned, shared, WORDS *SK_BLOCK);
        unsigned *const bits = shared + threadIdx.y * WORDS * sk_group();
        const topk_row r = row_at(p, n, s);
        const sk_side teacher = teacher_side(p, r, n, s);
        topk_tail tail = {0, 0};
        double loss = 0;
        if (p.tail != SK_RENORMALIZE) tail = sum_tail<T, kVec>(p, r, n, s, bits);
        SK_ROLLED for (int i = 0; i < 2; i++) {
            if (i == 1) sum_tail_again(r, bits, &tail);
            const bool good = conclude(p, r, tail, teacher, saved, &loss);
            if (good || sizeof(T) == 8) break; /* the same in the whole group */
        }
        return w * loss;
    });
}

/* ---- backward ---- */

/* Leaves grad_logits. */
template <typename T, int kVec>
__global__ void __launch_bounds__(SK_BLOCK, 2)
    topk_divergence_backward_kernel(const backward_params p) {
    typedef sk_real<T> real;
    sk_each_row(p, [&](int64_t n, int64_t s) {
        const sk_incoming<real, backward_params> in(p, n, s);
        const topk_row r = row_at(p, n, s);
        const bool none = in.weight == 0 || in.grad == 0;
        const double factor = none ? 0 : in.grad * in.weight / (in.denominator * r.T);
        const double slope = in.saved(SLOPE);
        const real of_others = none ? 0 : (real)(in.saved(OTHERS) * factor);
        const real top = sk_keep((real)in.saved(TOP));
        const real log2e = sk_keep((real)(1.4426950408889634 / r.T));
        const T *const row = sk_keep(sk_row<T>(p.logits, n, s));
        T *const to = sk_keep(sk_row<T>(p.grad_logits, n, s));
        SK_ROLLED for (int64_t base = 0; base < r.C; base += sk_step<T>()) {
            real x[sk_items<T>] = {};
            if (of_others != 0) {
                sk_load<T, kVec>(row, p.logits.stride[1], base, r.C, 0, x);
                SK_UNROLL for (int i = 0; i < sk_items<T>; i++) x[i] =
                    sk_exp2((x[i] - top) * log2e) * of_others;
            }
            sk_store<T, kVec>(to, p.grad_logits.stride[1], base, r.C, x);
        }
        if (none) return; /* the same in the whole group */
        const topk_formula formula = formula_of(p);
        const sk_side teacher = teacher_side(p, r, n, s);
        double h[1] = {in.saved(TOP)};
        r.each([&](int64_t c, int64_t) { h[0] = fmax(h[0], r.logits(c)); });
        sk_group_reduce(h, sk_larger());
        const sk_side student = {h[0], in.saved(LOG_SUM)};
        sk_sync_group(); /* the listed classes are written over */
        r.each([&](int64_t c, int64_t k) {
            const sk_topk_term<double> y =
                formula.at(log_of(r.logits(c), r.T, student), log_of(r.teacher(k), r.T_q, teacher));
            sk_narrow((real)((y.p * (y.slope - slope) + y.limit) * factor),
                      to + c * p.grad_logits.stride[1]);
        });
    });
}

extern "C" int sk_cuda_topk_divergence(const struct topk_divergence_params *p, void *stream) {
    return sk_launch_rows<SK_WARP>(SK_INSTANCES(topk_divergence_kernel), SK_ROWS(p), {&p->logits},
                                   stream, *p);
}

extern "C" int sk_cuda_topk_divergence_backward(const struct topk_divergence_backward_params *p,
                                                void *stream) {
    return sk_launch_rows<SK_WARP>(SK_INSTANCES(topk_divergence_backward_kernel), SK_ROWS(p),
                                   {&p->logits, &p->grad_logits}, stream, *p);
}
