"""mmrazor: its modules ``KLDivergence``, ``ChannelWiseDivergence`` and ``ATLoss``."""

from __future__ import annotations

import torch
from torch import nn

from .. import arguments
from . import _shared

__all__ = ["ATLoss", "ChannelWiseDivergence", "KLDivergence"]

_LOGITS = ("preds_S", "preds_T")


class KLDivergence(nn.Module):
    """loss_weight tau^2 KL(softmax(preds_T/tau) || softmax(preds_S/tau)).

    Parameters
    ----------
    tau
        Temperature, finite and > 0.
    reduction
        As for :func:`torch.nn.functional.kl_div`: ``"batchmean"`` (the sum over N), ``"sum"``,
        ``"mean"`` (the sum over the number of logits) or ``"none"`` (a value for each logit, which
        plain PyTorch computes: it has no row to fuse).
    loss_weight
        A number; one < 0 is for a generator that makes student and teacher differ.
    teacher_detach
        Give the teacher no gradient. False is for data-free distillation, where it learns too.

    Notes
    -----
    Arguments, defaults and values are those of ``mmrazor/models/losses/kl_divergence.py`` of
    open-mmlab/mmrazor (commit 90c7af1, 2023-06-25).
    """

    def __init__(
        self,
        tau: float = 1.0,
        reduction: str = "batchmean",
        loss_weight: float = 1.0,
        teacher_detach: bool = True,
    ) -> None:
        super().__init__()
        op = "KLDivergence"
        _shared.check_reduction(op, reduction)
        self.tau: float = _shared.number(op, "tau", tau, "POSITIVE")
        self.reduction = reduction
        self.loss_weight: float = _shared.number(op, "loss_weight", loss_weight)
        self.teacher_detach = arguments.flag(op, "teacher_detach", teacher_detach)

    def _check(self, preds_S: torch.Tensor, preds_T: torch.Tensor) -> None:
        _shared.check_logits("KLDivergence", _LOGITS, preds_S, preds_T)

    @_shared.explained(_check)
    def forward(self, preds_S: torch.Tensor, preds_T: torch.Tensor) -> torch.Tensor:
        """The loss of logits (N, C) or (N, C, H, W) of student and teacher; 0-d, or of their shape."""
        if self.teacher_detach:
            preds_T = preds_T.detach()
        if self.reduction == "none":
            self._check(preds_S, preds_T)
            each = _shared.kl_of_each_logit(preds_S, preds_T, self.tau)
            return self.loss_weight * self.tau**2 * each
        reduction, factor = _shared.from_kl_div(self.reduction, preds_S)
        weight = self.loss_weight * factor
        return _shared.kl(
            preds_S, preds_T, temperature=self.tau, weight=weight, reduction=reduction
        )


class ChannelWiseDivergence(nn.Module):
    """CWD: loss_weight tau^2 KL of teacher and student, softened over the positions of each channel.

    The mean over batch and channels. Both memory formats are read in place.

    Parameters
    ----------
    tau
        Temperature, finite and > 0.
    loss_weight
        A number.

    Notes
    -----
    Arguments, defaults and values are those of ``mmrazor/models/losses/cwd.py`` of open-mmlab/mmrazor
    (commit 90c7af1); arXiv 2011.13256. As there, a teacher that requires grad gets one.
    """

    def __init__(self, tau: float = 1.0, loss_weight: float = 1.0) -> None:
        super().__init__()
        op = "ChannelWiseDivergence"
        self.tau: float = _shared.number(op, "tau", tau, "POSITIVE")
        self.loss_weight: float = _shared.number(op, "loss_weight", loss_weight)

    def _check(self, preds_S: torch.Tensor, preds_T: torch.Tensor) -> None:
        _shared.check_logits("ChannelWiseDivergence", _LOGITS, preds_S, preds_T, 3)

    @_shared.explained(_check)
    def forward(self, preds_S: torch.Tensor, preds_T: torch.Tensor) -> torch.Tensor:
        """The loss of predictions (N, C, H, W) of student and teacher; 0-d."""
        return _shared.kl(
            preds_S.flatten(2),
            preds_T.flatten(2),
            temperature=self.tau,
            weight=self.loss_weight,
            dim=2,
        )


class ATLoss(nn.Module):
    """Attention transfer: loss_weight times :func:`selfkd.attention`.

    Parameters
    ----------
    loss_weight
        A number.

    Notes
    -----
    Arguments, defaults and values are those of ``mmrazor/models/losses/at_loss.py`` of open-mmlab/mmrazor
    (commit 90c7af1). As there, a teacher that requires grad gets one.
    """

    def __init__(self, loss_weight: float = 1.0) -> None:
        super().__init__()
        self.loss_weight: float = _shared.number("ATLoss", "loss_weight", loss_weight)

    def _check(self, s_feature: torch.Tensor, t_feature: torch.Tensor) -> None:
        _shared.check_maps("ATLoss", ("s_feature", "t_feature"), s_feature, t_feature)

    @_shared.explained(_check)
    def forward(self, s_feature: torch.Tensor, t_feature: torch.Tensor) -> torch.Tensor:
        """The loss of features (N, C, ...) of as many positions; channels may differ. 0-d."""
        return self.loss_weight * _shared.at(s_feature, t_feature)
