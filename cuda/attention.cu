/* Attention transfer on the GPU: formulas in ops/attention.h; summed in double, for the reasons in
 * cpu/attention.c. One kernel forward, which reads each network's features once, one backward,
 * which reads the student once.
 *
 * A block takes a tile: positions of a sample. Features come in two forms. "planes": neighbours in
 * memory are positions. "rows": they are channels, and a warp shares those of a position.
 *
 * Test: python -m pytest tests/test_simt.py -k attention
 * Machine code: make sass OP=attention
 * Time: selfkd bench attention --device cuda */
#include "attention.h"
#include "core/row_loss.cuh"

extern "C" {
SK_PARAMS(attention)
SK_PARAMS(attention_backward)
}
typedef struct attention_params forward_params;
typedef struct attention_backward_params backward_params;

/* ---- tiles ---- */

/* How a sample is cut. Of planes a run is kVec neighbouring positions, one access, and a tile is
 * `width` runs, with `slices` threads for each, which share its channels: so few positions still
 * keep a block busy, and its threads read whole lines of memory. Of rows, `width` positions. */
struct tiling {
    bool rows, vector; /* vector: accesses of 16 bytes */
    int width, slices;
    int64_t S, per_sample;
};

static tiling tiling_of(int64_t S, int64_t vec) {
    const int64_t runs = S / vec, width = runs >= 2 * SK_WARP ? SK_WARP : runs < 1 ? 1 : runs;
    return {false, vec > 1, (int)width, SK_BLOCK / (int)width, S, (runs + width - 1) / width};
}

static unsigned blocks_of(int64_t tiles) {
    return tiles < UINT32_MAX ? (unsigned)tiles : UINT32_MAX; /* more is an error at the launch */
}

/* What this thread does of tile `index` of planes. */
struct place {
    int64_t n, s; /* its first position */
    int slice;    /* its first channel */
    bool present;
};

template <int kVec>
SK_DEVICE place place_of(const tiling &t, unsigned index) {
    const int64_t tile = index % t.per_sample;
    const int slice = (int)sk_thread() / t.width;
    const int64_t s = (tile * t.width + (int)sk_thread() % t.width) * kVec;
    return {index / t.per_sample, s, slice, slice < t.slices && s < t.S};
}

/* This thread's run of channel c. */
template <typename T>
SK_DEVICE T *run_of(const sk_arg &x, const place &at, int64_t c) {
    return sk_row<T>(x, at.n, at.s) + c * x.stride[1];
}

/* How some "NC*" tensors are served together. */
struct form {
    bool planes;
    sk_layout rows; /* where they are no planes */
    tiling tiles;   /* where they are */
};

static form form_of(const sk_dims &dims, int64_t C, int64_t element,
                    std::initializer_list<const sk_arg *> args) {
    const int64_t N = dims.size['N' - 'A'], S = dims.size['S' - 'A'], wide = 16 / element;
    sk_dims own = dims;
    own.size['C' - 'A'] = C;
    const sk_layout rows = sk_layout_of(own, element, args);
    bool planes = S > 1, aligned = S % wide == 0;
    for (const sk_arg *x : args) {
        planes = planes && x->stride[2] == 1 && x->stride[1] != 1;
        aligned = aligned && (uintptr_t)x->data % 16 == 0 && x->stride[1] % wide == 0 &&
                  (N <= 1 || x->stride[0] % wide == 0);
    }
    return {planes, rows, tiling_of(S, aligned ? wide : 1)};
}

/* ---- forward ---- */

/* One network's features: their map lies at `map`. */
struct network {
    sk_arg x;
    int64_t C;
    tiling tiles;
    double *map;
};

/* A warp has about 4 KB of a tile of rows to read. */
static network network_of(const forward_params &params, const sk_arg &x, int64_t C, double *map) {
    const int64_t S = SK_DIM(&params, S);
    network k = {x, C, {}, map};
    SK_SWITCH_FLOATING(x.dtype, T, {
        const form f = form_of(params.dims, C, sizeof(T), {&x});
        const int64_t per_warp = 4096 / sizeof(T) / (C < 1 ? 1 : C);
        const int64_t width = SK_BLOCK / SK_WARP * (per_warp < 1 ? 1 : per_warp);
        k.tiles = f.planes ? f.tiles
                           : tiling{true, f.rows.vector, (int)width, 1, S, (S + width - 1) / width};
    })
    if (k.tiles.per_sample < 1) k.tiles.per_sample = 1; /* a sample without positions has slopes */
    return k;
}

/* Leaves a tile's means of squares over the channels; `sums` holds kVec for each thread. */
template <typename T, int kVec>
SK_DEVICE void map_planes(const network &k, unsigned index, double *sums) {
    const tiling &t = k.tiles;
    const place at = place_of<kVec>(t, index);
    double sum[kVec] = {0};
    for (int64_t c = at.slice; at.present && c < k.C; c += t.slices) {
        sk_real<T> run[kVec];
        sk_load_run<T, kVec>(run_of<T>(k.x, at, c), run);
        SK_UNROLL for (int i = 0; i < kVec; i++) sum[i] += (double)run[i] * (double)run[i];
    }
    SK_UNROLL for (int i = 0; i < kVec; i++) sums[sk_thread() * kVec + i] = sum[i];
    __syncthreads();
    const int positions = t.width * kVec;
    const int64_t first = index % t.per_sample * positions;
    for (int i = (int)sk_thread(); i < positions && first + i < t.S; i += SK_BLOCK) {
        double total = 0;
        for (int slice = 0; slice < t.slices; slice++) total += sums[slice * positions + i];
        k.map[at.n * t.S + first + i] = total / (double)k.C;
    }
}

/* Leaves a tile's means of squares, of rows. */
template <typename T, int kVec>
SK_DEVICE void map_rows(const network &k, unsigned index) {
    const tiling &t = k.tiles;
    const int64_t n = index / t.per_sample, first = index % t.per_sample * t.width;
    const int64_t end = first + t.width < t.S ? first + t.width : t.S;
    for (int64_t s = first + threadIdx.y; s < end; s += blockDim.y) {
        const T *const from = sk_row<T>(k.x, n, s);
        const int64_t stride = kVec == 1 ? k.x.stride[1] : 1;
        double sum[1] = {0};
        SK_UNROLL_4 for (int64_t c = sk_lane() * kVec; c < k.C; c += SK_WARP * kVec) {
            sk_real<T> run[kVec];
            sk_load_run<T, kVec>(from + c * stride, run);
            SK_UNROLL for (int i = 0; i < kVec; i++) sum[0] += (double)run[i] * (double)run[i];
        }
        sk_warp_reduce(sum, sk_add());
        if (sk_lane() == 0) k.map[n * t.S + s] = sum[0] / (double)k.C;
    }
}

SK_DEVICE void map_tile(const network &k, unsigned index, double *sums){
    SK_SWITCH_FLOATING(k.x.dtype, T,
                       {
                           constexpr int kWide = 16 / sizeof(T);
                           if (k.tiles.rows && k.tiles.vector)
                               map_rows<T, kWide>(k, index);
                           else if (k.tiles.rows)
                               map_rows<T, 1>(k, index);
                           else if (k.tiles.vector)
                               map_planes<T, kWide>(k, index, sums);
                           else
                               map_planes<T, 1>(k, index, sums);
                       })}

/* ---- samples of doubles too large or too small to square twice: in units of their largest ---- */

/* Lengths of maps whose products are sure to be good. */
SK_DEVICE bool is_near(double length) {
    return length > 0x1p-400 && length < 0x1p400;
}

/* Replaces a map by its directions, a / max(|a|, eps); returns max(|a|, eps)^(-1/2), and whether
 * the length is 1. */
SK_DEVICE double far_map(const network &k, int64_t S, int64_t n, double eps, bool *unit) {
    double *const a = k.map + n * S;
    double top[1] = {0}, square[1] = {0};
    SK_ROLLED for (int64_t s = sk_thread(); s < S; s += SK_BLOCK) {
        const sk_any_row row = sk_any_row_of(k.x, n, s);
        SK_ROLLED for (int64_t c = 0; c < k.C; c++) top[0] = fmax(top[0], fabs(row(c)));
    }
    sk_block_reduce(top, sk_larger());
    const double by = top[0] > 0 && isfinite(top[0]) ? fmin(1 / top[0], 0x1p1000) : 1;
    SK_ROLLED for (int64_t s = sk_thread(); s < S; s += SK_BLOCK) {
        const sk_any_row row = sk_any_row_of(k.x, n, s);
        double sum = 0;
        SK_ROLLED for (int64_t c = 0; c < k.C; c++) {
            const double z = row(c) * by;
            sum += z * z;
        }
        sum /= (double)k.C;
        a[s] = sum;
        square[0] += sum * sum;
    }
    sk_block_reduce(square, sk_add());
    const double length = sqrt(square[0]), least = eps * by * by;
    *unit = !(length < least);
    const double scale = 1 / (*unit ? length : least);
    SK_ROLLED for (int64_t s = sk_thread(); s < S; s += SK_BLOCK) a[s] *= scale;
    return *unit ? by / sqrt(length) : 1 / sqrt(eps);
}

/* Leaves directions and slopes of such a sample; every thread returns its |Q - P|^2. */
SK_DEVICE double conclude_far(const forward_params &params, const network &student,
                              const network &teacher, int64_t n) {
    const forward_params *const p = &params;
    const int64_t S = SK_DIM(p, S);
    bool unit_q = true, unit_t = true;
    double root = 0;
    SK_ROLLED for (int i = 0; i < 2; i++) { /* the teacher, then the student */
        network k = teacher;
        if (i == 1) k = student;
        unit_t = unit_q;
        root = far_map(k, S, n, p->eps, &unit_q);
    }
    double sum[2] = {0, 0};
    for (int64_t s = sk_thread(); s < S; s += SK_BLOCK) { /* those that it has written */
        const double t = teacher.map[n * S + s], d = student.map[n * S + s] - t;
        sum[0] += d * d;
        sum[1] += t * t;
    }
    sk_block_reduce(sum, sk_add());
    if (sk_thread() == 0) {
        const double h = unit_q ? (sum[0] + (unit_t ? 0 : 1 - sum[1])) / 2 : 0;
        *sk_cell<double>(p->slopes, 0, n) = 1 - h;
        *sk_cell<double>(p->slopes, 1, n) = -root;
    }
    return sum[0];
}

/* ---- all samples ---- */

/* Leaves the slopes of sample n; every thread returns its |Q - P|^2, and whether it is far. */
SK_DEVICE double conclude(const forward_params &params, int64_t n, bool *far) {
    const forward_params *const p = &params;
    const int64_t N = SK_DIM(p, N), S = SK_DIM(p, S);
    const double *const a = (const double *)p->maps.data + n * S, *const b = a + N * S;
    double squares[2] = {0, 0};
    for (int64_t s = sk_thread(); s < S; s += SK_BLOCK) {
        squares[0] += a[s] * a[s];
        squares[1] += b[s] * b[s];
    }
    sk_block_reduce(squares, sk_add());
    const double long_a = sqrt(squares[0]), long_b = sqrt(squares[1]);
    *far = !(is_near(long_a) && is_near(long_b));
    const bool unit_a = !(long_a < p->eps), unit_b = !(long_b < p->eps);
    const double scale_a = 1 / (unit_a ? long_a : p->eps), scale_b = 1 / (unit_b ? long_b : p->eps);
    double apart[1] = {0}; /* exactly 0 for equal maps */
    for (int64_t s = sk_thread(); s < S; s += SK_BLOCK) {
        const double d = scale_a / scale_b * a[s] - b[s];
        apart[0] += d * d;
    }
    sk_block_reduce(apart, sk_add());
    const double value = apart[0] * scale_b * scale_b;
    const double bb = unit_b ? 1 : squares[1] * scale_b * scale_b; /* |P|^2 */
    const double h = unit_a ? (value + (1 - bb)) / 2 : 0;
    if (sk_thread() == 0) {
        *sk_cell<double>(p->slopes, 0, n) = scale_a / scale_b * (1 - h);
        *sk_cell<double>(p->slopes, 1, n) = scale_a * scale_b;
    }
    return value;
}

/* Samples n, n + groups, ... are a group: the block that finishes its last tile concludes them. */
static unsigned groups_of(int64_t N) {
    return N < SK_REDUCE_BLOCKS ? (unsigned)N : SK_REDUCE_BLOCKS;
}

/* Leaves maps and slopes; the block that ends last leaves the loss. First come the tiles of the
 * student, then those of the teacher. */
__global__ void __launch_bounds__(SK_BLOCK, 4)
    attention_kernel(const forward_params params, const network student, const network teacher,
                     unsigned groups) {
    const forward_params *const p = &params;
    SK_SHARED(double, sums, SK_BLOCK * 8);
    const int64_t N = SK_DIM(p, N);
    const int64_t of_student = N * student.tiles.per_sample;
    double total[1] = {0};
    if (N > 0) {
        const bool is_student = blockIdx.x < of_student;
        const unsigned index = blockIdx.x - (is_student ? 0 : (unsigned)of_student);
        network k = teacher;
        if (is_student) k = student;
        map_tile(k, index, sums);
        const unsigned group = (unsigned)(index / k.tiles.per_sample % groups);
        const int64_t samples = (N - group + groups - 1) / groups;
        const int64_t tiles = samples * (student.tiles.per_sample + teacher.tiles.per_sample);
        if (!sk_is_last((unsigned *)p->scratch.data + group, (unsigned)tiles)) return;
        const bool wide = student.x.dtype == SK_DT_F64 || teacher.x.dtype == SK_DT_F64;
        for (int64_t n = group; n < N; n += groups) {
            bool far;
            double value = conclude(params, n, &far);
            if (wide && far) value = conclude_far(params, student, teacher, n);
            if (sk_thread() == 0) total[0] += value;
        }
        void *const scratch = (char *)p->scratch.data + SK_TICKET_BYTES;
        if (!sk_sum_blocks(total, group, groups, scratch)) return;
    }
    if (sk_thread() != 0) return;
    const double loss = total[0] / ((double)N * (double)SK_DIM(p, S));
    if (p->loss.dtype == SK_DT_F64)
        *(double *)p->loss.data = loss;
    else
        *(float *)p->loss.data = (float)loss;
}

/* ---- backward ---- */

/* Features of a far sample are multiplied by the root of their factor twice: only doubles are so
 * large or so small that both at once would not do. */
template <typename T>
SK_DEVICE bool is_far(const backward_params &p, int64_t n) {
    return sizeof(T) == 8 && *sk_cell<double>(p.slopes, 1, n) < 0;
}

/* Multiplies by the root a second time. */
template <typename T, int kCount>
SK_DEVICE void multiply_again(const backward_params &p, int64_t n, sk_real<T> (&x)[kCount]) {
    const double root = -*sk_cell<double>(p.slopes, 1, n);
    SK_UNROLL for (int i = 0; i < kCount; i++) x[i] = (sk_real<T>)(x[i] * root);
}

/* What the student's features at a position are multiplied by. */
template <typename real>
SK_DEVICE double factor_of(const backward_params &params, int64_t n, int64_t s) {
    const backward_params *const p = &params;
    const double a = *sk_cell<double>(p->maps, 0, n, s), b = *sk_cell<double>(p->maps, 1, n, s);
    const double ratio = *sk_cell<double>(p->slopes, 0, n),
                 slope = *sk_cell<double>(p->slopes, 1, n);
    const double factor = slope > 0 ? slope : sizeof(real) == 8 ? -slope : slope * slope;
    const double count = (double)SK_DIM(p, N) * (double)SK_DIM(p, S) * (double)SK_DIM(p, C);
    return factor * *(const real *)p->grad.data * 4 / count * (ratio * a - b);
}

/* Leaves grad_student. */
template <typename T, int kVec>
__global__ void __launch_bounds__(SK_BLOCK)
    attention_backward_planes_kernel(const backward_params params, const tiling t) {
    const backward_params *const p = &params;
    const int64_t C = SK_DIM(p, C);
    const place at = place_of<kVec>(t, blockIdx.x);
    if (!at.present) return;
    double factor[kVec];
    SK_UNROLL for (int k = 0; k < kVec; k++) factor[k] =
        factor_of<sk_real<T>>(params, at.n, at.s + k);
    const bool far = is_far<T>(params, at.n);
    for (int64_t c = at.slice; c < C; c += t.slices) {
        sk_real<T> run[kVec];
        sk_load_run<T, kVec>(run_of<T>(p->student, at, c), run);
        SK_UNROLL for (int k = 0; k < kVec; k++) run[k] = (sk_real<T>)(factor[k] * run[k]);
        if (far) multiply_again<T>(params, at.n, run);
        sk_store_run<T, kVec>(run, run_of<T>(p->grad_student, at, c));
    }
}

/* Leaves grad_student, of rows. */
template <typename T, int kVec>
__global__ void __launch_bounds__(SK_BLOCK)
    attention_backward_rows_kernel(const backward_params p) {
    sk_each_row(p, [&](int64_t n, int64_t s) {
        const int64_t C = SK_DIM(&p, C);
        const double factor = factor_of<sk_real<T>>(p, n, s);
        const bool far = is_far<T>(p, n);
        const T *const from = sk_row<T>(p.student, n, s);
        T *const to = sk_row<T>(p.grad_student, n, s);
        SK_UNROLL_4 for (int64_t c = sk_lane() * kVec; c < C; c += sk_group() * kVec) {
            sk_real<T> run[kVec];
            sk_load_run<T, kVec>(from + c * (kVec == 1 ? p.student.stride[1] : 1), run);
            SK_UNROLL for (int i = 0; i < kVec; i++) run[i] = (sk_real<T>)(factor * run[i]);
            if (far) multiply_again<T>(p, n, run);
            sk_store_run<T, kVec>(run, to + c * (kVec == 1 ? p.grad_student.stride[1] : 1));
        }
    });
}

/* ---- launches ---- */

extern "C" int sk_cuda_attention(const struct attention_params *p, void *stream) {
    const int zeroed =
        cudaMemsetAsync(p->scratch.data, 0, SK_TICKET_BYTES + 16, (cudaStream_t)stream);
    if (zeroed != cudaSuccess) return zeroed;
    const int64_t N = SK_DIM(p, N), S = SK_DIM(p, S);
    double *const maps = (double *)p->maps.data;
    const network student = network_of(*p, p->student, SK_DIM(p, C), maps);
    const network teacher = network_of(*p, p->teacher, SK_DIM(p, D), maps + N * S);
    const int64_t tiles = N * (student.tiles.per_sample + teacher.tiles.per_sample);
    SK_LAUNCH(attention_kernel, blocks_of(tiles < 1 ? 1 : tiles), sk_block({SK_WARP, false}), 0,
              stream, *p, student, teacher, groups_of(N));
    return cudaGetLastError();
}

extern "C" int sk_cuda_attention_backward(const struct attention_backward_params *p, void *stream) {
    if (SK_ROWS(p) == 0) return cudaSuccess;
    SK_SWITCH_FLOATING(p->student.dtype, T, {
        const form f = form_of(p->dims, SK_DIM(p, C), sizeof(T), {&p->student, &p->grad_student});
        if (f.planes) {
            const auto kernel = f.tiles.vector ? attention_backward_planes_kernel<T, 16 / sizeof(T)>
                                               : attention_backward_planes_kernel<T, 1>;
            SK_LAUNCH(kernel, blocks_of(SK_DIM(p, N) * f.tiles.per_sample), SK_BLOCK, 0, stream, *p,
                      f.tiles);
            return cudaGetLastError();
        }
    })
    return sk_launch_rows(SK_INSTANCES(attention_backward_rows_kernel), SK_ROWS(p),
                          {&p->student, &p->grad_student}, stream, *p);
}
