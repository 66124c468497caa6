"""Weights of rows are numbers >= 0: on the CPU others are refused, in one sentence, by every operator."""

from __future__ import annotations

from collections.abc import Callable

import harness
import numpy as np
import pytest
import selfkd
import selfkd.c
import torch
from selfkd.contract import contract, modules

FORWARD = [op for op in modules() if op != "sd_dropout_head"]
WEIGHTED = [op for op in FORWARD if any(x.rule == "WEIGHT" for x in contract(op).items)]

needs_cpu = pytest.mark.skipif(
    bool(harness.SIMT_LIBRARY), reason="of the CPU back end: values are not looked at on a GPU"
)


def arguments(op: str, dtype: torch.dtype, *trailing: int) -> dict[str, torch.Tensor]:
    """Rows of 5 classes, 3 for each of some positions, and weights of 1."""
    found = {}
    for item in contract(op).items:
        if item.kind == "IN" and item.shape == "NC*":
            found[item.name] = torch.randn(3, 5, *trailing, dtype=torch.float64).to(dtype)
        elif item.rule == "CLASSES":
            found[item.name] = harness.listed_classes((3, 5, *trailing), 2)
        elif item.shape == "NK*":
            found[item.name] = torch.randn(3, 2, *trailing, dtype=torch.float64).to(dtype)
    if op == "distill":
        found["target"] = torch.zeros(3, *trailing, dtype=torch.int64)
    acc = torch.float64 if dtype == torch.float64 else torch.float32
    return found | {"weight": torch.ones(3, *trailing, dtype=acc)}


def options(op: str) -> dict[str, int]:
    return {"dim": 1} if op == "simreg" else {}


LAYOUTS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "contiguous": lambda x: x,
    "by columns": lambda x: x.mT.contiguous().mT if x.ndim > 1 else x,
    "every other": lambda x: x.repeat_interleave(2, -1)[..., ::2],
}


def test_there_are_weights() -> None:
    assert {"sd_dropout_kl", "distill", "simreg"} <= set(WEIGHTED)


@needs_cpu
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("op", WEIGHTED)
def test_negative_weights(op: str, dtype: torch.dtype, layout: str) -> None:
    function = harness.public(op, selfkd)
    for trailing, at, place in (
        ((), (2,), "[2]"),
        ((4,), (0, 3), "[0, 3]"),
        ((4,), (2, 1), "[2, 1]"),
    ):
        named = arguments(op, dtype, *trailing)
        for value, text in (
            (-1.0, "-1"),
            (-1e-30, "-1e-30"),
            (torch.nan, "nan"),
            (-torch.nan, "nan"),
        ):
            weight = named["weight"].clone()
            weight[at] = value
            with pytest.raises(ValueError, match=r"expected a number >= 0$") as error:
                function(**named | {"weight": LAYOUTS[layout](weight)}, **options(op))
            sentence = f"{op}: weight is {text} at position {place}, expected a number >= 0"
            assert str(error.value) == sentence
        for value in (-0.0, 0.0, 1e30, torch.inf):
            weight = named["weight"].clone()
            weight[at] = value
            function(**named | {"weight": LAYOUTS[layout](weight)}, **options(op))


@needs_cpu
@pytest.mark.parametrize("op", WEIGHTED)
def test_from_numpy(op: str) -> None:
    named = {name: x.numpy() for name, x in arguments(op, torch.float32).items()}
    named["weight"][1] = -2
    with pytest.raises(ValueError, match=rf"^{op}: weight is -2 at position \[1\], expected"):
        getattr(selfkd.c, op)(**named)


@needs_cpu
def test_many_rows_are_looked_at_to_the_last() -> None:
    u = torch.zeros(1000, 2)
    for at in (0, 7, 500, 999):
        weight = torch.ones(1000)
        weight[at] = -1
        with pytest.raises(ValueError, match=rf"weight is -1 at position \[{at}\]"):
            selfkd.sd_dropout_kl(u, u, weight=weight)


@needs_cpu
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_the_head_names_its_own_argument(reduction: str) -> None:
    features, weight = torch.randn(6, 4, requires_grad=True), torch.randn(3, 4)
    target, row_weight = torch.tensor([0, 1, 2, 0, 1, 2]), torch.rand(6)

    def head(w: torch.Tensor) -> torch.Tensor:
        return selfkd.sd_dropout_head(
            features, weight, None, target, row_weight=w, reduction=reduction, chunk_bytes=72
        )

    for value, text in ((-1.0, "-1"), (torch.nan, "nan")):
        bad = row_weight.clone()
        bad[4] = value
        with pytest.raises(ValueError, match=r"expected a number >= 0$") as error:
            head(bad)
        assert (
            str(error.value)
            == f"sd_dropout_head: row_weight is {text} at position [4], expected a number >= 0"
        )
    loss = head(row_weight)
    assert torch.autograd.grad(loss.sum().neg(), features)[0].isfinite().all()  # of negative rows


@needs_cpu
def test_masks_are_not_looked_at() -> None:
    u = torch.randn(3, 5)
    mask = np.array([True, False, True])
    assert np.isfinite(selfkd.c.sd_dropout_kl(u.numpy(), u.numpy(), weight=mask).loss)


@pytest.mark.parametrize("op", WEIGHTED)
def test_a_mean_over_nothing_has_no_gradient(op: str) -> None:
    """Its denominator is 0, but each row's weight is too: 0/0 is the loss, not the gradient."""
    found = arguments(op, torch.float32, *((4,) if op != "simreg" else ()))
    found["weight"].zero_()
    live = found[contract(op).first].requires_grad_()
    loss = harness.public(op, selfkd)(**found, **options(op))
    loss.backward()
    assert loss.isnan()
    assert live.grad is not None
    assert not live.grad.any(), "NaN is not 0"
