/* Allocations that fail: the library makes none of its own on the CPU but those of its threads, and
 * without threads it gives the same bits. */
#define _GNU_SOURCE
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>

#include <dlfcn.h>
#include <errno.h>
#include <pthread.h>
#include <string.h>

#include "selfkd.h"

enum { N = 2000, C = 200 };

extern void *__libc_malloc(size_t), *__libc_calloc(size_t, size_t), *__libc_realloc(void *, size_t);

static _Atomic int failing = 0, asked = 0; /* allocations fail; how many were asked for then */
static _Atomic int threads_left = 0;       /* threads that may still be made */

static int refused(void) {
    if (!failing) return 0;
    asked++;
    errno = ENOMEM;
    return 1;
}
/* These take the place of libc's for the whole process, the library included. */
void *malloc(size_t n) { return refused() ? NULL : __libc_malloc(n); }
void *calloc(size_t n, size_t size) { return refused() ? NULL : __libc_calloc(n, size); }
void *realloc(void *old, size_t n) { return refused() ? NULL : __libc_realloc(old, n); }

int pthread_create(pthread_t *thread, const pthread_attr_t *attributes, void *(*run)(void *),
                   void *context) {
    if (threads_left-- <= 0) return EAGAIN;
    union {
        void *address;
        int (*function)(pthread_t *, const pthread_attr_t *, void *(*)(void *), void *);
    } real = {dlsym(RTLD_NEXT, "pthread_create")};
    const int were = failing; /* a thread that is granted gets its stack */
    failing = 0;
    const int error = real.function(thread, attributes, run, context);
    failing = were;
    return error;
}

static float u[N * C], v[N * C], rows[N], loss, denominator;
static double saved[4 * N];

/* A forward call with every allocation failing. */
static int call(void) {
    int64_t matrix[] = {N, C}, row[] = {N}, four[] = {4, N};
    const selfkd_device cpu = {SELFKD_CPU, 0};
    const selfkd_dtype f32 = {2, 32, 1}, f64 = {2, 64, 1};
    const selfkd_tensor t_u = {u, cpu, 2, f32, matrix, NULL, 0},
                        t_v = {v, cpu, 2, f32, matrix, NULL, 0},
                        t_loss = {&loss, cpu, 0, f32, NULL, NULL, 0},
                        t_rows = {rows, cpu, 1, f32, row, NULL, 0},
                        t_saved = {saved, cpu, 2, f64, four, NULL, 0},
                        t_denominator = {&denominator, cpu, 0, f32, NULL, NULL, 0};
    const selfkd_sd_dropout_kl_args args = {.struct_size = sizeof args,
                                            .u = &t_u,
                                            .v = &t_v,
                                            .temperature = 3,
                                            .forward_weight = 1,
                                            .reverse_weight = 1,
                                            .reduction = SELFKD_MEAN,
                                            .loss = &t_loss,
                                            .rows = &t_rows,
                                            .saved = &t_saved,
                                            .denominator = &t_denominator};
    asked = 0;
    failing = 1;
    const int status = selfkd_sd_dropout_kl(&args, NULL);
    failing = 0;
    return status;
}

static void the_same_bits_without_threads(void **state) {
    (void)state;
    static float expected[N];
    for (int i = 0; i < N * C; i++) {
        u[i] = (float)(i * 919 % 1000) / 200;
        v[i] = (float)(i * 729 % 1000) / 200;
    }
    selfkd_set_num_threads(1);
    assert_int_equal(call(), SELFKD_OK);
    assert_int_equal(asked, 0);
    memcpy(expected, rows, sizeof rows);
    const float first = loss;
    selfkd_set_num_threads(6);
    for (int more = 0; more < 6; more++) { /* one thread more each time, five in the end */
        memset(rows, 0, sizeof rows);
        threads_left = more > 0;
        assert_int_equal(call(), SELFKD_OK);
        assert_int_equal(asked, 0);
        assert_memory_equal(rows, expected, sizeof rows);
        assert_true(loss == first);
    }
}

static void a_refusal_allocates_nothing(void **state) {
    (void)state;
    failing = 1;
    asked = 0;
    const int status = selfkd_sd_dropout_kl(NULL, NULL);
    const char *const message = selfkd_message();
    failing = 0;
    assert_int_equal(status, SELFKD_ERROR_VALUE);
    assert_string_equal(message, "sd_dropout_kl: args is NULL");
    assert_int_equal(asked, 0);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(the_same_bits_without_threads),
        cmocka_unit_test(a_refusal_allocates_nothing),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
