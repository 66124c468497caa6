"""selfkd.integrations: each toolkit's own names and values, and a training through each that is installed."""

from __future__ import annotations

import csv
import importlib.util
import inspect
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT
from selfkd.integrations import mdistiller, mmrazor, torchdistill, transformers
from torch import Tensor, nn

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


def assert_curves(ours: list[float], theirs: list[float], without: list[float]) -> None:
    """Ours is theirs, and not the one of weight 0."""
    assert len(ours) == len(theirs) == len(without) >= 20
    apart = [abs(a / b - 1) for a, b in zip(ours, theirs, strict=True)]
    assert max(apart) < 1e-4
    assert sum(ours[-8:]) < sum(ours[:8])
    assert abs(ours[0] / without[0] - 1) > 1e-2


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


class Views(nn.Module):
    """Two dropout samples and the logits of one head."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(32, 10)

    def forward(self, x: Tensor) -> Pair:
        return self.fc(F.dropout(x)), self.fc(F.dropout(x))


class Net(nn.Module):
    """A network on 64 pixels, with a module for each thing that a loss looks at."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Sequential(nn.Conv2d(1, 8, 3, padding=1), nn.SiLU())
        self.features = nn.Sequential(nn.Flatten(), nn.Linear(512, 32), nn.SiLU())
        self.views = Views()

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.features(self.conv(x.view(-1, 1, 8, 8)))
        self.views(hidden)
        return self.views.fc(hidden)


def digits() -> torch.utils.data.TensorDataset:
    data = pytest.importorskip("sklearn.datasets").load_digits()
    pixels, labels = torch.from_numpy(data.images), torch.from_numpy(data.target)
    return torch.utils.data.TensorDataset(pixels.float() / 16, labels)


AT_PAIRS = {
    "conv": {
        "student": {"path": "conv", "io": "output"},
        "teacher": {"path": "conv", "io": "output"},
        "weight": 5,
    }
}
WHERE = {
    "student_module_path": "features",
    "student_module_io": "output",
    "teacher_module_path": "features",
    "teacher_module_io": "output",
}


class PlainSDDropout(nn.Module):
    """:class:`selfkd.integrations.torchdistill.SDDropoutLoss` in plain PyTorch."""

    def __init__(self, student_module_path: str) -> None:
        super().__init__()
        self.path = student_module_path

    def forward(self, student_io_dict: Any, *args: Any) -> Tensor:
        u, v = student_io_dict[self.path]["output"]
        return 9 * (kl(u, v, 3.0, "batchmean") + kl(v, u, 3.0, "batchmean"))


class PlainSimReg(nn.Module):
    """:class:`selfkd.integrations.torchdistill.SimRegLoss` in plain PyTorch."""

    def __init__(self, **where: str) -> None:
        super().__init__()

    def forward(self, student_io_dict: Any, teacher_io_dict: Any, *args: Any) -> Tensor:
        student, teacher = (d["features"]["output"] for d in (student_io_dict, teacher_io_dict))
        return (2 - 2 * F.cosine_similarity(student, teacher, dim=1)).mean()


def torchdistill_run(prefix: str, weight: float) -> list[float]:
    """Losses of a training by torchdistill's own loop, its configuration and its losses or ours."""
    from torchdistill.core.distillation import get_distillation_box

    logits = {name: {"path": "views.fc", "io": "output"} for name in ("student", "teacher")}
    kd = {f"{side}_module_{key}": value[key] for side, value in logits.items() for key in value}
    terms = {
        "kd": ("KDLoss", kd | {"temperature": 4.0, "alpha": 0.5, "beta": 0.5 * weight}, 1.0),
        "at": ("ATLoss", {"at_pairs": AT_PAIRS, "mode": "code"}, 100 * weight),
        "sd": ("SDDropoutLoss", {"student_module_path": "views"}, weight),
        "simreg": ("SimRegLoss", WHERE, weight),
    }
    sub_terms = {
        name: {"criterion": {"key": prefix + key, "kwargs": kwargs}, "weight": factor}
        for name, (key, kwargs, factor) in terms.items()
    }
    modules = ["conv", "features", "views", "views.fc"]
    seen = {"forward_hook": {"output": modules}, "forward_proc": "forward_batch_only"}
    config = {
        "num_epochs": 1,
        "train_data_loader": {
            "dataset_id": "train",
            "sampler": {"class_or_func": torch.utils.data.RandomSampler},
            "kwargs": {"batch_size": 32, "drop_last": True},
        },
        "teacher": {**seen, "requires_grad": False},
        "student": seen,
        "optimizer": {"key": "SGD", "kwargs": {"lr": 0.1, "momentum": 0.9}},
        "criterion": {"key": "WeightedSumLoss", "kwargs": {"sub_terms": sub_terms}},
    }
    torch.manual_seed(0)
    teacher, student = Net().eval(), Net()
    cpu, losses = torch.device("cpu"), []
    box = get_distillation_box(teacher, student, {"train": digits()}, config, cpu, None, False, 1)
    box.pre_epoch_process(epoch=0)
    for pixels, labels, extra in box.train_data_loader:
        loss = box.forward_process(pixels, labels, extra)
        box.post_forward_process(loss)
        losses.append(loss.item())
    return losses


def test_torchdistill_training() -> None:
    """One configuration, with its keys and with ours; what it has no loss for is plain PyTorch."""
    pytest.importorskip(
        "torchdistill",
        reason="torchdistill needs torchvision, which comes with CUDA builds of PyTorch: `make compat`",
    )
    from torchdistill.common.main_util import import_dependencies
    from torchdistill.losses.registry import MIDDLE_LEVEL_LOSS_DICT, register_mid_level_loss

    import_dependencies(["selfkd.integrations.torchdistill"])
    for name in ("KDLoss", "ATLoss", "SDDropoutLoss", "SimRegLoss"):
        assert MIDDLE_LEVEL_LOSS_DICT[f"selfkd.{name}"] is getattr(torchdistill, name)
    assert MIDDLE_LEVEL_LOSS_DICT["KDLoss"] is not torchdistill.KDLoss
    register_mid_level_loss(PlainSDDropout, key="SDDropoutLoss")
    register_mid_level_loss(PlainSimReg, key="SimRegLoss")
    runs = [torchdistill_run(prefix, 1.0) for prefix in ("selfkd.", "")]
    assert_curves(*runs, torchdistill_run("selfkd.", 0.0))


SETTINGS = SimpleNamespace(temperature=2.0, steps=24, length=12, vocabulary=40)
POINTED = 0.4  # standard deviation of parameters that gives a teacher opinions


def language_data(generator: torch.Generator) -> tuple[list[dict[str, Tensor]], Callable[..., Any]]:
    """Sentences that count up in steps of their own, prompts without labels; and a small GPT-2."""
    from transformers import GPT2Config, GPT2LMHeadModel

    rows = []
    for step in torch.randint(1, 4, (64,), generator=generator).tolist():
        ids = torch.arange(0, step * SETTINGS.length, step) % SETTINGS.vocabulary
        hidden = int(torch.randint(0, 7, (), generator=generator))
        labels = torch.where(torch.arange(SETTINGS.length) < hidden, -100, ids)
        rows.append({"input_ids": ids, "labels": labels})

    def model(width: int, deviation: float) -> nn.Module:
        sizes = {"n_positions": SETTINGS.length, "n_layer": 1, "n_head": 2, "n_embd": width}
        sizes |= {"vocab_size": SETTINGS.vocabulary, "bos_token_id": 0, "eos_token_id": 0}
        return GPT2LMHeadModel(GPT2Config(**sizes, initializer_range=deviation))

    return rows, model


def sentence_data(generator: torch.Generator) -> tuple[list[dict[str, Tensor]], Callable[..., Any]]:
    """Sentences of one of three words, which is their class; and a small BERT."""
    from transformers import BertConfig, BertForSequenceClassification

    rows = []
    for label in torch.randint(0, 3, (64,), generator=generator):
        ids = torch.randint(10, SETTINGS.vocabulary, (SETTINGS.length,), generator=generator)
        rows.append({"input_ids": torch.where(ids < 20, label, ids), "labels": label})

    def model(width: int, deviation: float) -> nn.Module:
        sizes = {"hidden_size": width, "num_hidden_layers": 1, "num_attention_heads": 2}
        sizes |= {"vocab_size": SETTINGS.vocabulary, "intermediate_size": 32, "num_labels": 3}
        return BertForSequenceClassification(BertConfig(**sizes, initializer_range=deviation))

    return rows, model


def trainer_run(
    make: Callable[..., Any],
    kind: str,
    folder: Path,
    *,
    accumulated: int = 2,
    smoothing: float = 0.0,
    **options: float,
) -> list[float]:
    """Losses of a Trainer with "our" mixin, in "plain" PyTorch or with its "own": all batches; evaluation."""
    from transformers import Trainer, TrainingArguments, set_seed

    rows, model = make(torch.Generator().manual_seed(1))
    set_seed(0)
    teacher, student = model(32, POINTED), model(16, 0.02)
    losses: list[float] = []

    class Recorder(Trainer):
        def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
            loss = super().training_step(*args, **kwargs)
            losses.append(loss.item())
            return loss

    class Plain(Recorder):
        loss_is_scaled_for_ga = True

        def compute_loss(
            self,
            model: Any,
            inputs: Any,
            return_outputs: bool = False,
            num_items_in_batch: Any = None,
        ) -> Any:
            labels, shown = inputs["labels"], {"input_ids": inputs["input_ids"]}
            outputs, t = model(**shown), teacher.eval()(**shown).logits.detach()
            z = outputs.logits
            if z.ndim == 3:
                z, t, labels = (
                    z[:, :-1].flatten(0, 1),
                    t[:, :-1].flatten(0, 1),
                    labels[:, 1:].flatten(),
                )
            z, t, labels = z[labels != -100], t[labels != -100], labels[labels != -100]
            hard = F.cross_entropy(z, labels, reduction="sum", label_smoothing=smoothing)
            soft = SETTINGS.temperature**2 * kl(z, t, SETTINGS.temperature, "sum")
            loss = (hard + options["teacher_weight"] * soft) / num_items_in_batch
            return (loss, outputs) if return_outputs else loss

    class Ours(transformers.DistillMixin, Recorder):
        pass

    arguments = TrainingArguments(
        str(folder),
        per_device_train_batch_size=4,
        gradient_accumulation_steps=accumulated,
        max_steps=SETTINGS.steps,
        learning_rate=3e-3,
        label_smoothing_factor=smoothing,
        use_cpu=True,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
    )
    if kind == "our":
        options = {"teacher": teacher, "temperature": SETTINGS.temperature, **options}
        trainer: Trainer = Ours(student, arguments, train_dataset=rows, **options)
    else:
        trainer = {"plain": Plain, "own": Recorder}[kind](student, arguments, train_dataset=rows)
    trainer.train()
    assert len(losses) == SETTINGS.steps * accumulated
    return [
        *losses,
        trainer.evaluate(rows[:8])["eval_loss"] / accumulated,
    ]  # as much as a batch counts


needs_transformers = pytest.mark.skipif(
    importlib.util.find_spec("transformers") is None,
    reason="needs: pip install transformers accelerate",
)


@needs_transformers
@pytest.mark.parametrize("make", [language_data, sentence_data])
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_transformers_training(make: Callable[..., Any], smoothing: float, tmp_path: Path) -> None:
    """The curve of the loss in plain PyTorch, with gradients of two batches accumulated."""
    runs = [
        trainer_run(make, kind, tmp_path, smoothing=smoothing, teacher_weight=weight)
        for kind, weight in (("our", 0.8), ("plain", 0.8), ("our", 0.0))
    ]
    assert_curves(*runs)


@needs_transformers
@pytest.mark.parametrize(("make", "accumulated"), [(language_data, 2), (sentence_data, 1)])
def test_transformers_without_a_teacher(
    make: Callable[..., Any], accumulated: int, tmp_path: Path
) -> None:
    """The curve of the Trainer's own loss.

    Its classifiers' own loss is not divided by the batches that are accumulated (transformers issue 47688).
    """
    runs = [
        trainer_run(make, kind, tmp_path, accumulated=accumulated, teacher_weight=weight)
        for kind, weight in (("our", 0.0), ("own", 0.0), ("our", 0.8))
    ]
    assert_curves(*runs)


@pytest.mark.skipif(
    importlib.util.find_spec("lightning") is None, reason="needs: pip install lightning"
)
def test_lightning_training(tmp_path: Path) -> None:
    """The example, in plain PyTorch and with the fused loss."""
    command = [sys.executable, ROOT / "examples" / "lightning_distill.py", "--control"]
    done = subprocess.run(
        [*command, "--steps", "100"], cwd=tmp_path, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stdout + done.stderr
    with (tmp_path / "runs" / "lightning.csv").open() as file:
        rows = list(csv.DictReader(file))
    names = ("fused", "reference", "weight 0")
    assert_curves(*([float(row[name]) for row in rows] for name in names))
