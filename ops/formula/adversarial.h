/* The terms of ops/adversarial.h, for C and CUDA.
 *
 * Both sides come from one function of a term: the fakes' b(f) is a(-f), but for lsgan, where the
 * fakes have a target of their own. So a term is named by y = r or y = -f, and lsgan's target. */
#pragma once
#include "../adversarial.h"
#include "core/both.h"

/* What kind of term a call has: the generator's hinge is open, like wgan. */
SK_BOTH int64_t sk_adversarial_term(int64_t mode, int64_t side) {
    return side == SK_GENERATOR && mode == SK_HINGE ? SK_WGAN : mode;
}

/* e^-|x|: softplus and sigmoid both are functions of it that lose nothing. */
SK_FORMULA real sk_adversarial_decay(real x) { return sk_exp_below(x < 0 ? x : -x); }

SK_FORMULA real sk_adversarial_value(int64_t term, real y, real target) {
    const real room = 1 - y, d = y - target;
    switch (term) {
    case SK_BCE:
        return (y > 0 ? 0 : -y) + sk_log1p(sk_adversarial_decay(y));
    case SK_HINGE:
        return room <= 0 ? 0 : room; /* a NaN stays one */
    case SK_LSGAN:
        return (real)0.5 * d * d;
    default:
        return -y;
    }
}

/* A value as a sum takes it: in double where a finite score may have one too large for a float. */
SK_FORMULA double sk_adversarial_summand(int64_t term, real y, real target, real value) {
    const double d = (double)y - (double)target;
    return term == SK_LSGAN && isinf(value) ? 0.5 * d * d : (double)value;
}

/* The derivative of the value by y. */
SK_FORMULA real sk_adversarial_slope(int64_t term, real y, real target) {
    const real e = term == SK_BCE ? sk_adversarial_decay(y) : 0;
    switch (term) {
    case SK_BCE:
        return -(y > 0 ? e : 1) / (1 + e);
    case SK_HINGE:
        return 1 - y <= 0 ? 0 : -1;
    case SK_LSGAN:
        return y - target;
    default:
        return -1;
    }
}
