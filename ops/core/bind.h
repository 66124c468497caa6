/* A call is checked, and its tensors are bound (call.h says what that is). */
#pragma once
#include "call.h"

/* Checks all inputs and binds them. */
int sk_check(sk_call *call);

/* Binds a tensor; an output is checked first. */
int sk_bind(sk_call *call, int item);
