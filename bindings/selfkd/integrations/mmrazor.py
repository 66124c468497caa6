"""mmrazor: its module ``KLDivergence``."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from ..distill import distill
from ..sd_dropout_kl import sd_dropout_kl
from ._reductions import REDUCTIONS, from_kl_div


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
        Finite and >= 0.
    teacher_detach
        Give the teacher no gradient. False is for data-free distillation, where it learns too.

    Notes
    -----
    Arguments, defaults and values are those of open-mmlab/mmrazor (commit 90c7af1, 2023-06-25).
    """

    def __init__(
        self,
        tau: float = 1.0,
        reduction: str = "batchmean",
        loss_weight: float = 1.0,
        teacher_detach: bool = True,
    ) -> None:
        super().__init__()
        if reduction not in (*REDUCTIONS, "none"):
            raise ValueError(
                f'KLDivergence: reduction is "{reduction}", expected "batchmean", "sum", "mean" or "none"'
            )
        self.tau, self.reduction, self.loss_weight = tau, reduction, loss_weight
        self.teacher_detach = teacher_detach

    def forward(self, preds_S: torch.Tensor, preds_T: torch.Tensor) -> torch.Tensor:
        """The loss of logits (N, C) or (N, C, H, W) of student and teacher."""
        if self.reduction == "none":
            teacher = preds_T.detach() if self.teacher_detach else preds_T
            log_p, q = F.log_softmax(preds_S / self.tau, 1), F.softmax(teacher / self.tau, 1)
            return self.loss_weight * self.tau**2 * F.kl_div(log_p, q, reduction="none")
        reduction, factor = from_kl_div(self.reduction, preds_S)
        weight = self.loss_weight * factor
        if not self.teacher_detach:
            return sd_dropout_kl(
                preds_T,
                preds_S,
                temperature=self.tau,
                forward_weight=weight,
                reverse_weight=0.0,
                reduction=reduction,
            )
        loss: torch.Tensor = distill(  # type: ignore[assignment]
            preds_S,
            teachers=preds_T,
            teacher_weights=weight,
            temperature=self.tau,
            reduction=reduction,
        )
        return loss
