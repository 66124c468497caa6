/* Blocks of a map (N, C, H, W) in memory, whatever its strides: each is read as one run of
 * elements, row by row, in place where that can be. */
#pragma once
#include "cpu/core/load.h"

/* Channels c .. c + lanes - 1 of sample n; and some rows and columns of them. */
typedef struct sk_place {
    int64_t n, c, lanes;
} sk_place;
typedef struct sk_block {
    int64_t y, rows, x, columns;
} sk_block;

/* A block in memory: rows x runs of `length` elements. */
typedef struct sk_extent {
    int64_t at, rows, row_step, runs, run_step, length, stride;
} sk_extent;

static inline sk_extent sk_extent_of(const sk_arg *t, const sk_place *s, const sk_block *b) {
    const int64_t *const st = t->stride;
    sk_extent e = {.at = s->n * st[0] + s->c * st[1] + b->y * st[2] + b->x * st[3],
                   .rows = b->rows,
                   .row_step = st[2],
                   .runs = b->columns,
                   .run_step = st[3],
                   .length = s->lanes,
                   .stride = st[1]};
    if (s->lanes > 1 && (st[1] != 1 || (st[3] != s->lanes && b->columns > 1))) return e;
    e.length = s->lanes * b->columns; /* a row is one run */
    e.runs = 1;
    e.stride = s->lanes > 1 ? 1 : st[3];
    if (b->rows > 1 && st[2] != e.length * e.stride) return e;
    e.length *= b->rows;
    e.rows = 1;
    return e;
}

static inline bool sk_extent_in_place(const sk_arg *t, const sk_extent *e) {
    return e->rows * e->runs == 1 && sk_is_plain(t, e->stride);
}

/* The elements of a block, row by row: where they lie or, if they cannot be used there, in `to`. */
static inline const real *sk_read_block(const sk_arg *t, const sk_place *s, const sk_block *b,
                                        real *to) {
    const sk_extent e = sk_extent_of(t, s, b);
    if (sk_extent_in_place(t, &e)) {
        sk_fetch_page(t, e.at, e.length);
        return (const real *)t->data + e.at;
    }
    real *next = to;
    for (int64_t y = 0; y < e.rows; y++)
        for (int64_t x = 0; x < e.runs; x++, next += e.length)
            sk_copy(t, e.at + y * e.row_step + x * e.run_step, e.stride, e.length, next);
    return to;
}

/* Where a block is to be written: its place or the buffer, which sk_end_block empties there. */
static inline real *sk_begin_block(const sk_arg *t, const sk_place *s, const sk_block *b,
                                   real *buffer) {
    const sk_extent e = sk_extent_of(t, s, b);
    return sk_extent_in_place(t, &e) ? (real *)t->data + e.at : buffer;
}

static inline void sk_end_block(const sk_arg *t, const sk_place *s, const sk_block *b,
                                const real *from) {
    const sk_extent e = sk_extent_of(t, s, b);
    if (sk_extent_in_place(t, &e)) return;
    for (int64_t y = 0; y < e.rows; y++)
        for (int64_t x = 0; x < e.runs; x++, from += e.length)
            sk_put(t, e.at + y * e.row_step + x * e.run_step, e.stride, e.length, from);
}

/* The next block of `most` elements of a strip, b being {strip.y, 0, ...} before the first. */
static inline bool sk_next_block(const sk_block *strip, int64_t lanes, int64_t most, sk_block *b) {
    const int64_t fit = most / (strip->columns * lanes);
    b->y += b->rows;
    b->rows = sk_min(fit > 1 ? fit : 1, strip->y + strip->rows - b->y);
    return b->rows > 0;
}
