"""selfkd.nn.SDDropout with any head: the fused path of a plain linear layer, and the composed one."""

from __future__ import annotations

import copy
import importlib
import pickle
import types
from collections.abc import Callable
from typing import Any

import harness
import numpy as np
import pytest
import selfkd
import torch
import torch.nn.functional as F
from selfkd.nn import SDDropout
from torch import Tensor, nn
from torch.nn.utils import parametrizations

pytestmark = pytest.mark.skipif(
    bool(harness.SIMT_LIBRARY), reason="the emulator has no PyTorch binding"
)
N, K, C = 11, 6, 5
OPTIONS: dict[str, dict[str, Any]] = {
    "defaults": {},
    "everything": {
        "p": 0.3,
        "temperature": 2.0,
        "kl_weight": 0.7,
        "forward_weight": 0.5,
        "detach_target": True,
        "label_smoothing": 0.1,
        "ignore_index": 2,
    },
    "sum": {"reduction": "sum", "reverse_weight": 0.0},
    "none": {"reduction": "none", "ignore_index": 1},
    "nothing_dropped": {"p": 0.0},
    "no_kl": {"kl_weight": 0.0},
}


def problem(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    torch.manual_seed(20221111)
    return torch.randn(N, K, dtype=dtype).requires_grad_(), torch.arange(N) % C


def run(module: nn.Module, *given: Any, **named: Any) -> list[Tensor]:
    """Logits, loss, gradients of the features and of all parameters, for one seed of the masks."""
    torch.manual_seed(7)
    logits, loss = module(*given, **named)
    live = [given[0], *module.parameters()]
    return [logits, loss.detach(), *torch.autograd.grad(loss.square().sum(), live)]


@pytest.mark.parametrize("rows", ["all", "weighted", "masked"])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("name", OPTIONS)
def test_both_paths_agree(name: str, bias: bool, rows: str) -> None:
    """A Sequential of the layer is called, the layer itself is not; masks, loss, gradients agree."""
    x, y = problem()
    given: dict[str, Any] = {}
    if rows != "all":
        weight = torch.rand(N, dtype=torch.float64)
        weight[3] = 0
        given["row_weight"] = weight > 0.4 if rows == "masked" else weight
    if rows == "weighted" and OPTIONS[name].get("reduction") is None:
        given["divisor"] = 4.0
    linear = nn.Linear(K, C, bias=bias).double()
    calls: list[int] = []
    head = nn.Sequential(linear)
    head.register_forward_hook(lambda *_: calls.append(1))
    found, expected = (
        run(SDDropout(x_head, **OPTIONS[name]), x, y, **given) for x_head in (head, linear)
    )
    assert len(calls) == 3
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


class Cosine(nn.Linear):
    """A cosine classifier: its logits are not its weight times the features."""

    def forward(self, x: Tensor) -> Tensor:
        return 4 * F.linear(F.normalize(x), F.normalize(self.weight))


class LoRA(nn.Module):
    """A frozen layer and an update of low rank."""

    def __init__(self) -> None:
        super().__init__()
        self.base = nn.Linear(K, C).requires_grad_(False)
        self.a, self.b = nn.Linear(K, 2, bias=False), nn.Linear(2, C, bias=False)

    @property
    def weight(self) -> Tensor:
        return self.base.weight

    @property
    def bias(self) -> Tensor:
        return self.base.bias

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.base(x) + self.b(self.a(x))
        return found


def hooked(kind: str) -> nn.Module:
    head = nn.Linear(K, C, bias=kind != "own")
    if kind == "forward":
        head.register_forward_hook(lambda module, given, result: 2 * result)
    elif kind == "pre":
        head.register_forward_pre_hook(lambda module, given: (given[0].tanh(),))
    elif kind == "backward":
        head.register_full_backward_hook(lambda module, into, out: (2 * into[0],))
    else:
        own = types.MethodType(lambda self, x: F.linear(x.sin(), self.weight), head)
        head.forward = own  # type: ignore[method-assign]
    return head


HEADS: dict[str, Callable[[], Any]] = {
    "cosine": lambda: Cosine(K, C, bias=False),
    "LoRA": LoRA,
    "Sequential": lambda: nn.Sequential(nn.Linear(K, 8), nn.ReLU(), nn.Linear(8, C)),
    "with batch norm": lambda: nn.Sequential(nn.BatchNorm1d(K), nn.Linear(K, C)),
    "spectral norm": lambda: parametrizations.spectral_norm(nn.Linear(K, C)),
    "weight norm": lambda: parametrizations.weight_norm(nn.Linear(K, C)),
    "old spectral norm": lambda: nn.utils.spectral_norm(nn.Linear(K, C)),
    "forward hook": lambda: hooked("forward"),
    "pre-hook": lambda: hooked("pre"),
    "backward hook": lambda: hooked("backward"),
    "own forward": lambda: hooked("own"),
    "function": lambda: lambda x: F.pad(x.sin(), (0, C - K)),
}


@pytest.mark.parametrize("name", HEADS)
def test_any_head(name: str) -> None:
    """The loss is that of the head's own logits, of the features and of both samples; so are gradients."""
    x, y = problem(torch.float32)
    torch.manual_seed(1)
    head = HEADS[name]()
    twin = copy.deepcopy(head)
    module = SDDropout(head, p=0.4, temperature=2.0, kl_weight=0.7)
    torch.manual_seed(7)
    logits, loss = module(x, y)
    torch.manual_seed(7)
    draw = importlib.import_module("selfkd.sd_dropout_head")._seed
    z, u, v = (twin(h) for h in selfkd.dropout_views(x, draw(x, None), p=0.4))
    expected = F.cross_entropy(z, y) + 0.7 * selfkd.reference.sd_dropout_kl(u, v, temperature=2.0)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(logits, z.detach())
    live = [[x, *m.parameters()] if isinstance(m, nn.Module) else [x] for m in (head, twin)]
    grads = [
        torch.autograd.grad(value, [t for t in inputs if t.requires_grad])
        for value, inputs in zip((loss, expected), live, strict=True)
    ]
    torch.testing.assert_close(*grads)
    if isinstance(head, nn.Module):  # running statistics of each of the three calls
        for one, other in zip(head.buffers(), twin.buffers(), strict=True):
            torch.testing.assert_close(one, other)
    module.eval()
    torch.testing.assert_close(module(x), module.head(x))


def test_a_plain_layer_takes_the_fused_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nn.Linear, "forward", lambda *_: pytest.fail("was called"))
    x, y = problem(torch.float32)
    run(SDDropout(nn.Linear(K, C)), x, y)


@pytest.mark.parametrize("plain", [True, False])
def test_a_target_gives_a_pair(plain: bool) -> None:
    """In evaluation too, where a batch of two would unpack into two rows; nothing is dropped there."""
    x, y = (t[:2] for t in problem(torch.float32))
    head = nn.Linear(K, C)
    module = SDDropout(head if plain else nn.Sequential(head), label_smoothing=0.1).eval()
    logits, loss = module(x, y)
    torch.testing.assert_close(logits, head(x).detach())
    torch.testing.assert_close(loss, F.cross_entropy(head(x), y, label_smoothing=0.1))
    assert loss.requires_grad
    assert module(x, y, return_logits=False)[0] is None
    assert module(x).shape == (2, C)
    with pytest.raises(ValueError, match="SDDropout: target is None, expected the class"):
        module.train()(x)


def test_rows_that_do_not_count_may_hold_nan() -> None:
    x, y = problem(torch.float32)
    x = x.detach().clone()
    x[2], y[2] = torch.nan, -100
    x[4] = torch.inf
    weight = torch.ones(N)
    weight[4] = 0
    module = SDDropout(nn.Sequential(nn.Linear(K, 8), nn.ReLU(), nn.Linear(8, C)))
    found = run(module, x.requires_grad_(), y, row_weight=weight)
    assert all(g.isfinite().all() for g in found[1:])
    assert (found[2][[2, 4]] == 0).all()


def test_double_backward_of_a_composed_head() -> None:
    x, y = problem()
    module = SDDropout(nn.Sequential(nn.Linear(K, C).double()), p=0.25)
    torch.manual_seed(7)
    (grad,) = torch.autograd.grad(module(x, y)[1], x, create_graph=True)
    (second,) = torch.autograd.grad(grad.square().sum(), x)
    assert second.isfinite().all()
    assert second.abs().sum() > 0


@pytest.mark.parametrize("name", ["Sequential", "cosine"])
def test_compiled_and_under_autocast(name: str) -> None:
    x, y = problem(torch.float32)
    module = SDDropout(HEADS[name](), p=0.0)
    expected = run(module, x, y)
    torch._dynamo.reset()
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    for one, other in zip(run(compiled, x, y), expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
    with torch.autocast("cpu", torch.bfloat16):
        _, loss = module(x, y)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss.detach(), expected[1], rtol=0.05, atol=0.05)
    assert torch.autograd.grad(loss, x)[0].dtype == torch.float32


# ---- checkpoints and copies ----


class Net(nn.Module):
    def __init__(self, head: nn.Module) -> None:
        super().__init__()
        self.body, self.fc = nn.Linear(4, K), head


@pytest.mark.parametrize("name", ["Linear", "Sequential", "spectral norm"])
def test_old_checkpoints_load(name: str) -> None:
    """net.fc = SDDropout(net.fc) renames the entries of fc; what was saved before still loads, strictly."""
    make = HEADS.get(name, lambda: nn.Linear(K, C))
    old, new = Net(make()), Net(make())
    before = {k: x.clone() for k, x in old.state_dict().items()}
    new.fc = SDDropout(new.fc)
    assert any(key.startswith("fc.head.") for key in new.state_dict())
    given = dict(before)
    new.load_state_dict(given)
    assert given.keys() == before.keys()
    for key, x in before.items():
        assert torch.equal(new.state_dict()[key.replace("fc.", "fc.head.")], x)
    again = Net(SDDropout(make()))
    again.load_state_dict(new.state_dict())  # and its own
    again.fc = again.fc.head  # the way back
    again.load_state_dict(before)
    SDDropout(make()).load_state_dict(make().state_dict())
    del before["body.weight"]
    with pytest.raises(RuntimeError, match=r'Missing key.*"body.weight"'):
        new.load_state_dict(before)
    with pytest.raises(RuntimeError, match=r'Unexpected key.*"fc.wrong"'):
        new.load_state_dict({**new.state_dict(), "fc.wrong": torch.ones(1)})


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("plain", [True, False])
def test_other_dtypes(plain: bool, dtype: torch.dtype) -> None:
    x, y = problem(torch.float32)
    head = nn.Linear(K, C)
    module = SDDropout(head if plain else nn.Sequential(head))
    expected = run(module, x, y)
    twin = pickle.loads(pickle.dumps(copy.deepcopy(module))).to(dtype)
    found = run(twin, x.detach().to(dtype).requires_grad_(), y)
    for one, other in zip(found[1:], expected[1:], strict=True):
        torch.testing.assert_close(one.float(), other, rtol=0.05, atol=0.05)
    assert {g.dtype for g in found[2:]} == {dtype}


# ---- wrong heads and numbers ----


def test_sentences() -> None:
    with pytest.raises(TypeError, match=r"SDDropout: head is the number 32, .*nn.Linear\(32, 10\)"):
        SDDropout(32, 10)
    with pytest.raises(TypeError, match="SDDropout: head is None, expected a module or function"):
        SDDropout(None)
    with pytest.raises(TypeError, match="SDDropout: p is True, expected a number"):
        SDDropout(nn.Linear(K, C), p=True)
    with pytest.raises(ValueError, match="SDDropout: p requires grad"):
        SDDropout(nn.Linear(K, C), p=nn.Parameter(torch.tensor(0.5)))
    x, y = problem(torch.float32)
    for head in (nn.Linear(K, C), nn.Sequential(nn.Linear(K, C))):
        SDDropout(head, np.float32(0.5), torch.tensor(2.0), np.float64(0.7))(x, y)
        for name in ("temperature", "kl_weight"):
            module = SDDropout(head, **{name: nn.Parameter(torch.ones(()))})
            with pytest.raises(
                ValueError, match=f": {name} requires grad, .* call selfkd.reference"
            ):
                module(x, y)
        module = SDDropout(head)
        with pytest.raises(ValueError, match="row_weight requires grad"):
            module(x, y, row_weight=torch.ones(N, requires_grad=True))
        with pytest.raises(TypeError, match="SDDropout: features is a list, expected a tensor"):
            module([1.0], y)
        with pytest.raises(TypeError, match="SDDropout: target is the number 3, expected a tensor"):
            module(x, 3)
