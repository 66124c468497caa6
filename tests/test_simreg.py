"""simreg: the cases every back end runs, and what the operator promises beside them."""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable
from typing import Any

import harness
import numpy as np
import pytest
import selfkd
import torch
import torch.nn.functional as F
from harness import Case
from selfkd import library

OP = "simreg"
NAN, INF = torch.nan, torch.inf
F32 = torch.float32
MAPS = {"dim": 1}  # a row for each position
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


def weighted(make: Any, boolean: bool = False) -> Any:
    """The same with weights, a third of them 0, and NaN features where nothing may look."""

    def with_weight(g: torch.Generator) -> dict[str, torch.Tensor]:
        tensors = make(g)
        sizes = tensors["student"][:, 0].shape
        weight = torch.rand(sizes, generator=g, dtype=torch.float64) + 0.1
        skipped = torch.rand(sizes, generator=g) < 0.34
        weight[skipped] = 0
        if boolean:
            for x in tensors.values():
                x.movedim(1, -1)[skipped] = NAN
        return {**tensors, "weight": weight != 0 if boolean else weight}

    return with_weight


def divided(make: Any) -> Any:
    return lambda g: {**make(g), "divisor": torch.tensor(12.5, dtype=torch.float64)}


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
    Case("tokens", weighted(pair(3, 130, 7)), MAPS),
    Case("tokens_wide", pair(2, 1100, 3), MAPS),
    Case("maps", pair(2, 21, 6, 7), MAPS),
    Case("maps_masked", weighted(pair(2, 21, 9, 13), boolean=True), MAPS),
    Case("maps_raw", pair(2, 40, 5, 5), MAPS | RAW),
    Case("one_position", pair(2, 40, 1, 1), MAPS),
    Case("close", pair(2, 40, 5, 5, apart=1e-4), MAPS, close=True, exact=1e-9),
    Case("no_positions", pair(2, 9, 0, 4), MAPS | {"reduction": "sum"}),
]
LARGE_AND_SMALL = [
    Case(
        f"{x:.0e}_and_{t:.0e}", pair(9, n, x_scale=x, t_scale=t), exact=1e-7 if t < 1e-12 else 1e-12
    )
    for x, t in [(1e18, 1e-9), (1e-9, 1e18), (1e18, 1e18), (1e-20, 1), (1, 1e-20), (1e-20, 1e-20)]
    for n in (100, 1500)
]
DTYPES = list(harness.DTYPES)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("backend", harness.backends(), ids=str)
def test_rows(backend: harness.Backend, case: Case, dtype: str, generator: torch.Generator) -> None:
    harness.check_case(OP, case, backend, dtype, "contiguous", generator, path="rows")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("case", POSITIONS, ids=str)
@pytest.mark.parametrize("backend", harness.backends(), ids=str)
def test_positions(
    backend: harness.Backend, case: Case, layout: str, dtype: str, generator: torch.Generator
) -> None:
    harness.check_case(OP, case, backend, dtype, layout, generator, path="rows")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", ["every_other", "unaligned"])
@pytest.mark.parametrize("shape", [(5, 100), (3, 1100), (2, 21, 6, 7)], ids=str)
@pytest.mark.parametrize("backend", harness.backends(), ids=str)
def test_strides(
    backend: harness.Backend,
    shape: tuple[int, ...],
    layout: str,
    dtype: str,
    generator: torch.Generator,
) -> None:
    options = MAPS if len(shape) > 2 else {}
    case = Case("strides", pair(*shape), options)
    harness.check_case(OP, case, backend, dtype, layout, generator)


@pytest.mark.parametrize("case", LARGE_AND_SMALL, ids=str)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float64"])
@pytest.mark.parametrize("backend", harness.backends(), ids=str)
def test_no_square_leaves_the_range(
    backend: harness.Backend, case: Case, dtype: str, generator: torch.Generator
) -> None:
    harness.check_case(OP, case, backend, dtype, "contiguous", generator)


@pytest.mark.parametrize("target", DTYPES)
@pytest.mark.parametrize("student", DTYPES)
@pytest.mark.parametrize("shape", [(9, 100), (3, 1101), (3, 4096), (33, 8)], ids=str)
@pytest.mark.parametrize("backend", harness.backends(), ids=str)
def test_target_of_a_dtype_of_its_own(
    backend: harness.Backend,
    shape: tuple[int, ...],
    student: str,
    target: str,
    generator: torch.Generator,
) -> None:
    harness.prepare(backend)
    tensors = harness.cast(pair(*shape)(generator), OP, harness.DTYPES[student], backend.device)
    tensors["target"] = tensors["target"].to(harness.DTYPES[target])
    harness.check_tensors(OP, Case("mixed", pair(*shape)), backend, tensors)


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


@pytest.mark.parametrize("backend", harness.backends(), ids=str)
@pytest.mark.parametrize("shape", [(7, 100), (2, 2500), (1, 40, 9, 11)], ids=str)
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
def test_equal_rows_give_exactly_zero(
    backend: harness.Backend,
    shape: tuple[int, ...],
    normalize: bool,
    dtype: str,
    generator: torch.Generator,
) -> None:
    harness.prepare(backend)
    x = 30 * torch.randn(shape, generator=generator)
    x = x.to(backend.device, harness.DTYPES[dtype])
    options = {"normalize": normalize, **(MAPS if len(shape) > 2 else {})}
    loss, grads = backend.call(OP, {"student": x, "target": x.clone()}, options)
    assert loss == 0
    assert (grads["student"] == 0).all()


@pytest.mark.parametrize("backend", harness.backends(), ids=str)
@pytest.mark.parametrize("shape", [(8, 50), (8, 1500)], ids=str)
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16"])
def test_non_finite_rows_stay_alone(
    backend: harness.Backend,
    shape: tuple[int, ...],
    normalize: bool,
    dtype: str,
    generator: torch.Generator,
) -> None:
    harness.prepare(backend)
    tensors = harness.cast(pair(*shape)(generator), OP, harness.DTYPES[dtype], backend.device)
    x, t = tensors["student"], tensors["target"]
    x[1, 3], t[2, -1], x[3, 5], t[4, 0], t[5] = NAN, NAN, INF, -INF, NAN
    options = {"normalize": normalize, "reduction": "none"}
    expected, expected_grads = harness.reference(OP, tensors, options)
    found, grads = backend.call(OP, tensors, options)
    harness.assert_values(found, expected, "rows")
    kept = [0, 6, 7]
    harness.assert_gradient(
        grads["student"][kept], expected_grads["student"][kept], "gradient of student"
    )
    assert not found[1:6].isfinite().any()
    assert not grads["student"][1:6].isfinite().all(1).any()


@pytest.mark.parametrize("backend", harness.backends(), ids=str)
def test_empty_batch(backend: harness.Backend) -> None:
    harness.prepare(backend)
    for shape in [(0, 10), (0, 10, 4), (3, 10, 0)]:
        x = harness.every_other(torch.zeros(shape, device=backend.device))
        tensors, options = {"student": x, "target": x}, MAPS if len(shape) > 2 else {}
        grads = backend.call(OP, tensors, {"reduction": "sum", **options})[1]
        assert grads["student"].stride() == torch.empty_like(x).stride()
        assert backend.call(OP, tensors, {"reduction": "mean", **options})[0].isnan()
        assert backend.call(OP, tensors, {"reduction": "sum", **options})[0] == 0
        rows = backend.call(OP, tensors, {"reduction": "none", **options})[0]
        assert rows.shape == (shape[0], *shape[2:])


@pytest.mark.parametrize("backend", harness.backends(), ids=str)
def test_everything_masked(backend: harness.Backend, generator: torch.Generator) -> None:
    harness.prepare(backend)
    tensors = harness.cast(pair(4, 10)(generator), OP, F32, backend.device)
    tensors["weight"] = torch.zeros(4, dtype=torch.bool, device=backend.device)
    assert backend.call(OP, tensors, {"reduction": "mean"})[0].isnan()
    loss, grads = backend.call(OP, tensors, {"reduction": "sum"})
    assert loss == 0
    assert (grads["student"] == 0).all()


@pytest.mark.parametrize("backend", harness.backends(), ids=str)
def test_incoming_gradient_per_row(backend: harness.Backend, generator: torch.Generator) -> None:
    harness.prepare(backend)
    for shape, options in [((6, 40), {}), ((2, 9, 3, 5), MAPS)]:
        tensors = harness.cast(weighted(pair(*shape))(generator), OP, F32, backend.device)
        grad = torch.randn(shape[0], *shape[2:], generator=generator).to(backend.device)
        options = {"reduction": "none", **options}
        _, expected = harness.reference(OP, tensors, options, grad)
        _, found = backend.call(OP, tensors, options, grad)
        harness.assert_gradient(found["student"], expected["student"], "student")


# ---- PyTorch: gradients of gradients, compiler, views, sentences ----

needs_torch_backend = pytest.mark.skipif(
    bool(harness.SIMT_LIBRARY), reason="the emulator has no PyTorch binding"
)


@needs_torch_backend
@pytest.mark.parametrize("shape", [(3, 5), (2, 3, 4)], ids=str)
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("normalize", [True, False])
def test_gradcheck(
    shape: tuple[int, ...], reduction: str, normalize: bool, generator: torch.Generator
) -> None:
    student, target = pair(*shape)(generator).values()
    weight = torch.rand(shape[:1] + shape[2:], generator=generator, dtype=torch.float64)

    def loss(x: torch.Tensor) -> torch.Tensor:
        return selfkd.simreg(x, target, normalize=normalize, weight=weight, reduction=reduction)

    assert torch.autograd.gradcheck(loss, student.requires_grad_())
    assert torch.autograd.gradgradcheck(loss, student)


@needs_torch_backend
@pytest.mark.parametrize("options", [{}, RAW, {"reduction": "none"}], ids=str)
@pytest.mark.parametrize("shape", [(4, 6), (2, 3, 6)], ids=str)
def test_double_backward_agrees_with_kernel_and_reference(
    shape: tuple[int, ...], options: dict[str, Any], generator: torch.Generator
) -> None:
    harness.check_double_backward(OP, pair(*shape)(generator), options)


@needs_torch_backend
@pytest.mark.parametrize("reduction", [0, 1])
@pytest.mark.parametrize("target", [torch.float32, torch.float16])
def test_opcheck(target: torch.dtype, reduction: int, generator: torch.Generator) -> None:
    tensors = harness.cast(pair(4, 6)(generator), OP, F32)
    tensors |= {
        "weight": torch.rand(4, generator=generator),
        "target": tensors["target"].to(target),
    }
    grad = torch.rand(4, generator=generator) if reduction == 0 else torch.tensor(2.0)
    harness.check_operator(OP, tensors, {"reduction": reduction}, grad)


@needs_torch_backend
@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("shape", [(6,), (3, 6)], ids=str)
def test_compile(shape: tuple[int, ...], dynamic: bool, generator: torch.Generator) -> None:
    batches = []
    for n in (4, 7):
        weight = torch.rand(n, *shape[1:], generator=generator)
        batches.append(harness.cast({**pair(n, *shape)(generator), "weight": weight}, OP, F32))
    harness.check_compile(OP, batches, {"divisor": 4.0}, dynamic)


@needs_torch_backend
@pytest.mark.parametrize("shape", [(300, 500), (20, 8192), (20, 8, 300)], ids=str)
def test_threads(shape: tuple[int, ...], generator: torch.Generator) -> None:
    tensors = harness.cast(pair(*shape)(generator), OP, F32)
    weight = torch.rand(shape[:1] + shape[2:], generator=generator)
    harness.check_threads(OP, {**tensors, "weight": weight}, {})


@needs_torch_backend
def test_memory_for_backward_is_at_most_32_bytes_a_row(generator: torch.Generator) -> None:
    harness.check_saved_bytes(OP, harness.cast(pair(64, 1000)(generator), OP, F32), rows=64)


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
    ("dtype", "apart"),
    [("float32", 1e-5), ("float32", 1e-3), ("float32", 0.1), ("float64", 1e-3), ("float64", 0.1)],
)
def test_close_rows_against_long_double(
    dtype: str, apart: float, generator: torch.Generator
) -> None:
    """Where the float64 reference is no judge: against 80-bit arithmetic."""
    tensors = harness.cast(pair(5, 1000, apart=apart)(generator), OP, harness.DTYPES[dtype])
    x, t = (x.numpy().astype(np.longdouble) for x in tensors.values())
    x, t = (x / np.sqrt((x * x).sum(1, keepdims=True)) for x in (x, t))
    expected = ((x - t) ** 2).sum(1)
    found = selfkd.simreg(*tensors.values(), reduction="none").numpy()
    assert np.abs(found / expected - 1).max() < (1e-12 if dtype == "float64" else 1e-7)


SENTENCES: dict[str, tuple[type[Exception], dict[str, Any]]] = {
    "simreg: student has 1 dimension, expected at least 2": (
        ValueError,
        {"student": torch.ones(6), "target": torch.ones(6)},
    ),
    "simreg: target has size 5 in dimension C, expected 6": (
        ValueError,
        {"target": torch.ones(4, 5)},
    ),
    "simreg: target has size 3 in dimension N, expected 4": (
        ValueError,
        {"target": torch.ones(3, 6)},
    ),
    "simreg: target has 3 dimensions, expected 2": (ValueError, {"target": torch.ones(4, 6, 1)}),
    "simreg: target has dtype int64, expected float16, bfloat16, float32 or float64": (
        TypeError,
        {"target": torch.ones(4, 6, dtype=torch.int64)},
    ),
    "simreg: target requires grad, expected one without, as it would get no gradient here": (
        ValueError,
        {"target": torch.ones(4, 6, requires_grad=True)},
    ),
    "simreg: student has size 0 in dimension C, expected at least 1": (
        ValueError,
        {"student": torch.ones(4, 0), "target": torch.ones(4, 0)},
    ),
    "simreg: weight has size 3 in dimension N, expected 4": (ValueError, {"weight": torch.ones(3)}),
    "simreg: weight has dtype float64, expected float32 or bool": (
        TypeError,
        {"weight": torch.ones(4, dtype=torch.float64)},
    ),
    'simreg: reduction is "avg", expected "none", "mean" or "sum"': (
        ValueError,
        {"reduction": "avg"},
    ),
    "simreg: divisor is -1, expected a finite number > 0": (ValueError, {"divisor": -1.0}),
    "simreg: dim is 2, expected -2 to 1 for student": (ValueError, {"dim": 2}),
}


@needs_torch_backend
@pytest.mark.parametrize("sentence", SENTENCES)
def test_sentences(sentence: str) -> None:
    error, wrong = SENTENCES[sentence]
    arguments = {"student": torch.ones(4, 6), "target": torch.ones(4, 6), **wrong}
    for requires_grad in (False, True):
        arguments["student"] = arguments["student"].detach().requires_grad_(requires_grad)
        with pytest.raises(error, match=f"^{re.escape(sentence)}"):
            selfkd.simreg(**arguments)


@needs_torch_backend
def test_path_and_kernel_ran(generator: torch.Generator) -> None:
    before = harness.backward_calls(OP)
    harness.through_torch(OP, harness.cast(pair(3, 5)(generator), OP, F32), {})
    assert harness.backward_calls(OP) == before + 1
    assert library.text("selfkd_last_path").endswith("rows")


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
