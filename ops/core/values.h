/* The rules for numbers, and for the values of tensors, which are looked at on the CPU only. */
#pragma once
#include "call.h"

/* The range of a number or the names of a CHOICE; of a RESIZE, also the size of its input. */
int sk_check_number(const sk_call *call, int item);

/* The weights of a call whose tensors are bound. */
int sk_check_weights(const sk_call *call);

/* The sentence for row `row` of a WEIGHT, or of an INDEX, CLASSES or TEACHER that a kernel found
 * wrong. */
int sk_fail_value(const sk_call *call, int item, int64_t row, double value);
