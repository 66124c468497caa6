/* clang-format off */
/* Divergence of two rows of logits from their mixture: the generalised Jensen-Shannon divergence and
 * its relatives, with gradients to both sides.
 *
 *   p = softmax(student / T), q = softmax(teacher / T') over C, M = beta q + (1 - beta) p
 *   kind js   l[n,s] = a KL(q||M) + b KL(p||M), a = teacher_weight, b = student_weight
 *   kind tv   l[n,s] = 1/2 sum |p - q|
 *   w = weight[n,s] >= 0, 1 where none is given
 *   rows[n,s] = w * l[n,s], exactly 0 where w is 0 (whatever the logits hold)
 *   loss      = sum(rows) / denominator
 *   denominator: reduction mean: divisor, else sum(w); sum and none: 1
 *
 *   dl/dstudent = p (f - sum p f) / T    f = (1-beta) (a (1-beta) - b beta) (p - q)/M - b log(M/p)
 *   dl/dteacher = q (g - sum q g) / T'   g = beta (a (1-beta) - b beta) (p - q)/M - a log(M/q)
 *   kind tv: f = 1/2 sign(p - q) = -g, 0 where p = q
 * needs_student, needs_teacher: 0 where that gradient is not wanted.
 *
 * a = beta, b = 1 - beta: generalised Jensen-Shannon (beta 0.5: Jensen-Shannon). beta 0, a 1: KL(q||p);
 * beta 1, b 1: KL(p||q). b = 0: skewed KL; a = 0: skewed reverse KL.
 *
 * saved holds, for each row, lse(student/T), what it lies above lse(teacher/T'), sum p f and sum q g.
 *
 * Sources: Lin, "Divergence measures based on the Shannon entropy", IEEE Trans. Inf. Theory 37 (1991);
 * Agarwal et al., "On-Policy Distillation of Language Models" (GKD), arXiv 2306.13649, section 3; Ko et
 * al., "DistiLLM", arXiv 2402.03898, section 3.1; Wen et al., "f-Divergence Minimization for
 * Sequence-Level Knowledge Distillation", arXiv 2307.15190 (total variation). The form in which nothing
 * cancels is our own (formula/mixture.h). */
#pragma once
#include "core/contract.h"

#define js_divergence_CONTRACT(X)                       \
    X(IN,      student,             "NC*", FLOATING)    \
    X(IN,      teacher,             "NC*", SAME)        \
    X(OPT,     weight,              "N*",  WEIGHT)      \
    X(OPT,     divisor,             "",    ACC)         \
    X(REAL,    beta,                FRACTION, 0.5)      \
    X(REAL,    teacher_weight,      NONNEGATIVE, 0.5)   \
    X(REAL,    student_weight,      NONNEGATIVE, 0.5)   \
    X(REAL,    temperature,         POSITIVE, 1.0)      \
    X(REAL,    teacher_temperature, POSITIVE, 1.0)      \
    X(CHOICE,  kind,                "js|tv", 0)         \
    X(CHOICE,  reduction,           "none|mean|sum", 1) \
    X(OUT,     loss,                "",    ACC)         \
    X(OUT,     rows,                "N*",  ACC)         \
    X(OUT,     saved,               "4N*", F64)         \
    X(OUT,     denominator,         "",    ACC)         \
    X(SCRATCH, scratch,             SK_REDUCE_BYTES)

#define js_divergence_backward_CONTRACT(X)              \
    X(GRAD,    grad,                "N*",  ACC)         \
    X(IN,      student,             "NC*", FLOATING)    \
    X(IN,      teacher,             "NC*", SAME)        \
    X(OPT,     weight,              "N*",  WEIGHT)      \
    X(IN,      saved,               "4N*", F64)         \
    X(IN,      denominator,         "",    ACC)         \
    X(REAL,    beta,                FRACTION, 0.5)      \
    X(REAL,    teacher_weight,      NONNEGATIVE, 0.5)   \
    X(REAL,    student_weight,      NONNEGATIVE, 0.5)   \
    X(REAL,    temperature,         POSITIVE, 1.0)      \
    X(REAL,    teacher_temperature, POSITIVE, 1.0)      \
    X(CHOICE,  kind,                "js|tv", 0)         \
    X(BOOL,    needs_student,       ANY, 1)             \
    X(BOOL,    needs_teacher,       ANY, 1)             \
    X(LIKE,    grad_student,        student)            \
    X(LIKE,    grad_teacher,        teacher)
