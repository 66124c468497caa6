"""A small network, and the loop that trains it."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .data import CLASSES

EPOCHS = {200: 60, 1000: 24}  # by the number of labels: 240 steps, and 480
BATCH = 50
step_seconds: list[float] = []  # processor time of each step of the last training of this process


def stage(inputs: int, outputs: int, stride: int) -> nn.Sequential:
    """Return a convolution with its normalisation and ReLU."""
    conv = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(outputs), nn.ReLU(inplace=True))


class Network(nn.Module):
    """Convolutions, each but the first halving the map; their mean over the positions; a linear head."""

    def __init__(self, widths: Sequence[int] = (32, 64, 128), classes: int = CLASSES) -> None:
        super().__init__()
        self.widths = tuple(widths)
        pairs = pairwise((1, *widths))
        self.stages = nn.ModuleList(stage(a, b, 1 + bool(k)) for k, (a, b) in enumerate(pairs))
        self.head = nn.Linear(widths[-1], classes)

    def maps(self, images: Tensor) -> list[Tensor]:
        """Return what every convolution gives, finest first."""
        return [images := stage(images) for stage in self.stages]

    def features(self, images: Tensor) -> Tensor:
        """Return the pooled features that the head sees."""
        return self.maps(images)[-1].mean((2, 3))

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.features(images))


def part_of(count: int, part: float) -> int:
    """Return how many epochs a part of the full number is, at least two."""
    return max(2, round(part * count))


def epochs_of(labels: Tensor, part: float) -> int:
    """Return how many epochs to train with so many labels."""
    return part_of(EPOCHS[len(labels)], part)


def training(
    modules: Sequence[nn.Module],
    size: int,
    epochs: int,
    seed: int,
    *,
    batch: int = BATCH,
    rate: float = 0.05,
    decay: float = 1e-4,
) -> Iterator[tuple[int, Tensor]]:
    """Yield epoch and indices of every batch; take a step with the gradients that the caller leaves.

    SGD with momentum 0.9; the rate falls to 0 along half a cosine. A last batch that is not full is
    left out. The order depends on the seed alone. What a step takes is left in `step_seconds`.
    """
    step_seconds.clear()
    parameters = [x for module in modules for x in module.parameters()]
    optimizer = torch.optim.SGD(parameters, lr=rate, momentum=0.9, weight_decay=decay)
    generator = torch.Generator().manual_seed(seed)
    each, step = size // batch, 0
    for epoch in range(epochs):
        for index in torch.randperm(size, generator=generator).split(batch)[:each]:
            optimizer.param_groups[0]["lr"] = (
                rate * (1 + math.cos(math.pi * step / (epochs * each))) / 2
            )
            begun = time.process_time()  # others on the machine take none of it
            yield epoch, index
            optimizer.step()
            optimizer.zero_grad()
            step_seconds.append(time.process_time() - begun)
            step += 1


def plain(images: Tensor, labels: Tensor, epochs: int, seed: int) -> Network:
    """Train a network with nothing but cross-entropy."""
    torch.manual_seed(seed)
    network = Network()
    for _, index in training([network], len(labels), epochs, seed):
        F.cross_entropy(network(images[index]), labels[index]).backward()
    return network.eval().requires_grad_(False)
