"""What callers hand over: tensors, numbers, flags, and which of them may learn.

The rules for all functions, modules and adapters. A function looks at what is cheap to look at; what
goes wrong later gets its sentence from :func:`public`.
"""

from __future__ import annotations

import functools
import inspect
import numbers
import re
from collections.abc import Callable, Mapping
from typing import Any, ParamSpec, TypeVar

import torch
import torch.nn.functional as F

from . import values
from .values import described as described
from .values import flag as flag
from .values import number_rule as number_rule

_P = ParamSpec("_P")
_R = TypeVar("_R")


# ---- who may learn ----


def wants_gradient(value: Any) -> bool:
    """Whether a value asks for a gradient: under ``torch.no_grad()`` nothing does."""
    return isinstance(value, torch.Tensor) and value.requires_grad and torch.is_grad_enabled()


def without_gradient(op: str, name: str, value: Any, way: str | None = None) -> None:
    """Raise ValueError for a tensor that asks for a gradient and would never get it.

    `way` says which call gives one, by default the reference of `op`.
    """
    if wants_gradient(value):
        way = way or f"call selfkd.reference.{op}, which gives it one"
        raise ValueError(
            f"{op}: {name} requires grad, expected one without, as it would get no gradient here;"
            f" detach it ({name}.detach()), or {way}"
        )


# ---- numbers and flags ----


def _constant(value: Any) -> Any:
    """A number of compiled code as what it is now; another value is compiled again.

    Without this PyTorch's compiler keeps an earlier value where the number also enters arithmetic of
    tensors (pytorch/pytorch#197889). What is the key of a dictionary it must know.
    """
    return next(iter({value: None}))


def number(op: str, name: str, value: Any, way: str | None = None) -> Any:
    """`value` as a Python number, in compiled code a constant.

    Python numbers stay what they are; NumPy scalars and tensors of one element become one (for a tensor
    on a GPU this waits). What is no number, as True and False are none, is a TypeError; a tensor of more
    elements, or one that asks for a gradient, is a ValueError, with `way` as for :func:`without_gradient`.
    """
    kind = type(value)
    if kind is float or kind is int:
        return _constant(value) if torch.compiler.is_compiling() else value
    if isinstance(value, (torch.SymFloat, torch.SymInt)):
        return value
    if isinstance(value, torch.Tensor):
        without_gradient(op, name, value, way)
    return values.number(op, name, value)


def in_range(op: str, name: str, value: Any, rule: str, way: str | None = None) -> Any:
    """`value` as :func:`number` makes it; ValueError outside the range of a rule of the contracts."""
    found = number(op, name, value, way)
    number_rule(op, name, found, rule)
    return found


def integer(op: str, name: str, value: Any) -> Any:
    """`value` as a Python int; otherwise as :func:`number`."""
    return value if type(value) is int else values.whole(op, name, number(op, name, value))


def at_least(op: str, name: str, value: Any, least: int) -> int:
    """`value` as a Python int, otherwise as :func:`number`; ValueError where it is smaller than `least`."""
    found: int = integer(op, name, value)
    if found < least:
        raise ValueError(f"{op}: {name} is {found}, expected {least} or more")
    return found


# ---- every wrong call gets a sentence ----

_WORDS = {  # one, and many in a list
    "torch.Tensor": ("a tensor", "tensors"),
    "torch.Generator": ("a torch.Generator", "torch.Generators"),
    "nn.Module": ("a module", "modules"),
    "float": ("a number", "numbers"),
    "int": ("a whole number", "whole numbers"),
    "bool": ("True or False", "True or False"),
    "str": ("a name", "names"),
    "None": ("None", "None"),
}
_TYPES: dict[str, type] = {
    "torch.Tensor": torch.Tensor,
    "torch.Generator": torch.Generator,
    "nn.Module": torch.nn.Module,
    "str": str,
}


_RULES: dict[str, Callable[[str, str, Any], Any]] = {
    "float": number,
    "int": integer,
    "bool": flag,
}


def _alternatives(annotation: str) -> list[str]:
    """The members of a union; those of a sequence stay together."""
    return re.findall(r"(?:[^|\[ ]+\[.*?\]|[^| ]+)", annotation)


def _element(annotation: str) -> str | None:
    """X of ``Sequence[X]``."""
    found = re.fullmatch(r"Sequence\[(.*)\]", annotation)
    return found[1] if found else None


def _words(annotation: str, many: bool = False) -> str:
    """What an annotation accepts."""
    found = []
    for part in _alternatives(annotation):
        element = _element(part)
        found.append(f"a list of {_words(element, True)}" if element else _WORDS[part][many])
    *most, last = found
    return f"{', '.join(most)} or {last}" if most else last


def require(op: str, name: str, value: Any, annotation: str) -> None:
    """Raise TypeError for a value that is not of its type, such as ``"float | Sequence[float]"``.

    Types other than those of _WORDS and sequences of them accept everything. A tensor in the place of a
    number raises as in :func:`number`.
    """
    parts = _alternatives(annotation)
    if not all(part in _WORDS or _element(part) for part in parts):
        return
    for part in parts:
        element = _element(part)
        if element and isinstance(value, (list, tuple)):
            for k, x in enumerate(value):
                require(op, f"{name}[{k}]", x, element)
            return
        if part == "None" and value is None:
            return
        if isinstance(value, _TYPES.get(part, ())):
            if isinstance(value, torch.Tensor) and value.layout is not torch.strided:
                raise TypeError(
                    f"{op}: {name} has layout {value.layout}, expected a dense tensor"
                    f" ({name}.to_dense())"
                )
            return
    rules = [_RULES[part] for part in parts if part in _RULES]
    if rules and (len(parts) == 1 or isinstance(value, (torch.Tensor, numbers.Real))):
        rules[0](op, name, value)
        return
    found = described(value)
    way = " (torch.from_numpy(x))" if "NumPy array" in found else ""
    raise TypeError(f"{op}: {name} is {found}, expected {_words(annotation)}{way}")


def tensor(op: str, name: str, value: Any, optional: bool = False) -> None:
    """Raise TypeError unless `value` is a tensor, or None where it is `optional`."""
    require(op, name, value, "torch.Tensor | None" if optional else "torch.Tensor")


def _mistake(
    op: str, parameters: Mapping[str, inspect.Parameter], given: Mapping[str, Any]
) -> Exception | None:
    """The sentence for the first argument that is not of its annotation's type."""
    first: torch.Tensor | None = None
    for name, value in given.items():
        parameter = parameters[name]
        if not isinstance(parameter.annotation, str):  # that of `self` is none
            continue
        many = parameter.kind is inspect.Parameter.VAR_POSITIONAL
        try:
            for k, x in enumerate(value if many else [value]):
                require(op, f"{name}[{k}]" if many else name, x, parameter.annotation)
        except (TypeError, ValueError) as error:
            return error
        for x in value if isinstance(value, (list, tuple)) else [value]:
            if not isinstance(x, torch.Tensor):
                continue
            if first is not None and x.device != first.device:
                return TypeError(f"{op}: {name} is on {x.device}, expected {first.device}")
            first = x
    return None


def explain(
    error: Exception,
    op: str,
    parameters: Mapping[str, inspect.Parameter],
    given: Mapping[str, Any],
    learns: bool = False,
) -> None:
    """Raise, in place of an error of a public function, the sentence about the type of an argument.

    The types are those of the parameters' annotations. Returns where no argument is to blame, or the error
    says itself which. `learns`: everything may ask for a gradient, as in a reference.
    """
    if re.match(f"{op}: .* expected ", str(error)):
        return
    with torch.set_grad_enabled(torch.is_grad_enabled() and not learns):
        mistake = _mistake(op, parameters, given)
    if mistake:
        raise mistake from None


def _plain(x: Any) -> Any:
    """A scalar of NumPy as a Python number; anything else as it is."""
    return x.item() if type(x).__module__ == "numpy" and x.ndim == 0 else x


def public(op: str, learns: bool = False) -> Callable[[Callable[_P, _R]], Callable[_P, _R]]:
    """Decorator of a function that users call: what goes wrong in it gets the sentence of :func:`explain`.

    The looking happens only once something went wrong.
    """

    def decorate(function: Callable[_P, _R]) -> Callable[_P, _R]:
        @functools.wraps(function)
        def call(*args: _P.args, **named: _P.kwargs) -> _R:
            if learns:
                args = tuple(map(_plain, args))  # type: ignore[assignment]
                named = {name: _plain(x) for name, x in named.items()}  # type: ignore[assignment]
            try:
                return function(*args, **named)
            except Exception as error:
                signature = inspect.signature(function)
                try:
                    given = signature.bind(*args, **named).arguments
                except TypeError:  # Python's own sentence names the argument
                    raise error from None
                explain(error, op, signature.parameters, given, learns)
                raise

        return call

    return decorate


# ---- what the row losses share: views, weights, reductions, divisors ----


def merged(x: torch.Tensor, first: int) -> torch.Tensor:
    """`x`, copied only where the strides of its dimensions from `first` on cannot be merged into one."""
    if x.ndim <= first + 1 or x.is_contiguous():
        return x
    expected = None
    for size, stride in zip(reversed(x.shape[first:]), reversed(x.stride()[first:]), strict=True):
        if size == 1:
            continue
        if expected is not None and stride != expected:
            return x.contiguous()
        expected = stride * size
    return x


def classes_first(op: str, name: str, x: torch.Tensor, dim: int) -> torch.Tensor:
    """`x` with its classes in dimension 1, behind the batch."""
    if x.ndim < 2:
        plural = "" if x.ndim == 1 else "s"
        raise ValueError(f"{op}: {name} has {x.ndim} dimension{plural}, expected at least 2")
    if not -x.ndim <= integer(op, "dim", dim) < x.ndim:
        raise ValueError(f"{op}: dim is {dim}, expected {-x.ndim} to {x.ndim - 1} for {name}")
    return x.movedim(dim, 1)


def logits_view(op: str, name: str, x: torch.Tensor, dim: int) -> torch.Tensor:
    """`x` with its classes in dimension 1, the dimensions behind them merged; a view where strides allow."""
    if dim == 1 and 1 < x.ndim <= 3:
        return x
    return merged(x if dim == 1 else classes_first(op, name, x, dim), 2)


def weight_view(op: str, weight: torch.Tensor) -> torch.Tensor:
    """Per-position weights, ready for the operator."""
    without_gradient(op, "weight", weight)
    return merged(weight, 1)


def divisor_tensor(op: str, divisor: Any, reduction: str, like: torch.Tensor) -> torch.Tensor:
    """The divisor as a 0-d tensor of the loss's dtype on the device of `like`."""
    if reduction != "mean":
        raise ValueError(
            f'{op}: divisor is given, expected reduction "mean" with it (not "{reduction}")'
        )
    dtype = accumulator(like)
    if isinstance(divisor, torch.Tensor):
        without_gradient(op, "divisor", divisor)
        return divisor.to(device=like.device, dtype=dtype, non_blocking=True)
    if torch.compiler.is_compiling() and type(divisor) in (float, int):
        # Arithmetic of tensors, for which a count that changes from step to step is no constant.
        number_rule(op, "divisor", divisor, "POSITIVE")
        found: torch.Tensor = like.new_zeros((), dtype=dtype) + divisor
        return found
    divisor = in_range(op, "divisor", divisor, "POSITIVE")
    return torch.full((), divisor, dtype=dtype, device=like.device)


def accumulator(x: torch.Tensor) -> torch.dtype:
    """Dtype of arithmetic, weights and losses for a first tensor `x`."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def under_autocast(x: torch.Tensor) -> bool:
    """Whether autocast is on for the device of `x`; the meta device has none."""
    device = x.device.type
    return device != "meta" and torch.is_autocast_enabled(device)


def same_dtype(*tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Under autocast live inputs may differ: they are cast to the widest."""
    if not under_autocast(tensors[0]):
        return tensors
    dtype = functools.reduce(torch.promote_types, [x.dtype for x in tensors])
    return tuple(x.to(dtype) for x in tensors)


# ---- the same in the references, where everything may learn ----


def expect_shape(op: str, name: str, x: torch.Tensor | None, shape: torch.Size) -> None:
    """Raise unless a tensor that is there has that shape: nothing is broadcast."""
    if x is not None and x.shape != shape:
        raise ValueError(f"{op}: {name} has shape {tuple(x.shape)}, expected {tuple(shape)}")


def expect_weight(op: str, name: str, x: torch.Tensor, first: torch.Tensor) -> None:
    """Raise unless the weights of rows are in a dtype that goes with a first tensor `first`."""
    if x.dtype not in (accumulator(first), torch.bool):
        found, expected = (str(x).removeprefix("torch.") for x in (x.dtype, accumulator(first)))
        raise TypeError(f"{op}: {name} has dtype {found}, expected {expected} or bool")


def is_zero(value: Any) -> bool:
    """Whether a term of this weight is left out: a weight that learns never is."""
    return False if wants_gradient(value) else bool(value == 0)


def cross_entropy(logits: torch.Tensor, target: torch.Tensor, smoothing: Any) -> torch.Tensor:
    """:func:`torch.nn.functional.cross_entropy` of each position, with a gradient to the smoothing."""
    rows = F.cross_entropy(logits, target, reduction="none")
    if is_zero(smoothing):
        return rows
    of_all = -F.log_softmax(logits, 1).mean(1)
    smoothed: torch.Tensor = (1 - smoothing) * rows + smoothing * of_all
    return smoothed


def reduce_rows(
    rows: torch.Tensor, weight: torch.Tensor | None, reduction: str, divisor: Any
) -> torch.Tensor:
    """Reduction of the references: `rows` are already weighted."""
    if reduction == "none":
        return rows
    if reduction == "sum":
        return rows.sum()
    if divisor is None:
        divisor = rows.new_tensor(rows.numel()) if weight is None else weight.to(rows.dtype).sum()
    mean: torch.Tensor = rows.sum() / divisor
    return mean
