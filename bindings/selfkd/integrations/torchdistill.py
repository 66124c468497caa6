"""torchdistill: mid-level losses under the keys ``selfkd.KDLoss``, ``selfkd.ATLoss``, ...

Importing this module registers them where torchdistill is installed; in a configuration, name it
under ``dependencies``.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from ..attention import attention
from ..distill import distill
from ..sd_dropout_kl import sd_dropout_kl
from ..simreg import simreg
from ._reductions import REDUCTIONS, from_kl_div

_IO = Mapping[str, Mapping[str, Any]]  # module path -> "input" or "output" -> what the module saw


class KDLoss(nn.Module):
    """alpha CE + beta T^2 KL of teacher and student: torchdistill's ``KDLoss`` with its arguments.

    Parameters
    ----------
    student_module_path, student_module_io, teacher_module_path, teacher_module_io
        Where the logits (N, C) or (N, C, ...) are found: a module, and ``"input"`` or ``"output"``.
    temperature
        T, finite and > 0.
    alpha, beta
        Weights >= 0; beta is 1 - alpha by default. As there, without alpha (None or 0) or without
        targets the loss is the KL divergence alone, without T^2 and beta.
    reduction
        ``"batchmean"`` (cross-entropy: mean), ``"sum"`` or ``"mean"``.
    label_smoothing, ignore_index
        Of the cross-entropy.
    """

    def __init__(
        self,
        student_module_path: str,
        student_module_io: str,
        teacher_module_path: str,
        teacher_module_io: str,
        temperature: float,
        alpha: float | None = None,
        beta: float | None = None,
        reduction: str = "batchmean",
        *,
        label_smoothing: float = 0.0,
        ignore_index: int = -100,
    ) -> None:
        super().__init__()
        if reduction not in REDUCTIONS:
            raise ValueError(
                f'KDLoss: reduction is "{reduction}", expected "batchmean", "sum" or "mean"'
            )
        self.student = student_module_path, student_module_io
        self.teacher = teacher_module_path, teacher_module_io
        self.temperature, self.reduction = temperature, reduction
        self.alpha = alpha or 0.0
        self.beta = 1 - self.alpha if beta is None else beta
        self.label_smoothing, self.ignore_index = label_smoothing, ignore_index

    def forward(
        self,
        student_io_dict: _IO,
        teacher_io_dict: _IO,
        targets: torch.Tensor | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> torch.Tensor:
        """The loss."""
        logits, teacher = (
            _found(student_io_dict, self.student),
            _found(teacher_io_dict, self.teacher),
        )
        reduction, factor = from_kl_div(self.reduction, logits)
        hard = self.alpha != 0 and targets is not None
        loss: torch.Tensor = distill(  # type: ignore[assignment]
            logits,
            targets if hard else None,
            teacher,
            ce_weight=self.alpha,
            teacher_weights=factor * self.beta if hard else factor / self.temperature**2,
            temperature=self.temperature,
            label_smoothing=self.label_smoothing,
            ignore_index=self.ignore_index,
            reduction=reduction,
        )
        return loss


class ATLoss(nn.Module):
    """Attention transfer, :func:`selfkd.attention`: torchdistill's ``ATLoss`` in its mode ``"code"``.

    Parameters
    ----------
    at_pairs
        ``{name: {"student": {"path", "io"}, "teacher": {"path", "io"}, "weight": 1}}``, features
        (N, C, ...) of as many positions.
    mode
        ``"code"``; the other mode is torchdistill's alone.
    """

    def __init__(self, at_pairs: Mapping[str, Mapping[str, Any]], mode: str = "code") -> None:
        super().__init__()
        if mode != "code":
            raise ValueError(
                f'ATLoss: mode is "{mode}", expected "code" (torchdistill\'s own ATLoss has "paper")'
            )
        self.at_pairs = at_pairs

    def forward(
        self, student_io_dict: _IO, teacher_io_dict: _IO, *args: Any, **kwargs: Any
    ) -> torch.Tensor:
        """The weighted sum over the pairs."""
        losses = []
        for pair in self.at_pairs.values():
            features, teacher = (
                _found(found, (pair[side]["path"], pair[side]["io"]))
                for found, side in ((student_io_dict, "student"), (teacher_io_dict, "teacher"))
            )
            losses.append(pair.get("weight", 1) * attention(features, teacher.detach()))
        return torch.stack(losses).sum()


class SDDropoutLoss(nn.Module):
    """SD-Dropout, :func:`selfkd.sd_dropout_kl` of the two dropout samples that a module of the student gives.

    Parameters
    ----------
    student_module_path, student_module_io
        Where the pair (u, v) of logits is found.
    **options
        As for :func:`selfkd.sd_dropout_kl`: ``temperature``, ``forward_weight``, ``reverse_weight``,
        ``detach_target``.
    """

    def __init__(
        self, student_module_path: str, student_module_io: str = "output", **options: Any
    ) -> None:
        super().__init__()
        self.student, self.options = (student_module_path, student_module_io), options

    def forward(self, student_io_dict: _IO, *args: Any, **kwargs: Any) -> torch.Tensor:
        """The mean over the batch."""
        u, v = _found(student_io_dict, self.student)
        return sd_dropout_kl(u, v, **self.options)


class SimRegLoss(nn.Module):
    """SimReg, :func:`selfkd.simreg`, of the student's predictions and the teacher's features.

    Parameters
    ----------
    student_module_path, student_module_io, teacher_module_path, teacher_module_io
        Where they are found: the output of a :class:`selfkd.nn.SimRegHead`, (N, D), and features (N, D).
    **options
        As for :func:`selfkd.simreg`: ``normalize``, ``dim``.
    """

    def __init__(
        self,
        student_module_path: str,
        student_module_io: str,
        teacher_module_path: str,
        teacher_module_io: str,
        **options: Any,
    ) -> None:
        super().__init__()
        self.student = student_module_path, student_module_io
        self.teacher = teacher_module_path, teacher_module_io
        self.options = options

    def forward(
        self, student_io_dict: _IO, teacher_io_dict: _IO, *args: Any, **kwargs: Any
    ) -> torch.Tensor:
        """The mean over the batch."""
        target = _found(teacher_io_dict, self.teacher).detach()
        return simreg(_found(student_io_dict, self.student), target, **self.options)


def _found(io_dict: _IO, where: tuple[str, str]) -> Any:
    path, io = where
    return io_dict[path][io]


def register() -> None:
    """Register the losses with torchdistill; an ImportError says what to install where it is missing."""
    try:
        from torchdistill.losses.registry import register_mid_level_loss
    except ModuleNotFoundError as error:
        raise ImportError(
            "selfkd.integrations.torchdistill.register needs torchdistill: pip install torchdistill"
        ) from error
    for loss in (KDLoss, ATLoss, SDDropoutLoss, SimRegLoss):
        register_mid_level_loss(loss, key=f"selfkd.{loss.__name__}")


if importlib.util.find_spec("torchdistill"):
    register()
