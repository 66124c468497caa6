/* What the library says of itself: errors, version, operators, and the CPU variant. */
#include "library.h"

#include <stdarg.h>
#include <stdio.h>
#include <string.h>

#define TEXT_(x) #x
#define TEXT(x) TEXT_(x)

static _Thread_local char message[512] = "";

const char *selfkd_message(void) { return message; }

int sk_fail(int status, const char *format, ...) {
    va_list list;
    va_start(list, format);
    vsnprintf(message, sizeof message, format, list);
    va_end(list);
    return status;
}

const char *selfkd_version(void) { return TEXT(SELFKD_VERSION); }
int selfkd_abi(void) { return SELFKD_ABI; }

const sk_op *sk_find(const char *name) {
    for (int i = 0; name && sk_ops[i]; i++)
        if (strcmp(sk_ops[i]->name, name) == 0) return sk_ops[i];
    return NULL;
}

int sk_find_item(const sk_op *op, const char *name) {
    for (int i = 0; i < op->count; i++)
        if (strcmp(op->items[i].name, name) == 0) return i;
    return -1;
}

const char *selfkd_describe(const char *op) {
    const sk_op *const found = sk_find(op);
    return found ? found->text : NULL;
}

int64_t selfkd_call_count(const char *op) {
    const sk_op *const found = sk_find(op);
    return found ? atomic_load_explicit(found->calls, memory_order_relaxed) : -1;
}

/* ---- the CPU variant: the one place that picks it ---- */

static const char *const ISA[] = {[SK_ISA_BASE] = "base", [SK_ISA_V3] = "v3", [SK_ISA_V4] = "v4"};
static _Atomic int isa = -1;

/* Kernels for a level are there only in an x86-64 build (their table entries are NULL elsewhere).
 */
static bool runs(enum sk_isa level) {
    if (level != SK_ISA_BASE && !sk_ops[0]->cpu[level]) return false;
#ifdef SK_WITH_LEVELS
    __builtin_cpu_init();
    if (level == SK_ISA_V3) return __builtin_cpu_supports("x86-64-v3");
    if (level == SK_ISA_V4) return __builtin_cpu_supports("x86-64-v4");
#endif
    return level == SK_ISA_BASE;
}

enum sk_isa sk_current_isa(void) {
    int chosen = atomic_load_explicit(&isa, memory_order_relaxed);
    if (chosen >= 0) return chosen;
    chosen = runs(SK_ISA_V4) ? SK_ISA_V4 : runs(SK_ISA_V3) ? SK_ISA_V3 : SK_ISA_BASE;
    atomic_store_explicit(&isa, chosen, memory_order_relaxed);
    return chosen;
}

const char *selfkd_isa(void) { return ISA[sk_current_isa()]; }

int selfkd_set_isa(const char *name) {
    for (int i = SK_ISA_BASE; name && i <= SK_ISA_V4; i++) {
        if (strcmp(name, ISA[i]) != 0) continue;
        if (!runs(i))
            return sk_fail(SELFKD_ERROR_VALUE, "selfkd_set_isa: this machine does not run %s",
                           name);
        atomic_store_explicit(&isa, i, memory_order_relaxed);
        return SELFKD_OK;
    }
    return sk_fail(SELFKD_ERROR_VALUE, "selfkd_set_isa: variant is %s, expected base, v3 or v4",
                   name ? name : "NULL");
}
