"""The command line: ``python -m selfkd``."""

from __future__ import annotations

import argparse
import os
import platform
from collections.abc import Sequence
from pathlib import Path

from . import __version__, library
from .contract import operators


def _torch() -> str:
    try:
        import torch
    except ModuleNotFoundError:
        return "not installed: the PyTorch functions are absent, selfkd.c works"
    registered = library.library().selfkd_register_torch()
    otherwise = "" if registered else "; functions run by ctypes, torch.ops.selfkd is absent"
    return f"{torch.__version__} ({library.text('selfkd_torch')}{otherwise})"


def _huge_pages() -> str:
    setting = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    return setting.read_text().strip() if setting.exists() else "unknown"


def info() -> int:
    """Print what this installation consists of."""
    cores = len(os.sched_getaffinity(0))
    rows = {
        "selfkd": __version__,
        "library": f"{library.library_path()} (version {library.text('selfkd_version')})",
        "CPU variant": f"{library.text('selfkd_isa')} on {platform.machine()}, {cores} cores",
        "huge pages": _huge_pages(),
        "CUDA": library.text("selfkd_cuda"),
        "PyTorch": _torch(),
        "Python": platform.python_version(),
        "operators": ", ".join(name for name in operators() if not name.endswith("_backward")),
    }
    width = max(map(len, rows))
    for name, value in rows.items():
        print(f"{name:<{width}}  {value}")
    return 0


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit status."""
    parser = argparse.ArgumentParser(prog="selfkd", description="Fused self-distillation losses.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    commands.add_parser(
        "info", help="library, CPU variant, CUDA, PyTorch and operators"
    ).set_defaults(run=info)
    run = parser.parse_args(arguments).run
    return int(run())
