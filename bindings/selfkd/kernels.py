"""The operators of the library as PyTorch has them: registered, described to its compiler, called.

PyTorch older than 2.8 cannot register operators from C. There the C functions run by ctypes, and the
namespace in ``torch.ops`` is empty.
"""

from __future__ import annotations

import functools
import itertools
import linecache
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch.autograd import forward_ad

from . import c, library
from . import contract as contracts
from ._ops import NAMESPACE, ops
from .contract import Contract, contract

below_autograd = torch._C._AutoDispatchBelowAutograd


def _slowly_any_requires_grad(*values: Any) -> bool:
    return any(isinstance(x, torch.Tensor) and x.requires_grad for x in values)


# PyTorch 2.8 has it in C.
any_requires_grad = getattr(torch._C, "_any_requires_grad", _slowly_any_requires_grad)


@functools.cache
def registry() -> torch.library.Library | None:
    """The library handle for fake kernels and gradients; made at first use, when PyTorch surely is loaded.

    None where PyTorch is too old for it.
    """
    if not library.library().selfkd_register_torch(NAMESPACE.encode()):
        why = library.text("selfkd_torch")
        if why.startswith("this PyTorch is older than 2.8"):
            return None
        raise ImportError(f"selfkd: {library.library_path()}: {why}")
    library.library().selfkd_release_autograd_guard()
    # What an earlier import of this package registered would be in the way: it is kept where deleting or
    # reloading the package does not reach.
    kept = vars(ops)
    if earlier := kept.get("_registry_of_python"):
        earlier._destroy()
    made = torch.library.Library(NAMESPACE, "FRAGMENT")  # type: ignore[no-untyped-call]
    kept["_registry_of_python"] = made
    return made


def by_name(of: Contract, values: tuple[Any, ...]) -> dict[str, Any]:
    """The arguments of a PyTorch call by name; absent OPT tensors are None, the ``has_`` flags are gone."""
    named = dict(zip(of.torch_arguments, values, strict=True))
    for item in of.items:
        if item.kind == "OPT" and not named.pop(f"has_{item.name}"):
            named[item.name] = None
    return named


_count = itertools.count()  # numbers the functions that are generated


def generate(
    name: str, head: str, body: str, space: dict[str, Any] | None = None, **kept: Any
) -> Callable[..., Any]:
    """The function ``def name(head): body``, in which the names of `kept` are these values.

    So Python itself binds the arguments of a call, half a microsecond faster than any code with
    ``*args``, and its compiler reads straight lines. Other names are those of the module `space`.
    """
    text = [f"def make({', '.join(kept)}):", f" def {name}({head}):"]
    text += [f"  {line}" for line in body.splitlines()] + [f" return {name}"]
    file, made = f"<{name} {next(_count)}>", dict[str, Any]()
    linecache.cache[file] = (0, None, [f"{line}\n" for line in text], file)  # for tracebacks
    exec(compile("\n".join(text), file, "exec"), {} if space is None else space, made)
    return made["make"](**kept)  # type: ignore[no-any-return]


def schema_values(of: Contract, codes: Mapping[str, str] | None = None) -> str:
    """The text of a call's arguments in the schema's order, from names that are those of the contract.

    An OPT tensor is followed by its flag, and the first tensor stands for it where it is None. `codes` are
    other names for some.
    """
    found = []
    for item in of.items:
        if item.kind == "OPT":
            found += [f"{of.first} if {item.name} is None else {item.name}"]
            found += [f"{item.name} is not None"]
        elif item.is_number or item.kind in ("IN", "INOUT"):
            found.append((codes or {}).get(item.name, item.name))
    return ", ".join(found)


def in_order(of: Contract) -> Callable[..., tuple[Any, ...]]:
    """The inverse of :func:`by_name`: arguments by name in the schema's order.

    Numbers not given have their default; a GRAD is left out.
    """
    given = [
        item.name if item.kind in ("IN", "INOUT") else f"{item.name}={item.default!r}"
        for item in of.items
        if item.kind in ("IN", "INOUT", "OPT") or item.is_number
    ]
    return generate(of.name, f"*, {', '.join(given)}", f"return {schema_values(of)},")


def _fake(of: Contract) -> Callable[..., torch.Tensor | tuple[torch.Tensor, ...]]:
    """The function that checks an operator's arguments and makes its results, without values."""

    def fake(*values: Any) -> torch.Tensor | tuple[torch.Tensor, ...]:
        named = by_name(of, values)
        first, forms = named[of.first], contracts.forms(of, named)

        def new(item: contracts.Item) -> torch.Tensor:
            if item.name not in forms:
                return first.new_empty(0)  # type: ignore[no-any-return]
            shape, dtype = forms[item.name]
            if item.kind == "LIKE":
                return torch.empty_like(named[item.shape])
            return first.new_empty(shape, dtype=getattr(torch, dtype))  # type: ignore[no-any-return]

        results = tuple(map(new, of.outputs))
        return results if len(results) > 1 else results[0]

    return fake


def _tangent(x: torch.Tensor) -> torch.Tensor | None:
    return forward_ad.unpack_dual(x).tangent  # type: ignore[no-any-return, no-untyped-call]


def transforms_are_active() -> bool:
    """Whether PyTorch is in forward mode or in a transform of torch.func."""
    return forward_ad._current_level >= 0 or torch._C._are_functorch_transforms_active()


def refuse_transforms(op: str, values: Sequence[Any]) -> None:
    """Raise where PyTorch wants a derivative that the operator has not, and would take 0 for it.

    That is forward-mode, whose tangents no operator but PyTorch's own sees, and torch.func, which
    does not see into registered gradients.
    """
    if not transforms_are_active():
        return
    forward = forward_ad._current_level >= 0
    function = torch._C._are_functorch_transforms_active()
    tensors = [x for x in values if isinstance(x, torch.Tensor)]
    if (function and any_requires_grad(*tensors)) or (
        forward and any(_tangent(x) is not None for x in tensors)
    ):
        raise RuntimeError(
            f"{op} has no derivative for forward-mode or torch.func; selfkd.reference.{op} has both"
        ) from None


class _Batched(RuntimeError):
    """Tensors of ``torch.func.vmap`` and ``is_grads_batched`` have no memory to call C functions on."""

    def __init__(self, op: str) -> None:
        super().__init__(
            f"{op} has no vmap and no batched gradients under PyTorch older than 2.8;"
            f" selfkd.reference.{op} has both"
        )


def kernel(op: str) -> Callable[..., Any]:
    """The operator of the library, as PyTorch has it or, if it cannot, called by ctypes."""
    if registry():
        return getattr(ops, op).default  # type: ignore[no-any-return]
    of = contract(op)
    allocate = _fake(of)

    def run(*values: Any) -> torch.Tensor | tuple[torch.Tensor, ...]:
        results = allocate(*values)
        named = by_name(of, values)
        for item, result in zip(of.outputs, as_tuple(results), strict=True):
            named[item.name] = None if contracts.is_absent(item, named) else result
        device = named[of.first].device
        stream = torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else None
        try:
            status = c.run(library.library(), op, named, stream)
        except RuntimeError as error:
            raise _Batched(op.removesuffix("_backward")) from error
        library.check(status)
        return results

    return run


def call(op: str) -> Callable[..., Any]:
    """:func:`kernel` for eager code, without the frame of Python that PyTorch puts around it."""
    run = kernel(op)
    return getattr(run, "_op", run)


def register_fake(op: str) -> None:
    """Register the fake kernel of an operator of the library."""
    if made := registry():
        torch.library.register_fake(f"{NAMESPACE}::{op}", _fake(contract(op)), lib=made)


def register_private(op: str) -> Callable[..., Any]:
    """Register, and return, an operator that writes over its inputs and has no gradient."""
    register_fake(op)
    run = kernel(op)

    def autograd(*values: Any) -> Any:
        if torch.is_grad_enabled() and any_requires_grad(*values):
            raise RuntimeError(
                f"selfkd: {op} has no gradient and writes over its inputs; call it under torch.no_grad()"
            )
        with below_autograd():
            return run(*values)

    if not (made := registry()):
        return autograd
    made.impl(op, autograd, "Autograd")  # type: ignore[no-untyped-call]
    return run


def as_tuple(results: Any) -> tuple[torch.Tensor, ...]:
    """What an operator returned; PyTorch gives a single result without its tuple."""
    return results if isinstance(results, tuple) else (results,)


def define(
    of: Contract,
    outputs: Sequence[str],
    *,
    run: Callable[..., Any],
    fake: Callable[..., Any],
    autograd: Callable[..., Any],
) -> Callable[..., Any]:
    """Define, and return, an operator that is made of others in Python, with the contract's arguments."""
    if not (made := registry()):

        def named(*values: Any) -> Any:
            try:
                return run(*values)
            except _Batched:  # by an operator that it is made of
                raise _Batched(of.name) from None

        return named
    types = {"REAL": "float", "INT": "int", "BOOL": "bool", "CHOICE": "int", "OPT": "Tensor?"}
    takes = ", ".join(f"{types.get(item.kind, 'Tensor')} {item.name}" for item in of.items)
    gives = ", ".join(f"Tensor {name}" for name in outputs)
    schema = f"{of.name}({takes}) -> ({gives})"
    made.define(schema, tags=(torch.Tag.pt2_compliant_tag,))  # type: ignore[no-untyped-call]
    for key, function in (("CPU", run), ("CUDA", run), ("Autograd", autograd)):
        made.impl(of.name, function, key)  # type: ignore[no-untyped-call]
    torch.library.register_fake(f"{NAMESPACE}::{of.name}", fake, lib=made)
    return kernel(of.name)
