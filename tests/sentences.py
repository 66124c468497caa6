"""The sentences of wrong arguments that the contract of an operator implies."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from typing import Any

import selfkd
import torch
from backends import live_inputs
from selfkd.contract import Item, contract

Wrong = tuple[type[Exception], dict[str, Any]]  # the error, and the arguments that bring it about
ACCEPTED = {
    "FLOATING": (torch.int64, "float16, bfloat16, float32 or float64"),
    "CONSTANT": (torch.int64, "float16, bfloat16, float32 or float64"),
    "TEACHER": (torch.int64, "float16, bfloat16, float32 or float64"),
    "SAME": (torch.float16, "float32 like {first}"),
    "WEIGHT": (torch.float64, "float32 or bool"),
    "INDEX": (torch.int32, "int64"),
    "CLASSES": (torch.int16, "int32 or int64"),
}
RANGES = {
    "POSITIVE": (0.0, "0, expected a finite number > 0"),
    "NONNEGATIVE": (-1.0, "-1, expected a finite number >= 0"),
    "FRACTION": (1.5, "1.5, expected a number from 0 to 1"),
    "BELOW_ONE": (1.0, "1, expected a number >= 0 and < 1"),
}


def resized(x: torch.Tensor, at: int, size: int) -> torch.Tensor:
    """Ones of the same dtype, with another size in one dimension."""
    shape = list(x.shape)
    shape[at] = size
    return torch.ones(shape, dtype=x.dtype)


def of_shape(item: Item, x: torch.Tensor, is_first: bool) -> Iterator[tuple[str, Wrong]]:
    """Too many dimensions, and another size in each."""
    if not is_first and item.shape.startswith("N"):  # the sizes of the first are what is expected
        more = f"{item.name} has {x.ndim + 1} dimensions, expected {x.ndim}"
        yield more, (ValueError, {item.name: x.unsqueeze(-1)})
        letters = item.shape.removesuffix("*")
        for k, size in enumerate(x.shape):
            if k < len(letters) and letters[k] not in "NC":
                continue  # a size of its own
            where = letters[k] if k < len(letters) else str(k)
            sentence = f"{item.name} has size {size - 1} in dimension {where}, expected {size}"
            yield sentence, (ValueError, {item.name: resized(x, k, size - 1)})


def of_number(item: Item, names: Mapping[str, Any]) -> Iterator[tuple[str, Wrong]]:
    """Out of its range, or none of its choices."""
    if item.name not in names:
        return
    if item.kind == "CHOICE":
        *most, last = [f'"{x}"' for x in item.choices]
        sentence = f'{item.name} is "avg", expected {", ".join(most)} or {last}'
        yield sentence, (ValueError, {item.name: "avg"})
    elif item.rule in RANGES:
        wrong, sentence = RANGES[item.rule]
        yield f"{item.name} is {sentence}", (ValueError, {item.name: wrong})


def implied(op: str, given: Mapping[str, torch.Tensor]) -> dict[str, Wrong]:
    """Sentences and what brings them about, for a call with the tensors `given` in float32.

    Left out are arguments that the function does not have under the contract's name.
    """
    of, names = contract(op), inspect.signature(getattr(selfkd, op)).parameters
    live, first = live_inputs(op, given), given[of.first]
    found: list[tuple[str, Wrong]] = []
    items = [x for x in of.items if x.is_input and x.name in given and x.name in names]
    rows = [x.name for x in of.items if x.name in given and x.shape[1:2] in ("C", "D", "K")]
    least = len(of[of.first].shape.removesuffix("*"))
    if of[of.first].shape.endswith("*"):
        few = {name: torch.ones([6] * (least - 1)) for name in rows}
        plural = "" if least == 2 else "s"
        sentence = f"{of.first} has {least - 1} dimension{plural}, expected at least {least}"
        found.append((sentence, (ValueError, few)))
    if "C" in of[of.first].shape:
        none = {name: resized(given[name], 1, 0) for name in rows}
        sentence = f"{of.first} has size 0 in dimension C, expected at least 1"
        found.append((sentence, (ValueError, none)))
    for item in items:
        x = given[item.name]
        found += of_shape(item, x, item.name == of.first) if x.ndim else []
        if item.rule in ACCEPTED:
            dtype, words = ACCEPTED[item.rule]
            sentence = f"{item.name} has dtype {str(dtype)[6:]}, expected {words}"
            wrong = {item.name: x.to(dtype)}
            found.append((sentence.format(first=of.first), (TypeError, wrong)))
        if item.name not in live and item.rule in ("CONSTANT", "TEACHER", "WEIGHT"):
            sentence = "requires grad, expected one without, as it would get no gradient here"
            wrong = {item.name: x.clone().requires_grad_()}
            found.append((f"{item.name} {sentence}", (ValueError, wrong)))
    for item in of.items:
        found += of_number(item, names)
    if "divisor" in names:
        sentence = "divisor is -1, expected a finite number > 0"
        found.append((sentence, (ValueError, {"divisor": -1.0})))
    if "dim" in names:
        n = first.ndim
        sentence = f"dim is {n}, expected {-n} to {n - 1} for {of.first}"
        found.append((sentence, (ValueError, {"dim": n})))
    return {f"{op}: {sentence}": wrong for sentence, wrong in found}
