"""Run tests in this environment and add a row to a table: compat.py NAME TABLE TEST..."""

from __future__ import annotations

import hashlib
import importlib.metadata
import platform
import re
import subprocess
import sys
from datetime import datetime, timezone
from pathlib import Path

HEAD = """# Environments that the tests ran in

By `make compat`, one wheel for all of them: "library" is the beginning of the SHA-256 of its `libselfkd.so`.

| date | commit | library | environment | Python | packages | result |
| --- | --- | --- | --- | --- | --- | --- |
"""
NAMED = ("torch", "torchvision", "torchdistill", "timm", "transformers", "lightning", "trl")


def packages() -> str:
    """Names and versions of the packages that matter, as far as they are installed."""
    found = {
        item.metadata["Name"].lower(): item.version for item in importlib.metadata.distributions()
    }
    return ", ".join(f"{name} {found[name]}" for name in NAMED if name in found)


def library() -> str:
    """Which library file this environment has, whatever Python and PyTorch it has."""
    (found,) = Path(sys.prefix).glob("lib/*/site-packages/selfkd/libselfkd.so")
    return hashlib.sha256(found.read_bytes()).hexdigest()[:8]


def main(name: str, table: Path, *tests: str) -> int:
    """Return pytest's exit code."""
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-o",
        "addopts=",
        "--tb=short",
        "-p",
        "no:cacheprovider",
    ]
    done = subprocess.run([*command, *tests], stdout=subprocess.PIPE, text=True)
    print(done.stdout)
    result = re.sub(r"^=+ (.*) in [\d.]+s.*", r"\1", done.stdout.strip().splitlines()[-1])
    describe = ["git", "describe", "--always", "--dirty"]
    commit = subprocess.run(describe, capture_output=True, text=True).stdout.strip()
    day = datetime.now(timezone.utc).date()
    row = [day, commit, library(), name, platform.python_version(), packages(), result]
    if not table.exists():
        table.write_text(HEAD)
    with table.open("a") as file:
        file.write("| " + " | ".join(map(str, row)) + " |\n")
    return done.returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], Path(sys.argv[2]), *sys.argv[3:]))
