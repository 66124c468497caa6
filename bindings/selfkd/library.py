"""Finds, loads and declares ``libselfkd.so``; the only module that calls ctypes.CDLL."""

from __future__ import annotations

import ctypes
import functools
import importlib.util
import os
from pathlib import Path

from ._version import __version__

ABI = 1

_SIGNATURES: dict[str, tuple[type | None, list[type]]] = {
    "selfkd_version": (ctypes.c_char_p, []),
    "selfkd_abi": (ctypes.c_int, []),
    "selfkd_message": (ctypes.c_char_p, []),
    "selfkd_operators": (ctypes.c_char_p, []),
    "selfkd_describe": (ctypes.c_char_p, [ctypes.c_char_p]),
    "selfkd_set_num_threads": (ctypes.c_int, [ctypes.c_int]),
    "selfkd_set_isa": (ctypes.c_int, [ctypes.c_char_p]),
    "selfkd_isa": (ctypes.c_char_p, []),
    "selfkd_call_count": (ctypes.c_int64, [ctypes.c_char_p]),
    "selfkd_last_path": (ctypes.c_char_p, []),
    "selfkd_cuda": (ctypes.c_char_p, []),
    "selfkd_register_torch": (ctypes.c_int, [ctypes.c_char_p]),
    "selfkd_torch": (ctypes.c_char_p, []),
    "selfkd_torch_namespace": (ctypes.c_char_p, []),
    "selfkd_release_autograd_guard": (None, []),
}


def library_path() -> str:
    """Path of ``libselfkd.so``: that of ``$SELFKD_LIBRARY`` if set, else the one in this package.

    It is looked for as Python looks for an extension module of the package: after ``pip install -e``
    it does not lie beside this file, and is built anew first if the install is one that rebuilds.
    """
    given = os.environ.get("SELFKD_LIBRARY")
    found = None if given else importlib.util.find_spec(".libselfkd", __package__)
    return given or (found and found.origin) or str(Path(__file__).with_name("libselfkd.so"))


def open_library(path: str) -> ctypes.CDLL:
    """Load the library at `path` and declare its functions.

    Raises
    ------
    ImportError
        The file is missing, cannot be loaded, or was built from another version of this package.
    """
    try:
        library = ctypes.CDLL(path)
    except OSError as error:
        raise ImportError(
            f"selfkd: cannot load {path} ({error}); install the package with `pip install .`, "
            "or set SELFKD_LIBRARY to the path of libselfkd.so"
        ) from error
    for name, (result, arguments) in _SIGNATURES.items():
        function = getattr(library, name, None)
        if function is None:
            raise ImportError(
                f"selfkd: {path} has no {name}; it was built from another version, reinstall selfkd"
            )
        function.restype, function.argtypes = result, arguments
    version = library.selfkd_version().decode()
    if library.selfkd_abi() != ABI or version != __version__:
        raise ImportError(
            f"selfkd: {path} is version {version} (ABI {library.selfkd_abi()}), this package is "
            f"{__version__} (ABI {ABI}); reinstall selfkd"
        )
    return library


@functools.cache
def library() -> ctypes.CDLL:
    """The library of this process."""
    return open_library(library_path())


def text(function: str, *arguments: bytes | int) -> str:
    """Call a function of the library that returns text."""
    return (getattr(library(), function)(*arguments) or b"").decode()


def check(status: int) -> None:
    """Raise what a failing call said: TypeError for status 2, ValueError for 1, else RuntimeError."""
    if status:
        raise {1: ValueError, 2: TypeError, 3: MemoryError}.get(status, RuntimeError)(
            text("selfkd_message")
        )


def set_num_threads(n: int) -> None:
    """Use at most `n` threads in one call (see also ``torch.set_num_threads``, which is honoured)."""
    check(library().selfkd_set_num_threads(n))


def set_isa(name: str) -> None:
    """Force the CPU variant ``"base"``, ``"v3"`` or ``"v4"`` (x86-64 levels); for tests and comparisons."""
    check(library().selfkd_set_isa(name.encode()))
