/* Adversarial losses of a discriminator's scores: r of real examples, f of fakes.
 *
 *   mode    a(r)                b(f)
 *   bce     softplus(-r)        softplus(f)
 *   hinge   relu(1 - r)         relu(1 + f)
 *   lsgan   (r - 1)^2 / 2       f^2 / 2
 *   wgan    -r                  f
 *
 *   loss      = sum(rows) / denominator of r + sum(fake_rows) / denominator of f
 *   denominator: reduction mean: N and M; sum: 1
 *   reduction none: rows[n] = a(real[n]) + b(fake[n]), N = M (what lies beyond either end is left
 *   out), and loss = sum(rows)
 *
 * Side generator: the loss of the fakes' maker, who wants them taken for real. `real` are then the
 * scores of the fakes, `fake` is empty, which here adds 0 to a mean, and the hinge is open: a(r) =
 * -r, b(f) = f.
 *
 *   softplus(x) = max(x, 0) + log1p(e^-|x|), with the gradient sigmoid(x)
 *   da/dr = -sigmoid(-r); -1 where 1 - r > 0, else 0; r - 1; -1
 *   db/df = sigmoid(f); 1 where 1 + f > 0, else 0; f; 1
 *
 * Source: Goodfellow et al., arXiv 1406.2661 (bce; for the generator its non-saturating form);
 * hinge: Lim and Ye, arXiv 1705.02894; lsgan: Mao et al., arXiv 1611.04076, a = 0, b = c = 1; wgan:
 * Arjovsky et al., arXiv 1701.07875. */
#pragma once
#include "core/contract.h"

enum sk_adversarial_mode { SK_BCE, SK_HINGE, SK_LSGAN, SK_WGAN };
enum sk_adversarial_side { SK_DISCRIMINATOR, SK_GENERATOR };

/* clang-format off */
#define adversarial_CONTRACT(X)                                 \
    X(IN,      real,           "N",   FLOATING)                 \
    X(IN,      fake,           "M",   SAME)                     \
    X(CHOICE,  mode,           "bce|hinge|lsgan|wgan", 0)       \
    X(CHOICE,  side,           "discriminator|generator", 0)    \
    X(CHOICE,  reduction,      "none|mean|sum", 1)              \
    X(OUT,     loss,           "",    ACC)                      \
    X(OUT,     rows,           "N",   ACC)                      \
    X(OUT,     fake_rows,      "M",   ACC)                      \
    X(SCRATCH, scratch,        SK_REDUCE_BYTES)

#define adversarial_backward_CONTRACT(X)                        \
    X(GRAD,    grad,           "N",   ACC)                      \
    X(IN,      real,           "N",   FLOATING)                 \
    X(IN,      fake,           "M",   SAME)                     \
    X(CHOICE,  mode,           "bce|hinge|lsgan|wgan", 0)       \
    X(CHOICE,  side,           "discriminator|generator", 0)    \
    X(CHOICE,  reduction,      "none|mean|sum", 1)              \
    X(LIKE,    grad_real,      real)                            \
    X(LIKE,    grad_fake,      fake)
