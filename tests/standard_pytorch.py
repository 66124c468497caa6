"""The standard tests of what PyTorch sees: operator, compiler, sentences, threads and memory."""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest
import selfkd
import torch
from backends import (
    needs_operators,
    needs_torch_backend,
    public,
    through_torch,
)
from binding import (
    backward_calls,
    check_compile,
    check_operator,
    check_saved_bytes,
    check_threads,
)
from drawing import DTYPES, cast, laid_out, weighted
from loss import Loss, Shape, positions
from selfkd import library
from selfkd.contract import contract
from sentences import implied


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
        names = [name for name in loss.fixed() if name in tensors]
        tensors |= {name: tensors[name].to(DTYPES[fixed]) for name in names}
        each = loss.has("reduction") and reduction == 0
        grad = torch.rand(positions(tensors[first]).shape) if each else torch.tensor(2.0)
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
        for options in loss.options:
            check_threads(loss.op, tensors, options)
        if len(shape) > 2:
            check_threads(loss.op, laid_out(loss.op, tensors, "channels_last"), loss.options[0])

    @needs_torch_backend
    @loss.each_shape("saved")
    def test_memory_for_backward_is_at_most_32_bytes_a_row(
        shape: Shape, generator: torch.Generator
    ) -> None:
        tensors = loss.tensors(shape, generator)
        rows = positions(tensors[contract(loss.op).first]).numel()
        check_saved_bytes(loss.op, tensors, rows=rows)

    return [test_threads, test_memory_for_backward_is_at_most_32_bytes_a_row]
