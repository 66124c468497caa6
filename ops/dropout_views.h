/* The three views that SD-Dropout compares: features as they are and two dropout samples of them,
 * stacked for one matrix product.
 *
 *   views[0,n,c] = features[n,c]
 *   views[v,n,c] = features[n,c] / (1 - p) where kept, else exactly 0 (whatever the feature is), v
 * = 1, 2 kept: word >= floor(p * 2^32) word: number e % 4 of the four that Philox4x32-10 makes of
 * the counter (low and high half of e / 4, v - 1, 0) under the key (low and high half of seed), e =
 * (first_row + n) * C + c, an unsigned number of 64 bits
 *
 *   dfeatures[n,c] = g[0,n,c] + sum over v of g[v,n,c] / (1 - p) where kept, with g the gradient of
 *   views: the masks come from the seed again.
 *
 * first_row is the place of row 0 in the batch, so that parts of a batch get what the whole would.
 *
 * Source: Lee, Park, Seo, Kang: "Self-Knowledge Distillation via Dropout", arXiv 2208.05642; the
 * samples as in the authors' code, yechanp/self_kd. Philox: see ops/core/philox.h. */
#pragma once
#include "core/contract.h"

/* clang-format off */
#define dropout_views_CONTRACT(X)                   \
    X(IN,      features,    "NC",  FLOATING)        \
    X(IN,      seed,        "",    SEED)            \
    X(REAL,    p,           BELOW_ONE, 0.5)         \
    X(INT,     first_row,   NONNEGATIVE, 0)         \
    X(OUT,     views,       "3NC", SAME)

#define dropout_views_backward_CONTRACT(X)          \
    X(GRAD,    grad,        "3NC", SAME)            \
    X(IN,      features,    "NC",  FLOATING)        \
    X(IN,      seed,        "",    SEED)            \
    X(REAL,    p,           BELOW_ONE, 0.5)         \
    X(INT,     first_row,   NONNEGATIVE, 0)         \
    X(LIKE,    grad_features, features)
