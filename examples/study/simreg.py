"""SimReg (arXiv 2201.05131): a small network regresses the features of a larger self-supervised one."""

from __future__ import annotations

import functools
import math
from typing import Any

import torch
import torch.nn.functional as F
from selfkd.nn import SimRegHead, SimRegLoss
from torch import Tensor, nn

from . import data, metrics, train
from .grid import Claim, Metric, Setting, Study

WIDE, NARROW = (
    (32, 64, 64),
    (8, 16, 64),
)  # as many features, so that a student may do without a head
TEACHER_EPOCHS, STUDENT_EPOCHS, BATCH = 60, 50, 100
TEACHER, UNTRAINED, OWN = "the teacher", "untrained", "contrastive, no teacher"
LAYERS = {n: f"{n} layers" if n != 1 else "1 layer" for n in (0, 1, 2, 4)}
DEEP = LAYERS[4]

WAYS: dict[str, dict[str, Any]] = {
    TEACHER: {"who": "teacher"},
    UNTRAINED: {"who": "untrained"},
    OWN: {"who": "contrastive"},
    **{name: {"layers": n} for n, name in LAYERS.items()},
    f"{LAYERS[0]}, other augmentation": {"layers": 0, "same": False},
    f"{DEEP}, other augmentation": {"layers": 4, "same": False},
    f"{LAYERS[1]}, two teachers": {"layers": 1, "teachers": 2},
    f"{DEEP}, two teachers": {"layers": 4, "teachers": 2},
}


def augmented(images: Tensor, generator: torch.Generator) -> Tensor:
    """Turn, scale and move each image a little, and add noise."""
    draws = 2 * torch.rand(4, len(images), generator=generator) - 1
    angle, scale, across, down = draws * torch.tensor([[math.pi / 12], [0.15], [0.25], [0.25]])
    cos, sin = (1 + scale) * angle.cos(), (1 + scale) * angle.sin()
    moves = torch.stack([cos, -sin, across, sin, cos, down], 1).view(-1, 2, 3)
    grid = F.affine_grid(moves, list(images.shape), align_corners=False)
    noise = 0.1 * torch.randn(images.shape, generator=generator)
    return (F.grid_sample(images, grid, align_corners=False) + noise).clamp(0, 1)


def contrastive(widths: tuple[int, ...], images: Tensor, epochs: int, seed: int) -> train.Network:
    """Train a network, without labels, to find the other view of each image among all (SimCLR)."""
    torch.manual_seed(seed)
    network, size = train.Network(widths), widths[-1]
    projector = nn.Sequential(nn.Linear(size, size), nn.ReLU(), nn.Linear(size, size))
    generator = torch.Generator().manual_seed(seed)
    other = torch.arange(2 * BATCH).roll(BATCH)
    for _, index in train.training([network, projector], len(images), epochs, seed, batch=BATCH):
        views = torch.cat([augmented(images[index], generator) for _ in range(2)])
        found = F.normalize(projector(network.features(views)))
        alike = (found @ found.T / 0.2).fill_diagonal_(-torch.inf)
        F.cross_entropy(alike, other).backward()
    return network.eval().requires_grad_(False)


@functools.lru_cache(4)
def teacher(number: int, seed: int, part: float) -> train.Network:
    """Train a teacher: that of another number begins elsewhere."""
    epochs = train.part_of(TEACHER_EPOCHS, part)
    return contrastive(WIDE, data.split("many", seed).pool, epochs, 1000 * (number + 1) + seed)


def regressed(
    images: Tensor,
    seed: int,
    part: float,
    *,
    layers: int,
    teachers: int = 1,
    same: bool = True,
) -> train.Network:
    """Train a student to predict what teachers make of the same view of an image, or of another."""
    masters = [teacher(k, seed, part) for k in range(teachers)]
    torch.manual_seed(seed)
    student, criterion = train.Network(NARROW), SimRegLoss()
    heads = [SimRegHead(64, 64, layers) if layers else nn.Identity() for _ in masters]
    generator, epochs = torch.Generator().manual_seed(seed), train.part_of(STUDENT_EPOCHS, part)
    for _, index in train.training([student, *heads], len(images), epochs, seed, batch=BATCH):
        seen = augmented(images[index], generator)
        shown = seen if same else augmented(images[index], generator)
        features = student.features(seen)
        targets = [master.features(shown) for master in masters]
        criterion([head(features) for head in heads], targets).backward()
    return student


# ---- what is measured ----


def probe(known: Tensor, labels: Tensor, new: Tensor) -> Tensor:
    """Return logits of new features by a linear classifier of known ones, with a little decay."""
    mean, deviation = known.mean(0), known.std(0).clamp(min=1e-6)
    known, new = (known - mean) / deviation, (new - mean) / deviation
    layer = nn.Linear(known.shape[1], data.CLASSES)
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    optimizer = torch.optim.LBFGS(layer.parameters(), max_iter=100, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimizer.zero_grad()
        found = F.cross_entropy(layer(known), labels) + 1e-3 * layer.weight.square().sum()
        found.backward()
        return found

    optimizer.step(loss)
    return layer(new).detach()


def neighbours(known: Tensor, labels: Tensor, new: Tensor) -> Tensor:
    """Return votes (N, classes) for new features: the class of the nearest known one, by cosine."""
    nearest = (F.normalize(new) @ F.normalize(known).T).argmax(1)
    return F.one_hot(labels[nearest], data.CLASSES)


def run(setting: Setting, seed: int, part: float) -> dict[str, float]:
    """Train, throw the head away, and measure the features."""
    split, options = data.split("many", seed), dict(setting.options)
    match options.pop("who", ""):
        case "teacher":
            network = teacher(0, seed, part)
        case "untrained":
            torch.manual_seed(seed)
            network = train.Network(NARROW)
        case "contrastive":
            epochs = train.part_of(TEACHER_EPOCHS, part)
            network = contrastive(NARROW, split.pool, epochs, seed)
        case _:
            network = regressed(split.pool, seed, part, **options)
    network.eval().requires_grad_(False)
    known, new = network.features(split.pool), network.features(split.test)
    few, labels = slice(200), split.pool_labels
    return {
        "probe": metrics.accuracy(probe(known, labels, new), split.test_labels),
        "probe_few": metrics.accuracy(probe(known[few], labels[few], new), split.test_labels),
        "neighbour": metrics.accuracy(neighbours(known, labels, new), split.test_labels),
    }


better = functools.partial(Claim, task="features", metric="probe")
STUDY = Study(
    name="simreg",
    title="SimReg",
    tasks={"features": "no labels"},
    metrics={
        "probe": Metric("linear probe, %"),
        "probe_few": Metric("linear probe of 200 labels, %", group="other"),
        "neighbour": Metric("nearest neighbour, %", group="other"),
    },
    headline=DEEP,
    baselines=(LAYERS[0], OWN),
    grid=[Setting("features", *pair) for pair in WAYS.items()],
    claims=[
        better("A head that is thrown away helps", DEEP, LAYERS[0]),
        better("... by the nearest neighbour", DEEP, LAYERS[0], metric="neighbour"),
        better("4 layers are better than 2", DEEP, LAYERS[2]),
        better("2 layers are better than 1", LAYERS[2], LAYERS[1]),
        better("1 layer is better than none", LAYERS[1], LAYERS[0]),
        better("The student is better than one that learns alone", DEEP, OWN),
        better("... by the nearest neighbour", DEEP, OWN, metric="neighbour"),
        better("Two teachers are better than one", f"{DEEP}, two teachers", DEEP),
        better("The same augmentation is better", DEEP, f"{DEEP}, other augmentation"),
    ],
    drawn=("probe", "probe_few", "neighbour"),
    run=run,
    references=(TEACHER, UNTRAINED),
)
