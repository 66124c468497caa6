/* SD-Dropout on the CPU: see ops/sd_dropout_kl.h for the formula, cpu/core/pair.h for what is done
 * to a row.
 *
 * Test: python -m pytest tests/test_sd_dropout_kl.py    Time: selfkd bench sd_dropout_kl */
#include "sd_dropout_kl.h"
#include "cpu/core/pair.h"
#include "cpu/core/row_loss.h"

SK_PARAMS(sd_dropout_kl)
SK_PARAMS(sd_dropout_kl_backward)
typedef struct sd_dropout_kl_params forward_params;
typedef struct sd_dropout_kl_backward_params backward_params;

/* ---- Forward ---- */

static sk_task forward_rows(const forward_params *p) { return SK_TASKS_OF(p, u); }

static void find(const forward_params *p, const sk_task *r, const real *weight, sk_found found) {
    const sk_pair pair = {&p->u, &p->v, sk_scale_of(p->temperature)};
    sk_diverge(r, &pair, weight, found);
}

static inline double value(const forward_params *p, double weight, sk_found found, int64_t i) {
    return weight * (p->temperature * p->temperature) *
           sk_weighted_kl(found, i, p->forward_weight, p->reverse_weight);
}

SK_ROW_FORWARD(sd_dropout_kl, forward_rows, 2, 4, find, value);

/* ---- Backward ---- */

static sk_task backward_rows(const backward_params *p) { return SK_TASKS_OF(p, u); }

static void backward_task(const backward_params *p, const sk_task *r) {
    const sk_pair pair = {&p->u, &p->v, sk_scale_of(p->temperature)};
    const double per_row = p->temperature / *(const real *)p->denominator.data;
    sk_incoming in;
    SK_ALIGNED double factor[SK_PITCH];
    sk_pair_slopes of; /* set field by field, for its planes are large */
    of.t = &pair.t;
    of.w = sk_term_weights_of(p->forward_weight, p->reverse_weight, p->detach_target);
    sk_load_incoming(r, &p->grad, &p->weight, &p->saved, 4, &in);
    double careful = 0;
#pragma omp simd reduction(+ : careful)
    for (int64_t i = 0; i < sk_scalars(r); i++) {
        /* No gradient: none comes in, or the row has no loss, for its weight or because p = q. */
        const sk_divergence row = sk_found_row(in.saved, i);
        const bool none =
            (in.grad[i] == 0) | (in.weight[i] == 0) | ((row.kl_pq == 0) & (row.kl_qp == 0));
        factor[i] = none ? 0 : per_row * in.grad[i] * in.weight[i];
        careful += (factor[i] != 0) & !sk_is_ordinary(row, factor[i]) ? 1 : 0;
    }
    sk_set_pair(r, in.saved, factor, &of);
    const sk_streams streams = {{&p->u, &p->v}, {SK_WANTED(p->grad_u), SK_WANTED(p->grad_v)}};
    sk_write_gradients(r, &streams, sk_pair_run, &of);
    for (int64_t i = 0; i < r->width && careful != 0; i++) {
        const sk_divergence row = sk_found_row(in.saved, i);
        if (factor[i] != 0 && !sk_is_ordinary(row, factor[i]))
            sk_careful_gradient(r, &pair, i, row, factor[i], of.w, streams.written);
    }
}

SK_ROW_KERNEL(sd_dropout_kl_backward, backward_rows, 2, backward_task, NULL, NULL);
