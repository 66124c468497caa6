"""Every module of selfkd.nn in other dtypes and memory formats, averaged, replicated; see samples.py.

Copies, pickles, compilation and resuming are in test_pytorch.py.
"""

from __future__ import annotations

import copy
import importlib
import io
from collections.abc import Callable
from typing import Any

import harness
import pytest
import torch
from samples import MODULES
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel
from torch.utils._pytree import tree_leaves, tree_map_only

pytestmark = pytest.mark.skipif(
    bool(harness.SIMT_LIBRARY), reason="the emulator has no PyTorch binding"
)

each_module = pytest.mark.parametrize("name", MODULES)
LEARNERS = [name for name, sample in MODULES.items() if list(sample.make().parameters())]
# Distance from float32, of results and buffers, and of gradients: these go through batch norms of few
# values, which magnify what was rounded. test_bifpn.py and test_bifpn_seg.py compare with PyTorch's own.
NEAR = {
    torch.float64: (1e-5, 1e-4),
    torch.float16: (0.01, 0.1),
    torch.bfloat16: (0.05, 0.3),
}


def make(name: str) -> nn.Module:
    torch.manual_seed(0)
    module = MODULES[name].make()
    for part in module.modules():  # batch norm magnifies what is rounded behind a weight near 0
        if isinstance(part, nn.Conv2d) and part.groups > 1:
            nn.init.constant_(part.weight, 0.5)
    return module


def run(
    name: str, module: nn.Module, n: int = 8, cast: Callable[[Tensor], Tensor] = lambda x: x
) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """Results; gradients of the first argument and the parameters, of a random projection; buffers.

    `cast` changes what floating tensors the call is given.
    """
    torch.manual_seed(n)
    inputs = tree_map_only(
        Tensor, lambda x: cast(x) if x.is_floating_point() else x, MODULES[name].inputs(n)
    )
    first = [x.requires_grad_() for x in tree_leaves(inputs[0]) if x.is_floating_point()]
    results = [x for x in tree_leaves(MODULES[name].call(module, *inputs)) if isinstance(x, Tensor)]
    torch.manual_seed(n)
    value = sum((x.float() * torch.randn(x.shape)).sum() for x in results)
    live = [*first, *module.parameters()]
    grads = torch.autograd.grad(value, live, allow_unused=True) if live else ()
    buffers = [x.clone() for x in module.buffers() if x.is_floating_point()]
    return [x.detach() for x in results], [x for x in grads if x is not None], buffers


def assert_near(found: Any, expected: Any, near: tuple[float, float]) -> None:
    for *parts, tolerance in zip(found, expected, (near[0], near[1], near[0]), strict=True):
        x, y = (
            torch.cat([x.flatten().double() for x in part] or [torch.zeros(0)]) for part in parts
        )
        assert x.isfinite().all()
        assert (x - y).norm() <= tolerance * y.norm()


def assert_equal(found: Any, expected: Any) -> None:
    pairs = zip(tree_leaves(found), tree_leaves(expected), strict=True)
    assert all(torch.equal(x, y) for x, y in pairs)


@each_module
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("dtype", NEAR, ids=str)
def test_dtype(name: str, training: bool, dtype: torch.dtype) -> None:
    """module.half(), .bfloat16(), .double(): forward, backward and running statistics."""
    module = make(name).train(training)
    narrow = copy.deepcopy(module).to(dtype)
    assert {x.dtype for x in narrow.parameters()} <= {dtype}
    found = run(name, narrow, cast=lambda x: x.to(dtype))
    assert_near(found, run(name, module), NEAR[dtype])


@each_module
@pytest.mark.parametrize("training", [True, False])
def test_channels_last(name: str, training: bool) -> None:
    """module.to(memory_format=torch.channels_last), with maps in that format."""

    def cast(x: Tensor) -> Tensor:
        return x.contiguous(memory_format=torch.channels_last) if x.ndim == 4 else x

    module = make(name).train(training)
    twin = copy.deepcopy(module).to(memory_format=torch.channels_last)
    assert_near(run(name, twin, cast=cast), run(name, module), NEAR[torch.float64])


@each_module
def test_autocast(name: str) -> None:
    module = make(name)
    twin = copy.deepcopy(module)
    with torch.autocast("cpu", torch.bfloat16):
        found = run(name, twin)
    assert_near(found, run(name, module), NEAR[torch.bfloat16])


@each_module
def test_state_dict(name: str) -> None:
    """Saved in use, read by weights_only and loaded strictly into another module."""
    module = make(name)
    run(name, module)
    file = io.BytesIO()
    torch.save(module.state_dict(), file)
    file.seek(0)
    torch.manual_seed(1)
    other = MODULES[name].make()
    other.load_state_dict(torch.load(file, weights_only=True), strict=True)
    assert_equal(run(name, other, 7), run(name, module, 7))


@pytest.mark.parametrize("name", LEARNERS)
def test_averaged(name: str) -> None:
    """torch.optim.swa_utils.AveragedModel: the mean of two states, which runs as any module."""
    module = make(name)
    averaged = AveragedModel(module)
    averaged.update_parameters(module)
    twin = copy.deepcopy(module)
    with torch.no_grad():
        for y in twin.parameters():
            y.add_(torch.rand_like(y))
    averaged.update_parameters(twin)
    with torch.no_grad():
        for x, y in zip(module.parameters(), twin.parameters(), strict=True):
            x.copy_((x + y) / 2)
    assert_near(run(name, averaged.module), run(name, module), NEAR[torch.float64])


@each_module
def test_replicas(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As DataParallel replicates a module, whose parameters are then plain attributes of the replicas.

    Each gives what the module gives, and the gradients of both add up in the module's parameters.
    DataParallel runs on GPUs only; here its replicate() copies on the CPU.
    """

    def copies(tensors: Any, devices: Any, detach: bool = False) -> list[list[Tensor]]:
        return [[x.detach().clone() if detach else x.clone() for x in tensors] for _ in devices]

    replicate = importlib.import_module("torch.nn.parallel.replicate")
    monkeypatch.setattr(replicate, "_get_device_index", lambda device, optional: device)
    monkeypatch.setattr(replicate, "_broadcast_coalesced_reshape", copies)
    module = make(name)

    def value(of: nn.Module, n: int) -> Tensor:
        torch.manual_seed(n)
        results = tree_leaves(MODULES[name].call(of, *MODULES[name].inputs(n)))
        found: Any = sum(x.float().sin().sum() for x in results if isinstance(x, Tensor))
        return found

    expected = [value(copy.deepcopy(module), n) for n in (6, 7)]
    twins = [copy.deepcopy(module) for _ in range(2)]
    learns = expected[0].requires_grad
    for n, twin in zip((6, 7), twins, strict=True):
        if learns:
            value(twin, n).backward()
    replicas = replicate.replicate(module, ["cpu", "cpu"])
    found = [value(replica, n) for n, replica in zip((6, 7), replicas, strict=True)]
    assert_equal([x.detach() for x in found], [x.detach() for x in expected])
    assert not any(list(replica.parameters()) for replica in replicas)
    if learns:
        torch.stack(found).sum().backward()
        for x, *both in zip(module.parameters(), *(x.parameters() for x in twins), strict=True):
            assert (x.grad is None) == (both[0].grad is None)
            if x.grad is not None:
                torch.testing.assert_close(x.grad, both[0].grad + both[1].grad)


@each_module
def test_data_parallel_without_a_gpu(name: str) -> None:
    """There it passes calls on, and names gain a prefix."""
    module = make(name)
    wrapped = nn.DataParallel(copy.deepcopy(module), device_ids=[])
    assert wrapped.state_dict().keys() == {f"module.{key}" for key in module.state_dict()}
    if MODULES[name].compiles:  # its call is the module's
        assert_equal(run(name, wrapped), run(name, module))
