"""Finite in gives finite, or the infinity that the exact result rounds to: the largest and the smallest
numbers in every floating input of every operator, forward and backward.

What is exact is found in 80 bits (wide.py), whose exponents hold the fourth power of any float64.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import harness
import numpy as np
import pytest
import selfkd
import torch
from selfkd.contract import contract
from wide import ROW_LOSSES, Exact, Wide, distill, reduced, sd_dropout_kl, wide

MAGNITUDES = (3e19, 1e30, 3e38, 1e200, 1e300, 1e-30, 1e-200)  # the square of 3e19 is no float
CLASSES = 19  # some in whole vectors, some left over
KL = ("sd_dropout_kl", "distill")
ROWS = 8  # one for each way of placing a magnitude


# ---- the inputs ----


def place(x: torch.Tensor, m: float) -> torch.Tensor:
    """Rows with numbers of magnitude m, one way each; float64."""
    x = x.clone()
    rows = x.flatten(1) if x.ndim > 1 else x.view(-1, 1)
    if rows.shape[1] < 4:  # of a weight or a score there is one in a row
        rows[0], rows[3], rows[5] = m, -m, m / 2
        return x
    rows[0, 1] = m
    rows[1, 2] = -m
    rows[2, 0], rows[2, 3] = m, -m
    rows[3] = (rows[3] * (m / 4)).clamp(-m, m)
    rows[4, 0] = rows[4, 3] = m
    rows[5] = -m * (0.5 + rows[5].abs() / 20)
    rows[6, 2], rows[6, 0] = m, m / 2
    return x


# A call for each formula: its name, the operator and its options.
CALLS: dict[str, tuple[str, tuple[str, ...], dict[str, Any]]] = {
    "sd_dropout_kl": ("sd_dropout_kl", ("u", "v"), {}),
    "sd_dropout_kl, weighted": ("sd_dropout_kl", ("u", "v", "weight"), {"temperature": 1.0}),
    "sd_dropout_kl, detached": ("sd_dropout_kl", ("u", "v"), {"detach_target": True}),
    "sd_dropout_kl, one way": ("sd_dropout_kl", ("u", "v"), {"reverse_weight": 0.0}),
    "distill, target": ("distill", ("logits", "target"), {}),
    "distill, weighted": ("distill", ("logits", "target", "weight"), {}),
    "distill, smooth": ("distill", ("logits", "target"), {"label_smoothing": 0.1}),
    "distill, teacher": ("distill", ("logits", "teacher"), {}),
    "distill, apart": ("distill", ("logits", "teacher"), {"teacher_temperature": 2.0}),
    "distill, two": (
        "distill",
        ("logits", "target", "teacher", "second_teacher"),
        {"second_temperature": 1.0, "second_teacher_temperature": 1.0},
    ),
    "simreg": ("simreg", ("student", "target"), {}),
    "simreg, weighted": ("simreg", ("student", "target", "weight"), {}),
    "simreg, as they are": ("simreg", ("student", "target"), {"normalize": False}),
    "attention": ("attention", ("student", "teacher"), {}),
    "attention, eps": ("attention", ("student", "teacher"), {"eps": 1e-300}),
    "dropout_views": ("dropout_views", ("features",), {"p": 0.25}),
}
for _mode in ("bce", "hinge", "lsgan", "wgan"):
    for _side, _names in (("discriminator", ("real", "fake")), ("generator", ("real",))):
        CALLS[f"{_mode}, {_side}"] = ("adversarial", _names, {"mode": _mode, "side": _side})
for _activation in ("none", "relu", "silu"):
    for _activate in ("inputs", "output"):
        CALLS[f"bifpn_fuse, {_activation} of {_activate}"] = (
            "bifpn_fuse",
            ("a", "b", "weight"),
            {"activation": _activation, "activate": _activate},
        )


def ordinary(
    op: str, names: tuple[str, ...], dtype: torch.dtype, classes: int = CLASSES
) -> dict[str, torch.Tensor]:
    """Ordinary inputs of a call, in float64, with digits that `dtype` holds."""
    g = torch.Generator().manual_seed(1)
    shapes = {
        "attention": (ROWS, 5, CLASSES),
        "bifpn_fuse": (ROWS, 3, 4, 5),
        "adversarial": (ROWS,),
    }
    found = {}
    for name in names:
        if name == "target" and op == "distill":
            found[name] = torch.arange(ROWS) % 4
        elif name == "weight":
            size = 2 if op == "bifpn_fuse" else ROWS
            found[name] = torch.rand(size, generator=g, dtype=torch.float64).float().double()
        else:
            x = torch.randn(shapes.get(op, (ROWS, classes)), generator=g, dtype=torch.float64)
            found[name] = x.to(dtype).double()
    return found


def magnitudes(dtype: torch.dtype) -> list[float]:
    """Those that `dtype` holds, its smallest, and its largest: less in float64, where differences and
    sums must be numbers too."""
    info = torch.finfo(dtype)
    largest = info.max / 4096 if dtype == torch.float64 else info.max
    held = [m for m in MAGNITUDES if info.smallest_normal <= m <= largest]
    return [*held, info.smallest_normal, largest]


def accumulator(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def with_magnitude(
    op: str, x: dict[str, torch.Tensor], name: str, m: float, dtype: torch.dtype
) -> dict[str, Any]:
    """The inputs of a call with m in that of a name, or in all that hold rows."""
    rows = [key for key, y in x.items() if y.is_floating_point() and key != "weight"]
    x = dict(x)
    if name == "weight":
        x["weight"][0] = m
    for at, key in enumerate(rows if name == "all" else [name] if name in rows else []):
        x[key] = place(x[key].roll(at, -1), m).roll(at, -1)
    if op == "dropout_views":
        x["seed"] = torch.tensor(3)
    return harness.cast(x, op, dtype)


def inputs(
    op: str, names: tuple[str, ...], dtype: torch.dtype
) -> Iterator[tuple[str, dict[str, Any]]]:
    """A magnitude in one of the floating inputs, or in all that hold rows."""
    for name in [*(name for name in names if (op, name) != ("distill", "target")), "all"]:
        for m in magnitudes(accumulator(dtype) if name == "weight" else dtype):
            x = ordinary(op, names, dtype)
            yield f"{m:.3g} in {name}", with_magnitude(op, x, name, m, dtype)


# ---- the comparison ----


def assert_close(found: torch.Tensor, exact: Wide, error: Wide, what: str) -> None:
    """Within `error`; where the exact number is too large for the dtype, infinite."""
    dtype, got = found.dtype, wide(found)
    largest = np.longdouble(torch.finfo(dtype).max)
    too_large = (np.abs(exact) + error > largest) & (np.sign(got) == np.sign(exact))
    wrong = np.where(np.isfinite(got), np.abs(got - exact) > error, ~np.isinf(got) | ~too_large)
    at = np.argwhere(wrong)
    assert not wrong.any(), f"{what} at {at[0]}: {got[wrong][0]}, expected {exact[wrong][0]}"


def assert_result(op: str, found: torch.Tensor, exact: Wide, what: str, largest: Any = 0) -> None:
    """By the tolerance of values; of a map by its dtype, too. `largest` is what may have cancelled in a
    map or in a sum of scores."""
    eps = np.longdouble(harness.epsilon(found.dtype))
    tolerance = 1e-12 if eps < 1e-9 else 3e-6
    half_ulp, info = harness.HALF_ULP[found.dtype], torch.finfo(found.dtype)
    floor = 1000 * eps**2
    if op in ("bifpn_fuse", "dropout_views"):
        floor = info.smallest_normal * info.eps + (largest * tolerance if op == "bifpn_fuse" else 0)
    elif op == "adversarial":
        floor = floor + largest * 2.0**-50
    assert_close(found, exact, np.abs(exact) * (tolerance + half_ulp) + floor, what)


def assert_gradients(
    op: str, found: torch.Tensor, wanted: Wide, exact: Exact, what: str, roundings: int = 0
) -> None:
    """By the tolerance of gradients. A row of probabilities may have nothing but their rounding;
    elsewhere there are a few roundings in double of the terms."""
    eps = harness.epsilon(found.dtype)
    row = np.abs(wanted)
    if op != "adversarial":
        row = row.max(tuple(range(1, wanted.ndim)) or None, keepdims=True)
    info, terms, lost = torch.finfo(found.dtype), np.abs(exact.terms), np.abs(exact.lost)
    stored = np.abs(wanted) * harness.HALF_ULP[found.dtype] + info.smallest_normal * info.eps
    rounding: Any = 2.0**-50
    if op in KL:
        rounding = np.where(row < 1e-15 * terms, 32 * eps, roundings * eps)
    tolerance = 1e-12 if eps < 1e-9 else 1e-5
    error = row * tolerance + stored + rounding * terms + 2.0**-50 * lost
    assert_close(found, wanted, error, what)


def check(
    op: str,
    backend: harness.Backend,
    x: dict[str, Any],
    options: dict[str, Any],
    what: str,
    grad: torch.Tensor | None = None,
) -> None:
    """Result and gradients of a call, for an incoming gradient of each row or of 1."""
    narrow = {"dim": 1} if op == "simreg" else {}
    if op == "adversarial" and "fake" not in x and backend.call is not harness.through_torch:
        x = {**x, "fake": x["real"][:0]}  # as the Python function does
    result, grads = backend.call(op, x, {**options, **narrow}, grad)
    if op in ROW_LOSSES and x[contract(op).first].ndim == 3:
        x, grads = ({key: as_rows(y) for key, y in of.items()} for of in (x, grads))
        result = result[0] if result.ndim else result
    exact = reduced(op, {name: wide(y) for name, y in x.items()}, options)
    rows = [y for key, y in x.items() if y.is_floating_point() and key != "weight"]
    largest = max(np.abs(wide(y)).max() for y in rows if y.numel() > 0)
    assert_result(op, result, exact.result, f"result, {what}", largest)
    for name, found in grads.items():
        if found.numel() == 0:
            continue
        wanted = exact.grads[name]
        each: Any = 1 if grad is None else wide(grad).reshape(-1, *[1] * (wanted.ndim - 1))
        # On a GPU rows at two temperatures are compared in float.
        apart = backend.name in ("simt", "cuda") and "teacher_temperature" in options
        measured = exact._replace(terms=exact.terms * each, lost=exact.lost * each)
        roundings = 8 if apart else 0
        assert_gradients(
            op, found, wanted * each, measured, f"gradient of {name}, {what}", roundings
        )


def as_positions(x: dict[str, Any]) -> dict[str, Any]:
    """Rows as those of an image: classes apart, positions side by side, in whole vectors."""
    four = {
        key: torch.cat([y, *[y.clamp(max=1) if key == "weight" else y] * 3]) for key, y in x.items()
    }
    return {key: y.T[None].contiguous() if y.ndim > 1 else y[None] for key, y in four.items()}


def as_rows(x: torch.Tensor) -> torch.Tensor:
    return x[0].T if x.ndim == 3 else x[0]


# bfloat16 has the range of float32, whose kernels compute the same; elsewhere this costs nothing.
BFLOAT16 = pytest.param("bfloat16", marks=[pytest.mark.full] if harness.SIMT_LIBRARY else [])


@pytest.mark.parametrize("dtype", ["float32", "float16", BFLOAT16, "float64"])
@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("backend", harness.backends(), ids=str)
def test_finite_in_gives_finite(backend: harness.Backend, name: str, dtype: str) -> None:
    harness.prepare(backend)
    op, names, options = CALLS[name]
    for what, x in inputs(op, names, harness.DTYPES[dtype]):
        x = {key: y.to(backend.device) for key, y in x.items()}
        for reduction in harness.reductions(op, harness.ORDINARY):
            check(op, backend, x, {**options, **reduction}, f"{what}, {reduction}")
        if op in ROW_LOSSES:
            check(op, backend, as_positions(x), {**options, **reduction}, f"{what}, positions")
        if op == "attention":
            last = {key: harness.channels_last(y) for key, y in x.items()}
            check(op, backend, last, options, f"{what}, channels_last")


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("name", [name for name, (op, *_) in CALLS.items() if op in ROW_LOSSES])
@pytest.mark.parametrize("backend", harness.backends(), ids=str)
def test_rows_in_several_pieces(backend: harness.Backend, name: str, dtype: str) -> None:
    """More classes than are taken at a time; on a GPU, than a warp takes."""
    harness.prepare(backend)
    op, names, options = CALLS[name]
    of = harness.DTYPES[dtype]
    for m in (1e30, 1e200 if dtype == "float64" else 3e38, 1e-30):
        x = with_magnitude(op, ordinary(op, names, of, 2100), "all", m, of)
        x = {key: y.to(backend.device) for key, y in x.items()}
        check(op, backend, x, {**options, "reduction": "none"}, f"{m:.3g} in all")


@pytest.mark.parametrize("dtype", harness.DTYPES)
@pytest.mark.parametrize("name", [name for name, (op, *_) in CALLS.items() if op in ROW_LOSSES])
@pytest.mark.parametrize("backend", harness.backends(), ids=str)
def test_incoming_gradients(backend: harness.Backend, name: str, dtype: str) -> None:
    """Of each row: a product with one is finite where the exact one is."""
    harness.prepare(backend)
    op, names, options = CALLS[name]
    of = harness.DTYPES[dtype]
    x = harness.cast(ordinary(op, names, of), op, of)
    x = {key: y.to(backend.device) for key, y in x.items()}
    for m in magnitudes(accumulator(of)):
        grad = torch.ones(ROWS, dtype=accumulator(of), device=backend.device)
        grad[1], grad[2] = m, -m
        check(op, backend, x, {**options, "reduction": "none"}, f"{m:.3g} comes in", grad)


@pytest.mark.parametrize("apart", [1.0, 20.0, 40.0, 60.0])
@pytest.mark.parametrize("op", [*KL, "js_divergence"])
@pytest.mark.parametrize("backend", harness.backends(), ids=str)
def test_a_class_that_one_side_excludes(backend: harness.Backend, op: str, apart: float) -> None:
    """However little the other side gives it, its row is infinite."""
    harness.prepare(backend)
    z = torch.tensor([[0, -torch.inf, 1.0]]).repeat(2, 1).to(backend.device)
    t = torch.tensor([[0, -apart, 1.0], [0, -torch.inf, 1.0]]).to(backend.device)
    named: dict[str, Any] = {
        "sd_dropout_kl": {"u": z, "v": t},
        "distill": {"logits": z, "teacher": t, "teacher_temperature": 1.0},
        "js_divergence": {"student": z, "teacher": t, "beta": 0.0},
    }[op]
    rows = harness.public(op, selfkd)(**named, temperature=1.0, reduction="none")
    assert rows.tolist() == [torch.inf, 0]


@pytest.mark.parametrize("backend", harness.backends(), ids=str)
def test_weights_whose_sum_is_no_number(backend: harness.Backend) -> None:
    harness.prepare(backend)
    x = ordinary("bifpn_fuse", ("a", "b", "weight"), torch.float64)
    x["weight"] = torch.tensor([1.0, 0.5], dtype=torch.float64) * torch.finfo(torch.float64).max
    x = {key: y.to(backend.device) for key, y in x.items()}
    options = {"activation": "none", "activate": "inputs"}
    check("bifpn_fuse", backend, x, options, "the largest weights")


@pytest.mark.parametrize("dtype", harness.DTYPES)
@pytest.mark.parametrize("smooth", [0.0, 0.1])
@pytest.mark.parametrize("backend", harness.backends(), ids=str)
def test_rows_of_the_head(backend: harness.Backend, smooth: float, dtype: str) -> None:
    """The rows operator of sd_dropout_head, which writes gradients over its logits."""
    harness.prepare(backend)
    of = harness.DTYPES[dtype]
    for name in (*"zuv", "all"):
        for m in magnitudes(of):
            ones = ordinary("sd_dropout_kl", ("z", "u", "v"), of)
            x = with_magnitude("sd_dropout_kl", ones, name, m, of) | {
                "target": torch.arange(ROWS) % 4
            }
            exact = {key: wide(y) for key, y in x.items()}
            written = {key: y.to(backend.device, copy=True) for key, y in x.items()}
            rows = harness.run_operator(
                backend, "sd_dropout_head_rows", {**written, "label_smoothing": smooth}
            )["rows"]
            found = {key: written[key] for key in "zuv"}
            labelled = {"logits": exact["z"], "target": exact["target"]}
            ce, kl = distill(labelled, label_smoothing=smooth), sd_dropout_kl(exact)
            what = f"{m:.3g} in {name}"
            assert_result("sd_dropout_kl", rows, ce.result + kl.result, f"rows, {what}")
            assert_gradients("distill", found["z"], ce.grads["logits"], ce, f"z, {what}")
            for key in "uv":
                assert_gradients("sd_dropout_kl", found[key], kl.grads[key], kl, f"{key}, {what}")
