"""What PyTorch must see of an operator: the binding is the same for each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import selfkd
import torch
from backends import live_inputs, public, schema_values, through_torch
from selfkd import library
from selfkd.contract import contract


def check_threads(op: str, tensors: Mapping[str, torch.Tensor], options: Mapping[str, Any]) -> None:
    """The same bits for 1 and 2 threads and from run to run."""
    before, runs = torch.get_num_threads(), []
    for threads in (1, 2, 2):
        torch.set_num_threads(threads)
        runs.append(through_torch(op, tensors, options))
    torch.set_num_threads(before)
    for result, grads in runs[1:]:
        assert torch.equal(result, runs[0][0])
        assert all(torch.equal(grads[name], runs[0][1][name]) for name in grads)


def leaves(op: str, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The same tensors, those with a gradient as new leaves."""
    live = live_inputs(op, tensors)
    return {
        name: x.detach().clone().requires_grad_() if name in live else x
        for name, x in tensors.items()
    }


def backward_calls(op: str) -> int:
    """How often the backward kernel ran."""
    return int(library.library().selfkd_call_count(f"{op}_backward".encode()))


def zeros(op: str) -> dict[str, Any]:
    """Arguments that any operator takes: small tensors of zeros, all that there are, and numbers."""
    sizes = dict.fromkeys("HWIJKL", 2) | {"N": 50, "M": 50, "C": 4, "D": 4, "#": 3}
    dtypes = {"F64": torch.float64} | dict.fromkeys(("INDEX", "CLASSES", "SEED"), torch.int64)
    found: dict[str, Any] = {}
    for item in contract(op).items:
        if item.is_number:
            found[item.name] = item.default
        elif item.is_input:
            shape = [int(sizes.get(letter, letter)) for letter in item.shape.removesuffix("*")]
            found[item.name] = torch.zeros(shape, dtype=dtypes.get(item.rule, torch.float32))
            if item.rule == "CLASSES":  # each listed once
                found[item.name] += torch.arange(shape[1])
    return found


def check_operator(
    op: str, tensors: Mapping[str, torch.Tensor], options: Mapping[str, Any], grad: torch.Tensor
) -> None:
    """opcheck of the forward and of the backward operator; `options` by number."""
    forward = getattr(torch.ops.selfkd, op).default
    values = schema_values(op, {**leaves(op, tensors), **options})
    torch.library.opcheck(forward, values)
    names = [item.name for item in contract(op).outputs]
    results = forward(*values) if len(names) > 1 else (forward(*values),)
    outputs = {name: x.detach() for name, x in zip(names, results, strict=True)}
    named = {**tensors, **options, **outputs, "grad": grad}
    backward = getattr(torch.ops.selfkd, f"{op}_backward").default
    torch.library.opcheck(backward, schema_values(f"{op}_backward", named))


def check_double_backward(
    op: str, tensors: Mapping[str, torch.Tensor], options: Mapping[str, Any]
) -> None:
    """First and second gradients of function and reference agree, and with those of the kernel."""
    given = leaves(op, tensors)
    live = [given[name] for name in live_inputs(op, tensors)]
    found, before = [], backward_calls(op)
    plain = torch.autograd.grad(public(op, selfkd)(**given, **options).sum(), live)
    assert backward_calls(op) == before + 1
    for module in (selfkd, selfkd.reference):
        loss = public(op, module)(**given, **options).sum()
        grads = torch.autograd.grad(loss, live, create_graph=True)
        second = torch.autograd.grad(sum((grad**2).sum() for grad in grads), live)
        found.append((*grads, *second))
    assert backward_calls(op) == before + 1
    torch.testing.assert_close(found[0], found[1])
    torch.testing.assert_close(found[0][: len(live)], plain)


def check_compile(
    op: str,
    batches: Sequence[Mapping[str, torch.Tensor]],
    options: Mapping[str, Any],
    dynamic: bool,
) -> None:
    """The compiled function on batches of several sizes; its backward pass runs the kernel."""

    def training_loss(**given: torch.Tensor) -> torch.Tensor:
        first, *rest = given
        scaled = {first: given[first] * 1.5, **{name: given[name] for name in rest}}
        return 2 * function(**scaled, **options).sum() + given[first].sum()

    function = public(op, selfkd)
    torch._dynamo.reset()
    compiled = torch.compile(training_loss, fullgraph=True, dynamic=dynamic)
    for batch in batches:
        given, before = leaves(op, batch), backward_calls(op)
        live = [given[name] for name in live_inputs(op, given)]
        found, expected = compiled(**given), training_loss(**given)
        torch.testing.assert_close(found, expected)
        torch.testing.assert_close(
            torch.autograd.grad(found, live), torch.autograd.grad(expected, live)
        )
        assert backward_calls(op) == before + 2, "the compiled backward skipped the kernel"


def check_saved_bytes(op: str, tensors: Mapping[str, torch.Tensor], rows: int) -> None:
    """At most 32 bytes a row and one scalar are kept for backward, beside the inputs."""
    given, kept = leaves(op, tensors), []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        public(op, selfkd)(**given)
    inputs = {x.data_ptr() for x in given.values()}
    own = {x.data_ptr(): x.nbytes for x in kept if x.data_ptr() not in inputs}
    assert sum(own.values()) <= 32 * rows + 8
