"""Where a case runs: PyTorch on a CPU variant or on CUDA, the C interface, the emulators."""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import pytest
import selfkd
import torch
from remote import COMMAND as REMOTE
from remote import remote
from selfkd import c, library, operators
from selfkd.contract import contract

SIMT_LIBRARY = os.environ.get("SELFKD_SIMT_LIBRARY", "")
needs_operators = pytest.mark.skipif(
    not library.library().selfkd_register_torch(b"selfkd"),
    reason="of torch.ops.selfkd, which PyTorch older than 2.8 has not: run under 2.8 or newer",
)
needs_torch_backend = pytest.mark.skipif(
    bool(SIMT_LIBRARY), reason="the emulator has no PyTorch binding"
)


@dataclass(frozen=True)
class Backend:
    """Where a case runs; `call(op, tensors, options, grad)` gives result and gradients.

    lib: a library that is called from C, and `claimed` the device that descriptors claim.
    """

    name: str
    call: Callable[..., tuple[torch.Tensor, dict[str, torch.Tensor]]]
    device: str = "cpu"
    variant: str = ""
    lib: Any = None
    claimed: int | None = None

    def __str__(self) -> str:
        return self.name


def live_inputs(op: str, given: Mapping[str, Any]) -> list[str]:
    """Those of the inputs given that get gradients."""
    live = [item.name.removeprefix("grad_") for item in contract(f"{op}_backward").outputs]
    return [name for name in live if name in given]


def public(op: str, space: Any) -> Callable[..., torch.Tensor]:
    """The function of that name in `space`, called with the arguments of the contract."""
    function = getattr(space, op)
    adapter = getattr(importlib.import_module(f"selfkd.{op}"), "by_contract", None)
    return partial(adapter, function) if adapter else function  # type: ignore[no-any-return]


def through_torch(
    op: str,
    tensors: Mapping[str, torch.Tensor],
    options: Mapping[str, Any],
    grad: torch.Tensor | None = None,
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The public function and its autograd; on the CPU PyTorch gives them memory full of NaN."""
    tensors = dict(tensors)
    live = live_inputs(op, tensors)
    for name in live:
        tensors[name] = tensors[name].detach().requires_grad_()
    wanted = [tensors[name] for name in live]
    torch.use_deterministic_algorithms(not any(x.is_cuda for x in tensors.values()))
    try:
        result = public(op, selfkd)(**tensors, **options)
        ones = torch.ones_like(result)
        grads = torch.autograd.grad(result, wanted, ones if grad is None else grad)
    finally:
        torch.use_deterministic_algorithms(False)
    return result.detach(), dict(zip(live, grads, strict=True))


def poisoned_outputs(op: str, arguments: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """Outputs of a C call full of NaN: what a kernel leaves out is seen."""
    of = contract(op)
    checker, first = selfkd.contract.check(of, arguments), arguments[of.first]
    acc = torch.float64 if first.dtype == torch.float64 else torch.float32
    return {
        item.name: torch.full_like(arguments[item.shape], torch.nan)
        if item.kind == "LIKE"
        else torch.full(
            selfkd.contract.output_shape(item, checker),
            torch.nan,
            dtype={"ACC": acc, "F64": torch.float64, "SAME": first.dtype}[item.rule],
        )
        for item in of.outputs
        if not selfkd.contract.is_absent(item, arguments)
    }


def through_c(
    lib: Any, device: int | None
) -> Callable[..., tuple[torch.Tensor, dict[str, torch.Tensor]]]:
    """The C functions of a library, on host memory; `device` is what the descriptors claim."""

    def call(
        op: str,
        tensors: Mapping[str, torch.Tensor],
        options: Mapping[str, Any],
        grad: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        forward, backward = contract(op), contract(f"{op}_backward")
        numbers = {item.name: item.default for item in forward.items if item.is_number} | dict(
            options
        )
        for item in forward.items:
            if item.choices and isinstance(numbers[item.name], str):
                numbers[item.name] = item.choices.index(numbers[item.name])
        numbers.pop("dim", None)  # of the Python functions; a kernel has its rows along dimension 1
        arguments: dict[str, Any] = {**numbers, **tensors}
        outputs = poisoned_outputs(op, arguments)
        library.check(c.run(lib, op, arguments | outputs, device=device))
        first = forward.outputs[0].name
        result = outputs["rows"] if numbers.get("reduction") == 0 else outputs[first]
        everything = (
            arguments | outputs | {"grad": torch.ones_like(result) if grad is None else grad}
        )
        grads = poisoned_outputs(backward.name, everything)
        library.check(c.run(lib, backward.name, everything | grads, device=device))
        return result, {name: grads[f"grad_{name}"] for name in live_inputs(op, tensors)}

    return call


def run_operator(backend: Backend, op: str, named: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """All outputs of an operator by name, without autograd; numbers not given have their default."""
    of = contract(op)
    arguments = {item.name: item.default for item in of.items if item.is_number} | dict(named)
    if backend.lib is None:
        found = operators.kernel(op)(*schema_values(op, arguments))
        found = found if isinstance(found, tuple) else (found,)
        return {item.name: x for item, x in zip(of.outputs, found, strict=True)}
    outputs = poisoned_outputs(op, arguments)
    library.check(c.run(backend.lib, op, arguments | outputs, device=backend.claimed))
    return outputs


def from_c(name: str, lib: Any, claimed: int | None = None, variant: str = "") -> Backend:
    """A library that is called from C."""
    return Backend(name, through_c(lib, claimed), variant=variant, lib=lib, claimed=claimed)


def backends(*, emulated: bool = True) -> list[Any]:
    """An emulator alone where its library or its command is given, else CPU variants and CUDA; one
    variant through C."""
    if SIMT_LIBRARY or REMOTE:
        if not emulated:
            return []
        if REMOTE:
            return [pytest.param(from_c("remote", remote()), marks=pytest.mark.remote)]
        simt = from_c("simt", library.open_library(SIMT_LIBRARY), 2)
        return [pytest.param(simt, marks=pytest.mark.simt)]
    found = [Backend(variant, through_torch, variant=variant) for variant in ("base", "v4")]
    found.append(from_c("c", library.library(), variant="v3" if has_variant("v3") else ""))
    cuda = Backend("cuda", through_torch, device="cuda")
    return [*found, pytest.param(cuda, marks=pytest.mark.cuda)]


@cache
def has_variant(name: str) -> bool:
    """Whether the library and this machine's CPU have a variant."""
    before = library.text("selfkd_isa")
    try:
        selfkd.set_isa(name)
    except ValueError:
        return False
    selfkd.set_isa(before)
    return True


def prepare(backend: Backend) -> None:
    """Force what the back end names."""
    if backend.variant:
        selfkd.set_isa(backend.variant)


def schema_values(op: str, named: Mapping[str, Any]) -> tuple[Any, ...]:
    """Arguments by name in the order of the PyTorch schema; numbers not given have their default."""
    of, values = contract(op), []
    for item in of.items:
        if item.is_number:
            values.append(named.get(item.name, item.default))
        elif item.kind == "OPT":
            given = named.get(item.name)
            values += [named[of.first] if given is None else given, given is not None]
        elif item.is_input:
            values.append(named[item.name])
    return tuple(values)
