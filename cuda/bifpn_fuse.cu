/* BiFPN fusion on the GPU: one kernel forward, a thread for each output; one kernel backward, a
 * thread for each pixel of each input, which gathers its gradient. Formulas in ops/bifpn_fuse.h.
 *
 * Test: python -m pytest tests/test_simt.py -k bifpn_fuse
 * Machine code: make sass OP=bifpn_fuse
 * Time: selfkd bench bifpn_fuse --device cuda */
#include "bifpn_fuse.h"

#include "core/resize.h"
#include "core/rows.cuh"

extern "C" {
SK_PARAMS(bifpn_fuse)
SK_PARAMS(bifpn_fuse_backward)
}
typedef struct bifpn_fuse_params forward_params;
typedef struct bifpn_fuse_backward_params backward_params;

constexpr int kMaps = 3;

/* What both directions share: map i is x[i], and comes to the size of the result along two axes. */
struct fusion {
    sk_arg x[kMaps], weight;
    sk_axis rows[kMaps], columns[kMaps];
    int64_t N, C, activation;
    double eps;
    int count;
    bool late; /* the output is activated */
};

template <typename Params>
static fusion fusion_of(const Params &params) {
    const Params *const p = &params;
    const int64_t H = SK_DIM(p, H), W = SK_DIM(p, W);
    return {
        {p->a, p->b, p->c},
        p->weight,
        {{H, H, SK_RESIZE_NONE}, {SK_DIM(p, I), H, p->resize_b}, {SK_DIM(p, K), H, p->resize_c}},
        {{W, W, SK_RESIZE_NONE}, {SK_DIM(p, J), W, p->resize_b}, {SK_DIM(p, L), W, p->resize_c}},
        SK_DIM(p, N),
        SK_DIM(p, C),
        p->activation,
        p->eps,
        p->c.data ? 3 : 2,
        p->activate != 0};
}

/* ---- factors ---- */

struct factors {
    double of[kMaps], total; /* total: what the weights were divided by */
    double part; /* 1, or what they were multiplied by first, for their sum is no number */
};

/* Leaves them in shared memory, where a thread may ask for any. */
SK_DEVICE void find_factors(const fusion &f, factors *k) {
    if (sk_thread() == 0) {
        SK_ROLLED for (double part = 1; part > 0.1; part *= 0.25) {
            k->part = part;
            k->total = f.eps * part;
            SK_ROLLED for (int i = 0; i < f.count; i++) {
                const double w = f.weight.data ? sk_load_any(f.weight.data, f.weight.dtype,
                                                             i * f.weight.stride[0])
                                               : 1;
                k->of[i] = w <= 0 ? 0 : w * part; /* NaN stays */
                k->total += k->of[i];
            }
            if (!isinf(k->total)) break;
        }
        for (int i = 0; i < f.count && f.weight.data; i++) k->of[i] /= k->total;
    }
    __syncthreads();
}

/* Leaves the gradient of the weights, from d. */
SK_DEVICE void finish(const fusion &f, const factors &k, const double (&d)[kMaps],
                      const sk_arg &to) {
    SK_UNROLL for (int i = 0; i < kMaps; i++) {
        if (i >= f.count) break;
        double slope = d[i] * f.eps / k.total * k.part;
        SK_UNROLL for (int j = 0; j < kMaps; j++) slope +=
            j < f.count ? k.of[j] * (d[i] - d[j]) : 0;
        const bool off = sk_load_any(f.weight.data, f.weight.dtype, i * f.weight.stride[0]) <= 0;
        const double grad = off ? 0 : slope / k.total * k.part;
        if (to.dtype == SK_DT_F64)
            ((double *)to.data)[i * to.stride[0]] = grad;
        else
            ((float *)to.data)[i * to.stride[0]] = (float)grad;
    }
}

/* ---- activations ---- */

template <typename real>
SK_DEVICE real act(int64_t activation, real x) {
    if (activation == SK_RELU) return x <= 0 ? 0 : x;
    return activation == SK_SILU ? x / (1 + exp(-x)) : x;
}

/* act'(x) times g */
template <typename real>
SK_DEVICE real slope(int64_t activation, real x, real g) {
    if (activation == SK_RELU) return x <= 0 ? 0 : g;
    const real s = 1 / (1 + exp(-x));
    return activation == SK_SILU ? g * (s * (1 + x * (1 - s))) : g;
}

/* ---- pixels ---- */

struct pixel {
    int64_t n, c, y, x;
};

SK_DEVICE int64_t address(const sk_arg &t, pixel p) {
    return p.n * t.stride[0] + p.c * t.stride[1] + p.y * t.stride[2] + p.x * t.stride[3];
}

/* Pixel i of N x C x H x W, neighbours in memory being neighbours in order. */
SK_DEVICE pixel pixel_of(const sk_arg &t, uint64_t i, uint64_t C, uint64_t H, uint64_t W) {
    const bool last = C > 1 && t.stride[1] == 1; /* channels_last */
    const uint64_t inner = last ? C : W, middle = last ? W : H, outer = last ? H : C;
    const uint64_t row = i / inner, plane = row / middle;
    const int64_t j = (int64_t)(i % inner), k = (int64_t)(row % middle),
                  l = (int64_t)(plane % outer), n = (int64_t)(plane / outer);
    if (last) return {n, j, l, k};
    return {n, l, k, j};
}

template <typename T>
SK_DEVICE sk_real<T> load(const sk_arg &t, pixel p) {
    return sk_widen(((const T *)t.data)[address(t, p)]);
}

/* What is resized: map i, activated unless the output is. */
template <typename T>
SK_DEVICE sk_real<T> operand(const fusion &f, int i, pixel p) {
    const sk_real<T> x = load<T>(f.x[i], p);
    return f.late ? x : act(f.activation, x);
}

/* ---- resizing ---- */

template <typename real>
struct winner {
    real value;
    int64_t y, x;
};

/* The largest of the window of output `at`. */
template <typename T>
SK_DEVICE winner<sk_real<T>> pool(const fusion &f, int i, pixel at) {
    const sk_axis v = f.rows[i], h = f.columns[i];
    const int64_t top = sk_window(v, at.y), left = sk_window(h, at.x);
    winner<sk_real<T>> best = {-(sk_real<T>)INFINITY, -1, -1};
    for (int64_t y = top < 0 ? 0 : top; y < top + 3 && y < v.from; y++) {
        for (int64_t x = left < 0 ? 0 : left; x < left + 3 && x < h.from; x++) {
            const sk_real<T> value = operand<T>(f, i, {at.n, at.c, y, x});
            if (best.y < 0 || value > best.value || value != value) best = {value, y, x};
        }
    }
    return best;
}

/* One row of a bilinear sample. */
template <typename T>
SK_DEVICE sk_real<T> across(const fusion &f, int i, pixel at, int64_t y, sk_tap h) {
    const sk_real<T> low = operand<T>(f, i, {at.n, at.c, y, h.low});
    if (h.part == 0) return low;
    const sk_real<T> high = operand<T>(f, i, {at.n, at.c, y, h.high}), part = (sk_real<T>)h.part;
    return low * (1 - part) + high * part;
}

/* Map i at output `at`. */
template <typename T>
SK_DEVICE sk_real<T> resized(const fusion &f, int i, pixel at) {
    if (f.rows[i].way == SK_RESIZE_MAXPOOL) return pool<T>(f, i, at).value;
    const sk_tap v = sk_tap_of(f.rows[i], at.y), h = sk_tap_of(f.columns[i], at.x);
    const sk_real<T> low = across<T>(f, i, at, v.low, h);
    if (v.part == 0) return low;
    const sk_real<T> part = (sk_real<T>)v.part;
    return low * (1 - part) + across<T>(f, i, at, v.high, h) * part;
}

template <typename T>
SK_DEVICE sk_real<T> fuse(const fusion &f, const factors &k, pixel at) {
    sk_real<T> sum = 0;
    for (int i = 0; i < f.count; i++) sum += (sk_real<T>)k.of[i] * resized<T>(f, i, at);
    return sum;
}

/* ---- forward ---- */

/* Leaves fused. */
template <typename T>
__global__ void __launch_bounds__(SK_BLOCK, 3)
    bifpn_fuse_kernel(const forward_params p, const fusion f) {
    SK_SHARED(factors, k, 1);
    find_factors(f, k);
    const int64_t H = SK_DIM(&p, H), W = SK_DIM(&p, W);
    sk_each(f.N * f.C * H * W, [&](int64_t i) {
        const pixel at = pixel_of(p.fused, (uint64_t)i, f.C, H, W);
        const sk_real<T> sum = fuse<T>(f, *k, at);
        sk_narrow(f.late ? act(f.activation, sum) : sum, (T *)p.fused.data + address(p.fused, at));
    });
}

/* ---- backward ---- */

/* The gradient of the sum at an output. */
template <typename T>
SK_DEVICE sk_real<T> grad_of(const sk_arg &grad, const fusion &f, const factors &k, pixel at) {
    const sk_real<T> g = load<T>(grad, at);
    return f.late ? slope(f.activation, fuse<T>(f, k, at), g) : g;
}

/* The gradient folded back to a pixel of map i, from the windows it wins. */
template <typename T>
SK_DEVICE sk_real<T> unpooled(const sk_arg &grad, const fusion &f, const factors &k, int i,
                              pixel p) {
    const sk_axis v = f.rows[i], h = f.columns[i];
    sk_real<T> sum = 0;
    for (int64_t y = (p.y + v.from % 2) / 2; y >= 0 && sk_window(v, y) + 2 >= p.y; y--) {
        for (int64_t x = (p.x + h.from % 2) / 2; x >= 0 && sk_window(h, x) + 2 >= p.x; x--) {
            if (y >= v.to || x >= h.to) continue;
            const pixel at = {p.n, p.c, y, x};
            const winner<sk_real<T>> best = pool<T>(f, i, at);
            if (best.y == p.y && best.x == p.x) sum += grad_of<T>(grad, f, k, at);
        }
    }
    return sum;
}

/* The same of any way of resizing. */
template <typename T>
SK_DEVICE sk_real<T> folded(const sk_arg &grad, const fusion &f, const factors &k, int i, pixel p) {
    const sk_axis v = f.rows[i], h = f.columns[i];
    if (v.way == SK_RESIZE_NONE) return grad_of<T>(grad, f, k, p);
    if (v.way == SK_RESIZE_MAXPOOL) return unpooled<T>(grad, f, k, i, p);
    const sk_span rows = sk_outputs_of(v, p.y), columns = sk_outputs_of(h, p.x);
    double sum = 0;
    for (int64_t y = rows.begin; y < rows.end; y++) {
        const double share = sk_share(v, y, p.y);
        for (int64_t x = columns.begin; x < columns.end; x++)
            sum += share * sk_share(h, x, p.x) * grad_of<T>(grad, f, k, {p.n, p.c, y, x});
    }
    return (sk_real<T>)sum;
}

/* Leaves the gradients of the maps; the block that ends last leaves that of the weights. As
 * resizing is linear, once its winners are known, d = sum of operand x gradient, pixel by pixel. */
template <typename T>
__global__ void __launch_bounds__(SK_BLOCK, 2)
    bifpn_fuse_backward_kernel(const backward_params p, const fusion f) {
    typedef sk_real<T> real;
    SK_SHARED(factors, k, 1);
    find_factors(f, k);
    double d[kMaps] = {0, 0, 0};
    SK_ROLLED for (int i = 0; i < f.count; i++) {
        double of_map = 0;
        const sk_arg &to = i == 0 ? p.grad_a : i == 1 ? p.grad_b : p.grad_c;
        const int64_t H = f.rows[i].from, W = f.columns[i].from;
        sk_each(f.N * f.C * H * W, [&](int64_t e) {
            const pixel at = pixel_of(to, (uint64_t)e, f.C, H, W);
            const real x = load<T>(f.x[i], at), g = folded<T>(p.grad, f, *k, i, at);
            const real grad = (real)k->of[i] * g;
            if (g != 0) of_map += (double)g * (f.late ? x : act(f.activation, x));
            sk_narrow(f.late ? grad : slope(f.activation, x, grad), (T *)to.data + address(to, at));
        });
        SK_UNROLL for (int j = 0; j < kMaps; j++) d[j] += j == i ? of_map : 0;
    }
    if (!f.weight.data) return;
    if (sk_grid_sum(d, p.scratch.data) && sk_thread() == 0) finish(f, *k, d, p.grad_weight);
}

/* ---- launches ---- */

/* A thread for each pixel of the largest map. */
static int64_t pixels_of(const fusion &f) {
    int64_t most = 0;
    for (int i = 0; i < f.count; i++) {
        const int64_t pixels = f.rows[i].from * f.columns[i].from;
        if (pixels > most) most = pixels;
    }
    return f.N * f.C * most;
}

extern "C" int sk_cuda_bifpn_fuse(const struct bifpn_fuse_params *p, void *stream) {
    const fusion f = fusion_of(*p);
    return sk_launch_each(SK_INSTANCES_FOR_EACH(bifpn_fuse_kernel), pixels_of(f), p->a.dtype,
                          stream, *p, f);
}

extern "C" int sk_cuda_bifpn_fuse_backward(const struct bifpn_fuse_backward_params *p,
                                           void *stream) {
    const fusion f = fusion_of(*p);
    return sk_launch_each(SK_INSTANCES_FOR_EACH(bifpn_fuse_backward_kernel), pixels_of(f),
                          p->a.dtype, stream, *p, f);
}
