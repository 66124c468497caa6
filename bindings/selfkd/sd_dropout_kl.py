"""SD-Dropout: KL divergence between two dropout views of one batch, in both directions."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from . import arguments, contract, operators

_OP = "sd_dropout_kl"


def _kl(log_p: torch.Tensor, log_q: torch.Tensor) -> torch.Tensor:
    """KL(p||q) over dimension 1; a class that p excludes (log p = -inf) contributes 0."""
    excluded = log_p == -torch.inf
    d = log_p.masked_fill(excluded, 0) - log_q.masked_fill(excluded, 0)
    return (log_p.exp() * d).sum(1)


@arguments.public(_OP, learns=True)
def reference(
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
    """:func:`selfkd.sd_dropout_kl` in plain PyTorch, differentiable any number of times.

    Same arguments and results; arithmetic in float32, or float64 for float64 logits.
    """
    acc = torch.float64 if u.dtype == torch.float64 else torch.float32
    _reduction(reduction)
    u = arguments.classes_first(_OP, "u", u, dim).to(acc)
    v = arguments.classes_first(_OP, "v", v, dim).to(acc)
    arguments.expect_shape(_OP, "v", v, u.shape)
    arguments.expect_shape(_OP, "weight", weight, u[:, 0].shape)
    if weight is not None:  # what is skipped must not reach the gradient either
        skipped = (weight == 0).unsqueeze(1)
        u, v = u.masked_fill(skipped, 0), v.masked_fill(skipped, 0)
    log_p, log_q = F.log_softmax(u / temperature, 1), F.log_softmax(v / temperature, 1)
    target_p, target_q = (log_p.detach(), log_q.detach()) if detach_target else (log_p, log_q)
    rows = torch.zeros_like(log_p[:, 0])
    if not arguments.is_zero(forward_weight):
        rows = rows + forward_weight * _kl(target_p, log_q)
    if not arguments.is_zero(reverse_weight):
        rows = rows + reverse_weight * _kl(target_q, log_p)
    rows = temperature**2 * rows
    if weight is not None:
        rows = weight.to(acc) * rows
    return arguments.reduce_rows(rows, weight, reduction, divisor)


_call = operators.register(_OP, reference)
_reduction = contract.Choice(_OP, "reduction")


@arguments.public(_OP)
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
    weight
        Weight of each position, or a bool mask: shape of the logits without classes, float32
        (float64 with float64 logits) or bool. A position of weight 0 is skipped: value 0 and
        gradient 0, even where its logits are NaN.
    reduction
        ``"mean"``: sum of the weighted values over the sum of the weights; ``"sum"``; ``"none"``:
        one value for each position.
    divisor
        Denominator of ``"mean"`` in place of the sum of the weights: a positive number or a 0-d
        tensor, such as a token count over all ranks.
    dim
        Dimension of the classes.

    Returns
    -------
    torch.Tensor
        0-d (``"none"``: shape of the logits without classes), float32, or float64 for float64
        logits. An empty batch gives nan for ``"mean"`` and 0 for ``"sum"``, as in PyTorch.

    Raises
    ------
    TypeError
        A dtype or device that is not accepted.
    ValueError
        A shape or number that is not accepted, or a `weight` or `divisor` that requires grad.

    Notes
    -----
    Source: Lee, Park, Seo, Kang, "Self-Knowledge Distillation via Dropout", arXiv
    2208.05642, and its authors' code (yechanp/self_kd, models/methods.py). The whole loss there is
    ``F.cross_entropy(z, y) + weight * sd_dropout_kl(u, v)`` with z the logits without dropout. Rows
    whose logits agree give exactly 0. The second derivative (``create_graph=True``) goes through
    :mod:`selfkd.reference`.

    Examples
    --------
    >>> u, v = head(F.dropout(h)), head(F.dropout(h))
    >>> loss = F.cross_entropy(head(h), target) + selfkd.sd_dropout_kl(u, v, temperature=3.0)
    """
    code = _reduction(reduction)
    if u.dtype != v.dtype:
        u, v = arguments.same_dtype(u, v)
    if dim != 1 or u.ndim > 3:
        u, v = arguments.logits_view(_OP, "u", u, dim), arguments.logits_view(_OP, "v", v, dim)
    return _call(
        u,
        v,
        u if weight is None else arguments.weight_view(_OP, weight),
        weight is not None,
        u if divisor is None else arguments.divisor_tensor(_OP, divisor, reduction, u),
        divisor is not None,
        temperature,
        forward_weight,
        reverse_weight,
        detach_target,
        code,
    )
