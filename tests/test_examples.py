"""Every example runs as its users run it."""

from __future__ import annotations

import csv
import os
import subprocess
import sys
from pathlib import Path

import pytest
import selfkd
from conftest import ROOT


def run(*command: object, cwd: Path | None = None) -> str:
    done = subprocess.run(
        [str(word) for word in command],
        capture_output=True,
        text=True,
        timeout=1500,  # under AddressSanitizer the longest takes ten minutes
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


def check_curves(
    out: str, csv_file: Path, least: float, *, score: str = "accuracy", warm_up: int = 0
) -> list[float]:
    """Fused and reference run along one curve, the run with weight 0 elsewhere; returns the scores.

    The weight counts after `warm_up` steps.
    """
    row = next(line for line in out.splitlines() if f"held-out {score}" in line and "│" in line)
    accuracies = [float(word.rstrip("%")) for word in row.split() if word.endswith("%")]
    assert len(accuracies) == 3
    assert min(accuracies[:2]) >= least
    assert csv_file.with_suffix(".png").stat().st_size > 10_000
    with csv_file.open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) >= 300

    def apart(a: str, b: str, start: int) -> float:
        return max(abs(float(r[a]) / float(r[b]) - 1) for r in rows[start : start + 50])

    assert apart("fused", "reference", 0) < 1e-4
    assert apart("weight 0", "reference", warm_up) > 1e-2
    assert apart("weight 0", "fused", warm_up) > 1e-2
    return accuracies


def test_sd_dropout(tmp_path: Path) -> None:
    """Fused and reference learn digits along one curve; without the loss the curve is another."""
    out = run(sys.executable, ROOT / "examples" / "sd_dropout.py", "--control", cwd=tmp_path)
    accuracies = check_curves(out, tmp_path / "runs" / "sd_dropout.csv", least=95)
    assert accuracies[2] >= 95


def test_simreg(tmp_path: Path) -> None:
    """A student without labels learns the features of a teacher."""
    script = ROOT / "examples" / "simreg.py"
    out = run(sys.executable, script, "--control", "--steps", 300, cwd=tmp_path)
    accuracies = check_curves(out, tmp_path / "runs" / "simreg.csv", least=97)
    assert accuracies[2] < min(accuracies[:2])


def test_aikd(tmp_path: Path) -> None:
    """A student of a pre-trained network, of its previous epoch and of a discriminator."""
    script = ROOT / "examples" / "aikd.py"
    out = run(sys.executable, script, "--control", "--steps", 300, cwd=tmp_path)
    assert check_curves(out, tmp_path / "runs" / "ai_kd.csv", least=95)[2] >= 95


def test_frskd(tmp_path: Path) -> None:
    """A classifier and the self-teacher on its stages."""
    script = ROOT / "examples" / "frskd.py"
    out = run(sys.executable, script, "--control", "--steps", 300, cwd=tmp_path)
    assert check_curves(out, tmp_path / "runs" / "frskd.csv", least=95)[2] >= 90


def test_frskd_segmentation(tmp_path: Path) -> None:
    """A network and the self-teacher on its pyramid, whose loss counts in the last third."""
    script = ROOT / "examples" / "frskd_segmentation.py"
    out = run(sys.executable, script, "--control", cwd=tmp_path)
    file = tmp_path / "runs" / "frskd_segmentation.csv"
    check_curves(out, file, least=60, score="mean IoU", warm_up=300)


@pytest.mark.parametrize("example", ["aikd", "simreg", "frskd", "frskd_segmentation"])
def test_example_goes_on_from_a_checkpoint(example: str, tmp_path: Path) -> None:
    """The second run takes the teacher and most steps from the file, and ends as the first."""
    command = [sys.executable, ROOT / "examples" / f"{example}.py", "--impl", "fused"]
    curves = []
    for _ in range(2):
        run(*command, "--steps", 120, "--checkpoint", "state.pt", cwd=tmp_path)
        (file,) = (tmp_path / "runs").glob("*.csv")
        curves.append(file.read_text())
    assert len(curves[0].splitlines()) == 121
    assert curves[0] == curves[1]


def test_ddp(tmp_path: Path) -> None:
    """One process and two, the second with fewer rows of some batches, train along one curve."""
    curves = []
    for processes, impl in ((1, "both"), (2, "fused")):
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        command += ["--nproc-per-node", str(processes), str(ROOT / "examples" / "ddp.py")]
        out = run(*command, "--steps", 300, "--impl", impl, "--out", str(processes), cwd=tmp_path)
        row = next(line for line in out.splitlines() if "held-out accuracy" in line)
        assert min(float(word.rstrip("%")) for word in row.split() if word.endswith("%")) >= 95
        with (tmp_path / str(processes) / "ddp.csv").open() as file:
            curves.append([float(r["fused"]) for r in csv.DictReader(file)])
    assert len(curves[0]) == len(curves[1]) == 300
    assert max(abs(a / b - 1) for a, b in zip(*curves, strict=True)) < 1e-2
    assert max(abs(a / b - 1) for a, b in list(zip(*curves, strict=True))[:50]) < 1e-5
