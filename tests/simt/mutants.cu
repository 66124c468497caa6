/* Proof that the emulator bites: `mutants NAME` runs one kernel. `control` is correct and exits 0;
 * each other kernel has one mistake and must fail with the words that test_mutants.py expects. */
#include "core/device.cuh"

#include <stdio.h>
#include <stdlib.h>

enum mistake {
    NONE,
    MISSING_BARRIER,
    PAST_SHARED,
    PAST_DYNAMIC,
    PAST_ROW,
    DIVERGENT_BARRIER,
    EARLY_RETURN,
    LANE_NOT_IN_MASK,
    LANE_MISSING
};
static const char *const names[] = {"control",      "missing_barrier",  "past_shared",
                                    "past_dynamic", "past_row",         "divergent_barrier",
                                    "early_return", "lane_not_in_mask", "lane_missing"};

/* y[row] = sum over the row, by one block: through shared memory and a warp's shuffles. */
template <mistake wrong>
__global__ void sum_rows(const float *x, float *y, int C) {
    SK_SHARED(float, parts, SK_BLOCK);
    SK_SHARED_DYNAMIC(float, copy);
    const int t = (int)threadIdx.x, last = wrong == PAST_ROW ? C + 1 : C;
    const float *const row = x + (int64_t)blockIdx.x * C;
    float sum = 0;
    for (int c = t; c < last; c += SK_BLOCK) sum += row[c];
    parts[wrong == PAST_SHARED ? t + 1 : t] = sum;
    if (wrong == EARLY_RETURN && t == 7) return;
    if (wrong == DIVERGENT_BARRIER && t < 32)
        __syncthreads();
    else if (wrong != MISSING_BARRIER)
        __syncthreads();
    copy[wrong == PAST_DYNAMIC ? t + 1 : t] = parts[SK_BLOCK - 1 - t];
    __syncthreads();
    if (t >= SK_WARP) return;
    sum = 0;
    for (int i = t; i < SK_BLOCK; i += SK_WARP) sum += copy[i];
    if (wrong == LANE_MISSING && t == 31) return;
    for (int step = 16; step; step /= 2)
        sum += __shfl_xor_sync(wrong == LANE_NOT_IN_MASK ? 0x0000ffffu : 0xffffffffu, sum, step);
    const unsigned low = __ballot_sync(0xffffffffu, t < 16);
    if (t < 16) sum = __shfl_sync(low, sum, 15); /* half a warp on its own */
    if (t == 0) y[blockIdx.x] = sum;
}

template <mistake wrong>
static int run() {
    enum { ROWS = 5, C = 1000 };
    float *const x = (float *)malloc(ROWS * C * sizeof *x), *const y =
                                                                (float *)malloc(ROWS * sizeof *y);
    for (int i = 0; i < ROWS * C; i++) x[i] = (float)(i % 7);
    SK_LAUNCH(sum_rows<wrong>, ROWS, SK_BLOCK, SK_BLOCK * sizeof(float), NULL, x, y, (int)C);
    int bad = cudaGetLastError() != cudaSuccess;
    for (int r = 0; r < ROWS; r++) {
        float sum = 0;
        for (int c = 0; c < C; c++) sum += x[r * C + c];
        if (y[r] != sum)
            bad = fprintf(stderr, "wrong result in row %d: %g, expected %g\n", r, y[r], sum);
    }
    free(x);
    free(y);
    return bad != 0;
}

int main(int count, char **arguments) {
    int (*const runs[])() = {run<NONE>,         run<MISSING_BARRIER>,  run<PAST_SHARED>,
                             run<PAST_DYNAMIC>, run<PAST_ROW>,         run<DIVERGENT_BARRIER>,
                             run<EARLY_RETURN>, run<LANE_NOT_IN_MASK>, run<LANE_MISSING>};
    for (int i = 0; count == 2 && i < (int)(sizeof names / sizeof *names); i++)
        if (strcmp(arguments[1], names[i]) == 0) return runs[i]();
    fprintf(stderr, "usage: mutants NAME\n");
    return 2;
}
