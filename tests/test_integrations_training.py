"""A real training through each toolkit: the curve with our loss is that with the loss in plain PyTorch."""

from __future__ import annotations

import csv
import importlib.util
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from selfkd.integrations import torchdistill, transformers
from test_integrations import Pair, kl
from torch import Tensor, nn


def assert_curves(ours: list[float], theirs: list[float], without: list[float]) -> None:
    """Ours is theirs, and not the one of weight 0."""
    assert len(ours) == len(theirs) == len(without) >= 20
    apart = [abs(a / b - 1) for a, b in zip(ours, theirs, strict=True)]
    assert max(apart) < 1e-4
    assert sum(ours[-8:]) < sum(ours[:8])
    assert abs(ours[0] / without[0] - 1) > 1e-2


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
        "std": ("LogitStdKDLoss", kd | {"temperature": 2.0, "beta": weight}, 0.1),
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
    for name in (name for name in torchdistill.__all__ if name.endswith("Loss")):
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


def plain_loss(
    z: Tensor, t: Tensor, labels: Tensor, count: Tensor, weight: float, smoothing: float
) -> Tensor:
    """What the mixin computes, in plain PyTorch; causal models have logits for each position."""
    if z.ndim == 3:
        z, t, labels = z[:, :-1], t[:, :-1], labels[:, 1:]
    z, t, labels = z[labels != -100], t[labels != -100], labels[labels != -100]
    hard = F.cross_entropy(z, labels, reduction="sum", label_smoothing=smoothing)
    soft = SETTINGS.temperature**2 * kl(z, t, SETTINGS.temperature, "sum")
    return (hard + weight * soft) / count


def trainer_run(
    make: Callable[..., Any],
    kind: str,
    folder: Path,
    weight: float,
    *,
    accumulated: int = 2,
    smoothing: float = 0.0,
) -> list[float]:
    """Losses of a Trainer with "our" mixin, in "plain" PyTorch or with its "own": all batches; evaluation."""
    from transformers import Trainer, TrainingArguments, set_seed

    rows, model = make(torch.Generator().manual_seed(1))
    set_seed(0)
    teacher, student = model(32, POINTED), model(16, 0.02)
    losses: list[float] = []

    class Own(Trainer):
        def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
            loss = super().training_step(*args, **kwargs)
            losses.append(loss.item())
            return loss

    class Plain(Own):
        loss_is_scaled_for_ga = True

        def compute_loss(
            self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = 0
        ) -> Any:
            outputs, t = model(inputs["input_ids"]), teacher.eval()(inputs["input_ids"])
            found = outputs.logits, t.logits.detach(), inputs["labels"]
            loss = plain_loss(*found, num_items_in_batch, weight, smoothing)
            return (loss, outputs) if return_outputs else loss

    class Our(transformers.DistillMixin, Own):
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
    options = {"teacher": teacher, "teacher_weight": weight, "temperature": SETTINGS.temperature}
    trainer = {"our": Our, "plain": Plain, "own": Own}[kind](
        student, arguments, train_dataset=rows, **(options if kind == "our" else {})
    )
    trainer.train()
    assert len(losses) == SETTINGS.steps * accumulated
    evaluated = trainer.evaluate(rows[:8])["eval_loss"]
    return [*losses, evaluated / accumulated]  # as much as a batch counts


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
        trainer_run(make, kind, tmp_path, weight, smoothing=smoothing)
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
        trainer_run(make, kind, tmp_path, weight, accumulated=accumulated)
        for kind, weight in (("our", 0.0), ("own", 0.0), ("our", 0.8))
    ]
    assert_curves(*runs)


@pytest.mark.skipif(
    importlib.util.find_spec("lightning") is None, reason="needs: pip install lightning"
)
def test_lightning_training(example: Callable[..., str]) -> None:
    """The example, in plain PyTorch and with the fused loss."""
    example("lightning_distill", "--control", "--steps", 40)
    with Path("runs/lightning.csv").open() as file:
        rows = list(csv.DictReader(file))
    names = ("fused", "reference", "weight 0")
    assert_curves(*([float(row[name]) for row in rows] for name in names))
