/* The rows of the SD-Dropout objective, for the head that makes their logits chunk by chunk: a
 * private operator, the only one that writes over its inputs.
 *
 *   z, u, v     logits of the features and of two dropout samples of them
 *   y           = (1 - label_smoothing) * onehot(target) + label_smoothing / C
 *   w           = weight[n], 1 where none is given; 0 where the target is ignore_index. Of any
 *                 sign: it may be a weight times the incoming gradient of its row
 *   l[n]        = -sum_c y log softmax(z) + kl_weight * (the loss of sd_dropout_kl(u, v))
 *   rows[n]     = w * l[n], exactly 0 where w is 0 (whatever the logits hold)
 *
 * If differentiate, z, u and v hold the gradients of sum(rows) afterwards: w (softmax(z) - y), and
 * those of ops/sd_dropout_kl.h times kl_weight w.
 *
 * Source: as ops/sd_dropout_kl.h; in the authors' code the cross-entropy sees the logits without
 * dropout. */
#pragma once
#include "core/contract.h"

/* clang-format off */
#define sd_dropout_head_rows_CONTRACT(X)           \
    X(INOUT,  z,               "NC", FLOATING)      \
    X(INOUT,  u,               "NC", SAME)          \
    X(INOUT,  v,               "NC", SAME)          \
    X(IN,     target,          "N",  INDEX)         \
    X(OPT,    weight,          "N",  WEIGHT)        \
    X(REAL,   temperature,     POSITIVE, 3.0)       \
    X(REAL,   kl_weight,       NONNEGATIVE, 1.0)    \
    X(REAL,   forward_weight,  NONNEGATIVE, 1.0)    \
    X(REAL,   reverse_weight,  NONNEGATIVE, 1.0)    \
    X(BOOL,   detach_target,   ANY, 0)              \
    X(REAL,   label_smoothing, FRACTION, 0.0)       \
    X(INT,    ignore_index,    ANY, -100)           \
    X(BOOL,   differentiate,   ANY, 1)              \
    X(OUT,    rows,            "N",  ACC)
