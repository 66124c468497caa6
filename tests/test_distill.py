"""Distillation: cross-entropy and up to two teachers."""

from __future__ import annotations

from typing import Any

import harness
import pytest
import selfkd
import torch
import torch.nn.functional as F
from harness import Case

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


def weighted(make: Any, boolean: bool = False) -> Any:
    """The same with weights, a third of them 0, and NaN logits where nothing may look."""

    def with_weight(g: torch.Generator) -> dict[str, torch.Tensor]:
        tensors = make(g)
        sizes = tensors["logits"][:, 0].shape
        weight = torch.rand(sizes, generator=g, dtype=torch.float64) + 0.1
        skipped = torch.rand(sizes, generator=g) < 0.34
        weight[skipped] = 0
        tensors["logits"].movedim(1, -1)[skipped] = NAN
        return {**tensors, "weight": weight != 0 if boolean else weight}

    return with_weight


def divided(make: Any) -> Any:
    return lambda g: {**make(g), "divisor": torch.tensor(12.5, dtype=torch.float64)}


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


ONE = {"temperature": 1.0, "teacher_temperature": 1.0}
PS_KD = {**ONE, "teacher_kind": "probs"}
CASES = [
    Case("one_class", draw(3, 1)),
    *[Case(f"{n}_classes", draw(5, n)) for n in (2, 15, 16, 17, 31, 33, 65)],
    Case("cross_entropy", draw(33, 100, teachers=0)),
    Case("smoothed", draw(33, 100, teachers=0), {"label_smoothing": 0.1}),
    Case("only_smoothing", draw(9, 50, teachers=0), {"label_smoothing": 1.0}),
    Case("sure", sure, exact=1e-9),
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
    Case("teacher_1e-3_apart", draw(9, 1000, target=False, apart=1e-3), ONE, close=True, exact=1e-6),
    Case(
        "own_temperature_close",
        halved(draw(9, 100, target=False, apart=1e-2)),
        {"temperature": 2.0, "teacher_temperature": 1.0},
        close=True,
        exact=1e-9,
    ),
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
    Case("teacher_1e-3_apart", draw(1, 40, 3, 50, target=False, apart=1e-3), ONE, close=True, exact=1e-6),
    *[Case(f"{n}_positions", draw(1, 5, n)) for n in (16, 511, 512, 513)],
    Case("few_positions", weighted(draw(3, 130, 7))),
]
DTYPES = list(harness.DTYPES)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("backend", harness.backends(), ids=str)
def test_rows(backend: harness.Backend, case: Case, dtype: str, generator: torch.Generator) -> None:
    harness.check_case(OP, case, backend, dtype, "contiguous", generator, path="classes")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("case", IMAGES, ids=str)
@pytest.mark.parametrize("backend", harness.backends(), ids=str)
def test_images(
    backend: harness.Backend, case: Case, layout: str, dtype: str, generator: torch.Generator
) -> None:
    positions = layout == "contiguous" and case.name != "few_positions"
    path = "positions" if positions else "classes"
    harness.check_case(OP, case, backend, dtype, layout, generator, path=path)
