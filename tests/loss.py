"""What the standard tests know of a loss, and the parameters that they share."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from backends import backends
from drawing import DTYPES, Case, Make, cast
from selfkd.contract import contract

Shape = tuple[int, ...]
on_back_ends = pytest.mark.parametrize("backend", backends(), ids=str)
in_dtypes = pytest.mark.parametrize("dtype", DTYPES)
# Rows shorter than a vector, than a chunk and longer; maps that are and are not whole vectors.
SHAPES: Mapping[str, Sequence[Shape]] = {
    "strides": [(5, 100), (3, 1100), (2, 21, 6, 7)],
    "mixed": [(9, 100), (3, 1101), (3, 4096), (33, 8), (2, 40, 3, 3)],
    "equal": [(7, 100), (2, 2500), (1, 40, 9, 11)],
    "grad": [(6, 40), (2, 9, 3, 5)],
    "slopes": [(3, 5), (2, 3, 4)],
    "double": [(4, 6), (2, 3, 6)],
    "opcheck": [(4, 6), (2, 3, 4, 5)],
    "compile": [(6,), (3, 6)],
    "threads": [(300, 500), (20, 8192), (20, 8, 300)],
    "saved": [(64, 1000), (4, 64, 16, 16)],
}


def positions(x: torch.Tensor) -> torch.Tensor:
    """One element of each row."""
    return x[:, 0] if x.ndim > 1 else x


@dataclass(frozen=True)
class Loss:
    """A loss of rows, as its tests know it.

    draw: `draw(*shape)` makes what draws its tensors but for weight and divisor.
    rows, maps: the cases; those of maps have positions and run in both orders of memory.
    path: the name of the CPU's loop, or what gives it of a case and a layout; "" is any.
    options: calls that differ in what is computed; the first of them is also compiled.
    slopes: those whose gradients are the slopes of the result, all of `options` unless given.
    zero: those that are exactly 0, with their gradients, for rows that are equal.
    excludes: -inf is a value of a row: a class that is left out.
    per_sample: as in Case, in float64 and for tensors whose dtypes differ.
    shapes: of a test in `SHAPES` those that stand in for the usual ones.
    """

    op: str
    draw: Callable[..., Make]
    rows: Sequence[Any] = ()
    maps: Sequence[Any] = ()
    path: str | Callable[[Case, str], str] = ""
    options: Sequence[Mapping[str, Any]] = ({},)
    slopes: Sequence[Mapping[str, Any]] | None = None
    zero: Sequence[Mapping[str, Any]] | None = None
    excludes: bool = False
    per_sample: bool = False
    shapes: Mapping[str, Sequence[Shape]] = field(default_factory=dict)

    def has(self, name: str) -> bool:
        """Whether the contract has an argument of that name."""
        return any(item.name == name for item in contract(self.op).items)

    def fixed(self) -> list[str]:
        """The inputs whose dtype is their own."""
        return [x.name for x in contract(self.op).items if x.rule in ("CONSTANT", "TEACHER")]

    def reductions(self) -> list[dict[str, Any]]:
        """A call for each way to reduce, of which "none" has gradients of its own."""
        return [{"reduction": x} for x in ("mean", "none")] if self.has("reduction") else [{}]

    def tensors(
        self, shape: Shape, g: torch.Generator, dtype: str = "float32", device: str = "cpu"
    ) -> dict[str, Any]:
        """Stored in a dtype, without weights."""
        return cast(self.draw(*shape)(g), self.op, DTYPES[dtype], device)

    def with_weight(self, tensors: dict[str, Any], g: torch.Generator) -> dict[str, Any]:
        """With weights > 0, if the loss has some."""
        if not self.has("weight"):
            return tensors
        first = tensors[contract(self.op).first]
        acc = torch.float64 if first.dtype == torch.float64 else torch.float32
        weight = torch.rand(positions(first).shape, generator=g, dtype=torch.float64)
        return {**tensors, "weight": weight.to(first.device, acc)}

    def each_shape(self, of: str) -> Any:
        """The parameter `shape` of a test."""
        return pytest.mark.parametrize("shape", self.shapes.get(of, SHAPES[of]), ids=str)

    def judge(self, dtype: str = "float64") -> Case:
        """By which bounds tensors of a dtype are compared."""
        return Case("drawn", self.draw(1, 1), per_sample=self.per_sample and dtype == "float64")


def named(options: Mapping[str, Any]) -> str:
    """What a call is called in the name of a test."""
    return ",".join(f"{name}={value}" for name, value in options.items()) or "usual"


def each_call(options: Sequence[Mapping[str, Any]]) -> Any:
    """The parameter `options` of a test."""
    return pytest.mark.parametrize("options", options, ids=named)
