"""trl: the divergences of its GKD, SDFT and SDPO trainers, in one pass over the logits.

In every function here beta, or alpha, is what the teacher weighs in the mixture: 0 is KL(teacher || student),
1 is KL(student || teacher), and between them lies beta KL(teacher || M) + (1 - beta) KL(student || M) with
M = beta teacher + (1 - beta) student. There is no factor T^2.

Equal to trl 1.16. Results are float32, or float64 for float64 inputs, where trl's have the dtype of the
logits. A class that both sides exclude (-inf) adds 0, where trl's lines give nan.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F

from .. import arguments
from . import _shared

__all__ = [
    "compute_divergence",
    "compute_full_logit_self_distillation_loss",
    "compute_topk_self_distillation_loss",
    "generalized_jsd_loss",
]

IGNORED = -100  # the label of positions that do not count
_LOGITS = ("student_logits", "teacher_logits")
_LOG_PROBS = ("student_log_probs", "teacher_log_probs")


def _check_jsd(
    student_logits: Any,
    teacher_logits: Any,
    labels: Any = None,
    beta: Any = 0.5,
    temperature: Any = 1.0,
    reduction: Any = "batchmean",
    num_items_in_batch: Any = None,
) -> None:
    op = "generalized_jsd_loss"
    _shared.check_logits(op, _LOGITS, student_logits, teacher_logits)
    _shared.check_reduction(op, reduction)
    arguments.in_range(op, "beta", beta, "FRACTION")
    _shared.number(op, "temperature", temperature, "POSITIVE")
    if num_items_in_batch is not None:
        arguments.number(op, "num_items_in_batch", num_items_in_batch)
    if labels is None:
        return
    arguments.tensor(op, "labels", labels)
    expected = tuple(student_logits.shape[:-1])
    if labels.shape != expected:
        raise ValueError(f"{op}: labels have shape {tuple(labels.shape)}, expected {expected}")


@_shared.explained(_check_jsd)
def generalized_jsd_loss(
    student_logits: torch.Tensor,
    teacher_logits: torch.Tensor,
    labels: torch.Tensor | None = None,
    beta: float = 0.5,
    temperature: float = 1.0,
    reduction: str = "batchmean",
    num_items_in_batch: torch.Tensor | float | None = None,
) -> torch.Tensor:
    """The loss of trl's ``GKDTrainer``, with its arguments.

    Parameters
    ----------
    student_logits, teacher_logits
        Logits (B, L, V), or any (..., V). A teacher that requires grad gets one.
    labels
        (B, L); positions of label -100 do not count, and may hold anything.
    beta
        0 to 1.
    temperature
        Divides the logits of both sides; a tensor that requires grad learns.
    reduction
        ``"batchmean"``: the sum over the number of positions that count, at least 1; without labels, over B;
        ``"sum"``; ``"mean"``, over all logits of positions that count; ``"none"``, a value for each of these
        logits, which plain PyTorch computes.
    num_items_in_batch
        Where it is given, the loss is the sum over it, whatever the reduction.

    Returns
    -------
    torch.Tensor
        0-d. For ``"none"`` like the logits, or (positions that count, V) with labels.

    Notes
    -----
    Equal to ``trl/experimental/gkd/gkd_trainer.py`` (trl 1.16). Not taken over: ``logits_are_probs`` of its
    GOLD trainer, ``top_k`` of its IW-OPD trainer.
    """
    mask = None if labels is None else labels != IGNORED
    if reduction == "none" and num_items_in_batch is None:
        _check_jsd(student_logits, teacher_logits, labels, beta, temperature, reduction)
        if mask is not None:
            student_logits, teacher_logits = student_logits[mask], teacher_logits[mask]
        both = _shared.of_one_dtype(student_logits, teacher_logits)
        return _of_each_logit(*both, beta, temperature)
    _shared.check_reduction("generalized_jsd_loss", reduction)
    total = _shared.js(
        student_logits,
        teacher_logits,
        beta=beta,
        temperature=temperature,
        weight=mask,
        reduction="sum",
        dim=-1,
    )
    if num_items_in_batch is not None:
        if isinstance(num_items_in_batch, torch.Tensor):
            num_items_in_batch = num_items_in_batch.to(total.device)
        return total / num_items_in_batch
    if reduction == "batchmean":
        return total / (max(len(student_logits), 1) if mask is None else mask.sum().clamp_min(1))
    if reduction == "mean":
        rows = math.prod(student_logits.shape[:-1]) if mask is None else mask.sum()
        return total / (rows * student_logits.shape[-1])
    return total


def _of_each_logit(
    student: torch.Tensor, teacher: torch.Tensor, beta: float, temperature: Any
) -> torch.Tensor:
    log_p, log_q = (F.log_softmax(x / temperature, -1) for x in (student, teacher))
    kl = partial(F.kl_div, reduction="none", log_target=True)
    if beta in (0, 1):
        return kl(log_p, log_q) if beta == 0 else kl(log_q, log_p)
    log_m = torch.logaddexp(log_p + math.log1p(-beta), log_q + math.log(beta))
    return beta * kl(log_m, log_q) + (1 - beta) * kl(log_m, log_p)


def _check_divergence(student_log_probs: Any, teacher_log_probs: Any, alpha: Any) -> None:
    _shared.check_logits("compute_divergence", _LOG_PROBS, student_log_probs, teacher_log_probs, 1)
    arguments.in_range("compute_divergence", "alpha", alpha, "FRACTION")


@_shared.explained(_check_divergence)
def compute_divergence(
    student_log_probs: torch.Tensor, teacher_log_probs: torch.Tensor, alpha: float
) -> torch.Tensor:
    """The divergence of each row of log-probabilities: ``compute_divergence`` of trl's SDFT and SDPO.

    Parameters
    ----------
    student_log_probs, teacher_log_probs
        Log-probabilities (..., K) whose probabilities sum to 1 in each row, as all do that trl hands over:
        those of the vocabulary, of K classes renormalised, of K classes and a tail. Other rows are
        normalised first, which trl does not do. A teacher that requires grad gets one.
    alpha
        0 to 1.

    Returns
    -------
    torch.Tensor
        (...,), one value for each row.

    Notes
    -----
    Equal to ``trl/experimental/sdft/loss_utils.py`` and that of ``sdpo`` (trl 1.16), with one difference: the
    gradient to log-probabilities lacks the part that log_softmax takes away. What reaches the logits through
    it is the same.

    Where logits are at hand, :func:`compute_full_logit_self_distillation_loss` saves the log_softmax as well.
    """
    both = student_log_probs[None], teacher_log_probs[None]  # one row alone is a batch, too
    return _shared.js(*both, beta=alpha, reduction="none", dim=-1)[0]


def _check_full(student_logits: Any, teacher_logits: Any, *, distillation_alpha: Any) -> None:
    op = "compute_full_logit_self_distillation_loss"
    _shared.check_logits(op, _LOGITS, student_logits, teacher_logits)
    arguments.in_range(op, "distillation_alpha", distillation_alpha, "FRACTION")


@_shared.explained(_check_full)
def compute_full_logit_self_distillation_loss(
    student_logits: torch.Tensor, teacher_logits: torch.Tensor, *, distillation_alpha: float
) -> torch.Tensor:
    """The divergence of each position: ``distillation_mode="full_logits"`` of trl's SDFT and SDPO.

    Parameters
    ----------
    student_logits, teacher_logits
        Logits (B, L, V), or any (..., V). A teacher that requires grad gets one.
    distillation_alpha
        0 to 1.

    Returns
    -------
    torch.Tensor
        (B, L), one value for each position.

    Notes
    -----
    Equal to ``trl/experimental/sdft/loss_utils.py`` and that of ``sdpo`` (trl 1.16).
    """
    return _shared.js(
        student_logits, teacher_logits, beta=distillation_alpha, reduction="none", dim=-1
    )


def _check_topk(
    student_logits: Any,
    teacher_logits: Any,
    *,
    distillation_topk: Any,
    distillation_alpha: Any,
    distillation_add_tail: Any,
) -> None:
    op = "compute_topk_self_distillation_loss"
    _shared.check_logits(op, _LOGITS, student_logits, teacher_logits)
    arguments.in_range(op, "distillation_alpha", distillation_alpha, "FRACTION")
    arguments.flag(op, "distillation_add_tail", distillation_add_tail)
    k = arguments.integer(op, "distillation_topk", distillation_topk)
    classes = student_logits.shape[-1]
    if not 1 <= k <= classes:
        raise ValueError(f"{op}: distillation_topk is {k}, expected 1 to {classes}, the classes")


@_shared.explained(_check_topk)
def compute_topk_self_distillation_loss(
    student_logits: torch.Tensor,
    teacher_logits: torch.Tensor,
    *,
    distillation_topk: int,
    distillation_alpha: float,
    distillation_add_tail: bool,
) -> torch.Tensor:
    """The divergence over the student's top k: ``distillation_mode="topk_logits"`` of trl's SDFT and SDPO.

    Parameters
    ----------
    student_logits, teacher_logits
        Logits (B, L, V), or any (..., V). A teacher that requires grad gets one, from plain PyTorch.
    distillation_topk
        How many classes, the likeliest of the student, 1 to V.
    distillation_alpha
        0 to 1.
    distillation_add_tail
        True: what is left of either side is one more class. False: both are renormalised over the top k.

    Returns
    -------
    torch.Tensor
        (B, L), one value for each position.

    Notes
    -----
    Equal to ``trl/experimental/sdft/loss_utils.py`` and that of ``sdpo`` (trl 1.16), but for small tails: trl
    takes a tail as 1 minus the rest and never below 1e-7, where it gets no gradient. Here the student's tail
    is summed, and there is none where the top k are all classes.
    """
    return _shared.top_k(
        student_logits,
        teacher_logits,
        distillation_topk,
        tail="bucket" if distillation_add_tail else "renormalize",
        of_student=True,
        beta=distillation_alpha,
        reduction="none",
        dim=-1,
    )
