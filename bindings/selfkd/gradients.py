"""Gradient of every operator, derived from its contract. Names no operator.

The gradient is derived from the contract of ``<op>_backward``: an argument named like an input or
an output of the forward operator is that tensor, GRAD is the gradient of the result, and
``grad_<input>`` is what it returns.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from operator import itemgetter
from typing import Any

import torch

from .contract import Contract, contract
from .kernels import below_autograd, call, generate


def tuple_getter(positions: Sequence[int]) -> Callable[[Sequence[Any]], tuple[Any, ...]]:
    """operator.itemgetter that gives a tuple for any number of positions."""
    if len(positions) > 1:
        return itemgetter(*positions)
    return lambda values: tuple(values[k] for k in positions)


def _listed(names: Sequence[str]) -> str:
    """The text of a tuple."""
    return "".join(f"{name}, " for name in names)


def _keep_uncounted(x: torch.Tensor) -> None:
    """Tell the compiler, which is tracing, to keep an input for backward whose versions nobody counts.

    So it keeps what is stored in a context, from PyTorch 2.13 on. Whether the tensors of a later call are
    inference tensors, which have no version, cannot be known while tracing.
    """
    from torch.fx.experimental import proxy_tensor

    for proxy in getattr(proxy_tensor, "_get_proxies", lambda x: ())(x):
        node = proxy.node
        while True:
            node.meta["saved_tensor_with_no_vc_check"] = True
            if not getattr(node.target, "is_view", False):
                break
            node = node.args[0]  # the compiler may keep what it is a view of


def _alias(x: torch.Tensor) -> torch.Tensor:
    """An ordinary tensor of the memory of an inference tensor."""
    alias = torch.empty(0, dtype=x.dtype, device=x.device)
    return alias.set_(x.untyped_storage(), x.storage_offset(), x.shape, x.stride())


def savable(tensors: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    """The tensors for ``save_for_backward``, which refuses those made under ``torch.inference_mode()``.

    They are saved as ordinary tensors of the same memory.
    """
    if torch.compiler.is_compiling():
        for x in tensors:
            if not x.requires_grad:
                _keep_uncounted(x)
        return tensors
    for x in tensors:
        if x.is_inference():
            return tuple(_alias(x) if x.is_inference() else x for x in tensors)
    return tensors


class Plan:
    """Makes the autograd.Function of an operator, one for each choice of the OPT tensors of a call."""

    def __init__(self, of: Contract, reference: Callable[..., torch.Tensor]) -> None:
        self.of, self.reference = of, reference
        order, outputs = of.torch_arguments, [item.name for item in of.outputs]
        backward = contract(f"{of.name}_backward")
        self.live = [item.name.removeprefix("grad_") for item in backward.outputs]
        self.options = [item.name for item in of.items if item.kind == "OPT"]
        self.get_given = tuple_getter([order.index(f"has_{name}") for name in self.options])
        self.reduction = order.index("reduction") if "reduction" in order else None
        self.rows = outputs.index("rows") if "rows" in outputs else 0
        self.nodes: dict[tuple[bool, ...], Node] = {}

    def result(self, values: Sequence[Any]) -> int:
        """Position of the output with the gradient: rows where nothing is reduced, else the first."""
        return self.rows if self.reduction is not None and values[self.reduction] == 0 else 0

    def node(self, values: tuple[Any, ...]) -> Node:
        """What a call's gradient needs, by the OPT tensors that it gives."""
        given = self.get_given(values)
        if given not in self.nodes:
            self.nodes[given] = Node(self, dict(zip(self.options, given, strict=True)))
        return self.nodes[given]


class Node:
    """The autograd.Function of an operator where some OPT tensors are given and others are not.

    Its methods are text, made once: so a call names its values, and looks for none of them.

    Attributes
    ----------
    function
        Takes ``whole, values, *live``: all outputs are returned if `whole`, else the result alone.
        `values` are the arguments; those that learn, `live`, come again, as PyTorch looks for them among
        the arguments of the node, and each of those costs time.
    apply
        ``function.apply`` without its search for the wrappers of torch.func, which are refused earlier.
    get_live
        Finds `live` among the values.
    """

    def __init__(self, plan: Plan, given: Mapping[str, bool]) -> None:
        self.plan, self.given, of = plan, given, plan.of
        self.backward = contract(f"{of.name}_backward")
        inputs = [item.name for item in of.items if item.is_input and given.get(item.name, True)]
        taken = [item.name for item in self.backward.items if item.kind == "IN"]
        self.live = [name for name in plan.live if name in inputs]
        self.fixed = [name for name in inputs if name not in self.live]
        self.outputs = [item.name for item in of.outputs]
        self.kept = [name for name in self.outputs if name in taken]
        self.numbers = [item.name for item in of.items if item.is_number]
        self.get_live = tuple_getter([of.torch_arguments.index(name) for name in self.live])
        known: dict[str, Any] = {
            "_below": below_autograd,
            "_learning": torch.is_grad_enabled,
            "_run": call(of.name),
            "_run_backward": call(self.backward.name),
            "_savable": savable,
            "_twice": self.twice,
        }
        methods = {
            "forward": generate("forward", "ctx, whole, values, *live", self.of_forward(), **known),
            "backward": generate("backward", "ctx, *grads", self.of_backward(), **known),
        }
        members = {name: staticmethod(method) for name, method in methods.items()}
        self.function: Any = type(of.name, (torch.autograd.Function,), members)  # names the node
        whole: Any = super(torch.autograd.Function, self.function)
        self.apply: Callable[..., Any] = whole.apply

    def of_forward(self) -> str:
        """The body of ``forward``."""
        # Tensors of inference mode learn nothing, so that the only one that may learn is none.
        sure = self.live if len(self.live) == 1 else []
        others = [name for name in (*self.live, *self.fixed) if name not in sure]
        saved = [*sure, *([f"*_savable(({_listed(others)}))"] if others else []), *self.kept]
        result = f"{self.plan.rows} if reduction == 0 else 0" if self.plan.rows else "0"
        return f"""\
with _below():
  outputs = _run(*values)
{"outputs = outputs," if len(self.outputs) == 1 else ""}
{_listed(self.plan.of.torch_arguments)} = values
{_listed(self.outputs)} = outputs
result = {result}
ctx.result = result if whole else 0
ctx.numbers = {_listed(self.numbers) or "()"}
ctx.save_for_backward({_listed(saved)})
ctx.set_materialize_grads(False)
if not whole:
  return outputs[result]
ctx.mark_non_differentiable(*outputs[:result], *outputs[result + 1:])
return {"outputs" if len(self.outputs) > 1 else "outputs[0]"}"""

    def of_backward(self) -> str:
        """The body of ``backward``."""
        found = [f"grad_{name}" for name in self.plan.live]
        given = [f"grad_{name} if needs_{name} else None" for name in self.live]
        grad = next(item for item in self.backward.items if item.kind == "GRAD")
        merges = grad.shape.endswith("*")  # its trailing dimensions must merge
        return f"""\
{grad.name} = grads[ctx.result]
if {grad.name} is None:
  return None, None{", None" * len(self.live)}
if _learning():
  return _twice(ctx, {grad.name})
{f"if {grad.name}.ndim > 2: {grad.name} = {grad.name}.contiguous()" if merges else ""}
{_listed([*self.live, *self.fixed, *self.kept])} = ctx.saved_tensors
{f"{_listed(self.numbers)} = ctx.numbers" if self.numbers else ""}
_, _, {_listed([f"needs_{name}" for name in self.live])} = ctx.needs_input_grad
{_listed(found) if len(found) > 1 else found[0]} = _run_backward({self.arguments()})
return None, None, {_listed(given)}"""

    def arguments(self) -> str:
        """The arguments of the backward operator."""
        absent = {name for name, is_given in self.given.items() if not is_given}
        needs = {f"needs_{name}" for name in self.live}
        found = []
        for item in self.backward.items:
            if item.is_input:
                found.append(self.plan.of.first if item.name in absent else item.name)
            if item.kind == "OPT":
                found.append(str(item.name not in absent))
            if item.is_number:
                own = item.name not in self.numbers and item.name not in needs
                found.append(repr(item.default) if own else item.name)
        return ", ".join(found)

    def twice(self, ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """The gradient as a differentiable PyTorch graph."""
        tensors = dict(zip([*self.live, *self.fixed], ctx.saved_tensors, strict=False))
        named: dict[str, Any] = dict.fromkeys(self.plan.options) | tensors
        named |= zip(self.numbers, ctx.numbers, strict=True)
        with torch.enable_grad():
            for name in self.live:  # an alias each: the same tensor may be given twice
                named[name] = tensors[name].view_as(tensors[name])
            for item in self.plan.of.items:
                if item.choices:
                    named[item.name] = item.choices[named[item.name]]
            result = self.plan.reference(**named)
        if not result.requires_grad:  # all weights are 0
            return None, None, *(torch.zeros_like(named[name]) for name in self.live)
        wanted = [name for name in self.live if named[name].requires_grad]
        grads = torch.autograd.grad(
            result,
            [named[name] for name in wanted],
            grad,
            create_graph=True,
            allow_unused=True,
            materialize_grads=True,
        )
        found = dict(zip(wanted, grads, strict=True))
        return None, None, *(found.get(name) for name in self.live)
