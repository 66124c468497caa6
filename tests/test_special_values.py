"""Denormals, infinities, NaN and the largest numbers, in every position of every input.

Each row has one such value at one place: the row's result is the reference's, and no other row sees
it.
"""

from __future__ import annotations

from typing import Any

import harness
import pytest
import torch
from selfkd.contract import contract

NAN, INF = torch.nan, torch.inf
OPERATORS = ["sd_dropout_kl", "distill", "simreg", "attention"]
ROWS = ("FLOATING", "SAME", "CONSTANT", "TEACHER")
CLASSES = 19  # some in whole vectors, some left over


def specials(dtype: torch.dtype) -> dict[str, float]:
    info = torch.finfo(dtype)
    return {
        "nan": NAN,
        "inf": INF,
        "-inf": -INF,
        "smallest": info.smallest_normal * info.eps,
        "denormal": -info.smallest_normal / 3,
        "-0": -0.0,
    }


def inputs(op: str, name: str, dtype: torch.dtype, positions: bool) -> dict[str, torch.Tensor]:
    """Every special value in every class of `name`, a row for each; the last row has none."""
    values = list(specials(dtype).values())
    rows = len(values) * CLASSES + 1
    g = torch.Generator().manual_seed(1)
    tensors: dict[str, torch.Tensor] = {}
    for item in contract(op).items:
        if item.is_input and item.rule in ROWS and item.name != "second_teacher":
            x = torch.randn(rows, CLASSES, generator=g, dtype=torch.float64)
            tensors[item.name] = x.to(dtype)
        elif item.name == "target" and item.rule == "INDEX":
            tensors[item.name] = torch.arange(rows) % CLASSES
    for row in range(rows - 1):
        tensors[name][row, row % CLASSES] = values[row // CLASSES]
    if positions:  # rows (n, s) of an image: classes apart, positions side by side
        tensors = {
            key: (x.unflatten(0, (1, rows)) if x.ndim == 1 else x.T[None].contiguous())
            for key, x in tensors.items()
        }
    return tensors


# All positions of an attention map share its length: its rows are samples.
CALLS = [
    (op, item.name, positions)
    for op in OPERATORS
    for item in contract(op).items
    for positions in (False, True)
    if item.is_input and item.rule in ROWS and item.name != "second_teacher"
    if not (positions and op == "attention")
]


@pytest.mark.parametrize("dtype", harness.DTYPES)
@pytest.mark.parametrize(("op", "name", "positions"), CALLS)
@pytest.mark.parametrize("backend", harness.backends(), ids=str)
def test_each_row_is_its_own(
    backend: harness.Backend, op: str, name: str, dtype: str, positions: bool
) -> None:
    harness.prepare(backend)
    tensors = inputs(op, name, harness.DTYPES[dtype], positions)
    tensors = {key: x.to(backend.device) for key, x in tensors.items()}
    numbers = [item.name for item in contract(op).items]
    options: dict[str, Any] = {"reduction": "none"} if "reduction" in numbers else {}
    if op == "simreg":
        options["dim"] = 1
    expected, expected_grads = harness.reference(op, tensors, options)
    found, grads = backend.call(op, tensors, options)
    harness.assert_values(found, expected, f"{op}, values in {name}")
    for key, grad in grads.items():
        rows, wanted = (x.movedim(1, -1).flatten(0, -2) for x in (grad, expected_grads[key]))
        finite = wanted.isfinite().all(1)
        assert finite[-1]
        assert finite.sum() >= rows.shape[0] // 2
        harness.assert_gradient(rows[finite], wanted[finite], f"gradient of {key}")
        assert torch.equal(rows.isfinite().all(1).cpu(), finite)
