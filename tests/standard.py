"""The tests that every loss of rows has: `standard_tests` makes them for an operator."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import selfkd
import torch
from backends import (
    Backend,
    backends,
    live_inputs,
    needs_operators,
    needs_torch_backend,
    prepare,
    public,
    through_torch,
)
from binding import (
    backward_calls,
    check_compile,
    check_double_backward,
    check_operator,
    check_saved_bytes,
    check_threads,
)
from comparison import assert_gradient, assert_values, check_case, check_tensors, reference
from drawing import DTYPES, Case, Make, cast, laid_out, rows_of, weighted
from selfkd import library
from selfkd.contract import contract
from sentences import implied

NAN, INF = torch.nan, torch.inf
Shape = tuple[int, ...]
Tests = dict[str, Callable[..., None]]
on_back_ends = pytest.mark.parametrize("backend", backends(), ids=str)
in_dtypes = pytest.mark.parametrize("dtype", DTYPES)
# Rows shorter than a vector, than a chunk and longer; maps that are and are not whole vectors.
SHAPES: Mapping[str, Sequence[Shape]] = {
    "strides": [(5, 100), (3, 1100), (2, 21, 6, 7)],
    "mixed": [(9, 100), (3, 1101), (3, 4096), (33, 8), (2, 40, 3, 3)],
    "equal": [(7, 100), (2, 2500), (1, 40, 9, 11)],
    "grad": [(6, 40), (2, 9, 3, 5)],
    "slopes": [(3, 5), (2, 3, 4)],
    "double": [(4, 6), (2, 3, 6)],
    "opcheck": [(4, 6), (2, 3, 4, 5)],
    "compile": [(6,), (3, 6)],
    "threads": [(300, 500), (20, 8192), (20, 8, 300)],
    "saved": [(64, 1000), (4, 64, 16, 16)],
}


@dataclass(frozen=True)
class Loss:
    """A loss of rows, as its tests know it.

    draw: `draw(*shape)` makes what draws its tensors but for weight and divisor.
    rows, maps: the cases; those of maps have positions and run in both orders of memory.
    path: the name of the CPU's loop, or what gives it of a case and a layout; "" is any.
    options: calls that differ in what is computed; the first of them is also compiled.
    slopes: those whose gradients are the slopes of the result, all of `options` unless given.
    zero: those that are exactly 0, with their gradients, for rows that are equal.
    excludes: -inf is a value of a row: a class that is left out.
    per_sample: as in Case, in float64 and for tensors whose dtypes differ.
    shapes: of a test in `SHAPES` those that stand in for the usual ones.
    """

    op: str
    draw: Callable[..., Make]
    rows: Sequence[Any] = ()
    maps: Sequence[Any] = ()
    path: str | Callable[[Case, str], str] = ""
    options: Sequence[Mapping[str, Any]] = ({},)
    slopes: Sequence[Mapping[str, Any]] | None = None
    zero: Sequence[Mapping[str, Any]] | None = None
    excludes: bool = False
    per_sample: bool = False
    shapes: Mapping[str, Sequence[Shape]] = field(default_factory=dict)

    def has(self, name: str) -> bool:
        """Whether the contract has an argument of that name."""
        return any(item.name == name for item in contract(self.op).items)

    def fixed(self) -> list[str]:
        """The inputs whose dtype is their own."""
        return [x.name for x in contract(self.op).items if x.rule in ("CONSTANT", "TEACHER")]

    def reductions(self) -> list[dict[str, Any]]:
        """A call for each way to reduce, of which "none" has gradients of its own."""
        return [{"reduction": x} for x in ("mean", "none")] if self.has("reduction") else [{}]

    def tensors(
        self, shape: Shape, g: torch.Generator, dtype: str = "float32", device: str = "cpu"
    ) -> dict[str, Any]:
        """Stored in a dtype, without weights."""
        return cast(self.draw(*shape)(g), self.op, DTYPES[dtype], device)

    def with_weight(self, tensors: dict[str, Any], g: torch.Generator) -> dict[str, Any]:
        """With weights > 0, if the loss has some."""
        if not self.has("weight"):
            return tensors
        first = tensors[contract(self.op).first]
        acc = torch.float64 if first.dtype == torch.float64 else torch.float32
        weight = torch.rand(first[:, 0].shape, generator=g, dtype=torch.float64)
        return {**tensors, "weight": weight.to(first.device, acc)}

    def each_shape(self, of: str) -> Any:
        """The parameter `shape` of a test."""
        return pytest.mark.parametrize("shape", self.shapes.get(of, SHAPES[of]), ids=str)

    def judge(self, dtype: str = "float64") -> Case:
        """By which bounds tensors of a dtype are compared."""
        return Case("drawn", self.draw(1, 1), per_sample=self.per_sample and dtype == "float64")


def named(options: Mapping[str, Any]) -> str:
    """What a call is called in the name of a test."""
    return ",".join(f"{name}={value}" for name, value in options.items()) or "usual"


def each_call(options: Sequence[Mapping[str, Any]]) -> Any:
    """The parameter `options` of a test."""
    return pytest.mark.parametrize("options", options, ids=named)


def standard_tests(
    op: str, draw: Callable[..., Make], rows: Sequence[Any] = (), **more: Any
) -> Tests:
    """The tests of a loss of rows by their names, for `globals().update(...)` in its module.

    A test of the same name that the module defines below takes the place of one of these. The
    arguments are those of `Loss`.
    """
    loss = Loss(op, draw, rows, **more)
    return {
        test.__name__: test
        for tests in (of_values, of_rows, of_gradients, of_pytorch, of_resources)
        for test in tests(loss)
    }


def of_values(loss: Loss) -> list[Callable[..., None]]:
    """Its cases, and tensors of any strides and dtypes."""
    op = loss.op

    def check(case: Case, *how: Any) -> None:
        backend, dtype, layout, generator = how
        path = loss.path if isinstance(loss.path, str) else loss.path(case, layout)
        case = replace(case, per_sample=case.per_sample or loss.judge(dtype).per_sample)
        check_case(op, case, backend, dtype, layout, generator, path=path)

    @in_dtypes
    @pytest.mark.parametrize("case", loss.rows, ids=str)
    @on_back_ends
    def test_rows(backend: Backend, case: Case, dtype: str, generator: torch.Generator) -> None:
        check(case, backend, dtype, "contiguous", generator)

    @in_dtypes
    @pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
    @pytest.mark.parametrize("case", loss.maps, ids=str)
    @on_back_ends
    def test_maps(
        backend: Backend, case: Case, layout: str, dtype: str, generator: torch.Generator
    ) -> None:
        check(case, backend, dtype, layout, generator)

    @in_dtypes
    @pytest.mark.parametrize("layout", ["every_other", "unaligned"])
    @loss.each_shape("strides")
    @on_back_ends
    def test_strides(
        backend: Backend, shape: Shape, layout: str, dtype: str, generator: torch.Generator
    ) -> None:
        check(Case("strides", loss.draw(*shape)), backend, dtype, layout, generator)

    @pytest.mark.parametrize("fixed", DTYPES)
    @in_dtypes
    @loss.each_shape("mixed")
    @on_back_ends
    def test_a_dtype_and_layout_of_its_own(
        backend: Backend, shape: Shape, dtype: str, fixed: str, generator: torch.Generator
    ) -> None:
        """Of what does not learn; the arithmetic is that of what does."""
        prepare(backend)
        tensors = loss.tensors(shape, generator, dtype, backend.device)
        tensors |= {name: tensors[name].to(DTYPES[fixed]) for name in loss.fixed()}
        case = loss.judge()
        for other in rows_of(op) if len(shape) > 2 else ["none"]:
            last = (
                {other: laid_out(op, tensors, "channels_last")[other]} if other in tensors else {}
            )
            check_tensors(op, case, backend, tensors | last)

    found = [test_strides]
    found += [test_rows] if loss.rows else []
    found += [test_maps] if loss.maps else []
    return found + ([test_a_dtype_and_layout_of_its_own] if loss.fixed() else [])


def by_rows(x: torch.Tensor) -> torch.Tensor:
    """A view of the rows of (N, C) or of the positions of (1, C, S)."""
    return x if x.ndim == 2 else x[0].T


def of_rows(loss: Loss) -> list[Callable[..., None]]:
    """Rows that are equal, spoilt, skipped or not there."""
    op, rows = loss.op, rows_of(loss.op)

    @in_dtypes
    @each_call(loss.options if loss.zero is None else loss.zero)
    @loss.each_shape("equal")
    @on_back_ends
    def test_equal_rows_give_exactly_zero(
        backend: Backend,
        shape: Shape,
        options: Mapping[str, Any],
        dtype: str,
        generator: torch.Generator,
    ) -> None:
        prepare(backend)
        x = 30 * torch.randn(shape, generator=generator)
        if loss.excludes:
            x[:, 1] = -INF
        x = x.to(backend.device, DTYPES[dtype])
        for layout in ("contiguous", "channels_last", "unaligned"):
            tensors = laid_out(op, {name: x.clone() for name in rows}, layout)
            result, grads = backend.call(op, tensors, options)
            assert result == 0
            assert all((grad == 0).all() for grad in grads.values())

    @pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16"])
    @each_call(loss.options)
    @pytest.mark.parametrize("shape", [(8, 50), (1, 50, 8), (8, 1500)], ids=str)
    @on_back_ends
    def test_non_finite_rows_stay_alone(
        backend: Backend,
        shape: Shape,
        options: Mapping[str, Any],
        dtype: str,
        generator: torch.Generator,
    ) -> None:
        """Rows 1 to 5 are spoilt, each in its way; all are what the reference says."""
        prepare(backend)
        tensors = loss.tensors(shape, generator, dtype, backend.device)
        first, last = (by_rows(tensors[name]) for name in (rows[0], rows[-1]))
        first[1, 3], last[2, -1], first[3, 5], last[4, 0], last[5] = NAN, NAN, INF, -INF, NAN
        options = {**options, "reduction": "none"}
        expected, expected_grads = reference(op, tensors, options)
        found, grads = backend.call(op, tensors, options)
        assert_values(found, expected, "rows")
        kept = expected.flatten().isfinite()
        assert kept[[0, 6, 7]].all()
        assert not kept[[1, 2, 3, 5]].any()
        assert loss.excludes or not kept[4]
        for name, grad in grads.items():
            spoilt = [k for k in (1, 2, 3, 4, 5) if not kept[k]]
            assert not by_rows(grad)[spoilt].isfinite().all(1).any()
            exact = by_rows(expected_grads[name])[kept]
            assert_gradient(by_rows(grad)[kept.to(grad.device)], exact, f"gradient of {name}")

    @on_back_ends
    def test_empty_batch(backend: Backend, generator: torch.Generator) -> None:
        """A mean over nothing is nan, as in PyTorch."""
        prepare(backend)
        for shape in [(0, 10), (0, 10, 4), (3, 10, 0)]:
            tensors = loss.tensors(shape, generator, device=backend.device)
            tensors = laid_out(op, tensors, "every_other")
            results = {}
            for reduction in ("mean", "sum", "none") if loss.has("reduction") else ("mean",):
                options = {"reduction": reduction} if loss.has("reduction") else {}
                results[reduction], grads = backend.call(op, tensors, options)
                for name, grad in grads.items():
                    assert grad.shape == tensors[name].shape
                    assert grad.stride() == torch.empty_like(tensors[name]).stride()
                assert_values(results[reduction], reference(op, tensors, options)[0], reduction)
            assert results["mean"].isnan()
            assert results.get("sum", 0) == 0
            if "none" in results:
                assert results["none"].shape == (shape[0], *shape[2:])

    @on_back_ends
    def test_everything_masked(backend: Backend, generator: torch.Generator) -> None:
        prepare(backend)
        tensors = loss.tensors((4, 10), generator, device=backend.device)
        tensors["weight"] = torch.zeros(4, dtype=torch.bool, device=backend.device)
        assert backend.call(op, tensors, {"reduction": "mean"})[0].isnan()
        result, grads = backend.call(op, tensors, {"reduction": "sum"})
        assert result == 0
        assert all((grad == 0).all() for grad in grads.values())

    found = [test_empty_batch]
    if loss.zero is None or loss.zero:
        found.append(test_equal_rows_give_exactly_zero)
    if loss.has("rows"):
        found.append(test_non_finite_rows_stay_alone)
    return found + ([test_everything_masked] if loss.has("weight") else [])


def of_gradients(loss: Loss) -> list[Callable[..., None]]:
    """Incoming gradients, and gradients of gradients."""
    op = loss.op
    slopes = loss.options if loss.slopes is None else loss.slopes

    @pytest.mark.parametrize("dtype", ["float32", "float64"])
    @on_back_ends
    def test_incoming_gradient(backend: Backend, dtype: str, generator: torch.Generator) -> None:
        """One for each row, where nothing is reduced."""
        prepare(backend)
        for shape in loss.shapes.get("grad", SHAPES["grad"]):
            make = loss.draw(*shape)
            make = weighted(make) if loss.has("weight") else make
            tensors = cast(make(generator), op, DTYPES[dtype], backend.device)
            sizes = (shape[0], *shape[2:]) if loss.has("rows") else ()
            grad = torch.randn(sizes, generator=generator, dtype=DTYPES[dtype]).to(backend.device)
            for layout in ("contiguous", "channels_last"):
                tensors = laid_out(op, tensors, layout)
                options = loss.reductions()[-1]
                _, expected = reference(op, tensors, options, grad)
                _, found = backend.call(op, tensors, options, grad)
                for name in found:
                    assert_gradient(found[name], expected[name], name, loss.judge(dtype))

    @needs_torch_backend
    @each_call(slopes)
    @pytest.mark.parametrize("reduction", loss.reductions(), ids=named)
    @loss.each_shape("slopes")
    def test_gradcheck(
        shape: Shape,
        reduction: dict[str, Any],
        options: Mapping[str, Any],
        generator: torch.Generator,
    ) -> None:
        tensors = loss.with_weight(loss.tensors(shape, generator, "float64"), generator)
        names = live_inputs(op, tensors)
        live = [tensors.pop(name).requires_grad_() for name in names]

        def call(*given: torch.Tensor) -> Any:
            named = dict(zip(names, given, strict=True))
            return public(op, selfkd)(**named, **tensors, **options, **reduction)

        assert torch.autograd.gradcheck(call, live)
        assert torch.autograd.gradgradcheck(call, live)

    @needs_torch_backend
    @each_call([*loss.options, *loss.reductions()[1:]])
    @loss.each_shape("double")
    def test_double_backward_agrees_with_kernel_and_reference(
        shape: Shape, options: Mapping[str, Any], generator: torch.Generator
    ) -> None:
        tensors = loss.draw(*shape)(generator)
        check_double_backward(op, tensors, options)
        if loss.has("weight"):
            check_double_backward(op, loss.with_weight(tensors, generator), options)

    return [
        test_incoming_gradient,
        test_gradcheck,
        test_double_backward_agrees_with_kernel_and_reference,
    ]


def of_pytorch(loss: Loss) -> list[Callable[..., None]]:
    """The registered operator, the compiler, and sentences."""
    op, first = loss.op, contract(loss.op).first

    @needs_torch_backend
    @needs_operators
    @pytest.mark.parametrize("reduction", range(len(loss.reductions())))
    @pytest.mark.parametrize("fixed", ["float32", "float16"] if loss.fixed() else ["float32"])
    @loss.each_shape("opcheck")
    def test_opcheck(shape: Shape, fixed: str, reduction: int, generator: torch.Generator) -> None:
        tensors = loss.with_weight(loss.tensors(shape, generator), generator)
        tensors |= {name: tensors[name].to(DTYPES[fixed]) for name in loss.fixed()}
        each = loss.has("reduction") and reduction == 0
        grad = torch.rand(tensors[first][:, 0].shape) if each else torch.tensor(2.0)
        options = {"reduction": reduction} if loss.has("reduction") else {}
        check_operator(op, tensors, options, grad)

    @needs_torch_backend
    @needs_operators
    @pytest.mark.parametrize("dynamic", [False, True])
    @loss.each_shape("compile")
    def test_compile(shape: Shape, dynamic: bool, generator: torch.Generator) -> None:
        batches = [
            loss.with_weight(loss.tensors((n, *shape), generator), generator) for n in (4, 7)
        ]
        divisor = {"divisor": 4.0} if loss.has("divisor") else {}
        check_compile(op, batches, {**loss.options[0], **divisor}, dynamic)

    g = torch.Generator()
    given = [loss.with_weight(loss.tensors(x, g), g) for x in ((4, 6), (4, 6, 5, 7))]
    wrong = {sentence: (x, bad) for x in given for sentence, bad in implied(op, x).items()}

    @needs_torch_backend
    @pytest.mark.parametrize("sentence", wrong)
    def test_sentences_of_the_contract(sentence: str) -> None:
        tensors, (error, arguments) = wrong[sentence]
        for requires_grad in (False, True):
            named = {**tensors, **arguments}
            if named[first].is_floating_point():
                named[first] = named[first].detach().requires_grad_(requires_grad)
            with pytest.raises(error, match=f"^{re.escape(sentence)}"):
                public(op, selfkd)(**named)

    @needs_torch_backend
    def test_path_and_kernel_ran(generator: torch.Generator) -> None:
        before = backward_calls(op)
        through_torch(op, loss.tensors((3, 5), generator), {})
        assert backward_calls(op) == before + 1
        path = loss.path if isinstance(loss.path, str) else ""
        assert library.text("selfkd_last_path").endswith(path)

    return [test_opcheck, test_compile, test_sentences_of_the_contract, test_path_and_kernel_ran]


def of_resources(loss: Loss) -> list[Callable[..., None]]:
    """Threads, and memory for backward."""

    @needs_torch_backend
    @loss.each_shape("threads")
    def test_threads(shape: Shape, generator: torch.Generator) -> None:
        make = weighted(loss.draw(*shape)) if loss.has("weight") else loss.draw(*shape)
        tensors = cast(make(generator), loss.op, torch.float32)
        check_threads(loss.op, tensors, {})
        if len(shape) > 2:
            check_threads(loss.op, laid_out(loss.op, tensors, "channels_last"), {})

    @needs_torch_backend
    @loss.each_shape("saved")
    def test_memory_for_backward_is_at_most_32_bytes_a_row(
        shape: Shape, generator: torch.Generator
    ) -> None:
        tensors = loss.tensors(shape, generator)
        rows = tensors[contract(loss.op).first][:, 0].numel()
        check_saved_bytes(loss.op, tensors, rows=rows)

    return [test_threads, test_memory_for_backward_is_at_most_32_bytes_a_row]
