"""selfkd.integrations: each toolkit's own names and values, none of which needs the toolkit."""

from __future__ import annotations

import inspect
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from selfkd.integrations import mdistiller, mmrazor, torchdistill
from torch import Tensor

TOOLKITS = ["lightning", "mdistiller", "mmrazor", "torchdistill", "transformers"]
SHAPES = [(6, 10), (3, 7, 4, 5)]
Pair = tuple[Tensor, Tensor]


def draw(generator: torch.Generator, *shape: int) -> Pair:
    """Logits or features of a student and of a teacher."""
    student, teacher = (
        3 * torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(2)
    )
    return student.requires_grad_(), teacher.requires_grad_()


def assert_same(ours: Callable[..., Tensor], theirs: Callable[..., Tensor], inputs: Pair) -> None:
    """The same value, and the same gradients of both (None: none)."""
    values = [function(*inputs) for function in (ours, theirs)]
    torch.testing.assert_close(*values, rtol=1e-12, atol=1e-14)
    weights = torch.linspace(1, 2, values[0].numel(), dtype=torch.float64).view(values[0].shape)
    grads = [
        torch.autograd.grad((weights * value).sum(), inputs, allow_unused=True) for value in values
    ]
    assert [grad is None for grad in grads[0]] == [grad is None for grad in grads[1]]
    for mine, expected in zip(*grads, strict=True):
        torch.testing.assert_close(mine, expected, rtol=1e-11, atol=1e-14)


def kl(student: Tensor, teacher: Tensor, temperature: float, reduction: str) -> Tensor:
    """KL(teacher || student) of softened logits, reduced as F.kl_div does."""
    log_p, q = F.log_softmax(student / temperature, 1), F.softmax(teacher / temperature, 1)
    values = F.kl_div(log_p, q, reduction="none")
    total = values.sum()
    each = {"none": values, "sum": total, "mean": values.mean(), "batchmean": total / len(values)}
    return each[reduction]


def test_imports_without_the_toolkits() -> None:
    script = f"""
import sys
sys.modules.update(dict.fromkeys({TOOLKITS}))  # None: cannot be imported
from selfkd.integrations import mdistiller, mmrazor, torchdistill, transformers
try:
    torchdistill.register()
except ImportError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "needs torchdistill: pip install torchdistill" in done.stdout


def test_mdistiller_signature() -> None:
    parameters = inspect.signature(mdistiller.kd_loss).parameters
    assert list(parameters) == ["logits_student", "logits_teacher", "temperature", "logit_stand"]
    assert parameters["logit_stand"].default is False


@pytest.mark.parametrize("logit_stand", [False, True])
def test_mdistiller_values(logit_stand: bool, generator: torch.Generator) -> None:
    def theirs(student: Tensor, teacher: Tensor) -> Tensor:
        logits = [student, teacher.detach()]
        if logit_stand:
            logits = [(x - x.mean(-1, True)) / (1e-7 + x.std(-1, keepdim=True)) for x in logits]
        return 16 * kl(*logits, 4.0, "none").sum(1).mean()

    def ours(student: Tensor, teacher: Tensor) -> Tensor:
        return mdistiller.kd_loss(student, teacher, 4.0, logit_stand)

    assert_same(ours, theirs, draw(generator, 8, 100))


def test_mmrazor_signature() -> None:
    parameters = inspect.signature(mmrazor.KLDivergence).parameters
    defaults = {name: parameter.default for name, parameter in parameters.items()}
    assert defaults == {
        "tau": 1.0,
        "reduction": "batchmean",
        "loss_weight": 1.0,
        "teacher_detach": True,
    }
    assert list(inspect.signature(mmrazor.KLDivergence.forward).parameters) == [
        "self",
        "preds_S",
        "preds_T",
    ]
    with pytest.raises(ValueError, match='reduction is "rows", expected "batchmean", "sum"'):
        mmrazor.KLDivergence(reduction="rows")


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("teacher_detach", [True, False])
@pytest.mark.parametrize("reduction", ["batchmean", "sum", "mean", "none"])
def test_mmrazor_values(
    shape: tuple[int, ...], teacher_detach: bool, reduction: str, generator: torch.Generator
) -> None:
    def theirs(student: Tensor, teacher: Tensor) -> Tensor:
        teacher = teacher.detach() if teacher_detach else teacher
        return 0.7 * 2.5**2 * kl(student, teacher, 2.5, reduction)

    ours = mmrazor.KLDivergence(2.5, reduction, 0.7, teacher_detach)
    assert_same(ours, theirs, draw(generator, *shape))


def io(**outputs: Any) -> dict[str, dict[str, Any]]:
    """What torchdistill hands to a loss."""
    return {path: {"output": value} for path, value in outputs.items()}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("reduction", ["batchmean", "sum", "mean"])
@pytest.mark.parametrize(("alpha", "beta"), [(0.3, None), (0.5, 2.0), (0, None), (None, 3.0)])
def test_torchdistill_kd_values(
    shape: tuple[int, ...],
    reduction: str,
    alpha: float | None,
    beta: float | None,
    generator: torch.Generator,
) -> None:
    inputs = draw(generator, *shape)
    target = torch.randint(shape[1], (shape[0], *shape[2:]), generator=generator)
    target.view(-1)[1] = 1
    options = {"label_smoothing": 0.1, "ignore_index": 1}
    loss = torchdistill.KDLoss(
        "fc", "output", "fc", "output", 4.0, alpha, beta, reduction, **options
    )

    def theirs(student: Tensor, teacher: Tensor) -> Tensor:
        soft = kl(student, teacher.detach(), 4.0, reduction)
        if not alpha:
            return soft
        hard = F.cross_entropy(
            student, target, reduction=reduction.removeprefix("batch"), **options
        )
        return alpha * hard + (1 - alpha if beta is None else beta) * 16 * soft

    assert_same(lambda z, t: loss(io(fc=z), io(fc=t), target), theirs, inputs)
    assert_same(
        lambda z, t: loss(io(fc=z), io(fc=t)),
        lambda z, t: kl(z, t.detach(), 4.0, reduction),
        inputs,
    )


def test_torchdistill_other_values(generator: torch.Generator) -> None:
    student, teacher = draw(generator, 4, 6, 3, 5)
    pairs = {
        name: {
            "student": {"path": "a", "io": "output"},
            "teacher": {"path": "b", "io": "output"},
            **weight,
        }
        for name, weight in {"one": {}, "two": {"weight": 2.5}}.items()
    }
    at = torchdistill.ATLoss(pairs)

    def phi(x: Tensor) -> Tensor:
        return F.normalize(x.pow(2).mean(1).flatten(1))

    assert_same(
        lambda s, t: at(io(a=s), io(b=t), None),
        lambda s, t: 3.5 * (phi(s) - phi(t.detach())).pow(2).mean(),
        (student, teacher),
    )
    simreg = torchdistill.SimRegLoss("head", "output", "layer", "output")
    assert_same(
        lambda s, t: simreg(io(head=s), io(layer=t), None),
        lambda s, t: (2 - 2 * F.cosine_similarity(s, t.detach(), dim=1)).mean(),
        draw(generator, 6, 10),
    )
    pair = torchdistill.SDDropoutLoss("views", temperature=2.0)
    assert_same(
        lambda u, v: pair(io(views=(u, v)), {}, None),
        lambda u, v: 4 * (kl(u, v, 2.0, "batchmean") + kl(v, u, 2.0, "batchmean")),
        draw(generator, 6, 10),
    )


def test_torchdistill_refusals() -> None:
    with pytest.raises(ValueError, match='mode is "paper", expected "code"'):
        torchdistill.ATLoss({}, mode="paper")
    with pytest.raises(ValueError, match='reduction is "none", expected "batchmean"'):
        torchdistill.KDLoss("fc", "output", "fc", "output", 4.0, reduction="none")
