"""torchdistill: mid-level losses under the keys ``selfkd.KDLoss``, ``selfkd.LogitStdKDLoss``, ...

Importing this module registers them where torchdistill is installed; in a configuration, name it
under ``dependencies``.
"""

from __future__ import annotations

import importlib.util
import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from .. import arguments
from ..contract import number_rule
from ..distill import distill
from ..sd_dropout_kl import sd_dropout_kl
from ..simreg import simreg
from . import _shared

_IO = Mapping[str, Mapping[str, Any]]  # module path -> "input" or "output" -> what the module saw


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
        self.temperature = _shared.number(op, "temperature", temperature, "POSITIVE")
        self.alpha = _shared.number(op, "alpha", alpha, optional=True)
        self.beta = _shared.number(op, "beta", beta, optional=True)
        if beta is None and alpha is not None:
            self.beta = 1 - self.alpha
        self.reduction = reduction
        self._hard_reduction = reduction.removeprefix("batch")
        smoothing = arguments.number(op, "label_smoothing", label_smoothing)
        number_rule(op, "label_smoothing", smoothing, "FRACTION")
        self.cross_entropy_loss = nn.CrossEntropyLoss(
            weight,
            size_average,
            arguments.integer(op, "ignore_index", ignore_index),
            reduce,
            self._hard_reduction,
            smoothing,
        )

    def _softened(self, logits: torch.Tensor) -> torch.Tensor:
        """What the KL divergence sees of the logits."""
        return logits

    def _is_one_pass(self, teacher: torch.Tensor, targets: torch.Tensor) -> bool:
        numbers, ce = (self.alpha, self.beta), self.cross_entropy_loss
        learning = any(arguments.wants_gradient(x) for x in (teacher, self.temperature, *numbers))
        plain = ce.weight is None and ce.reduction == self._hard_reduction
        return not learning and plain and targets.dtype == torch.int64 and min(numbers) >= 0

    def _check_targets(self, logits: torch.Tensor, targets: Any) -> None:
        arguments.tensor(self._op, "targets", targets)
        probabilities = targets.is_floating_point() and targets.shape == logits.shape
        expected = (len(logits), *logits.shape[2:])
        if not probabilities and (targets.dtype, targets.shape) != (torch.int64, expected):
            dtype = str(targets.dtype).removeprefix("torch.")
            raise ValueError(
                f"{self._op}: targets have dtype {dtype} and shape {tuple(targets.shape)}, expected int64"
                f" and {expected}, or probabilities of the logits' shape {tuple(logits.shape)}"
            )
        if targets.device != logits.device:
            raise TypeError(
                f"{self._op}: targets are on {targets.device}, expected {logits.device} like the logits"
            )

    def forward(
        self,
        student_io_dict: _IO,
        teacher_io_dict: _IO,
        targets: torch.Tensor | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> torch.Tensor:
        """The loss: 0-d, or of the logits' shape for ``"none"``.

        Raises
        ------
        TypeError, ValueError
            A module was not seen, or gave no logits; an argument is not what it must be.
        """
        op, temperature = self._op, self.temperature
        student_name, logits = _found(
            op, "student", student_io_dict, self.student_module_path, self.student_module_io
        )
        teacher_name, teacher = _found(
            op, "teacher", teacher_io_dict, self.teacher_module_path, self.teacher_module_io
        )
        _shared.check_logits(op, (student_name, teacher_name), logits, teacher)
        hard = None if self.alpha is None or self.alpha == 0 else targets
        if hard is not None:
            self._check_targets(logits, hard)
        if self.reduction == "none":
            if hard is not None:
                raise ValueError(
                    f'{op}: reduction is "none" with alpha {self.alpha}, expected "batchmean", "sum" or'
                    ' "mean": the terms have other shapes; selfkd.distill(logits, targets, teacher,'
                    ' reduction="none") has a value for each row'
                )
            given = self._softened(logits), self._softened(teacher)
            return _shared.kl_of_each_logit(*given, temperature)
        reduction, factor = _shared.from_kl_div(self.reduction, logits)
        if hard is not None and self._is_one_pass(teacher, hard):
            one_pass: torch.Tensor = distill(  # type: ignore[assignment]
                logits,
                hard,
                teacher.detach(),
                ce_weight=arguments.number(op, "alpha", self.alpha),
                teacher_weights=factor * arguments.number(op, "beta", self.beta),
                temperature=arguments.number(op, "temperature", temperature),
                label_smoothing=self.cross_entropy_loss.label_smoothing,
                ignore_index=self.cross_entropy_loss.ignore_index,
                reduction=reduction,
            )
            return one_pass
        weight = factor / temperature**2 if hard is None else factor * self.beta
        soft = _shared.kl(
            op,
            self._softened(logits),
            self._softened(teacher),
            temperature=temperature,
            weight=weight,
            reduction=reduction,
        )
        if hard is None:
            return soft
        loss: torch.Tensor = self.alpha * self.cross_entropy_loss(logits, hard) + soft
        return loss


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

    def _softened(self, logits: torch.Tensor) -> torch.Tensor:
        return _shared.standardized(logits, self.eps)

    def _is_one_pass(self, teacher: torch.Tensor, targets: torch.Tensor) -> bool:
        return False  # the cross-entropy sees the logits as they are


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

    def forward(
        self, student_io_dict: _IO, teacher_io_dict: _IO, *args: Any, **kwargs: Any
    ) -> torch.Tensor:
        """The weighted sum over the pairs; 0-d.

        Raises
        ------
        TypeError, ValueError
            A module was not seen, or gave no features, or they have other positions.
        """
        losses, sizes = [], []
        for pair in self.at_pairs.values():
            student_at, teacher_at = pair["student"], pair["teacher"]
            student_name, student = _found(
                "ATLoss", "student", student_io_dict, student_at["path"], student_at["io"]
            )
            teacher_name, teacher = _found(
                "ATLoss", "teacher", teacher_io_dict, teacher_at["path"], teacher_at["io"]
            )
            _shared.check_maps("ATLoss", (student_name, teacher_name), student, teacher)
            of_pair = _shared.at if self.mode == "code" else _distances
            losses.append(pair.get("weight", 1) * of_pair(student, teacher))
            sizes.append(len(student))
        total = torch.stack(losses).sum()
        return total if self.mode == "code" else total / sizes[0]


def _distances(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    """The sum over the batch of the distance of two maps (arXiv 1612.03928, equation 2)."""
    q, p = (F.normalize(x.pow(2).sum(1).flatten(1)) for x in (student, teacher))
    distances: torch.Tensor = torch.linalg.vector_norm(q - p, dim=1).sum()
    return distances


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
        _check_options("SDDropoutLoss", sd_dropout_kl, options)
        self.student, self.options = (student_module_path, student_module_io), options

    def forward(self, student_io_dict: _IO, *args: Any, **kwargs: Any) -> torch.Tensor:
        """The mean over the batch.

        Raises
        ------
        TypeError, ValueError
            The module was not seen, or gave no pair of logits.
        """
        op = "SDDropoutLoss"
        name, pair = _found(op, "student", student_io_dict, *self.student)
        if not isinstance(pair, (list, tuple)) or len(pair) != 2:
            raise TypeError(
                f"{op}: {name} is {arguments.described(pair)}, expected a pair (u, v) of logits"
            )
        _shared.check_logits(op, (f"{name}[0]", f"{name}[1]"), *pair)
        return sd_dropout_kl(*pair, **self.options)


class SimRegLoss(nn.Module):
    """SimReg, :func:`selfkd.simreg`, of the student's predictions and the teacher's features.

    The teacher's features are detached, as SimReg defines its teacher.

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
        _check_options("SimRegLoss", simreg, options)
        self.student = student_module_path, student_module_io
        self.teacher = teacher_module_path, teacher_module_io
        self.options = options

    def forward(
        self, student_io_dict: _IO, teacher_io_dict: _IO, *args: Any, **kwargs: Any
    ) -> torch.Tensor:
        """The mean over the batch.

        Raises
        ------
        TypeError, ValueError
            A module was not seen, or gave no features, or they have other shapes.
        """
        op = "SimRegLoss"
        student_name, student = _found(op, "student", student_io_dict, *self.student)
        teacher_name, teacher = _found(op, "teacher", teacher_io_dict, *self.teacher)
        _shared.check_logits(op, (student_name, teacher_name), student, teacher)
        return simreg(student, teacher.detach(), **self.options)


def _found(op: str, side: str, io_dict: Any, path: str, io: str) -> tuple[str, Any]:
    """What torchdistill saw of a module, and its name for sentences."""
    name = f"{side}_io_dict"
    if not isinstance(io_dict, Mapping):
        raise TypeError(
            f"{op}: {name} is {arguments.described(io_dict)}, expected a dict of modules"
        )
    of_module = io_dict.get(path)
    if not isinstance(of_module, Mapping) or io not in of_module:
        seen = ", ".join(f'"{module}"' for module in io_dict) or "none"
        raise ValueError(
            f'{op}: {name} has no {io} of module "{path}", expected one of what was seen ({seen}); the'
            f" {side}'s forward_hook in the configuration says of which modules"
        )
    return f'{name}["{path}"]["{io}"]', of_module[io]


def _check_options(op: str, function: Callable[..., Any], options: Mapping[str, Any]) -> None:
    """Raise TypeError for an option that the function does not have."""
    parameters = inspect.signature(function).parameters.values()
    names = [x.name for x in parameters if x.kind is inspect.Parameter.KEYWORD_ONLY]
    for name in options:
        if name not in names:
            raise TypeError(f"{op}: {name} is given, expected of {', '.join(names)}")


def register() -> None:
    """Register the losses with torchdistill; an ImportError says what to install where it is missing."""
    try:
        from torchdistill.losses.registry import register_mid_level_loss
    except ModuleNotFoundError as error:
        raise ImportError(
            "selfkd.integrations.torchdistill.register needs torchdistill: pip install torchdistill"
        ) from error
    for loss in (KDLoss, LogitStdKDLoss, ATLoss, SDDropoutLoss, SimRegLoss):
        register_mid_level_loss(loss, key=f"selfkd.{loss.__name__}")


if importlib.util.find_spec("torchdistill"):
    register()
