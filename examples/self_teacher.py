"""What FRSKD's examples share: canvases, networks with maps, the learning rate, the loss."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import common
import torch
import torch.nn.functional as F
from common import convolution
from selfkd.nn import BiFPNSeg, sigmoid_rampup
from torch import Tensor, nn

IGNORED = 255  # label of pixels that do not count


class Canvases(common.Images):
    """Canvases of 16 x 16, four of scikit-learn's digits 0 to 3 on each, some missing.

    Labels (N, H, W): 0 where nothing is, the digit plus 1 on a stroke, IGNORED at its edge.
    """

    classes = 5

    def __init__(self, device: str) -> None:
        digits, generator = common.Digits(device), torch.Generator().manual_seed(0)

        def draw(images: Tensor, labels: Tensor, count: int) -> tuple[Tensor, Tensor]:
            few = (labels < self.classes - 1).nonzero().squeeze(1)
            index = few[torch.randint(len(few), (4 * count,), generator=generator)]
            there = torch.rand(4 * count, 1, 1, 1, generator=generator) < 0.8
            strokes = images[index] * there.to(device)
            marks = (labels[index] + 1).view(-1, 1, 1, 1) * (strokes > 0.5)
            marks = marks.masked_fill((strokes > 0.2) & (strokes <= 0.5), IGNORED)
            both = torch.cat([strokes, marks], 1).view(count, 2, 2, 2, 8, 8)
            canvases = both.permute(0, 3, 1, 4, 2, 5).reshape(count, 2, 16, 16)
            shifts = torch.randint(16, (count, 2), generator=generator).tolist()
            pairs = zip(canvases, shifts, strict=True)
            canvases = torch.stack([canvas.roll(shift, (1, 2)) for canvas, shift in pairs])
            return canvases[:, :1], canvases[:, 1].long()

        self.images, self.labels = draw(digits.images, digits.labels, 2000)
        self.held_out_images, self.held_out_labels = draw(
            digits.held_out_images, digits.held_out_labels, 300
        )


class VOC(common.Images):
    """Pascal VOC 2012 by torchvision, from a folder that it is loaded into, 128 x 128."""

    classes = 21

    def __init__(self, folder: Path, device: str) -> None:
        from torchvision.datasets import VOCSegmentation
        from torchvision.transforms.functional import InterpolationMode, pil_to_tensor, resize

        def load(part: str) -> tuple[Tensor, Tensor]:
            pairs = VOCSegmentation(folder, "2012", part, download=True)
            nearest = InterpolationMode.NEAREST
            images = torch.stack([pil_to_tensor(resize(x, [128, 128])) for x, _ in pairs])
            labels = torch.cat([pil_to_tensor(resize(y, [128, 128], nearest)) for _, y in pairs])
            return images.to(device).float() / 255, labels.to(device).long()

        self.images, self.labels = load("train")
        self.held_out_images, self.held_out_labels = load("val")


@torch.no_grad()
def mean_iou(data: common.Images, model: nn.Module) -> float:
    """Return intersection over union of the held-out pixels of a class, its mean over the classes."""
    parts = [model.eval()(part).argmax(1) for part in data.held_out_images.split(100)]
    labels, found = data.held_out_labels.flatten(), torch.cat(parts).flatten()
    labels, found = labels[labels != IGNORED], found[labels != IGNORED]
    pairs = (data.classes * labels + found).bincount(minlength=data.classes**2)
    counts = pairs.view(data.classes, data.classes)
    union = counts.sum(0) + counts.sum(1) - counts.diag()
    return (counts.diag() / union).nanmean().item()


class Stages(nn.Module):
    """A classifier of three stages, each of half the size of the one before, for a self-teacher."""

    widths = (32, 64, 128)

    def __init__(self, classes: int, channels: int = 1) -> None:
        super().__init__()
        inputs = (channels, *self.widths)
        self.stages = nn.ModuleList(
            nn.Sequential(*convolution(a, b, stride=2 if k else 1), *convolution(b, b))
            for k, (a, b) in enumerate(pairwise(inputs))
        )
        self.head = nn.Linear(self.widths[-1], classes)

    def maps(self, images: Tensor) -> list[Tensor]:
        """Return what every stage gives, finest first."""
        return [images := stage(images) for stage in self.stages]

    def classify(self, maps: list[Tensor]) -> Tensor:
        return self.head(maps[-1].mean((2, 3)))

    def forward(self, images: Tensor) -> Tensor:
        return self.classify(self.maps(images))


def pixel_head(width: int, classes: int) -> nn.Sequential:
    """Return what classifies every pixel of a map."""
    return nn.Sequential(*convolution(width, 2 * width), nn.Conv2d(2 * width, classes, 1))


class Segmenter(nn.Module):
    """A pyramid of four maps behind a neck, and a head on the finest: logits of every pixel."""

    width, levels = 32, 4  # the coarsest map of five would be of one pixel

    def __init__(self, classes: int, channels: int, fuse: Callable[..., Tensor]) -> None:
        super().__init__()
        widths = (channels, 32, 48, 64)
        self.stages = nn.ModuleList(
            nn.Sequential(*convolution(a, b, stride=2 if k else 1), *convolution(b, b))
            for k, (a, b) in enumerate(pairwise(widths))
        )
        self.laterals = nn.ModuleList(nn.Conv2d(b, self.width, 1) for b in widths[1:])
        self.neck = BiFPNSeg(self.width, self.levels, fuse=fuse)
        self.head = pixel_head(self.width, classes)

    def maps(self, images: Tensor) -> list[Tensor]:
        """Return the neck's maps, finest first, the first as large as the images."""
        stages = [images := stage(images) for stage in self.stages]
        pyramid = [lateral(x) for lateral, x in zip(self.laterals, stages, strict=True)]
        while len(pyramid) < self.levels:
            pyramid.append(F.avg_pool2d(pyramid[-1], 2))
        return self.neck(pyramid)

    def classify(self, maps: list[Tensor]) -> Tensor:
        return self.head(maps[0])

    def forward(self, images: Tensor) -> Tensor:
        return self.classify(self.maps(images))


class SegmenterTeacher(nn.Module):
    """Refines the maps of a segmenter's neck, and classifies every pixel by the finest."""

    def __init__(self, classes: int, fuse: Callable[..., Tensor]) -> None:
        super().__init__()
        width, levels = Segmenter.width, Segmenter.levels
        self.neck = BiFPNSeg(width, levels, repeat=2, bottom_up=False, fuse=fuse)
        self.head = pixel_head(width, classes)

    def forward(self, maps: list[Tensor]) -> tuple[list[Tensor], Tensor]:
        refined = self.neck(maps)
        return refined, self.head(refined[0])


def set_rate(
    optimizer: torch.optim.Optimizer, step: int, rise: int, power: int = 2, drop: int | None = None
) -> None:
    """Set the learning rate: slowly up, in `rise` steps to that of the optimizer; a tenth from `drop` on.

    A self-teacher is full of ReLUs, where the last bit of a value decides which way a gradient goes; at
    full speed from the start two runs that differ in rounding soon part.
    """
    rate = optimizer.defaults["lr"] * sigmoid_rampup(step, rise) ** power
    for group in optimizer.param_groups:
        group["lr"] = rate if drop is None or step < drop else rate / 10


def loss(
    ops: Any,
    z: Tensor,
    t: Tensor,
    *maps: Tensor,
    target: Tensor,
    alpha: float,
    beta: float,
    temperature: float,
    ignore_index: int = -100,
) -> Tensor:
    """FRSKD's loss: logits, the self-teacher's, the maps of both (the latter ones without gradient).

    selfkd.nn.FRSKDLoss is the same; here `ops` may be selfkd or selfkd.reference.
    """
    half, ignored = len(maps) // 2, {"ignore_index": ignore_index}
    teacher = {"teachers": t.detach(), "teacher_weights": alpha, "temperature": temperature}
    loss = ops.distill(z, target, **teacher, **ignored) + ops.distill(t, target, **ignored)
    pairs = zip(maps[:half], maps[half:], strict=True)
    return loss + beta * sum(ops.attention(f, g) for f, g in pairs)
