"""selfkd.c on whatever NumPy and DLPack hand over: right, or one sentence; never another sign or order."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import harness
import numpy as np
import pytest
import selfkd
import torch
from selfkd import c
from selfkd.check_torch import draw, stored
from selfkd.contract import contract, operators

pytestmark = pytest.mark.skipif(
    bool(harness.SIMT_LIBRARY), reason="of the library on the CPU: run without SELFKD_SIMT_LIBRARY"
)
OPS = [op for op in operators() if not op.endswith(("_backward", "_rows"))]
each_operator = pytest.mark.parametrize("op", OPS)
Array = np.ndarray[Any, Any]


def inputs(op: str, dtype: torch.dtype = torch.float32) -> dict[str, Array]:
    of = contract(op)
    return {name: x.numpy() for name, x in stored(of, draw(op, of), dtype).items()}


def floating(given: dict[str, Array]) -> list[str]:
    return [name for name, x in given.items() if x.dtype.kind == "f"]


def same(found: Any, expected: Any) -> None:
    """Equal, but for the order of sums, which may depend on the layout."""
    for x, y in zip(found, expected, strict=True):
        assert x.dtype == y.dtype
        np.testing.assert_allclose(x, y, rtol=8 * np.finfo(x.dtype).eps)


# ---- memory of other kinds ----


def read_only(x: Array) -> Array:
    x = x.copy()
    x.flags.writeable = False
    return x


def reversed_twice(x: Array) -> Array:
    """The same numbers, in memory from the last to the first."""
    flip = tuple(slice(None, None, -1) for _ in x.shape)
    return np.ascontiguousarray(x[flip])[flip]


def unaligned(x: Array) -> Array:
    data = np.frombuffer(b"?" + x.tobytes(), dtype=x.dtype, count=x.size, offset=1)
    return data.reshape(x.shape)


def of_a_structure(x: Array) -> Array:
    """A field of records whose size is no multiple of its own."""
    records = np.zeros(x.shape, dtype=[("flag", "i1"), ("value", x.dtype)])
    records["value"] = x
    return records["value"]


WAYS: dict[str, Callable[[Array], Array]] = {
    "read-only": read_only,
    "reversed": reversed_twice,
    "Fortran": np.asfortranarray,
    "strided": lambda x: np.repeat(x[..., None], 3, -1)[..., 1],
    "unaligned": unaligned,
    "field": of_a_structure,
    "list": lambda x: x if x.dtype != np.float64 else x.tolist(),
}


@pytest.mark.parametrize("way", WAYS)
@each_operator
def test_memory_of_any_kind(op: str, way: str) -> None:
    """One input at a time and all at once; float64, so that lists are what they were."""
    given = inputs(op, torch.float64)
    expected = getattr(c, op)(**given)
    changed = {name: WAYS[way](x) if x.ndim else x for name, x in given.items()}
    for name in given:
        same(getattr(c, op)(**{**given, name: changed[name]}), expected)
    same(getattr(c, op)(**changed), expected)


@each_operator
def test_broadcast_and_memory_maps(op: str, tmp_path: Path) -> None:
    given = inputs(op)
    for name in floating(given):
        x = given[name]
        if x.ndim:
            repeated = np.broadcast_to(x[:1], x.shape)
            expected = getattr(c, op)(**{**given, name: repeated.copy()})
            same(getattr(c, op)(**{**given, name: repeated}), expected)
        file = tmp_path / f"{name}.npy"
        np.save(file, x)
        mapped = np.load(file, mmap_mode="r")
        same(getattr(c, op)(**{**given, name: mapped}), getattr(c, op)(**given))


@each_operator
def test_halves(op: str) -> None:
    """float16 of NumPy is that of PyTorch."""
    given = inputs(op, torch.float16)
    tensors = {name: torch.from_numpy(x) for name, x in given.items()}
    same(getattr(c, op)(**given), getattr(c, op)(**tensors))
    first = given[contract(op).first]
    assert first.dtype == np.float16


# ---- tensors whose numbers are not those in memory ----


def negative(x: torch.Tensor) -> torch.Tensor:
    """x, with the other sign in memory: the imaginary part of a conjugate."""
    found = torch.complex(torch.zeros_like(x), -x).conj().imag
    assert found.is_neg()
    assert torch.equal(found, x)
    return found


@each_operator
def test_the_negative_bit(op: str) -> None:
    """In selfkd.c and in the operator, forward and backward."""
    of = contract(op)
    tensors = stored(of, draw(op, of), torch.float32)
    expected = getattr(c, op)(**tensors)
    changed = {name: negative(x) if x.is_floating_point() else x for name, x in tensors.items()}
    same(getattr(c, op)(**changed), expected)
    results = []
    for given in (tensors, changed):
        live = {name: x.detach().requires_grad_(name == of.first) for name, x in given.items()}
        values = harness.schema_values(op, live)
        found = getattr(torch.ops.selfkd, op)(*values)
        loss = found[0] if isinstance(found, tuple) else found
        results.append([loss.detach(), *torch.autograd.grad(loss.sum(), live[of.first])])
    for x, y in zip(*results, strict=True):
        assert torch.equal(x, y)


def test_gradients_and_inference_tensors_are_only_read() -> None:
    u, v = torch.randn(4, 5), torch.randn(4, 5)
    expected = c.sd_dropout_kl(u, v)
    same(c.sd_dropout_kl(u.requires_grad_(), v), expected)
    with torch.inference_mode():
        same(c.sd_dropout_kl(v.clone(), v), c.sd_dropout_kl(v, v))


# ---- wrong things ----

ONES = np.ones((4, 5), np.float32)
WRONG: dict[str, tuple[Any, str]] = {
    "big-endian": (ONES.astype(">f4"), r"dtype >f4 \(big-endian\)"),
    "structured": (np.zeros((4, 5), [("a", "f4")]), r"dtype \[\('a', '<f4'\)\]"),
    "object": (ONES.astype(object), "dtype object"),
    "strings": (np.array([["a"] * 5] * 4), "dtype <U1"),
    "complex": (ONES.astype(np.complex64), "dtype complex64"),
    "long double": (ONES.astype(np.longdouble), "dtype float128|dtype longdouble"),
    "dates": (ONES.astype("M8[s]"), "dtype datetime64"),
    "unsigned": (ONES.astype(np.uint32), "dtype uint32"),
    "string": ("x", "dtype <U1"),
    "dict": ({}, "dtype object"),
    "ragged": ([[1.0], [1.0, 2.0]], "is a list"),
    "sparse": (torch.eye(4, 5).to_sparse(), "is a tensor of shape .* does not hand over"),
    "meta": (torch.ones(4, 5, device="meta"), "meta"),
    "None": (None, "is missing"),
    "rank": (np.ones([1] * 9, np.float32), "9 dimensions|dtype"),
}


@pytest.mark.parametrize("what", WRONG)
@each_operator
def test_a_sentence_for_every_input(op: str, what: str) -> None:
    given = inputs(op)
    for item in contract(op).items:
        if item.kind != "IN":
            continue
        wrong, words = WRONG[what]
        with pytest.raises((TypeError, ValueError)) as raised:
            getattr(c, op)(**{**given, item.name: wrong})
        sentence = str(raised.value)
        assert re.match(rf"{op}: ", sentence), sentence
        if item.name == contract(op).first:  # or its shape, with which the others are compared
            assert re.search(f"{words}|dimensions, expected", sentence), sentence


@pytest.mark.parametrize("wrong", [True, np.True_, "x", None, [1.0], {}, ONES, 1j], ids=repr)
@each_operator
def test_a_sentence_for_every_number(op: str, wrong: Any) -> None:
    given = inputs(op)
    for item in contract(op).items:
        if not item.is_number or (item.kind == "BOOL" and isinstance(wrong, (bool, np.bool_))):
            continue
        with pytest.raises(
            (TypeError, ValueError), match=rf"^{op}: {item.name} (is|has) .*expected"
        ):
            getattr(c, op)(**given, **{item.name: wrong})


def test_numbers_of_numpy() -> None:
    given = inputs("sd_dropout_kl")
    expected = c.sd_dropout_kl(**given, temperature=2.0, detach_target=True, reduction="sum")
    found = c.sd_dropout_kl(
        **given, temperature=np.float32(2), detach_target=np.True_, reduction=np.int64(2)
    )
    same(found, expected)


def test_bfloat16_has_no_array_of_numpy() -> None:
    x = torch.randn(2, 3, 4, 4).bfloat16()
    with pytest.raises(
        TypeError, match="bifpn_fuse: fused has dtype bfloat16, which NumPy does not"
    ):
        c.bifpn_fuse(x, x)
    into = torch.empty_like(x)
    c.bifpn_fuse(x, x, out={"fused": into})
    torch.testing.assert_close(into, x.relu() + x.relu())


def test_results_that_cannot_be_written() -> None:
    u, v = inputs("sd_dropout_kl")["u"], inputs("sd_dropout_kl")["v"]
    rows = c.sd_dropout_kl(u, v).rows
    for into, sentence in (
        (read_only(rows), "rows is read-only, expected an array that can be written"),
        (np.broadcast_to(rows[:1], rows.shape), "rows is read-only"),
        (unaligned(rows.copy()), "rows is read-only|rows has elements that do not lie"),
        (of_a_structure(rows), "rows has elements that do not lie on multiples of their size"),
        (rows[::-1], r"rows has stride -\d+ in dimension"),
        (np.zeros(3, np.float32), "rows has "),
        (rows.astype(np.float64), "rows has dtype float64"),
        (rows.astype(">f4"), "rows has dtype|rows is a"),
    ):
        with pytest.raises((TypeError, ValueError), match=f"^sd_dropout_kl: ({sentence})"):
            c.sd_dropout_kl(u, v, out={"rows": into})
    with pytest.raises(TypeError, match="sd_dropout_kl: rowz is no result, expected loss, rows"):
        c.sd_dropout_kl(u, v, out={"rowz": rows})
    with pytest.raises(TypeError, match="sd_dropout_kl: v is given twice"):
        c.sd_dropout_kl(u, v, v=v)
    with pytest.raises(TypeError, match="sd_dropout_kl: 20 arguments are given, expected at most"):
        c.sd_dropout_kl(*[u] * 20)
    into = np.zeros(rows.shape, np.float32)
    assert selfkd.c.sd_dropout_kl(u, v, out={"rows": into}).rows is into
    assert np.array_equal(into, rows)
