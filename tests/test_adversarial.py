"""adversarial: the cases every back end runs, and what the operator promises beside them."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Mapping
from typing import Any

import harness
import pytest
import selfkd
import torch
import torch.nn.functional as F
from harness import needs_torch_backend
from selfkd import library

OP = "adversarial"
NAN, INF = torch.nan, torch.inf
MODES = ["bce", "hinge", "lsgan", "wgan"]
SIDES = ["discriminator", "generator"]
DTYPES = list(harness.DTYPES)
SIZES = [(1, 1), (5, 16), (17, 15), (128, 128), (1023, 1025), (1025, 1024), (2, 5000), (3000, 1)]
# Where something could overflow, cancel or vanish; all are exact in every dtype.
SCORES = [0.0, 2.0**-12, 0.5, 0.875, 1.0, 1.125, 2.0, 17.0, 19.0, 21.0, 40.0, 60.0]
SCORES += [86.0, 88.0, 90.0, 100.0, 103.0, 104.0, 110.0, 200.0, 720.0, 760.0, 10240.0]
SCORES += [-x for x in SCORES]


def scores(
    generator: torch.Generator, n: int, m: int | None, dtype: str, device: str = "cpu"
) -> dict[str, torch.Tensor]:
    """Scores of both sides, or of the generator's alone."""
    sizes = {"real": n} if m is None else {"real": n, "fake": m}
    drawn = {
        name: 3 * torch.randn(size, generator=generator, dtype=torch.float64)
        for name, size in sizes.items()
    }
    return harness.cast(drawn, OP, harness.DTYPES[dtype], device)


def differentiated(
    function: Callable[..., torch.Tensor],
    tensors: Mapping[str, torch.Tensor],
    options: Mapping[str, Any],
    grad: torch.Tensor | None = None,
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Result and gradients of a function of one side or of both."""
    live = {name: x.detach().requires_grad_() for name, x in tensors.items()}
    result = function(**live, **options)
    grads = torch.autograd.grad(
        result, list(live.values()), torch.ones_like(result) if grad is None else grad
    )
    return result.detach(), dict(zip(live, grads, strict=True))


def reference(
    tensors: Mapping[str, torch.Tensor],
    options: Mapping[str, Any],
    grad: torch.Tensor | None = None,
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    wide = {name: x.cpu().double() for name, x in tensors.items()}
    grad = None if grad is None else grad.cpu().double()
    return differentiated(selfkd.reference.adversarial, wide, options, grad)


def call(
    backend: harness.Backend,
    tensors: Mapping[str, torch.Tensor],
    options: Mapping[str, Any],
    grad: torch.Tensor | None = None,
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """On a back end; the C interface takes an empty tensor for fakes that are not there."""
    if backend.lib is None:
        return differentiated(selfkd.adversarial, tensors, options, grad)
    given = {"fake": tensors["real"].new_empty(0), **tensors}
    result, grads = backend.call(OP, given, options, grad)
    return result, {name: grads[name] for name in tensors}


def assert_each(found: torch.Tensor, expected: torch.Tensor, what: str, spacing: bool) -> None:
    """Each element to 3e-6 of itself (float64: 1e-12), however small; `spacing`: and half an ULP."""
    dtype = found.dtype
    tolerance = 1e-12 if dtype == torch.float64 else 3e-6
    found, expected = found.double().cpu(), expected.double().cpu()
    allowed = (tolerance + spacing * harness.HALF_ULP[dtype]) * expected.abs()
    error = (found - expected).abs() - 3 * (harness.HALF_SMALLEST[dtype] or 2.0**-1074)
    assert (error <= allowed).all(), f"{what}: {found} instead of {expected}"


def check(
    backend: harness.Backend,
    tensors: Mapping[str, torch.Tensor],
    options: Mapping[str, Any],
    grad: torch.Tensor | None = None,
) -> None:
    expected, expected_grads = reference(tensors, options, grad)
    found, grads = call(backend, tensors, options, grad)
    assert_each(found, expected, f"{options}", False)
    for name in tensors:
        assert grads[name].dtype == tensors[name].dtype
        assert_each(grads[name], expected_grads[name], f"gradient of {name}, {options}", True)


def drawn(n: int, m: int, *_: int) -> harness.Make:
    """Scores of both sides."""
    return lambda g: scores(g, n, m, "float64")


# Scores are rows of nothing: these are the tests that do not ask for classes.
STANDARD = harness.standard_tests(
    OP,
    drawn,
    path="scores",
    options=[{}, {"mode": "lsgan", "reduction": "sum"}],
    shapes={"threads": [(300_000, 200_000)]},
)
for name in ("test_sentences_of_the_contract", "test_path_and_kernel_ran", "test_threads"):
    globals()[name] = STANDARD[name]


def strided(x: torch.Tensor) -> torch.Tensor:
    return torch.stack([x, torch.full_like(x, NAN)], 1)[:, 0]


LAYOUTS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "contiguous": lambda x: x,
    "strided": strided,
    "unaligned": harness.unaligned,
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("backend", harness.backends(), ids=str)
def test_scores(
    backend: harness.Backend,
    sizes: tuple[int, int],
    mode: str,
    side: str,
    dtype: str,
    generator: torch.Generator,
) -> None:
    harness.prepare(backend)
    n, m = sizes[0], sizes[1] if side == "discriminator" else None
    tensors = scores(generator, n, m, dtype, backend.device)
    options = {"mode": mode, "side": side}
    for reduction in ["mean", "sum"] + (["none"] if m in (n, None) else []):
        check(backend, tensors, {**options, "reduction": reduction})
    if backend.variant:
        variant = "f64" if dtype == "float64" else backend.variant
        assert library.text("selfkd_last_path") == f"cpu {variant} scores"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("backend", harness.backends(), ids=str)
def test_extreme_scores_and_strides(
    backend: harness.Backend, layout: str, mode: str, side: str, dtype: str
) -> None:
    harness.prepare(backend)
    real = torch.tensor(SCORES, dtype=torch.float64)
    tensors = {"real": real, "fake": real.flip(0)} if side == "discriminator" else {"real": real}
    tensors = harness.cast(tensors, OP, harness.DTYPES[dtype], backend.device)
    tensors = {name: LAYOUTS[layout](x) for name, x in tensors.items()}
    check(backend, tensors, {"mode": mode, "side": side, "reduction": "none"})
    if layout == "contiguous":  # one side alone: small values are not hidden by large ones
        for name in tensors:
            one = {k: x if k == name else x[:0] for k, x in tensors.items()}
            for k in range(len(real)):
                one[name] = tensors[name][k : k + 1]
                check(backend, one, {"mode": mode, "side": side, "reduction": "sum"})


@pytest.mark.parametrize("backend", harness.backends(), ids=str)
def test_hinge_at_its_kink(backend: harness.Backend) -> None:
    """As relu in PyTorch: gradient 0 at the kink, and the whole one next to it."""
    harness.prepare(backend)
    one = torch.tensor(1.0)
    near = [torch.nextafter(one, torch.tensor(end)).item() for end in (0.0, 2.0)]
    real = torch.tensor([1.0, *near], device=backend.device)
    for reduction in ("none", "sum"):
        result, grads = call(
            backend, {"real": real, "fake": -real}, {"mode": "hinge", "reduction": reduction}
        )
        assert result.sum() == 2 * (1 - near[0])
        assert grads["real"].tolist() == [0, -1, 0]
        assert grads["fake"].tolist() == [0, 1, 0]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("backend", harness.backends(), ids=str)
def test_non_finite_scores_stay_alone(
    backend: harness.Backend, mode: str, dtype: str, generator: torch.Generator
) -> None:
    harness.prepare(backend)
    tensors = scores(generator, 40, 40, dtype, backend.device)
    for name, at in (("real", 3), ("fake", 20)):
        tensors[name][at : at + 3] = torch.tensor([NAN, INF, -INF])
    for given, side in ((tensors, "discriminator"), ({"real": tensors["real"]}, "generator")):
        options = {"mode": mode, "side": side, "reduction": "none"}
        expected, expected_grads = reference(given, options)
        found, grads = call(backend, given, options)
        pairs = [(found, expected)] + [(grads[name], expected_grads[name]) for name in given]
        for mine, right in pairs:
            finite = right.isfinite()
            assert torch.equal(
                mine.cpu()[~finite].double().nan_to_num(7.0, 8.0, 9.0),
                right[~finite].nan_to_num(7.0, 8.0, 9.0),
            )
            assert_each(mine.cpu()[finite], right[finite], mode, True)
            assert finite.sum() >= 34


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("backend", harness.backends(), ids=str)
def test_empty_batch(backend: harness.Backend, mode: str, side: str) -> None:
    harness.prepare(backend)
    some, none = torch.ones(3, device=backend.device), torch.ones(0, device=backend.device)
    options = {"mode": mode, "side": side}
    if side == "generator":
        batches = [{"real": none}]
    else:
        batches = [{"real": none, "fake": none}, {"real": none, "fake": some}]
        batches.append({"real": some, "fake": none})
    for tensors in batches:
        mean, grads = call(backend, tensors, {**options, "reduction": "mean"})
        assert mean.isnan()
        expected = reference(tensors, {**options, "reduction": "mean"})[1]
        for name in tensors:
            assert_each(grads[name], expected[name], name, True)
        check(backend, tensors, {**options, "reduction": "sum"})
    assert call(backend, batches[0], {**options, "reduction": "sum"})[0] == 0
    assert call(backend, batches[0], {**options, "reduction": "none"})[0].shape == (0,)


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("backend", harness.backends(), ids=str)
def test_incoming_gradient(
    backend: harness.Backend, mode: str, side: str, generator: torch.Generator
) -> None:
    harness.prepare(backend)
    tensors = scores(
        generator, 1030, 1030 if side == "discriminator" else None, "float32", backend.device
    )
    grad = torch.randn(1030, generator=generator).to(backend.device)
    options = {"mode": mode, "side": side}
    check(backend, tensors, {**options, "reduction": "none"}, grad)
    check(backend, tensors, {**options, "reduction": "none"}, strided(grad))
    check(backend, tensors, {**options, "reduction": "mean"}, grad[3])


@pytest.mark.parametrize("backend", harness.backends(emulated=False), ids=str)
def test_many_scores(backend: harness.Backend, generator: torch.Generator) -> None:
    """More than a grid of GPU blocks holds."""
    harness.prepare(backend)
    check(backend, scores(generator, 1_300_000, 900_001, "float32", backend.device), {})


# ---- what torch.ops and C callers can do beyond the Python function ----


@pytest.mark.parametrize("backend", harness.backends(), ids=str)
def test_every_output_of_the_operator(backend: harness.Backend, generator: torch.Generator) -> None:
    """What ops/adversarial.h says of loss, rows and fake_rows, whatever the reduction."""
    harness.prepare(backend)
    tensors = scores(generator, 40, 40, "float32", backend.device)
    real, fake = (F.softplus(s * x.cpu()) for s, x in zip((-1, 1), tensors.values(), strict=True))
    for code, expected in enumerate([real.sum() + fake.sum(), real.mean() + fake.mean()]):
        named = {**tensors, "mode": 0, "side": 0, "reduction": code}
        found = harness.run_operator(backend, OP, named)
        loss, rows, fake_rows = (x.cpu() for x in found.values())
        torch.testing.assert_close(loss, expected)
        torch.testing.assert_close(rows, real + fake if code == 0 else real)
        torch.testing.assert_close(fake_rows, fake)


@needs_torch_backend
def test_operator_alone_stays_within_its_tensors(generator: torch.Generator) -> None:
    """Sizes that the Python function refuses: rows and gradients end where the shorter side does."""
    run, backward = torch.ops.selfkd.adversarial, torch.ops.selfkd.adversarial_backward
    for n, m in ((3, 1500), (1500, 3)):
        real, fake = scores(generator, n, m, "float32").values()
        loss, rows, fake_rows = run(real, fake, 0, 0, 0)
        expected = F.softplus(-real)
        expected[: min(n, m)] += F.softplus(fake[:n])[: min(n, m)]
        torch.testing.assert_close(rows, expected)
        torch.testing.assert_close(fake_rows, F.softplus(fake))
        torch.testing.assert_close(loss, rows.sum())
        grad_fake = backward(torch.ones(n), real, fake, 0, 0, 0)[1]
        torch.testing.assert_close(grad_fake[:n], torch.sigmoid(fake[:n]))
        assert (grad_fake[n:] == 0).all()


# ---- PyTorch: gradients of gradients, compiler, autocast, views ----


def leaves(
    generator: torch.Generator, *sizes: int, dtype: torch.dtype = torch.float64
) -> list[torch.Tensor]:
    drawn = (torch.randn(n, generator=generator, dtype=torch.float64) for n in sizes)
    return [(2 * x).to(dtype).requires_grad_() for x in drawn]


@needs_torch_backend
@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_gradcheck(reduction: str, mode: str, side: str, generator: torch.Generator) -> None:
    def loss(*given: torch.Tensor) -> torch.Tensor:
        return selfkd.adversarial(*given, mode=mode, side=side, reduction=reduction)

    inputs = leaves(generator, *([6, 6] if side == "discriminator" else [6]))
    assert torch.autograd.gradcheck(loss, inputs)
    assert torch.autograd.gradgradcheck(loss, inputs)


@needs_torch_backend
@pytest.mark.parametrize("mode", MODES)
def test_double_backward_agrees_with_kernel_and_reference(
    mode: str, generator: torch.Generator
) -> None:
    count = library.library().selfkd_call_count
    inputs = leaves(generator, 7, 5)
    found, kernel = [], count(b"adversarial_backward")
    plain = torch.autograd.grad(selfkd.adversarial(*inputs, mode=mode), inputs)
    assert count(b"adversarial_backward") == kernel + 1
    for function in (selfkd.adversarial, selfkd.reference.adversarial):
        grads = torch.autograd.grad(function(*inputs, mode=mode), inputs, create_graph=True)
        found.append(grads)
        if mode in ("bce", "lsgan"):
            found[-1] += torch.autograd.grad(sum((x**2).sum() for x in grads), inputs)
    assert count(b"adversarial_backward") == kernel + 1
    torch.testing.assert_close(found[0], found[1])
    torch.testing.assert_close(found[0][:2], plain)


@needs_torch_backend
def test_one_live_side(generator: torch.Generator) -> None:
    real, fake = leaves(generator, 7, 5)
    both = torch.autograd.grad(selfkd.adversarial(real, fake), (real, fake))
    for create_graph in (False, True):
        grads = [
            torch.autograd.grad(loss, x, create_graph=create_graph)[0]
            for x, loss in (
                (real, selfkd.adversarial(real, fake.detach())),
                (fake, selfkd.adversarial(real.detach(), fake)),
            )
        ]
        torch.testing.assert_close(tuple(grads), both)


@needs_torch_backend
@pytest.mark.parametrize("reduction", [0, 1])
@pytest.mark.parametrize("side", [0, 1])
def test_opcheck(side: int, reduction: int, generator: torch.Generator) -> None:
    real, fake = leaves(generator, 6, 0 if side else 6, dtype=torch.float32)
    codes = (0, side, reduction)
    torch.library.opcheck(torch.ops.selfkd.adversarial.default, (real, fake, *codes))
    grad = torch.rand(6, generator=generator) if reduction == 0 else torch.tensor(2.0)
    torch.library.opcheck(
        torch.ops.selfkd.adversarial_backward.default, (grad, real.detach(), fake.detach(), *codes)
    )


@needs_torch_backend
@pytest.mark.parametrize("dynamic", [False, True])
def test_compile(dynamic: bool, generator: torch.Generator) -> None:
    def training_loss(real: torch.Tensor, fake: torch.Tensor) -> torch.Tensor:
        game = selfkd.adversarial(real * 1.5, fake) + selfkd.adversarial(
            fake.view(-1, 1), mode="hinge", side="generator"
        )
        return 2 * game + real.sum()

    torch._dynamo.reset()
    compiled = torch.compile(training_loss, fullgraph=True, dynamic=dynamic)
    counts = [library.library().selfkd_call_count(b"adversarial_backward")]
    for n in (4, 7):
        inputs = leaves(generator, n, n + 2, dtype=torch.float32)
        found, expected = compiled(*inputs), training_loss(*inputs)
        torch.testing.assert_close(found, expected)
        torch.testing.assert_close(
            torch.autograd.grad(found, inputs), torch.autograd.grad(expected, inputs)
        )
        counts.append(library.library().selfkd_call_count(b"adversarial_backward"))
    assert [b - a for a, b in itertools.pairwise(counts)] == [4, 4], (
        "the compiled backward skipped the kernel"
    )


@needs_torch_backend
def test_autocast_casts_the_narrower_side(generator: torch.Generator) -> None:
    real, fake = leaves(generator, 4, 6, dtype=torch.float32)
    with pytest.raises(TypeError, match="fake has dtype bfloat16, expected float32 like real"):
        selfkd.adversarial(real, fake.bfloat16())
    with torch.autocast("cpu", torch.bfloat16):
        loss = selfkd.adversarial(real, fake.bfloat16())
    torch.testing.assert_close(loss, selfkd.adversarial(real, fake.bfloat16().float()))
    assert torch.autograd.grad(loss, fake)[0].dtype == torch.float32


@needs_torch_backend
@pytest.mark.parametrize("side", SIDES)
def test_any_shape(side: str, generator: torch.Generator) -> None:
    block = torch.randn(2, 6, 5, 4, generator=generator)
    makers: list[Callable[[], torch.Tensor]] = [
        lambda: torch.randn((), generator=generator),
        lambda: block[:, :1].to(memory_format=torch.channels_last),
        lambda: block[:, 2:4],  # cannot be one dimension: copied
        lambda: block.movedim(1, -1),
        lambda: block[0, 0, 0, 0].expand(7, 3),
    ]
    for make in makers:
        count = 2 if side == "discriminator" else 1
        inputs = [make().detach().requires_grad_() for _ in range(count)]
        for reduction in ("mean", "sum", "none"):
            losses = [
                function(*inputs, side=side, reduction=reduction)
                for function in (selfkd.adversarial, selfkd.reference.adversarial)
            ]
            torch.testing.assert_close(losses[0], losses[1])
            grads = [torch.autograd.grad(loss.sum(), inputs) for loss in losses]
            torch.testing.assert_close(grads[0], grads[1])
    if side == "discriminator":  # any two shapes, where no element needs a partner
        real, fake = block[:, 0], block[0, :, 1]
        expected = selfkd.reference.adversarial(real, fake)
        torch.testing.assert_close(selfkd.adversarial(real, fake), expected)


@needs_torch_backend
def test_nothing_but_the_scores_is_kept_for_backward(generator: torch.Generator) -> None:
    inputs = leaves(generator, 640, 500)
    kept: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        selfkd.adversarial(*inputs)
    assert {x.data_ptr() for x in kept} == {x.data_ptr() for x in inputs}


@needs_torch_backend
def test_forms_are_those_of_the_literature(generator: torch.Generator) -> None:
    """Each formula as it is usually written."""
    r, f = leaves(generator, 8, 5)
    ones, zeros = torch.ones_like, torch.zeros_like
    bce, mse = F.binary_cross_entropy_with_logits, F.mse_loss
    expected = {
        "bce": (bce(r, ones(r)) + bce(f, zeros(f)), bce(f, ones(f))),
        "hinge": (F.relu(1 - r).mean() + F.relu(1 + f).mean(), -f.mean()),
        "lsgan": ((mse(r, ones(r)) + mse(f, zeros(f))) / 2, mse(f, ones(f)) / 2),
        "wgan": (f.mean() - r.mean(), -f.mean()),
    }
    for mode, (discriminator, generated) in expected.items():
        torch.testing.assert_close(selfkd.adversarial(r, f, mode=mode), discriminator)
        torch.testing.assert_close(selfkd.adversarial(f, mode=mode, side="generator"), generated)


# ---- errors ----

X = torch.ones(4)
ERRORS: dict[str, tuple[tuple[Any, ...], dict[str, Any]]] = {
    'adversarial: mode is "gan", expected "bce", "hinge", "lsgan" or "wgan"': (
        (X, X),
        {"mode": "gan"},
    ),
    'adversarial: side is "both", expected "discriminator" or "generator"': (
        (X, X),
        {"side": "both"},
    ),
    'adversarial: reduction is "max", expected "none", "mean" or "sum"': (
        (X, X),
        {"reduction": "max"},
    ),
    'adversarial: fake is None, expected the scores of the fakes with side "discriminator"': (
        (X,),
        {},
    ),
    'adversarial: fake is given, expected None with side "generator" '
    "(the scores of the fakes are its first argument)": ((X, X), {"side": "generator"}),
    'adversarial: fake has shape (3,), expected (4,) like real with reduction "none"': (
        (X, X[:3]),
        {"reduction": "none"},
    ),
}


@needs_torch_backend
@pytest.mark.parametrize("sentence", ERRORS)
@pytest.mark.parametrize("function", [selfkd.adversarial, selfkd.reference.adversarial])
def test_error_sentences(function: Callable[..., torch.Tensor], sentence: str) -> None:
    arguments, options = ERRORS[sentence]
    with pytest.raises(ValueError, match=f"^{re.escape(sentence)}$"):
        function(*arguments, **options)


@needs_torch_backend
def test_dtype_and_choice_sentences_of_the_operator() -> None:
    with pytest.raises(TypeError, match="adversarial: real has dtype int64, expected float16"):
        selfkd.adversarial(X.long(), X.long())
    sentence = r"mode is 4, expected 0 \(bce\), 1 \(hinge\), 2 \(lsgan\) or 3 \(wgan\)"
    with pytest.raises(RuntimeError, match=sentence):
        torch.ops.selfkd.adversarial(X, X, 4, 0, 1)
