"""Every example runs as its users run it."""

from __future__ import annotations

import csv
import os
import subprocess
import sys
from pathlib import Path

import selfkd
from conftest import ROOT


def run(*command: object, cwd: Path | None = None) -> str:
    done = subprocess.run(
        [str(word) for word in command],
        capture_output=True,
        text=True,
        timeout=500,
        cwd=cwd,
        env=os.environ | {"COLUMNS": "120"},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_c_program(built: Path) -> None:
    assert "loss" in run(built / "tests" / "c_program")


def test_numpy_without_the_package() -> None:
    assert "loss" in run(
        sys.executable, ROOT / "examples" / "numpy_ctypes.py", selfkd.library_path()
    )


def test_load_library() -> None:
    out = run(sys.executable, ROOT / "examples" / "load_library.py", selfkd.library_path())
    assert "loss" in out


def test_training(tmp_path: Path) -> None:
    """Fused and reference learn digits along one curve; without the loss the curve is another."""
    out = run(sys.executable, ROOT / "examples" / "sd_dropout.py", "--control", cwd=tmp_path)
    row = next(line for line in out.splitlines() if "held-out accuracy" in line)
    accuracies = [float(word.rstrip("%")) for word in row.split() if word.endswith("%")]
    assert len(accuracies) == 3
    assert min(accuracies) >= 95
    assert (tmp_path / "runs" / "sd_dropout.png").stat().st_size > 10_000
    with (tmp_path / "runs" / "sd_dropout.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) >= 300

    def apart(a: str, b: str) -> float:
        return max(abs(float(r[a]) / float(r[b]) - 1) for r in rows[:50])

    assert apart("fused", "reference") < 1e-4
    assert apart("weight 0", "reference") > 1e-2
    assert apart("weight 0", "fused") > 1e-2
