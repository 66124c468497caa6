"""One seed for everything, the built test programs, and which tests are left out."""

from __future__ import annotations

import fcntl
import multiprocessing
import os
import runpy
import subprocess
import sys
import zlib
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import selfkd
import torch

# Before the first of them is imported, so that a failing assertion says what it compared.
pytest.register_assert_rewrite(
    *("backends", "binding", "comparison", "drawing", "harness"),
    *("loss", "sentences", "standard", "standard_pytorch"),
)
import harness  # noqa: E402

ROOT = Path(__file__).parent.parent
FULL = bool(os.environ.get("SELFKD_FULL"))
LEFT_OUT = pytest.StashKey[dict[str, int]]()
BEST = selfkd.library.text("selfkd_isa")
SEED = int(os.environ.get("SELFKD_TEST_SEED", "20221111"))


def pytest_report_header() -> str:
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


def missing(item: pytest.Item) -> str | None:
    """What would run a test that is left out; of one that repeats another, ""."""
    parameters = getattr(item, "callspec", None) and item.callspec.params
    backend = parameters and parameters.get("backend")
    if item.get_closest_marker("cuda") and not torch.cuda.is_available():
        return "CUDA: `make gpu-check` on a machine with a GPU"
    if isinstance(backend, harness.Backend):
        if backend.variant and not harness.has_variant(backend.variant):
            return f"CPU variant {backend.variant}: a newer x86-64 CPU"
        if backend.variant == "v4" and parameters.get("dtype") in ("float64", torch.float64):
            return ""  # one variant has the kernels in double, and other back ends run them
        case = parameters.get("case")
        if isinstance(case, harness.Case):
            if case.big and backend.name in ("simt", "remote"):
                return ""
            if case.contiguous and parameters.get("layout", "contiguous") != "contiguous":
                return ""
    for marker in item.iter_markers("only_with"):
        there, what = marker.args
        if not there:
            return str(what)
    if item.get_closest_marker("full") and not FULL:
        return "long or many: `make test-full`"
    return None


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Without tests of what is not here, the longest first: two processes share the tests, and neither
    should wait for the other. The back ends of one case follow each other, so that its reference is
    computed once."""
    why = {item: missing(item) for item in items}
    config.stash[LEFT_OUT] = Counter(reason for reason in why.values() if reason)
    config.hook.pytest_deselected(items=[item for item in items if why[item] is not None])
    items[:] = [item for item in items if why[item] is None]
    first = dict[str, int]()
    for position, item in enumerate(items):
        first.setdefault(case_name(item), position)

    def place(item: pytest.Item) -> tuple[int, int]:
        long = item.get_closest_marker("long")
        return (-long.args[0] if long else 0, first[case_name(item)])

    items.sort(key=place)


def pytest_runtest_teardown() -> None:
    selfkd.set_isa(BEST)  # whatever the test's back end was


def pytest_sessionfinish(session: pytest.Session) -> None:
    """A process of pytest-xdist tells the one that reports."""
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput["left_out"] = dict(session.config.stash[LEFT_OUT])


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    node.config.stash[LEFT_OUT] = getattr(node, "workeroutput", {}).get("left_out", {})


def pytest_terminal_summary(
    terminalreporter: pytest.TerminalReporter, config: pytest.Config
) -> None:
    found = [f"{count} of {reason}" for reason, count in config.stash.get(LEFT_OUT, {}).items()]
    if found:
        terminalreporter.write_line("left out: " + "; ".join(found))


@pytest.fixture
def generator(request: pytest.FixtureRequest) -> torch.Generator:
    """Random numbers that depend on the seed and the test's name only, the same for each back end."""
    return torch.Generator().manual_seed(SEED + zlib.crc32(case_name(request.node).encode()))


def in_ranks(world: int, function: Callable[..., None], *arguments: object) -> None:
    """Call `function(rank, *arguments)` in a process for each rank, forked, which has loaded PyTorch."""
    fork = multiprocessing.get_context("fork")
    ranks = [fork.Process(target=function, args=(rank, *arguments)) for rank in range(world)]
    for rank in ranks:
        rank.start()
    try:
        for rank in ranks:
            rank.join(300)
    finally:
        for rank in ranks:
            rank.kill()
    assert [rank.exitcode for rank in ranks] == [0] * world


@pytest.fixture
def example(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., str]:
    """Runs an example as a script in this process, which has loaded PyTorch; returns what it prints."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(ROOT / "examples")
    monkeypatch.setenv("COLUMNS", "120")

    def run_example(name: str, *options: object) -> str:
        script = str(ROOT / "examples" / f"{name}.py")
        monkeypatch.setattr(sys, "argv", [script, *map(str, options)])
        with pytest.raises(SystemExit) as left:
            runpy.run_path(script, run_name="__main__")
        printed = capsys.readouterr()
        assert left.value.code == 0, printed
        return printed.out

    return run_example


def build_tests(target: str = "all" if FULL else "test_programs") -> Path:
    """Build the C tests, the emulated CUDA library and the C example, or one of them; returns the folder.

    They are linked with the library under test, or, if SELFKD_LIBRARY names one, with one built here.
    """
    folder = Path(os.environ.get("SELFKD_TEST_BUILD", ROOT / "build" / "test"))
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # one process builds, the others find it done
        installed = "" if "SELFKD_LIBRARY" in os.environ else selfkd.library_path()
        options = ["-DSELFKD_CUDA=OFF", "-DSELFKD_WERROR=ON", f"-DSELFKD_TEST_LIBRARY={installed}"]
        for command in (
            ["cmake", "-S", ROOT, "-B", folder, *options],
            ["cmake", "--build", folder, "--parallel", "2", "--target", target],
        ):
            done = subprocess.run(command, capture_output=True, text=True, timeout=900)
            assert done.returncode == 0, f"{command}\n{done.stdout[-6000:]}\n{done.stderr[-6000:]}"
    return folder


@pytest.fixture(scope="session")
def built() -> Path:
    return build_tests()
