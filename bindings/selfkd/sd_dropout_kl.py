"""SD-Dropout: KL divergence between two dropout views of one batch, in both directions."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from . import arguments, functions


def _kl(log_p: torch.Tensor, log_q: torch.Tensor) -> torch.Tensor:
    """KL(p||q) over dimension 1; a class that p excludes (log p = -inf) contributes 0."""
    excluded = log_p == -torch.inf
    d = log_p.masked_fill(excluded, 0) - log_q.masked_fill(excluded, 0)
    return (log_p.exp() * d).sum(1)


@functions.row_loss()
def sd_dropout_kl(
    u: torch.Tensor,
    v: torch.Tensor,
    *,
    temperature: float = 3.0,
    forward_weight: float = 1.0,
    reverse_weight: float = 1.0,
    detach_target: bool = False,
    weight: torch.Tensor | None = None,
    reduction: str = "mean",
    divisor: float | torch.Tensor | None = None,
    dim: int = 1,
) -> torch.Tensor:
    r"""KL divergence between two dropout samples of one head, in both directions, with gradients to both.

    .. math::
        T^2 \, [\, w_f \, KL(p \| q) + w_r \, KL(q \| p) \,], \quad
        p = softmax(u/T), \; q = softmax(v/T)

    Parameters
    ----------
    u, v
        Logits of the two samples, shape (N, C) or (N, C, ...), float16, bfloat16, float32 or
        float64, on one device. Any strides; classes contiguous and positions contiguous are both
        read in place. They must share a dtype (under autocast the narrower is cast to the wider).
    temperature
        T, finite and > 0. The paper uses 3.
    forward_weight, reverse_weight
        w_f and w_r, finite and >= 0.
    detach_target
        Stop the gradient of each term's target: of p in KL(p||q), of q in KL(q||p). The value is
        the same.

    Notes
    -----
    Source: Lee, Park, Seo, Kang, "Self-Knowledge Distillation via Dropout", arXiv
    2208.05642, and its authors' code (yechanp/self_kd, models/methods.py). The whole loss there is
    ``F.cross_entropy(z, y) + weight * sd_dropout_kl(u, v)`` with z the logits without dropout. Rows
    whose logits agree give exactly 0.

    Examples
    --------
    >>> u, v = head(F.dropout(h)), head(F.dropout(h))
    >>> loss = F.cross_entropy(head(h), target) + selfkd.sd_dropout_kl(u, v, temperature=3.0)
    """
    log_p, log_q = F.log_softmax(u / temperature, 1), F.log_softmax(v / temperature, 1)
    target_p, target_q = (log_p.detach(), log_q.detach()) if detach_target else (log_p, log_q)
    rows = torch.zeros_like(log_p[:, 0])
    if not arguments.is_zero(forward_weight):
        rows = rows + forward_weight * _kl(target_p, log_q)
    if not arguments.is_zero(reverse_weight):
        rows = rows + reverse_weight * _kl(target_q, log_p)
    return temperature**2 * rows


reference = functions.reference(sd_dropout_kl)
