"""torchdistill: mid-level losses under the keys ``selfkd.KDLoss``, ``selfkd.LogitStdKDLoss``, ...

Importing this module registers them where torchdistill is installed; in a configuration, name it
under ``dependencies``.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from .. import arguments
from ..distill import distill
from . import _shared
from ._own import JSDivergenceLoss, SDDropoutLoss, SimRegLoss, TopKDivergenceLoss
from ._places import IO, found, places

__all__ = [
    "ATLoss",
    "JSDivergenceLoss",
    "KDLoss",
    "LogitStdKDLoss",
    "SDDropoutLoss",
    "SimRegLoss",
    "TopKDivergenceLoss",
    "register",
]


class KDLoss(nn.Module):
    """alpha CE + beta T^2 KL of teacher and student: torchdistill's ``KDLoss`` with its arguments.

    One pass over the logits where nothing but the student's asks for a gradient and the targets are classes
    without weights; otherwise the cross-entropy is PyTorch's.

    Parameters
    ----------
    student_module_path, student_module_io, teacher_module_path, teacher_module_io
        Where the logits (N, C) or (N, C, ...) are found: a module, and ``"input"`` or ``"output"``. A
        teacher that requires grad gets one, as there.
    temperature
        T, finite and > 0.
    alpha, beta
        Numbers; beta is 1 - alpha by default. As there, without alpha (None or 0) or without
        targets the loss is the KL divergence alone, without T^2 and beta.
    reduction
        ``"batchmean"`` (cross-entropy: mean), ``"sum"`` or ``"mean"``; ``"none"``, a value for each logit, of
        the KL divergence alone.
    weight, size_average, ignore_index, reduce, label_smoothing
        Of the cross-entropy, as for :class:`torch.nn.CrossEntropyLoss`.

    Notes
    -----
    Equal to ``KDLoss`` of ``torchdistill/losses/mid_level.py`` (torchdistill 1.1.5), which cannot do without
    both alpha and beta.
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
        weight: torch.Tensor | None = None,
        size_average: bool | None = None,
        ignore_index: int = -100,
        reduce: bool | None = None,
        label_smoothing: float = 0.0,
    ) -> None:
        super().__init__()
        op = self._op = type(self).__name__
        _shared.check_reduction(op, reduction)
        arguments.tensor(op, "weight", weight, optional=True)
        self.student_module_path, self.student_module_io = student_module_path, student_module_io
        self.teacher_module_path, self.teacher_module_io = teacher_module_path, teacher_module_io
        self._places = places(
            student_module_path, student_module_io, teacher_module_path, teacher_module_io
        )
        self.temperature = _shared.number(op, "temperature", temperature, "POSITIVE")
        self.alpha = _shared.number(op, "alpha", alpha, optional=True)
        self.beta = _shared.number(op, "beta", beta, optional=True)
        if beta is None and alpha is not None:
            self.beta = 1 - self.alpha
        self.reduction = reduction
        self._smoothing = arguments.in_range(op, "label_smoothing", label_smoothing, "FRACTION")
        self._ignored = arguments.integer(op, "ignore_index", ignore_index)
        hard_reduction = reduction.removeprefix("batch")
        self.cross_entropy_loss = nn.CrossEntropyLoss(
            weight, size_average, self._ignored, reduce, hard_reduction, self._smoothing
        )
        self._fuses = weight is None and self.cross_entropy_loss.reduction == hard_reduction

    def _softened(self, logits: torch.Tensor) -> torch.Tensor:
        """What the KL divergence sees of the logits."""
        return logits

    def _check(
        self, student_io_dict: Any, teacher_io_dict: Any, targets: Any = None, *_: Any, **__: Any
    ) -> None:
        op = self._op
        logits, teacher, names = found(op, self._places, student_io_dict, teacher_io_dict)
        _shared.check_logits(op, names, logits, teacher)
        if self.alpha is None or self.alpha == 0 or targets is None:
            return
        arguments.tensor(op, "targets", targets)
        probabilities = targets.is_floating_point() and targets.shape == logits.shape
        expected = (len(logits), *logits.shape[2:])
        if not probabilities and (targets.dtype, targets.shape) != (torch.int64, expected):
            dtype = str(targets.dtype).removeprefix("torch.")
            raise ValueError(
                f"{op}: targets have dtype {dtype} and shape {tuple(targets.shape)}, expected int64 and"
                f" {expected}, or probabilities of the logits' shape {tuple(logits.shape)}"
            )
        if targets.device != logits.device:
            raise TypeError(
                f"{op}: targets are on {targets.device}, expected {logits.device} like the logits"
            )

    @_shared.explained(_check)
    def forward(
        self,
        student_io_dict: IO,
        teacher_io_dict: IO,
        targets: torch.Tensor | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> torch.Tensor:
        """The loss: 0-d, or of the logits' shape for ``"none"``."""
        student_at, teacher_at = self._places
        logits, teacher = student_at.of(student_io_dict), teacher_at.of(teacher_io_dict)
        hard = None if self.alpha is None or self.alpha == 0 else targets
        if self.reduction == "none":
            return self._of_each_logit(logits, teacher, hard)
        reduction, factor = _shared.from_kl_div(self.reduction, logits)
        if hard is not None and self._is_one_pass(teacher, hard):
            one_pass: torch.Tensor = distill(  # type: ignore[assignment]
                logits,
                hard,
                teacher,
                ce_weight=self.alpha,
                teacher_weights=factor * self.beta,
                temperature=self.temperature,
                label_smoothing=self._smoothing,
                ignore_index=self._ignored,
                reduction=reduction,
            )
            return one_pass
        soft = _shared.kl(
            self._softened(logits),
            self._softened(teacher),
            temperature=self.temperature,
            weight=factor * self.beta if hard is not None else factor / self.temperature**2,
            reduction=reduction,
        )
        if hard is None:
            return soft
        loss: torch.Tensor = self.alpha * self.cross_entropy_loss(logits, hard) + soft
        return loss

    def _is_one_pass(self, teacher: torch.Tensor, targets: torch.Tensor) -> bool:
        """Whether :func:`selfkd.distill` has it all: no class weights, no mixed targets, one side learns."""
        return (
            self._fuses
            and targets.dtype == torch.int64
            and isinstance(teacher, torch.Tensor)
            and not arguments.wants_gradient(teacher)
            and not isinstance(self.temperature, torch.Tensor)
            and not isinstance(self.alpha, torch.Tensor)
            and not isinstance(self.beta, torch.Tensor)
            and self.alpha > 0
            and self.beta >= 0
        )

    def _of_each_logit(
        self, logits: torch.Tensor, teacher: torch.Tensor, hard: torch.Tensor | None
    ) -> torch.Tensor:
        op, names = self._op, ("the student's logits", "the teacher's logits")
        _shared.check_logits(op, names, logits, teacher)
        if hard is not None:
            raise ValueError(
                f'{op}: reduction is "none" with alpha {self.alpha}, expected "batchmean", "sum" or "mean":'
                " the terms have other shapes; selfkd.distill(logits, targets, teacher,"
                ' reduction="none") has a value for each row'
            )
        logits, teacher = self._softened(logits), self._softened(teacher)
        return _shared.kl_of_each_logit(logits, teacher, self.temperature)


class LogitStdKDLoss(KDLoss):
    """:class:`KDLoss` whose KL divergence is that of standardised logits: torchdistill's ``LogitStdKDLoss``.

    Parameters
    ----------
    student_module_path, student_module_io, teacher_module_path, teacher_module_io, temperature
        As for :class:`KDLoss`.
    eps
        Is added to the standard deviation that each row is divided by.
    alpha, beta, reduction, **kwargs
        As for :class:`KDLoss`.

    Notes
    -----
    Equal to ``LogitStdKDLoss`` of ``torchdistill/losses/mid_level.py`` (torchdistill 1.1.5). Source:
    arXiv 2403.01427.
    """

    def __init__(
        self,
        student_module_path: str,
        student_module_io: str,
        teacher_module_path: str,
        teacher_module_io: str,
        temperature: float,
        eps: float = 1e-7,
        alpha: float | None = None,
        beta: float | None = None,
        reduction: str = "batchmean",
        **kwargs: Any,
    ) -> None:
        where = student_module_path, student_module_io, teacher_module_path, teacher_module_io
        super().__init__(*where, temperature, alpha, beta, reduction, **kwargs)
        self.eps = _shared.number(self._op, "eps", eps)
        self._fuses = False  # the cross-entropy sees the logits as they are

    def _softened(self, logits: torch.Tensor) -> torch.Tensor:
        return _shared.standardized(logits, self.eps)


class ATLoss(nn.Module):
    """Attention transfer: torchdistill's ``ATLoss`` with its arguments.

    Parameters
    ----------
    at_pairs
        ``{name: {"student": {"path", "io"}, "teacher": {"path", "io"}, "weight": 1}}``, features
        (N, C, ...) of as many positions. A teacher that requires grad gets one, as there.
    mode
        ``"code"``, :func:`selfkd.attention`; or ``"paper"``, the distance of the maps, not squared, summed
        over the batch and divided by its size, which plain PyTorch computes.
    **kwargs
        Not looked at, as there.

    Notes
    -----
    Equal to ``ATLoss`` of ``torchdistill/losses/mid_level.py`` (torchdistill 1.1.5).
    """

    def __init__(
        self, at_pairs: Mapping[str, Mapping[str, Any]], mode: str = "code", **kwargs: Any
    ) -> None:
        super().__init__()
        if mode not in ("code", "paper"):
            found = arguments.described(mode)
            raise ValueError(f'ATLoss: mode is {found}, expected "code" or "paper"')
        if not isinstance(at_pairs, Mapping) or not at_pairs:
            raise ValueError(
                f"ATLoss: at_pairs is {arguments.described(at_pairs)}, expected a dict of at least one pair"
            )
        for name, pair in at_pairs.items():
            for side in ("student", "teacher"):
                where = pair.get(side) if isinstance(pair, Mapping) else None
                if not isinstance(where, Mapping) or not {"path", "io"} <= where.keys():
                    raise ValueError(
                        f'ATLoss: at_pairs["{name}"]["{side}"] is {arguments.described(where)},'
                        " expected a dict with path and io"
                    )
            _shared.number("ATLoss", f'at_pairs["{name}"]["weight"]', pair.get("weight", 1))
        self.at_pairs, self.mode = at_pairs, mode
        self._places = [
            places(*(pair[side][key] for side in ("student", "teacher") for key in ("path", "io")))
            for pair in at_pairs.values()
        ]

    def _check(self, student_io_dict: Any, teacher_io_dict: Any, *_: Any, **__: Any) -> None:
        for pair in self._places:
            student, teacher, names = found("ATLoss", pair, student_io_dict, teacher_io_dict)
            _shared.check_maps("ATLoss", names, student, teacher)

    @_shared.explained(_check)
    def forward(
        self, student_io_dict: IO, teacher_io_dict: IO, *args: Any, **kwargs: Any
    ) -> torch.Tensor:
        """The weighted sum over the pairs; 0-d."""
        weights = [pair.get("weight", 1) for pair in self.at_pairs.values()]
        pairs = [
            (student.of(student_io_dict), teacher.of(teacher_io_dict), weight)
            for (student, teacher), weight in zip(self._places, weights, strict=True)
        ]
        if self.mode == "code":
            return torch.stack([weight * _shared.at(x, t) for x, t, weight in pairs]).sum()
        self._check(student_io_dict, teacher_io_dict)
        losses = torch.stack([weight * _shared.distances(x, t) for x, t, weight in pairs])
        return losses.sum() / len(pairs[0][0])


def register() -> None:
    """Register the losses with torchdistill; an ImportError says what to install where it is missing."""
    try:
        from torchdistill.losses.registry import register_mid_level_loss
    except ModuleNotFoundError as error:
        raise ImportError(
            "selfkd.integrations.torchdistill.register needs torchdistill: pip install torchdistill"
        ) from error
    for name in __all__:
        if name.endswith("Loss"):
            register_mid_level_loss(globals()[name], key=f"selfkd.{name}")


if importlib.util.find_spec("torchdistill"):
    register()
