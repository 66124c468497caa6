"""selfkd.integrations: each toolkit's own names, values and gradients, none of which needs the toolkit."""

from __future__ import annotations

import inspect
import subprocess
import sys
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import harness
import numpy as np
import pytest
import selfkd
import torch
import torch.nn.functional as F
from selfkd.integrations import (
    mdistiller,
    mmrazor,
    self_kd_lib,
    timm,
    torchdistill,
    transformers,
    trl,
)
from torch import Tensor, nn

pytestmark = pytest.mark.filterwarnings("ignore:size_average and reduce args")
TOOLKITS = ["lightning", "mdistiller", "mmrazor", "timm", "torchdistill", "transformers", "trl"]
SHAPES = [(6, 10), (3, 7, 4, 5)]
Pair = tuple[Tensor, Tensor]


def draw(generator: torch.Generator, *shape: int) -> Pair:
    """Logits or features of a student and of a teacher."""
    student, teacher = (
        3 * torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(2)
    )
    return student.requires_grad_(), teacher.requires_grad_()


def learned(value: float) -> Tensor:
    """A number that asks for a gradient."""
    return torch.tensor(value, dtype=torch.float64, requires_grad=True)


def assert_equal(ours: Tensor, theirs: Tensor, inputs: tuple[Tensor, ...]) -> None:
    """The same value, and the same gradients of all inputs (None: none)."""
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-14)
    assert ours.requires_grad == theirs.requires_grad
    if not theirs.requires_grad:
        return
    weights = torch.linspace(1, 2, theirs.numel(), dtype=torch.float64).view(theirs.shape)
    mine, expected = (
        torch.autograd.grad((weights * value).sum(), inputs, allow_unused=True, retain_graph=True)
        for value in (ours, theirs)
    )
    assert [grad is None for grad in mine] == [grad is None for grad in expected]
    for a, b in zip(mine, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-14)


def assert_same(
    ours: Callable[..., Tensor], theirs: Callable[..., Tensor], inputs: tuple[Tensor, ...]
) -> None:
    """Equal, whichever of student and teacher asks for a gradient, or the teacher is of inference mode."""
    student, teacher, *numbers = inputs
    constant = teacher.detach()
    with torch.inference_mode():
        inference = constant.clone()
    for mine, plain in (
        ((student, teacher), (student, teacher)),
        ((student, constant), (student, constant)),
        ((student.detach(), teacher), (student.detach(), teacher)),
        ((student, inference), (student, constant)),
    ):
        if mine[1] is inference and numbers:
            continue  # PyTorch's own lines refuse it too
        assert_equal(ours(*mine, *numbers), theirs(*plain, *numbers), inputs)
    with torch.no_grad():
        assert_equal(ours(*inputs), theirs(*inputs), inputs)


def kl(student: Tensor, teacher: Tensor, temperature: Any, reduction: str) -> Tensor:
    """KL(teacher || student) of softened logits, reduced as F.kl_div does."""
    log_p, q = F.log_softmax(student / temperature, 1), F.softmax(teacher / temperature, 1)
    values = F.kl_div(log_p, q, reduction="none")
    total = values.sum()
    each = {"none": values, "sum": total, "mean": values.mean(), "batchmean": total / len(values)}
    return each[reduction]


def standardized(logits: Tensor, eps: float) -> Tensor:
    return (logits - logits.mean(-1, True)) / (eps + logits.std(-1, keepdim=True))


def attention_map(features: Tensor, p: float = 2) -> Tensor:
    return F.normalize(features.pow(p).mean(1).flatten(1))


def at(student: Tensor, teacher: Tensor, p: float = 2) -> Tensor:
    """Attention transfer as its authors' code averages it."""
    return (attention_map(student, p) - attention_map(teacher, p)).pow(2).mean()


def test_imports_without_the_toolkits() -> None:
    script = f"""
import sys
sys.modules.update(dict.fromkeys({TOOLKITS}))  # None: cannot be imported
from selfkd.integrations import mdistiller, mmrazor, self_kd_lib, timm, torchdistill, transformers, trl
try:
    torchdistill.register()
except ImportError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "needs torchdistill: pip install torchdistill" in done.stdout


CONSTRUCTORS = {
    mmrazor.KLDivergence: {
        "tau": 1.0,
        "reduction": "batchmean",
        "loss_weight": 1.0,
        "teacher_detach": True,
    },
    mmrazor.ChannelWiseDivergence: {"tau": 1.0, "loss_weight": 1.0},
    mmrazor.ATLoss: {"loss_weight": 1.0},
    self_kd_lib.DistillKL: {"T": inspect.Parameter.empty},
}
FORWARDS = {
    mmrazor.KLDivergence: ["preds_S", "preds_T"],
    mmrazor.ChannelWiseDivergence: ["preds_S", "preds_T"],
    mmrazor.ATLoss: ["s_feature", "t_feature"],
    self_kd_lib.DistillKL: ["y_s", "y_t"],
}


@pytest.mark.parametrize("kind", CONSTRUCTORS)
def test_signatures(kind: type[nn.Module]) -> None:
    parameters = inspect.signature(kind).parameters
    assert {name: x.default for name, x in parameters.items()} == CONSTRUCTORS[kind]
    assert list(inspect.signature(kind.forward).parameters) == ["self", *FORWARDS[kind]]


def test_torchdistill_signatures() -> None:
    """The order of torchdistill 1.1.5, by position."""
    kd = torchdistill.KDLoss("a", "output", "b", "input", 2.0, 0.3, 0.6, "sum", ignore_index=4)
    std = torchdistill.LogitStdKDLoss("a", "output", "b", "input", 2.0, 1e-3, 0.3, 0.6, "sum")
    for loss in (kd, std):
        assert (loss.student_module_path, loss.student_module_io) == ("a", "output")
        assert (loss.teacher_module_path, loss.teacher_module_io) == ("b", "input")
        numbers = (loss.temperature, loss.alpha, loss.beta, loss.reduction)
        assert numbers == (2.0, 0.3, 0.6, "sum")
    assert std.eps == 1e-3
    assert kd.cross_entropy_loss.ignore_index == 4
    with pytest.raises(TypeError, match=r"KDLoss\.__init__\(\) got an unexpected .* 'smoothing'"):
        torchdistill.KDLoss("a", "output", "b", "output", 2.0, smoothing=0.1)


@pytest.mark.parametrize("logit_stand", [False, True])
@pytest.mark.parametrize("reduce", [True, False])
def test_mdistiller_kd_values(reduce: bool, logit_stand: bool, generator: torch.Generator) -> None:
    def theirs(student: Tensor, teacher: Tensor, temperature: Any = 4.0) -> Tensor:
        logits = [student, teacher]
        if logit_stand:
            logits = [standardized(x, 1e-7) for x in logits]
        rows = kl(*logits, temperature, "none").sum(1)
        return temperature**2 * (rows.mean() if reduce else rows)

    def ours(student: Tensor, teacher: Tensor, temperature: Any = 4.0) -> Tensor:
        options = {"reduce": reduce, "logit_stand": logit_stand}
        return mdistiller.kd_loss(student, teacher, temperature, **options)

    def by_position(student: Tensor, teacher: Tensor) -> Tensor:
        return mdistiller.kd_loss(student, teacher, 4.0, reduce, logit_stand)

    inputs = draw(generator, 8, 100)
    assert_same(ours, theirs, inputs)
    assert_same(by_position, theirs, inputs)
    assert_same(ours, theirs, (*inputs, learned(4.0)))


def test_mdistiller_kd_by_position(generator: torch.Generator) -> None:
    """Three arguments are everybody's, five those of the fork's MLKD; a fourth alone is two things."""
    student, teacher = draw(generator, 8, 100)
    three = mdistiller.kd_loss(student, teacher, 4.0)
    assert three == mdistiller.kd_loss(student, teacher, 4.0, True, False)
    for flag in (True, False):
        with pytest.raises(TypeError, match=r"kd_loss: the fourth argument is (True|False) by pos"):
            mdistiller.kd_loss(student, teacher, 4.0, flag)
    with pytest.raises(TypeError, match="6 arguments are given by position, expected 3 or 5"):
        mdistiller.kd_loss(student, teacher, 4.0, True, False, True)


@pytest.mark.parametrize("p", [2, 3])
def test_mdistiller_at_values(p: int, generator: torch.Generator) -> None:
    """Equal maps; a larger student; a larger teacher, whose map is pooled to a square."""
    shapes = [
        ((4, 6, 3, 5), (4, 2, 3, 5)),
        ((4, 6, 8, 8), (4, 2, 4, 4)),
        ((4, 2, 5, 5), (4, 6, 7, 9)),
    ]
    for student_shape, teacher_shape in shapes:
        student, _ = draw(generator, *student_shape)
        teacher, _ = draw(generator, *teacher_shape)

        def theirs(s: Tensor, t: Tensor) -> Tensor:
            size = min(s.shape[2], t.shape[2])
            if s.shape[2] > size:
                s = F.adaptive_avg_pool2d(s, (size, size))
            elif t.shape[2] > size:
                t = F.adaptive_avg_pool2d(t, (size, size))
            return at(s, t, p)

        assert_same(
            lambda s, t: mdistiller.at_loss([s, 2 * s], (t, t), p),
            lambda s, t: theirs(s, t) + theirs(2 * s, t),
            (student, teacher),
        )


def test_mdistiller_at_refusals(generator: torch.Generator) -> None:
    student, teacher = draw(generator, 2, 3, 4, 4)
    for g_s, g_t, sentence in (
        ([student], [teacher] * 2, "g_t has 2 features, expected 1 like g_s"),
        ([], [], "g_t has 0 features, expected at least 1"),
        (student, [teacher], r"g_s is a .*, expected a list"),
        ([student], None, "g_t is None, expected a list"),
        ([student], [teacher[:, :, :2, 0]], r"g_t\[0\] has 3 dimensions, expected 4"),
        (
            [student],
            [teacher[..., :3]],
            r"g_t\[0\] has 2 samples of 12 positions, expected 2 of 16",
        ),
    ):
        with pytest.raises((TypeError, ValueError), match=f"^at_loss: {sentence}"):
            mdistiller.at_loss(g_s, g_t, 2)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("teacher_detach", [True, False])
@pytest.mark.parametrize("reduction", ["batchmean", "sum", "mean", "none"])
@pytest.mark.parametrize("loss_weight", [0.7, -0.5])
def test_mmrazor_kl_values(
    shape: tuple[int, ...],
    teacher_detach: bool,
    reduction: str,
    loss_weight: float,
    generator: torch.Generator,
) -> None:
    def theirs(student: Tensor, teacher: Tensor) -> Tensor:
        teacher = teacher.detach() if teacher_detach else teacher
        return loss_weight * 2.5**2 * kl(student, teacher, 2.5, reduction)

    ours = mmrazor.KLDivergence(2.5, reduction, loss_weight, teacher_detach)
    assert_same(ours, theirs, draw(generator, *shape))


@pytest.mark.parametrize("reduction", ["batchmean", "none"])
def test_mmrazor_kl_learns_numbers(reduction: str, generator: torch.Generator) -> None:
    tau, loss_weight = learned(2.5), learned(0.7)
    inputs = (*draw(generator, 6, 10), tau, loss_weight)
    assert_same(
        lambda s, t, *_: mmrazor.KLDivergence(tau, reduction, loss_weight)(s, t),
        lambda s, t, T, a: a * T**2 * kl(s, t.detach(), T, reduction),
        inputs,
    )


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_mmrazor_cwd_values(memory_format: torch.memory_format, generator: torch.Generator) -> None:
    def theirs(student: Tensor, teacher: Tensor) -> Tensor:
        log_p, log_q = (F.log_softmax(x.flatten(2) / 2.5, -1) for x in (student, teacher))
        return 0.7 * 2.5**2 * (log_q.exp() * (log_q - log_p)).sum() / (3 * 7)

    inputs = draw(generator, 3, 7, 4, 5)
    ours = mmrazor.ChannelWiseDivergence(2.5, 0.7)
    assert_same(
        lambda s, t: ours(*(x.contiguous(memory_format=memory_format) for x in (s, t))),
        theirs,
        inputs,
    )


def test_mmrazor_at_values(generator: torch.Generator) -> None:
    student, (_, teacher) = draw(generator, 4, 6, 3, 5)[0], draw(generator, 4, 2, 3, 5)
    assert_same(mmrazor.ATLoss(0.7), lambda s, t: 0.7 * at(s, t), (student, teacher))


@pytest.mark.parametrize("shape", SHAPES)
def test_self_kd_lib_values(shape: tuple[int, ...], generator: torch.Generator) -> None:
    inputs = draw(generator, *shape)
    ours = self_kd_lib.DistillKL(3.0)
    assert_same(ours, lambda s, t: 9 * kl(s, t, 3.0, "batchmean"), inputs)


def io(**outputs: Any) -> dict[str, dict[str, Any]]:
    """What torchdistill hands to a loss."""
    return {path: {"output": value} for path, value in outputs.items()}


def kd_target(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    target = torch.randint(shape[1], (shape[0], *shape[2:]), generator=generator)
    target.view(-1)[1] = 1
    return target


LOGITS = ("fc", "output", "fc", "output")
CLASS_WEIGHT = torch.linspace(0.5, 2, 10, dtype=torch.float64)
KD_CASES = [
    pytest.param((6, 10), "batchmean", {"alpha": 0.3}, id="one pass"),
    pytest.param((3, 7, 4, 5), "batchmean", {"alpha": 0.3}, id="maps"),
    pytest.param((6, 10), "sum", {"alpha": 0.5, "beta": 2.0}, id="sum"),
    pytest.param((3, 7, 4, 5), "mean", {"alpha": 0.5, "beta": 2.0}, id="mean"),
    pytest.param((6, 10), "batchmean", {"alpha": 1.5}, id="negative beta"),
    pytest.param((6, 10), "batchmean", {"alpha": 0, "beta": 2.0}, id="alpha 0"),
    pytest.param((3, 7, 4, 5), "mean", {"alpha": None, "beta": 3.0}, id="no alpha"),
    pytest.param((6, 10), "none", {"alpha": None, "beta": 3.0}, id="none"),
    pytest.param((6, 10), "batchmean", {"alpha": 0.3, "weight": CLASS_WEIGHT}, id="class weights"),
    pytest.param((6, 10), "batchmean", {"alpha": 0.3, "reduce": True}, id="reduce"),
    pytest.param((6, 10), "sum", {"alpha": 0.3, "size_average": True}, id="size_average"),
]
STANDARDS = {torchdistill.KDLoss: {}, torchdistill.LogitStdKDLoss: {"eps": 1e-3}}


@pytest.mark.parametrize("kind", STANDARDS)
@pytest.mark.parametrize(("shape", "reduction", "options"), KD_CASES)
def test_torchdistill_kd_values(
    kind: type[nn.Module],
    shape: tuple[int, ...],
    reduction: str,
    options: dict[str, Any],
    generator: torch.Generator,
) -> None:
    inputs, target = draw(generator, *shape), kd_target(shape, generator)
    standard = STANDARDS[kind]
    cross_entropy = {"label_smoothing": 0.1, "ignore_index": 1}
    loss = kind(*LOGITS, 4.0, reduction=reduction, **standard, **options, **cross_entropy)
    alpha, beta = options["alpha"], options.get("beta", 1 - (options["alpha"] or 0))
    cross_entropy |= {k: options[k] for k in ("weight", "size_average", "reduce") if k in options}

    def soft(student: Tensor, teacher: Tensor) -> Tensor:
        logits = [standardized(x, 1e-3) if standard else x for x in (student, teacher)]
        return kl(*logits, 4.0, reduction)

    def theirs(student: Tensor, teacher: Tensor) -> Tensor:
        if not alpha:
            return soft(student, teacher)
        ce = nn.CrossEntropyLoss(reduction=reduction.removeprefix("batch"), **cross_entropy)
        return alpha * ce(student, target) + beta * 16 * soft(student, teacher)

    assert_same(lambda z, t: loss(io(fc=z), io(fc=t), target), theirs, inputs)
    assert_same(lambda z, t: loss(io(fc=z), io(fc=t)), soft, inputs)


def test_torchdistill_kd_mixed_targets(generator: torch.Generator) -> None:
    inputs = draw(generator, 6, 10)
    target = torch.rand(6, 10, generator=generator, dtype=torch.float64).softmax(1)
    loss = torchdistill.KDLoss(*LOGITS, 4.0, 0.3)

    def theirs(student: Tensor, teacher: Tensor) -> Tensor:
        soft = 16 * kl(student, teacher, 4.0, "batchmean")
        return 0.3 * F.cross_entropy(student, target) + 0.7 * soft

    assert_same(lambda z, t: loss(io(fc=z), io(fc=t), target), theirs, inputs)


def test_torchdistill_kd_learns_numbers(generator: torch.Generator) -> None:
    T, a, b = learned(4.0), learned(0.3), learned(0.6)
    target = kd_target((6, 10), generator)
    inputs = (*draw(generator, 6, 10), T, a, b)

    def theirs(student: Tensor, teacher: Tensor, T: Tensor, a: Tensor, b: Tensor) -> Tensor:
        return a * F.cross_entropy(student, target) + b * T**2 * kl(
            student, teacher, T, "batchmean"
        )

    assert_same(
        lambda s, t, *_: torchdistill.KDLoss(*LOGITS, T, a, b)(io(fc=s), io(fc=t), target),
        theirs,
        inputs,
    )
    assert_same(
        lambda s, t, *_: torchdistill.KDLoss(*LOGITS, T)(io(fc=s), io(fc=t)),
        lambda s, t, T, *_: kl(s, t, T, "batchmean"),
        inputs,
    )


@pytest.mark.parametrize("reduction", ["batchmean", "none"])
def test_the_teachers_gradient_is_finite(reduction: str, generator: torch.Generator) -> None:
    """Where a probability underflows F.kl_div gives the teacher nan."""
    student, teacher = (x.detach().mul(300).requires_grad_() for x in draw(generator, 6, 10))
    kl(student, teacher, 1.0, reduction).sum().backward()
    assert teacher.grad is not None
    assert teacher.grad.isnan().any()
    loss = mmrazor.KLDivergence(1.0, reduction, teacher_detach=False)
    for grad in torch.autograd.grad(loss(student, teacher).sum(), (student, teacher)):
        assert grad.isfinite().all()


@pytest.mark.parametrize("reduction", ["batchmean", "none"])
def test_a_class_that_the_teacher_excludes(reduction: str, generator: torch.Generator) -> None:
    """A logit of -inf, as masked: the class counts 0, and gives and gets no nan."""
    student, teacher = draw(generator, 6, 10)
    hidden = torch.arange(10) == 3
    loss = mmrazor.KLDivergence(2.0, reduction, teacher_detach=False)

    def masked(t: Tensor) -> Tensor:
        return t.masked_fill(hidden, -torch.inf)

    torch.testing.assert_close(
        loss(student, masked(teacher)), 4 * kl(student, masked(teacher), 2.0, reduction)
    )
    for grad in torch.autograd.grad(loss(student, masked(teacher)).sum(), (student, teacher)):
        assert grad.isfinite().all()


@harness.needs_operators
def test_compiles_in_one_graph(generator: torch.Generator) -> None:
    """Whether the teacher learns or not, with torchdistill's dictionaries."""
    kd, at = torchdistill.KDLoss(*LOGITS, 4.0, 0.3), torchdistill.ATLoss(at_pairs())
    target = kd_target((3, 7, 4, 5), generator)

    def loss(z: Tensor, t: Tensor) -> Tensor:
        of_logits = kd(io(fc=z), io(fc=t), target) + mdistiller.kd_loss(z, t, 2.0, logit_stand=True)
        return of_logits + at(io(a=z), io(a=t)) + mmrazor.ChannelWiseDivergence(2.0)(z, t)

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    student, teacher = draw(generator, 3, 7, 4, 5)
    for t in (teacher, teacher.detach()):
        assert_equal(compiled(student, t), loss(student, t), (student, teacher))


def names_of_nodes(loss: Tensor) -> str:
    """The operators in a loss's graph."""
    nodes, seen = [loss.grad_fn], set()
    while nodes:
        node = nodes.pop()
        if node is not None and node not in seen:
            seen.add(node)
            nodes += [following for following, _ in node.next_functions]
    return " ".join(sorted(node.name() for node in seen))


def test_the_teacher_that_asks_nothing_costs_nothing(generator: torch.Generator) -> None:
    """One side is fused with the cross-entropy in one pass; two sides only where both ask."""
    student, teacher = draw(generator, 6, 10)
    target = kd_target((6, 10), generator)
    loss = torchdistill.KDLoss(*LOGITS, 4.0, 0.3)
    one = names_of_nodes(loss(io(fc=student), io(fc=teacher.detach()), target))
    two = names_of_nodes(loss(io(fc=student), io(fc=teacher), target))
    assert "distill" in one
    assert "NllLoss" not in one
    assert "sd_dropout_kl" not in one
    assert "sd_dropout_kl" in two


def at_pairs() -> dict[str, Any]:
    sides = {side: {"path": "a", "io": "output"} for side in ("student", "teacher")}
    return {"one": sides, "two": {**sides, "weight": 2.5}}


@pytest.mark.parametrize("mode", ["code", "paper"])
def test_torchdistill_at_values(mode: str, generator: torch.Generator) -> None:
    loss = torchdistill.ATLoss(
        at_pairs(), mode, threshold=3
    )  # what it does not know it does not look at

    def theirs(student: Tensor, teacher: Tensor) -> Tensor:
        if mode == "code":
            return 3.5 * at(student, teacher)
        apart = attention_map(student) - attention_map(teacher)
        return 3.5 * apart.square().sum(1).sqrt().mean()

    student, (_, teacher) = draw(generator, 4, 6, 3, 5)[0], draw(generator, 4, 2, 3, 5)
    assert_same(lambda s, t: loss(io(a=s), io(a=t), None), theirs, (student, teacher))


def test_torchdistill_own_losses(generator: torch.Generator) -> None:
    simreg = torchdistill.SimRegLoss("head", "output", "layer", "output")
    assert_same(
        lambda s, t: simreg(io(head=s), io(layer=t), None),
        lambda s, t: (2 - 2 * F.cosine_similarity(s, t.detach(), dim=1)).mean(),
        draw(generator, 6, 10),
    )
    pair = torchdistill.SDDropoutLoss("views", temperature=2.0)
    u, v = draw(generator, 6, 10)
    theirs = 4 * (kl(u, v, 2.0, "batchmean") + kl(v, u, 2.0, "batchmean"))
    assert_equal(pair(io(views=(u, v)), {}, None), theirs, (u, v))


def js(student: Tensor, teacher: Tensor, beta: float) -> Tensor:
    """The divergence of two rows of probabilities from their mixture."""
    mixture = beta * teacher + (1 - beta) * student
    of_teacher, of_student = ((x * (x / mixture).log()).sum(1) for x in (teacher, student))
    return beta * of_teacher + (1 - beta) * of_student


@pytest.mark.parametrize("shape", SHAPES)
def test_torchdistill_divergences(shape: tuple[int, ...], generator: torch.Generator) -> None:
    """Of all classes; of the teacher's top 3 and the tail, and of these renormalised."""
    options: dict[str, Any] = {"beta": 0.3, "temperature": 2.0}

    def ours(kind: type[nn.Module], **more: Any) -> Callable[..., Tensor]:
        loss = kind(*LOGITS, **options, **more)
        return lambda s, t: loss(io(fc=s), io(fc=t), None)

    def theirs(project: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def loss(s: Tensor, t: Tensor) -> Tensor:
            p, q = (F.softmax(x / 2, 1) for x in (s, t))
            indices = t.topk(3, dim=1).indices
            return js(project(p, indices), project(q, indices), 0.3).mean()

        return loss

    def with_tail(p: Tensor, indices: Tensor) -> Tensor:
        top = p.gather(1, indices)
        return torch.cat([top, 1 - top.sum(1, keepdim=True)], 1)

    inputs = draw(generator, *shape)
    top = torchdistill.TopKDivergenceLoss
    assert_same(ours(torchdistill.JSDivergenceLoss), theirs(lambda p, _: p), inputs)
    assert_same(ours(top, k=3), theirs(with_tail), inputs)
    assert_same(
        ours(top, k=3, tail="renormalize"),
        theirs(lambda p, indices: F.normalize(p.gather(1, indices), p=1, dim=1)),
        inputs,
    )


TORCHDISTILL = "needs torchdistill, which needs torchvision: `make compat`"


@pytest.mark.parametrize("key", ["KDLoss", "LogitStdKDLoss"])
@pytest.mark.parametrize(("shape", "reduction", "options"), KD_CASES)
def test_torchdistill_itself_kd(
    key: str,
    shape: tuple[int, ...],
    reduction: str,
    options: dict[str, Any],
    generator: torch.Generator,
) -> None:
    """The same arguments to torchdistill's class and to ours, which are found by their keys."""
    pytest.importorskip("torchdistill", reason=TORCHDISTILL)
    from torchdistill.losses.registry import get_mid_level_loss

    target = kd_target(shape, generator)
    kwargs = {"temperature": 4.0, "reduction": reduction, "label_smoothing": 0.1, **options}
    ours, theirs = (
        get_mid_level_loss({"key": prefix + key, "kwargs": named_logits() | kwargs})
        for prefix in ("selfkd.", "")
    )
    assert type(ours) is getattr(torchdistill, key)
    assert type(theirs) is not type(ours)
    assert_same(
        lambda s, t: ours(io(fc=s), io(fc=t), targets=target),
        lambda s, t: theirs(io(fc=s), io(fc=t), targets=target),
        draw(generator, *shape),
    )


def named_logits() -> dict[str, str]:
    sides = ("student", "teacher")
    return {f"{side}_module_path": "fc" for side in sides} | {
        f"{side}_module_io": "output" for side in sides
    }


@pytest.mark.parametrize("mode", ["code", "paper"])
def test_torchdistill_itself_at(mode: str, generator: torch.Generator) -> None:
    mid_level = pytest.importorskip("torchdistill.losses.mid_level", reason=TORCHDISTILL)
    ours, theirs = (x.ATLoss(at_pairs(), mode) for x in (torchdistill, mid_level))
    student, (_, teacher) = draw(generator, 4, 6, 3, 5)[0], draw(generator, 4, 2, 3, 5)
    assert_same(
        lambda s, t: ours(io(a=s), io(a=t), None),
        lambda s, t: theirs(io(a=s), io(a=t), None),
        (student, teacher),
    )


def test_torchdistill_refusals(generator: torch.Generator) -> None:
    with pytest.raises(ValueError, match='mode is the string "papers", expected "code" or "paper"'):
        torchdistill.ATLoss(at_pairs(), mode="papers")
    with pytest.raises(
        ValueError, match="at_pairs is a dict, expected a dict of at least one pair"
    ):
        torchdistill.ATLoss({})
    with pytest.raises(
        ValueError, match=r'at_pairs\["one"\]\["teacher"\] is None, expected a dict'
    ):
        torchdistill.ATLoss({"one": {"student": {"path": "a", "io": "output"}}})
    with pytest.raises(
        TypeError, match=r'at_pairs\["one"\]\["weight"\] is the string "2", expected'
    ):
        torchdistill.ATLoss({"one": {**at_pairs()["one"], "weight": "2"}})
    with pytest.raises(ValueError, match='reduction is the string "rows", expected "batchmean"'):
        torchdistill.KDLoss(*LOGITS, 4.0, reduction="rows")
    with pytest.raises(TypeError, match="SimRegLoss: eps is given, expected of normalize, "):
        torchdistill.SimRegLoss(*LOGITS, eps=1e-8)
    z, t = draw(generator, 6, 10)
    target = kd_target((6, 10), generator)
    rows = torchdistill.KDLoss(*LOGITS, 4.0, 0.3, reduction="none")
    with pytest.raises(
        ValueError, match=r'reduction is "none" with alpha 0.3, expected .* selfkd\.d'
    ):
        rows(io(fc=z), io(fc=t), target)
    loss = torchdistill.KDLoss(*LOGITS, 4.0, 0.3)
    with pytest.raises(ValueError, match='student_io_dict has no output of module "fc", expected'):
        loss(io(conv=z), io(fc=t), target)
    with pytest.raises(TypeError, match="teacher_io_dict is None, expected a dict"):
        loss(io(fc=z), None, target)
    wrong_targets = (target.int(), target[:3], target.view(-1, 1), target.numpy(), [1] * 6)
    for wrong in (*wrong_targets, target.float(), target.to("meta")):
        with pytest.raises(
            (TypeError, ValueError), match=r"^(KDLoss: targets|distill: target) .*expected"
        ):
            loss(io(fc=z), io(fc=t.detach()), wrong)
        with pytest.raises((TypeError, ValueError), match=r"^KDLoss: targets? .*expected"):
            loss(io(fc=z), io(fc=t), wrong)
    with pytest.raises(
        TypeError, match=r'SDDropoutLoss: .*\["fc"\]\["output"\] is a .*, expected a p'
    ):
        torchdistill.SDDropoutLoss("fc")(io(fc=z))


class PlainTask(nn.Module):
    """timm's LogitDistillationTask, as far as its loss: what a mixin finds there."""

    def __init__(self, student: Any, teacher: Any, criterion: Any, **numbers: float) -> None:
        super().__init__()
        self.trainable_module, self.teacher, self.criterion = student, teacher, criterion
        self.temperature = numbers["temperature"]
        self.task_loss_weight = numbers["task_loss_weight"]
        self.distill_loss_weight = numbers["distill_loss_weight"]
        self.student_mean, self.student_std = torch.tensor(0.5), torch.tensor(2.0)

    def forward(self, input: Tensor, target: Tensor) -> dict[str, Tensor]:
        z = self.trainable_module(input)
        with torch.no_grad():
            seen = self.teacher.normalize_input(input, self.student_mean, self.student_std)
            t = self.teacher(seen)
        task, kd = (
            self.criterion(z, target),
            self.temperature**2 * kl(z, t, self.temperature, "batchmean"),
        )
        loss = self.task_loss_weight * task + self.distill_loss_weight * kd
        return {"loss": loss, "output": z, "task_loss": task, "kd_loss": kd}


class PlainTeacher(nn.Linear):
    """timm's DistillationTeacher, as far as the loss calls it."""

    def forward(self, x: Tensor, return_features: bool = False) -> Tensor:
        assert not return_features
        return super().forward(x)

    def normalize_input(self, x: Tensor, mean: Tensor, std: Tensor) -> Tensor:
        return x * std + mean


class OurTask(timm.LogitDistillationMixin, PlainTask):
    pass


def assert_same_task(ours: nn.Module, theirs: nn.Module, student: nn.Module, x: Tensor) -> None:
    target = torch.arange(len(x)) % 10
    mine, expected = ours(x, target), theirs(x, target)
    assert mine.keys() == expected.keys() == {"loss", "output", "task_loss", "kd_loss"}
    for name in mine:
        assert_equal(mine[name], expected[name], tuple(student.parameters()))


def test_timm_values(generator: torch.Generator) -> None:
    student, teacher = nn.Linear(8, 10).double(), PlainTeacher(8, 10).double()
    x = torch.randn(6, 8, generator=generator, dtype=torch.float64)
    numbers = {"temperature": 3.0, "task_loss_weight": 0.3, "distill_loss_weight": 0.7}
    tasks = [
        kind(student, teacher, nn.CrossEntropyLoss(), **numbers) for kind in (OurTask, PlainTask)
    ]
    assert_same_task(*tasks, student, x)
    tasks[0].teacher = PlainTeacher(8, 9).double()
    with pytest.raises(
        ValueError, match=r"^LogitDistillationTask: the teacher's output has shape \(6, 9\)"
    ):
        tasks[0](x, torch.arange(6))


@pytest.mark.parametrize("weights", [{}, {"task_loss_weight": 0.3}, {"distill_loss_weight": 2.0}])
def test_timm_itself(weights: dict[str, float], generator: torch.Generator) -> None:
    """timm's own class with our forward, whatever the weights."""
    task = pytest.importorskip(
        "timm.task", reason="needs timm, which needs torchvision: `make compat`"
    )
    if not hasattr(task, "LogitDistillationTask"):
        pytest.skip("needs a timm with LogitDistillationTask: pip install timm")

    class Task(timm.LogitDistillationMixin, task.LogitDistillationTask):
        pass

    class Network(nn.Sequential):
        def __init__(self, mean: float) -> None:
            super().__init__(nn.Flatten(), nn.Linear(3 * 4 * 4, 10).double())
            self.num_classes, self.in_chans = 10, 3
            self.pretrained_cfg = {"mean": (mean,) * 3, "std": (2.0,) * 3}

    student, teacher = Network(0.5), Network(0.1)
    x = torch.randn(6, 3, 4, 4, generator=generator, dtype=torch.float64)
    options = {"temperature": 3.0, "device": torch.device("cpu"), "dtype": torch.float64}
    tasks = [
        kind(student, teacher, nn.CrossEntropyLoss(), **options, **weights)
        for kind in (Task, task.LogitDistillationTask)
    ]
    assert_same_task(*tasks, student, x)


def test_timm_token_distillation(generator: torch.Generator) -> None:
    """The calls that docs/integrations.md names for the loss of TokenDistillationTask."""
    z, t = draw(generator, 6, 10)
    soft = 9 * F.kl_div(
        *(F.log_softmax(x / 3, -1) for x in (z, t.detach())), reduction="batchmean", log_target=True
    )
    assert_equal(selfkd.distill(z, teachers=t.detach(), temperature=3.0), soft, (z,))
    hard = F.cross_entropy(z, t.argmax(-1))
    assert_equal(selfkd.distill(z, t.argmax(-1)), hard, (z,))


class PlainTrainer:
    """A transformers.Trainer, as far as its loss."""

    def __init__(self, model: Any, *, compute_loss_func: Callable[..., Tensor]) -> None:
        self.model, self.loss_func = model, compute_loss_func
        self.args = SimpleNamespace(device="cpu", label_smoothing_factor=0.1)

    def compute_loss(self, model: Any, inputs: dict[str, Any], **kwargs: Any) -> Tensor:
        given = {name: x for name, x in inputs.items() if name != "labels"}
        return self.loss_func(model(**given), inputs.get("labels"), **kwargs)


class OurTrainer(transformers.DistillMixin, PlainTrainer):
    pass


class Model(nn.Module):
    """Logits as a model of transformers returns them."""

    def __init__(self, outputs: Any) -> None:
        super().__init__()
        self.outputs = outputs

    def forward(self) -> Any:
        return self.outputs


def trainer(student: Tensor, teacher: Tensor, **options: Any) -> tuple[OurTrainer, Model]:
    models = [Model(SimpleNamespace(logits=x)) for x in (student, teacher)]
    numbers = {"teacher_weight": 0.8, "temperature": 2.0, "shift_labels": False}
    return OurTrainer(models[0], teacher=models[1], **numbers | options), models[0]


@pytest.mark.parametrize("count", [None, 7, torch.tensor(7)])
def test_transformers_counts(count: Any, generator: torch.Generator) -> None:
    """What the Trainer counts: labels of all batches as a number or a tensor, or nothing."""
    z, t = draw(generator, 3, 4, 10)
    labels = torch.randint(10, (3, 4), generator=generator)
    labels[1] = -100
    taught = labels != -100
    hard = F.cross_entropy(z[taught], labels[taught], label_smoothing=0.1, reduction="sum")
    soft = 4 * kl(z[taught], t.detach()[taught], 2.0, "sum")
    theirs = (hard + 0.8 * soft) / (taught.sum() if count is None else count)
    ours, model = trainer(z, t.detach())
    loss = ours.compute_loss(model, {"labels": labels}, num_items_in_batch=count)
    assert_equal(loss, theirs, (z,))


@pytest.mark.parametrize("count", [None, 7])
@pytest.mark.parametrize("beta", [0.0, 0.3])
@pytest.mark.parametrize("top_k", [None, 4])
def test_transformers_divergences(
    top_k: int | None, beta: float, count: int | None, generator: torch.Generator
) -> None:
    """Another divergence counts as the KL divergence does, which beta = 0 of all classes is."""
    z, t = draw(generator, 3, 4, 10)
    labels = torch.randint(10, (3, 4), generator=generator)
    labels[1] = -100
    taught = labels != -100
    p, q = (F.softmax(x[taught] / 2, 1) for x in (z, t.detach()))
    if top_k is not None:
        indices = q.topk(top_k, dim=1).indices
        p, q = (
            torch.cat([top, 1 - top.sum(1, keepdim=True)], 1)
            for top in (x.gather(1, indices) for x in (p, q))
        )
    hard = F.cross_entropy(z[taught], labels[taught], label_smoothing=0.1, reduction="sum")
    soft = 4 * (js(p, q, beta) if beta else (q * (q / p).log()).sum(1)).sum()
    theirs = (0.6 * hard + 0.8 * soft) / (taught.sum() if count is None else count)
    ours, model = trainer(z, t.detach(), beta=beta, top_k=top_k, ce_weight=0.6)
    loss = ours.compute_loss(model, {"labels": labels}, num_items_in_batch=count)
    assert_equal(loss, theirs, (z,))


@pytest.mark.parametrize("shift_labels", [True, False])
def test_transformers_without_labels(shift_labels: bool, generator: torch.Generator) -> None:
    z, t = draw(generator, 3, 4, 10)
    ours, model = trainer(z, t.detach(), ce_weight=0, shift_labels=shift_labels)
    theirs = 0.8 * 4 * kl(z.flatten(0, 1), t.detach().flatten(0, 1), 2.0, "batchmean")
    assert_equal(ours.compute_loss(model, {}), theirs, (z,))
    ours, model = trainer(z, t.detach(), shift_labels=shift_labels)
    with pytest.raises(ValueError, match=r"^DistillMixin: labels is None, expected .* ce_weight=0"):
        ours.compute_loss(model, {})


def test_transformers_numbers(generator: torch.Generator) -> None:
    z, t = draw(generator, 3, 10)
    for name in ("teacher_weight", "temperature", "ce_weight", "beta"):
        with pytest.raises(
            ValueError, match=f"^DistillMixin: {name} requires grad, .*reference.distill"
        ):
            trainer(z, t, **{name: nn.Parameter(torch.tensor(1.0))})
        for wrong in (None, "1", [1.0], True, torch.ones(2), -1.0, float("nan")):
            with pytest.raises(
                (TypeError, ValueError), match=f"^DistillMixin: {name} (is|has) .*expected"
            ):
                trainer(z, t, **{name: wrong})
        ours, _ = trainer(z, t, **{name: np.float32(0.5)})
        assert type(getattr(ours, name)) is float
    with pytest.raises(
        TypeError, match=r'^DistillMixin: shift_labels is the string "no", expected True'
    ):
        trainer(z, t, shift_labels="no")


def test_transformers_models(generator: torch.Generator) -> None:
    z, t = draw(generator, 3, 10)
    labels = torch.zeros(3, dtype=torch.int64)
    for wrong in (None, "gpt2", t):
        with pytest.raises(TypeError, match=r"^DistillMixin: teacher is .*expected a module"):
            OurTrainer(Model(z), teacher=wrong, shift_labels=False)
    ours, model = trainer(z, t.detach())
    with pytest.raises(
        TypeError, match=r"^DistillMixin: the student's output is a tuple without logits"
    ):
        ours.compute_loss(Model((z,)), {"labels": labels})
    with pytest.raises(TypeError, match=r"^DistillMixin: labels is a list, expected a tensor"):
        ours.compute_loss(model, {"labels": [0, 0, 0]})
    ours.teacher.outputs = (t,)
    with pytest.raises(
        TypeError, match=r"^DistillMixin: the teacher's output is a tuple without logits"
    ):
        ours.compute_loss(model, {"labels": labels})
    ours.teacher.outputs = SimpleNamespace(logits=t[:, :9])
    with pytest.raises(
        ValueError, match=r"^DistillMixin: the teacher's logits has shape \(3, 9\), expected"
    ):
        ours.compute_loss(model, {"labels": labels})


# ---- wrong things in each place ----

Call = Callable[[Any, Any], Tensor]
SEEN = ('student_io_dict["fc"]["output"]', 'teacher_io_dict["fc"]["output"]')


def classes(logits: Any) -> Tensor:
    """A target that suits the logits, if anything does."""
    shape = logits.shape if isinstance(logits, Tensor) else (3, 5, 4, 4)
    return torch.zeros((*shape[:1], *shape[2:]), dtype=torch.int64)


TOP = {"distillation_topk": 3, "distillation_alpha": 0.3, "distillation_add_tail": True}
OF_LOGITS: dict[str, tuple[Call, str, str]] = {
    "kd_loss": (lambda s, t: mdistiller.kd_loss(s, t, 4.0), "logits_student", "logits_teacher"),
    "KLDivergence": (mmrazor.KLDivergence(), "preds_S", "preds_T"),
    "ChannelWiseDivergence": (mmrazor.ChannelWiseDivergence(), "preds_S", "preds_T"),
    "DistillKL": (self_kd_lib.DistillKL(4.0), "y_s", "y_t"),
    "KDLoss": (lambda s, t: torchdistill.KDLoss(*LOGITS, 4.0)(io(fc=s), io(fc=t)), *SEEN),
    "KDLoss ": (
        lambda s, t: torchdistill.KDLoss(*LOGITS, 4.0, 0.3)(io(fc=s), io(fc=t), classes(s)),
        *SEEN,
    ),
    "LogitStdKDLoss": (
        lambda s, t: torchdistill.LogitStdKDLoss(*LOGITS, 4.0)(io(fc=s), io(fc=t)),
        *SEEN,
    ),
    "SimRegLoss": (lambda s, t: torchdistill.SimRegLoss(*LOGITS)(io(fc=s), io(fc=t)), *SEEN),
    "JSDivergenceLoss": (
        lambda s, t: torchdistill.JSDivergenceLoss(*LOGITS)(io(fc=s), io(fc=t)),
        *SEEN,
    ),
    "TopKDivergenceLoss": (
        lambda s, t: torchdistill.TopKDivergenceLoss(*LOGITS, k=3)(io(fc=s), io(fc=t)),
        *SEEN,
    ),
    "SDDropoutLoss": (
        lambda s, t: torchdistill.SDDropoutLoss("fc")(io(fc=(s, t))),
        f"{SEEN[0]}[0]",
        f"{SEEN[0]}[1]",
    ),
    "LogitDistillationTask": (
        lambda s, t: task_of(s, t),
        "the student's output",
        "the teacher's output",
    ),
    "generalized_jsd_loss": (trl.generalized_jsd_loss, "student_logits", "teacher_logits"),
    "generalized_jsd_loss ": (
        lambda s, t: trl.generalized_jsd_loss(s, t, reduction="none"),
        "student_logits",
        "teacher_logits",
    ),
    "compute_full_logit_self_distillation_loss": (
        lambda s, t: trl.compute_full_logit_self_distillation_loss(s, t, distillation_alpha=0.3),
        "student_logits",
        "teacher_logits",
    ),
    "compute_topk_self_distillation_loss": (
        lambda s, t: trl.compute_topk_self_distillation_loss(s, t, **TOP),
        "student_logits",
        "teacher_logits",
    ),
    "compute_divergence": (
        lambda s, t: trl.compute_divergence(s, t, 0.3),
        "student_log_probs",
        "teacher_log_probs",
    ),
}
OF_MAPS: dict[str, tuple[Call, str, str]] = {
    "at_loss": (lambda s, t: mdistiller.at_loss([s], [t], 2), "g_s[0]", "g_t[0]"),
    "ATLoss": (mmrazor.ATLoss(), "s_feature", "t_feature"),
    "ATLoss ": (
        lambda s, t: torchdistill.ATLoss(at_pairs())(io(a=s), io(a=t)),
        'student_io_dict["a"]["output"]',
        'teacher_io_dict["a"]["output"]',
    ),
}


class Anything(nn.Module):
    """Returns what it is given to return, as a teacher of timm."""

    def __init__(self, output: Any) -> None:
        super().__init__()
        self.output = output

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.output

    def normalize_input(self, x: Tensor, *args: Any) -> Tensor:
        return x


def task_of(student: Any, teacher: Any) -> Tensor:
    numbers = {"temperature": 3.0, "task_loss_weight": 0.3, "distill_loss_weight": 0.7}
    models = Anything(student), Anything(teacher)
    task = OurTask(*models, lambda z, y: torch.zeros(()), **numbers)
    return task(torch.zeros(1), None)["loss"]


def wrong_tensors(x: Tensor) -> dict[str, Any]:
    return {
        "None": None,
        "list": [1.0, 2.0],
        "list of tensors": [x],
        "tuple": (x, x),
        "dict": {"logits": x},
        "str": "logits",
        "number": 3.0,
        "flag": True,
        "NumPy array": x.detach().numpy(),
        "module": nn.Linear(2, 2),
        "int64": x.detach().long(),
        "complex": x.to(torch.complex64),
        "0-d": x.sum(),
        "one dimension": x.detach().flatten(),
        "one sample": x[:1],
        "other positions": x[..., :-1],
        "meta": x.detach().to("meta"),
        "inference of another rank": x.detach()[None],
    }


@pytest.mark.parametrize("of", ["student", "teacher"])
@pytest.mark.parametrize("name", [*OF_LOGITS, *OF_MAPS])
def test_wrong_tensors_get_a_sentence(name: str, of: str, generator: torch.Generator) -> None:
    """Every adapter, student and teacher: the sentence names the adapter and the argument."""
    call, *names = (OF_LOGITS | OF_MAPS)[name]
    student, teacher = draw(generator, 3, 5, 4, 4)
    for of_what, wrong in wrong_tensors(student.detach()).items():
        for attached in (teacher, teacher.detach()):
            pair = (wrong, attached) if of == "student" else (student, wrong)
            with pytest.raises((TypeError, ValueError)) as raised:
                call(*pair)
            text = str(raised.value)
            assert text.startswith(f"{name.strip()}: "), (of_what, text)
            assert any(each in text for each in names), (of_what, text)
            assert "expected" in text, (of_what, text)
            assert "\n" not in text, (of_what, text)


NUMBERS: dict[str, tuple[str, str, Callable[[Any], Any]]] = {
    "temperature of kd_loss": ("kd_loss", "temperature", lambda x: mdistiller.kd_loss(*ones(), x)),
    "p of at_loss": ("at_loss", "p", lambda x: mdistiller.at_loss(*([y] for y in maps()), x)),
    "tau of KLDivergence": ("KLDivergence", "tau", lambda x: mmrazor.KLDivergence(x)),
    "loss_weight of KLDivergence": (
        "KLDivergence",
        "loss_weight",
        lambda x: mmrazor.KLDivergence(loss_weight=x),
    ),
    "tau of CWD": ("ChannelWiseDivergence", "tau", lambda x: mmrazor.ChannelWiseDivergence(x)),
    "loss_weight of CWD": (
        "ChannelWiseDivergence",
        "loss_weight",
        lambda x: mmrazor.ChannelWiseDivergence(loss_weight=x),
    ),
    "loss_weight of ATLoss": ("ATLoss", "loss_weight", lambda x: mmrazor.ATLoss(x)),
    "T of DistillKL": ("DistillKL", "T", lambda x: self_kd_lib.DistillKL(x)),
    "temperature of KDLoss": ("KDLoss", "temperature", lambda x: torchdistill.KDLoss(*LOGITS, x)),
    "alpha of KDLoss": ("KDLoss", "alpha", lambda x: torchdistill.KDLoss(*LOGITS, 4.0, x)),
    "beta of KDLoss": ("KDLoss", "beta", lambda x: torchdistill.KDLoss(*LOGITS, 4.0, 0.5, x)),
    "label_smoothing of KDLoss": (
        "KDLoss",
        "label_smoothing",
        lambda x: torchdistill.KDLoss(*LOGITS, 4.0, label_smoothing=x),
    ),
    "eps of LogitStdKDLoss": (
        "LogitStdKDLoss",
        "eps",
        lambda x: torchdistill.LogitStdKDLoss(*LOGITS, 4.0, x),
    ),
    "beta of generalized_jsd_loss": (
        "generalized_jsd_loss",
        "beta",
        lambda x: trl.generalized_jsd_loss(*ones(), beta=x),
    ),
    "temperature of generalized_jsd_loss": (
        "generalized_jsd_loss",
        "temperature",
        lambda x: trl.generalized_jsd_loss(*ones(), temperature=x),
    ),
    "alpha of compute_divergence": (
        "compute_divergence",
        "alpha",
        lambda x: trl.compute_divergence(*ones(), x),
    ),
}
POSITIVE = [name for name in NUMBERS if name.split()[0] in ("temperature", "tau", "T")]


def ones() -> Pair:
    return torch.ones(2, 3), torch.eye(2, 3)


def maps() -> Pair:
    return torch.ones(2, 3, 2, 2), torch.arange(24.0).view(2, 3, 2, 2)


@pytest.mark.parametrize("name", NUMBERS)
def test_wrong_numbers_get_a_sentence(name: str) -> None:
    op, argument, call = NUMBERS[name]
    absent = [] if argument in ("alpha", "beta") else [None]
    wrong = [
        *absent,
        "4",
        [4.0],
        True,
        torch.ones(2),
        torch.ones(2).requires_grad_(),
        nn.Linear(2, 2),
    ]
    wrong += [0, -1.0, float("nan"), float("inf")] if name in POSITIVE else []
    for value in wrong:
        with pytest.raises((TypeError, ValueError)) as raised:
            call(value)
        assert str(raised.value).startswith(f"{op}: {argument} "), value
        assert "expected" in str(raised.value)
    for right in (np.float32(1), np.int64(1), torch.tensor(1.0), torch.tensor(1), 1, 1.0):
        call(right)


OPTIONS: dict[str, Callable[[], Any]] = {
    "kd_loss: reduce is": lambda: mdistiller.kd_loss(*ones(), 4.0, reduce="no"),
    "kd_loss: logit_stand is": lambda: mdistiller.kd_loss(*ones(), 4.0, logit_stand=None),
    "KLDivergence: teacher_detach is": lambda: mmrazor.KLDivergence(teacher_detach=None),
    'KLDivergence: reduction is the string "rows",': lambda: mmrazor.KLDivergence(reduction="rows"),
    "KLDivergence: reduction is None,": lambda: mmrazor.KLDivergence(reduction=None),
    "KDLoss: weight is": lambda: torchdistill.KDLoss(*LOGITS, 4.0, weight=[1.0]),
    "KDLoss: ignore_index is": lambda: torchdistill.KDLoss(*LOGITS, 4.0, ignore_index=0.5),
    "KDLoss: label_smoothing is 2,": lambda: torchdistill.KDLoss(*LOGITS, 4.0, label_smoothing=2),
    'generalized_jsd_loss: reduction is the string "rows",': lambda: trl.generalized_jsd_loss(
        *ones(), reduction="rows"
    ),
    "generalized_jsd_loss: labels is a list": lambda: trl.generalized_jsd_loss(*ones(), [0, 0]),
    r"generalized_jsd_loss: labels have shape \(3,\),": lambda: trl.generalized_jsd_loss(
        *ones(), torch.zeros(3, dtype=torch.int64)
    ),
    "generalized_jsd_loss: beta is 2,": lambda: trl.generalized_jsd_loss(*ones(), beta=2),
    "compute_topk_self_distillation_loss: distillation_topk is 4,": lambda: (
        trl.compute_topk_self_distillation_loss(*ones(), **TOP | {"distillation_topk": 4})
    ),
}


@pytest.mark.parametrize("sentence", OPTIONS)
def test_wrong_options_get_a_sentence(sentence: str) -> None:
    with pytest.raises((TypeError, ValueError), match=f"^{sentence}.* expected "):
        OPTIONS[sentence]()


TWO_DTYPES = [name for name in (OF_LOGITS | OF_MAPS) if name not in ("SDDropoutLoss", "SimRegLoss")]


@pytest.mark.parametrize(
    "dtypes", [(torch.float32, torch.bfloat16), (torch.float16, torch.float32)]
)
@pytest.mark.parametrize("name", TWO_DTYPES)
def test_two_dtypes(
    name: str, dtypes: tuple[torch.dtype, torch.dtype], generator: torch.Generator
) -> None:
    """A teacher of another dtype, whether it learns or not: as if it were of the wider."""
    call = (OF_LOGITS | OF_MAPS)[name][0]
    shape = (3, 5, 4, 4)
    student, teacher = (
        x.detach().to(dtype).requires_grad_()
        for x, dtype in zip(draw(generator, *shape), dtypes, strict=True)
    )
    expected = call(student.float(), teacher.float())
    for given in (teacher, teacher.detach()):
        loss = call(student, given)
        torch.testing.assert_close(loss.float(), expected, rtol=2e-3, atol=1e-6)
        loss.sum().backward()
    assert student.grad is not None
    assert student.grad.dtype == dtypes[0]
