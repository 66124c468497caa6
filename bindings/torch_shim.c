/* Finds PyTorch's C shim in the running process. */
#define _GNU_SOURCE
#include "torch_shim.h"

#include <dlfcn.h>
#include <stddef.h>

sk_shim_table sk_torch;

static void find(void *library, const char *name, void *function) {
    void *const found = library ? dlsym(library, name) : NULL;
    __builtin_memcpy(function, &found,
                     sizeof found); /* a function pointer cannot be cast from void * in C11 */
}

const char *sk_find_torch(void) {
    void *const cpu = dlopen("libtorch_cpu.so", RTLD_NOLOAD | RTLD_LAZY);
    void *const cuda = dlopen("libtorch_cuda.so", RTLD_NOLOAD | RTLD_LAZY);
    if (!cpu) return "no PyTorch in this process";
#define FIND(result, name, arguments, library, since) find(library, #name, &sk_torch.name);
    SK_SHIM(FIND)
#define NEED(result, name, arguments, library, since) \
    if (!sk_torch.name) return "this PyTorch is older than 2.8: it has no " #name;
    SK_SHIM_NEEDED(NEED)
    return NULL;
}
