"""topk_divergence: the cases every back end runs, and what the operator promises beside them."""

from __future__ import annotations

from typing import Any

import harness
import pytest
import selfkd
import torch
import torch.nn.functional as F
from harness import Case, Make, divided, needs_torch_backend, weighted

OP = "topk_divergence"
NAN, INF = torch.nan, torch.inf


def draw(
    *shape: int,
    k: int | None = None,
    scale: float = 3.0,
    apart: float | None = None,
    T: float = 1.0,
    lse: bool = False,
    padded: bool = False,
    shift: float = 0.0,
    index: torch.dtype = torch.int64,
) -> Make:
    """Logits, and what a teacher says of its k likeliest classes in any order.

    `apart` standard deviations from the student, else independent; with `lse` logits, T being its
    temperature; `padded`: a part of the places holds no class. Classes 3 and 5 are always listed.
    """
    C = shape[1]
    K = min(C, 2 + C // 10 if k is None else k)

    def make(g: torch.Generator) -> dict[str, torch.Tensor]:
        x, noise = (torch.randn(shape, generator=g, dtype=torch.float64) for _ in range(2))
        z = scale * x
        t = shift + (scale * noise if apart is None else z + apart * noise)
        liked = t.clone()
        liked[:, [c for c in (3, 5) if c < C]] += 1e6
        order = torch.randperm(K, generator=g)
        indices = liked.topk(K, 1).indices[:, order]
        values = (t if lse else F.log_softmax(t / T, 1)).gather(1, indices)
        found = {"logits": z, "indices": indices.to(index), "teacher": values}
        if padded:
            none = torch.rand(indices.shape, generator=g) < 0.4
            found["indices"] = found["indices"].masked_fill(none, -1)
            found["teacher"] = values.masked_fill(none, NAN)
        if lse:
            found["teacher_logsumexp"] = (t / T).logsumexp(1)
        return found

    return make


def of(beta: float, a: float, b: float, **numbers: object) -> dict[str, object]:
    return {"beta": beta, "teacher_weight": a, "student_weight": b, **numbers}


KINDS: dict[str, dict[str, Any]] = {
    "jensen_shannon": {},
    "beta_0.1": of(0.1, 0.1, 0.9),
    "forward_kl": of(0.0, 1.0, 0.0),
    "reverse_kl": of(1.0, 0.0, 1.0),
    "skewed_kl": of(0.1, 1.0, 0.0),
    "uneven": of(0.7, 2.0, 0.5),
    "tv": {"kind": "tv"},
}
TAILS: dict[str, dict[str, Any]] = {x: {"tail": x} for x in ("bucket", "renormalize", "drop")}
HOT: dict[str, Any] = {"temperature": 2.0, "teacher_temperature": 2.0}
CASES = [
    Case("one_class", draw(3, 1)),
    *[
        Case(f"{t}_{n}_of_{c}", draw(5, c, k=n), tail)
        for t, tail in TAILS.items()
        for n, c in [(1, 2), (1, 17), (5, 16), (16, 16), (40, 1024), (40, 1025), (100, 3000)]
    ],
    *[
        Case(f"{t}_{name}", draw(9, 50, k=25), {**numbers, **tail})
        for t, tail in TAILS.items()
        for name, numbers in KINDS.items()
    ],
    *[
        Case(f"{t}_{name}_padded", draw(9, 50, k=12, padded=True), {**numbers, **tail})
        for t, tail in TAILS.items()
        for name, numbers in KINDS.items()
    ],
    *[
        Case(f"{t}_{name}_1e-3_apart", draw(9, 300, apart=1e-3), {**numbers, **tail}, close=True, exact=1e-8)
        for t, tail in TAILS.items()
        for name, numbers in KINDS.items()
    ],
    *[
        Case(f"{t}_hot", draw(9, 50, T=2.0), {**HOT, **tail}) for t, tail in TAILS.items()
    ],
    *[
        Case(f"{t}_logits_{T}", draw(9, 50, T=T, lse=True, shift=40.0), {**tail, "temperature": 1.5, "teacher_temperature": T})
        for t, tail in TAILS.items()
        for T in (0.7, 3.0)
    ],
    Case("all_but_one", draw(9, 40, k=39)),
    Case("int32", draw(9, 50, index=torch.int32)),
    Case("most", draw(3, 6000, k=4096)),
    Case("many_classes", draw(2, 262144, k=100), big=True),
    Case("beyond_buckets", draw(1, 300000, k=4000), big=True),
    Case("weighted", weighted(draw(33, 100))),
    Case("masked", weighted(draw(33, 100), boolean=True)),
    Case("divisor", divided(weighted(draw(33, 10)))),
    Case("no_rows", draw(0, 10), {"reduction": "sum"}),
]
MAPS = [
    Case("tokens", draw(3, 130, 7)),
    Case("tokens_wide", draw(2, 1100, 3)),
    Case("maps", draw(2, 21, 16, 24), exact=1e-11),
    Case("maps_masked", weighted(draw(2, 21, 9, 13), boolean=True), exact=1e-11),
    Case("maps_padded", draw(2, 40, 5, 5, padded=True, index=torch.int32), of(0.7, 2.0, 0.5)),
    Case("maps_logits", draw(2, 40, 5, 5, lse=True), TAILS["renormalize"]),
    Case("no_positions", draw(2, 9, 0, 4), {"reduction": "sum"}),
]
globals().update(
    harness.standard_tests(
        OP,
        draw,
        CASES,
        maps=MAPS,
        path="rows",
        options=[{}, TAILS["renormalize"], {**TAILS["drop"], **of(0.7, 2.0, 0.5)}],
        zero=[],
        excludes=True,
    )
)
