"""attention: the cases every back end runs, and what the operator promises beside them."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import harness
import numpy as np
import pytest
import selfkd
import torch
import torch.nn.functional as F
from harness import Case
from selfkd import library

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


def check(
    backend: harness.Backend, case: Case, dtype: str, layout: str, generator: torch.Generator
) -> None:
    """In float64 the reference's own roundings decide where both maps nearly agree."""
    case = replace(case, per_sample=dtype == "float64")
    harness.check_case(OP, case, backend, dtype, layout, generator, path="maps")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("backend", harness.backends(), ids=str)
def test_maps(
    backend: harness.Backend, case: Case, layout: str, dtype: str, generator: torch.Generator
) -> None:
    check(backend, case, dtype, layout, generator)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", ["every_other", "unaligned"])
@pytest.mark.parametrize("shape", [(3, 100), (2, 21, 6, 8), (2, 8, 20, 20)], ids=str)
@pytest.mark.parametrize("backend", harness.backends(), ids=str)
def test_strides(
    backend: harness.Backend,
    shape: tuple[int, ...],
    layout: str,
    dtype: str,
    generator: torch.Generator,
) -> None:
    check(backend, Case("strides", pair(*shape)), dtype, layout, generator)


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
    check(backend, case, dtype, "contiguous", generator)


@pytest.mark.parametrize("teacher", DTYPES)
@pytest.mark.parametrize("student", DTYPES)
@pytest.mark.parametrize("last", ["student", "teacher"])
@pytest.mark.parametrize("shape", [(3, 20, 9, 12), (2, 40, 3, 3)], ids=str)
@pytest.mark.parametrize("backend", harness.backends(), ids=str)
def test_teacher_of_a_dtype_and_layout_of_its_own(
    backend: harness.Backend,
    shape: tuple[int, ...],
    last: str,
    student: str,
    teacher: str,
    generator: torch.Generator,
) -> None:
    """A float64 teacher is rounded to the student's arithmetic, hence the scale of the sample."""
    harness.prepare(backend)
    tensors = pair(*shape, D=17)(generator)
    tensors = harness.cast(tensors, OP, harness.DTYPES[student], backend.device)
    tensors["teacher"] = tensors["teacher"].to(harness.DTYPES[teacher])
    tensors[last] = harness.channels_last(tensors[last])
    harness.check_tensors(OP, Case("mixed", pair(), per_sample=True), backend, tensors)


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


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "unaligned"])
@pytest.mark.parametrize("shape", [(3, 100), (2, 9, 7, 7), (2, 6, 40, 30)], ids=str)
@pytest.mark.parametrize("backend", harness.backends(), ids=str)
def test_equal_maps_give_exactly_zero(
    backend: harness.Backend,
    shape: tuple[int, ...],
    layout: str,
    dtype: str,
    generator: torch.Generator,
) -> None:
    harness.prepare(backend)
    x = 30 * torch.randn(shape, generator=generator)
    x = harness.LAYOUTS[layout](x.to(backend.device, harness.DTYPES[dtype]))
    loss, grads = backend.call(OP, {"student": x, "teacher": x}, {})
    assert loss == 0
    assert (grads["student"] == 0).all()


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


@pytest.mark.parametrize("backend", harness.backends(), ids=str)
def test_empty(backend: harness.Backend) -> None:
    """A mean over nothing is nan, as in PyTorch."""
    harness.prepare(backend)
    for shape in [(0, 10), (0, 10, 4), (3, 10, 0)]:
        x = harness.every_other(torch.zeros(shape, device=backend.device))
        loss, grads = backend.call(OP, {"student": x, "teacher": x[:, :4]}, {})
        assert loss.isnan()
        assert selfkd.reference.attention(x, x).isnan()
        assert grads["student"].shape == shape
        assert grads["student"].stride() == torch.empty_like(x).stride()


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("backend", harness.backends(), ids=str)
def test_incoming_gradient(
    backend: harness.Backend, dtype: str, generator: torch.Generator
) -> None:
    harness.prepare(backend)
    for layout in ("contiguous", "channels_last"):
        tensors = harness.cast(
            pair(2, 9, 3, 5, D=4)(generator), OP, harness.DTYPES[dtype], backend.device
        )
        tensors["student"] = harness.LAYOUTS[layout](tensors["student"])
        grad = torch.tensor(-0.37, dtype=harness.DTYPES[dtype], device=backend.device)
        _, expected = harness.reference(OP, tensors, {}, grad)
        _, found = backend.call(OP, tensors, {}, grad)
        case = Case("grad", pair(), per_sample=True)
        harness.assert_gradient(found["student"], expected["student"], "gradient", case)


# ---- PyTorch: gradients of gradients, compiler, views, sentences ----

needs_torch_backend = pytest.mark.skipif(
    bool(harness.SIMT_LIBRARY), reason="the emulator has no PyTorch binding"
)


@needs_torch_backend
@pytest.mark.parametrize("eps", [1e-12, 3.0])
@pytest.mark.parametrize("shape", [(2, 3, 5), (2, 3, 2, 3)], ids=str)
def test_gradcheck(shape: tuple[int, ...], eps: float, generator: torch.Generator) -> None:
    student, teacher = pair(*shape, D=4)(generator).values()

    def loss(x: torch.Tensor) -> torch.Tensor:
        return selfkd.attention(x, teacher, eps=eps)

    assert torch.autograd.gradcheck(loss, student.requires_grad_())
    assert torch.autograd.gradgradcheck(loss, student)


@needs_torch_backend
@pytest.mark.parametrize("options", [{}, {"eps": 3.0}], ids=str)
def test_double_backward_agrees_with_kernel_and_reference(
    options: dict[str, Any], generator: torch.Generator
) -> None:
    harness.check_double_backward(OP, pair(3, 4, 2, 5, D=6)(generator), options)


@needs_torch_backend
@pytest.mark.parametrize("shape", [(4, 6), (2, 3, 4, 5)], ids=str)
@pytest.mark.parametrize("teacher", [torch.float32, torch.float16])
def test_opcheck(teacher: torch.dtype, shape: tuple[int, ...], generator: torch.Generator) -> None:
    tensors = harness.cast(pair(*shape, D=7)(generator), OP, F32)
    tensors["teacher"] = tensors["teacher"].to(teacher)
    harness.check_operator(OP, tensors, {}, torch.tensor(2.0))


@needs_torch_backend
@pytest.mark.parametrize("dynamic", [False, True])
def test_compile(dynamic: bool, generator: torch.Generator) -> None:
    batches = [harness.cast(pair(n, 6, n, 4, D=3)(generator), OP, F32) for n in (4, 7)]
    harness.check_compile(OP, batches, {"eps": 1e-6}, dynamic)


@needs_torch_backend
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("shape", [(70, 8, 32, 32), (3, 32, 50, 60), (1, 64, 64, 64)], ids=str)
def test_threads(shape: tuple[int, ...], layout: str, generator: torch.Generator) -> None:
    tensors = harness.cast(pair(*shape, D=9)(generator), OP, F32)
    harness.check_threads(OP, {name: harness.LAYOUTS[layout](x) for name, x in tensors.items()}, {})


@needs_torch_backend
@pytest.mark.parametrize("shape", [(4, 64, 16, 16), (64, 1000)], ids=str)
def test_memory_for_backward_is_at_most_32_bytes_a_position(
    shape: tuple[int, ...], generator: torch.Generator
) -> None:
    tensors = harness.cast(pair(*shape)(generator), OP, F32)
    harness.check_saved_bytes(OP, tensors, rows=tensors["student"][:, 0].numel())


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


SENTENCES: dict[str, tuple[type[Exception], dict[str, Any]]] = {
    "attention: student has 1 dimension, expected at least 2": (
        ValueError,
        {"student": torch.ones(6), "teacher": torch.ones(6)},
    ),
    "attention: teacher has size 3 in dimension N, expected 4": (
        ValueError,
        {"teacher": torch.ones(3, 6, 5, 7)},
    ),
    "attention: teacher has size 6 in dimension 3, expected 7": (
        ValueError,
        {"teacher": torch.ones(4, 6, 5, 6)},
    ),
    "attention: teacher has size 7 in dimension 2, expected 5": (
        ValueError,
        {"teacher": torch.ones(4, 6, 7, 5)},
    ),
    "attention: teacher has 3 dimensions, expected 4": (
        ValueError,
        {"teacher": torch.ones(4, 6, 35)},
    ),
    "attention: teacher has dtype int64, expected float16, bfloat16, float32 or float64": (
        TypeError,
        {"teacher": torch.ones(4, 6, 5, 7, dtype=torch.int64)},
    ),
    "attention: teacher requires grad, expected one without, as it would get no gradient here": (
        ValueError,
        {"teacher": torch.ones(4, 6, 5, 7, requires_grad=True)},
    ),
    "attention: student has size 0 in dimension C, expected at least 1": (
        ValueError,
        {"student": torch.ones(4, 0, 5, 7)},
    ),
    "attention: eps is 0, expected a finite number > 0": (ValueError, {"eps": 0.0}),
}


@needs_torch_backend
@pytest.mark.parametrize("sentence", SENTENCES)
def test_sentences(sentence: str) -> None:
    error, wrong = SENTENCES[sentence]
    arguments = {"student": torch.ones(4, 3, 5, 7), "teacher": torch.ones(4, 6, 5, 7), **wrong}
    for requires_grad in (False, True):
        arguments["student"] = arguments["student"].detach().requires_grad_(requires_grad)
        with pytest.raises(error, match=f"^{re.escape(sentence)}"):
            selfkd.attention(**arguments)


@needs_torch_backend
def test_path_and_kernel_ran(generator: torch.Generator) -> None:
    before = harness.backward_calls(OP)
    harness.through_torch(OP, harness.cast(pair(3, 5, 4)(generator), OP, F32), {})
    assert harness.backward_calls(OP) == before + 1
    assert library.text("selfkd_last_path").endswith("maps")
