"""What goes wrong outside: descriptors that describe nothing, and memory that is not there."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

from conftest import ROOT


def test_the_corpus_of_the_fuzzer(built: Path) -> None:
    """Exactly the bytes that a descriptor spans are there; AddressSanitizer sees all others."""
    corpus = ROOT / "tests" / "fuzz" / "corpus.txt"
    done = subprocess.run(
        [built / "tests" / "fuzz" / "replay", corpus, built / "tests" / "fuzz" / "last.txt"],
        capture_output=True,
        text=True,
        timeout=300,
        env=os.environ | {"ASAN_OPTIONS": "detect_leaks=1"},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    calls, reached = map(int, re.findall(r"corpus: (\d+) calls, (\d+) reached", done.stdout)[0])
    assert calls > 1000
    assert reached >= 0.2 * calls
    never = re.findall(r"^ +0 (\w+)$", done.stdout, re.MULTILINE)
    assert not never, f"no input of the corpus runs {never}: make fuzz"


ALLOCATION = """
import ctypes, gc, sys
import torch, selfkd
from selfkd.contract import contract, operators

torch.set_num_threads(1)
lib = ctypes.CDLL(sys.argv[1])
sizes = dict.fromkeys("HWIJKL", 2) | {"N": 50, "M": 50, "C": 4, "D": 4, "#": 3}
dtypes = {"F64": torch.float64, "INDEX": torch.int64, "SEED": torch.int64}


def arguments(of):
    for item in of.items:
        if item.is_number:
            yield item.default
        elif item.is_input:
            shape = [int(sizes.get(letter, letter)) for letter in item.shape.removesuffix("*")]
            yield torch.zeros(shape, dtype=dtypes.get(item.rule, torch.float32))
            if item.kind == "OPT":
                yield True


@torch.no_grad()
def results(call, values):
    found = call(*values)
    return [x.nan_to_num(7) for x in (found if isinstance(found, tuple) else (found,))]


for op in operators():
    of, call = contract(op), getattr(torch.ops.selfkd, op)
    values, names = list(arguments(of)), [item.name for item in of.outputs]
    expected = results(call, values)
    for n, name in enumerate(names, 1):
        lib.fail_allocation(n)
        try:
            results(call, values)
        except RuntimeError as error:
            assert f"{op}: no memory for {name}" in str(error), error
        else:
            raise AssertionError(f"{op}: {name} was not refused")
        gc.collect()
        assert lib.asked_blocks() == n, (op, name)
        assert lib.live_blocks() == 0, f"{op}: {lib.live_blocks()} outputs leak where {name} is refused"
    lib.fail_allocation(0)
    assert all(torch.equal(x, y) for x, y in zip(results(call, values), expected)), op
    print(op, names)
"""


def test_outputs_that_cannot_be_allocated(built: Path) -> None:
    """Each output of each operator refused in turn: a sentence with its name, and nothing leaks."""
    library = built / "tests" / "libfail_allocation.so"
    done = subprocess.run(
        [sys.executable, "-c", ALLOCATION, library],
        capture_output=True,
        text=True,
        timeout=300,
        env=os.environ | {"LD_PRELOAD": str(library), "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]


def test_calls_without_memory_or_threads(built: Path) -> None:
    """The library asks for no memory on the CPU; without threads it gives the same bits."""
    done = subprocess.run(
        [built / "tests" / "test_allocation"], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stdout + done.stderr
