/* A fuzzed call: what the bytes of an input become (decode.c), and what the library must do with it
 * (fuzz.c). Operators and their arguments come from the generated tables. */
#pragma once
#include <stddef.h>

#include "core/run.h"

enum { MOST_ELEMENTS = 4096, MOST_BYTES = 1 << 17 };

/* One tensor argument: the descriptor with the arrays that it points to, and its memory, which is
 * exactly what the descriptor spans. */
typedef struct argument {
    bool given, no_data;
    selfkd_tensor tensor;
    int64_t shape[SK_MAX_RANK], strides[SK_MAX_RANK];
    uint8_t values;    /* what an input holds, see fill() */
    int shares;        /* the item whose memory this tensor lies in, or -1 */
    uint8_t misplaced; /* by so many bytes */
    unsigned char *block, *before, *mark;
    size_t bytes;
} argument;

typedef struct fuzzed {
    const sk_op *op;
    argument argument[SK_MAX_ITEMS];
    union {
        double real;
        int64_t integer;
    } number[SK_MAX_ITEMS];
    uint32_t struct_size;
} fuzzed;

/* A call of data[0 .. size). */
void decode(const uint8_t *data, size_t size, fuzzed *f);

/* Calls that reached a kernel, and all. */
extern long reached, inputs;
int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);
