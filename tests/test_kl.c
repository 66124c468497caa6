/* cpu/core/kl.h by itself: what is wrong in its vector loops the kernels would mend class by class,
 * in double, so that no other test sees it. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>

#include <math.h>
#include <string.h>

#include "cpu/core/pair.h"

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

static uint64_t state_of_uniform = 7;
static double uniform(void) { /* 0 .. 1 */
    state_of_uniform = state_of_uniform * 6364136223846793005u + 1442695040888963407u;
    return (double)(state_of_uniform >> 40) / (1 << 24);
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
        const sk_vectors u = sk_vectors_of(&r, x->u[n], WIDE / SK_LANES),
                         v = sk_vectors_of(&r, x->v[n], WIDE / SK_LANES);
        m.hu[n] = m.hv[n] = -INFINITY;
        sk_raise(&r, u, n, m.hu);
        sk_raise(&r, v, n, m.hv);
        const sk_two_tiles tiles = {u, v, next, next, n, e};
        sk_compare_group(form, SK_BOTH_KL, SK_KEEP, &r, &t, &t_v, &tiles, &m);
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

/* Both KL and the log-ratio to more digits than a double holds of rows that are close. */
typedef struct exactly {
    long double pq, qp, dl;
} exactly;
static exactly exactly_of(const rows *x, int n) {
    long double u = 0, v = 0;
    for (int c = 0; c < C; c++) {
        u += expl((long double)x->u[n][c]);
        v += expl((long double)x->v[n][c]);
    }
    exactly e = {0, 0, logl(u) - logl(v)};
    for (int c = 0; c < C; c++) {
        const long double p = expl((long double)x->u[n][c]) / u;
        const long double q = expl((long double)x->v[n][c]) / v;
        const long double d = ((long double)x->u[n][c] - x->v[n][c]) - e.dl;
        e.pq += p * d - (p - q);
        e.qp += -q * d - (q - p);
    }
    return e;
}

/* Rows are good to 3e-6, or told apart; returns how many were told apart. */
static int good_or_apart(rows *x) {
    sk_concluded found[N];
    int apart = 0;
    measure(x, SK_PLAIN, 1, 1, found);
    for (int n = 0; n < N; n++) {
        const exactly e = exactly_of(x, n);
        apart += isnan(found[n].kl_pq);
        if (isnan(found[n].kl_pq)) continue;
        assert_true(fabsl(found[n].kl_pq - e.pq) <= 3e-6L * e.pq);
        assert_true(fabsl(found[n].kl_qp - e.qp) <= 3e-6L * e.qp);
    }
    return apart;
}

/* A shift of v, up to a hundred times the spread: what rounds u - v. */
static void gaps_are_told_apart(void **state) {
    (void)state;
    int apart = 0, all = 0;
    for (int i = 0; i < 3000; i++, all += N) {
        rows x;
        const double spread = pow(10, -3 + 4 * uniform());
        draw(&x, spread, spread * pow(10, 2 * uniform()));
        apart += good_or_apart(&x);
    }
    assert_in_range(apart, all / 4, all * 3 / 4);
}

/* The largest logit alone differs, in rows so flat that it is a small part of P and Q: against it
 * all other classes differ, and h(r) takes nearly all of that away. */
static void anchors_that_differ_are_told_apart(void **state) {
    (void)state;
    int apart = 0, all = 0;
    for (int i = 0; i < 5000; i++, all += N) {
        rows x;
        const double spread = pow(10, -0.5 + 2 * uniform()), above = pow(10, -3 + 3.5 * uniform());
        draw(&x, 0, 0);
        for (int n = 0; n < N; n++) {
            int top = 0;
            for (int c = 0; c < C; c++) {
                x.u[n][c] = (float)(spread * uniform());
                x.v[n][c] = (float)(x.u[n][c] + above * uniform() / 1000);
                if (x.u[n][c] > x.u[n][top]) top = c;
            }
            float *const higher = i % 2 ? x.u[n] : x.v[n];
            higher[top] = (float)(higher[top] + above);
        }
        apart += good_or_apart(&x);
    }
    assert_in_range(apart, all / 2, all - 100);
}

/* A KL of 26 is found; that of a class at -inf, of 1e-10 of the other row, is told apart. */
static void infinite_rows_are_told_apart(void **state) {
    (void)state;
    rows x;
    sk_concluded found[N];
    draw(&x, 0, 0);
    for (int n = 0; n < N; n++) {
        for (int c = 0; c < C; c++) x.u[n][c] = x.v[n][c] = c == 0 ? 0 : -1;
        x.u[n][1] = x.v[n][2] = n < 3 ? -1000 : -INFINITY;
        x.u[n][2] = x.v[n][1] = n < 3 ? 0 : -20; /* 1e-10 of the row */
    }
    measure(&x, SK_EXACT, 1, 1, found);
    for (int n = 0; n < N; n++) {
        if (n >= 3) assert_true(isnan(found[n].kl_pq) && isnan(found[n].kl_qp));
        if (n >= 3) continue;
        const exactly e = exactly_of(&x, n);
        assert_true(e.qp > 10 && fabsl(found[n].kl_qp - e.qp) <= 3e-6L * e.qp);
    }
}

/* d of a row that sk_set_pair() calls close, against its spread. */
static void close_gradients_lose_nothing(void **state) {
    (void)state;
    int close = 0, all = 0;
    double most = 0;
    for (int i = 0; i < 3000; i++) {
        rows x;
        sk_found saved = {{0}};
        double factor[SK_PITCH] = {1};
        const sk_scale t = sk_scale_of(1);
        const sk_task r = {.N = 1, .C = C, .S = 1, .width = 1, .groups = 1};
        sk_pair_slopes k = {&t, sk_term_weights_of(1, 1, false), false, {{0}}};
        const double spread = pow(10, -3 + 3 * uniform());
        draw(&x, spread, spread * pow(10, -1 + 3 * uniform()));
        const exactly e = exactly_of(&x, 0);
        saved[SK_DL][0] = (double)e.dl;
        saved[SK_KL_PQ][0] = (double)e.pq;
        saved[SK_KL_QP][0] = (double)e.qp;
        sk_set_pair(&r, saved, factor, &k);
        all++;
        if (!k.all_close) continue;
        close++;
        for (int c = 0; c < C; c++) {
            const long double d = ((long double)x.u[0][c] - x.v[0][c]) - e.dl;
            const sk_pair_terms found = sk_pair_at(true, &t, k.of, 0, x.u[0][c], x.v[0][c]);
            most = fmax(most, (double)(fabsl(found.d - d) / sqrtl(2 * fminl(e.pq, e.qp))));
        }
    }
    print_message("d of close rows is off by %.2e of its spread\n", most);
    assert_true(most <= 5e-7);
    assert_in_range(close, all / 10, all * 9 / 10);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(ordinary_rows),
        cmocka_unit_test(close_rows),
        cmocka_unit_test(rows_far_from_each_other),
        cmocka_unit_test(gaps_are_told_apart),
        cmocka_unit_test(anchors_that_differ_are_told_apart),
        cmocka_unit_test(infinite_rows_are_told_apart),
        cmocka_unit_test(close_gradients_lose_nothing),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
