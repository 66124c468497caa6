"""Where PyTorch has the operators of this copy of the package: the only module that knows their namespace."""

from __future__ import annotations

import torch

# Each copy in a process has a name of its own as a package; that of a kernel from the Hub is its build's.
NAMESPACE = __name__.rpartition(".")[0].replace(".", "_")

ops = getattr(torch.ops, NAMESPACE)
