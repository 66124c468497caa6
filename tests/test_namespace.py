"""Copies of the package in one process: each has its name, its library and its namespace in torch.ops."""

from __future__ import annotations

import ast
import importlib
import inspect
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import harness
import pytest
import selfkd
from conftest import ROOT

PACKAGE = ROOT / "bindings" / "selfkd"
ADAPTERS = sorted(
    path.stem for path in (PACKAGE / "integrations").glob("*.py") if path.stem[0] != "_"
)
PUBLIC = [
    *(name for name in selfkd.__all__ if inspect.ismodule(getattr(selfkd, name))),
    *(f"integrations.{name}" for name in ADAPTERS),
]


# ---- what the text of the package says ----


def names_of_the_package(source: str) -> Iterator[str]:
    """Imports and operators by the package's own name, which another copy of it would take for its own."""
    for node in ast.walk(ast.parse(source)):
        found = []
        if isinstance(node, ast.Import):
            found = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            found = [node.module or ""]
        elif isinstance(node, ast.Attribute):
            found = [ast.unparse(node).removeprefix("torch.ops.")] * (node.attr == "selfkd")
        elif isinstance(node, ast.Call) and "import_module" in ast.unparse(node.func):
            found = [ast.unparse(node.args[0]).strip("f'\"")]
        elif isinstance(node, ast.Constant) and str(node.value).startswith("selfkd::"):
            found = ["selfkd"]
        yield from (name for name in found if name.split(".")[0] == "selfkd")


@pytest.mark.parametrize(
    "source",
    [
        "import selfkd",
        "import torch, selfkd.nn as nn",
        "def f():\n    from selfkd.nn import BiFPN",
        "importlib.import_module(f'selfkd.{op}')",
        "torch.ops.selfkd.simreg(x)",
        "register_fake(f'selfkd::{op}', fake)",
    ],
)
def test_names_of_the_package_are_seen(source: str) -> None:
    assert list(names_of_the_package(source))


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: path.stem)
def test_no_module_names_the_package(path: Path) -> None:
    assert list(names_of_the_package(path.read_text())) == []


def test_the_package_shows_what_is_public_and_nothing_else() -> None:
    assert [name for name in dir(selfkd) if not name.startswith("_")] == sorted(
        name for name in selfkd.__all__ if not name.startswith("_")
    )


@pytest.mark.parametrize("name", PUBLIC)
def test_public_modules_say_what_is_public(name: str) -> None:
    module = importlib.import_module(f"selfkd.{name}")
    own = {
        key
        for key, x in vars(module).items()
        if (inspect.isclass(x) or inspect.isfunction(x))
        and x.__module__ == module.__name__
        and not key.startswith("_")
    }
    assert all(hasattr(module, key) for key in module.__all__)
    assert name == "c" or own <= set(module.__all__)


# ---- two of them ----

pytestmark = pytest.mark.skipif(
    bool(harness.SIMT_LIBRARY), reason="the emulator has no PyTorch binding"
)
PREAMBLE = """
import ctypes, importlib, os, sys, warnings
warnings.simplefilter("error")
warnings.filterwarnings("ignore", category=DeprecationWarning)
warnings.filterwarnings("ignore", category=FutureWarning)
"""
SAME = """
import torch
first, second = (importlib.import_module(name) for name in sys.argv[1:3])
import samples
def ran(package, op):
    return package.library.library().selfkd_call_count(op.encode())
for op in first.contract.modules():
    expected = samples.run(op, function=getattr(first, op))
    before = [ran(package, f"{op}_backward") for package in (first, second)]
    layer = getattr(second.layers, op)()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    for function in getattr(second, op), layer, compiled:
        found = samples.run(op, function=function)
        assert all(map(torch.equal, found, expected)), (op, function)
    if op != "sd_dropout_head":  # whose forward makes the gradients
        assert [ran(package, f"{op}_backward") for package in (first, second)] == [before[0], 3], op
    assert hasattr(getattr(torch.ops, second.__name__), op)
    if op in second.contract.operators():
        assert second.library.text("selfkd_last_path").startswith("cpu ")
for wrong, package in enumerate((first, second), 9):
    assert package.library.text("selfkd_torch_namespace") == package.__name__
    try:
        package.distill(torch.randn(2, 3), torch.tensor([0, wrong]))
        raise SystemExit("no error")
    except ValueError as error:  # only the kernel sees it
        assert str(error).startswith(f"distill: target is {wrong} at position [1], expected"), error
"""


def copy_of_the_package(folder: Path, name: str) -> Path:
    """The package under another name, with a library of its own."""
    copied = folder / name
    shutil.copytree(PACKAGE, copied, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(selfkd.library_path(), copied / "libselfkd.so")
    return copied


def python(folder: Path, code: str, *arguments: str, **environment: str) -> None:
    """Run a program in a fresh process that has copies, which are in the folder, and the samples."""
    for name in ("selfkd", "other"):
        copy_of_the_package(folder, name)
    kept = {name: value for name, value in os.environ.items() if name != "SELFKD_LIBRARY"}
    paths = os.pathsep.join(map(str, (folder, ROOT / "tests")))
    done = subprocess.run(
        [sys.executable, "-c", PREAMBLE + code, *arguments],
        capture_output=True,
        text=True,
        timeout=600,
        env=kept | {"PYTHONPATH": paths} | environment,
    )
    assert done.returncode == 0, done.stderr


@harness.needs_operators
@pytest.mark.parametrize(
    ("before", "names"),
    [
        ("import torch", ("other", "selfkd")),
        (
            "ctypes.CDLL(f'{sys.argv[3]}/selfkd/libselfkd.so', ctypes.RTLD_GLOBAL)",
            ("selfkd", "other"),
        ),
    ],
    ids=["other first", "selfkd first and its symbols for all"],
)
def test_two_copies(before: str, names: tuple[str, str], tmp_path: Path) -> None:
    """Each runs its own library: forward, backward, compiled and as a layer, with the same results."""
    python(tmp_path, before + SAME, *names, str(tmp_path))


@harness.needs_operators
def test_two_copies_of_one_library(tmp_path: Path) -> None:
    path = selfkd.library_path()
    python(
        tmp_path,
        """
import selfkd
try:
    import other
    raise SystemExit("no error")
except ImportError as error:
    expected = f"registered as selfkd and in use; a copy of {sys.argv[1]} can be registered as other"
    assert str(error).endswith(expected), error
""",
        path,
        SELFKD_LIBRARY=path,
    )


@harness.needs_operators
def test_a_library_has_the_namespace_that_is_asked_for(tmp_path: Path) -> None:
    """That of its load gives way to another until an operator was called; a name that is none is refused."""
    python(
        tmp_path,
        """
import torch
lib, copy = (ctypes.CDLL(f"{sys.argv[1]}/{name}/libselfkd.so") for name in ("selfkd", "other"))
for x in lib, copy:
    x.selfkd_torch.restype = x.selfkd_torch_namespace.restype = ctypes.c_char_p
u = torch.ones(2, 3)
def call(space):
    with torch.no_grad():
        return space.sd_dropout_kl(u, u, u, False, u, False, 3.0, 1.0, 1.0, False, 1)[0]

assert lib.selfkd_torch_namespace() == b"selfkd"
assert copy.selfkd_torch_namespace() is None
assert b"selfkd is registered by another copy" in copy.selfkd_torch()
own = b"none of PyTorch's own (aten, prim, _)"
for name in None, b"", b"_", b"aten", b"prim", b"a-b", b"a b", b"a::b", b"1a", "\\u00e4".encode(), b"x" * 64:
    assert lib.selfkd_register_torch(name) == 0, name
    said = b"namespace is %b, expected an identifier" % (b"NULL" if name is None else name)
    assert lib.selfkd_torch().startswith(said) and own in lib.selfkd_torch(), lib.selfkd_torch()
assert lib.selfkd_torch_namespace() == b"selfkd"

longest = "x" * 63
assert lib.selfkd_register_torch(longest.encode()) == lib.selfkd_register_torch(longest.encode()) == 1
assert lib.selfkd_torch_namespace().decode() == longest
assert lib.selfkd_torch().startswith(b"registered; threads"), lib.selfkd_torch()
assert copy.selfkd_register_torch(b"selfkd") == 1
for space in longest, "selfkd":
    assert call(getattr(torch.ops, space)) == 0
try:
    getattr(torch.ops, longest).simreg(u.requires_grad_(), u, u, False, u, False, True, 1)
    raise SystemExit("no error")
except RuntimeError as error:
    assert "simreg has no gradient until `import selfkd`" in str(error), error
for x, used in (lib, longest.encode()), (copy, b"selfkd"):
    assert x.selfkd_register_torch(b"third") == 0
    assert b"registered as %b and in use; a copy of " % used in x.selfkd_torch(), x.selfkd_torch()
    assert x.selfkd_register_torch(used) == 1
""",
        str(tmp_path),
    )
