"""The formulas of the operators and of their gradients in 80 bits (np.longdouble), as in ops/<operator>.h."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np
import selfkd
import torch

Wide = Any  # an array of np.longdouble


class Exact(NamedTuple):
    """A result and its gradients; the terms that these are differences of; and those of them that
    cancel in float64, too, being large."""

    result: Wide
    grads: dict[str, Wide]
    terms: Wide
    lost: Wide = 0


ROW_LOSSES = ("sd_dropout_kl", "js_divergence", "distill", "simreg")


def wide(x: torch.Tensor) -> Wide:
    """The same numbers in 80 bits; integers and masks stay as they are."""
    found = x.detach().cpu()
    return found.double().numpy().astype(np.longdouble) if x.is_floating_point() else found.numpy()


def log_softmax(z: Wide, temperature: float) -> Wide:
    """Relative to the largest, before it is divided: nothing is rounded away."""
    below = (z - z.max(1, keepdims=True)) / np.longdouble(temperature)
    return below - np.log(np.exp(below).sum(1, keepdims=True))


def log_ratio(u: Wide, v: Wide, temperature: float, other: float) -> Wide:
    return log_softmax(u, temperature) - log_softmax(v, other)


def divergence(p: Wide, q: Wide, d: Wide) -> Wide:
    """KL(p||q) of each row, d being log(p/q): the sum of p d - p + q, whose terms are of second order.

    Their sum is that of p d, but of rows that nearly agree p d loses what the log-sum-exp is rounded to.
    """
    near = np.abs(d) < 1
    d_near = np.where(near, d, 0)
    close = p * (np.expm1(-d_near) + d_near)
    apart = np.where(p > 0, p * np.where(p > 0, d, 0), 0) - p + q
    return np.where(near, close, apart).sum(1, keepdims=True)


def sd_dropout_kl(x: Mapping[str, Wide], **options: Any) -> Exact:
    temperature = options.get("temperature", 3.0)
    own = 0 if options.get("detach_target") else 1
    wf, wr = options.get("forward_weight", 1.0), options.get("reverse_weight", 1.0)
    p, q = (np.exp(log_softmax(x[name], temperature)) for name in "uv")
    d = log_ratio(x["u"], x["v"], temperature, temperature)
    forward, reverse = divergence(p, q, d), divergence(q, p, -d)
    rows = temperature**2 * (wf * forward + wr * reverse)[:, 0]
    grad_u = temperature * (own * wf * p * (d - forward) + wr * (p - q))
    grad_v = temperature * (-own * wr * q * (d + reverse) - wf * (p - q))
    terms = np.full((len(p), 1), temperature, np.longdouble)
    lost = own * temperature * (wf * p * np.abs(d) + wr * q * np.abs(d))  # of d - KL
    return Exact(rows, {"u": grad_u, "v": grad_v}, terms, lost)


def log_over_mixture(d: Wide, other: Wide) -> Wide:
    """log(p/M) of d = log(p/q), M holding `other` of q and the rest of p."""
    near = np.abs(d) < 1
    close = -np.log1p(other * np.expm1(np.where(near, -d, 0)))
    with np.errstate(divide="ignore"):
        mixed = other * np.exp(-np.maximum(d, 0)) + (1 - other) * np.exp(np.minimum(d, 0))
        apart = np.minimum(d, 0) - np.log(mixed)
    return np.where(near, close, apart)


def js_divergence(x: Mapping[str, Wide], **options: Any) -> Exact:
    beta, own = np.longdouble(options.get("beta", 0.5)), options.get("temperature", 1.0)
    a, b = (np.longdouble(options.get(f"{x}_weight", 0.5)) for x in ("teacher", "student"))
    other = options.get("teacher_temperature", own)
    p = np.exp(log_softmax(x["student"], own))
    q = np.exp(log_softmax(x["teacher"], other))
    d = log_ratio(x["student"], x["teacher"], own, other)
    if options.get("kind") == "tv":
        rows = np.abs(p - q).sum(1) / 2
        slope_p = np.sign(d) / 2
        slope_q = -slope_p
        to_p, to_q = p * slope_p, q * slope_q
    else:
        m = beta * q + (1 - beta) * p
        log_p, log_q = log_over_mixture(d, beta), log_over_mixture(-d, 1 - beta)
        rows = (a * divergence(q, m, log_q) + b * divergence(p, m, log_p))[:, 0]
        uneven = a * (1 - beta) - b * beta
        change_p = (p - q) * np.where(m > 0, p / np.where(m > 0, m, 1), 1)
        change_q = (p - q) * np.where(m > 0, q / np.where(m > 0, m, 1), 1)
        to_p = (1 - beta) * uneven * change_p + b * np.where(p > 0, p * log_p, 0)
        to_q = beta * uneven * change_q + a * np.where(q > 0, q * log_q, 0)
    grads = {
        "student": (to_p - p * to_p.sum(1, keepdims=True)) / own,
        "teacher": (to_q - q * to_q.sum(1, keepdims=True)) / other,
    }
    return Exact(rows, grads, np.zeros((len(p), 1), np.longdouble))


def distill(x: Mapping[str, Wide], **options: Any) -> Exact:
    z, smooth = x["logits"], np.longdouble(options.get("label_smoothing", 0.0))
    rows, grad = np.zeros(len(z), np.longdouble), np.zeros_like(z)
    counted = np.ones(len(z), bool)
    if "target" in x:
        ce_weight = options.get("ce_weight", 1.0)
        counted = x["target"] != options.get("ignore_index", -100)
        log_p = log_softmax(z, 1.0)
        y = np.full_like(z, smooth / z.shape[1])
        y[np.arange(len(z)), counted * x["target"]] += 1 - smooth
        rows -= ce_weight * counted * (y * log_p).sum(1)
        grad += ce_weight * counted[:, None] * (np.exp(log_p) - y)
    taught = counted if options.get("mask_teachers") else np.ones(len(z), bool)
    for k in ("", "second_"):
        if f"{k}teacher" not in x:
            continue
        weight = options.get(f"{k}teacher_weight", 1.0) * taught
        temperature = options.get(f"{k}temperature", 4.0)
        own = options.get(f"{k}teacher_temperature", 4.0)
        teacher = x[f"{k}teacher"]
        if options.get(f"{k}teacher_kind") == "probs":
            teacher = np.log(teacher)
        p, q = np.exp(log_softmax(z, temperature)), np.exp(log_softmax(teacher, own))
        d = -log_ratio(z, teacher, temperature, own)
        rows += weight * temperature**2 * divergence(q, p, d)[:, 0]
        grad += weight[:, None] * temperature * (p - q)
    return Exact(rows, {"logits": grad}, np.full((len(z), 1), 4, np.longdouble))


def simreg(x: Mapping[str, Wide], **options: Any) -> Exact:
    a, b = x["student"], x["target"]
    if not options.get("normalize", True):
        return Exact(((a - b) ** 2).sum(1), {"student": 2 * (a - b)}, 0 * a)
    eps = np.longdouble(1e-12)
    long_a, long_b = (np.sqrt((y * y).sum(1, keepdims=True)) for y in (a, b))
    a_hat, b_hat = a / np.maximum(long_a, eps), b / np.maximum(long_b, eps)
    apart = a_hat - b_hat
    h = np.where(long_a < eps, 0, (a_hat * apart).sum(1, keepdims=True))
    scale = 2 / np.maximum(long_a, eps)
    return Exact((apart**2).sum(1), {"student": scale * (apart - a_hat * h)}, scale)


def attention(x: Mapping[str, Wide], **options: Any) -> Exact:
    eps = np.longdouble(options.get("eps", 1e-12))
    a, b = ((x[name] ** 2).mean(1) for name in ("student", "teacher"))
    long_a, long_b = (np.sqrt((y * y).sum(1, keepdims=True)) for y in (a, b))
    q, p = a / np.maximum(long_a, eps), b / np.maximum(long_b, eps)
    h = np.where(long_a < eps, 0, (q * (q - p)).sum(1, keepdims=True))
    scale = 4 / np.maximum(long_a, eps)[:, None] / x["student"].size * x["student"]
    slope = (q - p) - q * h
    return Exact(((q - p) ** 2).mean(), {"student": slope[:, None] * scale}, np.abs(scale))


def adversarial(x: Mapping[str, Wide], mode: str, side: str, reduction: str) -> Exact:
    open_hinge = mode == "hinge" and side == "generator"

    def term(y: Wide, target: int) -> tuple[Wide, Wide]:
        if mode == "bce":
            decay = np.exp(-np.abs(y))
            slope = -np.where(y > 0, decay, 1) / (1 + decay)
            return np.maximum(-y, 0) + np.log1p(decay), slope
        if mode == "lsgan":
            return (y - target) ** 2 / 2, y - target
        if mode == "hinge" and not open_hinge:
            return np.maximum(1 - y, 0), np.where(1 - y > 0, -1, 0).astype(np.longdouble)
        return -y, np.full_like(y, -1)

    r, slope = term(x["real"], 1)
    scale = 1 / np.longdouble(len(r)) if reduction == "mean" else np.longdouble(1)
    if side == "generator":
        result = r if reduction == "none" else r.sum() * scale
        return Exact(result, {"real": slope * scale}, 0 * scale)
    f, slope_f = term(-x["fake"], 0)
    rows = r + f if reduction == "none" else (r.sum() + f.sum()) * scale
    return Exact(rows, {"real": slope * scale, "fake": -slope_f * scale}, 0 * scale)


def bifpn_fuse(x: Mapping[str, Wide], **options: Any) -> Exact:
    maps, eps = [x["a"], x["b"]], np.longdouble(1e-6)
    activation, late = options["activation"], options["activate"] == "output"

    def act(y: Wide) -> tuple[Wide, Wide]:
        if activation == "none":
            return y, np.ones_like(y)
        if activation == "relu":
            return np.maximum(y, 0), (y > 0).astype(np.longdouble)
        s = np.exp(-np.logaddexp(0, -y))
        return y * s, s * (1 + y * (1 - s))

    r = np.maximum(x["weight"], 0)
    total = r.sum() + eps
    operands, slopes = zip(*((y, 1) if late else act(y) for y in maps), strict=True)
    result = sum(f * y for f, y in zip(r / total, operands, strict=True))
    g: Any = np.ones_like(result)
    if late:
        result, g = act(result)
    d = [(g * y).sum() for y in operands]
    grad_weight = [
        0 if w <= 0 else (eps * d[i] + sum(r[j] * (d[i] - d[j]) for j in range(2))) / total**2
        for i, w in enumerate(x["weight"])
    ]
    grads = [f * g * s for f, s in zip(r / total, slopes, strict=True)]
    found = {"a": grads[0], "b": grads[1], "weight": np.array(grad_weight)}
    return Exact(result, found, 0 * total)


def dropout_views(x: Mapping[str, Wide], **options: Any) -> Exact:
    ones = torch.ones(x["features"].shape, dtype=torch.float64)
    kept = wide(selfkd.reference.dropout_views(ones, torch.tensor(3), **options))
    return Exact(kept * x["features"], {"features": kept.sum(0)}, np.zeros(1))


EXACT: dict[str, Callable[..., Exact]] = {
    "sd_dropout_kl": sd_dropout_kl,
    "js_divergence": js_divergence,
    "distill": distill,
    "simreg": simreg,
    "attention": attention,
    "adversarial": adversarial,
    "bifpn_fuse": bifpn_fuse,
    "dropout_views": dropout_views,
}


def reduced(op: str, x: Mapping[str, Wide], options: Mapping[str, Any]) -> Exact:
    """The exact result and gradients of a call, with its weights and reduction."""
    options = dict(options)
    if op not in ROW_LOSSES:
        return EXACT[op](x, **options)
    reduction = options.pop("reduction")
    rows, grads, terms, lost = EXACT[op](x, **options)
    w = x.get("weight", np.ones_like(rows))
    scale = w / w.sum() if reduction == "mean" else w
    found = {name: scale[:, None] * grad for name, grad in grads.items()}
    result = (rows * scale).sum() if reduction == "mean" else rows * scale
    return Exact(result, found, terms * scale[:, None], lost * scale[:, None])
