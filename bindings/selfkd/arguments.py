"""What callers hand over: tensors, numbers, flags, and who of them may learn. One rule for all functions,
modules and adapters.

A function looks at what is cheap to look at; what goes wrong later is explained by :func:`explained`.
"""

from __future__ import annotations

import numbers
from typing import Any, NoReturn

import torch

from .contract import number_rule


def described(value: Any) -> str:
    """What a value is, in the words of a sentence: ``a list``, ``the string "x"``."""
    if value is None or isinstance(value, bool):
        return str(value)
    if isinstance(value, str):
        return f'the string "{value}"'
    if isinstance(value, numbers.Number):
        return f"the number {value}"
    kind = type(value)
    name = "NumPy array" if kind.__module__ == "numpy" and kind.__name__ == "ndarray" else None
    name = name or ("module" if isinstance(value, torch.nn.Module) else kind.__name__)
    return f"{'an' if name[0] in 'aeiouAEIOU' else 'a'} {name}"


def wants_gradient(value: Any) -> bool:
    """Whether a value asks for a gradient."""
    return isinstance(value, torch.Tensor) and value.requires_grad and torch.is_grad_enabled()


def without_gradient(op: str, name: str, value: Any, way: str | None = None) -> None:
    """Refuse a tensor that asks for a gradient and would never get it.

    `way` names the call that gives one, by default the reference of `op`.

    Raises
    ------
    ValueError
        The tensor asks for one; under ``torch.no_grad()`` nothing does.
    """
    if wants_gradient(value):
        way = way or f"selfkd.reference.{op}, which gives it one"
        raise ValueError(
            f"{op}: {name} requires grad, expected one that does not, since it would get no gradient"
            f" here: detach it, or call {way}"
        )


def tensor(op: str, name: str, value: Any, optional: bool = False) -> None:
    """Raise TypeError unless `value` is a tensor, or None where it is `optional`."""
    if not isinstance(value, torch.Tensor) and not (optional and value is None):
        _refuse(op, name, value, "a tensor or None" if optional else "a tensor", torch_of(value))


def torch_of(value: Any) -> str:
    """How to make a tensor of an array."""
    return "torch.from_numpy(x)" if hasattr(value, "__array__") else ""


def number(op: str, name: str, value: Any, *, way: str | None = None) -> Any:
    """`value` as a Python number.

    Python numbers stay what they are; NumPy scalars and tensors of one element become one (of a GPU's
    tensor that waits for it).

    Raises
    ------
    TypeError
        It is no number; True and False are none.
    ValueError
        A tensor that asks for a gradient (see :func:`without_gradient`) or has more elements than one.
    """
    kind = type(value)
    if kind is float or kind is int:
        return value
    if isinstance(value, torch.Tensor):
        without_gradient(op, name, value, way)
        if value.numel() != 1:
            raise ValueError(f"{op}: {name} has shape {tuple(value.shape)}, expected a number")
        if value.dtype != torch.bool and not value.is_complex():
            return value.item()
    elif isinstance(value, (torch.SymFloat, torch.SymInt)):
        return value
    elif isinstance(value, numbers.Integral) and kind is not bool:
        return int(value)
    elif isinstance(value, numbers.Real) and kind is not bool:
        return float(value)
    _refuse(op, name, value, "a number")


def integer(op: str, name: str, value: Any) -> Any:
    """`value` as a Python int, as :func:`number` does it."""
    if type(value) is int:
        return value
    found = number(op, name, value)
    if isinstance(found, float):
        raise TypeError(f"{op}: {name} is {found}, expected a whole number")
    return found


def flag(op: str, name: str, value: Any) -> bool:
    """`value` as True or False: a bool of Python, NumPy or a tensor of one element, or 0 or 1."""
    if value is True or value is False:
        return value
    if isinstance(value, torch.Tensor) and value.dtype == torch.bool and value.numel() == 1:
        return bool(value)
    if type(value).__name__ in ("bool", "bool_") or (type(value) is int and value in (0, 1)):
        return bool(value)
    _refuse(op, name, value, "True or False")


def _refuse(op: str, name: str, value: Any, expected: str, way: str = "") -> NoReturn:
    raise TypeError(f"{op}: {name} is {described(value)}, expected {expected}{way and f' ({way})'}")


# ---- what the row losses share: views, weights, reductions, divisors ----


def merged(x: torch.Tensor, first: int) -> torch.Tensor:
    """`x`, copied only where the strides of its dimensions from `first` on cannot be merged into one."""
    if x.ndim <= first + 1:
        return x
    expected = None
    for size, stride in zip(reversed(x.shape[first:]), reversed(x.stride()[first:]), strict=True):
        if size == 1:
            continue
        if expected is not None and stride != expected:
            return x.contiguous()
        expected = stride * size
    return x


def logits_view(op: str, name: str, x: torch.Tensor, dim: int) -> torch.Tensor:
    """`x` with its classes in dimension 1, as a view where strides allow."""
    if dim != 1:
        if not -x.ndim <= dim < x.ndim:
            raise ValueError(f"{op}: dim is {dim}, expected {-x.ndim} to {x.ndim - 1} for {name}")
        x = x.movedim(dim, 1)
    return merged(x, 2)


def weight_view(op: str, weight: torch.Tensor) -> torch.Tensor:
    """Per-position weights, ready for the operator."""
    without_gradient(op, "weight", weight)
    return merged(weight, 1)


def divisor_tensor(
    op: str, divisor: float | torch.Tensor, reduction: str, like: torch.Tensor
) -> torch.Tensor:
    """The divisor as a 0-d tensor of the loss's dtype on the device of `like`."""
    if reduction != "mean":
        raise ValueError(
            f'{op}: divisor is given, expected reduction "mean" with it (not "{reduction}")'
        )
    dtype = torch.float64 if like.dtype == torch.float64 else torch.float32
    if isinstance(divisor, torch.Tensor):
        without_gradient(op, "divisor", divisor)
        return divisor.to(device=like.device, dtype=dtype, non_blocking=True)
    number_rule(op, "divisor", divisor, "POSITIVE")
    return torch.full((), divisor, dtype=dtype, device=like.device)


def same_dtype(u: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Under autocast two live inputs may differ: the narrower is cast to the wider."""
    if u.dtype != v.dtype and torch.is_autocast_enabled(u.device.type):
        dtype = torch.promote_types(u.dtype, v.dtype)
        return u.to(dtype), v.to(dtype)
    return u, v


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
