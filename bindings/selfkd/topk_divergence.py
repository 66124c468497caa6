"""Divergence of student and teacher where the teacher is known at K classes of each position only."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from . import arguments, functions
from .js_divergence import _kl, _log_mixture, numbers_of

LEAST_TAIL = 1e-7


def _with_tail(
    log_p: torch.Tensor, chosen: torch.Tensor, log_q: torch.Tensor, indices: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The logarithms of the listed classes and, in a last place, of all others; -inf where none is left."""
    classes = log_p.shape[1]
    places = torch.zeros_like(log_p[:, :1], dtype=torch.bool).repeat_interleave(classes + 1, 1)
    known = places.scatter(1, torch.where(indices >= 0, indices, classes).long(), True)[:, :-1]
    whole = known.all(1, keepdim=True)
    rest = log_p.masked_fill(known & ~whole, -torch.inf).logsumexp(1, keepdim=True)
    left = (1 - log_q.exp().sum(1, keepdim=True)).clamp(min=LEAST_TAIL).log()
    tails = rest.masked_fill(whole, -torch.inf), left.masked_fill(whole, -torch.inf)
    return torch.cat([chosen, tails[0]], 1), torch.cat([log_q, tails[1]], 1)


@functions.row_loss(numbers=numbers_of)
def topk_divergence(
    logits: torch.Tensor,
    indices: torch.Tensor,
    teacher: torch.Tensor,
    *,
    teacher_logsumexp: torch.Tensor | None = None,
    tail: str = "bucket",
    beta: float = 0.5,
    teacher_weight: float | None = None,
    student_weight: float | None = None,
    temperature: float = 1.0,
    teacher_temperature: float | None = None,
    kind: str = "js",
    weight: torch.Tensor | None = None,
    reduction: str = "mean",
    divisor: float | torch.Tensor | None = None,
    dim: int = 1,
) -> torch.Tensor:
    r"""Divergence of student and teacher from their mixture, where K of the teacher's classes were stored.

    .. math::
        a \, KL(q \| M) + b \, KL(p \| M), \quad M = \beta q + (1 - \beta) p, \quad p = softmax(z/T)

    over the K classes that are listed for a position and, as one class more, all the others. Each KL is
    the sum of q log(q/M) - q + M, so that rounding of a stored q makes none negative.

    Parameters
    ----------
    logits
        The student's logits z, shape (N, C) or (N, C, ...), float16, bfloat16, float32 or float64. Any
        strides; classes contiguous (``dim=-1`` of language models) are fastest.
    indices
        The listed classes, shape (N, K) or (N, K, ...), int32 or int64, in any order, 1 <= K <= 4096.
        A place with -1 is left out. A class that is listed twice, or is none, is a ValueError on the
        CPU and a failed assertion on CUDA.
    teacher
        What the teacher says of them, of the shape of `indices`, any floating dtype: log-probabilities
        log q, over all C classes and of the temperature that they were stored at; or logits, if
        `teacher_logsumexp` is given or `tail` is ``"renormalize"``.
    teacher_logsumexp
        The log-sum-exp of all C of the teacher's logits over T', shape of `indices` without dimension
        `dim`, any floating dtype: log q is ``teacher / T' - teacher_logsumexp``.
    tail
        What becomes of the classes that are not listed. ``"bucket"``: they are one class, of the sum of
        their p, and of 1 less the sum of the listed q, 1e-7 at least; none where all C are listed.
        ``"renormalize"``: both sides are softmaxes over the listed classes, and the others get no
        gradient. ``"drop"``: their terms are left out; those of the listed classes are q log(q/M) and
        p log(p/M), whose sum may be negative.
    beta
        What the teacher weighs in the mixture, 0 to 1.
    teacher_weight, student_weight
        a and b, finite and >= 0. Neither given: a = beta, b = 1 - beta, with the limits KL(q||p) for
        beta = 0 and KL(p||q) for beta = 1. One given: the other is 0.
    temperature, teacher_temperature
        T and T', finite and > 0; the teacher's is the student's unless given. T' divides logits:
        those with a `teacher_logsumexp`, and what is renormalised. Stored log-probabilities cannot be
        brought to another temperature, for that takes the classes that were not stored: with
        ``"bucket"`` and ``"drop"`` they are taken as they are, so `temperature` is to be the one that
        they were stored at. There is no factor T^2.
    kind
        ``"js"``, or ``"tv"``: total variation, 1/2 sum \|p - q\|, for which beta, a and b count nothing.

    Notes
    -----
    Sources: as :func:`js_divergence`; the tail as one class: TRL's SDFT and SDPO trainers (arXiv 2601.20802).
    The student's tail is a sum of its own and keeps its digits however small it is; that of the teacher
    is a difference.

    Examples
    --------
    >>> indices, log_q = batch["top_ids"], batch["top_logprobs"]  # (B, L, K), as a server stored them
    >>> logits = model(batch["tokens"]).logits                    # (B, L, V)
    >>> loss = selfkd.topk_divergence(logits, indices, log_q, beta=0.5, weight=mask, dim=-1)
    """
    beta, a, b, temperature, own = numbers_of(
        beta, teacher_weight, student_weight, temperature, teacher_temperature
    )
    listed = indices >= 0
    chosen = (logits / temperature).gather(1, indices.clamp(min=0).long())
    if tail == "renormalize":
        none = ~listed.any(1, keepdim=True)  # both uniform: no divergence and no gradient
        log_p, log_q = (
            F.log_softmax(x.masked_fill(~listed, -torch.inf).masked_fill(none, 0), 1)
            for x in (chosen, teacher / own)
        )
    else:
        everything = F.log_softmax(logits / temperature, 1)
        log_p = everything.gather(1, indices.clamp(min=0).long()).masked_fill(~listed, -torch.inf)
        log_q = teacher
        if teacher_logsumexp is not None:
            log_q = teacher / own - teacher_logsumexp.unsqueeze(1)
        log_q = log_q.masked_fill(~listed, -torch.inf)
        if tail == "bucket":
            log_p, log_q = _with_tail(everything, log_p, log_q, indices)
    p, q = log_p.exp(), log_q.exp()
    if kind == "tv":
        return (p - q).abs().sum(1) / 2
    log_m, rows = _log_mixture(log_p, log_q, beta), torch.zeros_like(log_p[:, 0])
    if not arguments.is_zero(a):
        rows = rows + a * _kl(log_q, log_m)
    if not arguments.is_zero(b):
        rows = rows + b * _kl(log_p, log_m)
    if tail != "drop":  # what the terms - q + M and - p + M add up to
        rows = rows + (a * (1 - beta) - b * beta) * (p - q).sum(1)
    return rows


reference = functions.reference(topk_divergence)
