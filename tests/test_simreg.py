"""simreg: the cases every back end runs, and what the operator promises beside them."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import harness
import numpy as np
import pytest
import selfkd
import torch
import torch.nn.functional as F
from harness import Case, divided, needs_torch_backend, weighted

OP = "simreg"
NAN, INF = torch.nan, torch.inf
F32 = torch.float32
RAW = {"normalize": False}


def pair(
    *shape: int, apart: float | None = None, x_scale: float = 1.0, t_scale: float = 1.0
) -> Any:
    """Draws both: independent, or with directions about `apart` from each other."""

    def make(g: torch.Generator) -> dict[str, torch.Tensor]:
        x, noise = (torch.randn(shape, generator=g, dtype=torch.float64) for _ in range(2))
        t = noise if apart is None else x + apart * noise
        return {"student": x_scale * x, "target": t_scale * t}

    return make


def with_zeros(*shape: int) -> Any:
    """Row 1 of the student is zero, row 2 of the target, row 3 of both; 4 and 5 are shorter than eps."""

    def make(g: torch.Generator) -> dict[str, torch.Tensor]:
        tensors = pair(*shape)(g)
        x, t = tensors.values()
        x[1], t[2], x[3], t[3] = 0, 0, 0, 0
        x[4] *= 1e-14
        t[5] *= 1e-14
        return tensors

    return make


CASES = [
    *[Case(f"width_{n}", pair(9, n)) for n in (2, 3, 15, 16, 17, 31, 33)],
    *[Case(f"width_{n}", pair(3, n)) for n in (1023, 1024, 1025, 2047, 2048, 2049, 8192, 10000)],
    *[Case(f"raw_width_{n}", pair(9, n), RAW) for n in (1, 16, 17, 1000, 2500)],
    Case("cifar_features", pair(64, 512)),
    Case("resnet50_features", pair(16, 2048)),
    Case("wide", pair(2, 250000), big=True),
    *[
        Case(f"{apart:.0e}_apart_{n}", pair(9, n, apart=apart, t_scale=3.7), close=True, exact=1e-9)
        for apart in (1e-1, 1e-2, 2e-3, 5e-4, 1e-4)
        for n in (7, 1000, 2500)
    ],
    Case("raw_1e-3_apart", pair(9, 1000, apart=1e-3), RAW),
    Case("raw_masked", weighted(pair(33, 100), boolean=True), RAW),
    Case("weighted", weighted(pair(33, 100))),
    Case("masked", weighted(pair(33, 100), boolean=True)),
    Case("masked_wide", weighted(pair(12, 1500), boolean=True)),
    Case("divisor", divided(weighted(pair(33, 10)))),
    Case("sum", weighted(pair(33, 10)), {"reduction": "sum"}),
    Case("no_rows", pair(0, 10), {"reduction": "sum"}),
]
POSITIONS = [
    Case("tokens", weighted(pair(3, 130, 7))),
    Case("tokens_wide", pair(2, 1100, 3)),
    Case("maps", pair(2, 21, 6, 7)),
    Case("maps_masked", weighted(pair(2, 21, 9, 13), boolean=True)),
    Case("maps_raw", pair(2, 40, 5, 5), RAW),
    Case("one_position", pair(2, 40, 1, 1)),
    Case("close", pair(2, 40, 5, 5, apart=1e-4), close=True, exact=1e-9),
    Case("no_positions", pair(2, 9, 0, 4), {"reduction": "sum"}),
]
LARGE_AND_SMALL = [
    Case(
        f"{x:.0e}_and_{t:.0e}", pair(9, n, x_scale=x, t_scale=t), exact=1e-7 if t < 1e-12 else 1e-12
    )
    for x, t in [(1e18, 1e-9), (1e-9, 1e18), (1e18, 1e18), (1e-20, 1), (1, 1e-20), (1e-20, 1e-20)]
    for n in (100, 1500)
]
DTYPES = list(harness.DTYPES)
globals().update(
    harness.standard_tests(OP, pair, CASES, maps=POSITIONS, path="rows", options=[{}, RAW])
)


@pytest.mark.parametrize("case", LARGE_AND_SMALL, ids=str)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float64"])
@pytest.mark.parametrize("backend", harness.backends(), ids=str)
def test_no_square_leaves_the_range(
    backend: harness.Backend, case: Case, dtype: str, generator: torch.Generator
) -> None:
    harness.check_case(OP, case, backend, dtype, "contiguous", generator)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [1, 2, 100, 1500])
@pytest.mark.parametrize("backend", harness.backends(), ids=str)
def test_zero_rows_are_normalised_as_pytorch_does(
    backend: harness.Backend,
    width: int,
    dtype: str,
    generator: torch.Generator,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Value and gradient of zero rows, and of rows shorter than eps; finite, but for float16's range."""
    harness.prepare(backend)
    # The kernels know rows of one feature too, which the function refuses.
    monkeypatch.setattr(importlib.import_module("selfkd.simreg"), "_check", lambda *_: None)
    tensors = harness.cast(
        with_zeros(8, width)(generator), OP, harness.DTYPES[dtype], backend.device
    )
    expected, expected_grads = harness.reference(OP, tensors, {"reduction": "none"})
    found, grads = backend.call(OP, tensors, {"reduction": "none"})
    harness.assert_values(found, expected, "rows", Case("zeros", pair(), exact=1e-11))
    grad, exact = grads["student"].double().cpu(), expected_grads["student"]
    within = exact.abs() <= torch.finfo(harness.DTYPES[dtype]).max
    assert torch.equal(grad.isfinite(), within)
    exact[2] = 0  # and not the rounding of nothing
    if width == 1:  # the others' too, but for what rounding makes of 1/|x|
        rest = [0, 5, 6, 7]
        x = tensors["student"].double().cpu()
        assert (grad * x)[rest].abs().max() <= 8 * harness.epsilon(harness.DTYPES[dtype])
        exact[rest] = grad[rest] = 0
    finite = within.all(1)
    assert finite.sum() >= 5
    harness.assert_gradient(
        grad[finite].to(harness.DTYPES[dtype]), exact[finite], "gradient of student"
    )


# ---- what the function promises ----


@needs_torch_backend
def test_the_authors_loss(generator: torch.Generator) -> None:
    """regress_loss of the paper's code: 2 - 2 <x_hat, t_hat>, mean over the batch."""
    x, t = pair(8, 40)(generator).values()
    product = (F.normalize(x, dim=1) * F.normalize(t, dim=1)).sum(1)
    torch.testing.assert_close(selfkd.simreg(x, t), (2 - 2 * product).mean())
    torch.testing.assert_close(
        selfkd.simreg(x, t, normalize=False), F.mse_loss(x, t, reduction="sum") / 8
    )


@needs_torch_backend
def test_rows_are_dimension_1_unless_dim_says_so(generator: torch.Generator) -> None:
    """As in F.cosine_similarity: features of maps and unflattened pooled features are regressed."""
    x, t = (x.float() for x in pair(2, 7, 3, 5)(generator).values())
    rows = [y.movedim(1, -1).reshape(-1, 7) for y in (x, t)]
    expected = selfkd.simreg(*rows, reduction="none").view(2, 3, 5)
    maps = selfkd.simreg(x, t, reduction="none")
    torch.testing.assert_close(maps, expected)
    torch.testing.assert_close(maps, 2 - 2 * F.cosine_similarity(x, t))
    tokens = [y.movedim(1, -1) for y in (x, t)]
    torch.testing.assert_close(selfkd.simreg(*tokens, dim=-1, reduction="none"), expected)
    cut = [torch.cat([y, y], 3)[:, :, :, :5] for y in (x, t)]  # dimensions that do not merge
    torch.testing.assert_close(selfkd.simreg(*cut, reduction="none"), expected)
    weight = torch.rand(2, 3, 5, generator=generator)
    torch.testing.assert_close(
        selfkd.simreg(x, t, weight=weight), (weight * expected).sum() / weight.sum()
    )
    pooled = [y.mean((2, 3), keepdim=True) for y in (x, t)]  # (N, C, 1, 1)
    flat = [y.flatten(1) for y in pooled]
    torch.testing.assert_close(selfkd.simreg(*pooled), selfkd.simreg(*flat))


@needs_torch_backend
@pytest.mark.parametrize("function", [selfkd.simreg, selfkd.reference.simreg])
def test_one_feature_has_no_direction(function: Callable[..., torch.Tensor]) -> None:
    """2 - 2 cos of it is 0 or 2 and its gradient 0: most likely the wrong dimension was taken."""
    x, t = torch.randn(4, 6, 1, 1), torch.randn(4, 6, 1, 1)
    sentence = "simreg: student has size 1 in dimension C, expected at least 2 with normalize=True"
    with pytest.raises(ValueError, match=f"^{sentence}; dim=-1 is not"):
        function(x, t, dim=-1)
    torch.testing.assert_close(function(x, t, dim=-1, normalize=False), (x - t).square().mean())


@needs_torch_backend
@pytest.mark.parametrize(
    ("dtype", "apart", "scale", "bound"),
    [
        *[("float32", apart, 1.0, 1e-7) for apart in (1e-5, 1e-3, 0.1)],
        *[("float64", apart, 1.0, 1e-12) for apart in (1e-3, 0.1)],
        ("float64", 1e-6, 1e200, 1e-9),  # whose squares are no doubles
    ],
)
def test_close_rows_against_long_double(
    dtype: str, apart: float, scale: float, bound: float, generator: torch.Generator
) -> None:
    """Where the float64 reference is no judge: against 80-bit arithmetic."""
    make = pair(5, 1000, apart=apart, x_scale=scale, t_scale=scale)
    tensors = harness.cast(make(generator), OP, harness.DTYPES[dtype])
    x, t = (x.numpy().astype(np.longdouble) for x in tensors.values())
    x, t = (x / np.sqrt((x * x).sum(1, keepdims=True)) for x in (x, t))
    expected = ((x - t) ** 2).sum(1)
    found = selfkd.simreg(*tensors.values(), reduction="none").numpy()
    assert np.abs(found / expected - 1).max() < bound


# ---- the modules ----


@needs_torch_backend
@pytest.mark.parametrize(("layers", "parameters"), [(4, 3_678_720), (2, 2_626_560), (1, 1_050_624)])
def test_head(layers: int, parameters: int) -> None:
    """The sizes of the paper: ResNet-18 to ResNet-50, 3.68 M parameters."""
    head = selfkd.nn.SimRegHead(512, 2048, layers)
    assert sum(x.numel() for x in head.parameters()) == parameters
    linear = [x for x in head if isinstance(x, torch.nn.Linear)]
    assert len(linear) == layers
    assert all(x.bias is not None for x in linear)
    kinds = "".join(type(x).__name__[0] for x in head)
    assert kinds == {4: "LBRLLBRL", 2: "LBRL", 1: "L"}[layers]
    assert head(torch.randn(3, 512)).shape == (3, 2048)
    with pytest.raises(ValueError, match="SimRegHead: layers is 3, expected 1, 2 or 4"):
        selfkd.nn.SimRegHead(5, 6, 3)


@needs_torch_backend
@pytest.mark.parametrize("layers", [1, 2, 4])
def test_a_head_of_one_row(layers: int) -> None:
    """Batch statistics of one row are none: what a last batch of one brings."""
    head = selfkd.nn.SimRegHead(5, 6, layers)
    if layers > 1:
        with pytest.raises(
            ValueError, match=r"SimRegHead: x has 1 row, expected 2 or .*drop_last=True"
        ):
            head(torch.randn(1, 5))
    assert head.eval()(torch.randn(1, 5)).shape == (1, 6)
    with pytest.raises(TypeError, match="SimRegHead: x is None, expected a tensor"):
        head(None)


@needs_torch_backend
def test_module_is_the_mean_over_teachers(generator: torch.Generator) -> None:
    one, other = (list(pair(6, n)(generator).values()) for n in (5, 9))
    for x in (one[0], other[0]):
        x.requires_grad_()
    loss = selfkd.nn.SimRegLoss()
    torch.testing.assert_close(loss(*one), selfkd.reference.simreg(*one))
    torch.testing.assert_close(loss([one[0]], [one[1]]), loss(*one))
    both = loss([one[0], other[0]], [one[1], other[1]])
    torch.testing.assert_close(both, (loss(*one) + loss(*other)) / 2)
    both.backward()
    assert one[0].grad is not None
    assert other[0].grad is not None
    weight = torch.rand(6, generator=generator, dtype=torch.float64)
    raw = selfkd.nn.SimRegLoss(normalize=False, reduction="none")
    torch.testing.assert_close(
        raw([one[0], other[0]], [one[1], other[1]], weight=weight),
        sum(
            selfkd.reference.simreg(*x, weight=weight, normalize=False, reduction="none")
            for x in (one, other)
        )
        / 2,
    )
    torch.testing.assert_close(
        loss(*one, divisor=3.0), selfkd.reference.simreg(*one, reduction="sum") / 3
    )
    assert "normalize=True" in repr(loss)
    with pytest.raises(ValueError, match="targets has length 2, expected that of predictions, 1"):
        loss([one[0]], [one[1], one[1]])
    with pytest.raises(ValueError, match="and at least 1"):
        loss([], [])
    with pytest.raises(TypeError, match="expected two tensors or two sequences"):
        loss(one[0], [one[1]])
