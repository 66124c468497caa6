"""topk_divergence: the cases every back end runs, and what the operator promises beside them."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import harness
import numpy as np
import pytest
import selfkd
import torch
import torch.nn.functional as F
from harness import Case, Make, divided, needs_torch_backend, weighted
from selfkd.bench import baselines

OP = "topk_divergence"
NAN, INF = torch.nan, torch.inf
F32 = torch.float32


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
        Case(
            f"{t}_{name}_1e-3_apart",
            draw(9, 300, apart=1e-3),
            {**numbers, **tail},
            close=True,
            exact=1e-8,
        )
        for t, tail in TAILS.items()
        for name, numbers in KINDS.items()
    ],
    *[Case(f"{t}_hot", draw(9, 50, T=2.0), {**HOT, **tail}) for t, tail in TAILS.items()],
    *[
        Case(
            f"{t}_logits_{T}",
            draw(9, 50, T=T, lse=True, shift=40.0),
            {**tail, "temperature": 1.5, "teacher_temperature": T},
        )
        for t, tail in TAILS.items()
        for T in (0.7, 3.0)
    ],
    Case("all_but_one", draw(9, 40, k=39)),
    Case("int32", draw(9, 50, index=torch.int32)),
    Case("most", draw(3, 6000, k=4096)),
    Case("two_windows", draw(2, 40000, k=60)),  # of the CUDA kernel's bits
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


def long(x: torch.Tensor) -> Any:
    return x.double().numpy().astype(np.longdouble)


def exactly(tensors: dict[str, torch.Tensor], tail: str, temperature: float = 1.0) -> Any:
    """Jensen-Shannon of each row in 80 bits, from rows (N, C)."""
    x, at = long(tensors["logits"]) / np.longdouble(temperature), tensors["indices"].numpy()
    log_q = long(tensors["teacher"])
    rest = x.copy()
    np.put_along_axis(rest, at, -np.inf, 1)
    chosen = np.take_along_axis(x, at, 1)

    def lse(x: Any) -> Any:
        top = x.max(1, keepdims=True)
        return top + np.log(np.exp(x - top).sum(1, keepdims=True))

    if tail == "renormalize":
        log_p, log_q = chosen - lse(chosen), log_q - lse(log_q)
    else:
        log_p = chosen - lse(x)
    if tail == "bucket":
        left = np.maximum(1 - np.exp(log_q).sum(1, keepdims=True), np.longdouble(1e-7))
        log_p = np.concatenate([log_p, lse(rest) - lse(x)], 1)
        log_q = np.concatenate([log_q, np.log(left)], 1)
    p, q, d = np.exp(log_p), np.exp(log_q), log_p - log_q
    to_m_of_p, to_m_of_q = (-np.log1p(np.expm1(y) / 2) for y in (-d, d))  # log(p/M), log(q/M)
    of_p, of_q = (y - -np.expm1(-y) for y in (to_m_of_p, to_m_of_q))  # y - 1 + e^-y
    return (p * of_p + q * of_q).sum(1) / 2


@needs_torch_backend
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("tail", TAILS)
@pytest.mark.parametrize("apart", [1e-1, 1e-3, 1e-5])
def test_close_rows_against_long_double(
    tail: str, apart: float, dtype: str, generator: torch.Generator
) -> None:
    """Where the float64 reference is no judge; both sides with a large tail, and with a small one."""
    for k, scale in ((5, 1.0), (100, 3.0), (1100, 1.0)):
        make = draw(5, 1500, k=k, scale=scale, apart=apart)
        tensors = harness.cast(make(generator), OP, harness.DTYPES[dtype])
        found = selfkd.topk_divergence(**tensors, tail=tail, reduction="none").numpy()
        expected = exactly(tensors, tail)
        bound = 3e-6 if dtype == "float32" else 1e-12 if apart > 1e-2 else 1e-7
        assert np.abs(found / expected - 1).max() < bound


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("backend", harness.backends(), ids=str)
def test_digits_of_a_small_tail(
    backend: harness.Backend, dtype: str, generator: torch.Generator
) -> None:
    """The tail's log p keeps its digits where p is too small for a number: by KL(q||p) and its gradient."""
    harness.prepare(backend)
    within = 3e-7 if dtype == "float32" else 1e-13
    for below in (10.0, 30.0, 70.0, 300.0, 1000.0):
        x = torch.randn(4, 1200, generator=generator, dtype=torch.float64)
        x[:, 20:] -= below
        z = x.to(harness.DTYPES[dtype])
        indices = torch.arange(20).repeat(4, 1)
        log_q = torch.full((4, 20), 0.04, dtype=z.dtype).log()  # 0.2 are left
        log_p = z.double().log_softmax(1)
        rest = z.double()[:, 20:].logsumexp(1) - z.double().logsumexp(1)
        left = 1 - log_q.double().exp().sum(1)
        of_listed = (log_q.double().exp() * (log_q.double() - log_p[:, :20])).sum(1)
        tensors = {"logits": z, "indices": indices, "teacher": log_q}
        given = {name: x.to(backend.device) for name, x in tensors.items()}
        found, grads = backend.call(OP, given, {**KINDS["forward_kl"], "reduction": "none"})
        expected = of_listed + left * (left.log() - rest)
        torch.testing.assert_close(found.double().cpu(), expected, rtol=within, atol=0)
        share = grads["logits"].double().cpu()[:, 20:] / (log_p - rest[:, None])[:, 20:].exp()
        slope = (rest.exp() - left)[:, None].expand_as(share)
        torch.testing.assert_close(share, slope, rtol=30 * within, atol=0)


@needs_torch_backend
@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("tail", TAILS)
def test_the_students_own_list(tail: str, name: str, generator: torch.Generator) -> None:
    """A teacher that stored what the student says: nothing but the rounding of what is stored."""
    z = 3 * torch.randn(6, 3000, generator=generator)
    log_q, indices = z.double().log_softmax(1).topk(100, 1)
    live = z.requires_grad_()
    rows = selfkd.topk_divergence(
        live, indices, log_q.float(), **{**KINDS[name], "tail": tail}, reduction="none"
    )
    rows.sum().backward()
    first_order = name == "tv" or (tail == "drop" and name not in ("jensen_shannon", "beta_0.1"))
    assert rows.abs().max() < (1e-6 if first_order else 1e-12)
    assert rows.min() >= 0 or tail == "drop"
    if not first_order:
        assert live.grad.abs().max() < 1e-6


@needs_torch_backend
def test_all_classes_are_js_divergence(generator: torch.Generator) -> None:
    z, t = (3 * torch.randn(5, 40, generator=generator, dtype=torch.float64) for _ in range(2))
    indices = harness.listed_classes((5, 40), 40, generator)
    listed = t.log_softmax(1).gather(1, indices)
    for name, numbers in KINDS.items():
        expected = selfkd.js_divergence(z, t, **numbers)
        for tail in TAILS:
            found = selfkd.topk_divergence(z, indices, listed, **numbers, tail=tail)
            torch.testing.assert_close(found, expected, rtol=1e-11, atol=0, msg=f"{name} {tail}")


@needs_torch_backend
def test_trl(generator: torch.Generator) -> None:
    """The top-k divergence of TRL's SDFT trainer, with its tail."""
    tensors = harness.cast(draw(6, 500, k=100)(generator), OP, torch.float32)
    found = selfkd.topk_divergence(**tensors)
    torch.testing.assert_close(
        found, baselines.topk_of_log_softmax(*tensors.values()), rtol=1e-5, atol=0
    )


@needs_torch_backend
@pytest.mark.parametrize("index", [torch.int32, torch.int64])
def test_values_of_indices(index: torch.dtype) -> None:
    """A sentence for a class that is none, and for one that is listed twice."""
    z, log_q = torch.randn(3, 6, 2), -torch.ones(3, 3, 2) * 2
    good = torch.arange(3, dtype=index)[None, :, None].repeat(3, 1, 2)
    selfkd.topk_divergence(z, good, log_q)
    for wrong, place, words in [
        (6, (1, 2, 0), r"has 6 at position \[1, 0\], expected 0 to 5, or -1"),
        (-2, (2, 0, 1), r"has -2 at position \[2, 1\], expected 0 to 5, or -1"),
        (1, (0, 2, 1), r"has 1 twice at position \[0, 1\], expected once"),
    ]:
        indices = good.clone()
        indices[place] = wrong
        with pytest.raises(ValueError, match=f"^topk_divergence: indices {words}"):
            selfkd.topk_divergence(z, indices, log_q)
    far = torch.tensor(
        [[262143, 262144, 299999, 262144]], dtype=index
    )  # past a window of the search
    with pytest.raises(ValueError, match="has 262144 twice"):
        selfkd.topk_divergence(torch.zeros(1, 300000), far, -torch.ones(1, 4))


@needs_torch_backend
@pytest.mark.parametrize("k", [0, 4097])
@pytest.mark.parametrize("function", [selfkd.topk_divergence, selfkd.c.topk_divergence])
def test_how_many_are_listed(function: Any, k: int) -> None:
    z, indices, log_q = (
        torch.zeros(1, 5000),
        torch.zeros(1, k, dtype=torch.int32),
        torch.zeros(1, k),
    )
    sentence = f"topk_divergence: indices has size {k} in dimension K, expected 1 to 4096"
    if function is not selfkd.topk_divergence:
        z, indices, log_q = z.numpy(), indices.numpy(), log_q.numpy()
    with pytest.raises(ValueError, match=f"^{sentence}"):
        function(z, indices, log_q)


@pytest.mark.parametrize("tail", TAILS)
@pytest.mark.parametrize("backend", harness.backends(), ids=str)
def test_skipped_rows_and_rows_without_a_class(
    backend: harness.Backend, tail: str, generator: torch.Generator
) -> None:
    """Weight 0 with nothing but NaN, and rows whose places are all -1: 0, with no gradient."""
    harness.prepare(backend)
    tensors = harness.cast(draw(6, 40, k=9, lse=True)(generator), OP, F32, backend.device)
    weight = torch.tensor([1.0, 0.0, 1.0, 1.0, 0.0, 2.0], device=backend.device)
    for name in ("logits", "teacher", "teacher_logsumexp"):
        tensors[name][weight == 0] = NAN
    tensors["indices"][3] = -1
    case = Case("skipped", draw(1, 1), {"tail": tail})
    harness.check_tensors(OP, case, backend, {**tensors, "weight": weight})
    options = {"tail": tail, "reduction": "none"}
    rows, grads = backend.call(OP, {**tensors, "weight": weight}, options)
    assert (rows[[1, 3, 4]].abs() < 1e-12).all()
    assert (grads["logits"][[1, 3, 4]].abs() < 1e-12).all()


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("tail", TAILS)
@pytest.mark.parametrize("backend", harness.backends(), ids=str)
def test_excluded_classes(
    backend: harness.Backend, tail: str, name: str, generator: torch.Generator
) -> None:
    """-inf among the listed logits, among those of the tail, in the teacher's list, and on both sides."""
    harness.prepare(backend)
    tensors = harness.cast(draw(5, 60, k=12)(generator), OP, F32, backend.device)
    z, at, t = tensors["logits"], tensors["indices"], tensors["teacher"]
    others = [c for c in range(60) if c not in at[1].tolist()]
    z[0, at[0, 4]] = -INF
    z[1, others[:20]] = -INF
    t[2, 3] = -INF
    z[3, at[3, 5]] = t[3, 5] = -INF
    options = {**KINDS[name], "tail": tail, "reduction": "none"}
    expected, expected_grads = harness.reference(OP, tensors, options)
    found, grads = backend.call(OP, tensors, options)
    harness.assert_values(found, expected, "rows")
    finite = expected.isfinite() & expected_grads["logits"].isfinite().all(1)
    assert finite[[1, 2, 3, 4]].all() or name == "reverse_kl"
    harness.assert_gradient(grads["logits"][finite], expected_grads["logits"][finite], "gradient")


@pytest.mark.parametrize("backend", harness.backends(), ids=str)
def test_far_rows(backend: harness.Backend, generator: torch.Generator) -> None:
    """Large logits, and sides of which each gives nearly all to a few classes of its own."""
    harness.prepare(backend)
    for kind in KINDS.values():
        for tail in TAILS.values():
            case = Case("far", draw(5, 60, k=12, scale=10.0), {**kind, **tail}, exact=1e-9)
            tensors = harness.cast(case.make(generator), OP, F32, backend.device)
            harness.check_tensors(OP, case, backend, tensors)
            tensors["logits"] += 1e4
            harness.check_tensors(OP, case, backend, tensors)


@pytest.mark.simt
@pytest.mark.skipif(not harness.SIMT_LIBRARY, reason="of the emulator: tests/test_simt.py runs it")
@pytest.mark.parametrize(
    ("listed", "said"), [([0, 6], "a class that there is not"), ([1, 1], "a class twice")]
)
def test_what_the_device_asserts(listed: list[int], said: str) -> None:
    """Each ends the process, as an assertion ends a kernel."""
    call = f"""
import harness, torch
tensors = {{"logits": torch.zeros(1, 6), "teacher": -torch.ones(1, 2)}}
tensors["indices"] = torch.tensor([{listed}])
harness.backends()[0].values[0].call("{OP}", tensors, {{}})"""
    command = [sys.executable, "-c", call]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parent)
    assert done.returncode != 0
    assert f"topk_divergence: indices has {said}" in done.stderr
