"""The reductions of :func:`torch.nn.functional.kl_div`, which count otherwise than those of selfkd."""

from __future__ import annotations

import math

import torch

REDUCTIONS = ("batchmean", "sum", "mean")


def from_kl_div(reduction: str, logits: torch.Tensor) -> tuple[str, float]:
    """The reduction of selfkd, and the factor that makes it `reduction`, for logits (N, C, ...).

    ``"batchmean"`` divides the sum by N, ``"mean"`` by the number of logits; selfkd's mean divides
    it by the number of positions.
    """
    if reduction == "sum":
        return "sum", 1.0
    factor = math.prod(logits.shape[2:]) if reduction == "batchmean" else 1 / logits.shape[1]
    return "mean", factor
