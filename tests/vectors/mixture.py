"""The formulas of ops/js_divergence.h and ops/topk_divergence.h, word by word, in mpmath."""

from __future__ import annotations

from random import Random
from typing import Any

from mpmath import mp, mpf
from rows import Row, Tensor, draw, log_softmax, near, of, reduced, rows_of, zeros


def terms_of(p: Row, q: Row, x: dict[str, Any]) -> tuple[Any, Row, Row]:
    """The divergence of p and q, which sum to 1, and p f and q g of each class."""
    beta, a, b = (mpf(x[k]) for k in ("beta", "teacher_weight", "student_weight"))
    loss, of_p, of_q = mpf(0), [], []
    for y, z in zip(p, q, strict=True):
        m, uneven = beta * z + (1 - beta) * y, a * (1 - beta) - b * beta
        if x["kind"] == "tv":
            loss += abs(y - z) / 2
            of_p.append(y * mp.sign(y - z) / 2)
            of_q.append(-z * mp.sign(y - z) / 2)
            continue
        over_p, over_q = (mp.log(k / m) if k != 0 else mpf(0) for k in (y, z))
        loss += a * z * over_q + b * y * over_p
        change = (y - z) / m if m != 0 else mpf(0)
        of_p.append(y * ((1 - beta) * uneven * change + b * over_p))
        of_q.append(z * (beta * uneven * change + a * over_q))
    return loss, of_p, of_q


def js_divergence_row(u: Row, v: Row, x: dict[str, Any]) -> tuple[Any, Row, Row]:
    """The loss of a row and its gradients."""
    t, own = mpf(x["temperature"]), mpf(x["teacher_temperature"])
    p, q = ([mp.exp(y) for y in log_softmax(z, k)] for z, k in ((u, t), (v, own)))
    loss, of_p, of_q = terms_of(p, q, x)
    grad_u = [(f - y * sum(of_p)) / t for f, y in zip(of_p, p, strict=True)]
    grad_v = [(f - z * sum(of_q)) / own for f, z in zip(of_q, q, strict=True)]
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


def topk_divergence(x: dict[str, Any]) -> dict[str, Tensor]:
    z, t, own = x["logits"], mpf(x["temperature"]), mpf(x["teacher_temperature"])
    beta, a, b = (mpf(x[k]) for k in ("beta", "teacher_weight", "student_weight"))
    losses, grads = [], zeros(*z.shape)
    for i, n, s in rows_of(z):
        row, listed = z.row(n, s), x["indices"].row(n, s)
        places = [k for k, c in enumerate(listed) if c >= 0]
        classes = [listed[k] for k in places]
        stored = [x["teacher"].row(n, s)[k] for k in places]
        if x["tail"] == "renormalize":
            p = [mp.exp(y) for y in log_softmax([row[c] for c in classes], t)]
            q = [mp.exp(y) for y in log_softmax(stored, own)]
        else:
            everything = [mp.exp(y) for y in log_softmax(row, t)]
            shift = x["teacher_logsumexp"].values[i] if "teacher_logsumexp" in x else None
            q = [mp.exp(y if shift is None else y / own - shift) for y in stored]
            p = [everything[c] for c in classes]
        rest = [c for c in range(len(row)) if c not in classes]
        if x["tail"] == "bucket" and rest:
            p.append(sum(everything[c] for c in rest))
            q.append(max(1 - sum(q), mpf(1e-7)))
        loss, of_p, _ = terms_of(p, q, x)
        uneven = 0 if x["kind"] == "tv" else a * (1 - beta) - b * beta
        if x["tail"] == "drop":  # f less what cancels where all classes count
            of_p = [f - uneven * y for f, y in zip(of_p, p, strict=True)]
        else:  # the terms - q + M and - p + M, for stored q that do not sum to 1
            loss += uneven * (sum(p) - sum(q))
        losses.append(loss)
        mean, grad = sum(of_p), [mpf(0)] * len(row)
        for c, f, y in zip(classes, of_p, p, strict=False):
            grad[c] = (f - y * mean) / t
        for c in rest if x["tail"] != "renormalize" else []:
            share = of_p[-1] / p[-1] if x["tail"] == "bucket" else 0
            grad[c] = everything[c] * (share - mean) / t
        grads.set_row(n, s, grad)
    return reduced(x, losses, {"logits": grads}, (z.shape[0], *z.shape[2:]))


# ---- cases ----


def mixtures(g: Random) -> dict[str, dict[str, Any]]:
    """js_divergence: a student and a teacher."""
    x, y = draw(g, 3, 7), draw(g, 3, 7)
    hole, other = draw(g, 2, 6), draw(g, 2, 6)
    hole.values[1] = hole.values[8] = other.values[8] = other.values[4] = mpf("-inf")
    both = {"student": x, "teacher": y}
    kl = {"beta": 0.0, "teacher_weight": 1.0, "student_weight": 0.0}
    reverse = {"beta": 1.0, "teacher_weight": 0.0, "student_weight": 1.0}
    skewed = {"beta": 0.125, "teacher_weight": 1.0, "student_weight": 0.0}
    return {
        "Jensen-Shannon": both,
        "generalised": both | {"beta": 0.125, "teacher_weight": 0.125, "student_weight": 0.875},
        "KL(q||p)": both | kl,
        "KL(p||q)": both | reverse | {"reduction": "sum"},
        "skewed": both | skewed | {"temperature": 2.0, "teacher_temperature": 1.5},
        "skewed, reverse": both | {"beta": 0.125, "teacher_weight": 0.0, "student_weight": 1.0},
        "total variation": both | {"kind": "tv"},
        "rows, weighted": {
            **{"student": draw(g, 2, 3, 2), "teacher": draw(g, 2, 3, 2), "reduction": "none"},
            **{"weight": of([1.5, 0, 0.25, 2], 2, 2), "grad": of([1, 0.5, -2, 0.125], 2, 2)},
        },
        "a divisor": both | {"divisor": of([2.5]), "grad": of([0.375])},
        "close rows": {"student": x, "teacher": near(x, g, 2.0**-13), "close": True},
        "close rows, skewed": {"student": x, "teacher": near(x, g, 2.0**-13), "close": True}
        | skewed,
        "rows that are equal": {"student": x, "teacher": x},
        "classes at -inf on one side or both": {"student": hole, "teacher": other},
        "large logits": {"student": draw(g, 2, 19, spread=64), "teacher": draw(g, 2, 19, spread=64)}
        | kl,
    }


def stored(g: Random) -> dict[str, dict[str, Any]]:
    """topk_divergence: a student, and log-probabilities of some classes, of multiples of 1/64."""
    indices = Tensor((3, 4), [6, 0, 3, 2, 1, 2, 3, -1, 5, -1, 4, 0])
    log_q = Tensor((3, 4), [mpf(g.randint(-96, -48)) / 32 for _ in range(12)])
    x = {"logits": draw(g, 3, 9), "indices": indices, "teacher": log_q}
    skewed = {"beta": 0.125, "teacher_weight": 1.0, "student_weight": 0.0}
    positions = {"logits": draw(g, 2, 5, 2), "teacher": draw(g, 2, 2, 2), "tail": "renormalize"}
    return {
        "the tail as one class": x,
        "skewed, as logits": {
            **{**x, **skewed, "temperature": 2.0, "teacher_temperature": 2.0},
            **{"teacher": draw(g, 3, 4), "teacher_logsumexp": of([4, 5, 4.5])},
        },
        "renormalised": x | skewed | {"tail": "renormalize", "reduction": "sum"},
        "dropped": x | skewed | {"tail": "drop"},
        "total variation": x | {"kind": "tv"},
        "positions": positions | {"indices": Tensor((2, 2, 2), [0, 1, 2, 3, 4, 0, 1, 2])},
        "weighted": x | {"weight": of([2, 0, 0.5]), "reduction": "none", "grad": of([1, 2, -1])},
    }
