"""What a built libselfkd.so must be, whoever links it: read with binutils."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

NEEDED = {
    "libc.so.6",
    "libm.so.6",
    "ld-linux-x86-64.so.2",
    "ld-linux-aarch64.so.1",
    "libpthread.so.0",
    "libdl.so.2",
    "librt.so.1",
}


def tool(*command: str | Path) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def check_needs_only_libc_and_exports_only_selfkd(library: str | Path) -> None:
    assert set(re.findall(r"NEEDED +(\S+)", tool("objdump", "-p", library))) <= NEEDED
    exported = [
        line.split()[-1] for line in tool("nm", "-D", "--defined-only", library).splitlines()
    ]
    assert "selfkd_sd_dropout_kl" in exported
    assert [name for name in exported if not name.startswith("selfkd_")] == []


def check_is_hardened(library: str | Path) -> None:
    """Full RELRO, stack protector, no executable stack, no search path; nothing writable is executable."""
    dynamic = tool("readelf", "-dW", library)
    lines = tool("readelf", "-lW", library)
    segments = re.findall(r"^ +(\w+) +(?:0x\w+ +){5}([RWE ]{3}) +\w+$", lines, re.MULTILINE)
    assert ("GNU_RELRO", "R  ") in segments
    assert ("GNU_STACK", "RW ") in segments
    assert [flags for _, flags in segments if "W" in flags and "E" in flags] == []
    assert re.search(r"\(FLAGS\).*BIND_NOW", dynamic)
    assert re.search(r"\(FLAGS_1\).*NOW", dynamic)
    assert not re.search(r"RPATH|RUNPATH|TEXTREL", dynamic)
    undefined = tool("nm", "-D", "--undefined-only", library)
    for name in ("__stack_chk_fail", "memcpy", "exp"):  # glibc's, not a copy that a linker brings
        assert f" {name}@GLIBC" in undefined


def newest_glibc(library: str | Path) -> tuple[int, ...]:
    """The newest version of glibc that a symbol of the library asks for."""
    found = re.findall(r"GLIBC_([0-9.]+)", tool("objdump", "-T", library))
    return max(tuple(map(int, version.split("."))) for version in found)
