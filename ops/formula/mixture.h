/* Divergences from a mixture, of a class, for C and CUDA: with M = beta q + (1 - beta) p,
 *
 *   phi = a [q log(q/M) - q + M] + b [p log(p/M) - p + M]
 *
 * Summed over classes that have a p and a q of 1 together it is a KL(q||M) + b KL(p||M), for what
 * is added to the two logarithms then is 0. With it neither term is negative, so nothing cancels.
 *
 * Nor does anything within a term. With L the larger and S the smaller of p and q, w what L weighs
 * in M, and g(x) = x - log(1 + x), which is of second order, a term is h_L = g(M/L - 1) times L, or
 * h_S = g(M/S - 1) times S. One of them is found from g, the one whose argument is small, and the
 * other from it, since log(M/S) = log(M/L) + |d|.
 *
 *   dphi/dp = (1 - beta) (a (1 - beta) - b beta) (p - q)/M - b log(M/p)
 *   dphi/dq = beta (a (1 - beta) - b beta) (p - q)/M - a log(M/q) */
#pragma once
#include "formula/pair_class.h"

/* beta, 1 - beta, which keeps its digits where beta is near 1, a, b and a (1 - beta) - b beta,
 * which is 0 for the generalised Jensen-Shannon divergence. */
enum { SK_BETA, SK_REST, SK_OF_Q, SK_OF_P, SK_UNEVEN };
/* clang-format off */
#define SK_MIXTURE_OF(type, beta, a, b)                      \
    {(type)(beta), (type)(1 - (beta)), (type)(a), (type)(b), \
     (type)((a) * (1 - (beta)) - (beta) * (b))}
/* clang-format on */

/* The term of a class. What is known beforehand leaves out what would come to nothing: `middle`,
 * that beta is 1/2, so that no excluded class is infinite; `even`, that k[SK_UNEVEN] is 0. */
SK_FORMULA SK_PAIR_RESULT sk_mixture_of(bool middle, bool even, SK_PAIR_CLASS x, const real *k) {
    const real beta = k[SK_BETA], beside = k[SK_REST], a = k[SK_OF_Q], b = k[SK_OF_P];
    const bool less = x.d < 0; /* S is p */
    const real w = middle ? (real)0.5 : less ? beta : beside;
    const real of_s = middle ? (real)0.5 : less ? beside : beta; /* 1 - w */
    const real wide = w * x.gap, m = x.ratio + wide;             /* M/L */

    /* g(M/S - 1), where M is nearer to S and less than twice as large, or g(M/L - 1). */
    const bool near_smaller = !middle & (w < (real)0.5) & ((w == 0) | (wide < x.ratio));
    const real over = middle | (w == 0) ? 0 : wide / x.ratio;
    const real argument = near_smaller ? over : -of_s * x.gap;
    const real g = middle ? sk_log_rest_near(argument)
                          : sk_log_rest(argument, near_smaller ? 1 + argument : m);

    const real larger = near_smaller ? x.rest - x.gap * argument + g : g; /* h_L */
    const real less_rest = x.ratio * (x.rest - g), of_rest = x.ratio > 0 ? less_rest : 0;
    const real square = x.gap * x.gap; /* w gap is not shared with the slopes: see pair_loss.h */
    const real smaller = near_smaller ? x.ratio * g : w * square - of_rest; /* S h_S / L */
    const real of_larger = less ? a : b, of_smaller = less ? b : a;
    const real first = of_larger * larger, value = of_smaller * smaller;

    const real found = argument - g, log_l = near_smaller ? found - x.size : found;
    const real log_s = near_smaller ? found : found + x.size;
    const real of_p = b * (less ? log_s : log_l), of_q = a * (less ? log_l : log_s);
    const real change = (less ? -x.gap : x.gap) / m;
    const real for_p = even ? 0 : beside * k[SK_UNEVEN], for_q = even ? 0 : beta * k[SK_UNEVEN];
    const real more_p = for_p * change, more_q = for_q * change;
    const bool inside = even | (w != 0); /* else M is p or q, and p (p - q)/M = p - q */
    const SK_PAIR_RESULT result = {
        x.larger * (value + (middle | (of_larger != 0) ? first : 0)),
        (even | (for_p == 0) ? 0 : more_p) - (middle | (b != 0) ? of_p : 0),
        (even | (for_q == 0) ? 0 : more_q) - (middle | (a != 0) ? of_q : 0),
        inside ? 0 : -for_p * x.larger * x.gap,
        inside ? 0 : for_q * x.larger * x.gap,
    };
    return result;
}
