/* Whether a contract, or all contracts of the catalogue, can be relied on. */
#pragma once
#include "op.h"

int sk_check_contract(const sk_op *op);
/* What <op>_backward takes and leaves is named after the items of <op>; both contracts were
 * checked. */
int sk_check_gradient(const sk_op *op, const sk_op *forward);
int sk_check_catalogue(void);
