"""What goes wrong outside: descriptors that describe nothing, and memory that is not there."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import harness
import pytest
import torch
from conftest import ROOT
from selfkd import c, library
from selfkd.contract import contract, operators


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


def test_a_contract_that_is_accepted_can_be_called(built: Path) -> None:
    """Random contracts, and every single fault in those that there are (tests/fuzz/contracts.c)."""
    fuzz = built / "tests" / "fuzz"
    done = subprocess.run(
        [fuzz / "contracts", "500000", fuzz / "contract.txt"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr + (fuzz / "contract.txt").read_text()
    accepted, ran = map(int, re.findall(r"(\d+) accepted, (\d+) calls ran", done.stdout)[0])
    assert accepted > 10_000
    assert ran > 50_000
    assert int(re.findall(r"faults: (\d+) tried", done.stdout)[0]) > 1000


WRONG_ROWS = {
    "X(LIKE, grad_v, w)": "sd_dropout_kl_backward: the contract of grad_v is wrong: .* not w",
    'X(IN, v, "nC*", SAME)': "sd_dropout_kl: the contract of v is wrong: expected a shape",
    'X(OUT, saved, "4N*", F46)': "the contract of saved is wrong: .* a dtype .* not .*F46",
    "X(REAL, temperature, ANNY, 1)": "the contract of temperature is wrong: expected a range",
    "X(REAL, temprature)": r"sd_dropout_kl: a row of the contract is not X\(KIND, name",
    "X(FLOAT, detach_target, ANY, 0)": "the contract of detach_target is wrong: expected a kind",
    'X(OUT, loss, "N*", ACC)': "sd_dropout_kl: the contract has loss twice",
}


@pytest.mark.parametrize(("row", "sentence"), WRONG_ROWS.items(), ids=WRONG_ROWS)
def test_cmake_refuses_a_contract(row: str, sentence: str, tmp_path: Path) -> None:
    """What C could not read, or would read wrongly, is found before it is compiled."""
    kind, name = re.findall(r"\w+", row)[1:3]
    text = (ROOT / "ops" / "sd_dropout_kl.h").read_text()
    old = {"loss": "rows", "temprature": "temperature"}.get(name, name)
    of = {"FLOAT": "BOOL"}.get(kind, kind)
    wrong, count = re.subn(rf"X\({of}, +{old},.*\)", lambda _: row, text, count=1)
    assert count == 1
    header = tmp_path / "wrong.h"
    header.write_text(wrong)
    command = ["cmake", f"-DHEADER={header}", "-P", ROOT / "cmake" / "contracts.cmake"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode != 0
    assert re.search(sentence, " ".join(done.stderr.split())), done.stderr


ALLOCATION = """
import ctypes, gc, sys
import torch, harness
from selfkd.contract import contract, operators

torch.set_num_threads(1)
lib = ctypes.CDLL(sys.argv[1])


@torch.no_grad()
def results(call, values):
    found = call(*values)
    return [x.nan_to_num(7) for x in (found if isinstance(found, tuple) else (found,))]


for op in operators():
    of, call = contract(op), getattr(torch.ops.selfkd, op)
    values, names = harness.schema_values(op, harness.zeros(op)), [item.name for item in of.outputs]
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
        cwd=ROOT / "tests",
        env=os.environ | {"LD_PRELOAD": str(library), "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]


def test_calls_without_memory_or_threads(built: Path) -> None:
    """The library asks for no memory on the CPU; without threads it gives the same bits."""
    done = subprocess.run(
        [built / "tests" / "test_allocation"], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stdout + done.stderr


# Requests of the library to CUDA, in the order of `simt_request` in simt/cuda_runtime.h; the status
# of ops/selfkd.h and the error that a refused one ends in.
REFUSALS = {
    "allocation": (3, "cudaErrorMemoryAllocation"),
    "memset": (4, "cudaErrorInvalidValue"),
    "launch": (4, "cudaErrorLaunchOutOfResources"),
}


@pytest.mark.simt
@pytest.mark.skipif(not harness.SIMT_LIBRARY, reason="test_simt.py runs it in the emulator")
@pytest.mark.parametrize("kind", REFUSALS)
def test_requests_that_cuda_refuses(kind: str) -> None:
    """Each in turn, of each operator: a sentence, nothing leaks, and the next call works."""
    lib = library.open_library(harness.SIMT_LIBRARY)
    number, (refused, error) = list(REFUSALS).index(kind), REFUSALS[kind]

    def call(op: str) -> tuple[int, list[torch.Tensor]]:
        given: dict[str, Any] = harness.zeros(op)
        outputs = harness.poisoned_outputs(op, given)
        status = c.run(lib, op, given | outputs, device=2)
        assert lib.simt_live_blocks() == 0, f"{op} leaks"
        return status, [x.nan_to_num(7) for x in (given | outputs).values() if hasattr(x, "numel")]

    for op in operators():
        lib.simt_refuse(number, 0)
        status, expected = call(op)
        assert status == 0, lib.selfkd_message()
        count = lib.simt_asked(number)
        scratch = sum(item.kind == "SCRATCH" for item in contract(op).items)
        assert count >= (1 if kind == "launch" else scratch), op
        for n in range(1, count + 1):
            lib.simt_refuse(number, n)
            assert call(op)[0] == refused, f"{op}: {kind} {n} was not refused"
            assert lib.selfkd_message().decode() == f"{op}: CUDA reports {error} ({error})"
            status, found = call(op)
            assert status == 0, lib.selfkd_message()
            assert all(map(torch.equal, found, expected)), op
