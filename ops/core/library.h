/* What every part of the core asks for: the sentence of an error, an operator or an item by its
 * name, and the CPU variant that was picked. */
#pragma once
#include "op.h"
#include "selfkd.h"

/* Stores the sentence "<op>: ..." for selfkd_message() and returns `status`. */
int sk_fail(int status, const char *format, ...) __attribute__((format(printf, 2, 3)));

/* NULL: there is no operator of that name. */
const sk_op *sk_find(const char *name);

/* The index of the item of that name; -1: the contract has none, which catalogue.c rules out for
 * the names that a contract mentions. */
int sk_find_item(const sk_op *op, const char *name);

enum sk_isa sk_current_isa(void);
