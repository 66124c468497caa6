"""FRSKD (arXiv 2103.08273): a classifier learns from a self-teacher that refines its own maps."""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.nn.functional as F
from selfkd import attention, distill, sd_dropout_kl
from selfkd.nn import BiFPN, FRSKDLoss
from torch import Tensor, nn

from . import data, metrics, train
from .grid import Claim, Setting, Study

CE, TEACHER, SOFT, FULL = "cross-entropy", "self-teacher alone", "FRSKD without features", "FRSKD"
ALPHA, TEMPERATURE = 2.0, 4.0  # the authors', of ResNet-18 on CIFAR-100
# The feature loss is a mean over the positions of each map, 32, 16, 8 and 4 wide there; here they are 8, 4
# and 2 wide, so that as much weight on a position is a smaller beta.
AUTHORS_BETA = 100.0
BETA = AUTHORS_BETA * sum(n**-2 for n in (32, 16, 8, 4)) / sum(n**-2 for n in (8, 4, 2))
AUTHORS = f"{FULL}, beta {AUTHORS_BETA:.0f}"
FEATURES = "FRSKD without soft labels"
WIDTHS = (16, 32, 64)  # half of the other studies': the self-teacher takes most of the time
MIXES = {"mixup": 0.2, "CutMix": 1.0}  # the authors' parameters of the share's distribution

WAYS: dict[str, dict[str, Any]] = {
    CE: {},
    TEACHER: {"alpha": 0.0, "beta": 0.0},
    SOFT: {"alpha": ALPHA, "beta": 0.0},
    FEATURES: {"alpha": 0.0, "beta": BETA},
    FULL: {"alpha": ALPHA, "beta": BETA},
    AUTHORS: {"alpha": ALPHA, "beta": AUTHORS_BETA},
    "SD-Dropout": {"sdd": 1.0},
    f"{FULL} + SD-Dropout, weight 0.1": {"alpha": ALPHA, "beta": BETA, "sdd": 0.1},
}
AUGMENTED = {
    f"{name}{plus}": {**WAYS[name], "augment": plus.removeprefix(" + ")}
    for plus in (*(f" + {mix}" for mix in MIXES), " + SLA")
    for name in (CE, FULL)
}
NOISY = {name: WAYS[name] for name in (CE, TEACHER, SOFT, FULL, "SD-Dropout")}
OF_TASKS = {"few": {**WAYS, **AUGMENTED}, "wrong20": NOISY}


def mixed(
    images: Tensor, labels: Tensor, mix: str, generator: torch.Generator
) -> tuple[Tensor, tuple[Tensor, Tensor, float]]:
    """Mix every image with another, and give both labels with the first one's share."""
    order = torch.randperm(len(images), generator=generator)
    a = torch.full((2,), MIXES[mix])
    share = torch._sample_dirichlet(a, generator=generator)[0].item()  # Beta(a, a)
    if mix == "mixup":
        images = share * images + (1 - share) * images[order]
    else:
        side = round(8 * (1 - share) ** 0.5)
        top, left = torch.randint(9 - side, (2,), generator=generator).tolist()
        images, rows, columns = images.clone(), slice(top, top + side), slice(left, left + side)
        images[..., rows, columns] = images[order][..., rows, columns]
        share = 1 - side**2 / 64
    return images, (labels, labels[order], share)


class Rotations(nn.Module):
    """What self-supervised label augmentation adds: heads that also name the turn of an image."""

    def __init__(self, *widths: int) -> None:
        super().__init__()
        self.heads = nn.ModuleList(nn.Linear(width, 4 * data.CLASSES) for width in widths)

    def forward(self, k: int, last: Tensor) -> tuple[Tensor, Tensor]:
        """Logits (4B, 4K) of turned images, and their mean as (B, K), by head k."""
        joint = self.heads[k](last.mean((2, 3)))
        rows = joint.view(len(joint) // 4, 4, data.CLASSES, 4)
        return joint, rows.diagonal(dim1=1, dim2=3).mean(-1)


def turned(images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Turn each image by 0, 90, 180 and 270 degrees; the labels name class and turn."""
    images = torch.stack([images.rot90(r, (2, 3)) for r in range(4)], 1).flatten(0, 1)
    return images, torch.stack([4 * labels + r for r in range(4)], 1).flatten()


class Method:
    """A loss of images and labels, as a setting's options describe it."""

    def __init__(self, network: train.Network, options: dict[str, Any], seed: int) -> None:
        self.network, self.options = network, options
        self.generator = torch.Generator().manual_seed(seed)
        self.modules: list[nn.Module] = [network]
        widths = [network.widths[-1]]
        if "alpha" in options:
            self.teacher = BiFPN(network.widths, data.CLASSES)
            self.criterion = FRSKDLoss(options["alpha"], options["beta"], TEMPERATURE)
            self.modules.append(self.teacher)
            widths.append(2 * widths[0])
        if options.get("augment") == "SLA":
            self.rotations = Rotations(*widths)
            self.modules.append(self.rotations)

    def loss(self, images: Tensor, labels: Tensor) -> Tensor:
        """The loss of a batch."""
        augment = self.options.get("augment")
        if augment == "SLA":
            taught = "alpha" in self.options
            return self.with_turns(images, labels) if taught else self.turns_alone(images, labels)
        target: Any = labels
        if augment:
            images, target = mixed(images, labels, augment, self.generator)
        maps = self.network.maps(images)
        features = maps[-1].mean((2, 3))
        logits = self.network.head(features)
        if "alpha" in self.options:
            refined, taught = self.teacher(maps)
            loss, _ = self.criterion(logits, taught, maps, refined, target)
        else:
            pairs = [(1.0, labels)]
            if augment:
                pairs = [(target[2], target[0]), (1 - target[2], target[1])]
            loss = sum((distill(logits, y, ce_weight=share) for share, y in pairs), torch.zeros(()))
        if "sdd" in self.options:
            u, v = (self.network.head(F.dropout(features, 0.5)) for _ in "uv")
            loss = loss + self.options["sdd"] * sd_dropout_kl(u, v)
        return loss

    def turns_alone(self, images: Tensor, labels: Tensor) -> Tensor:
        """SLA without a self-teacher: the network also learns from the mean over its four views."""
        logits = self.network(images)
        all_turns, joint = turned(images, labels)
        found, mean = self.rotations(0, self.network.maps(all_turns)[-1])
        return distill(logits, labels, mean.detach()) + distill(found, joint)

    def with_turns(self, images: Tensor, labels: Tensor) -> Tensor:
        """FRSKD with SLA; docs/losses.md writes out the same."""
        alpha, beta = self.options["alpha"], self.options["beta"]
        all_turns, joint = turned(images, labels)
        maps, maps_turned = self.network.maps(images), self.network.maps(all_turns)
        (refined, t), (refined_turned, _) = self.teacher(maps), self.teacher(maps_turned)
        z = self.network.head(maps[-1].mean((2, 3)))
        (a, mean_a), (c, mean_c) = (
            self.rotations(0, maps_turned[-1]),
            self.rotations(1, refined_turned[-1]),
        )
        half = alpha / 2
        loss = distill(z, labels, (t.detach(), mean_a.detach()), teacher_weights=(half, 1.0))
        loss = loss + distill(t, labels, mean_c.detach())
        loss = loss + distill(mean_a, teachers=mean_c.detach(), teacher_weights=half)
        loss = loss + distill(a, joint) + distill(c, joint)
        for f, g, f_turned, g_turned in zip(
            maps, refined, maps_turned, refined_turned, strict=True
        ):
            transfer = attention(f, g.detach()) + 4 * attention(f_turned, g_turned.detach())
            loss = loss + beta / 5 * transfer
        return loss


def fit(split: data.Split, options: dict[str, Any], seed: int, part: float) -> train.Network:
    """Train a network as the options say."""
    torch.manual_seed(seed)
    network = train.Network(WIDTHS)
    method = Method(network, options, seed)
    epochs = train.epochs_of(split.labels, part)
    for _, index in train.training(method.modules, len(split.labels), epochs, seed):
        method.loss(split.images[index], split.labels[index]).backward()
    return network


def run(setting: Setting, seed: int, part: float) -> dict[str, float]:
    """Train and measure."""
    split = data.split(setting.task, seed)
    return metrics.evaluate(fit(split, dict(setting.options), seed, part), split, seed)


better = functools.partial(Claim, task="few", metric="accuracy")
STUDY = Study(
    name="frskd",
    title="FRSKD",
    tasks={task: data.IN_WORDS[task] for task in OF_TASKS},
    metrics=metrics.CLASSIFICATION,
    headline=FULL,
    baselines=(CE, TEACHER),
    grid=[Setting(task, *pair) for task, ways in OF_TASKS.items() for pair in ways.items()],
    claims=[
        better("It generalises better", FULL, CE),
        better("... 20 % wrong labels", FULL, CE, task="wrong20"),
        better("... than the self-teacher as a second branch alone", FULL, TEACHER),
        better("Soft labels alone help", SOFT, CE),
        better("Features help beside soft labels", FULL, SOFT),
        better("The authors' beta is better than one scaled to the maps", AUTHORS, FULL),
        *(
            better(f"It helps on top of {mix}", f"{FULL} + {mix}", f"{CE} + {mix}")
            for mix in (*MIXES, "SLA")
        ),
        better("SD-Dropout improves it", f"{FULL} + SD-Dropout, weight 0.1", FULL),
        better("It is better than SD-Dropout", FULL, "SD-Dropout"),
        better("It is better calibrated", FULL, CE, metric="ece"),
    ],
    drawn=("accuracy", "ece", "fgsm", "spliced"),
    run=run,
)
