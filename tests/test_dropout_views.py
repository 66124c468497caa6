"""dropout_views: the cases every back end runs, and what the masks promise."""

from __future__ import annotations

import re
from typing import Any

import harness
import pytest
import selfkd
import torch
import torch.nn.functional as F
from harness import Case
from selfkd.dropout_views import _philox

OP = "dropout_views"
NAN, INF = torch.nan, torch.inf
F32 = torch.float32
DTYPES = list(harness.DTYPES)
LARGEST = 2**63 - 1
SEED = 0x299F31D0A4093822


def batch(n: int, c: int, seed: int = SEED) -> Any:
    def make(g: torch.Generator) -> dict[str, torch.Tensor]:
        features = torch.randn(n, c, generator=g, dtype=torch.float64)
        grad = torch.randn(3, n, c, generator=g, dtype=torch.float64)
        return {"features": features, "seed": torch.tensor(seed), "grad": grad}

    return make


def call(backend: harness.Backend, tensors: dict[str, torch.Tensor], **options: Any) -> Any:
    """Views and the features' gradient, for the incoming gradient among the tensors."""
    tensors = dict(tensors)
    grad = tensors.pop("grad")
    views, grads = backend.call(OP, tensors, options, grad)
    return views, grads["features"]


WIDTHS = (1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 12, 15, 16, 17, 31, 33, 100, 120, 128, 130)
CASES = [
    *[Case(f"width_{n}", batch(9, n)) for n in WIDTHS],
    *[Case(f"width_{n}", batch(3, n)) for n in (1020, 1023, 1024, 1025, 1032, 2048, 2056, 4099)],
    *[Case(f"p_{p}", batch(7, 40), {"p": p}) for p in (0.0, 0.1, 0.75, 0.99, 1 - 2.0**-53)],
    *[Case(f"seed_{seed}", batch(7, 40, seed)) for seed in (0, 1, -1, LARGEST, -LARGEST - 1, 2**32)],
    *[Case(f"from_row_{n}", batch(7, 23), {"first_row": n}) for n in (1, 2, 3, 4, LARGEST)],
    # e / 4 passes 2^32 within a row: in counters that are a row's own, and in some that are not.
    *[
        Case(f"past_2^34_width_{n}", batch(3, n), {"first_row": 2**34 // n, "p": 0.3})
        for n in (37, 96, 100, 1500)
    ],
    Case("cifar_features", batch(128, 512), big=True),
    Case("imagenet_features", batch(8, 2048)),
    Case("many_rows", batch(3000, 3), big=True),
    Case("wide", batch(2, 100003), big=True),
]  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("backend", harness.backends(), ids=str)
def test_cases(
    backend: harness.Backend, case: Case, dtype: str, generator: torch.Generator
) -> None:
    harness.check_case(OP, case, backend, dtype, "contiguous", generator, path="runs")


def transposed(x: torch.Tensor) -> torch.Tensor:
    return x.mT.contiguous().mT


def repeated(x: torch.Tensor) -> torch.Tensor:
    """The last row again and again, at a stride of 0."""
    return x[..., -1:, :].expand(x.shape)


def apart(x: torch.Tensor) -> torch.Tensor:
    """One element between rows, or between views of rows: those after the first are not aligned."""
    return F.pad(x.flatten(1), (0, 1))[:, :-1].view(x.shape)


LAYOUTS = {
    "every_other": harness.every_other,
    "apart": apart,
    "unaligned": harness.unaligned,
    "transposed": transposed,
    "repeated": repeated,
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("grad", ["contiguous", *LAYOUTS])
@pytest.mark.parametrize("features", ["contiguous", *LAYOUTS])
@pytest.mark.parametrize("width", [16, 37, 1100])
@pytest.mark.parametrize("backend", harness.backends(), ids=str)
def test_strides(
    backend: harness.Backend,
    width: int,
    features: str,
    grad: str,
    dtype: str,
    generator: torch.Generator,
) -> None:
    harness.prepare(backend)
    to = {"contiguous": lambda x: x, **LAYOUTS}
    tensors = harness.cast(batch(5, width)(generator), OP, harness.DTYPES[dtype], backend.device)
    tensors["features"] = to[features](tensors["features"])
    tensors["grad"] = to[grad](tensors["grad"])
    harness.check_tensors(OP, Case("strides", batch(5, width)), backend, tensors)


@pytest.mark.parametrize("backend", harness.backends(), ids=str)
def test_one_gradient_for_all(backend: harness.Backend, generator: torch.Generator) -> None:
    """0-d, as C callers may give it, or expanded, as autograd does."""
    harness.prepare(backend)
    tensors = harness.cast(batch(6, 40)(generator), OP, F32, backend.device)
    one = torch.tensor(1.5, device=backend.device)
    tensors["grad"] = one.expand(3, 6, 40)
    _, expected = call(backend, {**tensors, "grad": one.expand(3, 6, 40).contiguous()})
    assert torch.equal(call(backend, tensors)[1], expected)
    if backend.call is not harness.through_torch:
        assert torch.equal(call(backend, {**tensors, "grad": one})[1], expected)


@pytest.mark.parametrize("p", [0.0, 0.1, 0.5, 0.9])
@pytest.mark.parametrize("width", [7, 64, 1030])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("backend", harness.backends(), ids=str)
def test_one_seed_is_one_mask_everywhere(
    backend: harness.Backend, dtype: str, width: int, p: float, generator: torch.Generator
) -> None:
    """The bits of the reference, features that are infinite, NaN or overflow among them."""
    harness.prepare(backend)
    tensors = harness.cast(batch(8, width)(generator), OP, harness.DTYPES[dtype], backend.device)
    tensors["features"][:, ::3] = torch.tensor([[INF, -INF, NAN, 6e4, -0.0, 6e-8, 1, 0]]).mT
    expected = selfkd.reference.dropout_views(tensors["features"], tensors["seed"], p=p)
    views, _ = call(backend, tensors, p=p)
    torch.testing.assert_close(views, expected, rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(views[0], tensors["features"], rtol=0, atol=0, equal_nan=True)
    if p == 0:
        torch.testing.assert_close(
            views, views[:1].expand_as(views), rtol=0, atol=0, equal_nan=True
        )
        assert torch.equal(views.signbit(), views[:1].signbit().expand_as(views))
    else:
        dropped = expected.nan_to_num(1)[1:] == 0
        assert (views[1:][dropped & (tensors["features"] != 0)] == 0).all()
        assert 0 < dropped.double().mean() < 1


@pytest.mark.parametrize("p", [0.5, 0.75])
@pytest.mark.parametrize("width", [7, 64, 1030])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("backend", harness.backends(), ids=str)
def test_gradient_is_exact_and_ignores_what_is_dropped(
    backend: harness.Backend, dtype: str, width: int, p: float, generator: torch.Generator
) -> None:
    harness.prepare(backend)
    tensors = harness.cast(batch(8, width)(generator), OP, harness.DTYPES[dtype], backend.device)
    grad = torch.randint(-8, 9, (3, 8, width), generator=generator).to(tensors["features"])
    ones = torch.ones_like(tensors["features"])
    mask = selfkd.reference.dropout_views(ones, tensors["seed"], p=p)
    expected = (mask.double() * grad.double()).sum(0).to(grad.dtype)
    spoiled = torch.where(mask == 0, grad.new_tensor([NAN, INF, -INF])[:, None, None], grad)
    for g in (grad, spoiled):
        assert torch.equal(call(backend, {**tensors, "grad": g}, p=p)[1], expected)
    spoiled = torch.where(mask != 0, NAN, grad)
    _, found = call(backend, {**tensors, "grad": spoiled}, p=p)
    assert found.isnan().all()  # of the clean view


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [7, 96, 700])
@pytest.mark.parametrize("backend", harness.backends(), ids=str)
def test_parts_of_a_batch_get_what_the_whole_does(
    backend: harness.Backend, width: int, dtype: str, generator: torch.Generator
) -> None:
    harness.prepare(backend)
    tensors = harness.cast(batch(12, width)(generator), OP, harness.DTYPES[dtype], backend.device)
    views, grad = call(backend, tensors, first_row=5)
    for a, b in ((0, 4), (4, 5), (5, 12)):
        part = {
            "features": tensors["features"][a:b],
            "seed": tensors["seed"],
            "grad": tensors["grad"][:, a:b],
        }
        found, found_grad = call(backend, part, first_row=5 + a)
        assert torch.equal(found, views[:, a:b])
        assert torch.equal(found_grad, grad[a:b])


@pytest.mark.parametrize("backend", harness.backends(), ids=str)
def test_empty_batch(backend: harness.Backend) -> None:
    harness.prepare(backend)
    for dtype in harness.DTYPES.values():
        features = torch.ones(0, 10, dtype=dtype, device=backend.device)
        tensors = {
            "features": features,
            "seed": torch.tensor(3, device=backend.device),
            "grad": torch.ones(3, 0, 10, dtype=dtype, device=backend.device),
        }
        views, grad = call(backend, tensors)
        assert views.shape == (3, 0, 10)
        assert grad.shape == (0, 10)
        assert views.dtype == grad.dtype == dtype


# ---- the masks ----

# Random123 (the generator's authors), tests/kat_vectors, "philox4x32 10"
VECTORS = [
    ((0, 0, 0, 0), 0, (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((0xFFFFFFFF,) * 4, -1, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        SEED,
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


@pytest.mark.parametrize(("counter", "seed", "expected"), VECTORS)
def test_known_answers(counter: tuple[int, ...], seed: int, expected: tuple[int, ...]) -> None:
    words = _philox(tuple(torch.tensor(x) for x in counter), torch.tensor(seed))
    assert tuple(int(x) for x in words) == expected


@pytest.mark.parametrize("sample", [0, 1])
@pytest.mark.parametrize("backend", harness.backends(), ids=str)
def test_words_decide_to_the_last_bit_what_is_kept(backend: harness.Backend, sample: int) -> None:
    """Features 0 to 3 under seed 0: in sample u, their words are the first known answer."""
    harness.prepare(backend)
    zero = torch.tensor(0)
    words = tuple(int(x) for x in _philox((zero, zero, torch.tensor(sample), zero), zero))
    assert sample == 1 or words == VECTORS[0][2]
    grad = torch.zeros(3, 1, 4, device=backend.device)
    grad[1 + sample] = 1
    features, seed = torch.ones(1, 4, device=backend.device), zero.to(backend.device)
    for k, word in enumerate(words):
        for threshold, kept in ((word, True), (word + 1, False)):
            tensors = {"features": features, "seed": seed, "grad": grad}
            views, found = call(backend, tensors, p=threshold / 2**32)
            assert (views[1 + sample, 0, k] != 0) == kept
            assert (found[0, k] != 0) == kept


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
@pytest.mark.parametrize("seed", [0, 1, -1, LARGEST])
@pytest.mark.parametrize("first_row", [0, 2**40])
@pytest.mark.parametrize("backend", harness.backends(), ids=str)
def test_statistics(backend: harness.Backend, first_row: int, seed: int, p: float) -> None:
    """Rates and correlations (of u with v, of neighbours, of rows, of seeds) within 5 sigma."""
    harness.prepare(backend)
    n, c = 200, 150
    ones = torch.ones(n, c, device=backend.device)
    kept = []
    for s in (seed, seed // 2 + 7):
        given = {"seed": torch.tensor(s, device=backend.device), "grad": ones.expand(3, n, c)}
        views, _ = call(backend, {"features": ones, **given}, p=p, first_row=first_row)
        kept.append((views != 0).double().cpu())
    variance = p * (1 - p)
    u, v, other = (x - (1 - p) for x in (kept[0][1], kept[0][2], kept[1][1]))
    for x in (u, v, other):
        for count, mean in ((n * c, x.mean()), (n, x.mean(0)), (c, x.mean(1))):
            assert (mean.abs() < 5 * (variance / count) ** 0.5).all()
    pairs = [(u, v), (u, other), (v, other), (u[:, 1:], u[:, :-1]), (u[:, 4:], u[:, :-4])]
    for a, b in [*pairs, (u[1:], u[:-1]), (u[:, 1:], v[:, :-1])]:
        assert abs((a * b).mean()) < 5 * variance / a.numel() ** 0.5


# ---- PyTorch: gradients of gradients, compiler, sentences ----

needs_torch_backend = pytest.mark.skipif(
    bool(harness.SIMT_LIBRARY), reason="the emulator has no PyTorch binding"
)


@needs_torch_backend
@pytest.mark.parametrize("p", [0.0, 0.3])
def test_gradcheck(p: float, generator: torch.Generator) -> None:
    features = batch(3, 7)(generator)["features"].requires_grad_()
    seed = torch.tensor(SEED)

    def views(x: torch.Tensor) -> torch.Tensor:
        return selfkd.dropout_views(x, seed, p=p)

    assert torch.autograd.gradcheck(views, features)
    assert torch.autograd.gradgradcheck(views, features)


@needs_torch_backend
def test_double_backward_agrees_with_kernel_and_reference(generator: torch.Generator) -> None:
    """The views are linear in the features, so that only a function of them has second gradients."""
    tensors = batch(4, 9)(generator)
    x, seed = tensors["features"].requires_grad_(), tensors["seed"]
    before, found = harness.backward_calls(OP), []
    plain = torch.autograd.grad((selfkd.dropout_views(x, seed) ** 3).sum(), x)[0]
    assert harness.backward_calls(OP) == before + 1
    for module in (selfkd, selfkd.reference):
        loss = (module.dropout_views(x, seed) ** 3).sum()
        first = torch.autograd.grad(loss, x, create_graph=True)[0]
        found.append((first, *torch.autograd.grad((first**2).sum(), x)))
    torch.testing.assert_close(found[0], found[1])
    torch.testing.assert_close(found[0][0], plain)


@needs_torch_backend
def test_opcheck(generator: torch.Generator) -> None:
    tensors = harness.cast(batch(4, 6)(generator), OP, F32)
    grad = tensors.pop("grad")
    harness.check_operator(OP, tensors, {"p": 0.25, "first_row": 3}, grad)


@needs_torch_backend
@pytest.mark.parametrize("dynamic", [False, True])
def test_compile(dynamic: bool, generator: torch.Generator) -> None:
    batches = []
    for n in (4, 7):
        tensors = harness.cast(batch(n, 6)(generator), OP, F32)
        batches.append({name: tensors[name] for name in ("features", "seed")})
    harness.check_compile(OP, batches, {"p": 0.25}, dynamic)


@needs_torch_backend
@pytest.mark.parametrize("shape", [(300, 500), (2, 100000), (9001, 17)], ids=str)
def test_threads(shape: tuple[int, int], generator: torch.Generator) -> None:
    tensors = harness.cast(batch(*shape)(generator), OP, F32)
    grad = tensors.pop("grad")
    before, runs = torch.get_num_threads(), []
    for threads in (1, 2, 2):
        torch.set_num_threads(threads)
        runs.append(harness.through_torch(OP, tensors, {}, grad))
    torch.set_num_threads(before)
    for views, grads in runs[1:]:
        assert torch.equal(views, runs[0][0])
        assert torch.equal(grads["features"], runs[0][1]["features"])


@needs_torch_backend
def test_nothing_but_the_inputs_is_saved(generator: torch.Generator) -> None:
    tensors = harness.cast(batch(64, 100)(generator), OP, F32)
    harness.check_saved_bytes(OP, {name: tensors[name] for name in ("features", "seed")}, rows=0)


@needs_torch_backend
def test_sd_dropout_of_the_views(generator: torch.Generator) -> None:
    """One product of the stacked views is the three logits of SD-Dropout, and backward that of F.dropout."""
    tensors = batch(6, 40)(generator)
    x, seed = tensors["features"].requires_grad_(), tensors["seed"]
    weight = torch.randn(10, 40, generator=generator, dtype=torch.float64)
    views = selfkd.dropout_views(x, seed, p=0.25)
    kept = views.detach() != 0
    assert (kept == torch.stack([torch.ones_like(kept[0]), kept[1], kept[2]])).all()
    by_hand = torch.stack([x, x * kept[1] / 0.75, x * kept[2] / 0.75])
    found, expected = (
        torch.autograd.grad(F.linear(v, weight).sin().sum(), x) for v in (views, by_hand)
    )
    torch.testing.assert_close(views, by_hand)
    torch.testing.assert_close(found, expected)


ONES, SEED_0 = torch.ones(4, 6), torch.tensor(0)
SENTENCES: dict[str, tuple[type[Exception], dict[str, Any]]] = {
    "dropout_views: p is 1, expected a number >= 0 and < 1": (ValueError, {"p": 1.0}),
    "dropout_views: p is -0.1, expected a number >= 0 and < 1": (ValueError, {"p": -0.1}),
    "dropout_views: p is nan, expected a number >= 0 and < 1": (ValueError, {"p": NAN}),
    "dropout_views: first_row is -1, expected a finite number >= 0": (
        ValueError,
        {"first_row": -1},
    ),
    "dropout_views: seed has dtype int32, expected int64": (TypeError, {"seed": SEED_0.int()}),
    "dropout_views: seed has dtype float32, expected int64": (TypeError, {"seed": SEED_0.float()}),
    "dropout_views: seed has 1 dimension, expected 0": (ValueError, {"seed": SEED_0.view(1)}),
    "dropout_views: seed is of type int, expected a 0-d int64 tensor": (TypeError, {"seed": 0}),
    "dropout_views: seed is on meta, expected cpu like features": (
        TypeError,
        {"seed": SEED_0.to("meta")},
    ),
    "dropout_views: features has 1 dimension, expected 2": (ValueError, {"features": ONES[0]}),
    "dropout_views: features has 3 dimensions, expected 2": (ValueError, {"features": ONES[None]}),
    "dropout_views: features has size 0 in dimension C, expected at least 1": (
        ValueError,
        {"features": ONES[:, :0]},
    ),
    "dropout_views: features has dtype int64, expected float16, bfloat16, float32 or float64": (
        TypeError,
        {"features": ONES.long()},
    ),
}


@needs_torch_backend
@pytest.mark.parametrize("sentence", SENTENCES)
def test_sentences(sentence: str) -> None:
    error, wrong = SENTENCES[sentence]
    arguments = {"features": ONES, "seed": SEED_0, **wrong}
    with pytest.raises(error, match=f"^{re.escape(sentence)}"):
        selfkd.dropout_views(**arguments)
