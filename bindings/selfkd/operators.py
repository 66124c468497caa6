"""Gradient and call of every operator, derived from its contract. Names no operator.

The gradient is derived from the contract of ``<op>_backward``: an argument named like an input or
an output of the forward operator is that tensor, GRAD is the gradient of the result, and
``grad_<input>`` is what it returns.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from operator import itemgetter
from typing import Any

import torch

from . import arguments, kernels, library
from . import contract as contracts
from .contract import Contract, contract
from .kernels import any_requires_grad, as_tuple, below_autograd, by_name, kernel, refuse_transforms


def _tuple_getter(positions: Sequence[int]) -> Callable[[Sequence[Any]], tuple[Any, ...]]:
    """operator.itemgetter that gives a tuple for any number of positions."""
    if len(positions) > 1:
        return itemgetter(*positions)
    return lambda values: tuple(values[k] for k in positions)


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


class _Plan:
    """Where the arguments of a backward operator come from, worked out once from the two contracts."""

    def __init__(self, forward: Contract) -> None:
        self.forward = forward
        backward = contract(f"{forward.name}_backward")
        inputs = {name: k for k, name in enumerate(forward.torch_arguments)}
        outputs = {item.name: k for k, item in enumerate(forward.outputs)}
        tensors = [item.name for item in forward.items if item.is_input]
        kept = [item.name for item in backward.items if item.kind == "IN" and item.name in outputs]
        numbers = [name for name in inputs if name not in tensors]
        grad = next(item for item in backward.items if item.kind == "GRAD")
        self.inputs = inputs
        self.grad_merges = grad.shape.endswith("*")
        self.live = [item.name.removeprefix("grad_") for item in backward.outputs]
        self.get_live = _tuple_getter([inputs[name] for name in self.live])
        self.get_tensors = _tuple_getter([inputs[name] for name in tensors])
        self.get_kept = _tuple_getter([outputs[name] for name in kept])
        self.get_numbers = _tuple_getter([inputs[name] for name in numbers])
        # Backward has (grad, saved tensors, numbers) at hand, in this order, then the defaults of the
        # numbers that it alone has, then which gradients are needed; `restore` gives the forward
        # arguments back from those between.
        own = [item for item in backward.items if item.is_number and item.name not in inputs]
        needs = [f"needs_{name}" for name in self.live]
        own.sort(key=lambda item: item.name in needs)
        self.defaults = tuple(item.default for item in own if item.name not in needs)
        self.get_needs = _tuple_getter(
            [needs.index(item.name) + 2 for item in own if item.name in needs]
        )
        source = [grad.name, *tensors, *kept, *numbers, *(item.name for item in own)]
        self.get_backward = _tuple_getter([source.index(name) for name in backward.torch_arguments])
        self.restore = [(source.index(name) - 1, name) for name in inputs]
        self.rows = outputs.get("rows", 0)
        self.reduction = inputs.get("reduction")
        self.flags = [
            numbers.index(f"has_{x}") if f"has_{x}" in inputs else None for x in self.live
        ]

    def given(self, numbers: Sequence[Any]) -> list[tuple[str, int]]:
        """The inputs with a gradient, but absent OPT tensors, and their gradients' positions."""
        return [
            (name, k)
            for k, (name, flag) in enumerate(zip(self.live, self.flags, strict=True))
            if flag is None or numbers[flag]
        ]

    def result(self, values: Sequence[Any]) -> int:
        """Position of the output with the gradient: rows where nothing is reduced, else the first."""
        return self.rows if self.reduction is not None and values[self.reduction] == 0 else 0


def _double_backward(
    plan: _Plan, reference: Callable[..., torch.Tensor], ctx: Any, grad: torch.Tensor
) -> list[torch.Tensor | None]:
    """The gradient as a differentiable PyTorch graph."""
    values = ctx.saved_tensors + ctx.numbers
    live = [name for name, _ in plan.given(ctx.numbers)]
    named = by_name(plan.forward, tuple(values[k] for k, _ in plan.restore))
    with torch.enable_grad():
        for name in live:  # an alias each: the same tensor may be given twice
            named[name] = named[name].view_as(named[name])
        for item in plan.forward.items:
            if item.choices:
                named[item.name] = item.choices[named[item.name]]
        result = reference(**named)
    if not result.requires_grad:  # all weights are 0
        return [torch.zeros_like(named[name]) if name in live else None for name in plan.live]
    wanted = [name for name in live if named[name].requires_grad]
    grads = torch.autograd.grad(
        result,
        [named[name] for name in wanted],
        grad,
        create_graph=True,
        allow_unused=True,
        materialize_grads=True,
    )
    found = dict(zip(wanted, grads, strict=True))
    return [found.get(name) for name in plan.live]


def _gradient(plan: _Plan, reference: Callable[..., torch.Tensor]) -> type[torch.autograd.Function]:
    """The autograd.Function of an operator: its backward operator; for a graph, `reference`."""
    run, run_backward = kernel(plan.forward.name), kernel(f"{plan.forward.name}_backward")
    unused = (None,) * (len(plan.live) + 2)

    class Gradient(torch.autograd.Function):
        @staticmethod
        def forward(
            ctx: Any, whole: bool, values: tuple[Any, ...], *live: torch.Tensor
        ) -> torch.Tensor | tuple[torch.Tensor, ...]:
            """All outputs of the operator if `whole`, else the result alone.

            `values` are its arguments; those that learn come again, as PyTorch looks for them among the
            arguments of the node, and each of those costs time.
            """
            with below_autograd():
                outputs = as_tuple(run(*values))
            result = plan.result(values)
            ctx.result = result if whole else 0
            ctx.numbers = plan.get_numbers(values)
            ctx.save_for_backward(*savable(plan.get_tensors(values)), *plan.get_kept(outputs))
            ctx.set_materialize_grads(False)
            if not whole:
                return outputs[result]
            ctx.mark_non_differentiable(*outputs[:result], *outputs[result + 1 :])
            return outputs if len(outputs) > 1 else outputs[0]

        @staticmethod
        def backward(ctx: Any, *grads: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
            grad = grads[ctx.result]
            if grad is None:
                return unused
            if torch.is_grad_enabled():
                found: Sequence[torch.Tensor | None] = _double_backward(plan, reference, ctx, grad)
            else:
                if plan.grad_merges and grad.ndim > 2:
                    grad = grad.contiguous()  # its trailing dimensions must merge
                needs = plan.get_needs(ctx.needs_input_grad)
                values = (grad, *ctx.saved_tensors, *ctx.numbers, *plan.defaults, *needs)
                found = as_tuple(run_backward(*plan.get_backward(values)))
            result: list[torch.Tensor | None] = list(unused)
            for _, k in plan.given(ctx.numbers):  # what stands for an absent OPT tensor may learn
                if ctx.needs_input_grad[k + 2]:
                    result[k + 2] = found[k]
            return tuple(result)

    return type(plan.forward.name, (Gradient,), {})  # a backward node is named after its class


class Numbers:
    """Makes Python numbers and flags of what callers give for them among values in an order.

    `names` are those of the public function, where they differ from the contract's.
    """

    def __init__(self, of: Contract, order: Sequence[str], names: Mapping[str, str]) -> None:
        rules = {"REAL": arguments.number, "INT": arguments.integer, "BOOL": arguments.flag}
        self.rules = [
            (order.index(x.name), names.get(x.name, x.name), rules[x.kind])
            for x in of.items
            if x.kind in rules
        ]
        self.op = of.name
        self.get = _tuple_getter([k for k, *_ in self.rules])
        self.plain: set[tuple[type, ...]] = set()  # types that stay what they are

    def __call__(self, values: tuple[Any, ...]) -> tuple[Any, ...]:
        """The values with such numbers; the same tuple where they are so already."""
        if torch.compiler.is_compiling():  # here every value is looked at
            return self.made(values)
        types = tuple(map(type, self.get(values)))
        if types in self.plain:
            return values
        found = self.made(values)
        if tuple(map(type, self.get(found))) == types:
            self.plain.add(types)
        return found

    def made(self, values: tuple[Any, ...]) -> tuple[Any, ...]:
        """The values with each number and flag made anew."""
        found = list(values)
        for k, name, rule in self.rules:
            found[k] = rule(self.op, name, values[k])
        return tuple(found)


def _hint(of: Contract, named: Mapping[str, Any], sentence: str) -> str:
    """What to write instead, where that can be said."""
    first = named[of.first]
    about = re.match(rf"{of.name}: (\w+) has", sentence)
    if not about or not isinstance(x := named.get(about[1]), torch.Tensor):
        return ""
    name, rule, classes = about[1], of[about[1]].rule, first.shape[1] if first.ndim > 1 else 0
    tokens = first.ndim > 2 and x.shape == first.shape[:-1] and "C" in of[of.first].shape
    if rule == "INDEX" and x.is_floating_point():
        return f"classes from probabilities or one-hot rows: {name}.argmax(1)"
    if tokens and rule in ("INDEX", "WEIGHT"):
        return "classes in the last dimension: dim=-1"
    if x.ndim == first.ndim and x.ndim > 1 and x.shape[1] == 1 and rule in ("INDEX", "WEIGHT"):
        return f"{name}.squeeze(1)"
    if rule == "WEIGHT" and x.shape == (classes,) and first.shape[:1] != x.shape:
        return (
            "it weights positions; weights of classes: F.cross_entropy(logits, target, weight) in"
            " place of the cross-entropy here"
        )
    if "has dtype" in sentence and not x.is_complex():
        if rule == "INDEX":
            return f"{name}.long()"
        if rule == "WEIGHT":
            return (
                f"{name}.bool() for a mask, {name}.to({arguments.accumulator(first)}) for weights"
            )
        if rule == "SAME":
            return f"{name}.to({first.dtype})"
    return ""


def register(
    op: str, reference: Callable[..., torch.Tensor], names: Mapping[str, str] | None = None
) -> Operator:
    """Register fake kernels and gradient of an operator, and return the function that calls it.

    Parameters
    ----------
    op
        Name of the operator; ``<op>_backward`` goes with it.
    reference
        The same loss in differentiable PyTorch, with the operator's argument names as keywords:
        used for double backward.
    names
        Arguments of the operator that the public function calls otherwise.

    Returns
    -------
    Operator
        Where the operator raises RuntimeError for an argument, it raises ValueError or TypeError
        with the same sentence.
    """
    of = contract(op)
    for name in (op, f"{op}_backward"):
        kernels.register_fake(name)
    plan = _Plan(of)
    gradient = _gradient(plan, reference)
    run = kernel(op)

    fixed = [x.name for x in of.items if x.is_input and x.name not in plan.live]

    def autograd(*values: Any) -> tuple[torch.Tensor, ...]:
        refuse_transforms(op, values)
        if torch.is_grad_enabled() and any_requires_grad(*values):
            named = by_name(of, values)
            for name in fixed:
                arguments.without_gradient(op, name, named[name])
            return gradient.apply(True, values, *plan.get_live(values))  # type: ignore[no-any-return, no-untyped-call]
        with below_autograd():
            return run(*values)  # type: ignore[no-any-return]

    if not (registry := kernels.registry()):
        return Operator(of, plan, gradient, autograd, names or {})
    registry.impl(op, autograd, "Autograd")  # type: ignore[no-untyped-call]
    return Operator(of, plan, gradient, run, names or {})


class Operator:
    """An operator as Python functions call it: with all arguments, in the schema's order."""

    def __init__(
        self,
        of: Contract,
        plan: _Plan,
        gradient: type[torch.autograd.Function],
        run: Callable[..., Any],
        names: Mapping[str, str],
    ) -> None:
        self._of, self._plan, self._gradient, self._run = of, plan, gradient, run
        self._names, self._numbers = names, Numbers(of, of.torch_arguments, names)

    def __call__(self, *values: Any) -> torch.Tensor:
        """The result: ``rows`` for reduction "none", else the first output."""
        values = self._numbers(values)
        try:
            # In eager mode straight to the gradient's node: half the dispatch of `_run`, which the
            # compiler needs.
            if (
                torch.is_grad_enabled()
                and not torch.compiler.is_compiling()
                and any_requires_grad(*values)
            ):
                live = self._plan.get_live(values)
                return self._gradient.apply(False, values, *live)  # type: ignore[no-any-return, no-untyped-call]
            return as_tuple(self._run(*values))[self._plan.result(values)]
        except (RuntimeError, TypeError, ValueError) as error:
            self._explain(error, values)
            raise

    def outputs(self, *values: Any) -> tuple[torch.Tensor, ...]:
        """All outputs; only the result has a gradient."""
        values = self._numbers(values)
        try:
            return as_tuple(self._run(*values))
        except (RuntimeError, TypeError, ValueError) as error:
            self._explain(error, values)
            raise

    def _explain(self, error: Exception, values: tuple[Any, ...]) -> None:
        """Raise ValueError or TypeError with the operator's sentence if it is about an argument."""
        refuse_transforms(self._of.name, values)
        named = by_name(self._of, values)
        given = [named[item.name] for item in self._of.items if item.is_input]
        if not all(x is None or isinstance(x, torch.Tensor) for x in given):
            return
        try:
            contracts.check(self._of, named)
        except (TypeError, ValueError) as mistake:
            hint = _hint(self._of, named, str(mistake))
            sentence = f"{mistake}; {hint}" if hint else str(mistake)
            raise type(mistake)(self._in_public(sentence)) from None
        sentence = library.text("selfkd_message")
        if sentence and sentence in str(error):  # about a value, which only the kernel sees
            raise ValueError(self._in_public(sentence)) from None

    def _in_public(self, sentence: str) -> str:
        """The sentence with the public function's name of the argument that it is about."""
        op, name, rest = re.match(r"(\w+: )(\w+)(.*)", sentence, re.DOTALL).groups()  # type: ignore[union-attr]
        return f"{op}{self._names.get(name, name)}{rest}"
