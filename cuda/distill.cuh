/* What both kernels of distillation know: its teachers and targets. Formulas in ops/distill.h. */
#pragma once
#include "core/ce.cuh"
#include "core/row_loss.cuh"
#include "core/teacher.cuh"
#include "distill.h"

enum { LARGEST, LEVEL, LEVEL_T }; /* planes of `levels` */

template <typename params>
static sk_teachers teachers_of(const params &p) {
    const double coldest = fmin(fmin(p.temperature, p.teacher_temperature),
                                fmin(p.second_temperature, p.second_teacher_temperature));
    return {{sk_teacher_of(p.teacher, p.teacher_weight, p.temperature, p.teacher_temperature,
                           p.teacher_kind),
             sk_teacher_of(p.second_teacher, p.second_teacher_weight, p.second_temperature,
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
