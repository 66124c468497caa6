"""Who errs where reference and kernel differ: `python tests/exact.py OP CASE` measures both in 80 bits.

CASE is the beginning of a case's name in tests/test_OP.py. For each such case, in float64 and in float32, it
prints the largest error of a row (relative) and of a gradient (over the row's largest) of the float64
reference and of the kernel, on five draws, and what `exact` is to be.
"""

from __future__ import annotations

import importlib
import math
import sys
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import harness
import numpy as np
import torch
import wide
from harness import Case
from selfkd.contract import modules

DRAWS = 5
TRUSTED = 1e-12  # `exact` of a case unless it says otherwise


class Errors(NamedTuple):
    """The largest of a row and of a gradient; of either, `both`."""

    rows: float
    gradient: float

    @property
    def both(self) -> float:
        return max(self)

    def __str__(self) -> str:
        return f"{self.rows:8.1e} {self.gradient:8.1e}"


def cases(op: str, begins: str) -> list[Case]:
    """Those of an operator's test module, in any list there."""
    lists = [x for x in vars(importlib.import_module(f"test_{op}")).values() if type(x) is list]
    named = {x.name: x for found in lists for x in found if isinstance(x, Case)}
    return [case for name, case in named.items() if name.startswith(begins)]


def as_rows(op: str, x: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """(N, C, ...) or (N, ...) with a row for each position of `like`; of a loss of maps as lines."""
    if op not in wide.ROW_LOSSES:
        return x.flatten(2)
    return x.movedim(1, -1).reshape(-1, x.shape[1]) if x.ndim == like.ndim else x.reshape(-1)


def largest(found: wide.Wide, expected: wide.Wide, scale: wide.Wide) -> float:
    """The largest error over its scale; 0 over 0 is no error."""
    error = np.abs(found - expected)
    return float(np.max(np.where(error == 0, 0, error / np.maximum(scale, 1e-300)), initial=0))


def errors(
    op: str,
    found: torch.Tensor,
    grads: Mapping[str, torch.Tensor],
    exact: wide.Exact,
    kept: torch.Tensor,
    first: torch.Tensor,
    one_hot: bool,
) -> Errors:
    """Of a result and its gradients, in the rows that are kept, by the bounds of a case."""
    of_rows = op in wide.ROW_LOSSES
    result = found.reshape(-1)[kept] if of_rows else found
    rows = largest(wide.wide(result), exact.result, np.abs(exact.result))
    worst = 0.0
    for name, grad in grads.items():
        x = wide.wide(as_rows(op, grad, first)[kept])
        of_one = (1,) if of_rows else (1, 2)  # maps are compared by sample
        scale = np.abs(exact.grads[name]).max(of_one, keepdims=True)
        if one_hot:
            scale = np.maximum(scale, scale.max() / 10)
        zero = 32 * harness.epsilon(grad.dtype) / TRUSTED  # as harness.assert_gradient has it
        scale = np.where(scale < 1e-15, zero, scale)
        worst = max(worst, largest(x, exact.grads[name], scale))
    return Errors(rows, worst)


def measure(op: str, case: Case, dtype: str, draws: int = DRAWS) -> tuple[Errors, Errors]:
    """The largest errors of the float64 reference and of the kernel.

    Raises
    ------
    LookupError
        wide.py has no formula for the operator.
    """
    if op not in (*wide.ROW_LOSSES, "attention"):
        raise LookupError(
            f"tests/wide.py has no formula of {op} in 80 bits for rows or maps: write one"
        )
    found: list[tuple[Errors, Errors]] = []
    for seed in range(draws):
        drawn = case.make(torch.Generator().manual_seed(seed))
        drawn.pop("divisor", None)
        tensors = harness.cast(drawn, op, harness.DTYPES[dtype])
        first = next(iter(tensors.values()))
        kept = torch.ones(len(first), dtype=torch.bool)
        if op in wide.ROW_LOSSES:
            kept = tensors.get("weight", torch.ones(first[:, 0].shape)).reshape(-1) != 0
        options = {x: y for x, y in case.options.items() if x not in ("reduction", "dim")}
        reduction = {"reduction": "none"} if op in wide.ROW_LOSSES else {}
        exact_inputs = {name: wide.wide(as_rows(op, x, first)[kept]) for name, x in tensors.items()}
        exact = wide.reduced(op, exact_inputs, options | reduction)
        of_reference = harness.reference(op, tensors, options | reduction)
        of_kernel = harness.through_torch(op, tensors, options | reduction)
        both = [errors(op, *x, exact, kept, first, case.one_hot) for x in (of_reference, of_kernel)]
        found.append((both[0], both[1]))
    reference, kernel = (
        Errors(*map(max, zip(*each, strict=True))) for each in zip(*found, strict=True)
    )
    return reference, kernel


def advice(case: Case, reference: Errors, kernel: Errors) -> str:
    """The rule of `exact`, applied to errors in float64."""
    if kernel.both > TRUSTED:
        return f"the kernel errs by {kernel.both:.1e}, more than {TRUSTED:.0e}: `exact` must not hide it"
    if reference.both <= TRUSTED:
        return "both are right: leave `exact` out"
    power = 10.0 ** (math.floor(math.log10(reference.both)) + 1)
    return f"the reference errs: exact={power:.0e} (the case has {case.exact:.0e})"


def report(op: str, begins: str) -> Iterator[str]:
    """What is known of each case."""
    for case in cases(op, begins):
        yield f"{op} {case} "
        yield " " * 24 + "rows gradient"
        for dtype in ("float32", "float64"):
            reference, kernel = measure(op, case, dtype)
            yield f"    {dtype}  reference {reference}"
            yield f"    {dtype}  kernel    {kernel}"
        yield f"    {advice(case, reference, kernel)}"


def main(op: str = "", begins: str = "", *_: Any) -> None:
    """Print the report of the cases that are named."""
    if op not in modules() or not cases(op, begins):
        sys.exit(f'exact: no case of "{op}" begins with "{begins}", expected OP CASE')
    try:
        print(*report(op, begins), sep="\n")
    except LookupError as error:
        sys.exit(f"exact: {error}")


if __name__ == "__main__":
    main(*sys.argv[1:])
