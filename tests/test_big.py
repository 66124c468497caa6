"""Where an index of 32 bits would end: elements far from each other, and more than 2^31 of them."""

from __future__ import annotations

import math
import mmap
import os
from typing import Any

import harness
import pytest
import selfkd
import torch
from selfkd import c, library
from selfkd.contract import contract

MAP_NORESERVE = 0x4000  # Linux; mmap has its name from Python 3.13 on
FAR = 2**31 + 7  # elements
needs_memory = pytest.mark.skipif(
    "SELFKD_BIG" not in os.environ, reason="takes 6 GB and minutes: run `make big`"
)


def sparse(elements: int, dtype: torch.dtype) -> torch.Tensor:
    """Zeros, of which only pages that are written to exist."""
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | MAP_NORESERVE
    return torch.frombuffer(mmap.mmap(-1, elements * dtype.itemsize, flags=flags), dtype=dtype)


def apart(x: torch.Tensor, dimension: int) -> torch.Tensor:
    """The same values, those of one dimension more than 2^31 elements from each other."""
    strides = [1] * x.ndim
    for k in reversed(range(x.ndim)):
        strides[k] = math.prod(x.shape[k + 1 :])
    strides[dimension] = FAR
    far = sparse(FAR * x.shape[dimension], x.dtype).as_strided(x.shape, strides)
    return far.copy_(x)


# Through PyTorch outputs are compact.
C_BACKENDS = [p for p in harness.backends() if getattr(p, "values", [p])[0].lib is not None]
OPERATORS = ("sd_dropout_kl", "distill", "simreg", "attention", "bifpn_fuse", "dropout_views")


def arguments(op: str, dtype: torch.dtype, g: torch.Generator) -> dict[str, torch.Tensor]:
    """Inputs of any operator: 3 samples of 5 classes at 2 x 2 positions."""
    sizes = {"N": 3, "C": 5, "D": 5, "*": (2, 2)} | dict.fromkeys("HWIJKL", 2)
    of, tensors = contract(op), {}
    for item in of.items:
        if not item.is_input or (item.kind == "OPT" and item.name != "target"):
            continue
        shape = [sizes[x] for x in item.shape.removesuffix("*")]
        shape += [2, 2] if item.shape.endswith("*") else []
        index = item.rule in ("INDEX", "SEED")
        tensors[item.name] = (
            torch.randint(5, shape, generator=g)
            if index
            else torch.randn(shape, generator=g, dtype=torch.float64)
        )
    return harness.cast(tensors, op, dtype)


@pytest.mark.parametrize("dimension", [0, 1], ids=["samples", "classes"])
@pytest.mark.parametrize("dtype", ["float16", "float32"])
@pytest.mark.parametrize("op", OPERATORS)
@pytest.mark.parametrize("backend", C_BACKENDS, ids=str)
def test_elements_far_from_each_other(
    backend: harness.Backend, op: str, dtype: str, dimension: int, generator: torch.Generator
) -> None:
    """The same bits for inputs and gradients in any place; an index of 32 bits would leave the memory."""
    if backend.name == "remote":
        pytest.skip("gigabytes are not copied to another process: run without SELFKD_REMOTE")
    near = arguments(op, harness.DTYPES[dtype], generator)
    far = {
        name: apart(x, dimension) if x.ndim >= 2 and name != "target" else x
        for name, x in near.items()
    }
    found = []
    for tensors in (near, far):
        given: dict[str, Any] = dict(tensors)
        for name in (op, f"{op}_backward"):
            of = contract(name)
            numbers = {item.name: item.default for item in of.items if item.is_number}
            if "grad" in [item.name for item in of.items]:
                item = of["grad"]
                like = given[contract(op).outputs[0].name]
                given["grad"] = torch.ones_like(like) if item.shape == "" else like.clone()
            outputs = harness.poisoned_outputs(name, numbers | given)
            for item in of.outputs:
                if tensors is far and item.kind == "LIKE" and item.name in outputs:
                    outputs[item.name] = apart(outputs[item.name], dimension)
            library.check(
                c.run(backend.lib, name, numbers | given | outputs, device=backend.claimed)
            )
            given |= outputs
        found.append([given[item.name] for x in (op, f"{op}_backward") for item in contract(x).outputs
                      if item.name in given])  # fmt: skip
    for one, two in zip(*found, strict=True):
        assert torch.equal(one.nan_to_num(7.0), two.nan_to_num(7.0)), op


@needs_memory
@pytest.mark.parametrize(
    "shape", [(2**20 + 3, 2049), (3, 2**30 + 5), (3, 1031, 2**20 + 3)], ids=str
)
@pytest.mark.parametrize("op", ["simreg", "sd_dropout_kl", "attention"])
def test_more_than_2_31_elements(
    op: str, shape: tuple[int, ...], generator: torch.Generator
) -> None:
    """The last rows of many, of long rows and of large images, and their gradient."""
    count = math.prod(shape)
    assert count > 2**31
    names = [item.name for item in contract(op).items if item.is_input and item.kind == "IN"]
    tensors = {name: sparse(count, torch.float16).view(shape) for name in names}
    for x in tensors.values():
        for part in (x[-1, ..., -2000:], x[0, ..., :2000]):  # in an image of all classes
            part.copy_(torch.randn(part.shape, generator=generator))
    last = {name: x[-1:].clone() for name, x in tensors.items()}
    options: dict[str, Any] = {"dim": 1} if op == "simreg" else {}
    if op != "attention":
        options["reduction"] = "none"
    function = getattr(selfkd, op)
    found, expected = function(**tensors, **options), function(**last, **options)
    if op != "attention":
        assert torch.equal(found[-1:], expected)
        assert expected.abs().max() > 0
        with torch.no_grad():
            ones = function(**tensors, **{**options, "reduction": "sum"})
        torch.testing.assert_close(ones.double(), found.double().sum(), rtol=1e-6, atol=0)
    else:
        assert found.isfinite()
    if op != "simreg":
        return
    grads = []
    for given in (tensors, last):
        live = given["student"].requires_grad_()
        result = function(**given, **options)
        grads.append(torch.autograd.grad(result, live, torch.ones_like(result))[0][-1:].clone())
    assert torch.equal(*grads)
    assert grads[1].abs().max() > 0
