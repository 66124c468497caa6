/* Loaded before libc's: the n-th block that a tensor asks for is refused, and blocks that are not
 * given back are counted (test_faults.py; one thread). */
#include <errno.h>
#include <stddef.h>

extern void *__libc_memalign(size_t, size_t);
extern void __libc_free(void *);

enum { MOST = 64 };
static long countdown = 0, asked = 0;
static void *live[MOST];
static int watching = 0;

/* Refuse block n from now on (1: the next one, 0: none) and watch the others. */
void fail_allocation(long n) {
    countdown = n;
    asked = 0;
    watching = 1;
    for (int i = 0; i < MOST; i++) live[i] = NULL;
}

/* How many blocks were asked for since then, and how many of them are still there. */
long asked_blocks(void) { return asked; }
long live_blocks(void) {
    long n = 0;
    for (int i = 0; i < MOST; i++) n += live[i] != NULL;
    return n;
}

int posix_memalign(void **block, size_t alignment, size_t bytes) {
    asked++;
    if (countdown > 0 && --countdown == 0) return ENOMEM;
    *block = __libc_memalign(alignment, bytes);
    for (int i = 0; i < MOST && watching; i++) {
        if (live[i]) continue;
        live[i] = *block;
        break;
    }
    return *block ? 0 : ENOMEM;
}

void free(void *block) {
    for (int i = 0; i < MOST && watching && block; i++)
        if (live[i] == block) live[i] = NULL;
    __libc_free(block);
}
