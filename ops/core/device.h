/* Calls on CUDA. */
#pragma once
#include "call.h"

/* Runs a call whose tensors are bound. A work space that is not bound (PyTorch's allocator gave
 * none) is taken for the time of the call. */
int sk_run_cuda(sk_call *call, void *stream);
