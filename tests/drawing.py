"""Cases and their tensors: what is drawn, in which dtypes, under which strides."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from selfkd.contract import contract

DTYPES = {
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "float64": torch.float64,
}
HALF_ULP = {
    torch.float16: 2.0**-11,
    torch.bfloat16: 2.0**-8,
    torch.float32: 2.0**-24,
    torch.float64: 2.0**-53,
}
HALF_SMALLEST = {
    torch.float16: 2.0**-25,
    torch.bfloat16: 2.0**-134,
    torch.float32: 2.0**-150,
    torch.float64: 0.0,
}


Make = Callable[[torch.Generator], dict[str, torch.Tensor]]


@dataclass(frozen=True)
class Case:
    """Named after its user: `make` draws the tensors in float64, `options` are the numbers of the call.

    close: all log-ratios are below 1e-2, where a gradient error of 1e-4 is allowed.
    exact: how far the float64 reference itself (the textbook formula) can be trusted: 1e-12 unless
    `python tests/exact.py OP CASE` finds, in 80 bits, that the reference errs by more and the kernel does
    not; then the next power of ten above the reference's error.
    one_hot: rows of probability 1, where the gradient of two that agree is nothing but the rounding
    of large logits: it is measured against a tenth of the tensor's largest.
    per_sample: gradients are measured against the largest of their sample, not of their row.
    big: too slow for the emulator.
    contiguous: its size decides something in that layout only.
    """

    name: str
    make: Make
    options: Mapping[str, Any] = field(default_factory=dict)
    close: bool = False
    exact: float = 1e-12
    one_hot: bool = False
    per_sample: bool = False
    big: bool = False
    contiguous: bool = False

    def __str__(self) -> str:
        return self.name


ORDINARY = Case("ordinary", lambda g: {})


# ---- what is drawn ----


def pair(
    first: str,
    second: str,
    *shape: int,
    scale: float = 3.0,
    level: float = 0.0,
    shift: float = 0.0,
    apart: float | None = None,
) -> Make:
    """Draws two tensors: independent, or `apart` standard deviations from each other."""

    def make(g: torch.Generator) -> dict[str, torch.Tensor]:
        x = scale * torch.randn(shape, generator=g, dtype=torch.float64) + level
        noise = torch.randn(shape, generator=g, dtype=torch.float64)
        y = scale * noise + level if apart is None else x + apart * noise
        return {first: x, second: y + shift}

    return make


def weighted(make: Make, boolean: bool = False, spoilt: bool | None = None) -> Make:
    """The same with weights, a third of them 0; `spoilt` (of masks): NaN in rows that nothing may look at."""

    def with_weight(g: torch.Generator) -> dict[str, torch.Tensor]:
        tensors = make(g)
        sizes = next(iter(tensors.values()))[:, 0].shape
        weight = torch.rand(sizes, generator=g, dtype=torch.float64) + 0.1
        skipped = torch.rand(sizes, generator=g) < 0.34
        weight[skipped] = 0
        for x in tensors.values():
            if x.is_floating_point() and (boolean if spoilt is None else spoilt):
                x.movedim(1, -1)[skipped] = torch.nan
        return {**tensors, "weight": weight != 0 if boolean else weight}

    return with_weight


def divided(make: Make) -> Make:
    """The same with a divisor."""
    return lambda g: {**make(g), "divisor": torch.tensor(12.5, dtype=torch.float64)}


def rows_of(op: str) -> list[str]:
    """The inputs that are rows of classes or of features."""
    return [x.name for x in contract(op).items if x.is_input and x.shape[:2] in ("NC", "ND", "NK")]


def listed_classes(
    shape: tuple[int, ...], k: int, g: torch.Generator | None = None
) -> torch.Tensor:
    """k classes for each row of (N, C, ...), in any order and none of them twice."""
    return torch.rand(shape, generator=g).argsort(1)[:, :k]


# ---- how it is stored ----


def epsilon(dtype: torch.dtype) -> float:
    """Rounding unit of the arithmetic for tensors of `dtype`."""
    return 2.0**-53 if dtype == torch.float64 else 2.0**-24


def cast(
    tensors: Mapping[str, torch.Tensor], op: str, dtype: torch.dtype, device: str = "cpu"
) -> dict[str, Any]:
    """Inputs in the dtypes of the contract for logits of `dtype`."""
    acc = torch.float64 if dtype == torch.float64 else torch.float32
    rules = {item.name: item.rule for item in contract(op).items if item.is_input}
    stored = ("FLOATING", "SAME", "CONSTANT", "TEACHER")
    to = {name: dtype if rules.get(name, "SAME") in stored else acc for name in tensors}
    return {
        name: x.to(device, to[name]) if x.is_floating_point() else x.to(device)
        for name, x in tensors.items()
    }


# ---- layouts: the same values under other strides ----


def channels_last(x: torch.Tensor) -> torch.Tensor:
    """Classes contiguous, positions strided."""
    return x.movedim(1, -1).contiguous().movedim(-1, 1)


def every_other(x: torch.Tensor) -> torch.Tensor:
    """Classes at a stride of 2, in a larger block."""
    gap = torch.nan if x.is_floating_point() else torch.iinfo(x.dtype).min
    sizes = (*x.shape[:1], 2 * x.shape[1], *x.shape[2:])
    wide = torch.full(sizes, gap, dtype=x.dtype, device=x.device)
    wide[:, ::2] = x
    return wide[:, ::2]


def unaligned(x: torch.Tensor) -> torch.Tensor:
    """One element into an allocation, so that no row begins on a vector boundary."""
    block = torch.empty(x.numel() + 1, dtype=x.dtype, device=x.device)
    view = block[1:].view(x.shape)
    return view.copy_(x)


LAYOUTS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "contiguous": lambda x: x,
    "channels_last": channels_last,
    "every_other": every_other,
    "unaligned": unaligned,
}


def laid_out(op: str, tensors: Mapping[str, torch.Tensor], layout: str) -> dict[str, torch.Tensor]:
    """The same tensors, those that are rows under the strides of a layout."""
    rows = {name: LAYOUTS[layout](tensors[name]) for name in rows_of(op) if name in tensors}
    return {**tensors, **rows}
