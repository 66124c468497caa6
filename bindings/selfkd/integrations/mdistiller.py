"""mdistiller: its function ``kd_loss``."""

from __future__ import annotations

import torch

from ..distill import distill


def _standardized(logits: torch.Tensor) -> torch.Tensor:
    mean, std = logits.mean(-1, keepdim=True), logits.std(-1, keepdim=True)
    return (logits - mean) / (1e-7 + std)


def kd_loss(
    logits_student: torch.Tensor,
    logits_teacher: torch.Tensor,
    temperature: float,
    logit_stand: bool = False,
) -> torch.Tensor:
    """T^2 KL(softmax(teacher/T) || softmax(student/T)), mean over the batch.

    Parameters
    ----------
    logits_student, logits_teacher
        (N, C). The teacher gets no gradient.
    temperature
        T, finite and > 0.
    logit_stand
        Standardise each row of both first: subtract its mean, divide by its standard deviation
        (arXiv 2403.01427).

    Notes
    -----
    The first three arguments are those of megvii-research/mdistiller (commit a08d46f, 2023-11-05), the
    fourth is that of the fork sunshangquan/logit-standardization-KD. Same values as there.
    """
    if logit_stand:
        logits_student = _standardized(logits_student)
        logits_teacher = _standardized(logits_teacher)
    loss: torch.Tensor = distill(  # type: ignore[assignment]
        logits_student, teachers=logits_teacher, temperature=temperature
    )
    return loss
