"""timm: the loss of its ``LogitDistillationTask``, in one pass over the logits of student and teacher."""

from __future__ import annotations

import math
from typing import Any

import torch

from . import _shared

__all__ = ["LogitDistillationMixin"]

_LOGITS = ("the student's output", "the teacher's output")


class LogitDistillationMixin:
    """A ``timm.task.LogitDistillationTask`` whose ``kd_loss`` is :func:`selfkd.distill`.

    Put it before timm's class, whose arguments, weights, criterion, normalisation of the teacher's
    input, compiling and distributed training stay what they are; only ``forward`` is another.

    Examples
    --------
    >>> class Task(LogitDistillationMixin, timm.task.LogitDistillationTask):
    ...     pass
    >>> task = Task(student, teacher, nn.CrossEntropyLoss(), task_loss_weight=0.3, temperature=4.0)
    >>> task(images, labels)["loss"].backward()

    Notes
    -----
    Equal to ``timm/task/distillation.py`` of huggingface/pytorch-image-models (commit aa4b585; timm 1.0.31):
    T^2 times the "batchmean" of ``F.kl_div``.
    """

    trainable_module: Any
    teacher: Any
    criterion: Any
    student_mean: torch.Tensor
    student_std: torch.Tensor
    temperature: float
    task_loss_weight: float
    distill_loss_weight: float

    def forward(self, input: torch.Tensor, target: torch.Tensor) -> dict[str, torch.Tensor]:
        """timm's dictionary: ``loss``, the weighted sum of ``task_loss`` and ``kd_loss``; ``output``.

        Raises
        ------
        TypeError, ValueError
            Student and teacher do not give logits (N, C) of one shape.
        """
        output = self.trainable_module(input)
        task_loss = self.criterion(output, target)
        with torch.no_grad():
            seen = self.teacher.normalize_input(input, self.student_mean, self.student_std)
            taught = self.teacher(seen.detach(), return_features=False)
        _shared.check_logits("LogitDistillationTask", _LOGITS, output, taught)
        kd_loss = _shared.kl(
            output,
            taught,
            temperature=self.temperature,
            weight=math.prod(output.shape[1:-1]),  # "batchmean" divides by N alone
            dim=-1,
        )
        loss = self.task_loss_weight * task_loss + self.distill_loss_weight * kd_loss
        return {"loss": loss, "output": output, "task_loss": task_loss, "kd_loss": kd_loss}
