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
from . import library, values
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


_CODES = {"i": 0, "u": 1, "f": 2, "c": 5, "b": 6}  # NumPy's kinds, DLPack's codes


def _of_numpy(op: str, name: str, array: Any, written: bool) -> tuple[Tensor, Any]:
    """The descriptor of a NumPy array; its own export refuses arrays that are read-only.

    An input whose elements do not lie on multiples of their size is copied.
    """
    interface = array.__array_interface__
    address, is_constant = interface["data"]
    strides = interface["strides"] or contracts.compact_strides(array.shape, array.itemsize)
    if written and is_constant:
        raise ValueError(f"{op}: {name} is read-only, expected an array that can be written")
    if any(x % array.itemsize for x in (address, *strides)) and array.size:
        if written:
            raise ValueError(
                f"{op}: {name} has elements that do not lie on multiples of their size, expected an "
                "array that is aligned"
            )
        return _of_numpy(op, name, array.copy(), written)
    numbers = [(ctypes.c_int64 * array.ndim)(*x) for x in (array.shape, strides)]
    for k in range(array.ndim):
        numbers[1][k] //= array.itemsize
    dtype = _Dtype(_CODES[interface["typestr"][1]], 8 * array.itemsize, 1)
    shape, steps = (ctypes.cast(x, ctypes.POINTER(ctypes.c_int64)) for x in numbers)
    return Tensor(address, _Device(1, 0), array.ndim, dtype, shape, steps, 0), (array, numbers)


def _as_in_memory(array: Any) -> Any:
    """A tensor of PyTorch without gradient, its numbers with the sign that they have in memory."""
    if hasattr(array, "detach"):
        array = array.detach()
    return array.resolve_conj().resolve_neg() if hasattr(array, "resolve_neg") else array


def describe(op: str, name: str, array: Any, written: bool = False) -> tuple[Tensor, Any]:
    """The descriptor of an array, and what keeps its memory alive.

    A capsule of DLPack is never renamed, so its producer's destructor frees it: the array is only
    looked at.
    """
    dtype: Any = getattr(array, "dtype", None)
    if hasattr(array, "__array_interface__") and dtype.kind in _CODES and dtype.isnative:
        return _of_numpy(op, name, array, written)
    try:
        capsule = _as_in_memory(array).__dlpack__()
    except (AttributeError, BufferError, TypeError, ValueError, NotImplementedError) as error:
        raise TypeError(
            f"{op}: {name} is {values.described(array)} that DLPack does not hand over ({error}), "
            "expected a dense array in memory"
        ) from error
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
            tensor, capsule = describe(op, item.name, value, item.is_output or item.kind == "INOUT")
            if device is not None:
                tensor.device.device_type = device
            alive.append((tensor, capsule))
            value = ctypes.pointer(tensor)
        setattr(packed, item.name, value)
    function = getattr(lib, f"selfkd_{op}")
    function.restype, function.argtypes = ctypes.c_int, [ctypes.c_void_p, ctypes.c_void_p]
    status: int = function(ctypes.addressof(packed), stream)
    return status


def _array(op: str, name: str, value: Any) -> Any:
    """A DLPack producer: `value` itself, or an array of a number, list or NumPy scalar."""
    if hasattr(value, "__dlpack__"):
        return value
    import numpy as np

    try:
        return np.array(value)
    except ValueError as error:  # lists of several lengths
        raise TypeError(f"{op}: {name} is {values.described(value)}, expected an array") from error


def new_outputs(
    of: Contract, arguments: Mapping[str, Any], given: Mapping[str, Any]
) -> dict[str, Any]:
    """The outputs of a call: those given, and new NumPy arrays for the others."""
    import numpy as np

    forms = contracts.forms(of, arguments)

    def new(item: contracts.Item) -> Any:
        if item.name in given or item.name not in forms:
            return given.get(item.name)
        shape, dtype = forms[item.name]
        if dtype == "bfloat16":
            raise TypeError(
                f"{of.name}: {item.name} has dtype bfloat16, which NumPy does not have, expected an array"
                f" for it in out={{'{item.name}': ...}}"
            )
        if item.kind == "LIKE":
            return np.empty_like(np.asarray(_as_in_memory(arguments[item.shape])))
        return np.empty(shape, dtype=dtype)

    return {item.name: new(item) for item in of.outputs}


def _whole(op: str, name: str, value: Any) -> int:
    return values.whole(op, name, values.number(op, name, value))


_NUMBERS = {
    "REAL": values.number,
    "INT": _whole,
    "BOOL": values.flag,
    "CHOICE": _whole,
    "RESIZE": _whole,
}


def _function(op: str) -> Callable[..., Any]:
    of = contract(op)
    positional = [item.name for item in of.items if item.is_input or item.is_number]
    defaults = {item.name: item.default for item in of.items if item.is_number}
    result = namedtuple(op, [item.name for item in of.outputs])  # type: ignore[misc]

    def call(
        *values: Any, out: Mapping[str, Any] | None = None, stream: int | None = None, **named: Any
    ) -> Any:
        if len(values) > len(positional):
            raise TypeError(
                f"{op}: {len(values)} arguments are given, expected at most {len(positional)}: "
                f"{', '.join(positional)}"
            )
        given = dict(zip(positional, values, strict=False))
        if twice := sorted(set(given) & set(named)):
            raise TypeError(f"{op}: {twice[0]} is given twice, expected once")
        arguments = defaults | given | named
        unknown = sorted(set(arguments) - set(positional))
        if unknown:
            raise TypeError(f"{op}: {unknown[0]} is no argument, expected {', '.join(positional)}")
        unknown = sorted(set(out or {}) - {item.name for item in of.outputs})
        if unknown:
            expected = ", ".join(item.name for item in of.outputs)
            raise TypeError(f"{op}: {unknown[0]} is no result, expected {expected}")
        for item in of.items:
            value = arguments.get(item.name)
            if item.choices and isinstance(value, str):
                arguments[item.name] = contracts.Choice(op, item.name)(value)
            elif item.is_number:
                arguments[item.name] = _NUMBERS[item.kind](op, item.name, value)
            elif item.is_input and value is not None:
                arguments[item.name] = _array(op, item.name, value)
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
