/* The CPU kernels of ops/js_divergence.h, by the formulas in ops/formula.
 *
 * Test: python -m pytest tests/test_js_divergence.py
 * Time: selfkd bench js_divergence --shape 1024x1000 */
#include "js_divergence.h"

#include "cpu/core/pair_loss.h"

#include "formula/js_divergence.h"

SK_PARAMS(js_divergence)
SK_PARAMS(js_divergence_backward)

SK_PAIR_FORMULA(jensen_shannon, true);
SK_PAIR_FORMULA(generalised, true);
SK_PAIR_FORMULA(mixture, true);
SK_PAIR_FORMULA(total_variation, false);

static const sk_pair_formula *const formulas[] = {
    [SK_JENSEN_SHANNON] = &jensen_shannon_formula,
    [SK_GENERALISED] = &generalised_formula,
    [SK_MIXTURE] = &mixture_formula,
    [SK_TOTAL_VARIATION] = &total_variation_formula,
};

SK_PAIR_KERNELS(js_divergence, student, teacher, temperature, teacher_temperature,
                formulas[sk_js_formula_of(p->kind, p->beta, p->teacher_weight, p->student_weight)]);
