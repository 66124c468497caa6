"""Self-KD-Lib: its module ``DistillKL``."""

from __future__ import annotations

import torch
from torch import nn

from . import _shared

__all__ = ["DistillKL"]


class DistillKL(nn.Module):
    """T^2 KL(softmax(y_t/T) || softmax(y_s/T)), the sum over the batch size.

    Parameters
    ----------
    T
        Temperature, finite and > 0.

    Notes
    -----
    Equal to ``utils.py`` of winycg/Self-KD-Lib (commit bd3bb62): a target that requires grad gets one. Its
    FRSKD leaves the self-teacher's logits attached, which pulls them to the student's; the authors of FRSKD
    stop that gradient: detach the target, or take :class:`selfkd.nn.FRSKDLoss`.
    """

    def __init__(self, T: float) -> None:
        super().__init__()
        self.T = _shared.number("DistillKL", "T", T, "POSITIVE")

    def _check(self, y_s: torch.Tensor, y_t: torch.Tensor) -> None:
        _shared.check_logits("DistillKL", ("y_s", "y_t"), y_s, y_t)

    @_shared.explained(_check)
    def forward(self, y_s: torch.Tensor, y_t: torch.Tensor) -> torch.Tensor:
        """The loss of logits (N, C) or (N, C, ...) of student and target; 0-d."""
        reduction, factor = _shared.from_kl_div("batchmean", y_s)
        return _shared.kl(y_s, y_t, temperature=self.T, weight=factor, reduction=reduction)
