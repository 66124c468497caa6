"""The code that a good user would write without selfkd: what PyTorch offers, and nothing of selfkd.

Where two forms are natural both are timed, and the faster counts.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .case import Loss, wide

# ---- sd_dropout_kl, of logits (N, C, ...), T = 3 ----


def kl_of_log_targets(u: Tensor, v: Tensor) -> Tensor:
    """From log-probabilities only."""
    log_p, log_q = F.log_softmax(u / 3, 1), F.log_softmax(v / 3, 1)
    forward = F.kl_div(log_q, log_p, reduction="sum", log_target=True)
    reverse = F.kl_div(log_p, log_q, reduction="sum", log_target=True)
    return 3 * 3 * (forward + reverse) / (u.numel() // u.shape[1])


def kl_of_probabilities(u: Tensor, v: Tensor) -> Tensor:
    """In the form of the authors' code."""
    forward = F.kl_div(F.log_softmax(v / 3, 1), F.softmax(u / 3, 1), reduction="sum")
    reverse = F.kl_div(F.log_softmax(u / 3, 1), F.softmax(v / 3, 1), reduction="sum")
    return 3 * 3 * (forward + reverse) / (u.numel() // u.shape[1])


def liger_kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    """Liger's KL(q||p), mean over rows; it gives no gradient to q."""
    from liger_kernel.transformers.kl_div import LigerKLDIVLoss  # type: ignore[import-not-found]

    loss: Tensor = LigerKLDIVLoss(reduction="batchmean", log_target=True)(log_p, log_q)
    return loss


def liger_kl_of_both(u: Tensor, v: Tensor) -> Tensor:
    """SD-Dropout's value from Liger's KL, whose targets learn nothing."""
    log_p, log_q = F.log_softmax(u / 3, 1), F.log_softmax(v / 3, 1)
    return 3 * 3 * (liger_kl(log_q, log_p) + liger_kl(log_p, log_q))


# ---- js_divergence and topk_divergence, of a fixed teacher, beta = 0.5 ----


def js_of_log_mixture(log_p: Tensor, log_q: Tensor) -> Tensor:
    """From log-probabilities only, as trl has it."""
    log_m = torch.logsumexp(torch.stack([log_p + math.log(0.5), log_q + math.log(0.5)]), 0)
    of_teacher = F.kl_div(log_m, log_q, reduction="sum", log_target=True)
    of_student = F.kl_div(log_m, log_p, reduction="sum", log_target=True)
    return (0.5 * of_teacher + 0.5 * of_student) / (log_p.numel() // log_p.shape[1])


def js_of_mixture(log_p: Tensor, log_q: Tensor) -> Tensor:
    """With one logarithm of the mixture, in one expression."""
    p, q = log_p.exp(), log_q.exp()
    log_m = (0.5 * (p + q)).log()
    rows = 0.5 * (q * (log_q - log_m) + p * (log_p - log_m))
    return rows.sum() / (log_p.numel() // log_p.shape[1])


def js_of_logits(z: Tensor, t: Tensor, *, js: Loss) -> Tensor:
    """Of all classes."""
    return js(F.log_softmax(z, 1), F.log_softmax(t, 1))


def with_tail(log_probs: Tensor) -> Tensor:
    """One class more, of what is left, as trl has it."""
    known = log_probs.logsumexp(1, keepdim=True).clamp(max=-1e-7)
    return torch.cat([log_probs, (-torch.expm1(known)).log()], 1)


def topk_of_log_softmax(z: Tensor, indices: Tensor, log_q: Tensor) -> Tensor:
    """Of the listed log-probabilities of all."""
    log_p = F.log_softmax(z, 1).gather(1, indices)
    return js_of_log_mixture(with_tail(log_p), with_tail(log_q))


def topk_of_logsumexp(z: Tensor, indices: Tensor, log_q: Tensor) -> Tensor:
    """Without the log-probabilities that are not listed."""
    log_p = z.gather(1, indices) - z.logsumexp(1, keepdim=True)
    return js_of_mixture(with_tail(log_p), with_tail(log_q))


def liger_js(z: Tensor, t: Tensor) -> Tensor:
    """Liger's, of log-probabilities."""
    from liger_kernel.transformers.jsd import LigerJSD  # type: ignore[import-not-found]

    loss: Tensor = LigerJSD(beta=0.5)(F.log_softmax(z, 1), F.log_softmax(t, 1))
    return loss


# ---- adversarial, the discriminator's side ----


def bce_with_logits(real: Tensor, fake: Tensor) -> Tensor:
    """As it is usually written."""
    one, zero = torch.ones_like(real), torch.zeros_like(fake)
    bce = F.binary_cross_entropy_with_logits
    return bce(real, one) + bce(fake, zero)


def softplus_of_scores(real: Tensor, fake: Tensor) -> Tensor:
    """Without targets."""
    return F.softplus(-real).mean() + F.softplus(fake).mean()


# ---- simreg, of features (N, D) ----


def cosine_of_normalized(student: Tensor, target: Tensor) -> Tensor:
    """In the form of the authors' code."""
    x, t = F.normalize(student, dim=1), F.normalize(target, dim=1)
    return (2 - 2 * (x * t).sum(1)).mean()


def distance_of_normalized(student: Tensor, target: Tensor) -> Tensor:
    """As a squared distance, which does not cancel."""
    return (F.normalize(student, dim=1) - F.normalize(target, dim=1)).square().sum(1).mean()


# ---- attention, of maps (N, C, H, W) ----


def attention_of_powers(student: Tensor, teacher: Tensor) -> Tensor:
    """In the form of the authors' code."""

    def attention_map(x: Tensor) -> Tensor:
        return F.normalize(x.pow(2).mean(1).flatten(1))

    return (attention_map(student) - attention_map(teacher)).pow(2).mean()


def attention_of_norms(student: Tensor, teacher: Tensor) -> Tensor:
    """Without a square of each feature."""

    def attention_map(x: Tensor) -> Tensor:
        return F.normalize(torch.linalg.vector_norm(x, dim=1).square().flatten(1))

    return F.mse_loss(attention_map(student), attention_map(teacher))


# ---- distill: cross-entropy, and a teacher for each temperature ----


def distill_of_probabilities(
    z: Tensor, y: Tensor, *teachers: Tensor, temperatures: tuple[float, ...], ignore_index: int
) -> Tensor:
    """Teachers' probabilities as the targets of kl_div."""
    loss, rows = F.cross_entropy(z, y, ignore_index=ignore_index), z.numel() // z.shape[1]
    for t, T in zip(teachers, temperatures, strict=True):
        kl = F.kl_div(F.log_softmax(z / T, 1), F.softmax(t / T, 1), reduction="sum")
        loss = loss + T * T * kl / rows
    return loss


def distill_of_log_targets(
    z: Tensor, y: Tensor, *teachers: Tensor, temperatures: tuple[float, ...], ignore_index: int
) -> Tensor:
    """Teachers' log-probabilities."""
    loss, rows = F.cross_entropy(z, y, ignore_index=ignore_index), z.numel() // z.shape[1]
    for t, T in zip(teachers, temperatures, strict=True):
        p, q = F.log_softmax(z / T, 1), F.log_softmax(t / T, 1)
        loss = loss + T * T * F.kl_div(p, q, reduction="sum", log_target=True) / rows
    return loss


def distill_by_liger(
    z: Tensor, y: Tensor, *teachers: Tensor, temperatures: tuple[float, ...], ignore_index: int
) -> Tensor:
    """The KL terms by Liger; its cross-entropy would write over the logits."""
    loss = F.cross_entropy(z, y, ignore_index=ignore_index)
    for t, T in zip(teachers, temperatures, strict=True):
        loss = loss + T * T * liger_kl(F.log_softmax(z / T, 1), F.log_softmax(t / T, 1))
    return loss


# ---- bifpn_fuse, of three maps with learned weights ----


def fused_weights(weight: Tensor) -> Tensor:
    """The factors of three maps."""
    factors = F.relu(weight)
    return factors / (factors.sum() + 1e-6)


def add_weighted(x: Tensor, y: Tensor, z: Tensor, w: Tensor) -> Tensor:
    """The sum of three maps of one size, the first two activated here."""
    w = w.to(x.dtype)
    return w[0] * F.relu(x) + w[1] * F.relu(y) + w[2] * z


def sum_of_upsampled(x: Tensor, y: Tensor, z: Tensor, weight: Tensor) -> Tensor:
    """With a map of half the size."""
    return add_weighted(x, y, F.interpolate(F.relu(z), scale_factor=2), fused_weights(weight))


def upsampled_last(x: Tensor, y: Tensor, z: Tensor, weight: Tensor) -> Tensor:
    """The same, its small map weighted before it is upsampled."""
    w = fused_weights(weight).to(x.dtype)
    return w[0] * F.relu(x) + w[1] * F.relu(y) + F.interpolate(w[2] * F.relu(z), scale_factor=2)


def sum_of_padded(x: Tensor, y: Tensor, z: Tensor, weight: Tensor) -> Tensor:
    """With a map of twice the size, padded as the authors' code does."""
    pooled = F.max_pool2d(F.pad(F.relu(z), (0, 1, 0, 1)), 3, 2)
    return add_weighted(x, y, pooled, fused_weights(weight))


def sum_of_pooled(x: Tensor, y: Tensor, z: Tensor, weight: Tensor) -> Tensor:
    """The same without padding."""
    pooled = F.max_pool2d(F.relu(z), 3, 2, ceil_mode=True)
    return add_weighted(x, y, pooled, fused_weights(weight))


FUSIONS: dict[str, dict[str, Loss]] = {
    "nearest": {"weighted": sum_of_upsampled, "weighted small": upsampled_last},
    "maxpool": {"padded": sum_of_padded, "ceil_mode": sum_of_pooled},
}

# ---- dropout_views and sd_dropout_head ----


def stacked_views(h: Tensor, seed: Tensor, *, p: float) -> Tensor:
    """Features and two dropout samples of them."""
    return torch.stack([h, F.dropout(h, p), F.dropout(h, p)])


def head_objective(h: Tensor, w: Tensor, b: Tensor, y: Tensor, *, p: float, kl: Loss) -> Tensor:
    """Cross-entropy of a linear layer, and SD-Dropout between two samples; the loss in float32."""
    u, v = (wide(F.linear(F.dropout(h, p), w, b)) for _ in range(2))
    return F.cross_entropy(wide(F.linear(h, w, b)), y) + kl(u, v)


def head_products(h: Tensor, w: Tensor, b: Tensor, *_: Any) -> Tensor:
    """The matrix products of the head alone, stacked."""
    return F.linear(h.repeat(3, 1), w, b).sum()
