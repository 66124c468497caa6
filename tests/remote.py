"""The library of another processor, in an emulator: ``make arm``.

``$SELFKD_REMOTE`` is a command that runs ``remote.c``. It has the memory of this process that arguments are
copied to, at the same address, so that what calls a library of ctypes calls this one too.
"""

from __future__ import annotations

import ctypes
import functools
import mmap
import os
import shlex
import subprocess
from collections.abc import Callable, Iterator

from selfkd import c
from selfkd.contract import compact_strides, contract

COMMAND = os.environ.get("SELFKD_REMOTE", "")
BYTES = 1 << 30  # of address space; memory is used where something was written
ADDRESS = 1 << 44  # free in both
MAP_FIXED_NOREPLACE = 0x100000
LINE = 64


def span(tensor: c.Tensor, strides: tuple[int, ...]) -> tuple[int, int]:
    """First address of a tensor's elements and the number of bytes from it to the last."""
    sizes, width = tensor.shape[: tensor.ndim], tensor.dtype.bits // 8
    if 0 in sizes:
        return tensor.data or 0, 0
    steps = [(n - 1) * step for n, step in zip(sizes, strides, strict=True)]
    low, high = (sum(f(0, step) for step in steps) for f in (min, max))
    return tensor.data + tensor.byte_offset + low * width, (high - low + 1) * width


class Library:
    """Its attributes are the functions of operators, as those of a ``ctypes.CDLL``."""

    def __init__(self, command: str) -> None:
        file = os.memfd_create("selfkd", 0)
        os.ftruncate(file, BYTES)
        map_at = ctypes.CDLL(None, use_errno=True).mmap
        map_at.restype = ctypes.c_void_p
        map_at.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
        flags = mmap.MAP_SHARED | MAP_FIXED_NOREPLACE
        access = mmap.PROT_READ | mmap.PROT_WRITE
        if map_at(ADDRESS, BYTES, access, flags, file, 0) != ADDRESS:
            raise OSError(ctypes.get_errno(), "no memory to share at a fixed address")
        self.process = subprocess.Popen(
            [*shlex.split(command), str(file), str(BYTES), hex(ADDRESS)],
            pass_fds=[file],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        os.close(file)

    def __getattr__(self, name: str) -> Callable[[int, int | None], int]:
        return functools.partial(self.call, name)

    def call(self, name: str, arguments: int, _stream: int | None) -> int:
        """Copies the arguments there and the results back; a failure is raised here."""
        end = ADDRESS

        def place(size: int, offset: int = 0) -> int:
            nonlocal end
            at = end + offset % LINE  # on a vector's boundary, or as far from one as it was
            end = at + size + -(at + size) % LINE
            assert end <= ADDRESS + BYTES
            return at

        def tensors(struct: ctypes.Structure) -> Iterator[tuple[str, c.Tensor]]:
            for item in contract(op).items:
                if not item.is_number and item.kind != "SCRATCH" and getattr(struct, item.name):
                    yield item.name, getattr(struct, item.name).contents

        op = name.removeprefix("selfkd_")
        of = c.arguments_struct(op)
        there = of.from_address(place(ctypes.sizeof(of)))
        here = of.from_address(arguments)
        ctypes.pointer(there)[0] = here
        copies = []
        for field, tensor in tensors(here):
            sizes = tuple(tensor.shape[: tensor.ndim])
            strides = tensor.strides[: tensor.ndim] if tensor.strides else compact_strides(sizes, 1)
            start, size = span(tensor, tuple(strides))
            at = place(size, start)
            ctypes.memmove(at, start, size)
            copies.append((at, start, size))
            moved = c.Tensor.from_address(place(ctypes.sizeof(c.Tensor)))
            ctypes.pointer(moved)[0] = tensor
            moved.data, moved.byte_offset = at + (tensor.data or 0) - start, tensor.byte_offset
            for numbers, values in (("shape", sizes), ("strides", strides)):
                array = (ctypes.c_int64 * tensor.ndim).from_address(place(8 * tensor.ndim))
                array[:] = values
                setattr(moved, numbers, ctypes.cast(array, ctypes.POINTER(ctypes.c_int64)))
            setattr(there, field, ctypes.pointer(moved))
        assert self.process.stdin
        assert self.process.stdout
        print(name, hex(ctypes.addressof(there)), file=self.process.stdin, flush=True)
        status, _, message = self.process.stdout.readline().partition(" ")
        if status != "0":
            raise RuntimeError(f"{name}: {message or 'the emulated process has ended'}")
        for at, start, size in copies:
            ctypes.memmove(start, at, size)
        return 0


@functools.cache
def remote() -> Library:
    """The one of this process."""
    return Library(COMMAND)
