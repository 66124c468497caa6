"""The formula of ops/js_divergence.h, word by word, in mpmath."""

from __future__ import annotations

from typing import Any

from mpmath import mp, mpf
from rows import Row, Tensor, log_softmax, reduced, rows_of, zeros


def js_divergence_row(u: Row, v: Row, x: dict[str, Any]) -> tuple[Any, Row, Row]:
    """The loss of a row and its gradients."""
    t, own = mpf(x["temperature"]), mpf(x["teacher_temperature"])
    beta, a, b = (mpf(x[k]) for k in ("beta", "teacher_weight", "student_weight"))
    loss, p_slopes, q_slopes = mpf(0), [], []
    p, q = ([mp.exp(y) for y in log_softmax(z, k)] for z, k in ((u, t), (v, own)))
    for y, z in zip(p, q, strict=True):
        m, apart = beta * z + (1 - beta) * y, a * (1 - beta) - b * beta
        if x["kind"] == "tv":
            loss += abs(y - z) / 2
            p_slopes.append(y * mp.sign(y - z) / 2)
            q_slopes.append(-z * mp.sign(y - z) / 2)
            continue
        over_p, over_q = (mp.log(k / m) if k != 0 else mpf(0) for k in (y, z))
        loss += a * z * over_q + b * y * over_p
        change = (y - z) / m if m != 0 else mpf(0)
        p_slopes.append(y * ((1 - beta) * apart * change + b * over_p))
        q_slopes.append(z * (beta * apart * change + a * over_q))
    grad_u = [(f - y * sum(p_slopes)) / t for f, y in zip(p_slopes, p, strict=True)]
    grad_v = [(f - z * sum(q_slopes)) / own for f, z in zip(q_slopes, q, strict=True)]
    return loss, grad_u, grad_v


def js_divergence(x: dict[str, Any]) -> dict[str, Tensor]:
    u, v = x["student"], x["teacher"]
    losses, grads = [], {"student": zeros(*u.shape), "teacher": zeros(*u.shape)}
    for _, n, s in rows_of(u):
        loss, grad_u, grad_v = js_divergence_row(u.row(n, s), v.row(n, s), x)
        losses.append(loss)
        grads["student"].set_row(n, s, grad_u)
        grads["teacher"].set_row(n, s, grad_v)
    return reduced(x, losses, grads, (u.shape[0], *u.shape[2:]))
