/* BiFPN fusion on the CPU, forward: see cpu/core/fusion.h.
 *
 * Test: python -m pytest tests/test_bifpn_fuse.py    Time: selfkd bench bifpn_fuse */
#include "cpu/core/fusion.h"

SK_PARAMS(bifpn_fuse)
typedef struct bifpn_fuse_params forward_params;

static void forward_strip(const sk_fusion *f, sk_resizing *w, const sk_arg *fused,
                          const sk_place *s, const sk_block *strip) {
    for (sk_block b = {strip->y, 0, strip->x, strip->columns};
         sk_next_block(strip, s->lanes, SK_STRIP, &b);) {
        real *const to = sk_begin_block(fused, s, &b, w->fused);
        sk_fuse(f, w, s, &b, to);
        if (f->late) sk_activated(f->activation, to, b.rows * b.columns * s->lanes, to);
        sk_end_block(fused, s, &b, to);
    }
}

static sk_fusion forward_fusion(const forward_params *p) {
    sk_fusion f = SK_FUSION_OF(p);
    sk_set_factors(&f, &p->weight, p->eps);
    sk_set_strips(&f);
    return f;
}

static sk_work forward_work(const void *params) {
    const sk_fusion f = forward_fusion(params);
    return sk_fusion_work(&f);
}

static void bifpn_fuse_rows(const void *params, int64_t begin_task, int64_t end_task) {
    const forward_params *p = params;
    const sk_fusion f = forward_fusion(p);
    const int64_t strips = sk_strips_of(&f), tasks = sk_min(strips, SK_FUSION_TASKS);
    sk_resizing w;
    for (int i = 0; i < SK_MAPS; i++) w.taps[i].count = 0;
    for (int64_t i = begin_task * strips / tasks; i < end_task * strips / tasks; i++) {
        sk_place s;
        const sk_block strip = sk_strip_of(&f, i, &s);
        forward_strip(&f, &w, &p->fused, &s, &strip);
    }
}

const sk_cpu_kernel SK_CPU(bifpn_fuse) = {forward_work, bifpn_fuse_rows, NULL, NULL};
