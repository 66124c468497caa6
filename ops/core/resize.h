/* Which inputs a resized map's outputs are made of, and which outputs an input is part of: one
 * dimension at a time, for the kernels of all back ends. Positions in double, but "nearest" in
 * float, as PyTorch has it. */
#pragma once
#include <math.h>
#include <stdint.h>

#include "both.h"
#include "contract.h"

/* A dimension of `from` inputs brought to `to` outputs; way is an enum sk_resize. */
typedef struct sk_axis {
    int64_t from, to, way;
} sk_axis;

/* Output = (1 - part) x[low] + part x[high]. */
typedef struct sk_tap {
    int64_t low, high;
    double part;
} sk_tap;

/* What output y is made of; not for "maxpool". */
SK_BOTH sk_tap sk_tap_of(sk_axis a, int64_t y) {
    sk_tap t = {y, y, 0};
    if (a.way == SK_RESIZE_NEAREST) {
        t.low = (int64_t)floorf((float)y * ((float)a.from / (float)a.to));
        if (t.low > a.from - 1) t.low = a.from - 1;
        t.high = t.low;
    } else if (a.way == SK_RESIZE_BILINEAR) {
        const double at = ((double)y + 0.5) * ((double)a.from / (double)a.to) - 0.5;
        t.low = at > 0 ? (int64_t)at : 0;
        t.high = t.low < a.from - 1 ? t.low + 1 : t.low;
        t.part = at > 0 ? at - (double)t.low : 0;
    }
    return t;
}

/* The first output whose low input is i or beyond. */
SK_BOTH int64_t sk_first_output(sk_axis a, int64_t i) {
    if (i <= 0) return 0;
    if (i >= a.from) return a.to;
    int64_t y = (int64_t)((double)i * ((double)a.to / (double)a.from)); /* about */
    if (y > a.to) y = a.to;
    while (y > 0 && sk_tap_of(a, y - 1).low >= i) y--;
    while (y < a.to && sk_tap_of(a, y).low < i) y++;
    return y;
}

/* Outputs begin .. end - 1 are all that input i is part of. */
typedef struct sk_span {
    int64_t begin, end;
} sk_span;

SK_BOTH sk_span sk_outputs_of(sk_axis a, int64_t i) {
    const sk_span s = {sk_first_output(a, a.way == SK_RESIZE_BILINEAR ? i - 1 : i),
                       sk_first_output(a, i + 1)};
    return s;
}

/* How much of output y is input i. */
SK_BOTH double sk_share(sk_axis a, int64_t y, int64_t i) {
    const sk_tap t = sk_tap_of(a, y);
    return (t.low == i ? 1 - t.part : 0) + (t.high == i ? t.part : 0);
}

/* "maxpool": the first of the three inputs of output y; it may lie before the edge, and the last
 * one beyond the other. */
SK_BOTH int64_t sk_window(sk_axis a, int64_t y) { return 2 * y - a.from % 2; }
