"""js_divergence: the cases every back end runs, and what the operator promises beside them."""

from __future__ import annotations

import math
from functools import partial

import harness
import pytest
import selfkd
import torch
import torch.nn.functional as F
import wide
from backends import Backend, prepare
from harness import Case, divided, weighted
from loss import on_back_ends

OP = "js_divergence"
pair = partial(harness.pair, "student", "teacher")  # of logits, shape (N, C) or (N, C, ...)


def of(beta: float, a: float, b: float, **numbers: object) -> dict[str, object]:
    return {"beta": beta, "teacher_weight": a, "student_weight": b, **numbers}


KINDS = {
    "jensen_shannon": {},
    "beta_0.1": of(0.1, 0.1, 0.9),
    "beta_0.9": of(0.9, 0.9, 0.1),
    "forward_kl": of(0.0, 1.0, 0.0),
    "reverse_kl": of(1.0, 0.0, 1.0),
    "skewed_kl": of(0.1, 1.0, 0.0),
    "skewed_reverse_kl": of(0.1, 0.0, 1.0),
    "uneven": of(0.7, 2.0, 0.5),
    "tv": {"kind": "tv"},
}
CASES = [
    Case("one_class", pair(3, 1)),
    *[Case(f"{n}_classes", pair(5, n)) for n in (2, 15, 16, 17, 100)],
    *[Case(f"chunk_{n}", pair(3, n)) for n in (1000, 1024, 1025, 3000)],
    *[Case(name, pair(9, 50), numbers) for name, numbers in KINDS.items()],
    *[
        Case(f"{name}_1e-3_apart", pair(9, 100, apart=1e-3), numbers, close=True, exact=1e-7)
        for name, numbers in KINDS.items()
    ],
    *[
        Case(f"{name}_1e4_apart", pair(9, 100, shift=1e4), numbers, exact=1e-11)
        for name, numbers in KINDS.items()
    ],
    *[
        Case(f"{name}_far", pair(9, 100, scale=1e3), numbers, exact=1e-11)
        for name, numbers in KINDS.items()
    ],
    Case("cold", pair(9, 50, scale=1.0), {"temperature": 0.5, "teacher_temperature": 0.5}),
    Case("hot", pair(9, 50), {"temperature": 20.0, "teacher_temperature": 20.0}),
    *[
        Case(
            f"{name}_two_temperatures",
            pair(9, 50),
            {**numbers, "temperature": 2.0, "teacher_temperature": 1.5},
        )
        for name, numbers in KINDS.items()
    ],
    Case("weighted", weighted(pair(33, 100))),
    Case("masked", weighted(pair(33, 100), boolean=True)),
    Case("divisor", divided(weighted(pair(33, 10)))),
    Case("no_rows", pair(0, 10), {"reduction": "sum"}),
]
MAPS = [
    Case("voc", pair(2, 21, 16, 24, scale=2.0)),
    Case("voc_masked", weighted(pair(2, 21, 9, 13, scale=2.0), boolean=True)),
    Case("few_positions", pair(3, 130, 7)),
    Case("uneven", pair(2, 30, 40), of(0.7, 2.0, 0.5)),
    Case("two_temperatures", pair(2, 30, 40), {"temperature": 2.0, "teacher_temperature": 1.5}),
    Case("tv", pair(2, 30, 40), {"kind": "tv"}),
    Case("rows_1e-3_apart", pair(1, 40, 3, 50, apart=1e-3), close=True, exact=1e-6),
    Case("no_positions", pair(2, 9, 0, 4), {"reduction": "sum"}),
]
globals().update(harness.standard_tests(OP, pair, CASES, maps=MAPS, excludes=True))


@pytest.mark.parametrize("scale", [6.0, 12.0, 100.0])
def test_rows_that_hardly_overlap_keep_gradients_to_the_last_digit_of_a_slope(scale: float) -> None:
    """There a slope tends to a constant, its gradient to 0: the error is that of the slope, a half ULP."""
    g = torch.Generator().manual_seed(8)
    for _ in range(20):
        student, teacher = (scale * torch.randn(9, 50, generator=g) for _ in range(2))
        found, exact = (
            [x.to(dtype, copy=True).requires_grad_() for x in (student, teacher)]
            for dtype in (torch.float32, torch.float64)
        )
        selfkd.js_divergence(*found, reduction="sum").backward()
        selfkd.js_divergence(*exact, reduction="sum").backward()
        for x, y in zip(found, exact, strict=True):
            assert x.grad is not None
            assert y.grad is not None
            error = (x.grad - y.grad).abs().amax(1)
            assert (error <= 1e-5 * y.grad.abs().amax(1) + 4 * 2.0**-24).all()


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("temperature", [1.0, 0.7])  # 17 / 0.7 * 0.7 is not 17
@on_back_ends
def test_rows_a_constant_apart_give_exactly_zero(
    backend: Backend, name: str, dtype: torch.dtype, temperature: float, generator: torch.Generator
) -> None:
    """The constant is added without rounding."""
    prepare(backend)
    logits = torch.randn(7, 300, dtype=torch.float64, generator=generator).mul(8).round().div(8)
    tensors = {"student": logits.to(dtype), "teacher": (logits + 17).to(dtype)}
    tensors = {name: x.to(backend.device) for name, x in tensors.items()}
    numbers = {"temperature": temperature, "teacher_temperature": temperature}
    result, grads = backend.call(OP, tensors, {**KINDS[name], **numbers})
    assert result == 0
    assert all((grad == 0).all() for grad in grads.values())


@pytest.mark.parametrize("apart", [1e-6, 1e-5, 1e-4, 1e-3, 1e-2])
@pytest.mark.parametrize("name", [name for name in KINDS if name != "tv"])
def test_rows_that_nearly_agree_keep_all_digits(name: str, apart: float) -> None:
    options = KINDS[name]
    student = 3 * torch.randn(16, 1000, generator=torch.Generator().manual_seed(3))
    teacher = student + apart * torch.randn(16, 1000, generator=torch.Generator().manual_seed(4))
    rows = selfkd.js_divergence(student, teacher, reduction="none", **options)  # type: ignore[arg-type]
    inputs = {"student": wide.wide(student), "teacher": wide.wide(teacher)}
    exact = wide.js_divergence(inputs, **options).result
    error = abs(rows.double().numpy() - exact) / exact
    assert error.max() <= 3e-6


@pytest.mark.parametrize("name", KINDS)
def test_a_class_that_one_side_excludes(name: str) -> None:
    """The loss is infinite only where the divergence is, however little of p or q the class has."""
    options = KINDS[name]
    beta, a, b = (options.get(x, 0.5) for x in ("beta", "teacher_weight", "student_weight"))
    low = torch.tensor([[0.0, 1.0, -60.0, -80.0]])
    gone = low.masked_fill(torch.tensor([[False, False, True, False]]), -torch.inf)
    for student, teacher, infinite in (
        (low, gone, name != "tv" and beta == 1 and b != 0),
        (gone, low, name != "tv" and beta == 0 and a != 0),
        (gone, gone, False),
    ):
        x, y = (z.clone().requires_grad_() for z in (student, teacher))
        loss = selfkd.js_divergence(x, y, **options)  # type: ignore[arg-type]
        assert bool(loss.isinf()) == infinite
        assert not loss.isnan()
        if infinite:
            continue
        loss.backward()
        assert x.grad is not None
        assert y.grad is not None
        assert x.grad.isfinite().all()
        assert y.grad.isfinite().all()


def test_the_ends_of_beta_are_the_kl_divergences() -> None:
    student, teacher = torch.randn(5, 40), torch.randn(5, 40)
    log_p, log_q = student.log_softmax(1), teacher.log_softmax(1)
    kl_qp = F.kl_div(log_p, log_q, log_target=True, reduction="batchmean")
    kl_pq = F.kl_div(log_q, log_p, log_target=True, reduction="batchmean")
    torch.testing.assert_close(selfkd.js_divergence(student, teacher, beta=0), kl_qp)
    torch.testing.assert_close(selfkd.js_divergence(student, teacher, beta=1), kl_pq)


def test_one_weight_given_leaves_the_other_at_zero() -> None:
    student, teacher = torch.randn(5, 40), torch.randn(5, 40)
    for one, other in (("teacher_weight", "student_weight"), ("student_weight", "teacher_weight")):
        found = selfkd.js_divergence(student, teacher, beta=0.1, **{one: 1.0})
        both = selfkd.js_divergence(student, teacher, beta=0.1, **{one: 1.0, other: 0.0})
        assert torch.equal(found, both)


@pytest.mark.parametrize("side", ["student", "teacher"])
def test_a_side_that_does_not_learn_gets_no_gradient(side: str) -> None:
    """Nor does the operator make one: its output is empty."""
    inputs = {x: torch.randn(4, 30) for x in ("student", "teacher")}
    both = {name: x.clone().requires_grad_() for name, x in inputs.items()}
    one = {name: x.clone().requires_grad_(name == side) for name, x in inputs.items()}
    selfkd.js_divergence(**both).backward()
    with torch.profiler.profile(record_shapes=True) as profile:
        selfkd.js_divergence(**one).backward()
    assert torch.equal(one[side].grad, both[side].grad)  # type: ignore[arg-type]
    assert all(x.grad is None for name, x in one.items() if name != side)
    assert any("js_divergence_backward" in event.name for event in profile.events())


def test_a_gradient_that_is_finite_where_its_factor_is_not() -> None:
    """1e38 / T is no float, but what it is multiplied by is small."""
    g = torch.Generator().manual_seed(5)
    student = torch.randn(4, 60, generator=g)
    teacher = student + 1e-3 * torch.randn(4, 60, generator=g)
    found, exact = student.requires_grad_(), student.detach().double().requires_grad_()
    for x, y in ((found, teacher), (exact, teacher.double())):
        loss = selfkd.js_divergence(x, y, temperature=0.1, reduction="sum")
        loss.backward(torch.tensor(1e38, dtype=loss.dtype))
    assert found.grad is not None
    assert exact.grad is not None
    error = (found.grad - exact.grad).abs().amax(1) / exact.grad.abs().amax(1)
    assert error.max() <= 1e-4


INF = float("inf")
EXTREME = {  # a row of each side and the numbers; compared with 80 bits
    "padding at two temperatures": ([0.0, -95], [0, 0.5], of(0, 1, 0, teacher_temperature=2.0)),
    "a difference past the largest number": ([0, 3e38], [3e38, -3e38], {}),
    "an excluded class beside a huge one": ([0, -INF, 1e30], [0, 0.5, 1], {}),
    "beta near 1": ([1, 2, 3], [2, 0, 1], of(1 - 1e-9, 1 - 1e-9, 1e-9)),
    "beta near 1, skewed": ([1, 2, 3], [2, 0, 1], of(0.9999, 1, 0)),
    "beta near 1, an excluded class": ([1, 2, 3], [1, -INF, 3], of(1 - 1e-9, 0, 1)),
    "beta near 0": ([0.125, 1.4], [0.125, -1000], of(1e-9, 1e-9, 1 - 1e-9)),
    "a slope past the largest number": ([0, -88], [0, 0.5], of(0, 4, 0)),
    "a large weight": ([0, -25], [0, 0.5], of(0, 1e30, 0)),
    "an infinite term of a class that is no float": ([0, -INF, 1], [0, -300, 0.5], of(0, 1, 0)),
}


@pytest.mark.parametrize("name", EXTREME)
def test_extreme_rows(name: str) -> None:
    """The loss is that of 80 bits, and gradients are finite where it is."""
    u, v, options = EXTREME[name]
    student, teacher = (torch.tensor([[*map(float, x)]], requires_grad=True) for x in (u, v))
    exact = wide.js_divergence(
        {"student": wide.wide(student), "teacher": wide.wide(teacher)}, **options
    )
    loss = selfkd.js_divergence(student, teacher, **options)  # type: ignore[arg-type]
    found, expected = loss.item(), float(exact.result[0])
    assert found == pytest.approx(expected, rel=3e-6)
    if expected == INF:
        return
    loss.backward()
    for x, side in ((student, "student"), (teacher, "teacher")):
        assert x.grad is not None
        error = abs(x.grad.double().numpy() - exact.grads[side])
        assert error.max() <= 1e-4 * abs(exact.grads[side]).max() + 1e-7 * max(
            options.get("teacher_weight", 1), 1
        )


def test_the_second_derivative_where_a_class_is_excluded() -> None:
    student = torch.tensor([[1.0, 2.0, -INF]], dtype=torch.float64, requires_grad=True)
    teacher = torch.tensor([[1.0, 0.0, 2.0]], dtype=torch.float64)
    loss = selfkd.js_divergence(student, teacher)
    (grad,) = torch.autograd.grad(loss, student, create_graph=True)
    (second,) = torch.autograd.grad((grad**2).sum(), student)
    assert second.isfinite().all()


def test_a_logit_that_is_large_but_finite_makes_no_infinite_loss() -> None:
    student, teacher = torch.tensor([[0.0, -2e27]]), torch.tensor([[0.0, -50]])
    loss = selfkd.js_divergence(student, teacher, beta=0)
    assert loss.item() == pytest.approx(2e27 * math.exp(-50), rel=3e-6)
