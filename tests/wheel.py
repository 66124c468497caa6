"""The wheels and the sdist of `make wheel`, which runs this: $DIST is their folder."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
from binary import (
    check_is_hardened,
    check_needs_only_libc_and_exports_only_selfkd,
    newest_glibc,
    tool,
)

ROOT = Path(__file__).parent.parent
MEGABYTES = 60


DIST = Path(os.environ["DIST"])
# An interpreter for each processor that a wheel may be of; the other one is emulated.
PYTHON = {"x86_64": [sys.executable], "aarch64": shlex.split(os.environ["ARM_PYTHON"])}


@pytest.fixture(scope="module", params=sorted(DIST.glob("*.whl")), ids=lambda path: path.stem)
def wheel(request: pytest.FixtureRequest) -> Path:
    found: Path = request.param
    return found


@pytest.fixture(scope="module")
def processor(wheel: Path) -> str:
    return next(name for name in PYTHON if wheel.stem.endswith(name))


@pytest.fixture(scope="module")
def packages(wheel: Path, processor: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that has the wheel, as pip installs it, and nothing else."""
    folder = tmp_path_factory.mktemp("packages")
    pip = [sys.executable, "-m", "pip", "install", "-q", "--no-index", "--only-binary=:all:"]
    platform = f"--platform=manylinux_2_28_{processor}"
    subprocess.run([*pip, platform, "--target", folder, wheel], check=True)
    return folder


@pytest.fixture(scope="module")
def library(packages: Path) -> Path:
    return packages / "selfkd" / "libselfkd.so"


def run(processor: str, packages: Path, command: str) -> str:
    """What a command of selfkd prints, where Python has the wheel and nothing else."""
    done = subprocess.run(
        [*PYTHON[processor], "-S", packages / "bin" / "selfkd", command],
        capture_output=True,
        text=True,
        env={"PATH": os.environ["PATH"], "PYTHONPATH": str(packages)},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_size(wheel: Path) -> None:
    assert wheel.stat().st_size <= MEGABYTES << 20


def test_tag(wheel: Path) -> None:
    assert re.search(r"-py3-none-manylinux_2_28_(x86_64|aarch64).whl$", wheel.name)


def test_glibc(wheel: Path, library: Path) -> None:
    """By its symbols, and by what auditwheel says of all that the policy asks for."""
    assert newest_glibc(library) <= (2, 28)
    said = tool(sys.executable, "-m", "auditwheel", "show", wheel)
    found = re.search(r'"manylinux_2_(\d+)_', said)
    assert found, said
    assert int(found[1]) <= 28, said


def test_library(library: Path) -> None:
    check_needs_only_libc_and_exports_only_selfkd(library)
    check_is_hardened(library)


def test_no_path_of_this_machine_is_in_it(library: Path) -> None:
    strings = tool("strings", library)
    for path in (ROOT, Path.home(), "/tmp/"):
        assert f"{path}" not in strings


def test_contents(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    tops = {name.split("/")[0] for name in names}
    assert {top.split("-")[0] for top in tops} == {"selfkd"}
    for name in ("py.typed", "nn/__init__.py", "include/selfkd.h", "include/selfkd_ops.h"):
        assert f"selfkd/{name}" in names
    assert any(name.endswith("licenses/LICENSE") for name in names)


def test_sdist_is_the_tree(wheel: Path) -> None:
    (sdist,) = wheel.parent.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    committed = tool("git", "-C", ROOT, "ls-files").splitlines()
    left_out = {name for name in committed if name.startswith(("bench/results/", ".ci/"))}
    assert set(committed) - names == left_out
    assert names - set(committed) <= {"PKG-INFO"}


def test_it_works_where_nothing_else_is(processor: str, packages: Path, library: Path) -> None:
    said = run(processor, packages, "info")
    assert str(library) in said
    assert "not installed: the PyTorch functions are absent" in said


def test_check_where_nothing_else_is(processor: str, packages: Path) -> None:
    """Of the C functions, as PyTorch is not there."""
    said = run(processor, packages, "check")
    assert "PyTorch is not installed" in said
    assert said.endswith("\nall is right\n")
