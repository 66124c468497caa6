"""``selfkd check`` without PyTorch: a short self-test of every operator on this machine.

The C functions are called on plain memory, forward and backward: values against formulas, every
gradient against differences of the float64 function, and every CPU variant in float32 against it.
Numbers and choices have their defaults; optional inputs are given.
"""

from __future__ import annotations

import ctypes
import math
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from . import c, library
from . import contract as contracts
from .contract import Contract, Item, contract, operators

VARIANTS = ("base", "v3", "v4")
# Sizes for the letters of shapes, a "*" being one dimension of positions. Maps that are fused have
# one size, as nothing is resized.
SIZES = {"N": 3, "C": 5, "D": 6, "M": 2, "K": 4, "#": 3, "*": 2} | dict.fromkeys("HWIJL", 4)
TOLERANCES = {"float64": 1e-11, "float32": 1e-5, "float16": 2.0**-10, "bfloat16": 2.0**-7}
STEP = 1e-5  # of the differences; their error is its square


@dataclass(frozen=True)
class Line:
    """What was found of one operator in one place: the worst error of each kind, or a failure."""

    operator: str
    where: str
    errors: Mapping[str, float]
    allowed: Mapping[str, float]
    failure: str = ""

    @property
    def is_right(self) -> bool:
        return not self.failure and all(x <= self.allowed[k] for k, x in self.errors.items())

    def __str__(self) -> str:
        found = ", ".join(f"{k} {x:.0e}" for k, x in self.errors.items())
        verdict = "ok" if self.is_right else "WRONG"
        return f"{self.operator:<22}{self.where:<18}{verdict:<7}{self.failure or found}"


def shape_of(item: Item, sizes: Mapping[str, int]) -> tuple[int, ...]:
    """A shape for an input of a contract."""
    return tuple(int(x) if x.isdigit() else sizes[x] for x in item.shape)


def variants() -> list[str]:
    """The CPU variants that this machine can run; the best is chosen last."""
    found = []
    for name in VARIANTS:
        try:
            library.set_isa(name)
        except ValueError:
            continue
        found.append(name)
    return found or [library.text("selfkd_isa")]


def worst(found: Sequence[float], exact: Sequence[float]) -> float:
    """The largest error over the largest value; what is not a number is infinitely wrong."""
    if not all(map(math.isfinite, found)):
        return math.inf
    largest = max(map(abs, exact), default=0.0)
    return max((abs(x - y) for x, y in zip(found, exact, strict=True)), default=0.0) / (
        largest or 1.0
    )


# ---- plain memory ----

_new_capsule = ctypes.pythonapi.PyCapsule_New
_new_capsule.restype = ctypes.py_object
_new_capsule.argtypes = [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p]
_KINDS: dict[str, tuple[Any, int]] = {  # type of an element, and its code in DLPack
    "float64": (ctypes.c_double, 2),
    "float32": (ctypes.c_float, 2),
    "int64": (ctypes.c_int64, 0),
}


class Array:
    """A compact array on the CPU that DLPack can carry, made of nothing but ctypes."""

    device = "cpu"

    def __init__(self, dtype: str, shape: Sequence[int], values: Sequence[float] = ()) -> None:
        kind, code = _KINDS[dtype]
        self.dtype, self.shape, self.ndim = dtype, tuple(shape), len(shape)
        self.memory = (kind * math.prod(shape))(*values)
        self.sizes = (ctypes.c_int64 * self.ndim)(*shape)
        self.tensor = c.Tensor(ctypes.addressof(self.memory), ndim=self.ndim, shape=self.sizes)
        self.tensor.device.device_type = 1
        self.tensor.dtype.code, self.tensor.dtype.bits = code, 8 * ctypes.sizeof(kind)
        self.tensor.dtype.lanes = 1

    def __dlpack__(self) -> Any:
        return _new_capsule(ctypes.addressof(self.tensor), b"dltensor", None)

    def to(self, dtype: str) -> Array:
        return Array(dtype, self.shape, list(self.memory))


def draw(of: Contract, optional: bool) -> dict[str, Any]:
    """Inputs in float64 that float32 can hold, and the default of every number."""
    source, found = random.Random(of.name), dict[str, Any]()
    for item in of.items:
        if item.is_number:
            found[item.name] = item.default
        if not item.is_input or (item.kind == "OPT" and not optional):
            continue
        shape = shape_of(item, SIZES)
        count = math.prod(shape)
        if item.rule == "INDEX":
            found[item.name] = Array("int64", shape, [k % SIZES["C"] for k in range(count)])
        elif item.rule == "CLASSES":
            places = [k // math.prod(shape[2:]) % shape[1] for k in range(count)]
            found[item.name] = Array("int64", shape, places)
        elif item.rule == "SEED":
            found[item.name] = Array("int64", shape, [2022])
        else:
            lowest = 0.5 if item.rule in ("WEIGHT", "ACC") else -2.0
            values = [ctypes.c_float(source.uniform(lowest, 2.0)).value for _ in range(count)]
            found[item.name] = Array("float64", shape, values)
    return found


def call(op: str, arguments: dict[str, Any]) -> dict[str, Array]:
    """The results, in new arrays."""
    forms = contracts.forms(contract(op), arguments)
    found = {name: Array(dtype, shape) for name, (shape, dtype) in forms.items()}
    library.check(c.run(library.library(), op, arguments | found))
    return found


def copied(arguments: Mapping[str, Any], dtype: str) -> dict[str, Any]:
    """Arguments whose numbers with a fraction are stored in `dtype`."""
    return {
        name: x.to(dtype if x.dtype.startswith("float") else x.dtype) if isinstance(x, Array) else x
        for name, x in arguments.items()
    }


# ---- an operator ----


def is_private(op: str) -> bool:
    """Whether the operator writes gradients over its inputs."""
    return any(item.kind == "INOUT" for item in contract(op).items)


def forward(op: str, arguments: Mapping[str, Any], dtype: str) -> list[float]:
    """The first output, whose sum is differentiated."""
    found = call(op, copied(arguments, dtype))
    return list(found[contract(op).outputs[0].name].memory)


def backward(op: str, arguments: Mapping[str, Any], dtype: str) -> dict[str, list[float]]:
    """The gradient of the sum of the first output by each input that learns."""
    given = copied(arguments, dtype)
    found = call(op, given)
    if is_private(op):
        return {x.name: list(given[x.name].memory) for x in contract(op).items if x.kind == "INOUT"}
    result = found[contract(op).outputs[0].name]
    grad = Array(result.dtype, result.shape, [1.0] * math.prod(result.shape))
    grads = call(f"{op}_backward", {**given, **found, "grad": grad})
    return {name.removeprefix("grad_"): list(x.memory) for name, x in grads.items()}


def differences(op: str, arguments: Mapping[str, Any], name: str) -> list[float]:
    """The gradient by one input, each number of it moved by a little."""
    found, memory = [], arguments[name].memory
    for k, x in enumerate(memory):
        sums = []
        for moved in (x + STEP, x - STEP):
            memory[k] = moved
            sums.append(math.fsum(forward(op, arguments, "float64")))
        memory[k] = x
        found.append((sums[0] - sums[1]) / (2 * STEP))
    return found


def check_operator(op: str, isas: Sequence[str]) -> Line:
    """Values, gradients and CPU variants of one operator."""
    arguments = draw(contract(op), optional=True)
    exact, grads = forward(op, arguments, "float64"), backward(op, arguments, "float64")
    found = {
        "gradient": max(worst(grad, differences(op, arguments, x)) for x, grad in grads.items()),
        "float32": 0.0,
    }
    for isa in isas:
        library.set_isa(isa)
        pairs = [(forward(op, arguments, "float32"), exact)]
        narrow = backward(op, arguments, "float32")
        pairs += [(narrow[name], grad) for name, grad in grads.items()]
        found["float32"] = max(found["float32"], *(worst(*pair) for pair in pairs))
    if op in FORMULAS:
        plain = draw(contract(op), optional=False)
        value = FORMULAS[op](*(rows(x) for x in plain.values() if isinstance(x, Array)))
        found["formula"] = worst(forward(op, plain, "float64"), [value])
    allowed = {"gradient": 1e-7, "formula": TOLERANCES["float64"], "float32": TOLERANCES["float32"]}
    return Line(op, ", ".join(isas), found, allowed)


# ---- formulas ----

Rows = list[list[float]]


def rows(x: Array) -> Rows:
    """(N, C, S) as rows of C; scores (N) as one row."""
    values, (n, *rest) = list(x.memory), x.shape
    if not rest:
        return [values]
    width, positions = rest[0], math.prod(rest[1:])
    size = width * positions
    samples = [values[k * size : (k + 1) * size] for k in range(n)]
    return [sample[s::positions] for sample in samples for s in range(positions)]


def _log_softmax(row: Sequence[float], temperature: float) -> list[float]:
    lse = math.log(math.fsum(math.exp(x / temperature) for x in row))
    return [x / temperature - lse for x in row]


def _sd_dropout_kl(u: Rows, v: Rows) -> float:
    total = 0.0
    for row in zip(u, v, strict=True):
        p, q = (_log_softmax(x, 3.0) for x in row)
        total += math.fsum((math.exp(a) - math.exp(b)) * (a - b) for a, b in zip(p, q, strict=True))
    return 9 * total / len(u)


def _simreg(student: Rows, target: Rows) -> float:
    total = 0.0
    for x, t in zip(student, target, strict=True):
        dot = math.fsum(a * b for a, b in zip(x, t, strict=True))
        total += 2 - 2 * dot / (math.hypot(*x) * math.hypot(*t))
    return total / len(student)


def _adversarial(real: Rows, fake: Rows) -> float:
    sides = ([-x for x in real[0]], fake[0])
    return sum(math.fsum(math.log1p(math.exp(x)) for x in side) / len(side) for side in sides)


FORMULAS: dict[str, Callable[..., float]] = {
    "adversarial": _adversarial,
    "sd_dropout_kl": _sd_dropout_kl,
    "simreg": _simreg,
}


def without_torch() -> Iterator[Line]:
    """A line for each operator of the library."""
    isas = variants()
    for op in operators():
        if not op.endswith("_backward"):
            try:
                yield check_operator(op, isas)
            except (ArithmeticError, RuntimeError, TypeError, ValueError) as error:
                yield Line(op, ", ".join(isas), {}, {}, failure=str(error))
