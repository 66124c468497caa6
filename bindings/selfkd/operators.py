"""Call of every operator, derived from its contract. Names no operator."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from . import arguments, kernels, library
from . import contract as contracts
from .contract import Contract, contract
from .gradients import Plan, tuple_getter
from .kernels import (
    any_requires_grad,
    as_tuple,
    below_autograd,
    by_name,
    call,
    kernel,
    refuse_transforms,
    transforms_are_active,
)


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
        self.get = tuple_getter([k for k, *_ in self.rules])
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
    plan, run = Plan(of, reference), kernel(op)
    fixed = [x.name for x in of.items if x.is_input and x.name not in plan.live]

    def autograd(*values: Any) -> tuple[torch.Tensor, ...]:
        refuse_transforms(op, values)
        if torch.is_grad_enabled() and any_requires_grad(*values):
            named = by_name(of, values)
            for name in fixed:
                arguments.without_gradient(op, name, named[name])
            node = plan.node(values)
            return node.function.apply(True, values, *node.get_live(values))  # type: ignore[no-any-return]
        with below_autograd():
            return run(*values)  # type: ignore[no-any-return]

    if not (registry := kernels.registry()):
        return Operator(plan, autograd, names or {})
    registry.impl(op, autograd, "Autograd")  # type: ignore[no-untyped-call]
    return Operator(plan, run, names or {})


class Operator:
    """An operator as Python functions call it: with all arguments, in the schema's order."""

    def __init__(self, plan: Plan, run: Callable[..., Any], names: Mapping[str, str]) -> None:
        of = plan.of
        self._of, self._plan, self._run, self._names = of, plan, run, names
        self._call = call(of.name)
        self._numbers = Numbers(of, of.torch_arguments, names)

    def __call__(self, *values: Any) -> torch.Tensor:
        """The result: ``rows`` for reduction "none", else the first output."""
        values = self._numbers(values)
        try:
            # In eager mode straight to the gradient's node, or to the kernels: half the dispatch of
            # `_run`, which the compiler needs.
            if torch.compiler.is_compiling() or transforms_are_active():
                outputs = self._run(*values)
            elif torch.is_grad_enabled() and any_requires_grad(*values):
                node = self._plan.node(values)
                return node.apply(False, values, *node.get_live(values))  # type: ignore[no-any-return]
            else:
                with below_autograd():
                    outputs = self._call(*values)
            return as_tuple(outputs)[self._plan.result(values)]
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
