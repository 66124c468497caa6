"""FRSKD's neck for segmentation beside the structure of its authors' code."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import harness
import pytest
import selfkd
import torch
import torch.nn.functional as F
from selfkd.bench import authors
from selfkd.nn import BiFPNSeg
from torch import Tensor, nn

pytestmark = pytest.mark.skipif(
    bool(harness.SIMT_LIBRARY), reason="the emulator has no PyTorch binding"
)

Sizes = list[tuple[int, int]]
SIZES: dict[str, Sizes] = {
    "even": [(s, s) for s in (32, 16, 8, 4, 2, 1)],
    "odd": [(s, s) for s in (33, 17, 9, 5, 3, 2)],
    "wide": [(16, 48), (8, 24), (4, 12), (2, 6), (1, 3), (1, 3)],
    "oblong": [(s, 2 * s) for s in (48, 24, 12, 6, 3, 2)],
    "of one size": [(4, 5)] * 6,
    # Rows that fit into the ratio of the widths, which is not theirs: 12 * 47 / 24 is 23.5.
    "odd and oblong": [(65, 129), (33, 65), (17, 33), (9, 17), (5, 9), (3, 5)],
    "rows cut off": [(23, 47), (12, 24), (6, 12), (3, 6), (2, 4), (2, 3)],
}
LAYERS = {"BiFPN1": (3, True), "BiFPN2": (2, False)}  # of the authors' network


@pytest.fixture(autouse=True)
def seed() -> Any:
    with torch.random.fork_rng():
        torch.manual_seed(20221111)
        yield


def make_maps(sizes: Sizes, channels: int = 3, batch: int = 2) -> list[Tensor]:
    maps = [torch.randn(batch, channels, *size, dtype=torch.float64) for size in sizes]
    return [x.requires_grad_() for x in maps]


def make_theirs(neck: str, channels: int = 3) -> nn.Sequential:
    """The authors' neck in float64, parameters and statistics as after some steps."""
    count, bottom_up = LAYERS[neck]
    theirs = authors.seg_neck(channels, count, is_last=not bottom_up).double()
    for name, x in theirs.state_dict().items():
        if x.is_floating_point():
            x.uniform_(*((0.5, 2) if name.endswith(("weight", "var")) else (-0.5, 0.5)))
    return theirs


def make_ours(neck: str, channels: int = 3) -> BiFPNSeg:
    count, bottom_up = LAYERS[neck]
    return BiFPNSeg(channels, repeat=count, bottom_up=bottom_up).double()


def run(module: nn.Module, maps: Sequence[Tensor]) -> tuple[list[Tensor], dict[str, Tensor]]:
    """Results and gradients of the maps, in order; gradients of parameters, by name."""
    outputs = module(maps)
    torch.manual_seed(1)
    value = sum((x.double() * torch.randn(x.shape, dtype=torch.float64)).sum() for x in outputs)
    named = dict(module.named_parameters())
    grads = torch.autograd.grad(value, [*maps, *named.values()])
    return [*outputs, *grads[: len(maps)]], dict(zip(named, grads[len(maps) :], strict=True))


def assert_close(found: Tensor, expected: Tensor, scale: float = 0.0) -> None:
    """To 1e-9 of the largest element."""
    assert found.shape == expected.shape
    scale = max(expected.abs().max().item(), scale)
    assert (found - expected).abs().max().item() <= 1e-9 * scale


def assert_same(ours: BiFPNSeg, theirs: nn.Module, maps: Sequence[Tensor]) -> None:
    """Results, all gradients, running statistics."""
    for _ in range(2):
        (found, grads), (expected, their_grads) = run(ours, maps), run(theirs, maps)
        for x, y in zip(found, expected, strict=True):
            assert_close(x, y)
        expected_grads = BiFPNSeg.convert_authors_state_dict(their_grads)
        assert grads.keys() == expected_grads.keys()
        # Batch norm takes any shift away: in training the bias before it has a gradient of rounding only.
        scale = max(x.abs().max().item() for x in grads.values())
        for name, x in grads.items():
            assert_close(x, expected_grads[name], scale)
    state = BiFPNSeg.convert_authors_state_dict(theirs.state_dict())
    for name, x in ours.state_dict().items():
        assert_close(x.double(), state[name].double())


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("neck", LAYERS)
@pytest.mark.parametrize("sizes", SIZES)
def test_is_the_authors_module(sizes: str, neck: str, training: bool) -> None:
    ours, theirs = make_ours(neck).train(training), make_theirs(neck).train(training)
    ours.load_state_dict(BiFPNSeg.convert_authors_state_dict(theirs.state_dict()))
    assert_same(ours, theirs, make_maps(SIZES[sizes]))


def test_parameters_and_keys() -> None:
    """544 of 8 channels and 2 layers, the second last; of each layer the entries that are described."""
    ours = BiFPNSeg(8, repeat=2, bottom_up=False)
    assert sum(x.numel() for x in ours.parameters()) == 544
    names = [f"{r}.conv{k}up" for r in (0, 1) for k in (7, 6, 5, 4, 3, 2)]
    names += [f"0.conv{k}dw" for k in (3, 4, 5, 6, 7)]
    norm = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
    keys = {f"{name}.0.{x}" for name in names for x in ("weight", "bias")}
    keys |= {f"{name}.1.{x}" for name in names for x in norm}
    assert keys == set(make_theirs("BiFPN2").state_dict())
    converted = BiFPNSeg.convert_authors_state_dict(dict.fromkeys(keys))
    assert len(converted) == len(keys)
    assert converted.keys() == ours.state_dict().keys()


def node(block: nn.Sequential, x: Tensor) -> Tensor:
    """Of a batch: scale and shift, batch norm, ReLU, written out."""
    conv, norm = block[0], block[1]
    x = x * conv.weight.view(-1, 1, 1) + conv.bias.view(-1, 1, 1)
    mean, var = x.mean((0, 2, 3), keepdim=True), x.var((0, 2, 3), correction=0, keepdim=True)
    x = (x - mean) / (var + norm.eps).sqrt()
    return F.relu(x * norm.weight.view(-1, 1, 1) + norm.bias.view(-1, 1, 1))


@pytest.mark.parametrize("size", [(13, 8), (7, 9), (2, 3)])
def test_two_levels_of_sizes_that_do_not_fit(size: tuple[int, int]) -> None:
    """From any size to any: here the authors' raises, ours goes by the size."""
    ours = BiFPNSeg(3, 2, repeat=1).double()
    for parameter in ours.parameters():
        parameter.data.uniform_(0.5, 1.5)
    fine, coarse = make_maps([size, (4, 4)])
    layer = ours.layers[0]
    top = node(layer.top_down[1], coarse)
    first = node(layer.top_down[0], fine + F.interpolate(top, size, mode="bilinear"))
    down = F.interpolate(first, (4, 4), mode="nearest")
    for x, y in zip(
        ours([fine, coarse]), (first, node(layer.bottom_up[0], coarse + top + down)), strict=True
    ):
        assert_close(x, y)
    with pytest.raises(RuntimeError, match="must match the size"):
        authors.SegLayer(3).double()([fine, *[coarse] * 5])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("way", ["autocast", "cast"])
def test_narrow(way: str, dtype: torch.dtype) -> None:
    """Results and gradients are no further from the exact ones than those of the authors' module are."""
    ours, theirs = make_ours("BiFPN2"), make_theirs("BiFPN2")
    ours.load_state_dict(BiFPNSeg.convert_authors_state_dict(theirs.state_dict()))
    maps = make_maps(SIZES["odd"], batch=8)
    errors = []
    for module in (ours, theirs):
        module.load_state_dict({name: x.float() for name, x in module.state_dict().items()})
        exact, exact_grads = run(module, maps)
        given = [x.detach().float().requires_grad_() for x in maps]
        if way == "cast":
            given = [x.detach().to(dtype).requires_grad_() for x in maps]
            found, grads = run(module.to(dtype), given)
        else:
            with torch.autocast("cpu", dtype):
                found, grads = run(module.float(), given)
        pairs = [*zip(found, exact, strict=True)]
        pairs += [(grads[name], exact_grads[name]) for name in grads]
        distance = torch.stack([(x.double() - y).norm() for x, y in pairs]).norm()
        errors.append((distance / torch.stack([y.norm() for _, y in pairs]).norm()).item())
    assert errors[0] < 1.2 * errors[1] < 0.3


def test_inputs_are_not_written() -> None:
    maps = [x.detach() for x in make_maps(SIZES["odd"])]
    for memory_format in (torch.contiguous_format, torch.channels_last):
        given = [x.contiguous(memory_format=memory_format) for x in maps]
        before = [x.clone() for x in given]
        for training in (True, False):
            make_ours("BiFPN1").train(training)(given)
        assert all(torch.equal(x, y) for x, y in zip(given, before, strict=True))


# ---- checkpoints ----


@pytest.mark.parametrize("neck", LAYERS)
@pytest.mark.parametrize(
    "wrapped", ["{}", "module.{}", "{neck}.{}", "module.{neck}.{}", "{neck}.module.{}"]
)
def test_authors_checkpoints(neck: str, wrapped: str) -> None:
    """A neck alone, or in a checkpoint of the whole network, with DataParallel's prefix and without."""
    theirs, ours = make_theirs(neck), make_ours(neck)
    state = {wrapped.format(key, neck=neck): x for key, x in theirs.state_dict().items()}
    part = None
    if "neck" in wrapped:
        part, other = neck, next(x for x in LAYERS if x != neck)
        state |= {f"{other}.{key}": x for key, x in make_theirs(other).state_dict().items()}
        state |= {"layer0.0.weight": torch.ones(1), "classifier1.0.bias": torch.ones(1)}
    ours.load_state_dict(BiFPNSeg.convert_authors_state_dict(state, part), strict=True)
    assert_same(ours.eval(), theirs.eval(), make_maps(SIZES["odd"]))


@pytest.mark.parametrize("is_last", [False, True])
def test_one_layer_of_the_authors(is_last: bool) -> None:
    theirs = authors.SegLayer(3, is_last).double().eval()
    ours = BiFPNSeg(3, repeat=1, bottom_up=not is_last).double().eval()
    ours.load_state_dict(BiFPNSeg.convert_authors_state_dict(theirs.state_dict()))
    assert_same(ours, theirs, make_maps(SIZES["odd"]))


@pytest.mark.parametrize(
    "key",
    [
        "BiFPN1.0.conv7up.0.weight",
        "conv8up.0.weight",
        "conv2dw.0.weight",
        "conv7up.2.weight",
        "conv7up.0.running_mean",
        "x.conv7up.0.weight",
        "0.0.conv7up.0.weight",
        "conv7up",
    ],
)
def test_a_key_that_the_authors_do_not_have(key: str) -> None:
    sentence = f"^BiFPNSeg: state_dict has the key '{key}', expected those of FRSKD's BiFPNSeg"
    with pytest.raises(ValueError, match=sentence):
        BiFPNSeg.convert_authors_state_dict({key: torch.ones(1)})


def test_layers_of_two_necks_do_not_meet() -> None:
    state = {"0.conv7up.0.weight": 1, "conv7up.0.weight": 2}
    with pytest.raises(ValueError, match=r"BiFPNSeg: state_dict has 'conv7up\.0\.weight' twice"):
        BiFPNSeg.convert_authors_state_dict(state)
    state = {"BiFPN1.0.conv7up.0.weight": 1, "BiFPN2.0.conv7up.0.weight": 2}
    with pytest.raises(ValueError, match='part is "BiFPN", expected one of BiFPN1, BiFPN2'):
        BiFPNSeg.convert_authors_state_dict(state, "BiFPN")


# ---- sentences ----


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ({"channels": 0}, "channels is 0, expected 1 or more"),
        ({"channels": 2.5}, "channels is the number 2.5, expected a whole number"),
        ({"levels": 1}, "levels is 1, expected 2 or more"),
        ({"repeat": 0}, "repeat is 0, expected 1 or more"),
        ({"bottom_up": "no"}, 'bottom_up is the string "no", expected True or False'),
    ],
)
def test_numbers(given: dict[str, Any], sentence: str) -> None:
    with pytest.raises((ValueError, TypeError), match=f"^BiFPNSeg: {re.escape(sentence)}"):
        BiFPNSeg(**{"channels": 3} | given)


def test_maps_that_do_not_fit() -> None:
    module, maps = make_ours("BiFPN1"), make_maps(SIZES["even"])
    for wrong, sentence in (
        (maps[1:], "maps has length 5, expected 6"),
        (maps[0], "maps is a tensor of shape (2, 3, 32, 32), expected a list of tensors"),
        ([*maps[:5], maps[5][:, :2]], "maps[5] has shape (2, 2, 1, 1), expected (2, 3, 1, 1)"),
        ([*maps[:5], maps[5][:1]], "maps[5] has shape (1, 3, 1, 1), expected (2, 3, 1, 1)"),
        ([*maps[:5], maps[5][0]], "maps[5] has shape (3, 1, 1), expected 4 dimensions"),
        ([*maps[:5], maps[5].long()], "maps[5] has dtype int64, expected a floating dtype"),
        ([*maps[:5], None], "maps[5] is None, expected a tensor"),
        (dict(zip("abcdef", maps, strict=True)), "maps is a dict, expected a list of tensors"),
    ):
        with pytest.raises((ValueError, TypeError), match=f"^BiFPNSeg: {re.escape(sentence)}"):
            module(wrong)


def test_the_old_name_names_the_new_one() -> None:
    sentence = "^selfkd.nn: PlainBiFPN is gone, expected BiFPNSeg"
    with pytest.raises(ImportError, match=sentence):
        from selfkd.nn import PlainBiFPN  # noqa: F401
    with pytest.raises(ImportError, match=sentence):
        _ = selfkd.nn.PlainBiFPN
    with pytest.raises(AttributeError, match=r"module 'selfkd\.nn' has no attribute 'Plain'"):
        _ = selfkd.nn.Plain
