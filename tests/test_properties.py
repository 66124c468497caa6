"""Properties of every function, on shapes, strides, dtypes and options that Hypothesis draws.

The draws are the same in every run; ``SELFKD_EXAMPLES=1000`` makes more of them, new ones each time.
"""

from __future__ import annotations

import os
from typing import Any

import harness
import pytest
import selfkd
import torch
from harness import Case
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from selfkd.contract import contract

EXAMPLES = int(os.environ.get("SELFKD_EXAMPLES", "0"))
PROFILE = settings(
    max_examples=EXAMPLES or 40,
    derandomize=not EXAMPLES,
    database=None,
    deadline=None,
    suppress_health_check=list(HealthCheck),
)
OPERATORS = ["sd_dropout_kl", "distill", "simreg", "attention", "dropout_views"]
PYTORCH = harness.Backend("pytorch", harness.through_torch)
C = harness.Backend("c", harness.through_c(selfkd.library.library(), None))


def expanded(x: torch.Tensor) -> torch.Tensor:
    """The first sample again and again, at a stride of 0."""
    return x[:1].expand(x.shape)


def padded(x: torch.Tensor) -> torch.Tensor:
    """Samples at a stride of their own, in a larger block."""
    wide = torch.full((x.shape[0], 3, *x.shape[1:]), torch.nan, dtype=x.dtype)
    wide[:, 1] = x
    return wide[:, 1]


LAYOUTS = {**harness.LAYOUTS, "expanded": expanded, "padded": padded}
# Numbers of the contracts, by name: ordinary ones, for the bounds of the tolerance are the cases'.
NUMBERS: dict[str, Any] = {
    "REAL": st.sampled_from([0.5, 1.0, 2.5]),
    "FRACTION": st.sampled_from([0.0, 0.1, 0.9]),
    "BELOW_ONE": st.sampled_from([0.0, 0.1, 0.5, 0.9]),
    "INT": st.sampled_from([0, 2, 1000]),
    "BOOL": st.booleans(),
}


@st.composite
def calls(draw: st.DrawFn, op: str) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Tensors and options that the contract of `op` accepts."""
    of = contract(op)
    dtype = harness.DTYPES[draw(st.sampled_from(list(harness.DTYPES)))]
    sizes = {letter: draw(st.integers(1, 40)) for letter in "CD"}
    sizes["K"] = draw(st.integers(1, sizes["C"]))
    sizes["N"] = draw(st.integers(0 if op != "dropout_views" else 1, 6))
    trailing = tuple(draw(st.lists(st.integers(1, 6), max_size=2)))
    g = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    tensors: dict[str, torch.Tensor] = {}
    for item in of.items:
        if not item.is_input or (item.kind == "OPT" and not draw(st.booleans())):
            continue
        letters = item.shape.removesuffix("*")
        shape = tuple(sizes[letter] for letter in letters)
        shape += trailing if item.shape.endswith("*") else ()
        if item.rule == "INDEX":
            tensors[item.name] = torch.randint(sizes["C"], shape, generator=g)
        elif item.rule == "CLASSES":
            every = (shape[0], sizes["C"], *shape[2:])
            tensors[item.name] = harness.listed_classes(every, shape[1], g)
        elif item.rule == "SEED":
            tensors[item.name] = torch.randint(2**62, shape, generator=g)
        else:
            scale = draw(st.sampled_from([0.5, 3.0]))
            x = scale * torch.randn(shape, generator=g, dtype=torch.float64)
            if item.rule == "WEIGHT":
                x = x.abs() * (torch.rand(shape, generator=g) < 0.7)
                x = x != 0 if draw(st.booleans()) else x
            tensors[item.name] = x.abs() + 0.5 if item.name == "divisor" else x
    tensors = harness.cast(tensors, op, dtype)
    for item in of.items:
        if item.name in tensors and item.shape[:1] == "N" and sizes["N"] > 0:
            kinds = LAYOUTS if item.shape[1:2] in ("C", "D", "K") else ("contiguous", "expanded")
            tensors[item.name] = LAYOUTS[draw(st.sampled_from(list(kinds)))](tensors[item.name])
    options: dict[str, Any] = {}
    for item in of.items:
        if item.choices:
            options[item.name] = draw(st.sampled_from(item.choices))
        elif item.is_number and item.name not in ("eps", "ignore_index"):
            kind = item.rule if item.rule in NUMBERS else item.kind
            options[item.name] = draw(NUMBERS[kind])
    return adapt(op, tensors, options)


def adapt(
    op: str, tensors: dict[str, torch.Tensor], options: dict[str, Any]
) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """What the functions ask beyond the contract: probabilities, and divisors of means."""
    if options.get("reduction", "mean") != "mean":
        tensors.pop("divisor", None)
    for name in ("teacher", "second_teacher"):
        kind = options.get(f"{name}_kind", "logits")
        if kind != "logits" and name in tensors:
            x = tensors[name].double().log_softmax(1)
            tensors[name] = (x.exp() if kind == "probs" else x).to(tensors[name].dtype)
    if op == "distill":
        if "target" not in tensors and "teacher" not in tensors:
            tensors["teacher"] = torch.zeros_like(tensors["logits"])
            options["teacher_kind"] = "logits"
        if "target" not in tensors:
            options["mask_teachers"] = False
        if "teacher" not in tensors:
            tensors.pop("second_teacher", None)
    if op == "dropout_views":
        n, c = tensors["features"].shape
        tensors["grad"] = torch.ones(3, n, c, dtype=tensors["features"].dtype)
    if op == "simreg":
        options["dim"] = 1
        if tensors["student"].shape[1] == 1:  # rows that agree or are opposite
            options["normalize"] = False
    return tensors, options


@pytest.mark.parametrize("op", OPERATORS)
def test_functions_follow_their_reference(op: str) -> None:
    """Results and gradients, through PyTorch and through C."""

    @PROFILE
    @given(calls(op), st.sampled_from([PYTORCH, C]))
    def check(call: tuple[dict[str, torch.Tensor], dict[str, Any]], backend: Any) -> None:
        tensors, options = call
        case = Case("drawn", lambda g: tensors, options)
        harness.check_tensors(op, case, backend, tensors)

    check()
