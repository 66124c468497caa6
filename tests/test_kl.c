/* cpu/core/kl.h by itself: what is wrong in its vector loops the kernels would mend class by class,
 * in double, so that no other test sees it. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>

#include <math.h>
#include <string.h>

#include "cpu/core/kl.h"

enum { N = 7, C = 100, WIDE = 112 };

typedef struct rows {
    float u[N][WIDE], v[N][WIDE];
} rows;

/* Logits of standard deviation 2; `apart`: how far v is from u; `shift`: by how much it lies above.
 */
static void draw(rows *x, double apart, double shift) {
    uint64_t seed = 1;
    for (int n = 0; n < N; n++)
        for (int c = 0; c < WIDE; c++) {
            double z[2];
            for (int i = 0; i < 2; i++) {
                seed = seed * 6364136223846793005u + 1442695040888963407u;
                z[i] = (double)(seed >> 40) / (1 << 24) - 0.5;
            }
            x->u[n][c] = c < C ? (float)(7 * z[0]) : -INFINITY;
            x->v[n][c] = c < C ? (float)(7 * z[0] + apart * z[1] + shift) : -INFINITY;
        }
}

static void expected(const rows *x, int n, double T, double T_v, double *forward, double *reverse) {
    double u = 0, v = 0;
    for (int c = 0; c < C; c++) {
        u += exp(x->u[n][c] / T);
        v += exp(x->v[n][c] / T_v);
    }
    *forward = *reverse = 0;
    for (int c = 0; c < C; c++) {
        const double log_p = x->u[n][c] / T - log(u), log_q = x->v[n][c] / T_v - log(v);
        *forward += exp(log_p) * (log_p - log_q);
        *reverse += exp(log_q) * (log_q - log_p);
    }
}

static void measure(rows *x, enum sk_form form, double T, double T_v, sk_concluded *to) {
    const sk_task r = {.N = N, .C = C, .S = 1, .width = N, .groups = N};
    const sk_scale t = sk_scale_of(T), t_v = sk_scale_of(T_v);
    const sk_ahead next = {(uintptr_t)x, 0};
    sk_comparison m;
    float e[WIDE];
    sk_clear_sums(&r, &m);
    for (int n = 0; n < N; n++) {
        m.hu[n] = m.hv[n] = -INFINITY;
        sk_raise(&r, x->u[n], WIDE / SK_LANES, n, m.hu);
        sk_raise(&r, x->v[n], WIDE / SK_LANES, n, m.hv);
        const sk_two_tiles tiles = {x->u[n], x->v[n], next, next, WIDE / SK_LANES, n, e};
        sk_compare_group(form, true, SK_KEEP, &r, &t, &t_v, &tiles, &m);
        to[n] = sk_conclude(form, true, &m, n, &t, &t_v);
    }
}

static void check(enum sk_form form, double T, double T_v, double apart, double shift) {
    rows x;
    sk_concluded found[N];
    draw(&x, apart, shift);
    measure(&x, form, T, T_v, found);
    for (int n = 0; n < N; n++) {
        double forward, reverse;
        expected(&x, n, T, T_v, &forward, &reverse);
        assert_true(fabs(found[n].kl_pq - forward) <= 3e-6 * forward);
        assert_true(fabs(found[n].kl_qp - reverse) <= 3e-6 * reverse);
    }
}

static void ordinary_rows(void **state) {
    (void)state;
    check(SK_PLAIN, 3, 3, 7, 0);
    check(SK_EXACT, 3, 3, 7, 0);
    check(SK_APART, 3, 2, 7, 0);
}

static void close_rows(void **state) {
    (void)state;
    check(SK_PLAIN, 1, 1, 1e-3, 0);
}

static void rows_far_from_each_other(void **state) {
    (void)state;
    rows x;
    sk_concluded found[N];
    check(SK_EXACT, 1, 1, 1, 100);
    draw(&x, 1, 100);
    measure(&x, SK_PLAIN, 1, 1, found);
    for (int n = 0; n < N; n++) assert_true(isnan(found[n].kl_pq)); /* and says so */
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(ordinary_rows),
        cmocka_unit_test(close_rows),
        cmocka_unit_test(rows_far_from_each_other),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
