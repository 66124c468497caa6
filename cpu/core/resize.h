/* Rows of maps, brought from one width to another on the stack, and gradients brought back.
 *
 * A row is columns of `lanes` elements each, one after the other: 1 where positions are contiguous
 * (NCHW), a group of channels where those are (channels_last). */
#pragma once
#include "core/resize.h"
#include "cpu/core/load.h"

enum {
    SK_STRIP = 1024,                              /* elements of the result taken at a time */
    SK_STRIP_LANES = 128,                         /* of a column, at most */
    SK_SOURCE = 2 * SK_STRIP + 3 * SK_STRIP_LANES /* elements of a row that they are made of */
};

/* ---- nearest and bilinear ---- */

/* Output columns begin .. begin + count - 1 in terms of columns of a source row from `first` on. */
typedef struct sk_taps {
    int64_t begin, count, first, span;
    int32_t low[SK_STRIP], high[SK_STRIP];
    real part[SK_STRIP];
} sk_taps;

/* Taps are made anew only where they differ from the last ones; count is 0 at first. */
static inline void sk_set_taps(sk_taps *t, sk_axis a, int64_t begin, int64_t count) {
    if (t->begin == begin && t->count == count) return;
    t->begin = begin;
    t->count = count;
    t->first = sk_tap_of(a, begin).low;
    t->span = sk_tap_of(a, begin + count - 1).high - t->first + 1;
    for (int64_t k = 0; k < count; k++) {
        const sk_tap tap = sk_tap_of(a, begin + k);
        t->low[k] = (int32_t)(tap.low - t->first);
        t->high[k] = (int32_t)(tap.high - t->first);
        t->part[k] = (real)tap.part;
    }
}

/* Leaves the output columns of a row x of `span` columns. */
static inline void sk_expand(const sk_taps *t, bool blend, int64_t lanes, const real *restrict x,
                             real *restrict to) {
    const int64_t count = t->count;
    if (lanes == 1 && !blend) {
#pragma omp simd
        for (int64_t k = 0; k < count; k++) to[k] = x[t->low[k]];
    } else if (lanes == 1) {
#pragma omp simd
        for (int64_t k = 0; k < count; k++)
            to[k] = x[t->low[k]] * (1 - t->part[k]) + x[t->high[k]] * t->part[k];
    } else {
        for (int64_t k = 0; k < count; k++) {
            const real *low = x + t->low[k] * lanes, *high = x + t->high[k] * lanes;
            const real part = t->part[k];
            real *const column = to + k * lanes;
#pragma omp simd
            for (int64_t i = 0; i < lanes; i++) column[i] = low[i] * (1 - part) + high[i] * part;
        }
    }
}

/* Adds the gradient g of the output columns to that of source columns from .. from + count - 1, in
 * double, as a source may be spread over a thousand outputs. */
static inline void sk_fold(const sk_taps *t, int64_t lanes, const real *restrict g, int64_t from,
                           int64_t count, double *restrict to) {
    for (int64_t k = 0; k < t->count; k++) {
        const int64_t low = t->first + t->low[k] - from, high = t->first + t->high[k] - from;
        const double part = t->part[k];
        if (low >= 0 && low < count)
            for (int64_t i = 0; i < lanes; i++)
                to[low * lanes + i] += (1 - part) * (double)g[k * lanes + i];
        if (part != 0 && high >= 0 && high < count)
            for (int64_t i = 0; i < lanes; i++)
                to[high * lanes + i] += part * (double)g[k * lanes + i];
    }
}

/* Leaves the gradient of `count` source columns, each of which is two output columns. */
static inline void sk_fold_pairs(int64_t lanes, const real *restrict g, int64_t count,
                                 real *restrict to) {
    if (lanes == 1) {
#pragma omp simd
        for (int64_t k = 0; k < count; k++) to[k] = g[2 * k] + g[2 * k + 1];
        return;
    }
    for (int64_t k = 0; k < count; k++)
#pragma omp simd
        for (int64_t i = 0; i < lanes; i++)
            to[k * lanes + i] = g[2 * k * lanes + i] + g[(2 * k + 1) * lanes + i];
}

/* to = blend of two rows */
static inline void sk_blend(const real *low, const real *high, real part, int64_t n, real *to) {
#pragma omp simd
    for (int64_t k = 0; k < n; k++) to[k] = low[k] * (1 - part) + high[k] * part;
}

/* ---- maxpool: 3x3, stride 2 ----
 *
 * The window of output column k is even[k], odd[k], even[k + 1], where a row's columns are dealt
 * out to these two in turn. */

/* The larger; NaN is larger than any, the later one of two. */
static inline real sk_larger(real x, real y) {
    const int later = (y > x) | (y != y);
    return later ? y : x;
}

/* Deals out `count` columns of x, the first of them to `one`. */
static inline void sk_deal(const real *restrict x, int64_t lanes, int64_t count, real *restrict one,
                           real *restrict other) {
    if (lanes == 1) {
#pragma omp simd
        for (int64_t k = 0; k < count / 2; k++) {
            one[k] = x[2 * k];
            other[k] = x[2 * k + 1];
        }
        if (count % 2) one[count / 2] = x[count - 1];
        return;
    }
    for (int64_t k = 0; k < count; k++) {
        real *const to = (k % 2 ? other : one) + k / 2 * lanes;
        for (int64_t i = 0; i < lanes; i++) to[i] = x[k * lanes + i];
    }
}

/* Gathers the columns that sk_deal() dealt out. */
static inline void sk_gather(const real *restrict one, const real *restrict other, int64_t lanes,
                             int64_t count, real *restrict x) {
    if (lanes == 1) {
#pragma omp simd
        for (int64_t k = 0; k < count / 2; k++) {
            x[2 * k] = one[k];
            x[2 * k + 1] = other[k];
        }
        if (count % 2) x[count - 1] = one[count / 2];
        return;
    }
    for (int64_t k = 0; k < count; k++) {
        const real *const from = (k % 2 ? other : one) + k / 2 * lanes;
        for (int64_t i = 0; i < lanes; i++) x[k * lanes + i] = from[i];
    }
}

/* to = the largest of three rows */
static inline void sk_largest(const real *a, const real *b, const real *c, int64_t n, real *to) {
#pragma omp simd
    for (int64_t k = 0; k < n; k++) to[k] = sk_larger(sk_larger(a[k], b[k]), c[k]);
}

/* A row of windows, dealt out: two columns more of even ones, one of odd ones. */
typedef struct sk_dealt {
    SK_ALIGNED real even[SK_STRIP + 2 * SK_STRIP_LANES];
    SK_ALIGNED real odd[SK_STRIP + SK_STRIP_LANES];
} sk_dealt;

/* The windows of `count` outputs of a row take 2 count + 1 columns of the source, from `first` on;
 * of these, begin .. end - 1 are there. */
typedef struct sk_windows {
    int64_t first, begin, end;
} sk_windows;

static inline sk_windows sk_windows_of(sk_axis a, int64_t x, int64_t count) {
    const int64_t first = sk_window(a, x);
    return (sk_windows){first, first < 0 ? 0 : first, sk_min(first + 2 * count + 1, a.from)};
}

/* Deals out a row that begins with column `begin`; what is not there is -inf. */
static inline void sk_deal_windows(const real *x, sk_windows w, int64_t lanes, int64_t count,
                                   sk_dealt *to) {
    const int64_t skip = w.begin - w.first, odd = skip / 2 * lanes, even = (skip + 1) / 2 * lanes;
    for (int64_t i = 0; i < even; i++) to->even[i] = -INFINITY;
    for (int64_t i = 0; i < odd; i++) to->odd[i] = -INFINITY;
    for (int64_t i = 0; i < lanes; i++) to->even[count * lanes + i] = -INFINITY;
    real *const one = skip % 2 ? to->odd + odd : to->even + even;
    real *const other = skip % 2 ? to->even + even : to->odd + odd;
    sk_deal(x, lanes, w.end - w.begin, one, other);
}

/* Where each window's winner lies, 3 row + column, and the gradient that it gets. Columns from -1
 * on; numbers as wide as the gradients, so that loops over both are vectorised. */
typedef struct sk_winners {
    SK_ALIGNED real at[SK_STRIP + SK_STRIP_LANES];
    SK_ALIGNED real grad[SK_STRIP + SK_STRIP_LANES];
} sk_winners;

/* Leaves where the winners of n windows lie; a window of -inf has the position `none`. */
static inline void sk_find_winners(const sk_dealt *top, const sk_dealt *middle,
                                   const sk_dealt *bottom, int64_t lanes, int64_t n, real none,
                                   real *restrict to) {
    const real *a = top->even, *b = top->odd, *c = top->even + lanes;
    const real *d = middle->even, *e = middle->odd, *f = middle->even + lanes;
    const real *g = bottom->even, *h = bottom->odd, *i = bottom->even + lanes;
#pragma omp simd
    for (int64_t k = 0; k < n; k++) {
        const real x[9] = {a[k], b[k], c[k], d[k], e[k], f[k], g[k], h[k], i[k]};
        real most = -INFINITY, at = none;
#pragma GCC unroll 9
        for (int j = 0; j < 9; j++) {
            const int wins = (x[j] > most) | (x[j] != x[j]);
            most = wins ? x[j] : most;
            at = wins ? (real)j : at;
        }
        to[k] = at;
    }
}

/* Adds to the gradients of two source rows, their even and odd columns, those of the windows whose
 * top and middle row they are; and leaves those of the bottom row in `next`. */
static inline void sk_unpool(const sk_winners *w, int64_t lanes, int64_t n, sk_dealt *first,
                             sk_dealt *second, sk_dealt *next) {
    const real *at = w->at + lanes, *grad = w->grad + lanes; /* of the window that begins here */
    const real *at_left = w->at, *grad_left = w->grad;       /* of that which ends here */
    real *const e0 = first->even, *const o0 = first->odd, *const e1 = second->even,
                *const o1 = second->odd, *const e2 = next->even, *const o2 = next->odd;
#pragma omp simd
    for (int64_t k = 0; k < n; k++) {
        const real p = at[k], g = grad[k], q = at_left[k], h = grad_left[k];
        e0[k] += (p == 0 ? g : 0) + (q == 2 ? h : 0);
        o0[k] += p == 1 ? g : 0;
        e1[k] = (p == 3 ? g : 0) + (q == 5 ? h : 0);
        o1[k] = p == 4 ? g : 0;
        e2[k] = (p == 6 ? g : 0) + (q == 8 ? h : 0);
        o2[k] = p == 7 ? g : 0;
    }
}
