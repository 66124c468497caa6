/* clang-format off */
/* Divergence of student and teacher from their mixture where the teacher is known at K classes of each
 * row only, as it is stored: the family of js_divergence.h.
 *
 *   p = softmax(logits / T) over all C classes
 *   log q_k = teacher_k, or teacher_k / T' - teacher_logsumexp where that is given, at class indices_k
 *   tail bucket       the K classes and, unless all C are listed, one more: all that are not, with
 *                     p_tail = sum of their p, q_tail = max(1 - sum q_k, 1e-7)
 *   tail renormalize  the K classes, p = softmax(logits / T) and q = softmax(teacher / T') over them
 *   tail drop         the K classes, with p and q as they are
 *   M = beta q + (1 - beta) p, a = teacher_weight, b = student_weight, sums over these classes
 *   kind js   l[n,s] = a sum [q log(q/M) - q + M] + b sum [p log(p/M) - p + M]; drop: without - q + M
 *             and - p + M, which otherwise add up to 0, but for what q is rounded by
 *   kind tv   l[n,s] = 1/2 sum |p - q|
 *   w = weight[n,s] >= 0, 1 where none is given
 *   rows[n,s] = w * l[n,s], exactly 0 where w is 0 (whatever logits and teacher hold)
 *   loss      = sum(rows) / denominator
 *   denominator: reduction mean: divisor, else sum(w); sum and none: 1
 *
 *   dl/dlogits_c = p_c (f_c - sum p f) / T, with f as in js_divergence.h (drop: less a (1-beta) - b beta)
 *   of a listed class, that of the tail for the others; drop: 0 for the others; renormalize: their
 *   gradient is 0
 *
 * A place with index -1 is none, whatever the teacher holds there. saved holds, for each row, the largest
 * logit t that is not listed; log sum exp((logits - h) / T) with h the largest of all that count; sum p f;
 * and what exp((logits - t) / T) is multiplied by in the gradient of a class that is not listed.
 *
 * Sources: as js_divergence.h; the tail as one class as in TRL's SDFT and SDPO trainers (Huebotter et
 * al., "Reinforcement Learning via Self-Distillation", arXiv 2601.20802). */
#pragma once
#include "core/contract.h"

#define topk_divergence_CONTRACT(X)                         \
    X(IN,      logits,              "NC*", FLOATING)        \
    X(IN,      indices,             "NK*", CLASSES)         \
    X(IN,      teacher,             "NK*", CONSTANT)        \
    X(OPT,     teacher_logsumexp,   "N*",  CONSTANT)        \
    X(OPT,     weight,              "N*",  WEIGHT)          \
    X(OPT,     divisor,             "",    ACC)             \
    X(CHOICE,  tail,                "bucket|renormalize|drop", 0) \
    X(REAL,    beta,                FRACTION, 0.5)          \
    X(REAL,    teacher_weight,      NONNEGATIVE, 0.5)       \
    X(REAL,    student_weight,      NONNEGATIVE, 0.5)       \
    X(REAL,    temperature,         POSITIVE, 1.0)          \
    X(REAL,    teacher_temperature, POSITIVE, 1.0)          \
    X(CHOICE,  kind,                "js|tv", 0)             \
    X(CHOICE,  reduction,           "none|mean|sum", 1)     \
    X(OUT,     loss,                "",    ACC)             \
    X(OUT,     rows,                "N*",  ACC)             \
    X(OUT,     saved,               "4N*", F64)             \
    X(OUT,     denominator,         "",    ACC)             \
    X(SCRATCH, scratch,             SK_REDUCE_BYTES)

#define topk_divergence_backward_CONTRACT(X)                \
    X(GRAD,    grad,                "N*",  ACC)             \
    X(IN,      logits,              "NC*", FLOATING)        \
    X(IN,      indices,             "NK*", CLASSES)         \
    X(IN,      teacher,             "NK*", CONSTANT)        \
    X(OPT,     teacher_logsumexp,   "N*",  CONSTANT)        \
    X(OPT,     weight,              "N*",  WEIGHT)          \
    X(IN,      saved,               "4N*", F64)             \
    X(IN,      denominator,         "",    ACC)             \
    X(CHOICE,  tail,                "bucket|renormalize|drop", 0) \
    X(REAL,    beta,                FRACTION, 0.5)          \
    X(REAL,    teacher_weight,      NONNEGATIVE, 0.5)       \
    X(REAL,    student_weight,      NONNEGATIVE, 0.5)       \
    X(REAL,    temperature,         POSITIVE, 1.0)          \
    X(REAL,    teacher_temperature, POSITIVE, 1.0)          \
    X(CHOICE,  kind,                "js|tv", 0)             \
    X(LIKE,    grad_logits,         logits)
