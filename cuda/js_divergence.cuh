/* The formulas of js_divergence as its two files of kernels take them. */
#pragma once
#include "js_divergence.h"

#include "core/pair_loss.cuh"

#include "formula/js_divergence.h"

/* Jensen-Shannon has kernels of its own, half as long; the others share theirs. */
struct sk_of_jensen_shannon {
    static constexpr bool kLong = false;
    template <typename real>
    static __device__ bool smooth(const real *) {
        return true;
    }
    template <typename real>
    static __device__ sk_pair_result<real> at(const sk_pair_class<real> &x, const real *k) {
        return jensen_shannon_terms(x, k);
    }
};
struct sk_of_mixture {
    static constexpr bool kLong = true;
    template <typename real>
    static __device__ bool smooth(const real *) {
        return true;
    }
    template <typename real>
    static __device__ sk_pair_result<real> at(const sk_pair_class<real> &x, const real *k) {
        return mixture_terms(x, k);
    }
};
struct sk_of_total_variation {
    static constexpr bool kLong = false;
    template <typename real>
    static __device__ bool smooth(const real *) {
        return false;
    }
    template <typename real>
    static __device__ sk_pair_result<real> at(const sk_pair_class<real> &x, const real *k) {
        return total_variation_terms(x, k);
    }
};

#define SK_LAUNCH_JS(launch, op)                                                        \
    switch (sk_js_formula_of(p->kind, p->beta, p->teacher_weight, p->student_weight)) { \
    case SK_TOTAL_VARIATION:                                                            \
        return launch(op, student, teacher, sk_of_total_variation);                     \
    case SK_JENSEN_SHANNON:                                                             \
        return launch(op, student, teacher, sk_of_jensen_shannon);                      \
    default:                                                                            \
        return launch(op, student, teacher, sk_of_mixture);                             \
    }
