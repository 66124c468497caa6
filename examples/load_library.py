"""selfkd's operators in PyTorch without its Python package: torch.ops.load_library is enough.

For programs that write their own training loop, or that are no Python at all: a C++ program with
libtorch loads the same file. Without the package there is no autograd formula: the loss runs under
no_grad and its gradients come from sd_dropout_kl_backward; a call in grad mode raises.

    python examples/load_library.py [libselfkd.so]
"""

from __future__ import annotations

import sys
from importlib.util import find_spec
from pathlib import Path

import torch

MEAN = 1  # reductions: 0 none, 1 mean, 2 sum
TEMPERATURE, FORWARD_WEIGHT, REVERSE_WEIGHT, DETACH_TARGET = 3.0, 1.0, 1.0, False


def installed_library() -> str:
    """Return the path of the library in the installed package, which is not imported."""
    package = find_spec("selfkd")
    if package is None or package.origin is None:
        sys.exit("selfkd is not installed; give the path of libselfkd.so")
    return str(Path(package.origin).with_name("libselfkd.so"))


def main() -> int:
    """Compute loss and gradients, and compare them with autograd in float64."""
    torch.ops.load_library(sys.argv[1] if len(sys.argv) > 1 else installed_library())
    selfkd = torch.ops.selfkd

    torch.manual_seed(0)
    u, v = 3 * torch.randn(128, 100), 3 * torch.randn(128, 100)
    none = torch.empty(0)  # in place of a tensor that is not given
    numbers = (TEMPERATURE, FORWARD_WEIGHT, REVERSE_WEIGHT, DETACH_TARGET)
    with torch.no_grad():
        loss, _, saved, denominator = selfkd.sd_dropout_kl(
            u, v, none, False, none, False, *numbers, MEAN
        )
        grad_u, grad_v = selfkd.sd_dropout_kl_backward(
            torch.ones(()), u, v, none, False, saved, denominator, *numbers, True, True
        )
    try:
        selfkd.sd_dropout_kl(u, v, none, False, none, False, *numbers, MEAN)
        refused = False
    except RuntimeError as error:
        print(f"in grad mode: {str(error).splitlines()[0]}")
        refused = True

    x, y = (t.double().requires_grad_() for t in (u, v))
    p, q = (x / TEMPERATURE).softmax(1), (y / TEMPERATURE).softmax(1)
    expected = TEMPERATURE**2 * ((p - q) * (p.log() - q.log())).sum(1).mean()
    expected.backward()
    close = torch.testing.assert_close
    close(loss, expected.float(), rtol=3e-6, atol=0)
    close(grad_u, x.grad.float(), rtol=1e-5, atol=1e-8)
    close(grad_v, y.grad.float(), rtol=1e-5, atol=1e-8)
    print(f"loss {loss.item():.7f}, expected {expected.item():.7f}; gradients agree")
    return 0 if refused else 1


if __name__ == "__main__":
    sys.exit(main())
