"""The CUDA kernels on the CPU: every case of every operator, in the emulator, under AddressSanitizer."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import harness
import pytest
from conftest import ROOT, SEED, build_tests
from selfkd import contract

THIS = Path(__file__)


def sanitizer_environment() -> dict[str, str]:
    """What a process needs to load a library built with AddressSanitizer."""
    names = ("libasan.so", "libubsan.so", "libstdc++.so")
    found = [
        subprocess.run(
            ["gcc", f"-print-file-name={name}"], capture_output=True, text=True, check=True
        )
        for name in names
    ]
    return {
        "LD_PRELOAD": " ".join(done.stdout.strip() for done in found),
        "ASAN_OPTIONS": "detect_leaks=0",
        "UBSAN_OPTIONS": "print_stacktrace=1",
    }


# The operators in two groups, which two processes can share; the tests of all of them go with the second.
OPS = contract.modules()
HALF = len(OPS) // 2 + 1  # the tests of all of them take as long as those of two
GROUPS = [",".join(OPS[:HALF]), ",".join(OPS[HALF:])]


def files() -> list[Path]:
    """The tests that have an emulated back end; others cost an import each."""
    paths = sorted((ROOT / "tests").glob("test_*.py"))
    emulated = r"backends\(|standard_tests\(|mark\.simt"
    return [path for path in paths if re.search(emulated, path.read_text()) and path != THIS]


def selection(group: str, keyword: str) -> list[str]:
    """What the inner run is told: the operators that are named with -k, or the files of the group."""
    named = [op for op in OPS if re.search(rf"\b{op}\b", keyword)]
    own = [f"test_{op}" for op in named or group.split(",")]
    if named or group == GROUPS[-1]:
        own += [x.stem for x in files() if x.stem.removeprefix("test_") not in OPS]
    chosen = sorted((x for x in files() if x.stem in own), key=lambda x: own.index(x.stem))
    return [*(["-k", " or ".join(named)] if named else []), *map(str, chosen)]


def failures(said: str) -> str:
    """What pytest says of failing cases, without what comes before and after."""
    found = re.search(r"(?ms)^=+ (?:FAILURES|ERRORS) =+$(.*?)^=+ short test summary", said)
    return found[1].strip() if found else said


@pytest.mark.long(9)
@pytest.mark.skipif(bool(harness.SIMT_LIBRARY), reason="this is the inner run")
@pytest.mark.parametrize("group", GROUPS)
def test_every_case_in_the_emulator(group: str, request: pytest.FixtureRequest) -> None:
    """With -k NAME those of one operator alone: `python -m pytest tests/test_simt.py -k NAME`."""
    built = build_tests("selfkd_simt")
    simt = {
        "SELFKD_SIMT_LIBRARY": str(built / "tests" / "simt" / "libselfkd_simt.so"),
        "SELFKD_SIMT_SEED": str(SEED),
    }
    inner = [
        sys.executable,
        "-m",
        "pytest",
        "-m",
        "simt",
        "-x",
        "--tb=short",
        "-p",
        "no:cacheprovider",
    ]
    done = subprocess.run(
        [*inner, *selection(group, request.config.option.keyword)],
        capture_output=True,
        text=True,
        timeout=900,
        env=os.environ | sanitizer_environment() | simt,
    )
    if done.returncode == pytest.ExitCode.NO_TESTS_COLLECTED:
        pytest.fail("no test has an emulated back end for it", pytrace=False)
    if done.returncode or " passed" not in done.stdout:
        pytest.fail(f"{failures(done.stdout)}\n{done.stderr}", pytrace=False)
    print(done.stdout.splitlines()[-1])
