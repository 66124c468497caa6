"""The C functions from Python, by ctypes, on NumPy arrays or anything with ``__dlpack__``.

Needs no PyTorch.

``selfkd.c.<op>(*inputs, **arguments)`` takes the arguments of the operator's contract
(``ops/<op>.h``) and returns its outputs as a named tuple: NumPy arrays, or the arrays passed in
``out={name: array}`` (needed for CUDA inputs).
"""

from __future__ import annotations

import ctypes
import functools
from collections import namedtuple
from collections.abc import Callable, Mapping
from typing import Any

from . import contract as contracts
from . import library
from .contract import Contract, contract, operators

__all__ = ["operators"]


class _Device(ctypes.Structure):
    _fields_ = [("device_type", ctypes.c_int32), ("device_id", ctypes.c_int32)]


class _Dtype(ctypes.Structure):
    _fields_ = [("code", ctypes.c_uint8), ("bits", ctypes.c_uint8), ("lanes", ctypes.c_uint16)]


class Tensor(ctypes.Structure):
    """``selfkd_tensor``, which has the memory layout of DLPack's DLTensor."""

    _fields_ = [
        ("data", ctypes.c_void_p),
        ("device", _Device),
        ("ndim", ctypes.c_int32),
        ("dtype", _Dtype),
        ("shape", ctypes.POINTER(ctypes.c_int64)),
        ("strides", ctypes.POINTER(ctypes.c_int64)),
        ("byte_offset", ctypes.c_uint64),
    ]


_capsule_pointer = ctypes.pythonapi.PyCapsule_GetPointer
_capsule_pointer.restype, _capsule_pointer.argtypes = (
    ctypes.c_void_p,
    [ctypes.py_object, ctypes.c_char_p],
)


def describe(array: Any) -> tuple[Tensor, Any]:
    """The descriptor of a DLPack producer, and the capsule that keeps its memory alive.

    The capsule is never renamed, so its producer's destructor frees it: the array is only looked
    at.
    """
    if hasattr(array, "detach"):  # PyTorch refuses to export what requires grad
        array = array.detach()
    capsule = array.__dlpack__()
    return Tensor.from_address(_capsule_pointer(capsule, b"dltensor")), capsule


@functools.cache
def arguments_struct(op: str) -> type[ctypes.Structure]:
    """``selfkd_<op>_args``, built from the contract."""
    of: dict[str, Any] = dict.fromkeys(("INT", "BOOL", "CHOICE", "RESIZE"), ctypes.c_int64)
    of["REAL"] = ctypes.c_double
    fields = [("struct_size", ctypes.c_uint32)]
    fields += [
        (item.name, of.get(item.kind, ctypes.POINTER(Tensor)))
        for item in contract(op).items
        if item.kind != "SCRATCH"
    ]
    return type(f"selfkd_{op}_args", (ctypes.Structure,), {"_fields_": fields})


def run(
    lib: ctypes.CDLL,
    op: str,
    arguments: Mapping[str, Any],
    stream: int | None = None,
    device: int | None = None,
) -> int:
    """Call ``selfkd_<op>`` of `lib` with arrays (inputs and outputs) and numbers by name; returns its status.

    `device` overrides the device type of all tensors: the tests' emulator calls host memory "CUDA".
    """
    struct = arguments_struct(op)
    packed, alive = struct(struct_size=ctypes.sizeof(struct)), []
    for item in contract(op).items:
        value = arguments.get(item.name, item.default)
        if value is None or item.kind == "SCRATCH":
            continue
        if not item.is_number:
            tensor, capsule = describe(value)
            if device is not None:
                tensor.device.device_type = device
            alive.append((tensor, capsule))
            value = ctypes.pointer(tensor)
        setattr(packed, item.name, value)
    function = getattr(lib, f"selfkd_{op}")
    function.restype, function.argtypes = ctypes.c_int, [ctypes.c_void_p, ctypes.c_void_p]
    status: int = function(ctypes.addressof(packed), stream)
    return status


def _array(value: Any) -> Any:
    """A DLPack producer: `value` itself, or an array of a number or NumPy scalar."""
    if hasattr(value, "__dlpack__"):
        return value
    import numpy as np

    return np.array(value)


def _dtype_name(array: Any) -> str:
    return str(array.dtype).removeprefix("torch.")


def new_outputs(
    of: Contract, arguments: Mapping[str, Any], given: Mapping[str, Any]
) -> dict[str, Any]:
    """The outputs of a call: those given, and new NumPy arrays for the others."""
    import numpy as np

    checker = contracts.check(of, arguments)
    logits = _dtype_name(arguments[of.first])
    dtypes = {"ACC": contracts.accumulator(logits), "F64": "float64", "SAME": logits}
    return {
        item.name: given.get(item.name)
        if item.name in given or contracts.is_absent(item, arguments)
        else np.empty_like(np.asarray(arguments[item.shape]))
        if item.kind == "LIKE"
        else np.empty(contracts.output_shape(item, checker), dtype=dtypes[item.rule])
        for item in of.outputs
    }


def _function(op: str) -> Callable[..., Any]:
    of = contract(op)
    positional = [item.name for item in of.items if item.is_input or item.is_number]
    defaults = {item.name: item.default for item in of.items if item.is_number}
    result = namedtuple(op, [item.name for item in of.outputs])  # type: ignore[misc]

    def call(
        *values: Any, out: Mapping[str, Any] | None = None, stream: int | None = None, **named: Any
    ) -> Any:
        arguments = defaults | dict(zip(positional, values, strict=False)) | named
        unknown = sorted(set(arguments) - set(positional))
        if unknown:
            raise TypeError(f"{op}: {unknown[0]} is no argument, expected {', '.join(positional)}")
        for item in of.items:
            if item.choices and isinstance(arguments.get(item.name), str):
                arguments[item.name] = contracts.Choice(op, item.name)(arguments[item.name])
            if item.is_input and arguments.get(item.name) is not None:
                arguments[item.name] = _array(arguments[item.name])
        outputs = new_outputs(of, arguments, out or {})
        library.check(run(library.library(), op, arguments | outputs, stream))
        return result(**outputs)

    call.__name__ = call.__qualname__ = op
    call.__doc__ = (
        f"Call ``selfkd_{op}``. Arguments: {', '.join(positional)}; see ``ops/`` for their meaning."
    )
    return call


def __getattr__(name: str) -> Callable[..., Any]:
    if name not in operators():
        raise AttributeError(
            f"module 'selfkd.c' has no attribute {name!r}; operators: {', '.join(operators())}"
        )
    function = _function(name)
    globals()[name] = function
    return function
