"""The formulas of ops/*.h, word by word, in mpmath: nothing of selfkd is used.

A tensor is its shape and its values in row-major order. A row of (N, C, ...) runs along dimension 1.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence
from itertools import product
from math import floor, prod
from typing import Any

from mixture import js_divergence, topk_divergence
from mpmath import mp, mpf
from rows import Row, Tensor, log_softmax, reduced, rows_of, zeros

# ---- rows of classes ----


def divergence(log_p: Row, log_q: Row) -> Any:
    """KL(p||q), with 0 log 0 = 0."""
    terms = zip(log_p, log_q, strict=True)
    return sum((mp.exp(a) * (a - b) for a, b in terms if a != -mp.inf), mpf(0))


def sd_dropout_kl_row(u: Row, v: Row, x: dict[str, Any]) -> tuple[Any, Row, Row]:
    """The loss of a row and its gradients."""
    t, wf, wr = (mpf(x[k]) for k in ("temperature", "forward_weight", "reverse_weight"))
    log_p, log_q = log_softmax(u, t), log_softmax(v, t)
    pq, qp = divergence(log_p, log_q), divergence(log_q, log_p)
    own_f, own_r = (0 if x["detach_target"] else w for w in (wf, wr))
    grad_u, grad_v = [], []
    for a, b in zip(
        log_p, log_q, strict=True
    ):  # a term of weight 0, or of a class with p = 0, is 0
        p, q = mp.exp(a), mp.exp(b)
        first_u = own_f * p * (a - b - pq) if own_f != 0 and p != 0 else 0
        first_v = own_r * q * (b - a - qp) if own_r != 0 and q != 0 else 0
        grad_u.append(t * (first_u + wr * (p - q)))
        grad_v.append(t * (first_v - wf * (p - q)))
    loss = t**2 * ((wf * pq if wf != 0 else 0) + (wr * qp if wr != 0 else 0))
    return loss, grad_u, grad_v


def cross_entropy_row(z: Row, target: int, smooth: Any) -> tuple[Any, Row]:
    log_p = log_softmax(z, 1)
    y = [(1 - smooth) * (c == target) + smooth / len(z) for c in range(len(z))]
    loss = -sum(b * a for a, b in zip(log_p, y, strict=True) if b != 0)
    return loss, [mp.exp(a) - b for a, b in zip(log_p, y, strict=True)]


def sd_dropout_kl(x: dict[str, Any]) -> dict[str, Tensor]:
    u, v = x["u"], x["v"]
    losses, grads = [], {"u": zeros(*u.shape), "v": zeros(*u.shape)}
    for _, n, s in rows_of(u):
        loss, grad_u, grad_v = sd_dropout_kl_row(u.row(n, s), v.row(n, s), x)
        losses.append(loss)
        grads["u"].set_row(n, s, grad_u)
        grads["v"].set_row(n, s, grad_v)
    return reduced(x, losses, grads, (u.shape[0], *u.shape[2:]))


def simreg(x: dict[str, Any]) -> dict[str, Tensor]:
    student, target, eps = x["student"], x["target"], mpf(1e-12)
    losses, grad = [], zeros(*student.shape)
    for _, n, s in rows_of(student):
        a, b = student.row(n, s), target.row(n, s)
        if not x["normalize"]:
            losses.append(sum((y - z) ** 2 for y, z in zip(a, b, strict=True)))
            grad.set_row(n, s, [2 * (y - z) for y, z in zip(a, b, strict=True)])
            continue
        length, other = (mp.sqrt(sum(y * y for y in row)) for row in (a, b))
        unit = [y / max(length, eps) for y in a]
        apart = [y - z / max(other, eps) for y, z in zip(unit, b, strict=True)]
        h = sum(y * z for y, z in zip(unit, apart, strict=True)) if length >= eps else mpf(0)
        losses.append(sum(y * y for y in apart))
        slopes = [z - y * h for y, z in zip(unit, apart, strict=True)]
        grad.set_row(n, s, [2 / max(length, eps) * y for y in slopes])
    return reduced(x, losses, {"student": grad}, (student.shape[0], *student.shape[2:]))


def distill(x: dict[str, Any]) -> dict[str, Tensor]:
    z = x["logits"]
    count, shape = len(rows_of(z)), (z.shape[0], *z.shape[2:])
    weight = x["weight"].values if "weight" in x else [mpf(1)] * count
    targets = x["target"].values if "target" in x else [None] * count
    valid = [y is not None and y != x["ignore_index"] for y in targets]
    taught = valid if x["mask_teachers"] else [True] * count
    mean = x["reduction"] == "mean"

    def denominator(over: list[bool]) -> Any:
        if "divisor" in x:
            return x["divisor"].values[0]
        return sum((w for w, there in zip(weight, over, strict=True) if there), mpf(0))

    by = [
        denominator(over) if mean else mpf(1)
        for over in (valid if "target" in x else taught, taught)
    ]
    ce_rows, kl_rows, grad = [mpf(0)] * count, [mpf(0)] * count, zeros(*z.shape)
    for i, n, s in rows_of(z):
        g = x["grad"].values[i if x["reduction"] == "none" else 0] * weight[i]
        row = z.row(n, s)
        slopes = [mpf(0)] * len(row)
        if valid[i]:
            loss, of = cross_entropy_row(row, targets[i], mpf(x["label_smoothing"]))
            ce_rows[i] = mpf(x["ce_weight"]) * weight[i] * loss
            slopes = [mpf(x["ce_weight"]) * g / by[0] * y for y in of]
        for k in ("", "second_"):
            if f"{k}teacher" not in x or not taught[i]:
                continue
            t, own = mpf(x[f"{k}temperature"]), mpf(x[f"{k}teacher_temperature"])
            teacher = x[f"{k}teacher"].row(n, s)
            if x[f"{k}teacher_kind"] == "probs":
                teacher = [mp.log(y) if y > 0 else -mp.inf for y in teacher]
            log_q, log_p = log_softmax(teacher, own), log_softmax(row, t)
            w = mpf(x[f"{k}teacher_weight"])
            kl_rows[i] += w * t**2 * weight[i] * divergence(log_q, log_p)
            slopes = [
                y + w * t * g / by[1] * (mp.exp(a) - mp.exp(b))
                for y, a, b in zip(slopes, log_p, log_q, strict=True)
            ]
        grad.set_row(n, s, slopes)
    ce, kl = sum(ce_rows) / by[0], sum(kl_rows) / by[1]
    rows = [a + b for a, b in zip(ce_rows, kl_rows, strict=True)]
    found = {name: Tensor((), [y]) for name, y in (("loss", ce + kl), ("ce", ce), ("kl", kl))}
    found |= {"rows": Tensor(shape, rows), "ce_rows": Tensor(shape, ce_rows)}
    return found | {"kl_rows": Tensor(shape, kl_rows), "grad_logits": grad}


def sd_dropout_head_rows(x: dict[str, Any]) -> dict[str, Tensor]:
    """The gradients stand under the names of the logits, which they are written over."""
    z, found = x["z"], {name: zeros(*x["z"].shape) for name in "zuv"}
    losses = []
    for i, n, s in rows_of(z):
        w = x["weight"].values[i] if "weight" in x else mpf(1)
        if x["target"].values[i] == x["ignore_index"] or w == 0:
            losses.append(mpf(0))
            continue
        smooth, factor = mpf(x["label_smoothing"]), mpf(x["kl_weight"])
        ce, of_z = cross_entropy_row(z.row(n, s), x["target"].values[i], smooth)
        kl, of_u, of_v = sd_dropout_kl_row(x["u"].row(n, s), x["v"].row(n, s), x)
        losses.append(w * (ce + factor * kl))
        for name, row, by in (("z", of_z, w), ("u", of_u, factor * w), ("v", of_v, factor * w)):
            found[name].set_row(n, s, [by * y for y in row])
    return {"rows": Tensor(z.shape[:1], losses)} | (found if x["differentiate"] else {})


# ---- scores and maps ----


def adversarial_term(mode: str, y: Any, target: int) -> tuple[Any, Any]:
    """a(y) and its slope; the fakes' b(f) is that of -f, with lsgan's target 0."""
    if mode == "bce":
        return mp.log1p(mp.exp(-y)), -1 / (1 + mp.exp(y))
    if mode == "hinge":
        return max(1 - y, mpf(0)), mpf(-1 if 1 - y > 0 else 0)
    return ((y - target) ** 2 / 2, y - target) if mode == "lsgan" else (-y, mpf(-1))


def adversarial(x: dict[str, Any]) -> dict[str, Tensor]:
    mode, none = x["mode"], x["reduction"] == "none"
    if mode == "hinge" and x["side"] == "generator":
        mode = "wgan"
    real = [adversarial_term(mode, y, 1) for y in x["real"].values]
    fake = [adversarial_term(mode, -y, 0) for y in x["fake"].values]
    by = [mpf(max(len(y), 1)) if x["reduction"] == "mean" else mpf(1) for y in (real, fake)]
    loss = sum(y for y, _ in real) / by[0] + sum((y for y, _ in fake), mpf(0)) / by[1]

    def incoming(i: int) -> Any:
        return x["grad"].values[i if none else 0]

    found = {
        "loss": Tensor((), [loss]),
        "grad_real": Tensor(
            x["real"].shape, [incoming(i) * y / by[0] for i, (_, y) in enumerate(real)]
        ),
        "grad_fake": Tensor(
            x["fake"].shape, [-incoming(i) * y / by[1] for i, (_, y) in enumerate(fake)]
        ),
    }
    if none:
        rows = [a + b for (a, _), (b, _) in zip(real, fake, strict=True)]
        found["rows"] = Tensor(x["real"].shape, rows)
    return found


def attention(x: dict[str, Any]) -> dict[str, Tensor]:
    student, eps, places = x["student"], mpf(x["eps"]), prod(x["student"].shape[2:])
    grad, total, size = zeros(*student.shape), mpf(0), student.shape[0] * places
    for n in range(student.shape[0]):
        maps = []
        for t in (student, x["teacher"]):
            a = [sum(y * y for y in t.row(n, s)) / t.shape[1] for s in range(places)]
            length = mp.sqrt(sum(y * y for y in a))
            maps.append([y / max(length, eps) for y in a])
            if t is student:
                own = length
        apart = [a - b for a, b in zip(*maps, strict=True)]
        h = sum(a * b for a, b in zip(maps[0], apart, strict=True)) if own >= eps else mpf(0)
        total += sum(y * y for y in apart)
        scale = 4 / (size * student.shape[1] * max(own, eps)) * x["grad"].values[0]
        for s in range(places):
            slope = scale * (apart[s] - maps[0][s] * h)
            grad.set_row(n, s, [slope * y for y in student.row(n, s)])
    return {"loss": Tensor((), [total / size]), "grad_student": grad}


def philox(counter: Sequence[int], seed: int) -> list[int]:
    """Philox4x32-10 (Salmon and others, SC 2011): four words of a counter of four."""
    a, b, c, d = counter
    low, high = seed % 2**32, seed // 2**32 % 2**32
    for _ in range(10):
        from_a, from_c = a * 0xD2511F53, c * 0xCD9E8D57
        a, b, c, d = from_c >> 32 ^ b ^ low, from_c % 2**32, from_a >> 32 ^ d ^ high, from_a % 2**32
        low, high = (low + 0x9E3779B9) % 2**32, (high + 0xBB67AE85) % 2**32
    return [a, b, c, d]


def dropout_views(x: dict[str, Any]) -> dict[str, Tensor]:
    features, p = x["features"], mpf(x["p"])
    size, width = len(features.values), features.shape[1]
    views, grad = list(features.values), list(x["grad"].values[:size])
    for view in range(2):
        for i, y in enumerate(features.values):
            e = (x["first_row"] * width + i) % 2**64
            block = (e // 4 % 2**32, e // 4 // 2**32, view, 0)
            word = philox(block, x["seed"].values[0])[e % 4]
            kept = word >= floor(p * 2**32)
            views.append(y / (1 - p) if kept else mpf(0))
            grad[i] += x["grad"].values[(view + 1) * size + i] / (1 - p) if kept else 0
    return {
        "views": Tensor((3, *features.shape), views),
        "grad_features": Tensor(features.shape, grad),
    }


def single(x: float) -> float:
    """Rounded to float32."""
    return float(struct.unpack("f", struct.pack("f", x))[0])


def taps(way: str, size: int, to: int, y: int) -> list[tuple[int, Any]]:
    """What output y of `to` is made of: inputs and their shares."""
    if way == "nearest":
        return [(min(floor(single(y * single(size / to))), size - 1), mpf(1))]
    if way == "bilinear":
        at = min(max((y + mpf(1) / 2) * size / to - mpf(1) / 2, 0), size - 1)
        low = floor(at)
        return [(low, 1 - (at - low)), (min(low + 1, size - 1), at - low)]
    return [(y, mpf(1))]


def brought(
    way: str, plane: Sequence[Any], size: tuple[int, int], to: tuple[int, int]
) -> list[list[tuple[int, Any]]]:
    """Of each output of a plane, the inputs that it is made of, and their shares."""
    made = []
    for y, x in product(range(to[0]), range(to[1])):
        if way == "maxpool":
            ys, xs = (
                [2 * k - i % 2 + j for j in range(3)] for k, i in ((y, size[0]), (x, size[1]))
            )
            inside = [
                a * size[1] + b for a, b in product(ys, xs) if 0 <= a < size[0] and 0 <= b < size[1]
            ]
            made.append([(max(inside, key=lambda k: plane[k]), mpf(1))])
            continue
        rows, columns = taps(way, size[0], to[0], y), taps(way, size[1], to[1], x)
        made.append([(a * size[1] + b, i * j) for (a, i), (b, j) in product(rows, columns)])
    return made


def activated(way: str, x: Any) -> tuple[Any, Any]:
    """The value and its slope."""
    if way == "silu":
        s = 1 / (1 + mp.exp(-x))
        return x * s, s * (1 + x * (1 - s))
    return (max(x, mpf(0)), mpf(x > 0)) if way == "relu" else (x, mpf(1))


def bifpn_fuse(x: dict[str, Any]) -> dict[str, Tensor]:
    names = [name for name in "abc" if name in x]
    late, way, eps = x["activate"] == "output", x["activation"], mpf(x["eps"])
    r = [max(w, mpf(0)) for w in x["weight"].values] if "weight" in x else []
    total = sum(r) + eps
    f = [y / total for y in r] if r else [mpf(1)] * len(names)
    to, planes = x["a"].shape[2:], prod(x["a"].shape[:2])
    area = prod(to)
    operands = {k: [y if late else activated(way, y)[0] for y in x[k].values] for k in names}
    resized: dict[str, Row] = {k: [] for k in names}
    made: dict[str, list[Any]] = {k: [] for k in names}
    for k, plane in product(names, range(planes)):
        own = prod(x[k].shape[2:])
        values = operands[k][plane * own : (plane + 1) * own]
        made[k].append(brought(x.get(f"resize_{k}", "none"), values, x[k].shape[2:], to))
        resized[k] += [sum(values[i] * w for i, w in of) for of in made[k][plane]]
    pre = [
        sum(w * y for w, y in zip(f, at, strict=True)) for at in zip(*resized.values(), strict=True)
    ]
    g = list(x["grad"].values)
    if late:
        g = [a * activated(way, y)[1] for a, y in zip(g, pre, strict=True)]
    found = {"fused": Tensor(x["a"].shape, [activated(way, y)[0] if late else y for y in pre])}
    for k, share in zip(names, f, strict=True):
        own, grad = prod(x[k].shape[2:]), zeros(*x[k].shape)
        for plane, at in product(range(planes), range(area)):
            for i, w in made[k][plane][at]:
                grad.values[plane * own + i] += share * w * g[plane * area + at]
        if not late:
            slopes = [activated(way, y)[1] for y in x[k].values]
            grad.values = [a * b for a, b in zip(grad.values, slopes, strict=True)]
        found[f"grad_{k}"] = grad
    if r:
        d = [sum(a * b for a, b in zip(g, resized[k], strict=True)) for k in names]
        of = [(eps * y + sum(b * (y - z) for b, z in zip(r, d, strict=True))) / total**2 for y in d]
        of = [y if w > 0 else mpf(0) for y, w in zip(of, x["weight"].values, strict=True)]
        found["grad_weight"] = Tensor((len(r),), of)
    return found


FORMULAS: dict[str, Callable[[dict[str, Any]], dict[str, Tensor]]] = {
    "sd_dropout_kl": sd_dropout_kl,
    "simreg": simreg,
    "js_divergence": js_divergence,
    "topk_divergence": topk_divergence,
    "distill": distill,
    "adversarial": adversarial,
    "attention": attention,
    "bifpn_fuse": bifpn_fuse,
    "dropout_views": dropout_views,
    "sd_dropout_head_rows": sd_dropout_head_rows,
}
