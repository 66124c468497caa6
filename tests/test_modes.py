"""Denormals are flushed or kept as the caller's thread has it, in every thread, and no thread is left
otherwise: `torch.set_flush_denormal` is of one thread, and PyTorch's pool has others."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import harness
import pytest
import selfkd
import torch
from selfkd import library
from selfkd.contract import contract, modules

OPERATORS = [op for op in modules() if op != "sd_dropout_head"]  # on PyTorch's matrix product
TINY = 1e-40  # a denormal float

pytestmark = pytest.mark.skipif(
    bool(harness.SIMT_LIBRARY), reason="of the CPU back end: the emulator has threads of its own"
)


@pytest.fixture(autouse=True)
def modes() -> Iterator[None]:
    threads = torch.get_num_threads()
    if not torch.set_flush_denormal(False):
        pytest.skip("this CPU keeps denormals: run on x86-64 or aarch64")
    yield
    torch.set_flush_denormal(False)
    torch.set_num_threads(threads)


def inputs(op: str) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Enough rows for two threads, half of them so small that they are denormals, or a gradient is."""
    g = torch.Generator().manual_seed(1)
    shapes = {"adversarial": (200_000,), "bifpn_fuse": (4, 8, 64, 64), "attention": (8, 8, 32, 32)}
    found: dict[str, torch.Tensor] = {}
    for item in contract(op).items:
        if item.kind == "IN" and item.rule in ("FLOATING", "SAME", "CONSTANT"):
            usual = (2000, 20 if item.shape == "NK*" else 200)
            x = torch.randn(shapes.get(op, usual), generator=g)
            x[: len(x) // 2] *= TINY
            found[item.name] = x
        if item.rule == "CLASSES":
            found[item.name] = harness.listed_classes((2000, 200), 20, g)
    if op == "distill":
        found["target"] = torch.arange(2000) % 200
    if op == "bifpn_fuse":
        found["weight"] = torch.tensor([1.0, 2.0])
    if op == "dropout_views":
        found["seed"] = torch.tensor(3)
    return found, {"dim": 1} if op == "simreg" else {}


def run(op: str, threads: int, flush: bool, scale: float) -> list[torch.Tensor]:
    """Result and gradients, for an incoming gradient of `scale`."""
    tensors, options = inputs(op)
    grad = torch.full_like(harness.public(op, selfkd)(**tensors, **options), scale)
    torch.set_num_threads(threads)
    torch.set_flush_denormal(flush)
    try:
        result, grads = harness.through_torch(op, tensors, options, grad)
    finally:
        torch.set_flush_denormal(False)
    return [result, *grads.values()]


@pytest.mark.parametrize("op", OPERATORS)
def test_threads_have_the_mode_of_the_caller(op: str) -> None:
    _, *ordinary = run(op, 1, False, 1.0)
    to_denormals = TINY / min(x.abs().max().item() for x in ordinary)
    for scale in (1.0, to_denormals):
        found = {
            (threads, flush): run(op, threads, flush, scale)
            for threads in (1, 2)
            for flush in (False, True)
        }
        for flush in (False, True):
            for one, two in zip(found[1, flush], found[2, flush], strict=True):
                same = torch.equal(one.view(torch.int32), two.view(torch.int32))
                assert same, f"{op}: other bits in two threads, flush {flush}"
    pairs = zip(found[2, False], found[2, True], strict=True)
    assert any(not torch.equal(kept, flushed) for kept, flushed in pairs)


def test_threads_keep_their_own_mode() -> None:
    torch.set_num_threads(2)
    x = torch.full((1 << 20,), TINY)
    assert (x * 0.5 != 0).all()
    for flush in (True, False):
        torch.set_flush_denormal(flush)
        before = (torch.tensor(TINY) * 0.5 == 0).item()
        u = torch.randn(2000, 200)
        selfkd.sd_dropout_kl(u, 2 * u)
        assert (torch.tensor(TINY) * 0.5 == 0).item() == before == flush
    assert (x * 0.5 != 0).all()


def test_the_pool_is_pytorchs() -> None:
    assert "PyTorch's" in library.text("selfkd_torch")
