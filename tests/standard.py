"""The tests that every loss of rows has: `standard_tests` makes them for an operator."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import pytest
import selfkd
import torch
from backends import (
    Backend,
    live_inputs,
    needs_torch_backend,
    prepare,
    public,
)
from binding import (
    check_double_backward,
)
from comparison import assert_gradient, assert_values, check_case, check_tensors, reference
from drawing import DTYPES, Case, Make, cast, laid_out, rows_of, weighted
from loss import SHAPES, Loss, Shape, each_call, in_dtypes, named, on_back_ends
from standard_pytorch import of_pytorch, of_resources

NAN, INF = torch.nan, torch.inf
Tests = dict[str, Callable[..., None]]


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
        names = [name for name in loss.fixed() if name in tensors]
        tensors |= {name: tensors[name].to(DTYPES[fixed]) for name in names}
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
