/* The formulas of js_divergence as its two files of kernels take them. */
#pragma once
#include "js_divergence.h"

#include "core/pair_loss.cuh"

#include "formula/js_divergence.h"

/* Jensen-Shannon has kernels of its own, half as long; the others share theirs. */
SK_PAIR_FORMULA(jensen_shannon, false, true);
SK_PAIR_FORMULA(mixture, true, true);
SK_PAIR_FORMULA(total_variation, false, false);

#define SK_LAUNCH_JS(launch, op)                                                        \
    switch (sk_js_formula_of(p->kind, p->beta, p->teacher_weight, p->student_weight)) { \
    case SK_TOTAL_VARIATION:                                                            \
        return launch(op, student, teacher, total_variation_formula);                   \
    case SK_JENSEN_SHANNON:                                                             \
        return launch(op, student, teacher, jensen_shannon_formula);                    \
    default:                                                                            \
        return launch(op, student, teacher, mixture_formula);                           \
    }
