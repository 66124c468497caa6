"""FRSKD: feature refinement via self-knowledge distillation, the loss of classifier and self-teacher."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import nn

from ..attention import attention
from ..distill import distill


class FRSKDParts(NamedTuple):
    """The weighted terms of :class:`FRSKDLoss`, detached: their sum is the loss."""

    ce: torch.Tensor
    teacher_ce: torch.Tensor
    kl: torch.Tensor
    features: torch.Tensor


class FRSKDLoss(nn.Module):
    r"""Cross-entropy of classifier and self-teacher, soft labels, and attention transfer of features.

    .. math::
        CE(o, y) + CE(o', y) + \alpha T^2 KL(p_T(o') \| p_T(o)) + \beta \sum_i L_F(F_i, T_i)

    with o, F_i the classifier's logits and features, o', T_i the self-teacher's, and L_F
    :func:`selfkd.attention`. The targets o' of the divergence and T_i of the features are detached
    here, and nowhere else: the self-teacher learns from CE(o', y), and through the features that it
    refines so does the classifier.

    Parameters
    ----------
    alpha, beta
        Weights of the soft labels and of the features, finite and >= 0. Plain attributes, which a
        schedule may set. ``beta=0`` is FRSKD\\F, which needs no features.
    temperature
        T, finite and > 0: 4 for classification, 1 for segmentation.
    label_smoothing, ignore_index
        Of both cross-entropies, as for :func:`torch.nn.functional.cross_entropy`. The soft labels
        of ignored positions count, as in the paper's segmentation.

    Notes
    -----
    Source: Ji et al., arXiv 2103.08273, and its authors' code (MingiJi/FRSKD). The defaults are those
    of ResNet-18 on CIFAR-100. Segmentation there: alpha 1, beta 50, T 1, label 255 ignored, and both
    weights times :func:`frskd_rampup`.

    Examples
    --------
    >>> criterion = FRSKDLoss(alpha=2, beta=100)
    >>> loss, parts = criterion(logits, teacher_logits, features, teacher_features, target)
    >>> segmentation = FRSKDLoss(alpha=1, beta=50, temperature=1, ignore_index=255)
    >>> loss, parts = segmentation(
    ...     logits, teacher_logits, features, teacher_features, target, ramp=frskd_rampup(epoch)
    ... )
    """

    def __init__(
        self,
        alpha: float = 2.0,
        beta: float = 100.0,
        temperature: float = 4.0,
        *,
        label_smoothing: float = 0.0,
        ignore_index: int = -100,
    ) -> None:
        super().__init__()
        self.alpha, self.beta, self.temperature = alpha, beta, temperature
        self.label_smoothing, self.ignore_index = label_smoothing, ignore_index

    def forward(
        self,
        logits: torch.Tensor,
        teacher_logits: torch.Tensor,
        features: Sequence[torch.Tensor] | None,
        teacher_features: Sequence[torch.Tensor] | None,
        target: torch.Tensor,
        *,
        ramp: float = 1.0,
    ) -> tuple[torch.Tensor, FRSKDParts]:
        """The loss and its parts.

        Parameters
        ----------
        logits, teacher_logits
            o and o', (N, C), or (N, C, H, W) for segmentation. Both get gradients.
        features, teacher_features
            F_i and T_i, (N, C_i, H_i, W_i) and (N, D_i, H_i, W_i), after their ReLU, of as many levels;
            not looked at, and may be None, where `beta` or `ramp` is 0. Only `features` get gradients.
        target
            Class of each row or pixel, int64.
        ramp
            Times `alpha` and `beta`: 0 while only the cross-entropies count.
        """
        loss, ce, kl = distill(
            logits,
            target,
            teacher_logits,
            teacher_weights=ramp * self.alpha,
            temperature=self.temperature,
            label_smoothing=self.label_smoothing,
            ignore_index=self.ignore_index,
            return_parts=True,
        )
        teacher_ce: torch.Tensor = distill(  # type: ignore[assignment]
            teacher_logits,
            target,
            label_smoothing=self.label_smoothing,
            ignore_index=self.ignore_index,
        )
        loss = loss + teacher_ce
        if ramp * self.beta == 0:
            return loss, FRSKDParts(ce, teacher_ce.detach(), kl, torch.zeros_like(kl))
        transfer = ramp * self.beta * _transfer(features, teacher_features)
        return loss + transfer, FRSKDParts(ce, teacher_ce.detach(), kl, transfer.detach())

    def extra_repr(self) -> str:
        names = ["alpha", "beta", "temperature", "label_smoothing", "ignore_index"]
        return ", ".join(f"{name}={getattr(self, name)}" for name in names)


def _transfer(
    features: Sequence[torch.Tensor] | None, teacher_features: Sequence[torch.Tensor] | None
) -> torch.Tensor:
    """The feature losses of all levels, the teacher's features detached."""
    if not features or not teacher_features:
        raise ValueError(
            "FRSKDLoss: features or teacher_features are missing, expected at least one level of each "
            "(beta=0 needs none)"
        )
    if len(features) != len(teacher_features):
        raise ValueError(
            f"FRSKDLoss: teacher_features has {len(teacher_features)} levels, expected those of "
            f"features, {len(features)}"
        )
    levels = [
        attention(student, teacher.detach())
        for student, teacher in zip(features, teacher_features, strict=True)
    ]
    return torch.stack(levels).sum()
