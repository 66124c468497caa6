/* BiFPN fusion: a weighted sum of two or three maps brought to one size.
 *
 *   f_i = relu(weight_i) / (sum_j relu(weight_j) + eps), or 1 for all maps without weights
 *   activate inputs: fused = sum_i f_i * resize_i(act(x_i))
 *   activate output: fused = act(pre),  pre = sum_i f_i * resize_i(x_i)
 *   act: x, relu(x) or silu(x) = x sigmoid(x)
 *
 * x = a, b, c; a has the size of the result, and resize_b, resize_c bring the others to it:
 *   nearest   output y shows input min(floor(y scale), I - 1), scale = I / H in float32
 *   bilinear  output y lies at input (y + 1/2) I / H - 1/2, clipped to 0 .. I - 1
 *   maxpool   3x3, stride 2, "same" as in TensorFlow: output y shows the largest of inputs 2 y - I
 * % 2 and the next two, those beyond the edges left out; of equal ones the first in scan order is
 * it, and NaN is larger than any (the last NaN is it) with I the input's height (and so for the
 * width), as in PyTorch: interpolate(mode="nearest"); interpolate(mode="bilinear",
 * align_corners=False, antialias=False); max_pool2d.
 *
 *   With g the gradient of the result, of pre where that is what is activated, and g_i its fold
 * back through resize_i:    dx_i = f_i * g_i  (times act'(x_i) where inputs are activated) d_i =
 * sum g * resize_i(...), f_i = r_i / t:  dweight_i = (eps d_i + sum_j r_j (d_i - d_j)) / t^2, which
 *   is (d_i - sum_j f_j d_j) / t without its cancellation; 0 where weight_i <= 0.  relu'(0) = 0.
 *
 * Source: Ji, Shin, Hwang, Park, Moon: "Refine Myself by Teaching Myself: Feature Refinement via
 * Self-Knowledge Distillation" (FRSKD), CVPR 2021, and its authors' code; the fusion is that of
 * Tan, Pang, Le: "EfficientDet", arXiv 1911.09070, section 3.3. The gradients are our own. */
#pragma once
#include "core/contract.h"

enum sk_activation { SK_IDENTITY, SK_RELU, SK_SILU };

/* clang-format off */
#define bifpn_fuse_CONTRACT(X)                                                  \
    X(IN,      a,          "NCHW", FLOATING)                                    \
    X(IN,      b,          "NCIJ", SAME)                                        \
    X(OPT,     c,          "NCKL", SAME)                                        \
    X(OPT,     weight,     "#",    ACC)                                         \
    X(RESIZE,  resize_b,   "none|nearest|bilinear|maxpool", b)                  \
    X(RESIZE,  resize_c,   "none|nearest|bilinear|maxpool", c)                  \
    X(CHOICE,  activation, "none|relu|silu", 1)                                 \
    X(CHOICE,  activate,   "inputs|output", 0)                                  \
    X(REAL,    eps,        NONNEGATIVE, 1e-6)                                   \
    X(LIKE,    fused,      a)

#define bifpn_fuse_backward_CONTRACT(X)                                         \
    X(GRAD,    grad,       "NCHW", SAME)                                        \
    X(IN,      a,          "NCHW", FLOATING)                                    \
    X(IN,      b,          "NCIJ", SAME)                                        \
    X(OPT,     c,          "NCKL", SAME)                                        \
    X(OPT,     weight,     "#",    ACC)                                         \
    X(RESIZE,  resize_b,   "none|nearest|bilinear|maxpool", b)                  \
    X(RESIZE,  resize_c,   "none|nearest|bilinear|maxpool", c)                  \
    X(CHOICE,  activation, "none|relu|silu", 1)                                 \
    X(CHOICE,  activate,   "inputs|output", 0)                                  \
    X(REAL,    eps,        NONNEGATIVE, 1e-6)                                   \
    X(LIKE,    grad_a,     a)                                                   \
    X(LIKE,    grad_b,     b)                                                   \
    X(LIKE,    grad_c,     c)                                                   \
    X(LIKE,    grad_weight, weight)                                             \
    X(SCRATCH, scratch,    SK_REDUCE_BYTES_OF(3))
