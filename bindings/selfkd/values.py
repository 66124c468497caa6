"""Single values that callers hand over: numbers, flags, and what anything is in the words of a sentence.

Knows neither PyTorch nor NumPy, but their scalars and tensors of one element.
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Callable
from typing import Any


def described(value: Any) -> str:
    """What a value is, in the words of a sentence: ``a list``, ``the string "x"``."""
    if value is None or isinstance(value, bool):
        return str(value)
    if isinstance(value, str):
        return f'the string "{value}"'
    if isinstance(value, numbers.Number):
        return f"the number {value}"
    kind = type(value)
    bases = {f"{x.__module__}.{x.__name__}" for x in kind.__mro__}
    name = kind.__name__
    if "torch.Tensor" in bases:
        name = f"tensor of shape {tuple(value.shape)}"
    elif "numpy.ndarray" in bases:
        name = "NumPy array"
    elif "torch.nn.modules.module.Module" in bases:
        name = f"module ({name})"
    return f"{'an' if name[0] in 'aeiouAEIOU' else 'a'} {name}"


def number(op: str, name: str, value: Any) -> float | int:
    """`value` as a Python number: that of a scalar of NumPy or of a tensor of one element.

    What is no number, as True and False are none, is a TypeError; more elements than one, a ValueError.
    """
    found = value
    if hasattr(value, "item") and hasattr(value, "shape"):
        if math.prod(value.shape) != 1:
            raise ValueError(f"{op}: {name} has shape {tuple(value.shape)}, expected a number")
        found = value.item()
    elif isinstance(value, numbers.Real) and not isinstance(value, (bool, int)):
        found = float(value)
    if type(found) is float or type(found) is int:
        return found
    raise TypeError(f"{op}: {name} is {described(value)}, expected a number")


def whole(op: str, name: str, value: float | int) -> int:
    """A number that is an int; TypeError for a float."""
    if isinstance(value, float):
        raise TypeError(f"{op}: {name} is {described(value)}, expected a whole number")
    return value


def flag(op: str, name: str, value: Any) -> bool:
    """`value` as True or False: a bool of Python or NumPy, an array or tensor with one, or 0 or 1.

    Anything else is a TypeError.
    """
    found = value
    if hasattr(value, "item") and hasattr(value, "shape") and math.prod(value.shape) == 1:
        found = value.item()
    if isinstance(found, bool) or (type(value) is int and value in (0, 1)):
        return bool(found)
    raise TypeError(f"{op}: {name} is {described(value)}, expected True or False")


_RULES: dict[str, tuple[Callable[[float], bool], str]] = {
    "POSITIVE": (lambda x: 0 < x < math.inf, "a finite number > 0"),
    "NONNEGATIVE": (lambda x: 0 <= x < math.inf, "a finite number >= 0"),
    "FRACTION": (lambda x: 0 <= x <= 1, "a number from 0 to 1"),
    "BELOW_ONE": (lambda x: 0 <= x < 1, "a number >= 0 and < 1"),
}


def number_rule(name: str, item: str, value: float, rule: str) -> None:
    """Raise ValueError when a number is outside its range."""
    is_right, expected = _RULES.get(rule, (lambda x: True, ""))
    if "|" in rule:
        choices = rule.split("|")
        *most, last = [f"{k} ({choice})" for k, choice in enumerate(choices)]
        is_right, expected = lambda x: 0 <= x < len(choices), f"{', '.join(most)} or {last}"
    if not is_right(value):
        raise ValueError(f"{name}: {item} is {value:g}, expected {expected}")
