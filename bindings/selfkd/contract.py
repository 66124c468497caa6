"""The contracts of ``ops/*.h``, read from the library, and their rules in Python.

The rules are those of ``ops/core/check.c`` and ``values.c``, with the same words: here they serve
fake tensors (``torch.compile``) and turn the RuntimeError of an operator into the ValueError or
TypeError of a Python function.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from . import library
from .values import described, number_rule

_FLOATING = ("float16", "bfloat16", "float32", "float64")
_KNOWN = {
    *_FLOATING,
    "bool",
    "uint8",
    "int8",
    "int16",
    "int32",
    "int64",
}
_KNOWN |= {"complex32", "complex64", "complex128"}
MAX_RANK = 8
MOST_LISTED = 4096  # classes of a row
_NUMBERS: dict[str, Callable[[str], float | int | bool]] = {
    "REAL": float,
    "INT": int,
    "BOOL": lambda x: x != "0",
    "CHOICE": int,
    "RESIZE": int,
}


@dataclass(frozen=True)
class Item:
    """One row of a contract: `shape` of LIKE names an input, `rule` of a number its range.

    A CHOICE is a number with names: `choices`, the first of them for 0. A RESIZE is one too, of how
    the input `shape` comes to the size of the first tensor.
    """

    kind: str
    name: str
    shape: str = ""
    rule: str = ""
    default: float | int | bool | None = None

    @property
    def is_input(self) -> bool:
        return self.kind in ("IN", "INOUT", "OPT", "GRAD")

    @property
    def is_output(self) -> bool:
        return self.kind in ("OUT", "LIKE")

    @property
    def is_number(self) -> bool:
        return self.kind in _NUMBERS

    @property
    def choices(self) -> list[str]:
        return self.rule.split("|") if self.kind in ("CHOICE", "RESIZE") else []


@dataclass(frozen=True)
class Contract:
    """An operator's arguments and results, in the order of its list."""

    name: str
    items: tuple[Item, ...]

    def __getitem__(self, name: str) -> Item:
        return next(item for item in self.items if item.name == name)

    @functools.cached_property
    def first(self) -> str:
        """The tensor that gives dtype and device: the first FLOATING one."""
        return next(item.name for item in self.items if item.rule == "FLOATING")

    @functools.cached_property
    def outputs(self) -> tuple[Item, ...]:
        return tuple(item for item in self.items if item.is_output)

    @functools.cached_property
    def torch_arguments(self) -> tuple[str, ...]:
        """Names of the PyTorch schema, where an OPT tensor is followed by ``has_<name>``."""
        names: list[str] = []
        for item in self.items:
            if item.is_input or item.is_number:
                names += [item.name, f"has_{item.name}"] if item.kind == "OPT" else [item.name]
        return tuple(names)


@functools.cache
def contract(op: str) -> Contract:
    """Read the contract of an operator from the library."""
    return parse(op, library.text("selfkd_describe", op.encode()))


def parse(op: str, text: str) -> Contract:
    """A contract from its text, a row on each line."""
    items = []
    for line in text.strip().splitlines():
        kind, name, *rest = (field.strip().strip('"') for field in line.split(","))
        if kind == "RESIZE":
            items.append(Item(kind, name, shape=rest[1], rule=rest[0], default=0))
        elif kind in _NUMBERS:
            items.append(Item(kind, name, rule=rest[0], default=_NUMBERS[kind](rest[1])))
        elif kind == "LIKE":
            items.append(Item(kind, name, shape=rest[0], rule="SAME"))
        else:
            items.append(Item(kind, name, shape=rest[0], rule=rest[-1]))
    return Contract(op, tuple(items))


@functools.cache
def operators() -> tuple[str, ...]:
    """The names of all operators, backward operators included."""
    return tuple(library.text("selfkd_operators").splitlines())


@functools.cache
def modules() -> tuple[str, ...]:
    """The modules that bring functions: those that an operator is named after, ``op`` or ``op_part``."""
    stems = sorted(path.stem for path in Path(__file__).parent.glob("*.py"))
    return tuple(x for x in stems if any(f"{op}_".startswith(f"{x}_") for op in operators()))


class Choice:
    """The numbers of a CHOICE by its names; made once, for the compiler cannot read a contract."""

    def __init__(self, op: str, name: str, of: Contract | None = None) -> None:
        choices = (of or contract(op))[name].choices
        self.what = f"{op}: {name}"
        self.codes = {value: code for code, value in enumerate(choices)}

    def __call__(self, value: str) -> int:
        code = self.codes.get(value) if isinstance(value, str) else None
        if code is None:
            *most, last = [f'"{x}"' for x in self.codes]
            found, error = f'"{value}"', ValueError
            if not isinstance(value, str):
                found, error = described(value), TypeError
            raise error(f"{self.what} is {found}, expected {', '.join(most)} or {last}")
        return code


# ---- the rules ----


def _dtype(tensor: Any) -> str:
    dtype = tensor.dtype
    name = str(dtype).removeprefix("torch.")
    if name in _KNOWN:
        return name
    if not type(dtype).__module__.startswith("numpy"):
        return "an unsupported dtype"
    return f"{name} (big-endian)" if getattr(dtype, "byteorder", "") == ">" else name


def _device(tensor: Any) -> str:
    device = tensor.device
    if str(device) == "cpu":  # NumPy's is a string
        return "cpu"
    return device.type if device.index is None else f"{device.type}:{device.index}"


def accumulator(dtype: str) -> str:
    """Dtype of losses and weights for logits of `dtype`."""
    return "float64" if dtype == "float64" else "float32"


class _Checker:
    """Sizes seen so far in one call."""

    def __init__(self, contract: Contract, tensors: Mapping[str, Any]) -> None:
        self.contract, self.tensors = contract, tensors
        self.sizes: dict[str, Any] = {}
        self.trailing: Sequence[Any] | None = None

    def dtype(self, item: Item, tensor: Any) -> None:
        first = self.contract.first
        found, like = _dtype(tensor), _dtype(self.tensors[first])
        accepted = {
            "FLOATING": _FLOATING,
            "SAME": (like,),
            "WEIGHT": (accumulator(like), "bool"),
            "ACC": (accumulator(like),),
            "F64": ("float64",),
            "CONSTANT": _FLOATING,
            "TEACHER": _FLOATING,
            "INDEX": ("int64",),
            "CLASSES": ("int32", "int64"),
            "SEED": ("int64",),
        }[item.rule]
        if found not in accepted:
            *most, last = accepted
            words = f"{', '.join(most)} or {last}" if most else last
            words += f" like {first}" if item.rule == "SAME" else ""
            raise TypeError(
                f"{self.contract.name}: {item.name} has dtype {found}, expected {words}"
            )

    def device(self, item: Item, tensor: Any) -> None:
        first = self.contract.first
        found, expected = _device(tensor), _device(self.tensors[first])
        if found != expected:
            raise TypeError(
                f"{self.contract.name}: {item.name} is on {found}, expected {expected} like {first}"
            )

    def shape(self, item: Item, tensor: Any) -> None:
        op, letters = self.contract.name, item.shape.removesuffix("*")
        sizes, rank, expected, least = tensor.shape, tensor.ndim, len(letters), ""
        if item.shape.endswith("*"):
            if self.trailing is not None:
                expected += len(self.trailing)
            elif rank >= expected:
                expected = rank
            else:
                least = "at least "
        if rank == expected > MAX_RANK:
            expected, least = MAX_RANK, "at most "
        if rank != expected:
            plural = "" if rank == 1 else "s"
            raise ValueError(
                f"{op}: {item.name} has {rank} dimension{plural}, expected {least}{expected}"
            )
        for k, letter in enumerate(letters):
            if letter == "C" and sizes[k] == 0:
                raise ValueError(
                    f"{op}: {item.name} has size 0 in dimension C, expected at least 1"
                )
            if letter.isalpha():
                where, size = letter, self.sizes.setdefault(letter, sizes[k])
            else:
                where, size = str(k), self.count_maps() if letter == "#" else int(letter)
            self.size(item, where, sizes[k], size)
        if item.shape.endswith("*"):
            if self.trailing is None:
                self.trailing = tuple(sizes[len(letters) :])
            for k, size in enumerate(self.trailing, len(letters)):
                self.size(item, str(k), sizes[k], size)

        if item.rule == "CLASSES" and not 1 <= sizes[1] <= MOST_LISTED:
            raise ValueError(
                f"{op}: {item.name} has size {sizes[1]} in dimension K, expected 1 to {MOST_LISTED}"
            )

    def size(self, item: Item, where: str, found: Any, expected: Any) -> None:
        if found != expected:
            raise ValueError(
                f"{self.contract.name}: {item.name} has size {found} in dimension {where}, expected"
                f" {expected}"
            )

    def count_maps(self) -> int:
        """The number of maps that a '#' stands for."""
        return sum(
            item.kind in ("IN", "INOUT", "OPT")
            and item.rule in ("FLOATING", "SAME")
            and self.tensors.get(item.name) is not None
            for item in self.contract.items
        )

    def resize(self, item: Item, code: int) -> None:
        """Height and width of a RESIZE's input."""
        tensor, way = self.tensors.get(item.shape), item.choices[code]
        if tensor is None:
            return
        for k in (2, 3):
            found, to = tensor.shape[k], self.tensors[self.contract.first].shape[k]
            expected = None
            if way == "none" and found != to:
                expected = f"{to}"
            elif way == "maxpool" and (found + 1) // 2 != to:
                expected = f"{2 * to - 1} or {2 * to}"
            elif found == 0 and to > 0:
                expected = "at least 1"
            if expected:
                raise ValueError(
                    f"{self.contract.name}: {item.shape} has size {found} in dimension {k}, "
                    f"expected {expected} with {item.name} {way}"
                )

    def tensor(self, item: Item) -> None:
        tensor = self.tensors[item.name]
        self.dtype(item, tensor)
        self.device(item, tensor)
        if not (item.kind == "GRAD" and tensor.ndim == 0):
            self.shape(item, tensor)


def check(contract: Contract, arguments: Mapping[str, Any]) -> _Checker:
    """Apply the rules to the arguments of one call, by name.

    An absent OPT tensor is None or not there; a number that is not there has its default.

    Raises
    ------
    TypeError
        A dtype or device is not accepted.
    ValueError
        A shape, size or number is not accepted.
    """
    for item in contract.items:
        if item.kind in ("IN", "INOUT", "GRAD") and arguments.get(item.name) is None:
            raise TypeError(f"{contract.name}: {item.name} is missing")
    checker = _Checker(contract, arguments)
    checker.tensor(contract[contract.first])
    for item in contract.items:
        if item.is_input and item.name != contract.first and arguments.get(item.name) is not None:
            checker.tensor(item)
        elif item.is_number:
            number = arguments.get(item.name, item.default)
            number_rule(contract.name, item.name, number, item.rule)
            if item.kind == "RESIZE":
                checker.resize(item, number)
    return checker


def compact_strides(shape: Sequence[int], step: int = 1) -> tuple[int, ...]:
    """Strides of a compact array, the last dimension's being `step`."""
    found = []
    for size in reversed(shape):
        found.append(step)
        step *= max(size, 1)
    return tuple(reversed(found))


def is_absent(item: Item, arguments: Mapping[str, Any]) -> bool:
    """Whether an output is not there: LIKE an OPT tensor that is not given, or not needed."""
    needed = arguments.get(f"needs_{item.shape}", True)
    return item.kind == "LIKE" and (arguments.get(item.shape) is None or not needed)


def output_shape(item: Item, checker: _Checker) -> tuple[Any, ...]:
    """Shape of an OUT item for arguments that passed :func:`check`."""
    letters = item.shape.removesuffix("*")
    sizes = tuple(int(letter) if letter.isdigit() else checker.sizes[letter] for letter in letters)
    return sizes + (tuple(checker.trailing or ()) if item.shape.endswith("*") else ())


def forms(of: Contract, arguments: Mapping[str, Any]) -> dict[str, tuple[tuple[Any, ...], str]]:
    """Checks a call; returns shape and dtype of each output that is there, by name."""
    checker, first = check(of, arguments), _dtype(arguments[of.first])
    dtypes = {"ACC": accumulator(first), "F64": "float64", "SAME": first}
    return {
        item.name: (
            tuple(arguments[item.shape].shape)
            if item.kind == "LIKE"
            else output_shape(item, checker),
            dtypes[item.rule],
        )
        for item in of.outputs
        if not is_absent(item, arguments)
    }
