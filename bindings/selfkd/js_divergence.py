"""Divergence of student and teacher from their mixture: generalised Jensen-Shannon and its relatives."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from . import arguments, functions

_OP = "js_divergence"


def numbers_of(
    beta: float,
    teacher_weight: float | None,
    student_weight: float | None,
    temperature: float,
    teacher_temperature: float | None,
) -> tuple[float, float, float, float, float]:
    """The numbers of a call, with those that None stands for."""
    learns = arguments.wants_gradient(beta)  # in the reference it may
    if not learns:
        beta = arguments.number(_OP, "beta", beta)
    if teacher_weight is None and student_weight is None:
        first, last = not learns and beta == 0, not learns and beta == 1
        teacher_weight = 1.0 if first else 0.0 if last else beta
        student_weight = 0.0 if first else 1.0 if last else 1 - beta
    a = 0.0 if teacher_weight is None else teacher_weight
    b = 0.0 if student_weight is None else student_weight
    own = temperature if teacher_temperature is None else teacher_temperature
    return beta, a, b, temperature, own


def _kl(log_p: torch.Tensor, log_m: torch.Tensor) -> torch.Tensor:
    """KL(p||M) over dimension 1; a class that p excludes (log p = -inf) contributes 0."""
    excluded = log_p == -torch.inf
    d = log_p.masked_fill(excluded, 0) - log_m.masked_fill(excluded, 0)
    return (log_p.exp() * d).sum(1)


def _log_mixture(log_p: torch.Tensor, log_q: torch.Tensor, beta: float) -> torch.Tensor:
    if arguments.is_zero(beta) or arguments.is_zero(1 - beta):
        return log_p if arguments.is_zero(beta) else log_q
    no_p, no_q = log_p == -torch.inf, log_q == -torch.inf  # would leave derivatives of NaN
    a, b = log_p.masked_fill(no_p, 0), log_q.masked_fill(no_q, 0)
    of_q = torch.as_tensor(beta, dtype=log_p.dtype, device=log_p.device)
    a, b = a + torch.log1p(-of_q), b + of_q.log()
    return torch.where(no_p, b, torch.where(no_q, a, torch.logaddexp(a, b)))


@functions.row_loss(numbers=numbers_of)
def js_divergence(
    student: torch.Tensor,
    teacher: torch.Tensor,
    *,
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
    r"""Divergence of student and teacher from their mixture, with gradients to each side that learns.

    .. math::
        a \, KL(q \| M) + b \, KL(p \| M), \quad M = \beta q + (1 - \beta) p, \quad
        p = softmax(s/T), \; q = softmax(t/T')

    Parameters
    ----------
    student, teacher
        Logits s and t, shape (N, C) or (N, C, ...), float16, bfloat16, float32 or float64, on one
        device. Any strides; classes contiguous (``dim=-1`` of language models) and positions contiguous
        are both read in place. They must share a dtype (under autocast the narrower is cast to the
        wider). A side that requires no gradient costs none.
    beta
        What the teacher weighs in the mixture, 0 to 1.
    teacher_weight, student_weight
        a and b, finite and >= 0. Neither given: a = beta, b = 1 - beta, the generalised Jensen-Shannon
        divergence, whose limits are meant at its ends: beta = 0 is KL(q||p), beta = 1 is KL(p||q). One
        given: the other is 0, so that ``teacher_weight=1`` alone is the skewed KL divergence and
        ``student_weight=1`` alone the skewed reverse one.
    temperature, teacher_temperature
        T and T', finite and > 0; the teacher's is the student's unless given. There is no factor T^2:
        multiply by ``temperature**2`` where gradients are to keep their size.
    kind
        ``"js"``, or ``"tv"``: total variation, 1/2 sum \|p - q\|, for which beta, a and b count nothing.
        Its gradient is 0 in classes with p = q.

    Notes
    -----
    Sources: Lin, IEEE Trans. Inf. Theory 37 (1991); GKD, arXiv 2306.13649, section 3; DistiLLM, arXiv
    2402.03898, section 3.1; total variation: arXiv 2307.15190. Rows whose probabilities agree give
    exactly 0 and no gradient; rows that nearly agree, where self-distillation starts, keep all digits.

    Examples
    --------
    >>> logits = model(prompt).logits                             # (B, L, V)
    >>> with torch.no_grad():
    ...     teacher = model(prompt_with_answer).logits
    >>> loss = selfkd.js_divergence(logits, teacher, beta=0.5, weight=mask, dim=-1)
    """
    beta, a, b, temperature, own = numbers_of(
        beta, teacher_weight, student_weight, temperature, teacher_temperature
    )
    log_p, log_q = F.log_softmax(student / temperature, 1), F.log_softmax(teacher / own, 1)
    if kind == "tv":
        return (log_p.exp() - log_q.exp()).abs().sum(1) / 2
    log_m, rows = _log_mixture(log_p, log_q, beta), torch.zeros_like(log_p[:, 0])
    if not arguments.is_zero(a):
        rows = rows + a * _kl(log_q, log_m)
    if not arguments.is_zero(b):
        rows = rows + b * _kl(log_p, log_m)
    return rows


reference = functions.reference(js_divergence)
