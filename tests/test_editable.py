"""``pip install -e``: Python files where they lie, the library rebuilt when the package is imported."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

pytestmark = pytest.mark.full
WHERE = """
import importlib.resources, pathlib, sys, selfkd, torch
assert (importlib.resources.files("selfkd") / "include" / "selfkd.h").is_file()
assert str(pathlib.Path(sys.argv[1]) / "bindings") in sys.path  # for mypy and editors
loss = torch.compile(selfkd.sd_dropout_kl, fullgraph=True, backend="aot_eager")
loss(torch.randn(3, 4, requires_grad=True), torch.randn(3, 4)).backward()
print(selfkd.library_path(), end="")
"""


class Environment:
    """A fresh environment that sees the packages of this one, and a copy of the sources."""

    def __init__(self, folder: Path) -> None:
        self.source, home = folder / "source", folder / "environment"
        left_out = shutil.ignore_patterns(".*", "build", "dist", "runs", "__pycache__")
        shutil.copytree(ROOT, self.source, ignore=left_out)
        subprocess.run([sys.executable, "-m", "venv", "--without-pip", home], check=True)
        self.python = home / "bin/python"
        (self.site,) = home.glob("lib/*/site-packages")
        others = [path for path in sys.path if path.endswith("site-packages")]
        (self.site / "others.pth").write_text("\n".join(others))

    def run(self, *command: str | Path) -> str:
        hidden = {"SELFKD_LIBRARY", "PYTHONPATH"}
        environment = {name: x for name, x in os.environ.items() if name not in hidden}
        command = (self.python, *command)
        done = subprocess.run(
            command, capture_output=True, text=True, cwd=self.site, env=environment
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def install(self, *options: str) -> None:
        """Not optimised, which is quicker, and without a download."""
        self.run(
            *("-m", "pip", "install", "--no-index", "--no-deps", "--no-build-isolation", *options),
            "--config-settings=cmake.build-type=Debug",
            "--config-settings=cmake.define.SELFKD_CUDA=OFF",
            *("-e", self.source),
        )

    def library(self) -> Path:
        return Path(self.run("-c", WHERE, self.source))

    def edit(self, path: str, old: str, new: str) -> None:
        text = (self.source / path).read_text()
        assert old in text
        (self.source / path).write_text(text.replace(old, new))


def test_editable_installation(tmp_path: Path) -> None:
    here = Environment(tmp_path)
    here.install("--config-settings=editable.rebuild=true")
    assert here.library().is_relative_to(here.source / "build/editable")
    here.edit("bindings/selfkd/cli.py", "huge pages", "large pages")
    here.edit("ops/core/device.c", "built without nvcc", "rebuilt on import")
    said = here.run("-m", "selfkd", "info")
    assert "large pages" in said
    assert "rebuilt on import" in said

    here.install()  # compiles what has changed, then no more
    assert here.library() == here.site / "selfkd/libselfkd.so"
    here.edit("ops/core/device.c", "rebuilt on import", "rebuilt once more")
    assert "rebuilt on import" in here.run("-m", "selfkd", "info")

    here.run("-m", "pip", "uninstall", "-y", "selfkd")
    assert not list(here.site.glob("*selfkd*"))
