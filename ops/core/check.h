/* The rules for the tensors of a call, and the sentences of their errors. */
#pragma once
#include "call.h"

/* Dtype, device, descriptor and shape of a tensor. The first tensor that has a letter or a '*'
 * gives its size; the others are compared with it. */
int sk_check_tensor(sk_call *call, int item);
int sk_check_contiguous(const sk_call *call, int item);
/* An output or an INOUT has memory of its own for each element: an element of it is no other, none
 * of an input and, if it is an output, none of an output before it. */
int sk_check_own_memory(const sk_call *call, int item);
