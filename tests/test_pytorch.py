"""What every operator and every module must do under PyTorch; docs/pytorch.md has the table."""

from __future__ import annotations

import copy
import importlib
import io
import pickle
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import harness
import pytest
import samples
import selfkd
import torch
from samples import CALLS, MODULES, total
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader

pytestmark = pytest.mark.skipif(
    bool(harness.SIMT_LIBRARY), reason="of PyTorch on the CPU: run without SELFKD_SIMT_LIBRARY"
)
each_operator = pytest.mark.parametrize("op", selfkd.contract.modules())
MODULE_NAMES = [
    name for name in selfkd.nn.__all__ if hasattr(getattr(selfkd.nn, name), "state_dict")
]
each_module = pytest.mark.parametrize("name", MODULE_NAMES)


def equal(found: Any, expected: Any) -> bool:
    return all(torch.equal(x, y) for x, y in zip(found, expected, strict=True))


@pytest.fixture
def one_seed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The head's masks are always the same ones: PyTorch's generator cannot be set for one thread."""
    head = importlib.import_module("selfkd.sd_dropout_head")
    monkeypatch.setattr(head, "_seed", lambda x, _: torch.full((), 7, device=x.device))


def test_everything_has_a_sample() -> None:
    assert set(CALLS) == set(selfkd.contract.modules())
    assert set(MODULES) == set(MODULE_NAMES)


# ---- operators ----


class Calls(torch.nn.Module):
    """The samples of some operators, one after the other."""

    def __init__(self, *ops: str) -> None:
        super().__init__()
        self.ops = ops

    def forward(self, given: list[list[Tensor]]) -> list[Tensor]:
        pairs = zip(self.ops, given, strict=True)
        return [CALLS[op].call(getattr(selfkd, op), *tensors) for op, tensors in pairs]


def batch(n: int, *ops: str) -> list[list[Tensor]]:
    torch.manual_seed(n)
    drawn = [CALLS[op].tensors(n) for op in ops]
    return [[x.detach() for x in (*live, *fixed)] for live, fixed in drawn]


def batch_dimension(*ops: str) -> Any:
    """The dimensions that change with n, as torch.export wants them."""
    n = torch.export.Dim("n", min=2, max=1000)
    shapes = [
        [
            {k: n for k in range(x.ndim) if x.shape[k] != y.shape[k]}
            for x, y in zip(*two, strict=True)
        ]
        for two in zip(batch(6, *ops), batch(7, *ops), strict=True)
    ]
    return (shapes,)


@harness.needs_operators
@each_operator
def test_exported(op: str) -> None:
    """One program for batches of any size, through a file; the operator is in it as one node."""
    program = torch.export.export(Calls(op), (batch(6, op),), dynamic_shapes=batch_dimension(op))
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    program = torch.export.load(file)
    assert f"torch.ops.selfkd.{op}.default" in program.graph_module.code
    for n in (6, 11):
        given = batch(n, op)
        torch.manual_seed(n)
        found = program.module()(given)
        torch.manual_seed(n)
        assert equal(found, Calls(op)(given))


@harness.needs_operators
@pytest.mark.parametrize("space", [selfkd, selfkd.reference], ids=["fused", "reference"])
@each_operator
def test_on_the_meta_device(op: str, space: Any) -> None:
    """Shapes and dtypes without values, forward and backward: of a model under torch.device("meta")."""
    with torch.device("meta"):
        live, fixed = CALLS[op].tensors(6, "meta")
        live = [x.detach().requires_grad_() for x in live]
        result = CALLS[op].call(getattr(space, op), *live, *fixed)
    grads = torch.autograd.grad(total(result), live)
    expected = CALLS[op].call(getattr(space, op), *(x for y in CALLS[op].tensors(6) for x in y))
    assert (result.device.type, result.shape, result.dtype) == (
        "meta",
        expected.shape,
        expected.dtype,
    )
    assert [x.shape for x in grads] == [x.shape for x in live]


LOAD = """
import sys, torch
import torch._inductor.codecache  # PyTorch 2.10 needs it and does not load it
package, data = sys.argv[1:]
try:
    torch._inductor.aoti_load_package(package)
    raise SystemExit("no error")
except RuntimeError as error:
    assert "Could not find schema for selfkd::" in str(error), error
import selfkd
given, expected = torch.load(data)
torch.testing.assert_close(torch._inductor.aoti_load_package(package)(given), expected)
"""


@harness.needs_operators
def test_ahead_of_time_compiled(tmp_path: Path, one_seed: None) -> None:
    """A package of all operators; the process that loads it must import selfkd, and PyTorch says so."""
    ops = selfkd.contract.modules()
    package, data = str(tmp_path / "model.pt2"), tmp_path / "data.pt"
    torch._inductor.aoti_compile_and_package(
        torch.export.export(Calls(*ops), (batch(6, *ops),), dynamic_shapes=batch_dimension(*ops)),
        package_path=package,
        inductor_configs={"aot_inductor.compile_wrapper_opt_level": "O0"},  # half the time
    )
    given = batch(11, *ops)
    torch.save((given, Calls(*ops)(given)), data)
    command = [sys.executable, "-c", LOAD, package, str(data)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr


@each_operator
@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointed(op: str, reentrant: bool) -> None:
    """Computed again in backward: the same bits."""
    expected = samples.run(op)

    def part(*tensors: Tensor) -> Tensor:
        return CALLS[op].call(getattr(selfkd, op), *tensors)

    torch.manual_seed(6)
    live, fixed = CALLS[op].tensors(6)
    result = checkpoint(part, *live, *fixed, use_reentrant=reentrant)
    total(result).backward()
    assert equal([result.detach(), *(x.grad for x in live)], expected)


@each_operator
def test_deterministic_mode(op: str) -> None:
    """Nothing refuses, and memory filled with NaN where PyTorch allocates it is all written."""
    expected = samples.run(op)
    torch.use_deterministic_algorithms(True)
    try:
        assert equal(samples.run(op), expected)
    finally:
        torch.use_deterministic_algorithms(False)


@each_operator
def test_derivatives_of_torch_func(op: str, one_seed: None) -> None:
    """They raise a sentence, in place of a derivative of 0; and what it names works."""
    torch.manual_seed(6)
    live, fixed = CALLS[op].tensors(6)
    x, *others = [x.detach() for x in (*live, *fixed)]

    def loss(x: Tensor, space: Any = selfkd) -> Tensor:
        return total(CALLS[op].call(getattr(space, op), x, *others))

    def reference(x: Tensor) -> Tensor:
        return loss(x, selfkd.reference)

    def forward_mode(f: Any, x: Tensor) -> Any:
        with forward_ad.dual_level():
            return forward_ad.unpack_dual(f(forward_ad.make_dual(x, x))).tangent

    gradient = samples.run(op)[1]
    for transform in (
        lambda f: torch.func.grad(f)(x),
        lambda f: torch.func.vmap(torch.func.grad(f))(x[None])[0],
        lambda f: torch.func.grad(lambda x: torch.func.vmap(f)(x[None])[0])(x),
        lambda f: torch.func.jvp(f, (x,), (x,))[1],
        lambda f: forward_mode(f, x),
        lambda f: forward_mode(f, x.clone().requires_grad_()),
    ):
        with pytest.raises(RuntimeError, match=f"{op} has no .* selfkd.reference.{op} has both"):
            transform(loss)
        found = transform(reference)
        torch.testing.assert_close(found, (gradient * x).sum() if found.ndim == 0 else gradient)


@harness.needs_operators
@each_operator
def test_vmap_of_values(op: str, one_seed: None) -> None:
    """Without gradients: sample by sample, which is what PyTorch does without a rule."""
    torch.manual_seed(6)
    drawn = [[*live, *fixed] for live, fixed in (CALLS[op].tensors(6) for _ in range(3))]
    drawn = [[x.detach() for x in tensors] for tensors in drawn]

    def call(*tensors: Tensor) -> Tensor:
        return CALLS[op].call(getattr(selfkd, op), *tensors)

    found = torch.func.vmap(call)(*(torch.stack(x) for x in zip(*drawn, strict=True)))
    assert equal(found, [call(*tensors) for tensors in drawn])


@harness.needs_operators
@each_operator
def test_batched_gradients(op: str, one_seed: None) -> None:
    """Several incoming gradients at once, as for a Jacobian."""
    torch.manual_seed(6)
    live, fixed = CALLS[op].tensors(6)
    result = CALLS[op].call(getattr(selfkd, op), *live, *fixed)
    incoming = torch.randn(3, *result.shape)
    expected = [torch.autograd.grad(result, live, x, retain_graph=True) for x in incoming]
    found = torch.autograd.grad(result, live, incoming, is_grads_batched=True)
    assert equal(found, [torch.stack(x) for x in zip(*expected, strict=True)])


MANY = 5000  # rows that are shared out among threads


@pytest.fixture
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


class Worker(torch.utils.data.Dataset[list[Tensor]]):
    def __len__(self) -> int:
        return len(CALLS)

    def __getitem__(self, k: int) -> list[Tensor]:
        return samples.run(list(CALLS)[k], MANY)


# Calls whose gradients are not 0 where both inputs are the same tensor.
TWICE: dict[str, Any] = {
    "bifpn_fuse": lambda f, x: f(x, x, weight=torch.tensor([1.0, 3.0], dtype=x.dtype)).square(),
    "sd_dropout_kl": lambda f, x: f(x, x, detach_target=True),
}


@pytest.mark.parametrize("op", TWICE)
def test_one_tensor_given_twice(op: str) -> None:
    """Its gradient counts both, once each; so do gradients of gradients, made of a graph anew."""
    found = []
    x = torch.randn(2, 3, 4, 4, dtype=torch.float64, requires_grad=True)
    for space in (selfkd, selfkd.reference):
        result = TWICE[op](getattr(space, op), x)
        (grad,) = torch.autograd.grad(result.sum(), x, create_graph=True)
        second = torch.autograd.grad(grad.square().sum() + (grad * x.detach()).sum(), x)
        found.append((grad, *second))
    assert found[1][1].abs().max() > 1e-3
    torch.testing.assert_close(*found)


def test_in_a_forked_worker_after_use(two_threads: None) -> None:
    """Forward and backward in a DataLoader's worker, whose parent has used its threads."""
    for op in CALLS:
        samples.run(op, MANY)
    torch.set_num_threads(1)  # as workers do; the head's bits depend on it
    expected = [samples.run(op, MANY) for op in CALLS]
    loader = DataLoader(
        Worker(), batch_size=None, num_workers=1, multiprocessing_context="fork", timeout=60
    )
    for found, right in zip(loader, expected, strict=True):
        assert equal(found, right)


def test_threads_at_once(one_seed: None, two_threads: None) -> None:
    """Six threads with tensors of their own: the bits of one after the other."""
    torch.manual_seed(0)
    problems = [(op, *CALLS[op].tensors(n)) for n in (3, 100, MANY) for op in CALLS]

    def work(turn: int) -> list[Tensor]:
        """Results and gradients of all problems; each turn begins with another one."""
        found: dict[int, list[Tensor]] = {}
        for k in range(len(problems)):
            at = (k + 4 * turn) % len(problems)
            op, live, fixed = problems[at]
            live = [x.detach().clone().requires_grad_() for x in live]
            result = CALLS[op].call(getattr(selfkd, op), *live, *fixed)
            found[at] = [result.detach(), *torch.autograd.grad(total(result), live)]
        return [x for k in range(len(problems)) for x in found[k]]

    # PyTorch gives a new thread its number of threads at some time during its first calls, and the
    # bits of a matrix product depend on that.
    counted = {"initializer": torch.set_num_threads, "initargs": (2,)}
    with ThreadPoolExecutor(1, **counted) as pool:
        expected = pool.submit(work, 0).result()
    with ThreadPoolExecutor(6, **counted) as pool:
        for found in pool.map(work, range(12)):
            assert equal(found, expected)


@pytest.mark.cuda
@pytest.mark.parametrize("half", [False, True])
@each_operator
def test_captured_in_a_cuda_graph(op: str, half: bool, one_seed: None) -> None:
    """Forward and backward, replayed with other inputs: the bits of an eager call."""

    def run(live: list[Tensor], fixed: list[Tensor]) -> list[Tensor]:
        with torch.autocast("cuda", torch.float16, enabled=half, cache_enabled=False):
            result = CALLS[op].call(getattr(selfkd, op), *live, *fixed)
        return [result.detach(), *torch.autograd.grad(total(result), live)]

    torch.manual_seed(0)
    live, fixed = CALLS[op].tensors(64, device="cuda")
    live = [x.detach().requires_grad_() for x in live]
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # PyTorch asks for calls before the capture
        for _ in range(3):
            run(live, fixed)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = run(live, fixed)
    for _ in range(2):
        others = CALLS[op].tensors(64, device="cuda")
        with torch.no_grad():
            for to, x in zip((*live, *fixed), (*others[0], *others[1]), strict=True):
                to.copy_(x)
        graph.replay()
        assert equal(found, run(live, fixed))


# ---- modules ----


def twin(module: torch.nn.Module, way: str) -> torch.nn.Module:
    return copy.deepcopy(module) if way == "deepcopy" else pickle.loads(pickle.dumps(module))


@each_module
@pytest.mark.parametrize("way", ["deepcopy", "pickle"])
def test_copied(name: str, way: str) -> None:
    """Before and after use; the copy trains as the original does, and shares nothing with it."""
    torch.manual_seed(0)
    module = MODULES[name].make()
    for n in (6, 7, 8):
        copied = twin(module, way)
        expected = samples.train(name, module, n)
        assert equal(samples.train(name, copied, n), expected)
        assert repr(copied) == repr(module)


@harness.needs_operators
@each_module
def test_compiled(name: str) -> None:
    """One graph with its backward for the first batch, and one for all others, whatever their size."""
    if not MODULES[name].compiles:
        pytest.skip(f"{name} looks at values: call it outside of what is compiled")
    torch.manual_seed(0)
    eager = MODULES[name].make()
    module = copy.deepcopy(eager)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    for n in (6, 7, 9):
        found, expected = samples.train(name, compiled, n), samples.train(name, eager, n)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 2


class Training:
    """Every module with its optimizer, as a training script holds them."""

    def __init__(self, seed: int) -> None:
        torch.manual_seed(seed)
        self.modules = torch.nn.ModuleDict({name: MODULES[name].make() for name in MODULES})
        parameters = list(self.modules.parameters())
        self.optimizers = [
            torch.optim.AdamW(parameters[::2], lr=1e-3),
            torch.optim.SGD(parameters[1::2], lr=1e-3, momentum=0.9),
        ]

    def step(self) -> list[Tensor]:
        """A step of each module on random data; what each returned."""
        losses = [
            total(sample.call(self.modules[name], *sample.inputs(6)))
            for name, sample in MODULES.items()
        ]
        torch.stack(losses).sum().backward()
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad()
        return [x.detach() for x in losses]

    def save(self, path: Path) -> None:
        optimizers = [x.state_dict() for x in self.optimizers]
        state = {"modules": self.modules.state_dict(), "optimizers": optimizers}
        torch.save(state | {"random": torch.get_rng_state()}, path)

    def load(self, path: Path) -> None:
        state = torch.load(path, weights_only=True)
        self.modules.load_state_dict(state["modules"])
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        torch.set_rng_state(state["random"])


def test_resumed(tmp_path: Path) -> None:
    """Saved after three steps and loaded into other modules, training goes on with the same bits."""
    straight = Training(0)
    for _ in range(3):
        straight.step()
    straight.save(tmp_path / "state.pt")
    expected = [x for _ in range(3) for x in straight.step()]
    resumed = Training(1)
    resumed.load(tmp_path / "state.pt")
    assert equal([x for _ in range(3) for x in resumed.step()], expected)
    states = [x.modules.state_dict() for x in (straight, resumed)]
    assert list(states[0]) == list(states[1])
    for name, x in states[0].items():
        same = torch.equal(x, states[1][name]) if isinstance(x, Tensor) else x == states[1][name]
        assert same, name


def test_a_compiled_step_has_the_losses_and_no_copies() -> None:
    """Two losses on one network: each operator once each way, and nothing copied for them."""
    from functorch.compile import make_boxed_func
    from torch._dynamo.backends.common import aot_autograd

    graphs: list[list[str]] = []

    def keep(graph: torch.fx.GraphModule, example_inputs: Any) -> Any:
        graphs.append([str(x.target) for x in graph.graph.nodes if x.op == "call_function"])
        return make_boxed_func(graph.forward)

    torch.manual_seed(0)
    inner, outer = torch.nn.Linear(8, 6), torch.nn.Linear(6, 5)
    x, y, teacher, features = torch.randn(4, 8), samples.classes(4), *map(torch.randn, (5, 6))
    teacher, features = teacher.expand(4, 5), features.expand(4, 6)

    def loss(x: Tensor) -> Tensor:
        h = inner(x).relu()
        return selfkd.distill(outer(h), y, teacher) + 0.5 * selfkd.simreg(h, features)

    backend = aot_autograd(fw_compiler=keep, bw_compiler=keep)
    torch.compile(loss, fullgraph=True, backend=backend)(x).backward()
    assert len(graphs) == 2
    for graph, suffix in zip(graphs, ("", "_backward"), strict=True):
        own = sorted(name for name in graph if name.startswith("selfkd."))
        assert own == [f"selfkd.{op}{suffix}.default" for op in ("distill", "simreg")]
        assert not [name for name in graph if "clone" in name or "copy" in name or "contig" in name]
