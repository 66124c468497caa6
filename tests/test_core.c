/* The core from C: descriptors, messages, thread pool, CPU variants. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>

#include <math.h>
#include <pthread.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>

#include "core/mode.h"
#include "selfkd.h"

enum { N = 300, C = 200 };

/* How often a call is made among threads that meet by chance (sanitize.py wants fewer: under
 * valgrind a call takes 70 ms). */
static int repeats(void) {
    const char *const given = getenv("SELFKD_TEST_REPEATS");
    return given ? atoi(given) : 200;
}

/* A forward call and everything it points to. */
typedef struct call {
    float u[N * C], v[N * C], loss, rows[N], denominator;
    double saved[4 * N];
    int64_t matrix[2], row[1], rows4[2];
    selfkd_tensor t_u, t_v, t_loss, t_rows, t_saved, t_denominator;
    selfkd_sd_dropout_kl_args args;
} call;

static selfkd_tensor tensor(void *data, int32_t ndim, int64_t *shape, uint8_t bits) {
    return (selfkd_tensor){.data = data,
                           .device = {SELFKD_CPU, 0},
                           .ndim = ndim,
                           .dtype = {2, bits, 1},
                           .shape = shape};
}

static int setup(void **state) {
    call *const c = calloc(1, sizeof *c);
    for (int i = 0; i < N * C; i++) {
        c->u[i] = (float)(i * 919 % 1000) / 200;
        c->v[i] = (float)(i * 729 % 1000) / 200;
    }
    c->matrix[0] = N, c->matrix[1] = C, c->row[0] = N, c->rows4[0] = 4, c->rows4[1] = N;
    c->t_u = tensor(c->u, 2, c->matrix, 32);
    c->t_v = tensor(c->v, 2, c->matrix, 32);
    c->t_loss = tensor(&c->loss, 0, NULL, 32);
    c->t_rows = tensor(c->rows, 1, c->row, 32);
    c->t_saved = tensor(c->saved, 2, c->rows4, 64);
    c->t_denominator = tensor(&c->denominator, 0, NULL, 32);
    c->args = (selfkd_sd_dropout_kl_args){.struct_size = sizeof c->args,
                                          .u = &c->t_u,
                                          .v = &c->t_v,
                                          .temperature = 3,
                                          .forward_weight = 1,
                                          .reverse_weight = 1,
                                          .reduction = SELFKD_MEAN,
                                          .loss = &c->t_loss,
                                          .rows = &c->t_rows,
                                          .saved = &c->t_saved,
                                          .denominator = &c->t_denominator};
    *state = c;
    return 0;
}

static int teardown(void **state) {
    free(*state);
    return 0;
}

static void refused(call *c, int status, const char *sentence) {
    assert_int_equal(selfkd_sd_dropout_kl(&c->args, NULL), status);
    assert_string_equal(selfkd_message(), sentence);
}

static void version_and_catalogue(void **state) {
    (void)state;
    assert_string_equal(selfkd_version(), SELFKD_VERSION);
    assert_int_equal(selfkd_abi(), SELFKD_ABI);
    assert_non_null(strstr(selfkd_operators(), "sd_dropout_kl"));
    assert_non_null(strstr(selfkd_describe("sd_dropout_kl"), "REAL, temperature, POSITIVE, 3.0\n"));
    assert_null(selfkd_describe("no_such_operator"));
    assert_int_equal(selfkd_call_count("no_such_operator"), -1);
}

static void value_of_a_row(void **state) {
    call *const c = *state;
    const int64_t before = selfkd_call_count("sd_dropout_kl");
    assert_int_equal(selfkd_sd_dropout_kl(&c->args, NULL), SELFKD_OK);
    assert_int_equal(selfkd_call_count("sd_dropout_kl"), before + 1);
    double zu = 0, zv = 0, kl = 0;
    for (int k = 0; k < C; k++) zu += exp(c->u[k] / 3.0), zv += exp(c->v[k] / 3.0);
    for (int k = 0; k < C; k++) {
        const double p = exp(c->u[k] / 3.0) / zu, q = exp(c->v[k] / 3.0) / zv;
        kl += (p - q) * (log(p) - log(q));
    }
    assert_true(fabs(c->rows[0] - 9 * kl) <= 3e-6 * 9 * kl);
    assert_true(c->denominator == N);
}

static void descriptors(void **state) {
    call *const c = *state;
    c->args.v = NULL;
    refused(c, SELFKD_ERROR_VALUE, "sd_dropout_kl: v is NULL");
    c->args.v = &c->t_v;
    c->args.struct_size = 4;
    assert_int_equal(selfkd_sd_dropout_kl(&c->args, NULL), SELFKD_ERROR_VALUE);
    c->args.struct_size = sizeof c->args;
    c->t_v.data = NULL;
    refused(c, SELFKD_ERROR_VALUE, "sd_dropout_kl: v has no data");
    c->t_v.data = c->v;
    c->t_v.ndim = 9;
    assert_int_not_equal(selfkd_sd_dropout_kl(&c->args, NULL), SELFKD_OK);
    c->t_v.ndim = -1;
    refused(c, SELFKD_ERROR_VALUE, "sd_dropout_kl: v is no tensor (ndim -1)");
    c->t_v.ndim = 2;
    c->t_v.dtype.lanes = 2;
    refused(c, SELFKD_ERROR_TYPE,
            "sd_dropout_kl: v has dtype an unsupported dtype, expected float32 like u");
    c->t_v.dtype.lanes = 1;
    c->t_v.dtype.bits = 64;
    refused(c, SELFKD_ERROR_TYPE, "sd_dropout_kl: v has dtype float64, expected float32 like u");
    c->t_v.dtype.bits = 32;
    c->t_v.device.device_type = 7;
    refused(c, SELFKD_ERROR_TYPE, "sd_dropout_kl: v is on device type 7, expected cpu or cuda");
    c->t_v.device.device_type = SELFKD_CPU;
    int64_t negative[2] = {N, -C}, huge[2] = {INT64_MAX, 4};
    c->t_u.shape = negative;
    assert_int_equal(selfkd_sd_dropout_kl(&c->args, NULL), SELFKD_ERROR_VALUE);
    c->t_u.shape = huge;
    assert_int_equal(selfkd_sd_dropout_kl(&c->args, NULL), SELFKD_ERROR_VALUE);
    c->t_u.shape = c->matrix;
    c->t_rows.ndim = 0;
    refused(c, SELFKD_ERROR_VALUE, "sd_dropout_kl: rows has 0 dimensions, expected 1");
    c->t_rows.ndim = 1;
    c->args.temperature = NAN;
    refused(c, SELFKD_ERROR_VALUE,
            "sd_dropout_kl: temperature is nan, expected a finite number > 0");
    assert_int_equal(selfkd_sd_dropout_kl(NULL, NULL), SELFKD_ERROR_VALUE);
}

static void weights(void **state) {
    call *const c = *state;
    float weight[N];
    const selfkd_tensor t_weight = tensor(weight, 1, c->row, 32);
    for (int i = 0; i < N; i++) weight[i] = (float)(i % 3);
    c->args.weight = &t_weight;
    assert_int_equal(selfkd_sd_dropout_kl(&c->args, NULL), SELFKD_OK);
    weight[N - 1] = -0.5f;
    refused(c, SELFKD_ERROR_VALUE,
            "sd_dropout_kl: weight is -0.5 at position [299], expected a number >= 0");
    weight[7] = -NAN;
    refused(c, SELFKD_ERROR_VALUE,
            "sd_dropout_kl: weight is nan at position [7], expected a number >= 0");
}

static void memory(void **state) {
    call *const c = *state;
    int64_t strides[2] = {C, INT64_MAX / 8}, none[2] = {0, 1}, gaps[1] = {2}, row[2] = {0, -1};
    c->t_u.strides = strides;
    refused(c, SELFKD_ERROR_VALUE,
            "sd_dropout_kl: u has strides or a byte_offset that leave the address space");
    c->t_u.strides = none; /* inputs may share their memory */
    assert_int_equal(selfkd_sd_dropout_kl(&c->args, NULL), SELFKD_OK);
    c->t_u.strides = NULL;
    c->t_u.byte_offset = UINT64_MAX - 3;
    refused(c, SELFKD_ERROR_VALUE,
            "sd_dropout_kl: u has strides or a byte_offset that leave the address space");
    c->t_u.byte_offset = 2;
    refused(c, SELFKD_ERROR_VALUE,
            "sd_dropout_kl: u has data that is not aligned to its elements of 4 bytes");
    c->t_u.byte_offset = 0;
    c->t_rows.strides = gaps;
    refused(c, SELFKD_ERROR_VALUE,
            "sd_dropout_kl: rows has stride 2 in dimension 0, expected 1, of a contiguous tensor");
    c->t_rows.strides = NULL;
    c->t_rows.data = &c->u[N * C - N];
    refused(c, SELFKD_ERROR_VALUE,
            "sd_dropout_kl: rows shares memory with u, expected memory of its own");
    c->t_rows.data = c->rows;
    c->t_loss.data = &c->rows[N - 1];
    refused(c, SELFKD_ERROR_VALUE,
            "sd_dropout_kl: rows shares memory with loss, expected memory of its own");
    c->t_loss.data = &c->loss;
    c->t_u.ndim = INT32_MAX; /* its shape is not read */
    refused(c, SELFKD_ERROR_VALUE,
            "sd_dropout_kl: u has 2147483647 dimensions, expected at most 8");
    c->t_u.ndim = 2;
    row[0] = C; /* classes from last to first */
    c->t_u.strides = c->t_v.strides = row;
    c->t_u.data = &c->u[C - 1], c->t_v.data = &c->v[C - 1];
    assert_int_equal(selfkd_sd_dropout_kl(&c->args, NULL), SELFKD_OK);
}

/* Gradients may lie between each other, in blocks of columns, but not in each other. */
static void gradients_side_by_side(void **state) {
    call *const c = *state;
    static float both[2 * N * C];
    int64_t wide[2] = {2 * C, 1}, same[2] = {0, 1};
    selfkd_tensor first = c->t_u, second = c->t_u;
    first.data = both, first.strides = second.strides = wide;
    assert_int_equal(selfkd_sd_dropout_kl(&c->args, NULL), SELFKD_OK);
    float one = 1;
    const selfkd_tensor grad = tensor(&one, 0, NULL, 32);
    const selfkd_sd_dropout_kl_backward_args args = {.struct_size = sizeof args,
                                                     .grad = &grad,
                                                     .u = &c->t_u,
                                                     .v = &c->t_v,
                                                     .saved = &c->t_saved,
                                                     .denominator = &c->t_denominator,
                                                     .temperature = 3,
                                                     .forward_weight = 1,
                                                     .reverse_weight = 1,
                                                     .needs_u = 1,
                                                     .needs_v = 1,
                                                     .grad_u = &first,
                                                     .grad_v = &second};
    second.data = both + C;
    assert_int_equal(selfkd_sd_dropout_kl_backward(&args, NULL), SELFKD_OK);
    second.data = both + C - 1;
    assert_int_equal(selfkd_sd_dropout_kl_backward(&args, NULL), SELFKD_ERROR_VALUE);
    assert_string_equal(
        selfkd_message(),
        "sd_dropout_kl_backward: grad_v shares memory with grad_u, expected memory of its own");
    second.data = both + C + 1; /* its last class is the next row's first */
    assert_int_equal(selfkd_sd_dropout_kl_backward(&args, NULL), SELFKD_ERROR_VALUE);
    int64_t reversed[2] = {2 * C, -1};
    second.data = both + C;
    first.data = both + C - 1, first.strides = reversed;
    assert_int_equal(selfkd_sd_dropout_kl_backward(&args, NULL), SELFKD_OK);
    second.strides = same;
    assert_int_equal(selfkd_sd_dropout_kl_backward(&args, NULL), SELFKD_ERROR_VALUE);
    assert_string_equal(selfkd_message(),
                        "sd_dropout_kl_backward: grad_v has elements that share "
                        "memory, expected memory of its own");
}

static void byte_offset_is_honoured(void **state) {
    call *const c = *state;
    assert_int_equal(selfkd_sd_dropout_kl(&c->args, NULL), SELFKD_OK);
    const float expected = c->rows[1];
    c->matrix[0] = c->row[0] = c->rows4[1] = 1;
    c->t_u.byte_offset = c->t_v.byte_offset = C * sizeof(float);
    assert_int_equal(selfkd_sd_dropout_kl(&c->args, NULL), SELFKD_OK);
    assert_true(c->rows[0] == expected);
}

static void cuda_is_refused_without_kernels(void **state) {
    call *const c = *state;
    selfkd_tensor *const all[] = {&c->t_u,    &c->t_v,     &c->t_loss,
                                  &c->t_rows, &c->t_saved, &c->t_denominator};
    for (size_t i = 0; i < sizeof all / sizeof *all; i++) all[i]->device.device_type = SELFKD_CUDA;
    assert_int_equal(selfkd_sd_dropout_kl(&c->args, NULL), SELFKD_ERROR_CUDA);
}

static void pool_gives_the_same_bits(void **state) {
    call *const c = *state;
    const int count = repeats();
    assert_true(count > 0);
    assert_int_equal(selfkd_set_num_threads(1), SELFKD_OK);
    assert_int_equal(selfkd_sd_dropout_kl(&c->args, NULL), SELFKD_OK);
    float one[N];
    memcpy(one, c->rows, sizeof one);
    const float loss = c->loss;
    for (int threads = 2; threads <= 9; threads++) {
        memset(c->rows, 0, sizeof c->rows);
        assert_int_equal(selfkd_set_num_threads(threads), SELFKD_OK);
        for (int repeat = 0; repeat < count; repeat++)
            assert_int_equal(selfkd_sd_dropout_kl(&c->args, NULL), SELFKD_OK);
        assert_memory_equal(c->rows, one, sizeof one);
        assert_true(c->loss == loss);
    }
    assert_int_equal(selfkd_set_num_threads(0), SELFKD_ERROR_VALUE);
    assert_string_equal(selfkd_message(), "selfkd_set_num_threads: n is 0, expected at least 1");
}

/* Denormals are flushed or kept, as the caller's thread has it, in every thread of the pool, call
 * by call. */
static void pool_has_the_mode_of_the_caller(void **state) {
    call *const c = *state;
    const uint64_t kept = sk_mode(), flushing[] = {SK_FLUSHING};
    enum { MODES = sizeof flushing / sizeof *flushing };
    static float one[MODES][N * C], grad_u[N * C], grad_v[N * C];
    float tiny = 1e-36f;
    const selfkd_tensor grad = tensor(&tiny, 0, NULL, 32),
                        t_grad_u = tensor(grad_u, 2, c->matrix, 32),
                        t_grad_v = tensor(grad_v, 2, c->matrix, 32);
    assert_int_equal(selfkd_sd_dropout_kl(&c->args, NULL), SELFKD_OK);
    const selfkd_sd_dropout_kl_backward_args args = {.struct_size = sizeof args,
                                                     .grad = &grad,
                                                     .u = &c->t_u,
                                                     .v = &c->t_v,
                                                     .saved = &c->t_saved,
                                                     .denominator = &c->t_denominator,
                                                     .temperature = 3,
                                                     .forward_weight = 1,
                                                     .reverse_weight = 1,
                                                     .needs_u = 1,
                                                     .needs_v = 1,
                                                     .grad_u = &t_grad_u,
                                                     .grad_v = &t_grad_v};
    for (int threads = 1; threads <= 4; threads++) {
        assert_int_equal(selfkd_set_num_threads(threads), SELFKD_OK);
        for (int repeat = 0; repeat < 20; repeat++) {
            for (int i = 0; i < MODES; i++) {
                sk_set_mode(kept | flushing[i]);
                const int status = selfkd_sd_dropout_kl_backward(&args, NULL);
                const uint64_t after = sk_mode();
                sk_set_mode(kept);
                assert_int_equal(status, SELFKD_OK);
                assert_int_equal(after, kept | flushing[i]);
                if (threads == 1) memcpy(one[i], grad_u, sizeof grad_u);
                assert_memory_equal(grad_u, one[i], sizeof grad_u);
            }
        }
    }
    if (MODES > 1) assert_memory_not_equal(one[0], one[1], sizeof grad_u);
}

static void *many_calls(void *shared) {
    const call *const c = shared;
    const int count = repeats();
    float loss, rows[N], denominator;
    double saved[4 * N];
    selfkd_tensor t_loss = c->t_loss, t_rows = c->t_rows, t_saved = c->t_saved,
                  t_denominator = c->t_denominator;
    t_loss.data = &loss, t_rows.data = rows, t_saved.data = saved,
    t_denominator.data = &denominator;
    selfkd_sd_dropout_kl_args args = c->args;
    args.loss = &t_loss, args.rows = &t_rows, args.saved = &t_saved,
    args.denominator = &t_denominator;
    for (int repeat = 0; repeat < count; repeat++)
        if (selfkd_sd_dropout_kl(&args, NULL) || loss != c->loss) return "different";
    return NULL;
}

static void callers_at_once(void **state) {
    call *const c = *state;
    selfkd_set_num_threads(3);
    assert_int_equal(selfkd_sd_dropout_kl(&c->args, NULL), SELFKD_OK);
    pthread_t caller[4];
    for (int i = 0; i < 4; i++) pthread_create(&caller[i], NULL, many_calls, c);
    for (int i = 0; i < 4; i++) {
        void *wrong;
        pthread_join(caller[i], &wrong);
        assert_null(wrong);
    }
}

static void works_in_a_forked_child(void **state) {
    call *const c = *state;
    selfkd_set_num_threads(4);
    assert_int_equal(selfkd_sd_dropout_kl(&c->args, NULL), SELFKD_OK);
    const float loss = c->loss;
    const pid_t child = fork();
    if (child == 0) {
        alarm(20);
        _exit(selfkd_sd_dropout_kl(&c->args, NULL) || c->loss != loss);
    }
    int status = -1;
    waitpid(child, &status, 0);
    assert_int_equal(status, 0);
}

static void variants(void **state) {
    call *const c = *state;
    const char *const best = selfkd_isa();
    const char *const names[] = {"base", "v3", "v4"};
    for (int i = 0; i < 3; i++) {
        if (selfkd_set_isa(names[i])) continue; /* this machine does not run it */
        char path[32] = "cpu ";
        assert_int_equal(selfkd_sd_dropout_kl(&c->args, NULL), SELFKD_OK);
        assert_string_equal(selfkd_last_path(), strcat(strcat(path, names[i]), " classes"));
    }
    assert_int_equal(selfkd_set_isa(best), SELFKD_OK);
    assert_int_equal(selfkd_set_isa("v9"), SELFKD_ERROR_VALUE);
    assert_string_equal(selfkd_message(), "selfkd_set_isa: variant is v9, expected base, v3 or v4");
}

int main(void) {
#define TEST(name) cmocka_unit_test_setup_teardown(name, setup, teardown)
    const struct CMUnitTest tests[] = {
        TEST(version_and_catalogue),
        TEST(value_of_a_row),
        TEST(descriptors),
        TEST(weights),
        TEST(memory),
        TEST(gradients_side_by_side),
        TEST(byte_offset_is_honoured),
        TEST(cuda_is_refused_without_kernels),
        TEST(pool_gives_the_same_bits),
        TEST(pool_has_the_mode_of_the_caller),
        TEST(callers_at_once),
        TEST(works_in_a_forked_child),
        TEST(variants),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
