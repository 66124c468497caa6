"""The SD-Dropout objective on features: the head, and the operator that does its rows."""

from __future__ import annotations

import importlib
import inspect
from typing import Any

import harness
import pytest
import selfkd
import torch
import torch.nn.functional as F
from selfkd import c, library

ROWS = "sd_dropout_head_rows"
DEFAULTS = {x.name: x.default for x in selfkd.contract.contract(ROWS).items if x.is_number}
needs_torch_backend = pytest.mark.skipif(
    bool(harness.SIMT_LIBRARY), reason="of PyTorch on the CPU: run without SELFKD_SIMT_LIBRARY"
)
# In float64 the reference's softmax - onehot has lost digits where a row is sure of its class.
ROUNDED = harness.Case("rounded", lambda g: {}, exact=1e-10)
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "temperature_one": {"temperature": 1.0},
    "weights": {"kl_weight": 0.3, "forward_weight": 0.5, "reverse_weight": 2.0},
    "one_way": {"forward_weight": 0.0},
    "detached": {"detach_target": True},
    "smoothed": {"label_smoothing": 0.1},
    "cross_entropy": {"kl_weight": 0.0},
}


# ---- the rows ----


def rows_of(z: Any, u: Any, v: Any, target: Any, weight: Any, **options: Any) -> torch.Tensor:
    """The formula of the contract."""
    live = target != options.get("ignore_index", -100)
    w = live.double() if weight is None else weight * live
    live = w != 0
    options = {"label_smoothing": 0.0, "kl_weight": 1.0, **options}
    ce = F.cross_entropy(
        z.masked_fill(~live[:, None], 0),
        target.masked_fill(~live, 0),
        label_smoothing=options.pop("label_smoothing"),
        reduction="none",
    )
    kl_weight = options.pop("kl_weight")
    options.pop("ignore_index", None)
    kl = selfkd.reference.sd_dropout_kl(u, v, weight=live, reduction="none", **options)
    return torch.where(live, w * (ce + kl_weight * kl), 0)


def draw(
    generator: torch.Generator, N: int, C: int, apart: float | None = None, scale: float = 3.0
) -> dict[str, torch.Tensor]:
    def normal() -> torch.Tensor:
        return scale * torch.randn(N, C, generator=generator, dtype=torch.float64)

    u = normal()
    v = normal() if apart is None else u + apart * normal()
    target = torch.randint(0, C, (N,), generator=generator)
    target[torch.rand(N, generator=generator) < 0.1] = -100
    return {"z": normal(), "u": u, "v": v, "target": target}


def run_rows(
    backend: harness.Backend, tensors: dict[str, torch.Tensor], **options: Any
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Rows and the gradients that replace the logits."""
    logits = [tensors[name].clone() for name in "zuv"]
    named = {**tensors, **dict(zip("zuv", logits, strict=True))}
    numbers = DEFAULTS | options
    if backend.name in ("c", "simt"):
        lib = (
            library.open_library(harness.SIMT_LIBRARY)
            if backend.name == "simt"
            else library.library()
        )
        arguments = {**numbers, **named}
        outputs = harness.poisoned_outputs(ROWS, arguments)
        device = 2 if backend.name == "simt" else None
        library.check(c.run(lib, ROWS, arguments | outputs, device=device))
        return outputs["rows"], logits
    weight = named.get("weight")
    with torch.no_grad():
        rows = torch.ops.selfkd.sd_dropout_head_rows(
            *logits,
            named["target"],
            logits[0] if weight is None else weight,
            weight is not None,
            *numbers.values(),
        )
    return rows, logits


def check_rows(
    backend: harness.Backend, dtype: torch.dtype, tensors: dict[str, Any], case: Any, **options: Any
) -> None:
    cast = harness.cast(tensors, ROWS, dtype, backend.device)
    wide = {
        name: x.double().cpu() if x.is_floating_point() else x.cpu() for name, x in cast.items()
    }
    live = [wide[name].clone().requires_grad_() for name in "zuv"]
    expected = rows_of(*live, wide["target"], wide.get("weight"), **options)
    expected_grads = torch.autograd.grad(
        expected.sum(), live, allow_unused=True, materialize_grads=True
    )
    found, grads = run_rows(backend, cast, **options)
    harness.assert_values(found, expected.detach(), "rows", case)
    for name, grad, right in zip("zuv", grads, expected_grads, strict=True):
        harness.assert_gradient(grad, right, f"gradient of {name}", case)
    found, kept = run_rows(backend, cast, differentiate=0, **options)
    harness.assert_values(found, expected.detach(), "rows alone", case)
    assert all(torch.equal(x, cast[name]) for x, name in zip(kept, "zuv", strict=True))


@pytest.mark.parametrize("backend", harness.backends(), ids=str)
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("name", OPTIONS)
def test_rows(backend: harness.Backend, dtype: str, name: str, generator: torch.Generator) -> None:
    harness.prepare(backend)
    for C in (1, 2, 16, 17, 100):
        tensors = draw(generator, 11, C)
        check_rows(backend, harness.DTYPES[dtype], tensors, ROUNDED, **OPTIONS[name])


@pytest.mark.parametrize("backend", harness.backends(), ids=str)
@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16"])
def test_special_rows(backend: harness.Backend, dtype: str, generator: torch.Generator) -> None:
    """Long, close, weighted, skipped and far rows."""
    harness.prepare(backend)
    kind = harness.DTYPES[dtype]
    ordinary = ROUNDED
    check_rows(backend, kind, draw(generator, 3, 3000), ordinary)
    close = harness.Case("close", lambda g: {}, close=True, exact=1e-9)
    check_rows(backend, kind, draw(generator, 9, 100, apart=1e-3), close, kl_weight=1e3)
    far = harness.Case("far", lambda g: {}, exact=1e-10)
    check_rows(backend, kind, draw(generator, 9, 1500, scale=60.0), far, temperature=1.0)
    tensors = draw(generator, 17, 50)
    tensors["weight"] = torch.rand(17, generator=generator, dtype=torch.float64) + 0.1
    check_rows(backend, kind, tensors, ordinary, label_smoothing=0.1)
    skipped = torch.arange(17) % 3 == 0
    tensors["weight"][skipped] = 0
    for name in "zuv":
        tensors[name][skipped | (tensors["target"] == -100)] = torch.nan
    found, grads = run_rows(backend, harness.cast(tensors, ROWS, kind, backend.device))
    none = (skipped | (tensors["target"] == -100)).to(backend.device)
    assert found.isfinite().all()
    assert (found[none] == 0).all()
    assert (found[~none] != 0).all()
    for grad in grads:
        assert grad.isfinite().all()
        assert (grad[none] == 0).all()
        assert (grad[~none] != 0).any(1).all()


@pytest.mark.parametrize("backend", harness.backends(), ids=str)
def test_non_finite_rows_stay_alone(backend: harness.Backend, generator: torch.Generator) -> None:
    harness.prepare(backend)
    tensors = harness.cast(draw(generator, 9, 40), ROWS, torch.float32, backend.device)
    tensors["target"].clamp_(min=0)
    right, right_grads = run_rows(backend, tensors)
    tensors["z"][2, 3] = torch.nan
    tensors["u"][5, 3] = torch.nan
    found, grads = run_rows(backend, tensors)
    other = [k for k in range(9) if k not in (2, 5)]
    assert found[[2, 5]].isnan().all()
    assert torch.equal(found[other], right[other])
    for grad, expected in zip(grads, right_grads, strict=True):
        assert torch.equal(grad[other], expected[other])


@pytest.mark.parametrize("backend", harness.backends(), ids=str)
def test_rows_of_any_length_and_strides(
    backend: harness.Backend, generator: torch.Generator
) -> None:
    harness.prepare(backend)
    for C in (1023, 1024, 1025, 1041):
        check_rows(backend, torch.float32, draw(generator, 9, C), ROUNDED)
    tensors = draw(generator, 19, 33)
    right, right_grads = run_rows(
        backend, harness.cast(tensors, ROWS, torch.float32, backend.device)
    )
    for layout in ("channels_last", "every_other", "unaligned"):
        named = harness.cast(tensors, ROWS, torch.float32, backend.device)
        named |= {name: harness.LAYOUTS[layout](named[name]) for name in "zuv"}
        found, grads = run_rows(backend, named)
        harness.assert_values(found, right.double(), layout)
        for one, other in zip(grads, right_grads, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


@needs_torch_backend
def test_rows_do_not_depend_on_threads(generator: torch.Generator) -> None:
    backend = harness.Backend("v4", None)
    tensors = harness.cast(draw(generator, 500, 130), ROWS, torch.float32, backend.device)
    threads = torch.get_num_threads()
    found = []
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            rows, grads = run_rows(backend, tensors)
            found.append([rows, *grads])
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


@needs_torch_backend
def test_rows_are_written_over_in_memory_of_their_own(generator: torch.Generator) -> None:
    x = harness.cast(draw(generator, 9, 5), ROWS, torch.float32)

    def call(z: Any, u: Any, v: Any) -> Any:
        return torch.ops.selfkd.sd_dropout_head_rows(
            z, u, v, x["target"], z, False, *DEFAULTS.values()
        )

    with pytest.raises(
        RuntimeError, match="z has elements that share memory, expected memory of its own"
    ):
        call(x["z"][:1].expand(9, 5), x["u"], x["v"])
    with pytest.raises(RuntimeError, match="u shares memory with v, expected memory of its own"):
        call(x["z"], x["u"], x["u"])
    with pytest.raises(RuntimeError, match="has no gradient and writes over its inputs; call it"):
        call(x["z"].requires_grad_(), x["u"], x["v"])


@needs_torch_backend
def test_opcheck_of_rows(generator: torch.Generator) -> None:
    x = harness.cast(draw(generator, 9, 5), ROWS, torch.float32)
    arguments = (x["z"], x["u"], x["v"], x["target"], x["z"], False, *DEFAULTS.values())
    torch.library.opcheck(torch.ops.selfkd.sd_dropout_head_rows.default, arguments)


# ---- the head ----


def problem(
    N: int = 23, K: int = 12, C: int = 7, dtype: torch.dtype = torch.float32, device: str = "cpu"
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(3)
    features = torch.randn(N, K, generator=g, dtype=torch.float64)
    weight = 3 * torch.randn(C, K, generator=g, dtype=torch.float64) / K**0.5
    bias = torch.randn(C, generator=g, dtype=torch.float64)
    target = torch.randint(0, C, (N,), generator=g)
    target[4] = -100
    live = [x.to(device, dtype).requires_grad_() for x in (features, weight, bias)]
    return live[0], live[1], live[2], target.to(device)


def both(
    dtype: torch.dtype = torch.float32, bias: bool = True, scale: Any = None, **options: Any
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Loss and gradients of the head, and of the float64 reference under the same masks."""
    found = []
    for function, kind in (
        (selfkd.sd_dropout_head, dtype),
        (selfkd.reference.sd_dropout_head, torch.float64),
    ):
        x, w, b, y = problem(dtype=dtype)
        y[y == -100] = options.get("ignore_index", -100)
        acc = torch.float64 if kind == torch.float64 else torch.float32
        named = {
            name: z.to(acc) if isinstance(z, torch.Tensor) and z.is_floating_point() else z
            for name, z in options.items()
        }
        live = [z.detach().to(kind).requires_grad_() for z in ([x, w, b] if bias else [x, w])]
        torch.manual_seed(5)
        loss = function(live[0], live[1], live[2] if bias else None, y, **named)
        grad = torch.ones_like(loss) if scale is None else scale.to(loss.dtype)
        found.append([loss.detach(), *torch.autograd.grad(loss, live, grad)])
    return found[0], found[1]


def assert_same(found: list[torch.Tensor], expected: list[torch.Tensor], bound: float) -> None:
    for x, y in zip(found, expected, strict=True):
        error = (x.double() - y).abs().max() / y.abs().max()
        assert error <= bound, f"relative error {error:.2e} exceeds {bound:.0e}"


CALLS: dict[str, dict[str, Any]] = {
    **OPTIONS,
    "no_dropout": {"p": 0.0},
    "mostly_dropped": {"p": 0.9},
    "weighted": {"row_weight": torch.rand(23, generator=torch.Generator().manual_seed(1))},
    "masked": {"row_weight": torch.arange(23) % 3 > 0},
    "sum": {"reduction": "sum"},
    "divisor": {"divisor": 40.0},
    "divisor_tensor": {"divisor": torch.tensor(40.0)},
    "ignored": {"ignore_index": 2, "label_smoothing": 0.2},
    "rows_at_a_time": {"chunk_bytes": 3 * 7 * 8 * 2},
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@needs_torch_backend
@pytest.mark.parametrize("name", CALLS)
def test_head(name: str, dtype: torch.dtype) -> None:
    found, expected = both(dtype, **CALLS[name])
    assert_same(found, expected, 1e-12 if dtype == torch.float64 else 1e-5)


@needs_torch_backend
def test_without_bias() -> None:
    assert_same(*both(bias=False), 1e-5)


@needs_torch_backend
def test_rows_of_the_batch() -> None:
    """reduction "none", with a gradient of its own for each row."""
    scale = torch.linspace(-1, 2, 23)
    found, expected = both(reduction="none", scale=scale)
    assert_same(found, expected, 1e-5)
    found, expected = both(reduction="none", scale=scale, row_weight=torch.arange(23) % 3 > 0)
    assert_same(found, expected, 1e-5)


@needs_torch_backend
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_types(dtype: torch.dtype) -> None:
    found, expected = both(dtype)
    assert [x.dtype for x in found] == [torch.float32, dtype, dtype, dtype]
    assert_same(found, expected, 5e-3)
    assert_same(found[:1], expected[:1], 1e-5)


@needs_torch_backend
def test_small_gradients_survive_a_gradient_scaler() -> None:
    """In float16, gradients of 1e-7 times a scale of 65536: rounded once, after scaling."""
    found, expected = both(torch.float16, divisor=1e6, scale=torch.tensor(65536.0))
    assert_same(found, expected, 5e-3)


@needs_torch_backend
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_mixed_products(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """The way of half types on CUDA, with a product of converted halves in the place of CUDA's."""
    module = importlib.import_module("selfkd.sd_dropout_head")

    def product(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        assert x.dtype == y.dtype == dtype
        return x.float() @ y.float()

    monkeypatch.setattr(module, "_has_mixed_products", lambda features: True)
    monkeypatch.setattr(module, "_mixed_product", product)
    for options in ({}, {"chunk_bytes": 200}, {"row_weight": 1e-6 * torch.rand(23)}):
        assert_same(*both(dtype, **options), 1e-2)
    assert_same(*both(dtype, reduction="sum", scale=torch.tensor(65536.0 / 1e4)), 1e-2)


@needs_torch_backend
def test_skipped_rows_reach_no_gradient() -> None:
    """Rows of weight 0 or an ignored target may hold NaN features."""
    x, w, b, y = problem()
    row_weight = (torch.arange(23) % 3 > 0).float()
    gone = (row_weight == 0) | (y == -100)
    found = []
    for value in (0.0, torch.nan):
        features = x.detach().clone()
        features[gone] = value
        features.requires_grad_()
        torch.manual_seed(1)
        loss = selfkd.sd_dropout_head(features, w, b, y, row_weight=row_weight)
        grads = torch.autograd.grad(loss, (features, w, b))
        assert (grads[0][gone] == 0).all()
        found.append([loss.detach(), *grads])
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))
    row_weight[4] = torch.nan  # of the ignored target
    torch.manual_seed(1)
    assert selfkd.sd_dropout_head(x, w, b, y, row_weight=row_weight).isfinite()


@needs_torch_backend
def test_any_strides() -> None:
    x, w, b, y = problem(dtype=torch.float64)
    right, found = [], []
    for to, wide in ((right, lambda z: z), (found, lambda z: z.t().contiguous().t())):
        live = [wide(x.detach()).requires_grad_(), wide(w.detach()).requires_grad_(), b]
        torch.manual_seed(1)
        targets = y if to is right else torch.stack([y, y], 1)[:, 0]
        to += torch.autograd.grad(selfkd.sd_dropout_head(*live, targets), live)
    assert_same(found, right, 1e-12)


@needs_torch_backend
def test_logits_are_those_without_dropout() -> None:
    x, w, b, y = problem()
    loss, logits = selfkd.sd_dropout_head(x, w, b, y, return_logits=True, chunk_bytes=200)
    assert not logits.requires_grad
    assert loss.requires_grad
    torch.testing.assert_close(logits, F.linear(x, w, b).detach())


@needs_torch_backend
def test_seed_repeats_the_masks() -> None:
    x, w, b, y = problem()
    losses = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        losses.append(selfkd.sd_dropout_head(x, w, b, y).item())
    assert losses[0] == losses[1] != losses[2]
    generator = torch.Generator().manual_seed(1)
    assert selfkd.sd_dropout_head(x, w, b, y, generator=generator).item() == losses[0]


@needs_torch_backend
def test_chunks_change_no_mask() -> None:
    x, w, b, y = problem(dtype=torch.float64)
    found = []
    for rows in (1, 2, 5, 23):
        torch.manual_seed(1)
        loss = selfkd.sd_dropout_head(x, w, b, y, chunk_bytes=rows * 3 * 7 * 8)
        found.append([loss.detach(), *torch.autograd.grad(loss, (x, w, b))])
    for other in found[1:]:
        assert_same(other, found[0], 1e-12)


@needs_torch_backend
def test_masks_do_not_depend_on_threads() -> None:
    x, w, b, y = problem(N=300, K=130)
    threads = torch.get_num_threads()
    found = []
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            torch.manual_seed(1)
            loss = selfkd.sd_dropout_head(x, w, b, y, p=0.75)
            found.append([loss.detach(), *torch.autograd.grad(loss, (x, w, b))])
    finally:
        torch.set_num_threads(threads)
    assert_same(found[1], [z.double() for z in found[0]], 1e-5)


@needs_torch_backend
def test_backward_twice_and_accumulation() -> None:
    x, w, b, y = problem()
    loss = selfkd.sd_dropout_head(x, w, b, y)
    first = torch.autograd.grad(loss, (x, w, b), retain_graph=True)
    second = torch.autograd.grad(3 * loss, (x, w, b))
    for one, other in zip(first, second, strict=True):
        torch.testing.assert_close(3 * one, other)
    for _ in range(2):
        torch.manual_seed(1)
        loss = selfkd.sd_dropout_head(x, w, b, y)
        loss.backward()
    torch.manual_seed(1)
    (once,) = torch.autograd.grad(selfkd.sd_dropout_head(x, w, b, y), w)
    torch.testing.assert_close(w.grad, 2 * once)


@needs_torch_backend
@pytest.mark.parametrize("frozen", [0, 1, 2])
def test_only_wanted_gradients(frozen: int) -> None:
    x, w, b, y = problem()
    live = [x, w, b]
    live[frozen] = live[frozen].detach()
    torch.manual_seed(1)
    loss = selfkd.sd_dropout_head(*live, y)
    loss.backward()
    torch.manual_seed(1)
    right = torch.autograd.grad(selfkd.sd_dropout_head(x, w, b, y), (x, w, b))
    for k in range(3):
        assert live[k].grad is None if k == frozen else torch.equal(live[k].grad, right[k])
    with torch.no_grad():
        torch.manual_seed(1)
        assert selfkd.sd_dropout_head(x, w, b, y).item() == loss.item()


@needs_torch_backend
def test_shared_weight() -> None:
    """The head's weight is the model's classifier, used once more beside it."""
    found = []
    for function in (selfkd.sd_dropout_head, selfkd.reference.sd_dropout_head):
        x, w, b, y = problem(dtype=torch.float64)
        torch.manual_seed(1)
        loss = function(x, w, b, y) + F.linear(x, w, b).square().mean()
        found.append(torch.autograd.grad(loss, (x, w, b)))
    assert_same(list(found[0]), list(found[1]), 1e-12)


@needs_torch_backend
def test_empty_batch_and_all_ignored() -> None:
    x, w, b, y = problem()
    assert selfkd.sd_dropout_head(x[:0], w, b, y[:0]).isnan()
    assert selfkd.sd_dropout_head(x[:0], w, b, y[:0], reduction="sum") == 0
    loss = selfkd.sd_dropout_head(x, w, b, torch.full_like(y, -100))
    assert loss.isnan()
    for grad in torch.autograd.grad(loss, (x, w, b)):
        assert (grad == 0).all()  # as F.cross_entropy


@needs_torch_backend
def test_gradient_by_differences() -> None:
    x, w, b, y = problem(N=5, K=6, C=4, dtype=torch.float64)

    def loss(*live: torch.Tensor) -> torch.Tensor:
        torch.manual_seed(1)
        return selfkd.sd_dropout_head(*live, y, temperature=2.0)  # type: ignore[no-any-return]

    assert torch.autograd.gradcheck(loss, (x, w, b))


@needs_torch_backend
def test_double_backward_is_refused() -> None:
    x, w, b, y = problem()
    loss = selfkd.sd_dropout_head(x, w, b, y)
    with pytest.raises(
        RuntimeError, match="no double backward; for create_graph=True compose it of"
    ):
        torch.autograd.grad(loss, (x,), create_graph=True)


@needs_torch_backend
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_without_a_break(dynamic: bool, backend: str) -> None:
    def step(x: torch.Tensor, w: torch.Tensor, b: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return selfkd.sd_dropout_head(x, w, b, y, p=0.0).square()  # type: ignore[union-attr]

    compiled = torch.compile(step, fullgraph=True, dynamic=dynamic, backend=backend)
    for rows in (23, 17) if dynamic else (23,):
        x, w, b, y = problem(rows)
        right = torch.autograd.grad(step(x, w, b, y), (x, w, b))
        found = torch.autograd.grad(compiled(x, w, b, y), (x, w, b))
        for one, other in zip(found, right, strict=True):
            torch.testing.assert_close(one, other)


@needs_torch_backend
def test_opcheck() -> None:
    x, w, b, y = problem()
    seed = torch.tensor(1)
    numbers = (0.5, 3.0, 1.0, 1.0, 1.0, False, 0.0, -100, 1, 1000, True, 0)
    torch.library.opcheck(
        torch.ops.selfkd.sd_dropout_head.default, (x, w, b, y, None, None, seed, *numbers)
    )
    torch.library.opcheck(
        torch.ops.selfkd.sd_dropout_head.default, (x, w, None, y, None, None, seed, *numbers)
    )


@needs_torch_backend
def test_autocast_and_checkpointing() -> None:
    x, w, b, y = problem()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = selfkd.sd_dropout_head(x, w, b, y)
    assert loss.dtype == torch.float32
    assert all(grad.dtype == torch.float32 for grad in torch.autograd.grad(loss, (x, w, b)))

    def part(x: torch.Tensor) -> torch.Tensor:
        return selfkd.sd_dropout_head(x.tanh(), w, b, y)  # type: ignore[no-any-return]

    torch.manual_seed(1)
    right = torch.autograd.grad(part(x), (x, w))
    torch.manual_seed(1)
    again = torch.utils.checkpoint.checkpoint(part, x, use_reentrant=False)
    for one, other in zip(torch.autograd.grad(again, (x, w)), right, strict=True):
        assert torch.equal(one, other)


X, W, B, Y = (z.detach() for z in problem())
BAD: dict[str, tuple[type[Exception], dict[str, Any]]] = {
    r"sd_dropout_head: p is 1, expected a number >= 0 and < 1": (ValueError, {"p": 1.0}),
    r"sd_dropout_head: p is -0.1, expected a number >= 0 and < 1": (ValueError, {"p": -0.1}),
    r"sd_dropout_head: weight has size 11 in dimension K, expected 12": (
        ValueError,
        {"weight": W[:, :11]},
    ),
    r"sd_dropout_head: bias has size 6 in dimension C, expected 7": (ValueError, {"bias": B[:6]}),
    r"sd_dropout_head: target has size 22 in dimension N, expected 23": (
        ValueError,
        {"target": Y[:22]},
    ),
    r"sd_dropout_head: target is 7 at position \[2\], expected 0 to 6, or ignore_index, -100": (
        ValueError,
        {"target": Y.index_fill(0, torch.tensor([2]), 7), "chunk_bytes": 100},
    ),
    r"sd_dropout_head: chunk_bytes is 83, expected at least 84, the logits of one row": (
        ValueError,
        {"chunk_bytes": 83},
    ),
    r"sd_dropout_head: weight has dtype float64, expected float32 like features": (
        TypeError,
        {"weight": W.double()},
    ),
    r"sd_dropout_head: features has 3 dimensions, expected 2": (ValueError, {"features": X[None]}),
    r"sd_dropout_head: temperature is 0, expected a finite number > 0": (
        ValueError,
        {"temperature": 0.0},
    ),
    r'sd_dropout_head: reduction is "max", expected "none", "mean" or "sum"': (
        ValueError,
        {"reduction": "max"},
    ),
    r"sd_dropout_head: row_weight requires grad, expected one without": (
        ValueError,
        {"row_weight": torch.ones(23, requires_grad=True)},
    ),
}


@needs_torch_backend
@pytest.mark.parametrize("sentence", BAD)
def test_bad_arguments(sentence: str) -> None:
    error, options = BAD[sentence]
    with pytest.raises(error, match=f"^{sentence}"):
        selfkd.sd_dropout_head(**{"features": X, "weight": W, "bias": B, "target": Y, **options})


@needs_torch_backend
def test_signatures_agree() -> None:
    signature = inspect.signature(selfkd.sd_dropout_head)
    assert signature == inspect.signature(selfkd.reference.sd_dropout_head)
    of = importlib.import_module("selfkd.sd_dropout_head")._CONTRACT
    for item in of.items:
        if item.is_number and item.name in signature.parameters and not item.choices:
            assert signature.parameters[item.name].default == item.default, item.name


@needs_torch_backend
def test_module_is_the_papers_objective() -> None:
    head = torch.nn.Linear(12, 7)
    module = selfkd.nn.SDDropout(head, p=0.4, temperature=2.0, kl_weight=0.7)
    h, _, _, y = problem()
    torch.manual_seed(5)
    logits, loss = module(h, y)
    torch.manual_seed(5)
    right = selfkd.reference.sd_dropout_head(
        h, head.weight, head.bias, y, p=0.4, temperature=2.0, kl_weight=0.7
    )
    torch.testing.assert_close(loss, right)
    torch.testing.assert_close(logits, head(h).detach())
    loss.backward()
    assert head.weight.grad is not None
    assert head.bias.grad is not None
    assert module(h, y, return_logits=False)[0] is None
    torch.testing.assert_close(module.eval()(h), head(h))
    with pytest.raises(ValueError, match="target is None"):
        module.train()(h)
    with pytest.raises(ValueError, match="p is 1, expected a number in"):
        selfkd.nn.SDDropout(head, p=1.0)


@needs_torch_backend
def test_module_takes_what_the_function_takes() -> None:
    h, _, _, y = problem()
    head = torch.nn.Linear(12, 7)
    seeded = torch.Generator().manual_seed
    options = {"forward_weight": 0.5, "detach_target": True, "label_smoothing": 0.1}
    each_call = {"row_weight": torch.rand(23), "divisor": 11.0}
    module = selfkd.nn.SDDropout(head, 0.4, 2.0, 0.7, ignore_index=2, **options)
    named = {"p": 0.4, "temperature": 2.0, "kl_weight": 0.7, "ignore_index": 2, **options}
    _, loss = module(h, y.abs() % 7, generator=seeded(5), **each_call)
    right = selfkd.sd_dropout_head(
        h, head.weight, head.bias, y.abs() % 7, generator=seeded(5), **named, **each_call
    )
    assert torch.equal(loss, right)
    _, rows = selfkd.nn.SDDropout(head, reduction="none")(h, y)
    assert rows.shape == (23,)
    accepted = set(inspect.signature(type(module)).parameters)
    accepted |= set(inspect.signature(module.forward).parameters)
    wanted = set(inspect.signature(selfkd.sd_dropout_head).parameters)
    assert wanted - accepted == {"weight", "bias"}
