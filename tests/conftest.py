"""One seed for everything, the built test programs, and which devices there are."""

from __future__ import annotations

import os
import subprocess
import zlib
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent
SEED = int(os.environ.get("SELFKD_TEST_SEED", "20221111"))


def pytest_report_header() -> str:
    import selfkd

    return f"seed {SEED} (SELFKD_TEST_SEED), library {selfkd.library_path()}, torch {torch.__version__}"


@pytest.fixture
def generator(request: pytest.FixtureRequest) -> torch.Generator:
    """Random numbers that depend on the seed and the test's name only."""
    return torch.Generator().manual_seed(SEED + zlib.crc32(request.node.nodeid.encode()))


def build_tests() -> Path:
    """Build the C tests, the emulated CUDA library and the C example; returns the folder. Incremental."""
    folder = Path(os.environ.get("SELFKD_TEST_BUILD", ROOT / "build" / "test"))
    for command in (
        ["cmake", "-S", str(ROOT), "-B", str(folder), "-DSELFKD_CUDA=OFF", "-DSELFKD_WERROR=ON"],
        ["cmake", "--build", str(folder), "--parallel", "2"],
    ):
        done = subprocess.run(command, capture_output=True, text=True, timeout=900)
        assert done.returncode == 0, (
            f"{' '.join(command)}\n{done.stdout[-6000:]}\n{done.stderr[-6000:]}"
        )
    return folder


@pytest.fixture(scope="session")
def built() -> Path:
    return build_tests()
