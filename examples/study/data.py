"""What is learned from and tested on: scikit-learn's digits, few of them labelled or labelled wrongly."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits, load_sample_images
from torch import Tensor

CLASSES = 10
POOL, VALIDATION = (
    1000,
    200,
)  # what may be trained on, what temperatures are fitted on; the rest tests
TASKS = {  # labelled images, share of wrong labels
    "few": (200, 0.0),
    "wrong20": (200, 0.2),
    "wrong40": (200, 0.4),
    "many": (1000, 0.0),
}
IN_WORDS = {
    "few": "200 labels",
    "wrong20": "200 labels, 20 % wrong",
    "wrong40": "200 labels, 40 % wrong",
    "many": "1,000 labels",
}


@dataclass(frozen=True)
class Split:
    """Images (N, 1, 8, 8) in [0, 1] and labels (N,): what one seed trains, fits and tests with."""

    images: Tensor
    labels: Tensor  # some wrong, where the task says so
    pool: Tensor  # all images that may be trained on
    pool_labels: Tensor
    validation: Tensor
    validation_labels: Tensor
    test: Tensor
    test_labels: Tensor


@functools.cache
def digits() -> tuple[Tensor, Tensor]:
    """Return all 1,797 images and labels."""
    data = load_digits()
    return torch.from_numpy(data.images).float().unsqueeze(1) / 16, torch.from_numpy(data.target)


@functools.lru_cache(8)
def split(task: str, seed: int) -> Split:
    """Divide the digits at random; the same seed divides them alike for every setting."""
    generator = torch.Generator().manual_seed(seed)
    images, labels = digits()
    order = torch.randperm(len(labels), generator=generator)
    pool, validation, test = order.split([POOL, VALIDATION, len(order) - POOL - VALIDATION])
    count, share = TASKS[task]
    given = labels[pool[:count]].clone()
    wrong = torch.randperm(count, generator=generator)[: round(share * count)]
    given[wrong] += torch.randint(1, CLASSES, wrong.shape, generator=generator)
    return Split(
        *(images[pool[:count]], given % CLASSES, images[pool], labels[pool]),
        *(images[validation], labels[validation], images[test], labels[test]),
    )


# ---- other test images ----


def noisy(images: Tensor, generator: torch.Generator) -> Tensor:
    """Add normal noise of deviation 0.3."""
    return (images + 0.3 * torch.randn(images.shape, generator=generator)).clamp(0, 1)


def blurred(images: Tensor, generator: torch.Generator) -> Tensor:
    """Weigh each pixel and its neighbours by 1, 2, 1 in both directions, twice."""
    line = torch.tensor([1.0, 2.0, 1.0]) / 4
    kernel = (line[:, None] * line)[None, None]
    return F.conv2d(F.conv2d(images, kernel, padding=1), kernel, padding=1)


def shifted(images: Tensor, generator: torch.Generator) -> Tensor:
    """Move each image by one pixel, in one of four directions."""
    padded = F.pad(images, (1, 1, 1, 1))
    moves = torch.randint(4, (len(images),), generator=generator)
    corners = torch.tensor([[0, 1], [2, 1], [1, 0], [1, 2]])[moves].tolist()
    return torch.stack(
        [x[:, a : a + 8, b : b + 8] for x, (a, b) in zip(padded, corners, strict=True)]
    )


CORRUPTIONS = {"noise": noisy, "blur": blurred, "shift": shifted}


# ---- images of no digit ----


@functools.cache
def photographs() -> tuple[Tensor, ...]:
    """Return scikit-learn's two photographs, grey, a quarter of their size."""
    images = [torch.tensor(x).float().mean(2) / 255 for x in load_sample_images().images]
    return tuple(F.avg_pool2d(x[None], 4)[0] for x in images)


def patches(count: int, generator: torch.Generator) -> Tensor:
    """Return parts of the photographs, each stretched to [0, 1]."""
    found = []
    for k in range(count):
        photograph = photographs()[k % 2]
        a, b = (int(torch.randint(n - 7, (), generator=generator)) for n in photograph.shape)
        patch = photograph[a : a + 8, b : b + 8]
        found.append((patch - patch.min()) / (patch.max() - patch.min()).clamp(min=1e-6))
    return torch.stack(found).unsqueeze(1)


def spliced(images: Tensor, labels: Tensor, generator: torch.Generator) -> Tensor:
    """Join the left half of each image to the right half of one of another class."""
    other = torch.rand(len(labels), len(labels), generator=generator)
    other = other.masked_fill(labels[:, None] == labels, -1).argmax(1)
    return torch.cat([images[..., :4], images[other][..., 4:]], 3)
