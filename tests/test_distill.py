"""Distillation: cross-entropy and up to two teachers."""

from __future__ import annotations

from functools import partial
from typing import Any

import harness
import pytest
import selfkd
import torch
import torch.nn.functional as F
from harness import Case, divided, needs_torch_backend

OP = "distill"
NAN = torch.nan
BOTH = {"temperature": 4.0, "second_temperature": 4.0, "second_teacher_temperature": 4.0}


def draw(
    *shape: int,
    target: bool = True,
    teachers: int = 1,
    scale: float = 3.0,
    apart: float | None = None,
    shift: float = 0.0,
    probs: bool = False,
) -> Any:
    """A student, a tenth of its targets ignored, and teachers: independent, or `apart` from it."""

    def make(g: torch.Generator) -> dict[str, torch.Tensor]:
        def normal() -> torch.Tensor:
            return torch.randn(shape, generator=g, dtype=torch.float64)

        sizes = (*shape[:1], *shape[2:])
        tensors = {"logits": scale * normal()}
        if target:
            classes = torch.randint(0, shape[1], sizes, generator=g)
            classes[torch.rand(sizes, generator=g) < 0.1] = -100
            tensors["target"] = classes
        for name in ("teacher", "second_teacher")[:teachers]:
            x = scale * normal() if apart is None else tensors["logits"] + apart * normal()
            tensors[name] = (x + shift).softmax(1) if probs else x + shift
        return tensors

    return make


weighted = partial(harness.weighted, spoilt=True)


def bump(g: torch.Generator) -> dict[str, torch.Tensor]:
    """One class of the student stands out of many: log(P/Q) far above the KL. The teacher excludes one."""
    logits = 1e-3 * torch.randn(2, 3000, generator=g, dtype=torch.float64)
    logits[:, 7] += 15
    teacher = torch.zeros_like(logits)
    teacher[:, 3] = -torch.inf
    return {"logits": logits, "teacher": teacher}


def excluded(g: torch.Generator) -> dict[str, torch.Tensor]:
    """The student excludes a class to which the teacher gives a third: a KL of thousands."""
    logits = 3 * torch.randn(9, 64, generator=g, dtype=torch.float64)
    teacher = logits.clone()
    teacher[:, 5] = logits.logsumexp(1) - 0.7
    logits[:, 5] = -20000
    return {"logits": logits, "teacher": teacher}


def logs(make: Any) -> Any:
    return lambda g: {**(x := make(g)), "teacher": x["teacher"].log_softmax(1)}


def halved(make: Any) -> Any:
    return lambda g: {**(x := make(g)), "teacher": x["teacher"] / 2}


def sure(g: torch.Generator) -> dict[str, torch.Tensor]:
    """Rows whose target has almost all of the probability, some of which tie."""
    logits = torch.randn(9, 30, generator=g, dtype=torch.float64)
    target = torch.randint(0, 30, (9,), generator=g)
    logits[torch.arange(9), target] += torch.linspace(5, 14, 9, dtype=torch.float64)
    logits[8] = 0
    return {"logits": logits, "target": target}


def sure_and_taught(g: torch.Generator) -> dict[str, torch.Tensor]:
    tensors = sure(g)
    return {**tensors, "teacher": 3 * torch.randn(9, 30, generator=g, dtype=torch.float64)}


ONE = {"temperature": 1.0, "teacher_temperature": 1.0}
PS_KD = {**ONE, "teacher_kind": "probs"}
CASES = [
    Case("one_class", draw(3, 1)),
    *[Case(f"{n}_classes", draw(5, n)) for n in (2, 15, 16, 17, 31, 33, 65)],
    Case("cross_entropy", draw(33, 100, teachers=0)),
    Case("smoothed", draw(33, 100, teachers=0), {"label_smoothing": 0.1}),
    Case("only_smoothing", draw(9, 50, teachers=0), {"label_smoothing": 1.0}),
    Case("sure", sure, exact=1e-9),
    Case("sure_and_taught", sure_and_taught, {"teacher_weight": 1e-3}, exact=1e-9),
    Case("cubed", draw(17, 100), {"temperature": 3.0, "teacher_temperature": 3.0}),
    Case("knowledge_distillation", draw(33, 100), {"label_smoothing": 0.1, "teacher_weight": 0.9}),
    Case("teacher_alone", draw(33, 100, target=False)),
    Case("two_teachers", draw(17, 100, teachers=2), {**BOTH, "second_teacher_weight": 0.3}),
    Case("two_temperatures", draw(17, 100, teachers=2), {**BOTH, "second_temperature": 1.0}),
    Case("second_alone", draw(9, 50, teachers=2), {"teacher_weight": 0.0, "temperature": 1.0}),
    Case("temperature_one", draw(33, 100), ONE),
    Case("own_temperature", draw(17, 100), {"temperature": 2.0, "teacher_temperature": 3.0}),
    Case("probabilities", draw(17, 100, probs=True, scale=1.0), PS_KD, exact=1e-11),
    Case("log_probs", logs(draw(9, 50)), {"teacher_kind": "log_probs", "temperature": 1.0}),
    Case("imagenet_classes", draw(16, 1000)),
    *[Case(f"chunk_{n}", draw(3, n, teachers=2), BOTH) for n in (1023, 1024, 1025, 2049)],
    Case("gpt_classes", draw(3, 32000), ONE),
    Case("many_classes", draw(2, 250000), big=True),
    Case("teacher_1e4_apart", draw(9, 100, target=False, apart=1.0, shift=1e4), exact=1e-11),
    Case(
        "teacher_1e-3_apart", draw(9, 1000, target=False, apart=1e-3), ONE, close=True, exact=1e-6
    ),
    Case(
        "own_temperature_close",
        halved(draw(9, 100, target=False, apart=1e-2)),
        {"temperature": 2.0, "teacher_temperature": 1.0},
        close=True,
        exact=1e-9,
    ),
    Case(
        "one_class_stands_out", bump, {"temperature": 3.0, "teacher_temperature": 2.0}, exact=1e-10
    ),
    Case("excluded", excluded, ONE, exact=1e-11),
    Case("weights", weighted(draw(33, 100, teachers=2)), BOTH),
    Case("mask", weighted(draw(33, 100), boolean=True), {"mask_teachers": True}),
    Case("masked_teachers", draw(33, 10), {"mask_teachers": True, "ce_weight": 0.0}),
    Case("divisor", divided(weighted(draw(33, 10)))),
    Case("sum", weighted(draw(33, 10)), {"reduction": "sum", "ce_weight": 0.5}),
    Case("no_rows", draw(0, 10), {"reduction": "sum"}),
]
IMAGES = [
    Case("voc", draw(2, 21, 16, 24), ONE),
    Case("voc_masked", weighted(draw(2, 21, 9, 13), boolean=True), {"mask_teachers": True}),
    Case("two_teachers", draw(2, 9, 5, 7, teachers=2), {**BOTH, "second_temperature": 2.0}),
    Case("probabilities", draw(1, 9, 5, 7, probs=True, scale=1.0), PS_KD, exact=1e-11),
    Case("smoothed", draw(1, 40, 3, 50), {"label_smoothing": 0.2}),
    Case(
        "teacher_1e-3_apart",
        draw(1, 40, 3, 50, target=False, apart=1e-3),
        ONE,
        close=True,
        exact=1e-6,
    ),
    Case("16_positions", draw(1, 5, 16)),
    *[Case(f"{n}_positions", draw(1, 5, n), contiguous=True) for n in (511, 512, 513)],
    Case("few_positions", weighted(draw(3, 130, 7))),
]


def path(case: Case, layout: str) -> str:
    """Positions run along a line of memory unless they are few."""
    if case.name == "strides":
        return ""
    positions = case in IMAGES and layout == "contiguous" and case.name != "few_positions"
    return "positions" if positions else "classes"


APART = {"temperature": 2.0, "teacher_temperature": 2.0, "label_smoothing": 0.1}
APART |= {"second_temperature": 1.0, "second_teacher_temperature": 1.0}
globals().update(
    harness.standard_tests(
        OP,
        partial(draw, teachers=2),
        CASES,
        maps=IMAGES,
        path=path,
        options=[{**BOTH, "label_smoothing": 0.2}, {}],
        slopes=[APART],
        zero=[],
        excludes=True,
        shapes={
            "mixed": [(9, 100), (3, 1101), (2, 40, 3, 3)],
            "threads": [(300, 500), (2, 21, 40, 50)],
        },
    )
)


def example(g: torch.Generator, *shape: int) -> dict[str, torch.Tensor]:
    """Everything a call can be given."""
    return harness.cast(harness.weighted(draw(*shape, teachers=2))(g), OP, torch.float32)


# ---- values ----


@needs_torch_backend
@pytest.mark.parametrize("shape", [(64, 10), (2, 21, 9, 7)], ids=str)
@pytest.mark.parametrize("ignore_index", [-100, 3])
@pytest.mark.parametrize("smoothing", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
def test_without_teachers_it_is_cross_entropy(
    reduction: str, smoothing: float, ignore_index: int, shape: Any, generator: torch.Generator
) -> None:
    tensors = draw(*shape, teachers=0)(generator)
    logits, target = tensors["logits"].requires_grad_(), tensors["target"]
    target[target == -100] = ignore_index
    options = {"reduction": reduction, "label_smoothing": smoothing, "ignore_index": ignore_index}
    found, expected = (
        selfkd.distill(logits, target, **options),
        F.cross_entropy(logits, target, **options),
    )
    torch.testing.assert_close(found, expected)
    grads = [torch.autograd.grad(x.sum(), logits)[0] for x in (found, expected)]
    torch.testing.assert_close(*grads)


@needs_torch_backend
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_all_targets_ignored(reduction: str, generator: torch.Generator) -> None:
    logits, target = torch.randn(4, 5, generator=generator), torch.full((4,), -100)
    expected = F.cross_entropy(logits, target, reduction=reduction)
    torch.testing.assert_close(
        selfkd.distill(logits, target, reduction=reduction), expected, equal_nan=True
    )
    assert selfkd.distill(logits, target, logits, mask_teachers=True).isnan()
    loss, ce, kl = selfkd.distill(logits, target, logits + 1, ce_weight=0.0, return_parts=True)
    assert ce == 0
    assert kl < 1e-10
    assert loss == kl


@needs_torch_backend
def test_without_parts_the_gradient_is_zero_whatever_comes_in(generator: torch.Generator) -> None:
    logits = torch.randn(5, 40, generator=generator, requires_grad=True)
    loss = selfkd.distill(logits, torch.arange(5), ce_weight=0.0)
    freed = [torch.full_like(logits, NAN) for _ in range(8)]  # what the gradient may be made of
    del freed
    (loss * torch.inf).backward()
    assert logits.grad is not None
    assert (logits.grad == 0).all()


@needs_torch_backend
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_parts_sum_to_the_loss_and_have_no_gradient(
    reduction: str, generator: torch.Generator
) -> None:
    tensors = example(generator, 9, 30)
    logits, options = tensors["logits"].requires_grad_(), {"reduction": reduction}
    teachers = (tensors["teacher"], tensors["second_teacher"])
    parts = selfkd.distill(logits, tensors["target"], teachers, return_parts=True, **options)
    exact = selfkd.reference.distill(
        logits, tensors["target"], teachers, return_parts=True, **options
    )
    torch.testing.assert_close(tuple(parts), tuple(exact))
    torch.testing.assert_close(parts.loss, parts.ce + parts.kl)
    assert parts.loss.requires_grad
    assert not parts.ce.requires_grad
    assert not parts.kl.requires_grad
    plain = selfkd.distill(logits, tensors["target"], teachers, **options)
    grads = [torch.autograd.grad(x.sum(), logits)[0] for x in (parts.loss, plain)]
    assert torch.equal(parts.loss, plain)
    assert torch.equal(*grads)


@needs_torch_backend
@pytest.mark.parametrize(
    "teacher", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str
)
@pytest.mark.parametrize("student", [torch.float16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("shape", [(5, 100), (2, 9, 5, 7)], ids=str)
def test_teacher_of_another_dtype_and_expanded(
    shape: tuple[int, ...], student: torch.dtype, teacher: torch.dtype, generator: torch.Generator
) -> None:
    logits = torch.randn(shape, generator=generator).to(student)
    one = torch.randn(1, *shape[1:], generator=generator).to(teacher)
    expected = selfkd.reference.distill(logits.double(), None, one.double().expand(shape))
    harness.assert_values(selfkd.distill(logits, None, one.expand(shape)), expected, "expanded")
    virtual = torch.randn(shape[1], generator=generator).to(teacher)
    constant = virtual.view(1, -1, *[1] * (len(shape) - 2)).expand(shape)
    expected = selfkd.reference.distill(logits.double(), None, constant.double())
    harness.assert_values(selfkd.distill(logits, None, constant), expected, "constant")


@needs_torch_backend
@pytest.mark.parametrize("shape", [(6, 40), (1, 40, 2, 20)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_infinities_and_nan_stay_alone(
    dtype: torch.dtype, shape: tuple[int, ...], generator: torch.Generator
) -> None:
    """Classes excluded on both sides or by the teacher alone; by the student alone: inf; NaN: NaN."""
    z = torch.randn(shape, generator=generator, dtype=dtype)
    t = torch.randn(shape, generator=generator, dtype=dtype)
    rows = (z.movedim(1, -1).reshape(-1, 40), t.movedim(1, -1).reshape(-1, 40))
    rows[0][0, :3] = rows[1][0, :3] = -torch.inf
    rows[1][1, 5] = -torch.inf
    rows[0][2, 7] = -torch.inf
    rows[0][3, 9] = torch.nan
    rows[1][4, 2] = torch.nan
    z, t = (x.view(*shape[:1], *shape[2:], 40).movedim(-1, 1).contiguous() for x in rows)
    y = torch.full((shape[0], *shape[2:]), 20)
    z.requires_grad_()
    found, exact = (
        f(z, y, t, temperature=1.0, reduction="none")
        for f in (selfkd.distill, selfkd.reference.distill)
    )
    torch.testing.assert_close(found, exact, equal_nan=True)
    assert found.flatten()[:5].isfinite().tolist() == [True, True, False, False, False]
    assert found.flatten()[2] == torch.inf
    grads = [torch.autograd.grad(x.sum(), z)[0] for x in (found, exact)]
    torch.testing.assert_close(*grads, equal_nan=True)


@needs_torch_backend
def test_equal_rows_give_exactly_zero(generator: torch.Generator) -> None:
    z = (30 * torch.randn(9, 50, generator=generator)).requires_grad_()
    for temperature in (1.0, 4.0):
        loss = selfkd.distill(z, None, z.detach().clone(), temperature=temperature)
        assert loss == 0
        assert torch.autograd.grad(loss, z)[0].abs().max() < 1e-8


# ---- published losses: those of rows are in test_losses.py ----


@needs_torch_backend
def test_frskd_segmentation(generator: torch.Generator) -> None:
    """Cross-entropy without label 255, KL over all pixels, at T = 1."""
    z, t = (torch.randn(2, 21, 6, 8, generator=generator, dtype=torch.float64) for _ in range(2))
    y = torch.randint(0, 21, (2, 6, 8), generator=generator)
    y[:, :2] = 255
    z.requires_grad_()
    per_pixel = F.kl_div(F.log_softmax(z, 1), F.softmax(t, 1), reduction="sum") / y.numel()
    expected = F.cross_entropy(z, y, ignore_index=255) + 0.5 * per_pixel
    found = selfkd.distill(z, y, t, teacher_weights=0.5, temperature=1.0, ignore_index=255)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(*(torch.autograd.grad(x, z)[0] for x in (found, expected)))


# ---- sentences ----

Z, Y = torch.ones(4, 6), torch.zeros(4, dtype=torch.int64)
P = torch.full((4, 6), 1 / 6)
SENTENCES: dict[str, tuple[type[Exception], dict[str, Any]]] = {
    r"distill: neither target nor teachers is given, expected at least one of them": (
        ValueError,
        {},
    ),
    r"distill: teachers has 3 tensors, expected at most 2; add a third by a second call": (
        ValueError,
        {"teachers": (Z, Z, Z)},
    ),
    r"distill: teachers\[0\] has size 5 in dimension C, expected 6": (
        ValueError,
        {"teachers": torch.ones(4, 5)},
    ),
    r"distill: target is 6 at position \[2\], expected 0 to 5, or ignore_index, -100": (
        ValueError,
        {"target": torch.tensor([0, 1, 6, 7])},
    ),
    r"distill: target is -1 at position \[0\], expected 0 to 5, or ignore_index, 255": (
        ValueError,
        {"target": torch.tensor([-1, 1, 2, 255]), "ignore_index": 255},
    ),
    r"distill: target has dtype int32, expected int64": (TypeError, {"target": Y.int()}),
    r"distill: target has dtype float32, expected int64; of one-hot rows target.argmax": (
        ValueError,
        {"target": P},
    ),
    r"distill: teachers\[0\] has probabilities that sum to 6 at position \[0\], expected 1": (
        ValueError,
        {"teachers": Z, "teacher_kind": "probs"},
    ),
    r"distill: teachers\[1\] has probabilities that sum to 16.31 at position \[0\], expected 1": (
        ValueError,
        {"teachers": (P, Z), "teacher_kind": ("probs", "log_probs")},
    ),
    r'distill: teacher_kind is "softmax", expected "logits", "probs" or "log_probs"': (
        ValueError,
        {"teachers": Z, "teacher_kind": "softmax"},
    ),
    r"distill: temperature has 2 values, expected one, or one for each teacher \(1\)": (
        ValueError,
        {"teachers": Z, "temperature": (1.0, 2.0)},
    ),
    r"distill: label_smoothing is 1.5, expected a number from 0 to 1": (
        ValueError,
        {"target": Y, "label_smoothing": 1.5},
    ),
    r"distill: temperature is 0, expected a finite number > 0": (
        ValueError,
        {"teachers": Z, "temperature": 0.0},
    ),
    r"distill: teacher_weights is -1, expected a finite number >= 0": (
        ValueError,
        {"teachers": Z, "teacher_weights": -1.0},
    ),
    r"distill: mask_teachers is True, expected a target with it": (
        ValueError,
        {"teachers": Z, "mask_teachers": True},
    ),
}


@needs_torch_backend
@pytest.mark.parametrize("sentence", SENTENCES)
def test_sentences(sentence: str) -> None:
    error, arguments = SENTENCES[sentence]
    with pytest.raises(error, match="^" + sentence):
        selfkd.distill(Z, **arguments)


@needs_torch_backend
def test_position_of_a_bad_target_in_an_image() -> None:
    target = torch.zeros(2, 3, 20, dtype=torch.int64)
    target[1, 2, 17] = 9
    with pytest.raises(ValueError, match=r"target is 9 at position \[1, 2, 17\], expected 0 to 3"):
        selfkd.distill(torch.ones(2, 4, 3, 20), target)


@needs_torch_backend
@harness.needs_operators
def test_position_of_a_bad_target_from_the_operator() -> None:
    target = torch.zeros(2, 3, 20, dtype=torch.int64)
    target[1, 2, 17] = 9
    values = harness.schema_values(OP, {"logits": torch.ones(2, 4, 3, 20), "target": target})
    with pytest.raises(RuntimeError, match=r"target is 9 at position \[1, 2, 17\]"):
        torch.ops.selfkd.distill(*values)


@pytest.mark.parametrize("shape", [(9, 50), (2, 50, 33)], ids=str)
@pytest.mark.parametrize("backend", harness.backends(), ids=str)
def test_without_a_target_no_position_is_ignored_whatever_masks_teachers(
    backend: harness.Backend, shape: tuple[int, ...], generator: torch.Generator
) -> None:
    """The function refuses it; the operator, to which others have access, has nothing to mask by."""
    harness.prepare(backend)
    tensors = harness.cast(draw(*shape, target=False)(generator), OP, torch.float32, backend.device)
    found = []
    for masked in (0, 1):
        named: dict[str, Any] = {**tensors, "mask_teachers": masked}
        named |= harness.run_operator(backend, OP, named)
        named["grad"] = torch.ones_like(named["rows"])
        grad = harness.run_operator(backend, f"{OP}_backward", named)["grad_logits"]
        found.append((named["loss"].cpu(), grad.cpu()))
    assert (found[0][1] != 0).any()
    torch.testing.assert_close(found[1], found[0], rtol=0, atol=0)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("backend", harness.backends(), ids=str)
def test_smoothed_logits_at_the_ends_of_float32(
    backend: harness.Backend, dtype: str, generator: torch.Generator
) -> None:
    """What lies between two of them is no float32; a smoothed share of it is."""

    def draw(g: torch.Generator) -> dict[str, torch.Tensor]:
        logits = torch.where(torch.rand(9, 30, generator=g) < 0.5, 3e38, -3e38).double()
        target = torch.randint(0, 30, (9,), generator=g)
        logits[torch.arange(9), target] = 3e38
        return {"logits": logits, "target": target}

    case = Case("huge", draw, {"label_smoothing": 0.1, "reduction": "none"})
    harness.check_case(OP, case, backend, dtype, "contiguous", generator)


# ---- a part of the classes, as selfkd.distributed has it ----


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("own", [4.0, 2.0])
@pytest.mark.parametrize("backend", harness.backends(), ids=str)
def test_rows_of_nothing_but_inf_keep_their_lse(
    backend: harness.Backend, own: float, dtype: torch.dtype, generator: torch.Generator
) -> None:
    """h is -inf where the student has none, and ratios holds the teacher's lse; the gradients are nan."""
    harness.prepare(backend)
    logits, teacher = (
        3 * torch.randn(6, 50, generator=generator, dtype=torch.float64).to(dtype) for _ in range(2)
    )
    logits[0], teacher[1], logits[2], teacher[2] = (-torch.inf,) * 4
    logits[3, 7], teacher[4, 7] = NAN, NAN
    named: dict[str, Any] = {"logits": logits, "teacher": teacher, "teacher_temperature": own}
    named["target"] = torch.full((6,), 7)
    named = {
        k: x.to(backend.device) if isinstance(x, torch.Tensor) else x for k, x in named.items()
    }
    found = {k: x.cpu() for k, x in harness.run_operator(backend, OP, named).items()}
    lse, lse_t = (logits.double() / 4).logsumexp(1), (teacher.double() / own).logsumexp(1)
    h, level = found["levels"][0].double(), found["levels"][2].double()
    mine = torch.where(h == -torch.inf, h, h / 4 + level)
    expected = torch.where(lse == -torch.inf, lse_t, lse - lse_t)
    torch.testing.assert_close(mine, lse, rtol=1e-6, atol=0, equal_nan=True)
    torch.testing.assert_close(found["ratios"][0], expected, rtol=1e-6, atol=0, equal_nan=True)
    assert found["kl_rows"][:5].isnan().all()
    assert found["ce_rows"][[0, 2, 3]].isnan().all()
    assert found["rows"][5].isfinite()
    given = {k: x.to(backend.device) for k, x in found.items()}
    given["grad"] = torch.ones(6, dtype=dtype, device=backend.device)
    grad = harness.run_operator(backend, f"{OP}_backward", named | given)["grad_logits"]
    assert grad[:5].isnan().all()
    assert grad[5].isfinite().all()


@pytest.mark.parametrize("smooth", [0.0, 0.1])
@pytest.mark.parametrize("shape", [(9, 70), (2, 70, 33)], ids=str)
@pytest.mark.parametrize("backend", harness.backends(), ids=str)
def test_backward_of_a_part_is_a_part_of_backward(
    backend: harness.Backend, shape: tuple[int, ...], smooth: float, generator: torch.Generator
) -> None:
    """Given what was saved of the whole, the number of all classes, and targets that are elsewhere."""
    harness.prepare(backend)
    tensors = {k: x.to(backend.device) for k, x in draw(*shape)(generator).items()}
    tensors = harness.cast(tensors, OP, torch.float32, backend.device)
    named: dict[str, Any] = {**tensors, "label_smoothing": smooth}
    named |= harness.run_operator(backend, OP, named)
    named["grad"] = torch.rand(tensors["target"].shape, generator=generator).to(backend.device)
    whole = harness.run_operator(backend, f"{OP}_backward", named)["grad_logits"]
    for start, end in ((0, 1), (1, 31), (31, 70)):
        size = end - start
        local = tensors["target"] - start
        local = torch.where((local >= 0) & (local < size), local, size)
        named["target"] = local.masked_fill(tensors["target"] == -100, -100)
        part = {k: tensors[k][:, start:end] for k in ("logits", "teacher")}
        found = harness.run_operator(
            backend, f"{OP}_backward", {**named, **part, "classes": shape[1]}
        )
        torch.testing.assert_close(found["grad_logits"], whole[:, start:end], rtol=1e-6, atol=1e-9)


@harness.needs_operators
def test_options_are_looked_at_in_each_call() -> None:
    """What is worked out once for numbers and names serves no values that are only equal to them."""
    torch.manual_seed(0)
    z, t = torch.randn(3, 5), torch.randn(3, 5)
    temperature = torch.tensor(2.0)

    def both(**options: Any) -> list[torch.Tensor]:
        return [f(z, None, t, **options) for f in (selfkd.distill, selfkd.reference.distill)]

    for value in (2.0, 1.0):
        temperature.fill_(value)
        for options in ({"temperature": temperature}, {"temperature": value}):
            torch.testing.assert_close(*both(**options))
    torch.testing.assert_close(*both(teacher_weights=1.0, temperature=1))
    torch.testing.assert_close(*both(teacher_weights=(1.0,), temperature=1))
    for wrong in (True, [True], (True,)):
        with pytest.raises(TypeError, match=r"teacher_weights.* is True, expected a number"):
            selfkd.distill(z, None, t, teacher_weights=wrong, temperature=1)
