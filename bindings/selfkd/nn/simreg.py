"""SimReg: the regression head, and the loss for one or several teachers."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from .. import arguments
from ..simreg import simreg


def _block(inputs: int, outputs: int) -> list[nn.Module]:
    """A hidden layer twice as wide as its input: linear, normalised, rectified, linear."""
    hidden = 2 * inputs
    return [
        nn.Linear(inputs, hidden),
        nn.BatchNorm1d(hidden),
        nn.ReLU(inplace=True),
        nn.Linear(hidden, outputs),
    ]


class SimRegHead(nn.Sequential):
    """The head that maps a student's features to a teacher's; thrown away after training.

    With d = `in_features` and t = `out_features`:

    ====== =======================================================================
    layers modules
    ====== =======================================================================
    4      Lin(d, 2d), BN, ReLU, Lin(2d, d), Lin(d, 2d), BN, ReLU, Lin(2d, t)
    2      Lin(d, 2d), BN, ReLU, Lin(2d, t)
    1      Lin(d, t)
    ====== =======================================================================

    Parameters
    ----------
    in_features
        Width of the student's pooled features.
    out_features
        Width of the teacher's.
    layers
        4 (a projector followed by a predictor; the paper's results), 2 or 1.

    Notes
    -----
    Source: arXiv 2201.05131 and its authors' code, UCDvision/simreg, mlp_arch.py. 4 layers are as
    there. 2 layers have no batch normalisation and no ReLU in the released training code, but have
    both in its evaluation code, as here. The linear head there is meant to be BN, Lin, but cannot
    be constructed; here it is linear.
    """

    @arguments.public("SimRegHead")
    def __init__(self, in_features: int, out_features: int, layers: int = 4) -> None:
        for name, value in (("in_features", in_features), ("out_features", out_features)):
            arguments.at_least("SimRegHead", name, value, 1)
        if arguments.integer("SimRegHead", "layers", layers) not in (1, 2, 4):
            raise ValueError(f"SimRegHead: layers is {layers}, expected 1, 2 or 4")
        projector = _block(in_features, in_features) if layers == 4 else []
        if layers == 1:
            super().__init__(nn.Linear(in_features, out_features))
        else:
            super().__init__(*projector, *_block(in_features, out_features))
        self.in_features = in_features

    @arguments.public("SimRegHead")
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Predictions (N, out_features) of features (N, in_features)."""
        rows_only = len(self) > 1  # a linear layer takes any positions
        if x.ndim == 0 or x.shape[-1] != self.in_features or (rows_only and x.ndim != 2):
            raise ValueError(
                f"SimRegHead: x has shape {tuple(x.shape)}, expected (N, {self.in_features})"
            )
        if len(x) == 1 and any(type(m) is nn.BatchNorm1d and m.training for m in self):
            raise ValueError(
                "SimRegHead: x has 1 row, expected 2 or more in training, for batch statistics: "
                "DataLoader(..., drop_last=True) leaves out a last batch of one"
            )
        found: torch.Tensor = super().forward(x)  # type: ignore[no-untyped-call]
        return found


class SimRegLoss(nn.Module):
    """:func:`selfkd.simreg` of one prediction, or its mean over several teachers.

    Parameters
    ----------
    normalize, reduction, dim
        As for :func:`selfkd.simreg`.

    Notes
    -----
    Source: arXiv 2201.05131. Several teachers have a :class:`SimRegHead` each and count alike; the
    released code has one teacher.
    """

    def __init__(self, *, normalize: bool = True, reduction: str = "mean", dim: int = 1) -> None:
        super().__init__()
        self.normalize, self.reduction, self.dim = normalize, reduction, dim

    @arguments.public("SimRegLoss")
    def forward(
        self,
        predictions: torch.Tensor | Sequence[torch.Tensor],
        targets: torch.Tensor | Sequence[torch.Tensor],
        *,
        weight: torch.Tensor | None = None,
        divisor: float | torch.Tensor | None = None,
    ) -> torch.Tensor:
        """The loss.

        Parameters
        ----------
        predictions
            What the head makes of the student's features, (N, D); or a sequence of them, one for
            each teacher, whose widths may differ.
        targets
            Features of the teacher, or a sequence as long; they get no gradient.
        weight, divisor
            As for :func:`selfkd.simreg`, for every teacher.
        """
        if isinstance(predictions, torch.Tensor) != isinstance(targets, torch.Tensor):
            raise TypeError(
                "SimRegLoss: predictions and targets differ, expected two tensors or two sequences"
            )
        if isinstance(predictions, torch.Tensor) or isinstance(targets, torch.Tensor):
            predictions, targets = [predictions], [targets]  # type: ignore[list-item]
        if len(predictions) != len(targets) or not predictions:
            raise ValueError(
                f"SimRegLoss: targets has length {len(targets)}, expected that of predictions, "
                f"{len(predictions)}, and at least 1"
            )
        losses = [
            simreg(
                prediction,
                target,
                normalize=self.normalize,
                weight=weight,
                reduction=self.reduction,
                divisor=divisor,
                dim=self.dim,
            )
            for prediction, target in zip(predictions, targets, strict=True)
        ]
        if any(x.shape != losses[0].shape for x in losses):
            shapes = [tuple(x.shape) for x in losses]
            raise ValueError(
                f'SimRegLoss: losses have shapes {shapes}, expected one with reduction "none"'
            )
        return losses[0] if len(losses) == 1 else torch.stack(losses).mean(0)

    def extra_repr(self) -> str:
        return f"normalize={self.normalize}, reduction={self.reduction!r}, dim={self.dim}"
