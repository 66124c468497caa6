"""A case on a back end beside the float64 reference on the same rounded inputs."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import selfkd
import torch
from backends import Backend, live_inputs, prepare, public
from drawing import DTYPES, HALF_SMALLEST, HALF_ULP, ORDINARY, Case, cast, epsilon, laid_out
from selfkd import library
from selfkd.contract import contract

REMEMBERED: deque[Any] = deque(maxlen=2)  # both reductions of a case: the next back end asks again


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
    tensors = laid_out(op, tensors, layout)
    check_tensors(op, case, backend, tensors)
    if backend.variant and path:
        variant = "f64" if dtype == "float64" else backend.variant
        assert library.text("selfkd_last_path") == f"cpu {variant} {path}"
