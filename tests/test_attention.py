"""attention: the cases every back end runs, and what the operator promises beside them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import harness
import numpy as np
import pytest
import selfkd
import torch
import torch.nn.functional as F
from harness import Case, needs_torch_backend

OP = "attention"
NAN, INF = torch.nan, torch.inf
F32 = torch.float32
DTYPES = list(harness.DTYPES)


def pair(
    *shape: int,
    D: int | None = None,
    apart: float | None = None,
    x_scale: float = 1.0,
    t_scale: float = 1.0,
) -> Any:
    """Draws both: the teacher independent, with D channels, or the student and `apart` of noise."""

    def make(g: torch.Generator) -> dict[str, torch.Tensor]:
        x = torch.randn(shape, generator=g, dtype=torch.float64)
        other = (shape[0], D or shape[1], *shape[2:])
        t = torch.randn(other, generator=g, dtype=torch.float64)
        if apart is not None:
            t = x + apart * t
        return {"student": x_scale * x, "teacher": t_scale * t}

    return make


def with_zeros(*shape: int) -> Any:
    """Sample 1 of the student is zero, 2 of the teacher, 3 of both; the maps of 4 and 5 are below eps."""

    def make(g: torch.Generator) -> dict[str, torch.Tensor]:
        tensors = pair(*shape)(g)
        x, t = tensors.values()
        x[1], t[2], x[3], t[3] = 0, 0, 0, 0
        x[4] *= 2.0**-24  # exact in float16
        t[5] *= 2.0**-24
        return tensors

    return make


CASES = [
    # positions: a lane, a vector, a tile and a task, one less and one more
    *[Case(f"positions_{n}", pair(3, 5, n, D=6)) for n in (2, 15, 16, 17, 31, 33, 63, 64, 65)],
    *[Case(f"positions_{n}", pair(2, 3, n, D=9)) for n in (127, 128, 129, 255, 256, 257, 1000)],
    *[Case(f"task_{n}", pair(65, 2, n), big=True) for n in (1023, 1024, 1025)],
    # channels: those taken at a time, and a row's chunk
    *[Case(f"channels_{n}", pair(3, n, 4, 5, D=7)) for n in (1, 2, 3, 4, 8, 16, 17, 33, 100)],
    *[Case(f"channels_of_teacher_{n}", pair(3, 7, 4, 5, D=n)) for n in (1, 4, 9, 130)],
    *[Case(f"channels_{n}", pair(2, n, 2, 3, D=n + 1)) for n in (1023, 1024, 1025, 2049)],
    Case("one_sample", pair(1, 8, 24, 24, D=16)),
    Case("many_samples", pair(4100, 2, 8), big=True),
    Case("samples_of_groups", pair(100, 3, 8)),
    Case("lines", pair(3, 8, 40, D=3)),
    Case("volumes", pair(2, 6, 3, 4, 5, D=3)),
    Case("cifar_level_1", pair(16, 64, 32, 32, D=128), big=True),
    pytest.param(
        Case("batch_of_cifar_level_1", pair(128, 64, 32, 32, D=128), big=True),
        marks=pytest.mark.full,
    ),
    Case("cifar_level_4", pair(16, 512, 4, 4, D=1024), big=True),
    Case("imagenet_level_4", pair(4, 512, 7, 7, D=1024), big=True),
    Case("large_maps", pair(2, 3, 150, 170, D=4), big=True),
    Case("eps", pair(8, 6, 5, 5), {"eps": 5.8}),  # some maps are longer, some shorter
    *[
        Case(f"{apart:.0e}_apart", pair(5, 9, 6, 7, apart=apart, t_scale=3.0), exact=1e-9)
        for apart in (1e-1, 1e-3)
    ],
    Case("closer_than_roundings", pair(5, 9, 6, 7, apart=2e-6), close=True, exact=1e-8),
]
SCALES = [
    (1e15, 1e-3),
    (1e-3, 1e15),
    (1e18, 1e18),
    (1e-4, 1e-5),
    (1e-9, 1),
    (1, 1e-9),
    (1e-9, 1e-9),
]


def unequal(*shape: int) -> Any:
    """A teacher with more channels than the student."""
    return pair(*shape, D=shape[1] + 1)


globals().update(
    harness.standard_tests(
        OP,
        unequal,
        maps=CASES,
        path="maps",
        options=[{}, {"eps": 3.0}],
        per_sample=True,  # in float64 the reference's own roundings decide where maps nearly agree
        shapes={
            "strides": [(3, 100), (2, 21, 6, 8), (2, 8, 20, 20)],
            "mixed": [(3, 20, 9, 12), (2, 40, 3, 3)],
            "equal": [(3, 100), (2, 9, 7, 7), (2, 6, 40, 30)],
            "slopes": [(2, 3, 5), (2, 3, 2, 3)],
            "double": [(3, 4, 2, 5)],
            "threads": [(70, 8, 32, 32), (3, 32, 50, 60), (1, 64, 64, 64)],
        },
    )
)


@needs_torch_backend
@pytest.mark.parametrize("dynamic", [False, True])
def test_compile(dynamic: bool, generator: torch.Generator) -> None:
    """Maps of another size in each batch."""
    batches = [harness.cast(pair(n, 6, n, 4, D=3)(generator), OP, F32) for n in (4, 7)]
    harness.check_compile(OP, batches, {"eps": 1e-6}, dynamic)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("gap", ["between planes", "between samples"])
@pytest.mark.parametrize("backend", harness.backends(), ids=str)
def test_gaps(backend: harness.Backend, gap: str, dtype: str, generator: torch.Generator) -> None:
    """Every first element lies on a vector boundary, those after a gap of one do not."""
    harness.prepare(backend)
    tensors = harness.cast(
        pair(3, 6, 64, D=5)(generator), OP, harness.DTYPES[dtype], backend.device
    )
    for name, x in tensors.items():
        plane = 65 if gap == "between planes" else 64
        sample = x.shape[1] * plane + (gap == "between samples")
        block = torch.full((3 * sample,), NAN, dtype=x.dtype, device=x.device)
        tensors[name] = block.as_strided(x.shape, (sample, plane, 1)).copy_(x)
    harness.check_tensors(OP, Case("gaps", pair(), per_sample=dtype == "float64"), backend, tensors)


@pytest.mark.parametrize("scales", SCALES, ids=str)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float64"])
@pytest.mark.parametrize("backend", harness.backends(), ids=str)
def test_no_square_leaves_the_range(
    backend: harness.Backend, scales: tuple[float, float], dtype: str, generator: torch.Generator
) -> None:
    """Nor a fourth power; of a teacher's map far below eps the gradient is what is left of Q - Q."""
    make = pair(3, 9, 5, 7, x_scale=scales[0], t_scale=scales[1])
    case = Case("scales", make, exact=1e-9 if scales[1] < 1e-6 else 1e-12)
    case = replace(case, per_sample=dtype == "float64")
    harness.check_case(OP, case, backend, dtype, "contiguous", generator, path="maps")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(8, 5, 40), (8, 17, 3, 3), (8, 6)], ids=str)
@pytest.mark.parametrize("backend", harness.backends(), ids=str)
def test_zero_maps_are_normalised_as_pytorch_does(
    backend: harness.Backend, shape: tuple[int, ...], dtype: str, generator: torch.Generator
) -> None:
    harness.prepare(backend)
    kind = harness.DTYPES[dtype]
    tensors = harness.cast(with_zeros(*shape)(generator), OP, kind, backend.device)
    expected, expected_grads = harness.reference(OP, tensors, {})
    found, grads = backend.call(OP, tensors, {})
    harness.assert_values(found, expected, "loss")
    grad, exact = grads["student"], expected_grads["student"]
    assert (grad[[1, 3]] == 0).all()
    assert exact[5].abs().max() > 0 or shape[2:] == ()
    exact[2] = 0  # and not the rounding of nothing
    within = exact.abs() <= torch.finfo(kind).max  # 1 / eps may lead out of float16
    assert torch.equal(grad.isfinite().cpu(), within)
    case = Case("zeros", pair(), per_sample=True, exact=1e-11)
    if shape[2:] != ():  # one position: nothing but the roundings of the reference
        harness.assert_gradient(grad.masked_fill(~within, 0), exact * within, "gradient", case)


@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16"])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("shape", [(8, 5, 6, 7), (8, 3, 2)], ids=str)
@pytest.mark.parametrize("backend", harness.backends(), ids=str)
def test_non_finite_samples_stay_alone(
    backend: harness.Backend,
    shape: tuple[int, ...],
    layout: str,
    dtype: str,
    generator: torch.Generator,
) -> None:
    harness.prepare(backend)
    tensors = harness.cast(pair(*shape)(generator), OP, harness.DTYPES[dtype], backend.device)
    _, expected = harness.reference(OP, tensors, {})
    x, t = tensors["student"], tensors["teacher"]
    x[1, 2, 1], t[2, 0, 0], x[3, 1, 0], t[4, 0, 1], t[5] = NAN, NAN, INF, -INF, NAN
    tensors = {name: harness.LAYOUTS[layout](x) for name, x in tensors.items()}
    loss, grads = backend.call(OP, tensors, {})
    assert loss.isnan()
    kept, case = [0, 6, 7], Case("alone", pair(), per_sample=True)
    harness.assert_gradient(grads["student"][kept], expected["student"][kept], "gradient", case)
    assert not grads["student"][1:6].isfinite().any()


# ---- PyTorch: gradients of gradients, compiler, views, sentences ----


@needs_torch_backend
def test_the_authors_loss(generator: torch.Generator) -> None:
    """at and at_loss of szagoruyko/attention-transfer, which FRSKD's code takes over."""

    def at(x: torch.Tensor) -> torch.Tensor:
        return F.normalize(x.pow(2).mean(1).view(x.size(0), -1))

    x, t = pair(4, 8, 6, 5, D=16)(generator).values()
    x.requires_grad_()
    ours, theirs = selfkd.attention(x, t), (at(x) - at(t)).pow(2).mean()
    torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(*(torch.autograd.grad(loss, x)[0] for loss in (ours, theirs)))


@needs_torch_backend
def test_dimensions_that_do_not_merge(generator: torch.Generator) -> None:
    x, t = pair(2, 5, 6, 8)(generator).values()
    cut = [x[:, :, 1:5, 2:7] for x in (x, t)]
    torch.testing.assert_close(
        selfkd.attention(*cut), selfkd.reference.attention(*(x.contiguous() for x in cut))
    )


@needs_torch_backend
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize(
    ("dtype", "apart"),
    [("float32", 1e-6), ("float32", 1e-3), ("float32", 0.1), ("float64", 1e-3), ("float64", 0.1)],
)
def test_close_maps_against_long_double(
    dtype: str, apart: float, layout: str, generator: torch.Generator
) -> None:
    """Where the float64 reference is no judge: against 80-bit arithmetic."""
    tensors = harness.cast(pair(3, 64, 9, 8, apart=apart)(generator), OP, harness.DTYPES[dtype])
    tensors = {name: harness.LAYOUTS[layout](x) for name, x in tensors.items()}
    maps = [(x.numpy().astype(np.longdouble) ** 2).mean(1).reshape(3, -1) for x in tensors.values()]
    q, p = (a / np.sqrt((a * a).sum(1, keepdims=True)) for a in maps)
    expected = ((q - p) ** 2).mean()
    found = selfkd.attention(*tensors.values()).item()
    assert abs(found / expected - 1) < (1e-12 if dtype == "float64" else 1e-7)
