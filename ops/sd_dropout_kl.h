/* SD-Dropout: KL divergence between two dropout views of one batch, in both directions.
 *
 *   p = softmax(u / T), q = softmax(v / T) over C; w = weight[n,s] >= 0, 1 where none is given
 *   l[n,s]    = T^2 * (wf * KL(p||q) + wr * KL(q||p))
 *   rows[n,s] = w * l[n,s], exactly 0 where w is 0 (whatever the logits hold)
 *   loss      = sum(rows) / denominator
 *   denominator: reduction mean: divisor, else sum(w); sum and none: 1
 *
 *   dl/du = T * ( wf * p * (d - KL(p||q)) + wr * (p - q))     with d = log p - log q
 *   dl/dv = T * (-wr * q * (d + KL(q||p)) - wf * (p - q))
 *   detach_target drops the first term of each: every KL then sees its target as a constant.
 *   needs_u, needs_v: 0 where that gradient is not wanted.
 *
 * saved holds, for each row, lse(u/T), log-ratio dl = lse(u/T) - lse(v/T), KL(p||q), KL(q||p).
 * Where u is nothing but -inf, as in a part of the classes it may be, lse(v/T) stands in the place
 * of dl; both KL and the loss are NaN where u or v is.
 *
 * Source: Lee, Park, Seo, Kang: "Self-Knowledge Distillation via Dropout", arXiv 2208.05642; the
 * loss as in the authors' code, yechanp/self_kd, models/methods.py (there wf = wr = 1, T = 3,
 * nothing detached). The gradients are our own. */
#pragma once
#include "core/contract.h"

/* clang-format off */
#define sd_dropout_kl_CONTRACT(X)                         \
    X(IN,      u,              "NC*", FLOATING)           \
    X(IN,      v,              "NC*", SAME)               \
    X(OPT,     weight,         "N*",  WEIGHT)             \
    X(OPT,     divisor,        "",    ACC)                \
    X(REAL,    temperature,    POSITIVE, 3.0)             \
    X(REAL,    forward_weight, NONNEGATIVE, 1.0)          \
    X(REAL,    reverse_weight, NONNEGATIVE, 1.0)          \
    X(BOOL,    detach_target,  ANY, 0)                    \
    X(CHOICE,  reduction,      "none|mean|sum", 1)        \
    X(OUT,     loss,           "",    ACC)                \
    X(OUT,     rows,           "N*",  ACC)                \
    X(OUT,     saved,          "4N*", F64)                \
    X(OUT,     denominator,    "",    ACC)                \
    X(SCRATCH, scratch,        SK_REDUCE_BYTES)

#define sd_dropout_kl_backward_CONTRACT(X)                \
    X(GRAD,    grad,           "N*",  ACC)                \
    X(IN,      u,              "NC*", FLOATING)           \
    X(IN,      v,              "NC*", SAME)               \
    X(OPT,     weight,         "N*",  WEIGHT)             \
    X(IN,      saved,          "4N*", F64)                \
    X(IN,      denominator,    "",    ACC)                \
    X(REAL,    temperature,    POSITIVE, 3.0)             \
    X(REAL,    forward_weight, NONNEGATIVE, 1.0)          \
    X(REAL,    reverse_weight, NONNEGATIVE, 1.0)          \
    X(BOOL,    detach_target,  ANY, 0)                    \
    X(BOOL,    needs_u,        ANY, 1)                    \
    X(BOOL,    needs_v,        ANY, 1)                    \
    X(LIKE,    grad_u,         u)                         \
    X(LIKE,    grad_v,         v)
