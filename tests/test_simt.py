"""The CUDA kernels on the CPU: every case of every operator, in the emulator, under AddressSanitizer."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import harness
import pytest
from conftest import ROOT, SEED


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


def files() -> list[str]:
    """The tests that have an emulated back end; others cost an import each."""
    named = os.environ.get("SELFKD_SIMT_TESTS")
    paths = sorted((ROOT / "tests").glob("test_*.py"))
    return (
        named.split()
        if named
        else [str(path) for path in paths if re.search(r"backends\(|mark\.simt", path.read_text())]
    )


@pytest.mark.long(9)
@pytest.mark.skipif(bool(harness.SIMT_LIBRARY), reason="this is the inner run")
def test_every_case_in_the_emulator(built: Path) -> None:
    simt = {
        "SELFKD_SIMT_LIBRARY": str(built / "tests" / "simt" / "libselfkd_simt.so"),
        "SELFKD_SIMT_SEED": str(SEED),
    }
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-m",
        "simt",
        "-x",
        "-p",
        "no:cacheprovider",
        *files(),
    ]
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        timeout=900,
        env=os.environ | sanitizer_environment() | simt,
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    assert " passed" in done.stdout
    print(done.stdout.splitlines()[-1])
