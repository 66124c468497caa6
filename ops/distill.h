/* Distillation: cross-entropy, and the KL divergence from up to two teachers, in one pass over the
 * student's logits.
 *
 *   p_T       = softmax(logits / T) over C;  w = weight[n,s] >= 0, 1 where none is given
 *   q         = softmax(teacher / teacher_temperature), of its logarithm if it holds "probs"
 *   y         = (1 - label_smoothing) * onehot(target) + label_smoothing / C
 *   V         = the positions whose target is not ignore_index; M = V if mask_teachers, else all
 *   ce_rows   = ce_weight * w * -sum_c y log p_1                             over V, 0 elsewhere
 *   kl_rows   = sum over teachers of teacher_weight * T^2 * w * KL(q || p_T)  over M, 0 elsewhere
 *   rows      = ce_rows + kl_rows, exactly 0 where w is 0 (whatever the logits hold)
 *   ce        = sum(ce_rows) / denominators[0], 0 without a target or with ce_weight 0
 *   kl        = sum(kl_rows) / denominators[1], 0 without a teacher;   loss = ce + kl
 *   denominators: reduction mean: divisor, else the sums of w over V and over M; sum and none: 1
 *
 *   d loss/d logits = ce_weight * w / denominators[0] * (p_1 - y)
 *                   + sum over teachers of teacher_weight * T * w / denominators[1] * (p_T - q)
 *
 * second_* are those of the second teacher; a teacher of weight 0 is not looked at. With h the
 * largest logit of a row, levels holds h and log sum exp((logits - h)/T) for T = 1 and both
 * temperatures; ratios holds lse(logits/T) - lse(teacher/teacher_temperature). Where the logits are
 * nothing but -inf, as in a part of the classes they may be, h is -inf, and ratios holds the
 * teacher's lse alone; the loss is NaN where logits or teacher are.
 *
 * The backward operator also serves a part of the classes, given the levels and ratios of the
 * whole: `classes` is then C of the whole (0: this is the whole), target the index in the part, or
 * its number of classes where the target is elsewhere.
 *
 * Sources: Hinton, Vinyals, Dean, arXiv 1503.02531 (KD); Ji et al., "Refine Myself by Teaching
 * Myself", arXiv 2103.08273 (FRSKD, soft labels); Kim et al., arXiv 2006.12000 (PS-KD). The
 * gradients are our own. */
#pragma once
#include "core/contract.h"

/* clang-format off */
#define distill_CONTRACT(X)                                              \
    X(IN,      logits,                     "NC*", FLOATING)              \
    X(OPT,     target,                     "N*",  INDEX)                 \
    X(OPT,     teacher,                    "NC*", TEACHER)               \
    X(OPT,     second_teacher,             "NC*", TEACHER)               \
    X(OPT,     weight,                     "N*",  WEIGHT)                \
    X(OPT,     divisor,                    "",    ACC)                   \
    X(REAL,    ce_weight,                  NONNEGATIVE, 1.0)             \
    X(REAL,    label_smoothing,            FRACTION, 0.0)                \
    X(INT,     ignore_index,               ANY, -100)                    \
    X(REAL,    teacher_weight,             NONNEGATIVE, 1.0)             \
    X(REAL,    temperature,                POSITIVE, 4.0)                \
    X(REAL,    teacher_temperature,        POSITIVE, 4.0)                \
    X(CHOICE,  teacher_kind,               "logits|probs|log_probs", 0)  \
    X(REAL,    second_teacher_weight,      NONNEGATIVE, 1.0)             \
    X(REAL,    second_temperature,         POSITIVE, 4.0)                \
    X(REAL,    second_teacher_temperature, POSITIVE, 4.0)                \
    X(CHOICE,  second_teacher_kind,        "logits|probs|log_probs", 0)  \
    X(BOOL,    mask_teachers,              ANY, 0)                       \
    X(CHOICE,  reduction,                  "none|mean|sum", 1)           \
    X(OUT,     loss,                       "",    ACC)                   \
    X(OUT,     ce,                         "",    ACC)                   \
    X(OUT,     kl,                         "",    ACC)                   \
    X(OUT,     rows,                       "N*",  ACC)                   \
    X(OUT,     ce_rows,                    "N*",  ACC)                   \
    X(OUT,     kl_rows,                    "N*",  ACC)                   \
    X(OUT,     levels,                     "4N*", ACC)                   \
    X(OUT,     ratios,                     "2N*", F64)                   \
    X(OUT,     denominators,               "2",   ACC)                   \
    X(SCRATCH, scratch,                    SK_REDUCE_BYTES_OF(4))

#define distill_backward_CONTRACT(X)                                     \
    X(GRAD,    grad,                       "N*",  ACC)                   \
    X(IN,      logits,                     "NC*", FLOATING)              \
    X(OPT,     target,                     "N*",  INDEX)                 \
    X(OPT,     teacher,                    "NC*", TEACHER)               \
    X(OPT,     second_teacher,             "NC*", TEACHER)               \
    X(OPT,     weight,                     "N*",  WEIGHT)                \
    X(IN,      levels,                     "4N*", ACC)                   \
    X(IN,      ratios,                     "2N*", F64)                   \
    X(IN,      denominators,               "2",   ACC)                   \
    X(REAL,    ce_weight,                  NONNEGATIVE, 1.0)             \
    X(REAL,    label_smoothing,            FRACTION, 0.0)                \
    X(INT,     ignore_index,               ANY, -100)                    \
    X(REAL,    teacher_weight,             NONNEGATIVE, 1.0)             \
    X(REAL,    temperature,                POSITIVE, 4.0)                \
    X(REAL,    teacher_temperature,        POSITIVE, 4.0)                \
    X(CHOICE,  teacher_kind,               "logits|probs|log_probs", 0)  \
    X(REAL,    second_teacher_weight,      NONNEGATIVE, 1.0)             \
    X(REAL,    second_temperature,         POSITIVE, 4.0)                \
    X(REAL,    second_teacher_temperature, POSITIVE, 4.0)                \
    X(CHOICE,  second_teacher_kind,        "logits|probs|log_probs", 0)  \
    X(BOOL,    mask_teachers,              ANY, 0)                       \
    X(INT,     classes,                    NONNEGATIVE, 0)               \
    X(LIKE,    grad_logits,                logits)
/* clang-format off */
