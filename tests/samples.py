"""One call of every operator and every module, for what each must do under PyTorch: see test_pytorch.py.

An operator whose tensors are rows has its sample from its contract. The test for one without is there too.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import selfkd
import torch
from drawing import listed_classes
from selfkd import nn
from selfkd.contract import contract, modules
from torch import Tensor
from torch.utils._pytree import tree_leaves


def total(results: Any) -> Tensor:
    """All that was returned as one number that depends on each element."""
    return sum(x.float().square().sum() for x in tree_leaves(results) if isinstance(x, Tensor))  # type: ignore[return-value]


# ---- operators ----


@dataclass(frozen=True)
class Call:
    """`call(function, *tensors)` of the tensors for a batch of n: those that learn, then the others."""

    live: Callable[[int], list[Tensor]]
    fixed: Callable[[int], list[Tensor]]
    call: Callable[..., Tensor]

    def tensors(self, n: int, device: str = "cpu") -> tuple[list[Tensor], list[Tensor]]:
        """Both kinds, of PyTorch's random numbers."""
        live, fixed = ([x.to(device) for x in draw(n)] for draw in (self.live, self.fixed))
        return [x.requires_grad_() for x in live], fixed


def classes(*shape: int) -> Tensor:
    return torch.randint(0, 5, shape)


CALLS = {
    "adversarial": Call(
        lambda n: [torch.randn(n), torch.randn(n)],
        lambda n: [],
        lambda f, real, fake: f(real, fake),
    ),
    "attention": Call(
        lambda n: [torch.randn(n, 6, 4, 4)],
        lambda n: [torch.randn(n, 3, 4, 4)],
        lambda f, student, teacher: f(student, teacher),
    ),
    "bifpn_fuse": Call(
        lambda n: [
            torch.randn(n, 3, 4, 4),
            torch.randn(n, 3, 2, 2),
            torch.randn(n, 3, 8, 8),
            torch.randn(3).abs(),
        ],
        lambda n: [],
        lambda f, a, b, c, w: f(a, b, c, weight=w, resize=(None, "nearest", "maxpool")),
    ),
    "distill": Call(
        lambda n: [torch.randn(n, 5, 3, 3)],
        lambda n: [classes(n, 3, 3), torch.randn(n, 5, 3, 3), torch.rand(n, 3, 3)],
        lambda f, z, y, t, w: f(z, y, t, weight=w, label_smoothing=0.1),
    ),
    "dropout_views": Call(
        lambda n: [torch.randn(n, 12)],
        lambda n: [torch.randint(99, ())],
        lambda f, x, seed: f(x, seed),
    ),
    "sd_dropout_head": Call(
        lambda n: [torch.randn(n, 12), torch.randn(5, 12), torch.randn(5)],
        lambda n: [classes(n)],
        lambda f, x, w, b, y: f(x, w, b, y, p=0.25),
    ),
}


def by_contract(op: str) -> Call:
    """A call of a loss of rows with all but its divisor, by the names of its contract."""
    of = contract(op)
    live = [x.name.removeprefix("grad_") for x in contract(f"{op}_backward").outputs]
    fixed = [x.name for x in of.items if x.is_input and x.name not in (*live, "divisor")]

    def draw(name: str, n: int) -> Tensor:
        item = of[name]
        if item.rule == "INDEX":
            return classes(n)
        if item.rule == "CLASSES":
            return listed_classes((n, 12), 5)
        sizes = {"NC*": (n, 12), "NK*": (n, 5), "N*": (n,)}[item.shape]
        return torch.rand(sizes) if item.rule == "WEIGHT" else torch.randn(sizes)

    return Call(
        lambda n: [draw(name, n) for name in live],
        lambda n: [draw(name, n) for name in fixed],
        lambda f, *tensors: f(**dict(zip([*live, *fixed], tensors, strict=True))),
    )


CALLS |= {op: by_contract(op) for op in modules() if op not in CALLS}


def run(op: str, n: int = 6, function: Any = None) -> list[Tensor]:
    """Result and gradients of an operator's sample, the same for the same n; of another function if given."""
    torch.manual_seed(n)
    sample = CALLS[op]
    live, fixed = sample.tensors(n)
    function = getattr(selfkd, op) if function is None else function
    result = sample.call(function, *live, *fixed)
    return [result.detach(), *torch.autograd.grad(total(result), live)]


# ---- modules ----


@dataclass(frozen=True)
class Module:
    """A module and the arguments of its call for a batch of n, at random."""

    make: Callable[[], torch.nn.Module]
    inputs: Callable[[int], list[Any]]
    call: Callable[..., Any] = lambda module, *inputs: module(*inputs)
    compiles: bool = True


def maps(n: int, *channels: int) -> list[Tensor]:
    """Maps of a pyramid, the last 4 x 4."""
    sizes = [4 << k for k in reversed(range(len(channels)))]
    return [torch.randn(n, c, s, s) for c, s in zip(channels, sizes, strict=True)]


def remember(table: nn.PreviousEpoch, index: Tensor, logits: Tensor) -> Tensor:
    """What was known of these samples an epoch ago, 0 in the first."""
    found = table.lookup(index)
    table.update(index, logits)
    table.end_epoch()
    return torch.zeros_like(logits) if found is None else found


MODULES = {
    "AIKDLoss": Module(
        lambda: nn.AIKDLoss(nn.Discriminator(5, (8, 8))),
        lambda n: [
            torch.randn(n, 5),
            torch.randn(n, 5),
            torch.randn(n, 5).softmax(1),
            classes(n),
        ],
    ),
    "BiFPN": Module(lambda: nn.BiFPN((3, 4, 6), 5, depth=1), lambda n: [maps(n, 3, 4, 6)]),
    "Discriminator": Module(lambda: nn.Discriminator(5, (8,)), lambda n: [torch.randn(n, 5)]),
    "FRSKDLoss": Module(
        nn.FRSKDLoss,
        lambda n: [
            torch.randn(n, 5),
            torch.randn(n, 5),
            maps(n, 3, 4),
            maps(n, 6, 8),
            classes(n),
        ],
    ),
    "BiFPNSeg": Module(lambda: nn.BiFPNSeg(3, 3, repeat=1), lambda n: [maps(n, 3, 3, 3)]),
    "PreviousEpoch": Module(
        lambda: nn.PreviousEpoch(9, 5),
        lambda n: [torch.randperm(9), torch.randn(9, 5)],
        remember,
        compiles=False,  # it looks at the indices
    ),
    "SDDropout": Module(
        lambda: nn.SDDropout(torch.nn.Linear(12, 5), p=0.25),
        lambda n: [torch.randn(n, 12), classes(n)],
    ),
    "SimRegHead": Module(lambda: nn.SimRegHead(6, 8), lambda n: [torch.randn(n, 6)]),
    "SimRegLoss": Module(
        nn.SimRegLoss,
        lambda n: [maps(n, 4, 4), maps(n, 4, 4)],
    ),
}


def train(name: str, module: torch.nn.Module, n: int = 6) -> list[Tensor]:
    """Result, gradients of the first argument and of the parameters, buffers; the same for the same n."""
    torch.manual_seed(n)
    inputs = MODULES[name].inputs(n)
    first = [x.requires_grad_() for x in tree_leaves(inputs[0]) if x.is_floating_point()]
    result = total(MODULES[name].call(module, *inputs))
    live = [*first, *module.parameters()]
    grads = torch.autograd.grad(result, live, allow_unused=True) if live else ()
    found = [x for x in grads if x is not None]
    return [result.detach(), *found, *(x.clone() for x in module.buffers())]
