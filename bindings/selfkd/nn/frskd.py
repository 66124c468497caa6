"""FRSKD: feature refinement via self-knowledge distillation, the loss of classifier and self-teacher."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from .. import arguments
from ..attention import attention
from ..distill import distill

_OP = "FRSKDLoss"
_REFERENCES = (
    "compose the loss of selfkd.reference.distill and selfkd.reference.attention, which give it one"
)
_Target = torch.Tensor | tuple[torch.Tensor, torch.Tensor, float]


def _number(name: str, value: Any, rule: str = "NONNEGATIVE") -> Any:
    """`value` as a Python number within the range of a rule of the contracts."""
    return arguments.in_range(_OP, name, value, rule, _REFERENCES)


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
    :func:`selfkd.attention`. By the paper's definition the targets o' of the divergence and T_i of the
    features are detached here, whether they ask for a gradient or not, and nothing else is: the
    self-teacher learns from CE(o', y), and through the features that it refines so does the classifier.

    Parameters
    ----------
    alpha, beta
        Weights of the soft labels and of the features, finite and >= 0. Attributes, which a schedule
        may set. ``beta=0`` is FRSKD\\F, which needs no features.
    temperature
        T, finite and > 0: 4 for classification, 1 for segmentation.
    label_smoothing, ignore_index
        Of both cross-entropies, as for :func:`torch.nn.functional.cross_entropy`. The soft labels
        of ignored positions count, as in the paper's segmentation.

    Raises
    ------
    TypeError
        What is no number.
    ValueError
        A number that is not accepted, or a tensor in its place that requires grad: numbers get none.

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
        self.alpha, self.beta = _number("alpha", alpha), _number("beta", beta)
        self.temperature = _number("temperature", temperature, "POSITIVE")
        self.label_smoothing = _number("label_smoothing", label_smoothing, "FRACTION")
        self.ignore_index = arguments.integer(_OP, "ignore_index", ignore_index)

    @arguments.public(_OP)
    def forward(
        self,
        logits: torch.Tensor,
        teacher_logits: torch.Tensor,
        features: torch.Tensor | Sequence[torch.Tensor] | None,
        teacher_features: torch.Tensor | Sequence[torch.Tensor] | None,
        target: _Target,
        *,
        ramp: float = 1.0,
    ) -> tuple[torch.Tensor, FRSKDParts]:
        """The loss and its parts.

        Parameters
        ----------
        logits, teacher_logits
            o and o', (N, C), or (N, C, H, W) for segmentation. Both get gradients.
        features, teacher_features
            F_i and T_i, (N, C_i, H_i, W_i) and (N, D_i, H_i, W_i), after their ReLU, of as many levels
            (a tensor is one level); not looked at, and may be None, where `beta` or `ramp` is 0. Only
            `features` get gradients.
        target
            Class of each row or pixel, int64. Of mixed images (mixup, CutMix) ``(y_a, y_b, lam)``, with
            which both cross-entropies are lam CE(y_a) + (1 - lam) CE(y_b). Probabilities, of the
            logits' shape and floating, are taken too: :func:`torch.nn.functional.cross_entropy` works
            on them, not the fused pass.
        ramp
            Times `alpha` and `beta`: 0 while only the cross-entropies count.

        Raises
        ------
        TypeError, ValueError
            An argument, or an attribute that was set, that is not accepted.
        """
        # Those that are multiplied here; of the others distill says what is wrong.
        ramp = _number("ramp", ramp)
        alpha, beta = ramp * _number("alpha", self.alpha), ramp * _number("beta", self.beta)
        options = {"label_smoothing": self.label_smoothing, "ignore_index": self.ignore_index}
        labels = _labels(target)
        # What of the classifier's cross-entropy goes with the soft labels in one pass, and the rest.
        (share, y), *rest = labels
        fused: torch.Tensor | None = y
        if y.is_floating_point() or (rest and torch.compiler.is_compiling()):
            fused, share, rest = None, 1.0, labels
        loss, ce, kl = distill(
            logits,
            fused,
            teacher_logits.detach(),
            ce_weight=share,
            teacher_weights=alpha,
            temperature=self.temperature,
            return_parts=True,
            **options,
        )
        for label in rest:
            term = _cross_entropy(logits, *label, options)
            loss, ce = loss + term, ce + term.detach()
        terms = [_cross_entropy(teacher_logits, *label, options) for label in labels]
        teacher_ce = functools.reduce(torch.add, terms)
        loss = loss + teacher_ce
        if beta == 0:
            return loss, FRSKDParts(ce, teacher_ce.detach(), kl, torch.zeros_like(kl))
        transfer = beta * _transfer(_levels(features), _levels(teacher_features))
        return loss + transfer, FRSKDParts(ce, teacher_ce.detach(), kl, transfer.detach())

    def extra_repr(self) -> str:
        names = ["alpha", "beta", "temperature", "label_smoothing", "ignore_index"]
        return ", ".join(f"{name}={getattr(self, name)}" for name in names)


def _labels(target: Any) -> list[tuple[float, torch.Tensor]]:
    """Targets and their shares."""
    if isinstance(target, torch.Tensor):
        return [(1.0, target)]
    if not isinstance(target, (tuple, list)):
        arguments.tensor(_OP, "target", target)  # raises
    if len(target) != 3:
        raise ValueError(
            f"{_OP}: target has {len(target)} entries, expected a tensor or (y_a, y_b, lam)"
        )
    for name, y in zip(("y_a", "y_b"), target[:2], strict=True):
        arguments.tensor(_OP, name, y)
    lam = target[2]
    if torch.compiler.is_compiling() and type(lam) is float:  # no constant: every step has another
        arguments.number_rule(_OP, "lam", lam, "FRACTION")
    else:
        lam = _number("lam", lam, "FRACTION")
    return [(lam, target[0]), (1 - lam, target[1])]


def _cross_entropy(
    logits: torch.Tensor, share: float, y: torch.Tensor, options: dict[str, Any]
) -> torch.Tensor:
    """`share` times the mean cross-entropy with classes or probabilities."""
    if not (y.is_floating_point() and y.shape == logits.shape):
        if torch.compiler.is_compiling():  # a share that changes may not be an operator's argument
            return share * distill(logits, y, **options)  # type: ignore[operator]
        return distill(logits, y, ce_weight=share, **options)  # type: ignore[return-value]
    if options["ignore_index"] >= 0:
        raise ValueError(
            f"{_OP}: ignore_index is {options['ignore_index']}, expected -100 with a target of probabilities"
        )
    dtype = arguments.accumulator(logits)
    smoothing = _number("label_smoothing", options["label_smoothing"], "FRACTION")
    return share * F.cross_entropy(logits.to(dtype), y.to(dtype), label_smoothing=smoothing)


def _levels(maps: Any) -> Any:
    """A list of levels; a tensor is one."""
    return [maps] if isinstance(maps, torch.Tensor) else maps


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
    return functools.reduce(torch.add, levels)
