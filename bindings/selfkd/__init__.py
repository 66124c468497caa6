"""selfkd: fused self-distillation losses for PyTorch, as one plain-C library.

Every operator of the library is a function here (``selfkd.sd_dropout_kl``) and, in plain PyTorch,
in :mod:`selfkd.reference`. Modules are in :mod:`selfkd.nn`, the functions as layers in :mod:`selfkd.layers`.
:mod:`selfkd.c` calls the library on NumPy arrays or any other DLPack producer and needs no PyTorch.
"""

from __future__ import annotations

import importlib
from typing import Any

from . import c
from ._version import __version__
from .contract import modules
from .library import library_path, set_isa, set_num_threads

__all__ = ["__version__", "c", "library_path", "set_isa", "set_num_threads"]

# The folder is the registry: a module that an operator of the library is named after brings the function.
_OPERATORS = modules()
_MODULES = ("distributed", "layers", "nn", "reference")


def _load_torch_functions() -> None:
    for name in _OPERATORS:
        globals()[name] = getattr(importlib.import_module(f".{name}", __name__), name)
    for name in _MODULES:
        globals()[name] = importlib.import_module(f".{name}", __name__)
    __all__.extend([*_MODULES, *_OPERATORS])


def __dir__() -> list[str]:
    return __all__


def __getattr__(name: str) -> Any:
    if name in _OPERATORS or name in _MODULES:
        raise ImportError(
            f"selfkd.{name} needs PyTorch 2.8 or newer: pip install torch (selfkd.c works without)"
        )
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


try:
    import torch as _torch  # noqa: F401 (only whether it is there)
except ModuleNotFoundError:
    pass
else:
    _load_torch_functions()
