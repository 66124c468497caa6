"""torchdistill: losses that it has none of, where its dictionaries say what was seen of modules."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import torch
from torch import nn

from .. import arguments
from ..js_divergence import js_divergence
from ..sd_dropout_kl import sd_dropout_kl
from ..simreg import simreg
from ..topk_divergence import topk_divergence
from . import _shared
from ._places import IO, Place, found, places


def _check_options(op: str, function: Callable[..., Any], options: Mapping[str, Any]) -> None:
    """Raise TypeError for an option that the function does not have."""
    parameters = inspect.signature(function).parameters.values()
    names = [x.name for x in parameters if x.kind is inspect.Parameter.KEYWORD_ONLY]
    for name in options:
        if name not in names:
            raise TypeError(f"{op}: {name} is given, expected of {', '.join(names)}")


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
        self.student = Place("student", student_module_path, student_module_io)
        self.options = options

    def _check(self, student_io_dict: Any, *_: Any, **__: Any) -> None:
        op, name = "SDDropoutLoss", self.student.name
        pair = self.student.found(op, student_io_dict)
        if not isinstance(pair, (list, tuple)) or len(pair) != 2:
            raise TypeError(
                f"{op}: {name} is {arguments.described(pair)}, expected a pair (u, v) of logits"
            )
        _shared.check_logits(op, (f"{name}[0]", f"{name}[1]"), *pair)

    @_shared.explained(_check)
    def forward(self, student_io_dict: IO, *args: Any, **kwargs: Any) -> torch.Tensor:
        """The mean over the batch."""
        u, v = self.student.of(student_io_dict)
        return sd_dropout_kl(u, v, **self.options)


class _OfBoth(nn.Module):
    """A loss of what a module of the student and one of the teacher give, with the options of a function."""

    _function: ClassVar[Callable[..., torch.Tensor]]

    def __init__(
        self,
        student_module_path: str,
        student_module_io: str,
        teacher_module_path: str,
        teacher_module_io: str,
        **options: Any,
    ) -> None:
        super().__init__()
        self._op = type(self).__name__
        _check_options(self._op, self._function, options)
        self.student, self.teacher = places(
            student_module_path, student_module_io, teacher_module_path, teacher_module_io
        )
        self.options = options

    def _check(self, student_io_dict: Any, teacher_io_dict: Any, *_: Any, **__: Any) -> None:
        both = self.student, self.teacher
        student, teacher, names = found(self._op, both, student_io_dict, teacher_io_dict)
        _shared.check_logits(self._op, names, student, teacher)

    def _loss(self, student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
        raise NotImplementedError

    @_shared.explained(_check)
    def forward(
        self, student_io_dict: IO, teacher_io_dict: IO, *args: Any, **kwargs: Any
    ) -> torch.Tensor:
        """The mean over the batch, unless ``reduction`` says otherwise."""
        return self._loss(self.student.of(student_io_dict), self.teacher.of(teacher_io_dict))


class SimRegLoss(_OfBoth):
    """SimReg, :func:`selfkd.simreg`, of the student's predictions and the teacher's features.

    The teacher's features are detached, as SimReg defines its teacher.

    Parameters
    ----------
    student_module_path, student_module_io, teacher_module_path, teacher_module_io
        Where they are found: the output of a :class:`selfkd.nn.SimRegHead`, (N, D), and features (N, D).
    **options
        As for :func:`selfkd.simreg`: ``normalize``, ``dim``.
    """

    _function = staticmethod(simreg)

    def _loss(self, student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
        return simreg(student, teacher.detach(), **self.options)


class JSDivergenceLoss(_OfBoth):
    """The generalised Jensen-Shannon divergence, :func:`selfkd.js_divergence`, of student and teacher.

    Parameters
    ----------
    student_module_path, student_module_io, teacher_module_path, teacher_module_io
        Where the logits (N, C) or (N, C, ...) are found. A teacher that requires grad gets one.
    **options
        As for :func:`selfkd.js_divergence`: ``beta``, ``teacher_weight``, ``student_weight``,
        ``temperature``, ``kind``, ``dim``.
    """

    _function = staticmethod(js_divergence)

    def _loss(self, student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
        return _shared.js(student, teacher, **self.options)


class TopKDivergenceLoss(_OfBoth):
    """The divergence over the teacher's likeliest classes, :func:`selfkd.topk_divergence`.

    Parameters
    ----------
    student_module_path, student_module_io, teacher_module_path, teacher_module_io
        Where the logits (N, C) or (N, C, ...) are found. A teacher that requires grad gets one, from plain
        PyTorch.
    k
        How many classes, 1 to C.
    **options
        As for :func:`selfkd.topk_divergence`: ``tail``, ``beta``, ``temperature``, ``kind``, ``dim``.
    """

    _function = staticmethod(topk_divergence)

    def __init__(self, *where: str, k: int = 100, **options: Any) -> None:
        super().__init__(*where, **options)
        self.k = arguments.at_least(self._op, "k", k, 1)

    def _loss(self, student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
        return _shared.top_k(student, teacher, self.k, **self.options)
