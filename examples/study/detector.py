"""SD-Dropout in a detector: the two samples are of a map of classes, and positions have weights."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from selfkd import distill, sd_dropout_kl
from torch import Tensor, nn

from . import data, metrics, train
from .grid import Claim, Metric, Setting, Study

SIDE, CELL, DIGIT = 24, 4, 8  # pixels: of a canvas, of a position of the map, of a digit
BACKGROUND = data.CLASSES
WIDTH = 128  # of the features that are dropped
EPOCHS, BATCH, CANVASES, TESTED = 12, 25, 1000, 300
CE, DROPOUT, SDD = "cross-entropy", "cross-entropy, dropout", "SD-Dropout"
WAYS: dict[str, dict[str, Any]] = {
    CE: {},
    DROPOUT: {"dropout": True},
    SDD: {"sdd": {}},
    f"{SDD}, weight 0.1": {"sdd_weight": 0.1, "sdd": {}},
    f"{SDD}, detached": {"sdd": {"detach_target": True}},
    f"{SDD}, positions alike": {"sdd": {}, "alike": True},
    f"{CE}, twice the epochs": {"longer": 2},
    f"{SDD}, twice the epochs": {"longer": 2, "sdd": {}},
}


@dataclass(frozen=True)
class Scenes:
    """Canvases (N, 1, 24, 24), classes of their positions (N, 6, 6), offsets (N, 2, 6, 6) of centres."""

    images: Tensor
    classes: Tensor  # BACKGROUND where no digit has its centre
    offsets: Tensor  # from the middle of a position to the centre, in positions


def drawn(images: Tensor, labels: Tensor, count: int, generator: torch.Generator) -> Scenes:
    """Put one to three digits on each canvas, at even pixels, which do not overlap."""
    places = SIDE // CELL
    canvases = torch.zeros(count, 1, SIDE, SIDE)
    classes = torch.full((count, places, places), BACKGROUND)
    offsets = torch.zeros(count, 2, places, places)
    for n in range(count):
        wanted, corners = int(torch.randint(1, 4, (), generator=generator)), []
        while len(corners) < wanted:
            corner = 2 * torch.randint((SIDE - DIGIT) // 2 + 1, (2,), generator=generator)
            if all((corner - other).abs().max() >= DIGIT for other in corners):
                corners.append(corner)
            elif torch.rand((), generator=generator) < 0.05:
                corners.clear()  # no room may be left
        for corner in corners:
            k = int(torch.randint(len(labels), (), generator=generator))
            (top, left), centre = corner.tolist(), (corner + DIGIT / 2) / CELL
            canvases[n, 0, top : top + DIGIT, left : left + DIGIT] = images[k, 0]
            row, column = centre.long().tolist()
            classes[n, row, column] = labels[k]
            offsets[n, :, row, column] = centre - centre.long() - 0.5
    return Scenes(canvases, classes, offsets)


@functools.lru_cache(2)
def scenes(seed: int) -> tuple[Scenes, Scenes]:
    """Return what is trained on and what is tested on, of different digits."""
    split, generator = data.split("few", seed), torch.Generator().manual_seed(seed)
    return (
        drawn(split.images, split.labels, CANVASES, generator),
        drawn(split.test, split.test_labels, TESTED, generator),
    )


class Detector(nn.Module):
    """Convolutions to a quarter of the size; of every position logits and the offset of a centre."""

    def __init__(self) -> None:
        super().__init__()
        self.network = train.Network((16, 32, 64))
        self.context = train.stage(64, 64, 1)
        self.wide = nn.Sequential(
            nn.Conv2d(64, WIDTH, 1, bias=False), nn.BatchNorm2d(WIDTH), nn.ReLU()
        )
        self.classes = nn.Conv2d(WIDTH, data.CLASSES + 1, 1)
        self.offsets = nn.Conv2d(WIDTH, 2, 1)

    def features(self, images: Tensor) -> Tensor:
        return self.wide(self.context(self.network.maps(images)[-1]))

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        features = self.features(images)
        return self.classes(features), self.offsets(features)


def loss_of(model: Detector, given: Scenes, index: Tensor, options: dict[str, Any]) -> Tensor:
    """The loss of a batch; a position of the background weighs a twentieth of one with a digit."""
    target, there = given.classes[index], given.classes[index] != BACKGROUND
    weight = torch.where(there, 1.0, 0.05)
    features = model.features(given.images[index])
    seen = F.dropout(features, 0.5) if "dropout" in options else features
    loss = distill(model.classes(seen), target, weight=weight)
    if "sdd" in options:
        u, v = (model.classes(F.dropout(features, 0.5)) for _ in "uv")
        rows = None if options.get("alike") else weight
        kl = sd_dropout_kl(u, v, weight=rows, **options["sdd"])
        loss = loss + options.get("sdd_weight", 1.0) * kl
    error = F.smooth_l1_loss(model.offsets(features), given.offsets[index], reduction="none")
    return loss + (error.sum(1) * there).sum() / there.sum()


# ---- what is measured ----


def boxes(offsets: Tensor) -> Tensor:
    """Return the centres (N, 2, H, W) in pixels that offsets mean."""
    middle = torch.arange(SIDE // CELL) + 0.5
    return CELL * (torch.stack(torch.meshgrid(middle, middle, indexing="ij")) + offsets)


def overlap(a: Tensor, b: Tensor) -> Tensor:
    """Return the intersection over union of two digits' boxes with centres (..., 2)."""
    shared = (DIGIT - (a - b).abs()).clamp(min=0).prod(-1)
    return shared / (2 * DIGIT**2 - shared)


def average_precision(scores: Tensor, right: Tensor, total: int) -> float:
    """Return the mean over all that is to be found of the precision, made monotone, at its rank."""
    right = right[scores.argsort(descending=True, stable=True)].double()
    precision = right.cumsum(0) / torch.arange(1, len(right) + 1)
    best = precision.flip(0).cummax(0).values.flip(0)
    return ((best * right).sum() / total).item()


def mean_average_precision(logits: Tensor, offsets: Tensor, given: Scenes) -> float:
    """Return mAP at an overlap of 0.5, in percent.

    A detection of a class is a position whose probability is the largest of its 3 x 3; of several
    that meet one digit the most probable is right.
    """
    probability = logits.softmax(1)
    peaks = probability == F.max_pool2d(probability, 3, 1, 1)
    found, truth = boxes(offsets), boxes(given.offsets)
    precisions = []
    for k in range(data.CLASSES):
        image, row, column = peaks[:, k].nonzero(as_tuple=True)
        scores = probability[image, k, row, column]
        order = scores.argsort(descending=True, stable=True)
        image, row, column, scores = (x[order] for x in (image, row, column, scores))
        n, r, c = (given.classes == k).nonzero(as_tuple=True)
        if not len(n):
            continue
        overlaps = overlap(found[image, :, row, column][:, None], truth[n, :, r, c])
        meets = (image[:, None] == n) & (overlaps >= 0.5)
        first = meets & (meets.long().cumsum(0) == 1)
        precisions.append(average_precision(scores, first.any(1), len(n)))
    return 100 * sum(precisions) / len(precisions)


def run(setting: Setting, seed: int, part: float) -> dict[str, float]:
    """Train and measure."""
    (given, tested), options = scenes(seed), dict(setting.options)
    torch.manual_seed(seed)
    model, epochs = Detector(), train.part_of(EPOCHS, options.get("longer", 1) * part)
    for _, index in train.training([model], CANVASES, epochs, seed, batch=BATCH, rate=0.03):
        loss_of(model, given, index, options).backward()
    model.eval().requires_grad_(False)
    logits, offsets = model(tested.images)
    there = tested.classes != BACKGROUND
    digits, labels = logits.movedim(1, -1)[there], tested.classes[there]
    return {
        "map": mean_average_precision(logits, offsets, tested),
        "class": metrics.accuracy(digits, labels),
        "ece": metrics.calibration_error(digits, labels),
    }


better = functools.partial(Claim, task="canvases", metric="map")
STUDY = Study(
    name="detector",
    title="SD-Dropout, detection",
    tasks={"canvases": "1,000 canvases"},
    metrics={
        "map": Metric("mAP, %"),
        "class": Metric("class of digits' positions, %", group="other"),
        "ece": Metric("ECE of digits' positions", 3, False, "other"),
    },
    headline=SDD,
    baselines=(CE, DROPOUT),
    grid=[Setting("canvases", *pair) for pair in WAYS.items()],
    claims=[
        better("It detects better", SDD, CE),
        better("... if both train for twice the epochs", *list(WAYS)[:-3:-1]),
        better("... with the weight 0.1", f"{SDD}, weight 0.1", CE),
        better("... than the same dropout in the cross-entropy", SDD, DROPOUT),
        better("Position weights help its divergence", SDD, f"{SDD}, positions alike"),
        better("It is better calibrated", SDD, CE, metric="ece"),
    ],
    drawn=("map", "class", "ece"),
    run=run,
)
