/* Independent tasks on several threads. */
#pragma once
#include <stdint.h>

/* Does tasks begin .. end - 1. */
typedef void (*sk_part)(const void *params, int64_t begin, int64_t end);

/* PyTorch's torch_parallel_for(begin, end, grain, range, context), which calls `range` from several
 * threads. */
typedef void (*sk_range)(int64_t begin, int64_t end, void *context);
typedef int (*sk_parallel_for)(int64_t, int64_t, int64_t, sk_range, void *);

/* Does `count` tasks in pieces of at least `grain`. */
void sk_parallel(int64_t count, int64_t grain, sk_part tasks, const void *params);
void sk_use_parallel_for(sk_parallel_for parallel_for);
