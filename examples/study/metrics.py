"""What is measured of a trained classifier."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import data
from .grid import Metric

EPSILON, ATTACKED = (
    0.1,
    300,
)  # largest change of a pixel by an attack; how many images, to save time
BINS = 15
# ODIN's temperature is its authors'. Its epsilon is one for all settings: of 0, 0.0005, 0.001,
# 0.0014, 0.002, 0.003, 0.004 (where the authors' range ends), 0.006, 0.01, 0.02, 0.03, 0.05 and 0.1
# it had the largest mean AUROC of cross-entropy and SD-Dropout with 200 labels on the seeds 0, 1
# and 100.
ODIN_TEMPERATURE, ODIN_EPSILON = 1000.0, 0.03
CLASSIFICATION = {
    "accuracy": Metric("accuracy, %"),
    "nll": Metric("NLL", 3, False, "calibration"),
    "ece": Metric("ECE", 3, False, "calibration"),
    "temperature": Metric("fitted temperature", 2, None, "calibration"),
    "nll_scaled": Metric("NLL, scaled", 3, False, "calibration"),
    "ece_scaled": Metric("ECE, scaled", 3, False, "calibration"),
    "noise": Metric("noise, %", 1, True, "shift"),
    "blur": Metric("blur, %", 1, True, "shift"),
    "shift": Metric("shift by a pixel, %", 1, True, "shift"),
    "fgsm": Metric("FGSM, %", 1, True, "attack"),
    "pgd": Metric("PGD, %", 1, True, "attack"),
    "photographs": Metric("AUROC, photographs", 3, True, "out of distribution"),
    "spliced": Metric("AUROC, spliced digits", 3, True, "out of distribution"),
    "odin_photographs": Metric("AUROC, photographs, ODIN", 3, True, "out of distribution"),
    "odin_spliced": Metric("AUROC, spliced digits, ODIN", 3, True, "out of distribution"),
}
Model = Callable[[Tensor], Tensor]


def accuracy(logits: Tensor, labels: Tensor) -> float:
    """Return the percentage of rows whose largest logit is the label's."""
    return 100 * (logits.argmax(1) == labels).double().mean().item()


def calibration_error(logits: Tensor, labels: Tensor, bins: int = BINS) -> float:
    """Return the expected calibration error: |accuracy - confidence|, its mean over bins by their size."""
    confidence, found = logits.double().softmax(1).max(1)
    right = (found == labels).double()
    index = (confidence * bins).ceil().long().clamp(1, bins) - 1
    gaps = torch.zeros(bins, dtype=torch.double).index_add_(0, index, right - confidence)
    return (gaps.abs().sum() / len(labels)).item()


def fitted_temperature(logits: Tensor, labels: Tensor) -> float:
    """Return the T of least cross-entropy of logits / T: that is convex in 1 / T, so thirds narrow it."""
    logits, low, high = logits.double(), 0.02, 50.0  # of 1 / T
    for _ in range(100):
        a, b = low + (high - low) / 3, high - (high - low) / 3
        if F.cross_entropy(a * logits, labels) < F.cross_entropy(b * logits, labels):
            high = b
        else:
            low = a
    return 2 / (low + high)


def auroc(inside: Tensor, outside: Tensor) -> float:
    """Return how probably a score from inside is above one from outside; a tie counts half."""
    below = torch.searchsorted(outside.sort().values, inside.contiguous())
    upto = torch.searchsorted(outside.sort().values, inside.contiguous(), right=True)
    return ((below + upto).double().mean() / (2 * len(outside))).item()


def slope(model: Model, images: Tensor, labels: Tensor) -> Tensor:
    """Return the sign of the gradient of the cross-entropy by every pixel."""
    images = images.detach().requires_grad_()
    (gradient,) = torch.autograd.grad(F.cross_entropy(model(images), labels), images)
    return gradient.sign()


def fgsm(model: Model, images: Tensor, labels: Tensor, epsilon: float = EPSILON) -> Tensor:
    """Move every pixel by epsilon the way that the loss rises, within [0, 1] (arXiv 1412.6572)."""
    return (images + epsilon * slope(model, images, labels)).clamp(0, 1)


def pgd(
    model: Model, images: Tensor, labels: Tensor, epsilon: float = EPSILON, steps: int = 10
) -> Tensor:
    """Take such steps of epsilon / 4, never further than epsilon away (arXiv 1706.06083)."""
    low, high = (images - epsilon).clamp(min=0), (images + epsilon).clamp(max=1)
    found = images
    for _ in range(steps):
        step = found + epsilon / 4 * slope(model, found, labels)
        found = torch.maximum(torch.minimum(step, high), low)
    return found


def confidence(model: Model, images: Tensor) -> Tensor:
    """Return the logarithm of the largest probability (arXiv 1610.02136)."""
    return model(images).double().log_softmax(1).max(1).values


def odin(
    model: Model,
    images: Tensor,
    temperature: float = ODIN_TEMPERATURE,
    epsilon: float = ODIN_EPSILON,
) -> Tensor:
    """Return the same of logits / T, once each pixel has moved as it rises (arXiv 1706.02690)."""

    def tempered(x: Tensor) -> Tensor:
        return model(x).double() / temperature

    images = images.detach().requires_grad_()
    (gradient,) = torch.autograd.grad(confidence(tempered, images).sum(), images)
    return confidence(tempered, (images + epsilon * gradient.sign()).detach())


def told_apart(
    score: Callable[[Model, Tensor], Tensor],
    model: Model,
    inside: Tensor,
    strange: dict[str, Tensor],
) -> dict[str, float]:
    """Return the AUROC of a score for each kind of strange images."""
    known = score(model, inside)
    return {name: auroc(known, score(model, images)) for name, images in strange.items()}


def evaluate(model: nn.Module, split: data.Split, seed: int) -> dict[str, float]:
    """Return every number of CLASSIFICATION; the model is put into evaluation mode."""
    model.eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(seed)
    logits, labels = model(split.test), split.test_labels
    temperature = fitted_temperature(model(split.validation), split.validation_labels)
    scaled = logits.double() / temperature
    attacked = split.test[:ATTACKED], labels[:ATTACKED]
    strange = {
        "photographs": data.patches(len(labels), generator),
        "spliced": data.spliced(split.test, labels, generator),
    }
    return {
        "accuracy": accuracy(logits, labels),
        "nll": F.cross_entropy(logits.double(), labels).item(),
        "ece": calibration_error(logits, labels),
        "temperature": temperature,
        "nll_scaled": F.cross_entropy(scaled, labels).item(),
        "ece_scaled": calibration_error(scaled, labels),
        **{
            name: accuracy(model(corrupt(split.test, generator)), labels)
            for name, corrupt in data.CORRUPTIONS.items()
        },
        "fgsm": accuracy(model(fgsm(model, *attacked)), attacked[1]),
        "pgd": accuracy(model(pgd(model, *attacked)), attacked[1]),
        **told_apart(confidence, model, split.test, strange),
        **{f"odin_{x}": y for x, y in told_apart(odin, model, split.test, strange).items()},
    }
