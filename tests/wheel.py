"""The wheel and the sdist of `make wheel`, which runs this: $DIST is their folder."""

from __future__ import annotations

import os
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


@pytest.fixture(scope="module")
def wheel() -> Path:
    (found,) = Path(os.environ["DIST"]).glob("*.whl")
    return found


@pytest.fixture(scope="module")
def environment(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An environment that has Python, and the wheel, and nothing else."""
    folder = tmp_path_factory.mktemp("environment")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
    pip = [sys.executable, "-m", "pip", "--python", folder / "bin/python"]
    subprocess.run([*pip, "install", "-q", "--no-index", wheel], check=True)
    return folder


@pytest.fixture(scope="module")
def library(environment: Path) -> Path:
    (found,) = environment.glob("lib/*/site-packages/selfkd/libselfkd.so")
    return found


def test_size(wheel: Path) -> None:
    assert wheel.stat().st_size <= MEGABYTES << 20


def test_tag(wheel: Path) -> None:
    assert wheel.name.endswith("-py3-none-manylinux_2_28_x86_64.whl")


def test_glibc(library: Path) -> None:
    assert newest_glibc(library) <= (2, 28)


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


def test_it_works_where_nothing_else_is(environment: Path, library: Path) -> None:
    done = subprocess.run(
        [environment / "bin/selfkd", "info"], capture_output=True, text=True, check=True
    )
    assert str(library) in done.stdout
    assert "not installed: the PyTorch functions are absent" in done.stdout


def test_check_where_nothing_else_is(environment: Path) -> None:
    """Of the C functions, as PyTorch is not there."""
    done = subprocess.run([environment / "bin/selfkd", "check"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "PyTorch is not installed" in done.stdout
    assert done.stdout.endswith("\nall is right\n")
