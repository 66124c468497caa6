"""selfkd from plain ctypes and NumPy: no PyTorch, not even selfkd's Python package.

Shows how any language with a C interface calls the library. In Python, selfkd.c does this for you.

    python examples/numpy_ctypes.py path/to/libselfkd.so
"""

from __future__ import annotations

import ctypes
import sys
from ctypes import (
    POINTER,
    c_double,
    c_int32,
    c_int64,
    c_uint8,
    c_uint16,
    c_uint32,
    c_uint64,
    c_void_p,
)

import numpy as np

CPU, FLOAT, MEAN = 1, 2, 1
TEMPERATURE = 3.0


class Tensor(ctypes.Structure):
    """selfkd_tensor of tensor.h, the layout of DLPack's DLTensor (device and dtype written out)."""

    _fields_ = [
        ("data", c_void_p),
        ("device_type", c_int32),
        ("device_id", c_int32),
        ("ndim", c_int32),
        ("dtype_code", c_uint8),
        ("dtype_bits", c_uint8),
        ("dtype_lanes", c_uint16),
        ("shape", POINTER(c_int64)),
        ("strides", POINTER(c_int64)),  # NULL: compact
        ("byte_offset", c_uint64),
    ]


def tensor(array: np.ndarray) -> Tensor:
    """Describe a compact array of floats; the array must outlive the description."""
    shape = (c_int64 * array.ndim)(*array.shape)
    bits = 8 * array.itemsize
    return Tensor(array.ctypes.data, CPU, 0, array.ndim, FLOAT, bits, 1, shape, None, 0)


def arguments(name: str, **fields: type) -> type[ctypes.Structure]:
    """Return the struct selfkd_<op>_args: its size, then the fields in the contract's order."""
    layout = [("struct_size", c_uint32), *fields.items()]
    return type(name, (ctypes.Structure,), {"_fields_": layout})


# The contract, ops/sd_dropout_kl.h: tensors are pointers, NULL when not given; REAL is double, INT
# and BOOL are int64_t; SCRATCH is not part of it.
T = POINTER(Tensor)
SETTINGS = {"temperature": c_double, "forward_weight": c_double, "reverse_weight": c_double}
Forward = arguments(
    "selfkd_sd_dropout_kl_args",
    **{"u": T, "v": T, "weight": T, "divisor": T},
    **SETTINGS,
    **{"detach_target": c_int64, "reduction": c_int64},
    **{"loss": T, "rows": T, "saved": T, "denominator": T},
)
Backward = arguments(
    "selfkd_sd_dropout_kl_backward_args",
    **{"grad": T, "u": T, "v": T, "weight": T, "saved": T, "denominator": T},
    **SETTINGS,
    **{"detach_target": c_int64, "needs_u": c_int64, "needs_v": c_int64, "grad_u": T, "grad_v": T},
)


def call(library: ctypes.CDLL, name: str, struct: type[ctypes.Structure], **values: object) -> None:
    """Fill the struct and call the function; arrays become tensors."""
    fields = {
        key: ctypes.pointer(tensor(value)) if isinstance(value, np.ndarray) else value
        for key, value in values.items()
    }
    packed = struct(struct_size=ctypes.sizeof(struct), **fields)
    if getattr(library, name)(ctypes.byref(packed), None) != 0:
        library.selfkd_message.restype = ctypes.c_char_p
        sys.exit(library.selfkd_message().decode())


def main() -> int:
    """Compute loss and gradients, and compare them with the formula."""
    library = ctypes.CDLL(sys.argv[1])
    random = np.random.default_rng(0)
    n, c = 128, 100
    u, v = (3 * random.standard_normal((n, c), dtype=np.float32) for _ in range(2))
    settings = {"temperature": TEMPERATURE, "forward_weight": 1.0, "reverse_weight": 1.0}

    loss, denominator = np.empty((), np.float32), np.empty((), np.float32)
    rows, saved = np.empty(n, np.float32), np.empty((4, n), np.float64)
    outputs = {"loss": loss, "rows": rows, "saved": saved, "denominator": denominator}
    call(library, "selfkd_sd_dropout_kl", Forward, u=u, v=v, reduction=MEAN, **settings, **outputs)

    grad, grad_u, grad_v = np.ones((), np.float32), np.empty_like(u), np.empty_like(v)
    inputs = {"grad": grad, "u": u, "v": v, "saved": saved, "denominator": denominator}
    outputs = {"grad_u": grad_u, "grad_v": grad_v}
    settings |= {"needs_u": 1, "needs_v": 1}
    call(library, "selfkd_sd_dropout_kl_backward", Backward, **inputs, **settings, **outputs)

    a, b = u.astype(np.float64) / TEMPERATURE, v.astype(np.float64) / TEMPERATURE
    log_p = a - np.log(np.exp(a).sum(1, keepdims=True))
    log_q = b - np.log(np.exp(b).sum(1, keepdims=True))
    p, q, d = np.exp(log_p), np.exp(log_q), log_p - log_q
    expected = TEMPERATURE**2 * ((p - q) * d).sum(1).mean()
    expected_u = TEMPERATURE / n * (p - q + p * (d - (p * d).sum(1, keepdims=True)))
    expected_v = TEMPERATURE / n * (q - p - q * (d - (q * d).sum(1, keepdims=True)))
    np.testing.assert_allclose(loss, expected, rtol=3e-6)
    np.testing.assert_allclose(grad_u, expected_u, rtol=1e-5, atol=1e-8)
    np.testing.assert_allclose(grad_v, expected_v, rtol=1e-5, atol=1e-8)
    print(f"loss {loss:.7f}, expected {expected:.7f}; gradients agree")
    return 0


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    sys.exit(main())
