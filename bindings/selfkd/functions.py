"""Makes two functions of one definition: the public one, which runs an operator, and its reference.

A definition has the name of the operator, the signature and docstring of both functions, and for a body the
formula in differentiable PyTorch. What losses of rows share is written here once: the way of the arguments
to the operator, weights and reduction in the reference, and the paragraphs of the docstring about them.
"""

from __future__ import annotations

import functools
import inspect
import re
import textwrap
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

import torch

from . import arguments, contract, kernels, operators
from .contract import Contract

_P = ParamSpec("_P")
_R = TypeVar("_R")

_OF_ROWS = ("weight", "reduction", "divisor")  # what a formula of rows does not look at


# ---- docstrings ----

_PARAMETERS = {
    "weight": """Weight of each position, or a bool mask: shape of `{first}` without dimension `dim`,
        float32 (float64 with float64 `{first}`) or bool. A position of weight 0 is skipped: value 0 and
        gradient 0, even where its values are NaN.""",
    "reduction": """``"mean"``: sum of the weighted values over the sum of the weights; ``"sum"``;
        ``"none"``: one value for each position.""",
    "divisor": """Denominator of ``"mean"`` in place of the sum of the weights: a positive number or a 0-d
        tensor, such as a token count over all ranks.""",
    "dim": "Dimension of the classes.",
}
_RETURNS = """0-d (``"none"``: shape of `{first}` without dimension `dim`), float32, or float64 for float64
    `{first}`. An empty batch gives nan for ``"mean"`` and 0 for ``"sum"``, as in PyTorch."""
_WRONG_TYPE = "A dtype or device that is not accepted."
_WRONG_VALUE = "A shape or number that is not accepted"
_CONSTANTS = """, or {constants} that requires grad (detach it; in :func:`selfkd.reference.{op}` everything
    learns)"""
_SECOND = """The second derivative (``create_graph=True``) goes through :mod:`selfkd.reference`."""


def _entry(name: str, text: str) -> str:
    """A paragraph under its name."""
    lines = textwrap.wrap(" ".join(text.split()), 92)
    return "\n".join([name, *(f"    {line}" for line in lines)])


def _section(title: str, *entries: str) -> str:
    return "\n".join([title, "-" * len(title), *entries])


def _constants(of: Contract) -> list[str]:
    """The inputs that get no gradient, though they hold numbers with a fraction."""
    live = {item.name for item in contract.contract(f"{of.name}_backward").outputs}
    rules = ("INDEX", "CLASSES", "SEED")
    inputs = [item for item in of.items if item.is_input and item.rule not in rules]
    return [item.name for item in inputs if f"grad_{item.name}" not in live]


def _raises(of: Contract) -> str:
    """The section of errors."""
    value = _WRONG_VALUE
    if constants := [f"`{name}`" for name in _constants(of)]:
        *most, last = constants
        listed = f"{', '.join(most)} or {last}" if most else last
        value += _CONSTANTS.format(constants=f"a {listed}", op=of.name)
    entries = _entry("TypeError", _WRONG_TYPE), _entry("ValueError", f"{value}.")
    return _section("Raises", *entries)


def documented(definition: Callable[..., Any], of: Contract) -> str:
    """The docstring with what operators have in common where it says nothing of its own.

    Those are the parameters of losses of rows, the sections Returns and Raises, and the last of the Notes.
    """
    summary, *sections = re.split(
        r"\n\n(?=[A-Z]\w+\n-{3,}\n)", inspect.getdoc(definition) or definition.__name__
    )
    found = {section.split("\n")[0]: section for section in sections}
    parameters = found.setdefault("Parameters", _section("Parameters"))
    for name in inspect.signature(definition).parameters:
        if name in _PARAMETERS and not re.search(rf"(?m)^(.*, )?{name}(, .*)?$", parameters):
            text = _PARAMETERS[name].format(first=of.first)
            found["Parameters"] += f"\n{_entry(name, text)}"
    if "Returns" not in found:
        text = _RETURNS.format(first=of.first)
        found["Returns"] = _section("Returns", _entry("torch.Tensor", text))
    if "Raises" not in found:
        found["Raises"] = _raises(of)
    if of.name in contract.operators():
        notes = found.get("Notes")
        found["Notes"] = f"{notes}\n\n{_SECOND}" if notes else _section("Notes", _SECOND)
    order = ("Parameters", "Returns", "Raises", "Notes", "Examples")
    return "\n\n".join([summary, *(found[title] for title in order if title in found)]) + "\n"


# ---- functions ----


def _head(signature: inspect.Signature) -> str:
    """The text of the parameters, without their types."""
    parameters = [x.replace(annotation=x.empty) for x in signature.parameters.values()]
    plain = signature.replace(parameters=parameters, return_annotation=signature.empty)
    return str(plain)[1:-1]


def _both(
    definition: Callable[_P, _R],
    of: Contract,
    body: str,
    formula: Callable[..., Any] | None,
    **kept: Any,
) -> Callable[_P, _R]:
    """The public function, whose text is `body`, and as its attribute the reference.

    The reference runs the definition or, where there is one, `formula` on the arguments by name.
    """
    op, signature = definition.__name__, inspect.signature(definition)
    space, head = definition.__globals__, _head(signature)
    given = "{" + ", ".join(f"{name!r}: {name}" for name in signature.parameters) + "}"
    explained = [
        "try:",
        textwrap.indent(body, " "),
        "except Exception as error:",
        f" _explain(error, {op!r}, _parameters, {given})",
        " raise",
    ]
    kept |= {"_explain": arguments.explain, "_parameters": signature.parameters}
    public = kernels.generate(op, head, "\n".join(explained), space, **kept)
    learns: Callable[..., Any] = definition
    if formula is not None:
        learns = kernels.generate(op, head, f"return _run({given})", space, _run=formula)
        functools.update_wrapper(learns, definition)
    functools.update_wrapper(public, definition)
    reference = arguments.public(op, learns=True)(learns)
    public.__doc__ = documented(definition, of)
    reference.__name__ = reference.__qualname__ = "reference"
    reference.__doc__ = (
        f":func:`selfkd.{op}` in plain PyTorch, differentiable any number of times.\n\nSame arguments"
        f" and results; arithmetic in float32, or float64 for a float64 `{of.first}`.\n"
    )
    vars(public)["reference"] = reference
    return public


def reference(function: Callable[_P, _R]) -> Callable[_P, _R]:
    """The reference of a public function."""
    found: Callable[_P, _R] = vars(function)["reference"]
    return found


def operator(function: Callable[..., torch.Tensor]) -> operators.Operator:
    """The operator that a loss of rows runs."""
    found: operators.Operator = vars(function)["operator"]
    return found


def fused(
    run: Callable[..., _R], of: Contract | None = None
) -> Callable[[Callable[_P, _R]], Callable[_P, _R]]:
    """Decorator: the public function is `run`, which takes the same arguments by position.

    The body of the definition is the reference.
    """

    def decorate(definition: Callable[_P, _R]) -> Callable[_P, _R]:
        given = ", ".join(inspect.signature(definition).parameters)
        body, own = f"return _run({given})", of or contract.contract(definition.__name__)
        return _both(definition, own, body, None, _run=run)

    return decorate


def row_loss(
    check: Callable[..., None] | None = None, numbers: Callable[..., tuple[Any, ...]] | None = None
) -> Callable[[Callable[_P, torch.Tensor]], Callable[_P, torch.Tensor]]:
    """Decorator of the definition of a loss of rows, of which the operator's contract says the rest.

    The body returns the value of each row. Its tensors are (N, C, ...), float32 or float64, with the
    classes in dimension 1; it leaves weight, reduction and divisor alone.

    Parameters
    ----------
    check
        Raises what the contract cannot say. It takes all arguments in their order, but for weight,
        reduction and divisor, and is looked up by its name in the definition's module.
    numbers
        Returns its arguments, which are numbers of the definition, with those that None stands for: so
        the operator is given them. The body calls it itself.
    """

    def decorate(definition: Callable[_P, torch.Tensor]) -> Callable[_P, torch.Tensor]:
        loss = _RowLoss(definition, check.__name__ if check else "", numbers)
        call = operators.register(loss.op, lambda **named: loss.reference({**named, "dim": 1}))
        codes = {f"_code_of_{name}": choice for name, choice in loss.choices.items()}
        kept = {"_arguments": arguments, "_call": call, "_numbers": numbers, **codes}
        public = _both(definition, loss.of, loss.text(), loss.reference, **kept)
        vars(public)["operator"] = call
        return public

    return decorate


class _RowLoss:
    """The steps that all losses of rows take, before the operator and before the formula."""

    def __init__(
        self,
        definition: Callable[..., torch.Tensor],
        check: str,
        numbers: Callable[..., tuple[Any, ...]] | None,
    ) -> None:
        self.op, self.formula, self.check = definition.__name__, definition, check
        self.numbers = list(inspect.signature(numbers).parameters) if numbers else []
        self.of = contract.contract(self.op)
        names = inspect.signature(definition).parameters
        wanted = {item.name for item in self.of.items if item.is_input or item.is_number} | {"dim"}
        if missing := sorted(wanted - set(names)):
            raise TypeError(
                f"{self.op}: the definition has no {missing[0]}, expected dim and what its contract names"
            )
        self.checked = [name for name in names if name not in _OF_ROWS]
        inputs = [item for item in self.of.items if item.is_input]
        self.wide = [item.name for item in inputs if item.shape in ("NC*", "NK*")]
        self.listed = [item.name for item in inputs if item.shape == "NK*"]
        self.required = [item.name for item in inputs if item.kind == "IN"]
        self.narrow = [item.name for item in inputs if item.shape == "N*"]
        rules = {item.name: item.rule for item in inputs}
        self.constant = [x for x in self.wide + self.narrow if rules[x] in ("CONSTANT", "TEACHER")]
        self.live = [x for x in self.wide if rules[x] in ("FLOATING", "SAME")]
        choices = [item.name for item in self.of.items if item.choices]
        self.choices = {name: contract.Choice(self.op, name) for name in choices}

    def text(self) -> str:
        """The body of the public function."""
        op, first = repr(self.op), self.wide[0]
        live = self.live
        lines = [f"code_of_{name} = _code_of_{name}({name})" for name in self.choices]
        if self.numbers:
            lines.append(f"{', '.join(self.numbers)} = _numbers({', '.join(self.numbers)})")
        for name in self.constant:
            given = "" if name in self.required else f"{name} is not None and "
            lines.append(f"if {given}{name}.requires_grad:")
            lines.append(f"  _arguments.without_gradient({op}, {name!r}, {name})")
        if len(live) > 1:
            lines.append(f"if not ({' == '.join(f'{name}.dtype' for name in live)}):")
            lines.append(f"  {', '.join(live)} = _arguments.same_dtype({', '.join(live)})")
        lines.append(f"if dim != 1 or {first}.ndim > 3:")
        for name in self.wide:
            lines.append(f"  {name} = _arguments.logits_view({op}, {name!r}, {name}, dim)")
        if self.check:
            lines.append(f"{self.check}({', '.join(self.checked)})")
        for name in self.narrow:
            view = "merged({0}, 1)" if name != "weight" else "weight_view({1}, {0})"
            lines.append(f"if {name} is not None:")
            lines.append(f"  {name} = _arguments.{view.format(name, op)}")
        lines.append("if divisor is not None:")
        lines.append(f"  divisor = _arguments.divisor_tensor({op}, divisor, reduction, {first})")
        codes = {name: f"code_of_{name}" for name in self.choices}
        lines.append(f"return _call({kernels.schema_values(self.of, codes)})")
        return "\n".join(lines)

    def reference(self, given: dict[str, Any]) -> torch.Tensor:
        """The reduced result for arguments by name."""
        for name, choice in self.choices.items():
            choice(given[name])
        first, weight = self.wide[0], given["weight"]
        acc = arguments.accumulator(given[first])
        for name in self.wide:
            x = arguments.classes_first(self.op, name, given[name], given["dim"])
            given[name] = x.to(acc) if x.is_floating_point() else x
        if self.check:
            self.formula.__globals__[self.check](*(given[name] for name in self.checked))
        for name in self.wide[1:]:
            like = given[self.listed[0] if name in self.listed else first]
            shape = torch.Size((*given[first].shape[:1], like.shape[1], *given[first].shape[2:]))
            arguments.expect_shape(self.op, name, given[name], shape)
        for name in self.narrow:
            arguments.expect_shape(self.op, name, given[name], given[first][:, 0].shape)
        if weight is not None:  # what is skipped must not reach the gradient either
            skipped = (weight == 0).unsqueeze(1)
            for name in self.live + self.constant:
                if (x := given[name]) is not None:
                    given[name] = x.masked_fill(skipped if name in self.wide else skipped[:, 0], 1)
        rows = self.formula(**given)
        if weight is not None:
            rows = weight.to(acc) * rows
        return arguments.reduce_rows(rows, weight, given["reduction"], given["divisor"])
