"""The emulator must pass a correct kernel and stop each of the wrong ones (mutants.cu)."""

import os
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SANITIZE = ["-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"]
INCLUDE = ["-Itests/simt", "-Iops", "-Icuda", "-I."]

MUTANTS = {
    "missing_barrier": "wrong result",
    "past_shared": "heap-buffer-overflow",
    "past_dynamic": "heap-buffer-overflow",
    "past_row": "heap-buffer-overflow",
    "divergent_barrier": "simt: diverged: thread",
    "early_return": "for thread 7, which has returned",
    "lane_not_in_mask": "is not in its own mask 0000ffff",
    "lane_missing": "for thread 31, which has returned",
}


@pytest.fixture(scope="module")
def mutants(tmp_path_factory: pytest.TempPathFactory) -> Path:
    program = tmp_path_factory.mktemp("simt") / "mutants"
    sources = ["-x", "c++", "tests/simt/mutants.cu", "tests/simt/simt.cpp"]
    options = ["-std=c++17", "-g", "-O1", "-Wall", "-Werror", *SANITIZE, *INCLUDE]
    subprocess.run(["g++", *options, *sources, "-o", str(program)], cwd=ROOT, check=True)
    return program


def run(program: Path, name: str, seed: int) -> subprocess.CompletedProcess[str]:
    environment = dict(os.environ, SELFKD_SIMT_SEED=str(seed), ASAN_OPTIONS="detect_leaks=0")
    return subprocess.run([str(program), name], env=environment, capture_output=True, text=True)


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_control(mutants: Path, seed: int) -> None:
    result = run(mutants, "control", seed)
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("seed", [1, 2, 3])
@pytest.mark.parametrize("name", MUTANTS)
def test_mutant(mutants: Path, name: str, seed: int) -> None:
    result = run(mutants, name, seed)
    assert result.returncode != 0
    assert MUTANTS[name] in result.stderr
