"""Every example runs as its users run it."""

from __future__ import annotations

import csv
import os
import subprocess
import sys
from collections.abc import Callable
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
    out: str,
    csv_file: Path,
    least: float,
    *,
    steps: int,
    score: str = "accuracy",
    warm_up: int = 0,
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
    assert len(rows) == steps

    def apart(a: str, b: str, start: int) -> float:
        return max(abs(float(r[a]) / float(r[b]) - 1) for r in rows[start : start + 50])

    assert apart("fused", "reference", 0) < 1e-4
    assert apart("weight 0", "reference", warm_up) > 1e-2
    assert apart("weight 0", "fused", warm_up) > 1e-2
    return accuracies


@pytest.mark.parametrize("steps", [100, pytest.param(400, marks=pytest.mark.full)])
def test_sd_dropout(steps: int, tmp_path: Path) -> None:
    """Fused and reference learn digits along one curve; without the loss the curve is another."""
    script = ROOT / "examples" / "sd_dropout.py"
    out = run(sys.executable, script, "--control", "--steps", steps, cwd=tmp_path)
    file = tmp_path / "runs" / "sd_dropout.csv"
    assert check_curves(out, file, least=95, steps=steps)[2] >= 95


@pytest.mark.parametrize(
    ("name", "steps"), [("aikd", 30), ("simreg", 30), ("frskd", 15), ("frskd_segmentation", 15)]
)
def test_first_steps(name: str, steps: int, example: Callable[..., str], tmp_path: Path) -> None:
    """Fused and reference begin along one curve, the run with weight 0 along another."""
    out = example(name, "--control", "--steps", steps)
    (file,) = (tmp_path / "runs").glob("*.csv")
    score, warm_up = "accuracy", 0
    if name == "frskd_segmentation":
        score, warm_up = "mean IoU", 2 * steps // 3
    check_curves(out, file, 0, steps=steps, score=score, warm_up=warm_up)


@pytest.mark.parametrize("steps", [15, pytest.param(300, marks=pytest.mark.full)])
@pytest.mark.parametrize("divergence", ["full", "topk"])
def test_self_distill_lm(
    divergence: str, steps: int, example: Callable[..., str], tmp_path: Path
) -> None:
    """A language model learns a text from itself, which has read the answer; by trl's lines, too."""
    options = ("--divergence", divergence, "--steps", steps)
    out, file = example("self_distill_lm", "--control", *options), Path("self_distilled_lm.csv")
    taught, *_, before = check_curves(out, tmp_path / "runs" / file, least=0, steps=steps)
    if steps == 300:
        assert taught > before + 3
        return
    example("self_distill_lm", "--impl", "eager", *options, "--out", "eager")
    with (tmp_path / "runs" / file).open() as fused, (tmp_path / "eager" / file).open() as eager:
        rows = list(zip(csv.DictReader(fused), csv.DictReader(eager), strict=True))
    assert all(abs(float(a["fused"]) / float(b["eager"]) - 1) < 1e-4 for a, b in rows[:50])


@pytest.mark.full
def test_simreg(example: Callable[..., str]) -> None:
    """A student without labels learns the features of a teacher."""
    out = example("simreg", "--control", "--steps", 300)
    accuracies = check_curves(out, Path("runs/simreg.csv"), least=97, steps=300)
    assert accuracies[2] < min(accuracies[:2])


@pytest.mark.full
def test_aikd(example: Callable[..., str]) -> None:
    """A student of a pre-trained network, of its previous epoch and of a discriminator."""
    out = example("aikd", "--control", "--steps", 300)
    assert check_curves(out, Path("runs/ai_kd.csv"), least=95, steps=300)[2] >= 95


@pytest.mark.full
@pytest.mark.long(3)
def test_frskd(example: Callable[..., str]) -> None:
    """A classifier and the self-teacher on its stages."""
    out = example("frskd", "--control", "--steps", 300)
    assert check_curves(out, Path("runs/frskd.csv"), least=95, steps=300)[2] >= 90


@pytest.mark.full
@pytest.mark.long(3)
def test_frskd_segmentation(example: Callable[..., str]) -> None:
    """A network and the self-teacher on its pyramid, whose loss counts in the last third."""
    out = example("frskd_segmentation", "--control")
    file = Path("runs/frskd_segmentation.csv")
    check_curves(out, file, least=60, steps=400, score="mean IoU", warm_up=300)


@pytest.mark.parametrize("name", ["aikd", "simreg", "frskd", "frskd_segmentation"])
def test_example_goes_on_from_a_checkpoint(
    name: str, example: Callable[..., str], tmp_path: Path
) -> None:
    """The second run takes the teacher and most steps from the file, and ends as the first."""
    curves = []
    for _ in range(2):
        options = ("--steps", 14, "--every", 10, "--checkpoint", "state.pt")
        example(name, "--impl", "fused", *options)
        (file,) = (tmp_path / "runs").glob("*.csv")
        curves.append(file.read_text())
    assert len(curves[0].splitlines()) == 15
    assert curves[0] == curves[1]


@pytest.mark.parametrize("steps", [24, pytest.param(300, marks=pytest.mark.full)])
def test_ddp(
    steps: int, example: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One process and two, the second with fewer rows of some batches, train along one curve."""
    curves, least = [], 95 if steps == 300 else 0
    alone = {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 1, "MASTER_ADDR": "localhost"}
    for name, value in (alone | {"MASTER_PORT": 0}).items():
        monkeypatch.setenv(name, str(value))
    outputs = [example("ddp", "--steps", steps, "--out", 1)]
    for name in (*alone, "MASTER_PORT"):
        monkeypatch.delenv(name)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", 2]
    command += [ROOT / "examples" / "ddp.py", "--impl", "fused"]
    outputs.append(run(*command, "--steps", steps, "--out", 2, cwd=tmp_path))
    for processes, out in enumerate(outputs, 1):
        row = next(line for line in out.splitlines() if "held-out accuracy" in line)
        assert min(float(word.rstrip("%")) for word in row.split() if word.endswith("%")) >= least
        with (tmp_path / str(processes) / "ddp.csv").open() as file:
            curves.append([float(r["fused"]) for r in csv.DictReader(file)])
    assert len(curves[0]) == len(curves[1]) == steps
    assert max(abs(a / b - 1) for a, b in zip(*curves, strict=True)) < 1e-2
    assert max(abs(a / b - 1) for a, b in list(zip(*curves, strict=True))[:50]) < 1e-5
