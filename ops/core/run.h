/* Calls that run: with inputs checked and outputs bound, or from C with everything to do. */
#pragma once
#include "call.h"

int sk_run(sk_call *call, void *stream);

/* What every selfkd_<op>() is: `args` is a selfkd_<op>_args. */
int sk_call_from_c(const sk_op *op, const void *args, void *stream);
