/* The backward CUDA kernels of ops/js_divergence.h.
 *
 * Test: python -m pytest tests/test_simt.py -k js_divergence
 * Machine code: make sass OP=js_divergence */
#include "js_divergence.cuh"

extern "C" {
SK_PARAMS(js_divergence_backward)
}

SK_PAIR_BACKWARD(js_divergence, student, teacher, temperature, teacher_temperature)

extern "C" int sk_cuda_js_divergence_backward(const struct js_divergence_backward_params *p,
                                              void *stream) {
    SK_LAUNCH_JS(SK_LAUNCH_BACKWARD, js_divergence)
}
