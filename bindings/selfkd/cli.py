"""The command line: ``python -m selfkd``."""

from __future__ import annotations

import argparse
import os
import platform
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from . import __version__, library
from .bench.options import UsageError, add_arguments
from .contract import operators


def _torch() -> str:
    try:
        import torch
    except ModuleNotFoundError:
        return "not installed: the PyTorch functions are absent, selfkd.c works"
    from ._ops import NAMESPACE

    registered = library.library().selfkd_register_torch(NAMESPACE.encode())
    otherwise = "" if registered else f"; functions run by ctypes, torch.ops.{NAMESPACE} is absent"
    return f"{torch.__version__} ({library.text('selfkd_torch')}{otherwise})"


def _huge_pages() -> str:
    setting = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    return setting.read_text().strip() if setting.exists() else "unknown"


def info(options: argparse.Namespace) -> int:
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


class _Parser(argparse.ArgumentParser):
    """Says what is wrong in one sentence."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}\n")


def _bench(options: argparse.Namespace) -> int:
    try:
        from .bench.run import main as run
    except ModuleNotFoundError as error:
        if error.name != "torch":
            raise
        print("selfkd bench: needs PyTorch 2.8 or newer: pip install torch", file=sys.stderr)
        return 2
    try:
        return run(options)
    except UsageError as error:
        print(f"selfkd bench: {error}", file=sys.stderr)
        return 2


def _check(options: argparse.Namespace) -> int:
    """Print a line for each operator and place; returns 1 when something is off."""
    try:
        from .check_torch import with_torch as lines
    except ModuleNotFoundError as error:
        if error.name != "torch":
            raise
        from .check import without_torch as lines

        print("PyTorch is not installed: the C functions alone are checked\n")
    wrong = 0
    for line in lines():
        print(line, flush=True)
        wrong += not line.is_right
    print(f"\n{wrong} of these lines are wrong" if wrong else "\nall is right")
    return 1 if wrong else 0


def _study(options: argparse.Namespace) -> int:
    """Print the tables of a report of `make study`."""
    from .bench.study import show

    try:
        show(options.show)
    except (OSError, ValueError) as error:
        print(f"selfkd study: {error}", file=sys.stderr)
        return 2
    return 0


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit status."""
    parser = _Parser(prog="selfkd", description="Fused self-distillation losses.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, run, what in (
        ("info", info, "library, CPU variant, CUDA, PyTorch and operators"),
        ("check", _check, "whether every operator is right on this machine; seconds"),
        ("bench", _bench, "speed, memory and accuracy beside eager PyTorch and torch.compile"),
        ("study", _study, "the tables of a report of `make study`: whether the losses help"),
    ):
        commands.add_parser(name, help=what).set_defaults(run=run)
    add_arguments(commands.choices["bench"])
    commands.choices["study"].add_argument(
        "--show", type=Path, metavar="FILE", required=True, help="a report, study-NAME.json"
    )
    given = sys.argv[1:] if arguments is None else list(arguments)
    options = parser.parse_args(given, argparse.Namespace(given=given))
    return int(options.run(options))
