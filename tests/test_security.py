"""What SECURITY.md promises."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import selfkd
from binary import check_is_hardened
from conftest import ROOT

PYTHON_FILES = sorted(
    path for folder in ("bindings", "examples", "bench") for path in (ROOT / folder).rglob("*.py")
)
C_FILES = sorted(
    path
    for folder in ("ops", "cpu", "cuda", "bindings", "cmake")
    for path in (ROOT / folder).rglob("*")
    if path.is_file() and path.suffix != ".pyc"
)


def test_the_library_is_hardened() -> None:
    check_is_hardened(selfkd.library_path())


# ---- nothing that is loaded is run ----


def unsafe(source: str) -> Iterator[str]:
    """What runs code that comes from a file, the environment or a string."""
    for node in ast.walk(ast.parse(source)):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom):
            names = [node.module or ""]
        yield from (
            name
            for name in names
            if name.split(".")[0] in {"pickle", "cPickle", "dill", "marshal", "shelve", "joblib"}
        )
        if not isinstance(node, ast.Call):
            continue
        call, options = ast.unparse(node.func), {x.arg: x.value for x in node.keywords}
        said = {name: ast.unparse(value) for name, value in options.items()}
        if call == "torch.load" and said.get("weights_only") != "True":
            yield "torch.load without weights_only=True"
        if call.endswith((".load", ".loads")) and "allow_pickle" in said:
            yield "allow_pickle"
        if call in {"eval", "exec", "compile", "os.system", "os.popen", "torch.hub.load"}:
            yield call
        if "shell" in said:
            yield "a shell"


def test_no_file_is_loaded_that_can_run_code() -> None:
    """But for functions that are written from the contracts in the library, in one place."""
    assert {
        path.name: found for path in PYTHON_FILES if (found := list(unsafe(path.read_text())))
    } == {"kernels.py": ["exec", "compile"]}


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "from joblib import load",
        "torch.load(path)",
        "torch.load(path, weights_only=False)",
        "np.load(path, allow_pickle=True)",
        "eval(text)",
        "subprocess.run(text, shell=True)",
    ],
)
def test_that_test_sees(source: str) -> None:
    assert list(unsafe(source))


# ---- nothing around the process is run ----

HOSTILE = """
#include <stdio.h>
__attribute__((constructor)) static void run(void) { fclose(fopen(MARK, "w")); }
"""
USE = """
import selfkd, torch
u = torch.randn(4, 5, requires_grad=True)
selfkd.sd_dropout_kl(u, u.detach() + 1).backward()
from selfkd.cli import main
main(["info"])
"""


def environment_names() -> set[str]:
    """The environment variables that library and package read."""
    names = set[str]()
    for path in C_FILES:
        names.update(re.findall(r"getenv\((.*?)\)", path.read_text()))
    for path in (ROOT / "bindings").rglob("*.py"):
        names.update(re.findall(r"(?:environ(?:\.\w+\(|\[)|getenv\()([^,)\]]*)", path.read_text()))
    return {name.strip("\"'") for name in names}


def test_environment_variables() -> None:
    assert environment_names() == {"OMP_NUM_THREADS", "SELFKD_LIBRARY"}


def test_only_selfkd_library_names_code_to_run(tmp_path: Path) -> None:
    """Libraries and programs with the names that are looked for, wherever one may look."""
    mark, folder = tmp_path / "mark", tmp_path / "hostile"
    folder.mkdir()
    hostile = folder / "libselfkd.so"
    source = tmp_path / "hostile.c"
    source.write_text(HOSTILE)
    subprocess.run(
        ["gcc", "-shared", "-fPIC", f'-DMARK="{mark}"', source, "-o", hostile], check=True
    )
    for name in ("libtorch_cpu.so", "libtorch_cuda.so", "libcuda.so.1", "libgomp.so.1"):
        (folder / name).symlink_to(hostile)
    for name in ("nvidia-smi", "nvcc", "ldconfig", "gcc", "git", "sh"):
        (folder / name).write_text(f"#!/bin/sh\n: > {mark}\n")
        (folder / name).chmod(0o755)
    around = dict.fromkeys(("HOME", "TMPDIR", "PATH", "CUDA_HOME", "XDG_CACHE_HOME"), str(folder))
    around |= dict.fromkeys(environment_names() - {"SELFKD_LIBRARY"}, str(hostile))

    def run(**more: str) -> int:
        command = [sys.executable, "-c", USE]
        environment = os.environ | around | more
        return subprocess.run(
            command, cwd=folder, env=environment, capture_output=True, timeout=120
        ).returncode

    assert run() == 0
    assert not mark.exists()
    assert run(SELFKD_LIBRARY=str(hostile)) != 0
    assert mark.exists()
