/* A class of two rows of probabilities p and q, as formulas of it are given it, and what they make
 * of it, for C and CUDA. What they need of log p - log q is there without anything having
 * cancelled, however close both are. */
#pragma once
#include "core/both.h"

/* d = log p - log q and size = |d|; larger = max(p, q), ratio = min(p, q) / larger = e^-size, gap =
 * 1 - ratio, and rest = size - gap >= 0, which is of second order. p and q are exactly 0 in a class
 * whose logit is -inf: if one of them is, rest is infinite and d
 * large or infinite; if both are, larger is 0 and the rest finite. */
#define SK_PAIR_CLASS_FIELDS real p, q, d, size, larger, ratio, gap, rest

/* The term of a class, phi; its derivatives by p and by q; and what p dphi/dp is where p is too
 * small for a number, and q dphi/dq where q is: mostly 0. */
#define SK_PAIR_RESULT_FIELDS real value, slope_p, slope_q, limit_p, limit_q

#ifdef __cplusplus
template <typename real>
struct sk_pair_class {
    SK_PAIR_CLASS_FIELDS;
};
template <typename real>
struct sk_pair_result {
    SK_PAIR_RESULT_FIELDS;
};
#define SK_PAIR_CLASS sk_pair_class<real>
#define SK_PAIR_RESULT sk_pair_result<real>
#else
typedef struct sk_pair_class {
    SK_PAIR_CLASS_FIELDS;
} sk_pair_class;
typedef struct sk_pair_result {
    SK_PAIR_RESULT_FIELDS;
} sk_pair_result;
#define SK_PAIR_CLASS sk_pair_class
#define SK_PAIR_RESULT sk_pair_result
#endif
