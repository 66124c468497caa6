/* Calls the library for a process of another processor: remote FILE BYTES ADDRESS, started by
 * remote.py. Both map the open FILE at ADDRESS, so that a pointer into it is the same in both.
 * For each line "FUNCTION ADDRESS OF ARGUMENTS" a line "STATUS MESSAGE" is the answer. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#include "selfkd.h"

int main(int count, char **given) {
    if (count != 4) return fprintf(stderr, "remote FILE BYTES ADDRESS\n"), 2;
    const int file = atoi(given[1]);
    void *const address = (void *)(uintptr_t)strtoull(given[3], NULL, 0);
    if (mmap(address, strtoull(given[2], NULL, 0), PROT_READ | PROT_WRITE,
             MAP_SHARED | MAP_FIXED_NOREPLACE, file, 0) != address)
        return perror("remote: mmap"), 1;
    char name[64];
    unsigned long long arguments;
    while (scanf("%63s %llx", name, &arguments) == 2) {
        int (*function)(const void *, void *) = NULL;
        void *const found = dlsym(RTLD_DEFAULT, name);
        memcpy(&function, &found, sizeof found); /* ISO C has no cast between the two */
        if (!function) return fprintf(stderr, "remote: no %s\n", name), 1;
        const int status = function((const void *)(uintptr_t)arguments, NULL);
        printf("%d %s\n", status, status ? selfkd_message() : "");
        fflush(stdout);
    }
    return 0;
}
