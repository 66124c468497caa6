"""Every check that each operator gets. An operator's test module names its cases; the checks are here.

A case is run on a back end (PyTorch on a CPU variant or on CUDA, the C interface, or the CUDA
kernels emulated on the CPU) in a dtype and a layout, forward and backward, and compared with the
float64 reference on the same rounded inputs.
"""

from __future__ import annotations

import importlib
import os
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache, partial
from typing import Any

import pytest
import selfkd
import torch
from remote import COMMAND as REMOTE
from remote import remote
from selfkd import c, library, operators
from selfkd.contract import contract

DTYPES = {
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "float64": torch.float64,
}
HALF_ULP = {
    torch.float16: 2.0**-11,
    torch.bfloat16: 2.0**-8,
    torch.float32: 2.0**-24,
    torch.float64: 2.0**-53,
}
HALF_SMALLEST = {
    torch.float16: 2.0**-25,
    torch.bfloat16: 2.0**-134,
    torch.float32: 2.0**-150,
    torch.float64: 0.0,
}
SIMT_LIBRARY = os.environ.get("SELFKD_SIMT_LIBRARY", "")
needs_operators = pytest.mark.skipif(
    not library.library().selfkd_register_torch(b"selfkd"),
    reason="of torch.ops.selfkd, which PyTorch older than 2.8 has not: run under 2.8 or newer",
)


@dataclass(frozen=True)
class Case:
    """Named after its user: `make` draws the tensors in float64, `options` are the numbers of the call.

    close: all log-ratios are below 1e-2, where a gradient error of 1e-4 is allowed.
    exact: how far the float64 reference itself (the textbook formula) can be trusted.
    one_hot: rows of probability 1, where the gradient of two that agree is nothing but the rounding
    of large logits: it is measured against a tenth of the tensor's largest.
    per_sample: gradients are measured against the largest of their sample, not of their row.
    big: too slow for the emulator.
    contiguous: its size decides something in that layout only.
    """

    name: str
    make: Callable[[torch.Generator], dict[str, torch.Tensor]]
    options: Mapping[str, Any] = field(default_factory=dict)
    close: bool = False
    exact: float = 1e-12
    one_hot: bool = False
    per_sample: bool = False
    big: bool = False
    contiguous: bool = False

    def __str__(self) -> str:
        return self.name


ORDINARY = Case("ordinary", lambda g: {})


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


# ---- layouts: the same values under other strides ----


def channels_last(x: torch.Tensor) -> torch.Tensor:
    """Classes contiguous, positions strided."""
    return x.movedim(1, -1).contiguous().movedim(-1, 1)


def every_other(x: torch.Tensor) -> torch.Tensor:
    """Classes at a stride of 2, in a larger block."""
    wide = torch.full(
        (*x.shape[:1], 2 * x.shape[1], *x.shape[2:]), torch.nan, dtype=x.dtype, device=x.device
    )
    wide[:, ::2] = x
    return wide[:, ::2]


def unaligned(x: torch.Tensor) -> torch.Tensor:
    """One element into an allocation, so that no row begins on a vector boundary."""
    block = torch.empty(x.numel() + 1, dtype=x.dtype, device=x.device)
    view = block[1:].view(x.shape)
    return view.copy_(x)


LAYOUTS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "contiguous": lambda x: x,
    "channels_last": channels_last,
    "every_other": every_other,
    "unaligned": unaligned,
}


# ---- the comparison ----

REMEMBERED: deque[Any] = deque(maxlen=2)  # both reductions of a case: the next back end asks again


def epsilon(dtype: torch.dtype) -> float:
    """Rounding unit of the arithmetic for tensors of `dtype`."""
    return 2.0**-53 if dtype == torch.float64 else 2.0**-24


def assert_values(
    found: torch.Tensor, expected: torch.Tensor, what: str, case: Case = ORDINARY
) -> None:
    """3e-6 relative, `exact` in float64, beside the square of the rounding unit; nan and inf must agree."""
    tolerance = case.exact if found.dtype == torch.float64 else 3e-6
    floor = epsilon(found.dtype) if case.one_hot else 1000 * epsilon(found.dtype) ** 2
    found, expected = found.double().cpu(), expected.double().cpu()
    finite = expected.isfinite()
    assert torch.equal(
        found[~finite].nan_to_num(7.0, 8.0, 9.0), expected[~finite].nan_to_num(7.0, 8.0, 9.0)
    ), what
    error = ((found - expected).abs() - floor)[finite] / expected.abs()[finite].clamp(min=1e-300)
    worst = error.max().item() if error.numel() else 0.0
    assert worst <= tolerance, f"{what}: relative error {worst:.2e} exceeds {tolerance:.0e}"


def assert_gradient(
    found: torch.Tensor,
    expected: torch.Tensor,
    what: str,
    case: Case = ORDINARY,
) -> None:
    """Error over the row's largest gradient, beside half an ULP; a row of zeros (of the reference: of
    its rounding) to 32 roundings."""
    dtype = found.dtype
    tolerance = case.exact if dtype == torch.float64 else 1e-4 if case.close else 1e-5
    found, expected = found.double().cpu(), expected.double().cpu()
    assert found.isfinite().all(), f"{what}: not finite"
    size = expected.abs()
    error = (found - expected).abs_().sub_(size, alpha=HALF_ULP[dtype]).sub_(HALF_SMALLEST[dtype])
    row = list(range(1, expected.ndim if case.per_sample else 2))
    largest = size.amax(row, True)
    if case.one_hot:
        largest = largest.clamp(min=0.1 * largest.max().item())
    scale = torch.where(largest < 1e-15, 32 * epsilon(dtype) / tolerance, largest)
    worst = (error.amax(row, True) / scale).max().item() if error.numel() else 0.0
    assert worst <= tolerance, (
        f"{what}: error {worst:.2e} of the row's largest gradient exceeds {tolerance:.0e}"
    )


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Equal tensors, NaN and the sign of 0 included; floating point is float64."""
    if a.dtype == b.dtype == torch.float64:
        a, b = a.view(torch.int64), b.view(torch.int64)
    return a.dtype == b.dtype and torch.equal(a, b)


def reference(
    op: str,
    tensors: Mapping[str, torch.Tensor],
    options: Mapping[str, Any],
    grad: torch.Tensor | None = None,
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Result and gradients of the float64 reference; not computed again for the last two inputs."""
    given = dict(tensors) if grad is None else {**tensors, "grad": grad}
    wide = {
        name: x.detach().to("cpu", torch.float64 if x.is_floating_point() else x.dtype, copy=True)
        for name, x in given.items()
    }
    call = (op, dict(options), list(wide))
    for known, inputs, answer in REMEMBERED:
        if known == call and all(same_bits(inputs[name], wide[name]) for name in wide):
            return answer
    REMEMBERED.append((call, wide, differentiate(op, wide, options)))
    return REMEMBERED[-1][-1]


def differentiate(
    op: str, inputs: Mapping[str, torch.Tensor], options: Mapping[str, Any]
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Result and gradients of the reference for float64 inputs, `grad` perhaps among them."""
    wide = {name: x for name, x in inputs.items() if name != "grad"}
    names = live_inputs(op, wide)
    live = [wide[name].detach().requires_grad_() for name in names]
    wide |= dict(zip(names, live, strict=True))
    result = public(op, selfkd.reference)(**wide, **options)
    if not result.requires_grad:  # all weights are 0
        return result, {name: torch.zeros_like(wide[name]) for name in names}
    out = inputs.get("grad", torch.ones_like(result))
    grads = torch.autograd.grad(result, live, out, allow_unused=True, materialize_grads=True)
    return result.detach(), dict(zip(names, grads, strict=True))


def cast(
    tensors: Mapping[str, torch.Tensor], op: str, dtype: torch.dtype, device: str = "cpu"
) -> dict[str, Any]:
    """Inputs in the dtypes of the contract for logits of `dtype`."""
    acc = torch.float64 if dtype == torch.float64 else torch.float32
    rules = {item.name: item.rule for item in contract(op).items if item.is_input}
    stored = ("FLOATING", "SAME", "CONSTANT", "TEACHER")
    to = {name: dtype if rules.get(name, "SAME") in stored else acc for name in tensors}
    return {
        name: x.to(device, to[name]) if x.is_floating_point() else x.to(device)
        for name, x in tensors.items()
    }


def reductions(op: str, case: Case) -> list[dict[str, Any]]:
    """The case's own reduction and "none"; a loss that has no choice is called as it is."""
    if not any(item.name == "reduction" for item in contract(op).items):
        return [{}]
    own = case.options.get("reduction", "mean")
    return [{"reduction": name} for name in dict.fromkeys([own, "none"])]


def check_tensors(
    op: str, case: Case, backend: Backend, tensors: Mapping[str, torch.Tensor]
) -> None:
    """Loss, every row, and all gradients of one case, whatever the dtypes and strides of its tensors."""
    if "grad" in tensors:
        check_map(op, case, backend, tensors)
        return
    for reduction in reductions(op, case):
        options = {**case.options, **reduction}
        if reduction.get("reduction") == "none":
            tensors = {name: x for name, x in tensors.items() if name != "divisor"}
        expected, expected_grads = reference(op, tensors, options)
        found, grads = backend.call(op, tensors, options)
        assert_values(found, expected, f"{op} {options}", case)
        for name in live_inputs(op, tensors):
            assert grads[name].stride() == torch.empty_like(tensors[name]).stride()
            what = f"gradient of {name}, {options}"
            assert_gradient(grads[name], expected_grads[name], what, case)
            if "weight" in tensors:
                assert (grads[name].movedim(1, -1)[tensors["weight"] == 0] == 0).all()


def assert_map(found: torch.Tensor, expected: torch.Tensor, what: str, case: Case) -> None:
    """Each plane is a row, as those of a matrix are; in a small one everything may cancel, so that a
    tenth of the map's largest is what its error is measured against at least."""
    planes = (x.flatten(2).flatten(0, 1) if x.ndim > 2 else x for x in (found, expected))
    assert_gradient(*planes, what, replace(case, one_hot=True))


def assert_sums(
    found: torch.Tensor, expected: torch.Tensor, terms: torch.Tensor, what: str
) -> None:
    """Sums over a whole map, measured against the sum of their absolute terms."""
    tolerance = 1e-12 if found.dtype == torch.float64 else 1e-5
    error = (found.double().cpu() - expected).abs() / terms.abs().sum().clamp(min=1e-300)
    assert error.max() <= tolerance, f"{what}: error {error.max():.2e} of its terms"


def check_map(op: str, case: Case, backend: Backend, tensors: Mapping[str, torch.Tensor]) -> None:
    """A result that is a map, and all gradients, for the incoming gradient among the tensors."""
    inputs = {name: x for name, x in tensors.items() if name != "grad"}
    expected, expected_grads = reference(op, inputs, case.options, tensors["grad"])
    found, grads = backend.call(op, inputs, case.options, tensors["grad"])
    first = inputs[contract(op).first]
    like = first if contract(op).outputs[0].kind == "LIKE" else expected
    assert found.dtype == first.dtype
    assert found.stride() == torch.empty_like(like).stride()
    assert_map(found, expected, op, case)
    for name, wanted in expected_grads.items():
        assert grads[name].stride() == torch.empty_like(inputs[name]).stride()
        if wanted.ndim == 1:
            terms = tensors["grad"].double().cpu() * expected
            assert_sums(grads[name], wanted, terms, f"gradient of {name}")
        else:
            assert_map(grads[name], wanted, f"gradient of {name}", case)


def check_case(
    op: str,
    case: Case,
    backend: Backend,
    dtype: str,
    layout: str,
    generator: torch.Generator,
    path: str = "",
) -> None:
    """Loss, every row, and all gradients of one case; and that the loop named `path` ran."""
    prepare(backend)
    tensors = cast(case.make(generator), op, DTYPES[dtype], backend.device)
    inputs = [item for item in contract(op).items if item.is_input]
    rows = [item.name for item in inputs if item.shape[:2] in ("NC", "ND")]
    tensors |= {name: LAYOUTS[layout](tensors[name]) for name in rows if name in tensors}
    check_tensors(op, case, backend, tensors)
    if backend.variant and path:
        variant = "f64" if dtype == "float64" else backend.variant
        assert library.text("selfkd_last_path") == f"cpu {variant} {path}"


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


# ---- what PyTorch must see: the binding is the same for every operator ----


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
    dtypes = {"F64": torch.float64, "INDEX": torch.int64, "SEED": torch.int64}
    found: dict[str, Any] = {}
    for item in contract(op).items:
        if item.is_number:
            found[item.name] = item.default
        elif item.is_input:
            shape = [int(sizes.get(letter, letter)) for letter in item.shape.removesuffix("*")]
            found[item.name] = torch.zeros(shape, dtype=dtypes.get(item.rule, torch.float32))
    return found


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
