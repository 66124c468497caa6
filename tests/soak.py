"""Mixed calls from 8 threads for a while: every result is right, and memory stays flat.

``make soak MINUTES=60``. The calls are the cases of the test modules, through PyTorch and through C.
"""

from __future__ import annotations

import gc
import importlib
import os
import random
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import harness
import pytest
import selfkd
import torch
from selfkd import library
from selfkd.contract import contract

THREADS = 8
LARGEST = 1 << 18  # elements of a case, so that many calls are made
SIDES = ("discriminator", "generator")
FLAT = 16  # MB that the process may grow by, once every thread has run every case
Job = Callable[[], list[torch.Tensor]]


def job(op: str, tensors: dict[str, torch.Tensor], options: dict[str, Any], call: Any) -> Job:
    """A call that repeats, and all it gives."""
    inputs = {name: x for name, x in tensors.items() if name != "grad"}

    def run() -> list[torch.Tensor]:
        result, grads = call(op, inputs, options, tensors.get("grad"))
        return [result, *grads.values()]

    return run


def failing() -> list[torch.Tensor]:
    """A call that is refused; its sentence is this thread's own."""
    size = threading.get_ident() % 7 + 1
    with pytest.raises(ValueError, match=f"expected {8 + size}"):
        selfkd.simreg(torch.ones(2, 8 + size), torch.ones(2, 8))
    return []


def head(rows: int, dtype: torch.dtype) -> Job:
    """The head, which is made of matrix products and a private operator."""
    g = torch.Generator().manual_seed(rows)
    x, w = (torch.randn(n, 64, generator=g).to(dtype) for n in (rows, 50))
    target = torch.randint(50, (rows,), generator=g)

    def run() -> list[torch.Tensor]:
        live = [x.detach().requires_grad_(), w.detach().requires_grad_()]
        draw = torch.Generator().manual_seed(1)
        loss = selfkd.sd_dropout_head(*live, None, target, generator=draw, chunk_bytes=1 << 14)
        return [loss.detach(), *torch.autograd.grad(loss, live)]

    return run


def scores(mode: str, side: str, size: int) -> Job:
    """The adversarial loss of one side."""
    g = torch.Generator().manual_seed(size)
    tensors = {name: torch.randn(size, generator=g) for name in ("real", "fake")}
    options = {"mode": mode, "side": side, "reduction": "sum"}
    if side == "generator":
        tensors["fake"] = tensors["fake"][:0]
    return job("adversarial", tensors, options, harness.through_c(library.library(), None))


def jobs() -> list[Job]:
    """The cases of all operators, in two dtypes each."""
    found: list[Job] = [failing]
    found += [head(rows, dtype) for rows in (1, 7, 40) for dtype in harness.DTYPES.values()]
    modes = contract("adversarial")["mode"].choices
    found += [scores(mode, side, 1 << k) for mode in modes for side in SIDES for k in range(12)]
    for op in selfkd.contract.operators():
        path = Path(__file__).parent / f"test_{op}.py"
        cases = getattr(importlib.import_module(path.stem), "CASES", []) if path.exists() else []
        for number, case in enumerate(cases):
            made = case.make(torch.Generator().manual_seed(number))
            if case.big or sum(x.numel() for x in made.values()) > LARGEST:
                continue
            options = dict(case.options)
            if number % 2 and any(item.name == "reduction" for item in contract(op).items):
                options["reduction"] = "none"
                made.pop("divisor", None)
            for dtype in random.sample(list(harness.DTYPES.values()), 2):
                tensors = harness.cast(made, op, dtype)
                found.append(job(op, tensors, options, harness.through_torch))
    return found


def resident() -> float:
    """MB of this process."""
    gc.collect()
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def soak(minutes: float) -> int:
    """Run all jobs in all threads; returns the number of calls."""
    random.seed(1)
    torch.set_num_threads(1)
    todo = jobs()
    expected = [run() for run in todo]
    stop, errors, counts, rounds = threading.Event(), [], [0] * THREADS, [0] * THREADS

    def work(me: int) -> None:
        order = random.Random(me)
        try:
            while not stop.is_set():
                for k in order.sample(range(len(todo)), len(todo)):
                    if stop.is_set():
                        return
                    for found, wanted in zip(todo[k](), expected[k], strict=True):
                        same = torch.equal(found.nan_to_num(7.0), wanted.nan_to_num(7.0))
                        assert same, f"thread {me}, job {k}: another result"
                    counts[me] += 1
                rounds[me] += 1
        except BaseException as error:
            errors.append(error)
            stop.set()
            raise

    threads = [threading.Thread(target=work, args=(me,)) for me in range(THREADS)]
    for thread in threads:
        thread.start()
    begin, first = time.monotonic(), 0.0
    try:
        while time.monotonic() - begin < 60 * minutes and not stop.wait(min(60, 6 * minutes)):
            now = resident()
            first = first or (now if min(rounds) > 0 else 0.0)
            passed = (time.monotonic() - begin) / 60
            print(f"{passed:6.1f} min  {sum(counts):9d} calls  {now:8.1f} MB", flush=True)
            assert not first or now <= first + FLAT, f"grew from {first:.1f} to {now:.1f} MB"
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    assert not errors, errors
    assert first, "too short: some thread has not run every case once"
    return sum(counts)


if __name__ == "__main__":
    total = soak(float(sys.argv[1]) if len(sys.argv) > 1 else 60)
    print(f"{total} calls from {THREADS} threads, no error, memory flat")
