/* Whether a contract, or all contracts of the catalogue, can be relied on. */
#pragma once
#include "op.h"

int sk_check_contract(const sk_op *op);
int sk_check_catalogue(void);
