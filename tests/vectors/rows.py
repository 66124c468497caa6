"""Tensors of 200 bits: how they are drawn, and what losses of their rows have in common.

A tensor is its shape and its values in row-major order. A row of (N, C, ...) runs along dimension 1.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from random import Random
from typing import Any

from mpmath import mp, mpf

mp.prec = 200
Row = list[Any]


@dataclass
class Tensor:
    """Numbers of mpmath, or integers."""

    shape: tuple[int, ...]
    values: list[Any]

    def row(self, n: int, s: int) -> Row:
        """The classes of row [n, s]."""
        length = prod(self.shape[2:])
        return [self.values[(n * self.shape[1] + c) * length + s] for c in range(self.shape[1])]

    def set_row(self, n: int, s: int, row: Sequence[Any]) -> None:
        length = prod(self.shape[2:])
        for c, x in enumerate(row):
            self.values[(n * self.shape[1] + c) * length + s] = x


def zeros(*shape: int) -> Tensor:
    return Tensor(shape, [mpf(0)] * prod(shape))


def rows_of(x: Tensor) -> list[tuple[int, int, int]]:
    """Number and indices of each row."""
    length = prod(x.shape[2:])
    return [(n * length + s, n, s) for n in range(x.shape[0]) for s in range(length)]


def log_softmax(z: Row, temperature: Any) -> Row:
    top = max(z)
    log_sum = mp.log(sum(mp.exp((x - top) / temperature) for x in z))
    return [(x - top) / temperature - log_sum for x in z]


def reduced(
    x: dict[str, Any], losses: Row, grads: dict[str, Tensor], shape: tuple[int, ...]
) -> dict[str, Tensor]:
    """The results of a row loss from those of its rows, with weights, reduction and incoming gradient."""
    weight = x["weight"].values if "weight" in x else [mpf(1)] * len(losses)
    rows = [w * a if w != 0 else mpf(0) for w, a in zip(weight, losses, strict=True)]
    divisor = x["divisor"].values[0] if "divisor" in x else sum(weight)
    denominator = divisor if x["reduction"] == "mean" else mpf(1)
    found = {"loss": Tensor((), [sum(rows) / denominator]), "rows": Tensor(shape, rows)}
    found["denominator"] = Tensor((), [denominator])
    for name, grad in grads.items():
        for i, n, s in rows_of(grad):
            g = x["grad"].values[i if x["reduction"] == "none" else 0]
            grad.set_row(n, s, [g * weight[i] / denominator * y for y in grad.row(n, s)])
        found[f"grad_{name}"] = grad
    return found


def draw(g: Random, *shape: int, spread: float = 8, step: float = 1 / 32) -> Tensor:
    """Multiples of `step`, which every format from float16 on holds."""
    values = [round((g.random() - 0.5) * spread / step) * step for _ in range(prod(shape))]
    return Tensor(shape, [mpf(x) for x in values])


def near(x: Tensor, g: Random, by: float) -> Tensor:
    return Tensor(x.shape, [y + mpf(by) * g.randint(-9, 9) for y in x.values])


def of(values: list[float], *shape: int) -> Tensor:
    return Tensor(shape or (len(values),), [mpf(x) for x in values])


def integers(*values: int) -> Tensor:
    return Tensor((len(values),), list(values))


def probabilities(g: Random, n: int, c: int) -> Tensor:
    """Multiples of 1/64 that sum to 1; some are 0."""
    values = []
    for _ in range(n):
        counts = [0] * c
        for _ in range(64):
            counts[int(g.random() ** 2 * c)] += 1
        values += [mpf(k) / 64 for k in counts]
    return Tensor((n, c), values)
