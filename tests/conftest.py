"""One seed for everything, the built test programs, and which devices there are."""

from __future__ import annotations

import fcntl
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


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest first: two processes share the tests, and neither should wait for the other."""
    order = {"test_simt": 0, "test_examples": 1}
    items.sort(key=lambda item: order.get(item.path.stem, 2))


@pytest.fixture
def generator(request: pytest.FixtureRequest) -> torch.Generator:
    """Random numbers that depend on the seed and the test's name only."""
    return torch.Generator().manual_seed(SEED + zlib.crc32(request.node.nodeid.encode()))


def build_tests() -> Path:
    """Build the C tests, the emulated CUDA library and the C example; returns the folder. Incremental."""
    folder = Path(os.environ.get("SELFKD_TEST_BUILD", ROOT / "build" / "test"))
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # one process builds, the others find it done
        for command in (
            ["cmake", "-S", ROOT, "-B", folder, "-DSELFKD_CUDA=OFF", "-DSELFKD_WERROR=ON"],
            ["cmake", "--build", folder, "--parallel", "2"],
        ):
            done = subprocess.run(command, capture_output=True, text=True, timeout=900)
            assert done.returncode == 0, f"{command}\n{done.stdout[-6000:]}\n{done.stderr[-6000:]}"
    return folder


@pytest.fixture(scope="session")
def built() -> Path:
    return build_tests()
