"""SD-Dropout (arXiv 2208.05642): two dropout samples of the last features teach each other."""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.nn.functional as F
from selfkd import distill, sd_dropout_kl
from selfkd.nn import PreviousEpoch, SDDropout
from torch import Tensor

from . import data, metrics, train
from .grid import Claim, Setting, Study

CE, DROPOUT, SDD = "cross-entropy", "cross-entropy, dropout", "SD-Dropout"
FORWARD, REVERSE = "KL(p‖q) alone", "KL(q‖p) alone"
LS, CSKD, PSKD = "label smoothing", "CS-KD", "PS-KD"

# p, T and weight of SD-Dropout are 0.5, 3 and 1, the paper's, where nothing else is said.
WAYS: dict[str, dict[str, Any]] = {
    CE: {},
    DROPOUT: {"dropout": 0.5},
    SDD: {"sdd": {}},
    FORWARD: {"sdd": {"reverse_weight": 0}},
    REVERSE: {"sdd": {"forward_weight": 0}},
    f"{SDD}, detached": {"sdd": {"detach_target": True}},
    f"{FORWARD}, detached": {"sdd": {"reverse_weight": 0, "detach_target": True}},
    f"{REVERSE}, detached": {"sdd": {"forward_weight": 0, "detach_target": True}},
}
WEIGHTS = {f"{SDD}, weight {x}": {"sdd": {"kl_weight": x}} for x in (0.01, 0.03, 0.1, 0.3, 3)}
SWEEPS = {
    **WEIGHTS,
    **{f"{SDD}, T {x}": {"sdd": {"temperature": x}} for x in (1, 2, 6)},
    **{f"{SDD}, p {x}": {"sdd": {"p": x}} for x in (0.1, 0.3, 0.7)},
}
HOSTS = {LS: {"smoothing": 0.1}, CSKD: {"cskd": 1.0}, PSKD: {"pskd": 0.8}}
ON_TOP = {  # the weight that the authors take beside other methods
    f"{host} + {SDD}, weight 0.1": {**options, "sdd": {"kl_weight": 0.1}}
    for host, options in HOSTS.items()
}
LONGER = {
    f"{CE}, twice the epochs": {"longer": 2},
    f"{SDD}, twice the epochs": {"longer": 2, "sdd": {}},
}
MAIN = {name: WAYS[name] for name in (CE, DROPOUT, SDD)}
LIGHT = {f"{SDD}, weight 0.1": WEIGHTS[f"{SDD}, weight 0.1"]}
OF_TASKS = {
    "few": {**WAYS, **SWEEPS, **HOSTS, **ON_TOP, **LONGER},
    "wrong20": {**WAYS, **LIGHT, **HOSTS, **ON_TOP},
    "wrong40": {**MAIN, **LIGHT, **HOSTS},
    "many": {**MAIN, **LIGHT, **HOSTS},
}


class Method:
    """A loss of network, indices, images and labels, as a setting's options describe it."""

    def __init__(self, network: train.Network, split: data.Split, options: dict[str, Any]) -> None:
        self.network, self.split, self.options = network, split, options
        self.sdd = SDDropout(
            network.head,
            label_smoothing=options.get("smoothing", 0.0),
            **options.get("sdd", {"kl_weight": 0}),
        )
        self.previous = PreviousEpoch(len(split.labels), data.CLASSES)

    def loss(self, index: Tensor, epoch: int, epochs: int) -> Tensor:
        """The loss of a batch."""
        images, labels = self.split.images[index], self.split.labels[index]
        features = self.network.features(images)
        if "dropout" in self.options:
            return distill(self.network.head(F.dropout(features, self.options["dropout"])), labels)
        if "pskd" in self.options:
            return self.of_previous_epoch(features, index, epoch, self.options["pskd"] / epochs)
        _, loss = self.sdd(features, labels, return_logits=False)
        if "cskd" in self.options:
            with torch.no_grad():
                teacher = self.network(self.split.images[self.others(labels)])
            weight = self.options["cskd"]
            z = self.network.head(features)
            loss = loss + distill(z, teachers=teacher, teacher_weights=weight, temperature=4)
        return loss

    def others(self, labels: Tensor) -> Tensor:
        """Indices of images, each of the class of a label, at random."""
        same = self.split.labels == labels[:, None]
        return same.double().multinomial(1).squeeze(1)

    def of_previous_epoch(
        self, features: Tensor, index: Tensor, epoch: int, growth: float
    ) -> Tensor:
        """PS-KD, whose weight grows with the epochs, and SD-Dropout's divergence beside it."""
        if epoch > self.previous.epochs:
            self.previous.end_epoch()
        logits, labels, weight = self.network.head(features), self.split.labels[index], 0.0
        known = self.previous.lookup(index)
        if known is not None:
            weight = growth * (epoch + 1)
        self.previous.update(index, logits)
        loss = distill(
            logits,
            labels,
            known if known is not None else (),
            ce_weight=1 - weight,
            teacher_weights=weight,
            temperature=1,
            teacher_kind="probs",
        )
        if "sdd" in self.options:
            u, v = (self.network.head(F.dropout(features, self.sdd.p)) for _ in "uv")
            loss = loss + self.sdd.kl_weight * sd_dropout_kl(u, v)
        return loss


def fit(split: data.Split, options: dict[str, Any], seed: int, part: float) -> train.Network:
    """Train a network as the options say."""
    torch.manual_seed(seed)
    network = train.Network()
    method = Method(network, split, options)
    epochs = train.epochs_of(split.labels, options.get("longer", 1) * part)
    for epoch, index in train.training([network], len(split.labels), epochs, seed):
        method.loss(index, epoch, epochs).backward()
    return network


def run(setting: Setting, seed: int, part: float) -> dict[str, float]:
    """Train and measure."""
    split = data.split(setting.task, seed)
    return metrics.evaluate(fit(split, dict(setting.options), seed, part), split, seed)


better = functools.partial(Claim, task="few", metric="accuracy")
STUDY = Study(
    name="sd_dropout",
    title="SD-Dropout",
    tasks=data.IN_WORDS,
    metrics=metrics.CLASSIFICATION,
    headline=SDD,
    baselines=(CE, DROPOUT),
    grid=[Setting(task, *pair) for task, ways in OF_TASKS.items() for pair in ways.items()],
    claims=[
        better("It generalises better, few labels", SDD, CE),
        better("... than the same dropout in the cross-entropy", SDD, DROPOUT),
        better("... if both train for twice the epochs", *list(LONGER)[::-1]),
        better("It generalises better, many labels", SDD, CE, task="many"),
        better("It generalises better, 20 % wrong labels", SDD, CE, task="wrong20"),
        better("It generalises better, 40 % wrong labels", SDD, CE, task="wrong40"),
        better("Both directions are better than KL(p‖q) alone", SDD, FORWARD),
        better("Both directions are better than KL(q‖p) alone", SDD, REVERSE),
        better("The target must not be detached", SDD, f"{SDD}, detached"),
        better("It is better calibrated", SDD, CE, metric="ece"),
        better("... with the weight 0.1", *LIGHT, CE, metric="ece"),
        better("... after temperature scaling of both", SDD, CE, metric="ece_scaled"),
        better("Its likelihood is better after scaling of both", SDD, CE, metric="nll_scaled"),
        better("It withstands FGSM better", SDD, CE, metric="fgsm"),
        better("It withstands PGD better", SDD, CE, metric="pgd"),
        better("It tells photographs from digits better", SDD, CE, metric="photographs"),
        better("... by ODIN's score", SDD, CE, metric="odin_photographs"),
        better("It tells spliced digits from digits better", SDD, CE, metric="spliced"),
        better("... by ODIN's score", SDD, CE, metric="odin_spliced"),
        *(better(f"It withstands {x} better", SDD, CE, metric=x) for x in data.CORRUPTIONS),
        *(better(f"It improves {x}", y, x) for x, y in zip(HOSTS, ON_TOP, strict=True)),
        *(better(f"It is better than {host}", SDD, host) for host in HOSTS),
    ],
    drawn=("accuracy", "ece", "fgsm", "spliced"),
    run=run,
)
