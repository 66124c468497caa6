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


def case_name(item: pytest.Item) -> str:
    """The test's name without its back end."""
    callspec = getattr(item, "callspec", None)
    if callspec is None or "backend" not in callspec.params:
        return item.nodeid
    test, _, parameters = item.nodeid.removesuffix("]").partition("[")
    parts = parameters.split("-")
    parts.remove(str(callspec.params["backend"]))
    return f"{test}[{'-'.join(parts)}]"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest first: two processes share the tests, and neither should wait for the other. The
    back ends of one case follow each other, so that its reference is computed once."""
    order, first = {"test_simt": 0, "test_examples": 1}, dict[str, int]()
    for position, item in enumerate(items):
        first.setdefault(case_name(item), position)
    items.sort(key=lambda item: (order.get(item.path.stem, 2), first[case_name(item)]))


@pytest.fixture
def generator(request: pytest.FixtureRequest) -> torch.Generator:
    """Random numbers that depend on the seed and the test's name only, the same for each back end."""
    return torch.Generator().manual_seed(SEED + zlib.crc32(case_name(request.node).encode()))


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
