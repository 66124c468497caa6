/* Divergences from a mixture, of a class, for C and CUDA: with M = beta q + (1 - beta) p,
 *
 *   phi = a [q log(q/M) - q + M] + b [p log(p/M) - p + M]
 *
 * Summed over classes that have a p and a q of 1 together it is a KL(q||M) + b KL(p||M), for what is
 * added to the two logarithms then is 0. With it neither term is negative, so nothing cancels.
 *
 * Nor does anything within a term. With L the larger and S the smaller of p and q, w what L weighs in
 * M, and g(x) = x - log(1 + x), which is of second order, a term is h_L = g(M/L - 1) times L, or h_S =
 * g(M/S - 1) times S. One of them is found from g, the one whose argument is small, and the other from
 * it, since log(M/S) = log(M/L) + |d|.
 *
 *   dphi/dp = (1 - beta) (a (1 - beta) - b beta) (p - q)/M - b log(M/p)
 *   dphi/dq = beta (a (1 - beta) - b beta) (p - q)/M - a log(M/q) */
#pragma once
#include "formula/pair_class.h"

/* beta, a, b and a (1 - beta) - b beta, which is 0 for the generalised Jensen-Shannon divergence. */
enum { SK_BETA, SK_OF_Q, SK_OF_P, SK_UNEVEN, SK_MIXTURE_NUMBERS };
/* clang-format off */
#define SK_MIXTURE_OF(beta, a, b) \
    {(real)(beta), (real)(a), (real)(b), (real)((a) * (1 - (beta)) - (beta) * (b))}
/* clang-format on */

/* The term of a class. What is known beforehand leaves out what would come to nothing: `middle`, that
 * beta is 1/2; `even`, that k[SK_UNEVEN] is 0. */
SK_FORMULA SK_PAIR_RESULT sk_mixture_of(bool middle, bool even, SK_PAIR_CLASS x, const real *k) {
    const real beta = k[SK_BETA], a = k[SK_OF_Q], b = k[SK_OF_P];
    const bool less = x.d < 0; /* S is p */
    const real w = less ? beta : 1 - beta, wide = w * x.gap, m = x.ratio + wide; /* M/L */

    /* g(M/S - 1), where M is nearer to S and less than twice as large, or g(M/L - 1). */
    const bool near_smaller = !middle & (w < (real)0.5) & ((w == 0) | (wide < x.ratio));
    const real over = middle | (w == 0) ? 0 : wide / x.ratio;
    const real argument = near_smaller ? over : -(1 - w) * x.gap;
    const real g = sk_log_rest(argument, near_smaller ? 1 + argument : m);

    const real larger = near_smaller ? x.rest - x.gap * argument + g : g; /* h_L */
    const real of_rest = x.ratio > 0 ? x.ratio * (x.rest - g) : 0;
    const real smaller = near_smaller ? x.ratio * g : wide * x.gap - of_rest; /* S h_S / L */
    const real of_larger = less ? a : b, of_smaller = less ? b : a;
    const real value = (of_larger != 0 ? of_larger * larger : 0) + of_smaller * smaller;

    const real found = argument - g, d = x.gap + x.rest;
    const real log_l = near_smaller ? found - d : found, log_s = near_smaller ? found : found + d;
    const real of_p = b != 0 ? b * (less ? log_s : log_l) : 0; /* b log(M/p) */
    const real of_q = a != 0 ? a * (less ? log_l : log_s) : 0;
    const real uneven = even ? 0 : k[SK_UNEVEN], change = (less ? -x.gap : x.gap) / m;
    const real for_p = (1 - beta) * uneven, for_q = beta * uneven;
    const SK_PAIR_RESULT result = {x.larger * value, (for_p != 0 ? for_p * change : 0) - of_p,
                                   (for_q != 0 ? for_q * change : 0) - of_q};
    return result;
}
