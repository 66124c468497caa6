"""Every function of selfkd in plain PyTorch, under the same name and with the same signature.

Differentiable any number of times and exact in float64: what the tests compare with, and what
double backward uses.
"""

from __future__ import annotations

import importlib

from .contract import modules

__all__ = list(modules())

for _name in __all__:
    globals()[_name] = importlib.import_module(f".{_name}", __package__).reference
