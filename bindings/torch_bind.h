/* The boxed kernels of every operator: PyTorch calls them with the arguments on a stack. */
#pragma once
#include "core/op.h"

void sk_call_from_torch(const sk_op *op, uint64_t *stack);
/* The same in grad mode is refused: the operator has no gradient yet. */
void sk_guard_from_torch(const sk_op *op, uint64_t *stack);
