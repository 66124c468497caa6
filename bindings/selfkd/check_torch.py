"""The self-test with PyTorch: each public function beside its float64 reference, on every device."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from . import library
from .check import SIZES, TOLERANCES, Line, shape_of, variants
from .contract import Contract, contract, modules, operators

# The package, whose functions mypy takes for the modules of the same names.
SELFKD: Any = importlib.import_module(".", __package__)
DTYPES = {name: getattr(torch, name) for name in TOLERANCES}
LARGER = SIZES | {
    "N": 6,
    "C": 130,
    "D": 70,
    "M": 9,
    "*": 3,
}  # more than a vector and a tile of classes


def contract_of(op: str) -> Contract:
    """The contract in the library, or in Python where the operator is made of others."""
    if op in operators():
        return contract(op)
    own: Contract = importlib.import_module(f".{op}", __package__)._CONTRACT
    return own


def learning(op: str, of: Contract) -> list[str]:
    """The inputs that get gradients."""
    if op in operators():
        return [x.name.removeprefix("grad_") for x in contract(f"{op}_backward").outputs]
    return [x.name for x in of.items if x.is_input and x.rule in ("FLOATING", "SAME")]


def function(op: str, space: Any) -> Callable[..., Tensor]:
    """The public function in `space`, which takes the arguments of the contract."""
    found: Callable[..., Tensor] = getattr(space, op)
    adapter = getattr(importlib.import_module(f".{op}", __package__), "by_contract", None)
    return partial(adapter, found) if adapter else found


def draw(op: str, of: Contract) -> dict[str, Tensor]:
    """All inputs in float64; those not given are drawn too, so that every part is looked at."""
    source = torch.Generator().manual_seed(2022)
    found: dict[str, Tensor] = {}
    for item in of.items:
        if not item.is_input:
            continue
        shape = shape_of(item, LARGER)
        if item.rule == "INDEX":
            found[item.name] = torch.randint(LARGER["C"], shape, generator=source)
        elif item.rule == "CLASSES":
            every = (shape[0], LARGER["C"], *shape[2:])
            found[item.name] = torch.rand(every, generator=source).argsort(1)[:, : shape[1]]
        elif item.rule == "SEED":
            found[item.name] = torch.tensor(2022)
        elif item.rule in ("WEIGHT", "ACC"):
            found[item.name] = torch.rand(shape, generator=source, dtype=torch.float64) + 0.5
        else:
            found[item.name] = 2 * torch.randn(shape, generator=source, dtype=torch.float64)
    return found


def stored(of: Contract, tensors: Mapping[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """The tensors in the dtypes of the contract for a first tensor of `dtype`."""
    acc = torch.float64 if dtype == torch.float64 else torch.float32
    return {
        name: x.to(acc if of[name].rule in ("WEIGHT", "ACC") else dtype)
        if x.is_floating_point()
        else x
        for name, x in tensors.items()
    }


def run(
    op: str, space: Any, tensors: Mapping[str, Tensor], live: list[str], dtype: torch.dtype
) -> list[Tensor]:
    """Result and gradients, for an incoming gradient that `dtype` can hold.

    A function that takes a generator in place of a seed gets one; rows are along dimension 1.
    """
    call, given = function(op, space), dict(tensors)
    device = next(iter(given.values())).device
    parameters = inspect.signature(getattr(space, op)).parameters
    extra: dict[str, Any] = {"dim": 1} if "dim" in parameters else {}
    if "generator" in parameters:
        given.pop("seed", None)
        extra["generator"] = torch.Generator(device).manual_seed(2022)
    for name in live:
        given[name] = given[name].detach().clone().requires_grad_()
    result = call(**given, **extra)
    ramp = torch.linspace(0.5, 1.5, result.numel(), device=device).view(result.shape).to(dtype)
    grads = torch.autograd.grad(result, [given[name] for name in live], ramp.to(result.dtype))
    return [result.detach(), *grads]


def error(found: Tensor, exact: Tensor) -> float:
    """The largest error over the largest value."""
    found, exact = found.double().cpu(), exact.double().cpu()
    if not found.isfinite().all():
        return torch.inf
    return float((found - exact).abs().max() / exact.abs().max().clamp(min=1e-300))


def check_ways_in(op: str, tensors: Mapping[str, Tensor]) -> None:
    """Raise RuntimeError unless scripts may hand over what they have.

    Constants made under ``torch.inference_mode()`` and numbers that are tensors give the same bits; what
    asks for a gradient that it would not get is refused.
    """
    of = contract_of(op)
    live = learning(op, of)
    numbers = {x.name: torch.tensor(x.default) for x in of.items if x.kind == "REAL"}
    plain = run(op, SELFKD, tensors, live, torch.float32)
    with torch.inference_mode():
        constants = {name: x if name in live else x.clone() for name, x in tensors.items()}
    found = run(op, SELFKD, {**constants, **numbers}, live, torch.float32)
    if not all(map(torch.equal, plain, found)):
        raise RuntimeError("inference tensors or numbers that are tensors change the result")
    for name, x in {**tensors, **numbers}.items():
        if name in live or not x.is_floating_point():
            continue
        asking = {**tensors, **numbers, name: x.clone().requires_grad_()}
        try:
            run(op, SELFKD, asking, live, torch.float32)
        except ValueError as error:
            if "requires grad" in str(error):
                continue
            raise
        raise RuntimeError(f"{name} asks for a gradient and gets none without a word")


def check_operator(op: str, device: str, isas: list[str]) -> Line:
    """One operator on one device, in every dtype; on the CPU in every variant."""
    of = contract_of(op)
    live, drawn = learning(op, of), draw(op, of)
    errors: dict[str, float] = {}
    for name, dtype in DTYPES.items():
        tensors = {key: x.to(device) for key, x in stored(of, drawn, dtype).items()}
        exact = run(op, SELFKD.reference, stored(of, tensors, torch.float64), live, dtype)
        for isa in isas:
            library.set_isa(isa)
            found = run(op, SELFKD, tensors, live, dtype)
            # what is stored in a wider dtype than the inputs must be as good as that
            parts = [
                error(x, y) * TOLERANCES[name] / TOLERANCES[str(x.dtype).removeprefix("torch.")]
                for x, y in zip(found, exact, strict=True)
            ]
            errors[name] = max(errors.get(name, 0.0), *parts)
    check_ways_in(op, {key: x.to(device) for key, x in stored(of, drawn, torch.float32).items()})
    return Line(op, ", ".join(isas) if device == "cpu" else device, errors, TOLERANCES)


def with_torch() -> Iterator[Line]:
    """A line for each operator on the CPU, and one for each on the GPU if there is one."""
    isas, places = variants(), ["cpu"]
    if torch.cuda.is_available():
        cuda = library.text("selfkd_cuda")
        if cuda.startswith("none"):
            print(f"on the GPU nothing is checked; CUDA: {cuda}")
        else:
            places.append("cuda")
    for op in modules():
        for place in places:
            try:
                yield check_operator(op, place, isas if place == "cpu" else isas[-1:])
            except (RuntimeError, TypeError, ValueError) as failure:
                yield Line(op, place, {}, {}, failure=str(failure))
