"""bifpn_fuse: cases, and what only this operator promises. The checks are in harness.py."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

import harness
import pytest
import selfkd
import torch
import torch.nn.functional as F
from harness import Case

OP = "bifpn_fuse"
F32 = torch.float32
NAN, INF = float("nan"), float("inf")
Make = Callable[[torch.Generator], dict[str, torch.Tensor]]
Size = tuple[int, int]


def maps(
    n: int,
    c: int,
    *sizes: Size,
    weight: Sequence[float] | None = None,
    whole: bool = False,
) -> Make:
    """Maps of these sizes, the first that of the result; `whole`: small whole numbers, full of ties."""

    def make(generator: torch.Generator) -> dict[str, torch.Tensor]:
        draw = [
            torch.randn(n, c, *size, generator=generator, dtype=torch.float64) for size in sizes
        ]
        if whole:
            draw = [x.mul(1.5).round() for x in draw]
        tensors = dict(zip("abc", draw, strict=False))
        if weight is not None:
            tensors["weight"] = torch.tensor(weight, dtype=torch.float64)
        tensors["grad"] = torch.randn(n, c, *sizes[0], generator=generator, dtype=torch.float64)
        return tensors

    return make


def ways(b: str = "none", c: str = "none", **more: Any) -> dict[str, Any]:
    return {"resize_b": b, "resize_c": c, **more}


W2, W3 = (0.7, 1.9), (1.3, 0.4, 2.2)
SILU, NO = {"activation": "silu"}, {"activation": "none"}
LATE = {"activate": "output"}

CASES = [
    Case("two", maps(2, 3, (4, 5), (4, 5), weight=W2)),
    Case("plain_sum", maps(2, 3, (4, 5), (4, 5), (4, 5))),
    Case("top_down", maps(2, 3, (8, 6), (4, 3), weight=W2), ways("nearest")),
    Case("bottom_up", maps(2, 3, (4, 3), (4, 3), (8, 6), weight=W3), ways(c="maxpool")),
    Case("pooled_second", maps(2, 2, (4, 4), (8, 7), (2, 2)), ways("maxpool", "nearest")),
    Case("bilinear_up", maps(2, 3, (8, 6), (4, 3), weight=W2), ways("bilinear")),
    Case(
        "three_halves", maps(1, 3, (9, 6), (6, 4), (6, 4), weight=W3), ways("bilinear", "nearest")
    ),
    Case("down", maps(2, 3, (3, 4), (7, 9), (8, 10), weight=W3), ways("nearest", "bilinear")),
    Case(
        "far_down", maps(1, 2, (2, 3), (40, 50), (41, 37), weight=W3), ways("bilinear", "nearest")
    ),
    Case("far_up", maps(1, 2, (30, 41), (2, 3), (1, 1), weight=W3), ways("bilinear", "nearest")),
    Case("up_and_down", maps(1, 2, (3, 17), (9, 4), (5, 40)), ways("bilinear", "nearest", **NO)),
    Case("one_pixel", maps(3, 2, (1, 1), (1, 1), (2, 1), weight=W3), ways("maxpool", "bilinear")),
    Case("pooled_1x2", maps(1, 1, (1, 1), (2, 1), (1, 2), weight=W3), ways("maxpool", "maxpool")),
    Case("ties", maps(2, 3, (4, 4), (7, 8), (8, 7), whole=True), ways("maxpool", "maxpool", **NO)),
    Case(
        "ties_relu", maps(2, 3, (5, 9), (9, 17), (10, 18), whole=True), ways("maxpool", "maxpool")
    ),
    Case(
        "silu", maps(2, 3, (4, 4), (2, 2), (7, 7), weight=W3), ways("bilinear", "maxpool", **SILU)
    ),
    Case("silu_nearest", maps(2, 3, (4, 6), (2, 3), weight=W2), ways("nearest", **SILU)),
    Case(
        "late_relu",
        maps(2, 3, (4, 6), (2, 3), (8, 11), weight=W3),
        ways("nearest", "maxpool", **LATE),
    ),
    Case(
        "late_silu",
        maps(2, 3, (5, 4), (3, 7), (9, 8), weight=W3),
        ways("bilinear", "maxpool", **SILU, **LATE),
    ),
    Case("late_none", maps(2, 3, (5, 4), (3, 7), weight=W2), ways("bilinear", **NO, **LATE)),
    Case(
        "negative_weight",
        maps(2, 3, (4, 4), (4, 4), (2, 2), weight=(0.5, -1, 2)),
        ways(c="nearest"),
    ),
    Case("zero_weight", maps(2, 3, (4, 4), (4, 4), weight=(0, 2))),
    Case("all_negative", maps(2, 3, (4, 4), (4, 4), weight=(-0.5, 0))),
    Case("large_eps", maps(2, 3, (4, 4), (4, 4), weight=W2), {"eps": 0.75}),
    Case("width_15", maps(1, 3, (3, 15), (3, 8), (6, 30), weight=W3), ways("nearest", "maxpool")),
    Case("width_16", maps(1, 3, (3, 16), (5, 7), (6, 31), weight=W3), ways("bilinear", "maxpool")),
    Case("width_17", maps(1, 3, (3, 17), (3, 9), (5, 33), weight=W3), ways("nearest", "maxpool")),
    Case("width_33", maps(1, 2, (5, 33), (9, 65), (3, 17), weight=W3), ways("maxpool", "bilinear")),
    Case(
        "many_channels", maps(2, 37, (4, 4), (2, 2), (7, 7), weight=W3), ways("nearest", "maxpool")
    ),
    Case(
        "frskd",
        maps(2, 64, (16, 16), (8, 8), (32, 32), weight=(1, 1, 1)),
        ways("nearest", "maxpool"),
        big=True,
    ),
    Case(
        "wide_channels",
        maps(1, 600, (3, 4), (2, 2), (6, 7), weight=W3),
        ways("bilinear", "maxpool"),
        big=True,
    ),
    Case(
        "many_rows",
        maps(1, 2, (150, 130), (80, 60), (299, 260), weight=W3),
        ways("bilinear", "maxpool"),
        big=True,
    ),
    Case(
        "wide_rows",
        maps(1, 2, (3, 2500), (2, 1250), (5, 5000), weight=W3),
        ways("nearest", "maxpool"),
        big=True,
    ),
    Case(
        "wide_bilinear",
        maps(1, 2, (3, 2500), (2, 3700), (4, 900), weight=W3),
        ways("bilinear", "bilinear"),
        big=True,
    ),
    Case(
        "wide_late",
        maps(1, 2, (3, 2500), (2, 3), (5, 5000), weight=W3),
        ways("bilinear", "maxpool", **LATE),
        big=True,
    ),
    Case(
        "wide_late_down",
        maps(1, 2, (3, 2500), (2, 100), (4, 9000), weight=W3),
        ways("bilinear", "bilinear", **LATE),
        big=True,
    ),
    Case(
        "very_far_up",
        maps(1, 2, (3, 5000), (2, 1), (1, 2), weight=W3),
        ways("nearest", "bilinear"),
        big=True,
    ),
    Case(
        "very_far_down",
        maps(1, 2, (2, 3), (4, 5000), (3, 9000), weight=W3),
        ways("nearest", "bilinear"),
        big=True,
    ),
]


@pytest.mark.parametrize("backend", harness.backends(), ids=str)
@pytest.mark.parametrize("layout", harness.LAYOUTS)
@pytest.mark.parametrize("dtype", harness.DTYPES)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_cases(
    backend: harness.Backend, case: Case, dtype: str, layout: str, generator: torch.Generator
) -> None:
    harness.check_case(OP, case, backend, dtype, layout, generator)


# ---- what is not a number, and what is not there ----


@pytest.mark.parametrize("backend", harness.backends(), ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("activation", ["none", "relu", "silu"])
@pytest.mark.parametrize("size", [(7, 9), (8, 10), (1, 1), (2, 3)], ids=str)
def test_infinities_and_nan_are_pooled_as_in_pytorch(
    backend: harness.Backend,
    layout: str,
    activation: str,
    size: Size,
    generator: torch.Generator,
) -> None:
    """NaN wins, the last one of several; of a window of -inf the first that is not padding."""
    harness.prepare(backend)
    half = ((size[0] + 1) // 2, (size[1] + 1) // 2)
    tensors = maps(2, 3, half, size)(generator)
    x = tensors["b"]
    x[0, 0] = -INF
    x[1, 2][torch.rand(size, generator=generator) < 0.3] = NAN
    x[0, 1][torch.rand(size, generator=generator) < 0.5] = INF
    if activation == "silu":  # whose gradient at an infinity is NaN
        x.clamp_(-100, 100)
    tensors = {name: x.to(backend.device, F32) for name, x in tensors.items()}
    tensors = {name: harness.LAYOUTS[layout](x) for name, x in tensors.items()}
    grad = tensors.pop("grad")
    options = ways("maxpool", activation=activation)
    expected, expected_grads = harness.reference(OP, tensors, options, grad)
    found, grads = backend.call(OP, tensors, options, grad)
    same = {"rtol": 1e-5, "atol": 1e-5, "equal_nan": True, "check_dtype": False}
    torch.testing.assert_close(found.cpu(), expected, **same)
    torch.testing.assert_close(grads["b"].cpu(), expected_grads["b"], **same)


@pytest.mark.parametrize("backend", harness.backends(), ids=str)
def test_relu_has_no_gradient_at_zero(backend: harness.Backend) -> None:
    harness.prepare(backend)
    zero = torch.zeros(1, 2, 3, 3, device=backend.device)
    tensors = {"a": zero, "b": zero.clone(), "weight": torch.zeros(2, device=backend.device)}
    found, grads = backend.call(OP, tensors, {})
    assert (found == 0).all()
    assert all((grad == 0).all() for grad in grads.values())


@pytest.mark.parametrize("backend", harness.backends(), ids=str)
def test_empty(backend: harness.Backend) -> None:
    harness.prepare(backend)
    for small, large in [((0, 3, 2, 2), (0, 3, 4, 4)), ((2, 3, 0, 2), (2, 3, 0, 4))]:
        a, c = (torch.zeros(size, device=backend.device) for size in (small, large))
        tensors = {"a": a, "b": a, "c": c, "weight": torch.ones(3, device=backend.device)}
        found, grads = backend.call(OP, tensors, ways(c="maxpool"))
        assert found.shape == a.shape
        assert grads["c"].shape == c.shape
        assert (grads["weight"] == 0).all()


@pytest.mark.parametrize("backend", harness.backends(), ids=str)
def test_maps_of_different_strides(backend: harness.Backend, generator: torch.Generator) -> None:
    harness.prepare(backend)
    made = maps(2, 20, (6, 5), (3, 4), (12, 9), weight=W3)(generator)
    tensors = harness.cast(made, OP, F32, backend.device)
    for order in (("contiguous", "channels_last", "every_other"), ("channels_last", "contiguous")):
        mixed = dict(tensors)
        for name, layout in zip("bca", order, strict=False):
            mixed[name] = harness.LAYOUTS[layout](mixed[name])
        mixed["grad"] = mixed["grad"].transpose(2, 3).contiguous().transpose(2, 3)
        case = Case("mixed", maps(1, 1, (1, 1)), ways("bilinear", "maxpool"))
        harness.check_tensors(OP, case, backend, mixed)


@pytest.mark.parametrize("backend", harness.backends(), ids=str)
def test_nearest_of_all_ratios(backend: harness.Backend) -> None:
    """The sources are PyTorch's, whose float32 product rounds at odd ratios."""
    harness.prepare(backend)
    for a in range(1, 48, 3 if backend.name == "simt" else 1):
        for b in range(1, 60, 7):
            x = torch.arange(b, dtype=F32, device=backend.device).expand(1, 1, 1, b)
            zero = torch.zeros(1, 1, 1, a, device=backend.device)
            tensors, options = {"a": zero, "b": x.contiguous()}, ways("nearest", activation="none")
            found, grads = backend.call(OP, tensors, options)
            expected = F.interpolate(x.cpu(), size=(1, a), mode="nearest")
            assert torch.equal(found.cpu(), expected)
            counts = torch.bincount(expected.long().flatten(), minlength=b).view(1, 1, 1, b)
            assert torch.equal(grads["b"].cpu(), counts.float())


# ---- PyTorch: gradients of gradients, compiler, strides, sentences ----

needs_torch_backend = pytest.mark.skipif(
    bool(harness.SIMT_LIBRARY), reason="the emulator has no PyTorch binding"
)
MIXED = maps(2, 2, (3, 4), (2, 3), (6, 7), weight=W3)
TWO = maps(2, 2, (3, 4), (6, 8))


def without_grad(make: Make, generator: torch.Generator) -> dict[str, torch.Tensor]:
    return {name: x for name, x in make(generator).items() if name != "grad"}


@needs_torch_backend
@pytest.mark.parametrize("activate", ["inputs", "output"])
@pytest.mark.parametrize("activation", ["none", "relu", "silu"])
def test_gradcheck(activation: str, activate: str, generator: torch.Generator) -> None:
    tensors = without_grad(MIXED, generator)
    live = [x.requires_grad_() for x in tensors.values()]

    def fused(a: Any, b: Any, c: Any, weight: Any) -> torch.Tensor:
        return selfkd.bifpn_fuse(
            *(a, b, c),
            weight=weight,
            resize=(None, "bilinear", "maxpool"),
            activation=activation,
            activate=activate,
        )

    assert torch.autograd.gradcheck(fused, live)
    assert torch.autograd.gradgradcheck(fused, live)


@needs_torch_backend
@pytest.mark.parametrize("options", [SILU, LATE, {}], ids=str)
def test_double_backward_agrees_with_kernel_and_reference(
    options: dict[str, Any], generator: torch.Generator
) -> None:
    harness.check_double_backward(
        OP, without_grad(MIXED, generator), ways("nearest", "maxpool", **options)
    )
    harness.check_double_backward(OP, without_grad(TWO, generator), ways("bilinear", **options))


@needs_torch_backend
@pytest.mark.parametrize("make", [MIXED, TWO])
def test_opcheck(make: Make, generator: torch.Generator) -> None:
    tensors = harness.cast(make(generator), OP, F32)
    tensors["a"] = tensors["a"].to(memory_format=torch.channels_last)
    grad = tensors.pop("grad")
    codes = {"resize_b": 2, "resize_c": 3, "activation": 2}
    harness.check_operator(OP, tensors, codes if "c" in tensors else {"resize_b": 1}, grad)


@needs_torch_backend
@pytest.mark.parametrize("dynamic", [False, True])
def test_compile(dynamic: bool, generator: torch.Generator) -> None:
    batches = [
        harness.cast(
            without_grad(maps(n, 3, (4, k), (2, k), (8, 2 * k), weight=W3), generator), OP, F32
        )
        for n, k in ((2, 6), (3, 5))
    ]
    harness.check_compile(OP, batches, ways("nearest", "maxpool"), dynamic)
    two = [{name: x for name, x in batch.items() if name in "ab"} for batch in batches]
    harness.check_compile(OP, two, ways("bilinear"), dynamic)


@needs_torch_backend
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("c", ["maxpool", "bilinear"])
def test_threads(layout: str, c: str, generator: torch.Generator) -> None:
    made = without_grad(maps(3, 70, (40, 37), (20, 19), (80, 74), weight=W3), generator)
    tensors = harness.cast(made, OP, F32)
    tensors |= {name: harness.LAYOUTS[layout](tensors[name]) for name in "abc"}
    harness.check_threads(OP, tensors, ways("bilinear", c, **LATE))


@needs_torch_backend
@pytest.mark.parametrize("activate", ["inputs", "output"])
def test_nothing_is_kept_for_backward_but_the_inputs(
    activate: str, generator: torch.Generator
) -> None:
    tensors = harness.cast(without_grad(MIXED, generator), OP, F32)
    given, kept = harness.leaves(OP, tensors), []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        selfkd.bifpn_fuse(
            *(given[name] for name in "abc"),
            weight=given["weight"],
            resize=(None, "nearest", "maxpool"),
            activate=activate,
        )
    assert {x.data_ptr() for x in kept} == {x.data_ptr() for x in given.values()}


@needs_torch_backend
def test_path_and_kernel_ran(generator: torch.Generator) -> None:
    for layout, path in (("contiguous", "positions"), ("channels_last", "channels")):
        tensors = harness.cast(without_grad(MIXED, generator), OP, F32)
        tensors |= {name: harness.LAYOUTS[layout](tensors[name]) for name in "abc"}
        before = harness.backward_calls(OP)
        harness.through_torch(OP, tensors, ways("nearest", "maxpool"))
        assert harness.backward_calls(OP) == before + 1
        assert selfkd.library.text("selfkd_last_path").endswith(path)


@needs_torch_backend
def test_autocast_takes_the_widest(generator: torch.Generator) -> None:
    a, b = (torch.randn(1, 2, 4, 4, generator=generator) for _ in range(2))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert selfkd.bifpn_fuse(a.bfloat16(), b).dtype == F32
        assert selfkd.bifpn_fuse(a.bfloat16(), b.bfloat16()).dtype == torch.bfloat16


@needs_torch_backend
@pytest.mark.parametrize("function", [selfkd.bifpn_fuse, selfkd.reference.bifpn_fuse])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, F32, torch.float64])
@pytest.mark.parametrize("narrow", [torch.float16, torch.bfloat16, F32])
def test_weight_of_any_dtype(
    function: Any, narrow: torch.dtype, dtype: torch.dtype, generator: torch.Generator
) -> None:
    """Read in float32, as if cast; its gradient comes back in its own dtype, as in a module in half."""
    maps = [torch.randn(2, 3, 4, 5, generator=generator).to(narrow) for _ in range(3)]
    given = torch.tensor([0.3, 1.7, 0.9], dtype=dtype, requires_grad=True)
    wide = given.detach().float().requires_grad_()
    results = [function(*maps, weight=w) for w in (given, wide)]
    assert torch.equal(*results)
    found, expected = (
        torch.autograd.grad(x.float().square().sum(), w)[0]
        for x, w in zip(results, (given, wide), strict=True)
    )
    assert found.dtype == dtype
    assert torch.equal(found, expected.to(dtype))


@needs_torch_backend
def test_the_authors_fusion(generator: torch.Generator) -> None:
    """Of the FRSKD code: F.pad with zeros before the pooling, for the maps are not negative."""
    x, y, z = (torch.randn(2, 3, n, n, generator=generator) for n in (5, 5, 10))
    w = F.relu(torch.tensor([1.0, -0.5, 2.0]))
    pooled = F.max_pool2d(F.pad(F.relu(z), (0, 1, 0, 1)), 3, 2)
    expected = (w[0] * F.relu(x) + w[1] * F.relu(y) + w[2] * pooled) / (w.sum() + 1e-6)
    found = selfkd.bifpn_fuse(x, y, z, weight=w, resize=(None, None, "maxpool"))
    torch.testing.assert_close(found, expected)


A = torch.ones(2, 3, 4, 6)
SENTENCES: dict[str, tuple[type[Exception], tuple[torch.Tensor, ...], dict[str, Any]]] = {
    "bifpn_fuse: inputs has 1 maps, expected 2 or 3": (ValueError, (A,), {}),
    "bifpn_fuse: inputs has 4 maps, expected 2 or 3": (ValueError, (A,) * 4, {}),
    "bifpn_fuse: b has size 2 in dimension 2, expected 4 with resize_b none": (
        ValueError,
        (A, A[:, :, :2]),
        {},
    ),
    "bifpn_fuse: c has size 5 in dimension 3, expected 6 with resize_c none": (
        ValueError,
        (A, A, A[..., :5]),
        {},
    ),
    "bifpn_fuse: b has size 4 in dimension 2, expected 7 or 8 with resize_b maxpool": (
        ValueError,
        (A, A),
        {"resize": (None, "maxpool")},
    ),
    "bifpn_fuse: b has size 0 in dimension 3, expected at least 1 with resize_b nearest": (
        ValueError,
        (A, A[..., :0]),
        {"resize": (None, "nearest")},
    ),
    "bifpn_fuse: b has size 1 in dimension N, expected 2": (ValueError, (A, A[:1]), {}),
    "bifpn_fuse: b has size 2 in dimension C, expected 3": (ValueError, (A, A[:, :2]), {}),
    "bifpn_fuse: b has 3 dimensions, expected 4": (ValueError, (A, A[0]), {}),
    "bifpn_fuse: c has dtype float64, expected float32 like a": (TypeError, (A, A, A.double()), {}),
    "bifpn_fuse: weight has size 2 in dimension 0, expected 3": (
        ValueError,
        (A, A, A),
        {"weight": torch.ones(2)},
    ),
    "bifpn_fuse: weight has size 3 in dimension 0, expected 2": (
        ValueError,
        (A, A),
        {"weight": torch.ones(3)},
    ),
    "bifpn_fuse: weight has dtype int64, expected float32": (
        TypeError,
        (A, A),
        {"weight": torch.ones(2).long()},
    ),
    "bifpn_fuse: resize has 2 entries, expected 3 entries, one for each input": (
        ValueError,
        (A, A, A),
        {"resize": (None, None)},
    ),
    'bifpn_fuse: resize is "nearest", expected 2 entries, one for each input': (
        ValueError,
        (A, A),
        {"resize": "nearest"},
    ),
    'bifpn_fuse: resize is "nearest" for the first input, expected None': (
        ValueError,
        (A, A),
        {"resize": ("nearest", None)},
    ),
    'bifpn_fuse: resize_b is "cubic", expected "none", "nearest", "bilinear" or "maxpool"': (
        ValueError,
        (A, A),
        {"resize": (None, "cubic")},
    ),
    'bifpn_fuse: activation is "gelu", expected "none", "relu" or "silu"': (
        ValueError,
        (A, A),
        {"activation": "gelu"},
    ),
    'bifpn_fuse: activate is "both", expected "inputs" or "output"': (
        ValueError,
        (A, A),
        {"activate": "both"},
    ),
    "bifpn_fuse: eps is -1, expected a finite number >= 0": (ValueError, (A, A), {"eps": -1.0}),
}


@needs_torch_backend
@pytest.mark.parametrize("sentence", SENTENCES)
def test_sentences(sentence: str) -> None:
    error, inputs, options = SENTENCES[sentence]
    for requires_grad in (False, True):
        given = [x.detach().requires_grad_(requires_grad) for x in inputs]
        with pytest.raises(error, match=f"^{re.escape(sentence)}"):
            selfkd.bifpn_fuse(*given, **options)


@needs_torch_backend
@pytest.mark.parametrize("sentence", [x for x in SENTENCES if "with resize" in x])
def test_python_and_c_say_the_same(sentence: str) -> None:
    _, inputs, options = SENTENCES[sentence]
    ways_given = [way or "none" for way in options.get("resize", (None,) * len(inputs))]
    named = dict(zip(("resize_b", "resize_c"), ways_given[1:], strict=False))
    with pytest.raises(RuntimeError, match=re.escape(sentence)):
        torch.ops.selfkd.bifpn_fuse(
            *harness.schema_values(
                OP,
                dict(zip("abc", inputs, strict=False))
                | {
                    k: ("none", "nearest", "bilinear", "maxpool").index(v) for k, v in named.items()
                },
            )
        )
    with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fake = [mode.from_tensor(x) for x in inputs]
        with pytest.raises(ValueError, match=f"^{re.escape(sentence)}"):
            selfkd.bifpn_fuse(*fake, **options)
