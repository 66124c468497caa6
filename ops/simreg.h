/* SimReg: regression of a teacher's features, row by row, up to the length of both.
 *
 *   x_hat = x / max(|x|, eps), t_hat = t / max(|t|, eps), eps = 1e-12; w = weight[n,s] >= 0, or 1
 *   l[n,s]    = |x_hat - t_hat|^2, which is 2 - 2 cos(x, t);  |x - t|^2 if not normalize
 *   rows[n,s] = w * l[n,s], exactly 0 where w is 0 (whatever the features hold)
 *   loss      = sum(rows) / denominator
 *   denominator: reduction mean: divisor, else sum(w); sum and none: 1
 *
 *   dl/dx = 2/|x| * ((x_hat - t_hat) - x_hat * h),  h = x_hat . (x_hat - t_hat), which is l/2
 *   Where |x| < eps the length of x_hat is free: 2/eps instead of 2/|x|, and h = 0. Not normalize:
 *   2 (x - t).
 *
 * A row runs along C: (N, C), or (N, C, ...) with a row for each position. saved holds, for each
 * row, what x and t are multiplied by, and h.
 *
 * Source: Navaneet, Koohpayegani, Tejankar, Pirsiavash: "SimReg: Regression as a Simple Yet
 * Effective Tool for Self-supervised Knowledge Distillation", arXiv 2201.05131; the loss as in the
 * authors' code, UCDvision/simreg, simreg.py. The gradient is our own. */
#pragma once
#include "core/contract.h"

/* clang-format off */
#define simreg_CONTRACT(X)                          \
    X(IN,      student,     "NC*", FLOATING)        \
    X(IN,      target,      "NC*", CONSTANT)        \
    X(OPT,     weight,      "N*",  WEIGHT)          \
    X(OPT,     divisor,     "",    ACC)             \
    X(BOOL,    normalize,   ANY, 1)                 \
    X(CHOICE,  reduction,   "none|mean|sum", 1)     \
    X(OUT,     loss,        "",    ACC)             \
    X(OUT,     rows,        "N*",  ACC)             \
    X(OUT,     saved,       "3N*", F64)             \
    X(OUT,     denominator, "",    ACC)             \
    X(SCRATCH, scratch,     SK_REDUCE_BYTES)

#define simreg_backward_CONTRACT(X)                 \
    X(GRAD,    grad,        "N*",  ACC)             \
    X(IN,      student,     "NC*", FLOATING)        \
    X(IN,      target,      "NC*", CONSTANT)        \
    X(OPT,     weight,      "N*",  WEIGHT)          \
    X(IN,      saved,       "3N*", F64)             \
    X(IN,      denominator, "",    ACC)             \
    X(LIKE,    grad_student, student)
