/* selfkd from C: the loss of two rows, its gradient, and a direct computation of both.
 *
 *   DIR=$(python -c "import selfkd, pathlib; print(pathlib.Path(selfkd.library_path()).parent)")
 *   cc -I$DIR/include examples/c_program.c -L$DIR -lselfkd -Wl,-rpath,$DIR -lm -o c_program
 *   ./c_program */
#include <math.h>
#include <stdio.h>
#include <stdlib.h>

#include <selfkd.h>

enum { N = 2, C = 4 };
static const double T = 3;

static const float U[N][C] = {{1, 2, 3, 4}, {0, -1, 5, 2}}, V[N][C] = {{2, 2, 1, 4}, {1, 0, 3, -2}};

/* A compact tensor on the CPU. */
static selfkd_tensor tensor(const void *data, int bits, int ndim, int64_t *shape) {
    return (selfkd_tensor){
        .data = (void *)data,
        .device = {.device_type = SELFKD_CPU},
        .ndim = ndim,
        .dtype = {.code = 2, .bits = (uint8_t)bits, .lanes = 1},
        .shape = shape,
    };
}

static void require(int status) {
    if (status == SELFKD_OK) return;
    fprintf(stderr, "%s\n", selfkd_message());
    exit(1);
}

/* The larger of both, NaN if one is: fmax drops it, and a loop of fmax over floats taken as doubles
 * breaks gcc 12 for AArch64 (internal compiler error in vect_transform_reduction). */
static double worse(double a, double b) { return a <= b || isnan(b) ? b : a; }

static void log_softmax(const float *x, double *out) {
    double sum = 0;
    for (int c = 0; c < C; c++) sum += exp(x[c] / T);
    for (int c = 0; c < C; c++) out[c] = x[c] / T - log(sum);
}

/* The loss, and its gradient with respect to U, as ops/sd_dropout_kl.h writes them. */
static double direct(double grad_u[N][C]) {
    double loss = 0;
    for (int n = 0; n < N; n++) {
        double log_p[C], log_q[C], kl = 0;
        log_softmax(U[n], log_p);
        log_softmax(V[n], log_q);
        for (int c = 0; c < C; c++) kl += exp(log_p[c]) * (log_p[c] - log_q[c]);
        for (int c = 0; c < C; c++) {
            const double p = exp(log_p[c]), q = exp(log_q[c]), d = log_p[c] - log_q[c];
            loss += T * T * (p - q) * d / N;
            grad_u[n][c] = T * (p * (d - kl) + p - q) / N;
        }
    }
    return loss;
}

int main(void) {
    int64_t matrix[] = {N, C}, four_rows[] = {4, N};
    float loss, denominator, rows[N], grad = 1, grad_u[N][C], grad_v[N][C];
    double saved[4][N];
    const selfkd_tensor u = tensor(U, 32, 2, matrix), v = tensor(V, 32, 2, matrix);
    const selfkd_tensor loss_t = tensor(&loss, 32, 0, NULL);
    const selfkd_tensor denominator_t = tensor(&denominator, 32, 0, NULL);
    const selfkd_tensor rows_t = tensor(rows, 32, 1, matrix);
    const selfkd_tensor saved_t = tensor(saved, 64, 2, four_rows);
    const selfkd_tensor grad_t = tensor(&grad, 32, 0, NULL);
    const selfkd_tensor grad_u_t = tensor(grad_u, 32, 2, matrix);
    const selfkd_tensor grad_v_t = tensor(grad_v, 32, 2, matrix);

    const selfkd_sd_dropout_kl_args forward = {
        .struct_size = sizeof forward,
        .u = &u,
        .v = &v,
        .temperature = T,
        .forward_weight = 1,
        .reverse_weight = 1,
        .reduction = SELFKD_MEAN,
        .loss = &loss_t,
        .rows = &rows_t,
        .saved = &saved_t,
        .denominator = &denominator_t,
    };
    require(selfkd_sd_dropout_kl(&forward, NULL));

    const selfkd_sd_dropout_kl_backward_args backward = {
        .struct_size = sizeof backward,
        .grad = &grad_t,
        .u = &u,
        .v = &v,
        .saved = &saved_t,
        .denominator = &denominator_t,
        .temperature = T,
        .forward_weight = 1,
        .reverse_weight = 1,
        .needs_u = 1,
        .needs_v = 1,
        .grad_u = &grad_u_t,
        .grad_v = &grad_v_t,
    };
    require(selfkd_sd_dropout_kl_backward(&backward, NULL));

    double expected_u[N][C];
    const double expected = direct(expected_u);
    double error = fabs(loss - expected) / expected;
    for (int n = 0; n < N; n++)
        for (int c = 0; c < C; c++) error = worse(error, fabs(grad_u[n][c] - expected_u[n][c]));
    printf("selfkd %s: loss %.7f, expected %.7f, largest error %.1e\n", selfkd_version(), loss,
           expected, error);
    return error <= 3e-6 ? 0 : 1;
}
