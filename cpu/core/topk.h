/* The listed classes of a row of topk_divergence in double, whatever `real` is: their slopes may
 * differ by less than a float can tell, and the terms of what is dropped are of either sign. They
 * are few; the file that finds them, topk_classes.c, has `real` double in every build. */
#pragma once
#include <stdbool.h>

#include "cpu/core/variant.h"

enum { SK_MOST_TERMS = SK_MOST_LISTED + 1 /* with the tail */ };

/* What the formula makes of them: the gradient of class k is p (slope - A) + limit, times a factor.
 */
typedef struct sk_topk_terms {
    double value[SK_MOST_TERMS], p[SK_MOST_TERMS], slope[SK_MOST_TERMS], limit[SK_MOST_TERMS];
} sk_topk_terms;

/* Those of n classes by their log p and log q. */
void SK_CPU(measure_topk)(bool tv, const double *numbers, double uneven, int64_t n,
                          const double *log_p, const double *log_q, sk_topk_terms *to);
