"""FRSKD's self-teacher beside the structure of its authors' code: results, gradients, statistics."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable, Sequence
from typing import Any

import harness
import pytest
import selfkd
import torch
import torch.nn.functional as F
from selfkd.bench import authors
from selfkd.nn import BiFPN, BiFPNSeg
from torch import Tensor, nn

pytestmark = pytest.mark.skipif(
    bool(harness.SIMT_LIBRARY), reason="the emulator has no PyTorch binding"
)

CLASSES = 5
VARIANTS: dict[str, dict[str, Any]] = {
    "scaled": {},
    "scaled, 3 wide, depth 3": {"width": 3, "depth": (1, 3, 2)},
    "scaled, 1 wide, repeated": {"width": 1, "repeat": 2},
    "uniform": {"uniform_channels": 6},
    "uniform, repeated": {"uniform_channels": 6, "repeat": 2, "depth": 1},
}
CHANNELS = {3: (3, 4, 6), 4: (3, 4, 6, 5)}
Both = tuple[BiFPN, nn.Module]


def make_both(channels: Sequence[int], **options: Any) -> Both:
    """Both modules in float64, with the same parameters; weights and statistics as after some steps."""
    ours = BiFPN(channels, CLASSES, **options).double()
    depth = options.get("depth", 2)
    given = {"depth": depth if isinstance(depth, tuple) else (depth,) * 3}
    given |= {"width": options.get("width", 2), "repeat": options.get("repeat", 1)}
    make: type[nn.Module] = authors.BiFPNc
    if "uniform_channels" in options:
        make, given["width"] = authors.BiFPN, options["uniform_channels"]
    theirs = make(channels, CLASSES, **given).double()
    for name, x in theirs.state_dict().items():
        if name.endswith(("running_mean", "running_var", "1.weight", "2.weight", "3.weight")):
            x.uniform_(0.5, 2)
    for name, x in theirs.named_parameters():
        if "_weight." in name:  # of a fusion; some are negative
            x.data.uniform_(-0.3, 1)
    ours.load_state_dict(BiFPN.convert_authors_state_dict(theirs.state_dict()))
    return ours, theirs


def make_maps(
    channels: Sequence[int], top: tuple[int, int] = (3, 2), batch: int = 2
) -> list[Tensor]:
    n = len(channels)
    sizes = [[size << (n - 1 - i) for size in top] for i in range(n)]
    pairs = zip(channels, sizes, strict=True)
    return [torch.randn(batch, c, *s, dtype=torch.float64).requires_grad_() for c, s in pairs]


def run(
    module: Callable[..., Any], maps: Sequence[Tensor], of: nn.Module | None = None
) -> dict[str, Tensor]:
    """Results and all gradients, of a random projection of all results, by names.

    `of` has the parameters where `module` is a function.
    """
    refined, logits = module(maps)
    outputs = [*refined, logits]
    torch.manual_seed(1)
    value = sum((x * torch.randn(x.shape, dtype=x.dtype)).sum() for x in outputs)
    named = dict((of or module).named_parameters())
    grads = torch.autograd.grad(value, [*maps, *named.values()])
    found = {f"output {i}": x for i, x in enumerate(outputs)}
    found |= {f"input {i}": x for i, x in enumerate(grads[: len(maps)])}
    return found | dict(zip(named, grads[len(maps) :], strict=True))


def assert_same(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    """Every tensor of one is in the other, to 1e-9 of its largest element."""
    io_names = {name: x for name, x in theirs.items() if " " in name}
    parameters = {name: x for name, x in theirs.items() if " " not in name}
    expected = io_names | BiFPN.convert_authors_state_dict(parameters)
    assert ours.keys() == expected.keys()
    for name, x in ours.items():
        scale = max(expected[name].abs().max().item(), 1e-3)
        assert (x - expected[name]).abs().max().item() <= 1e-9 * scale, name


@pytest.fixture(autouse=True)
def seed() -> Any:
    with torch.random.fork_rng():
        torch.manual_seed(20221111)
        yield


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("levels", [3, 4])
@pytest.mark.parametrize("variant", VARIANTS)
def test_is_the_authors_module(variant: str, levels: int, training: bool) -> None:
    ours, theirs = make_both(CHANNELS[levels], **VARIANTS[variant])
    maps = make_maps(CHANNELS[levels])
    for _ in range(2):
        assert_same(run(ours.train(training), maps), run(theirs.train(training), maps))
    theirs_state = {k: x.double() for k, x in theirs.state_dict().items()}
    assert_same({k: x.double() for k, x in ours.state_dict().items()}, theirs_state)


def test_an_odd_last_level_and_two_levels() -> None:
    """Maps of 7 x 5 at the top are upsampled to 14 x 10; ImageNet's are 56, 28, 14 and 7."""
    for channels, top in (((3, 4, 6), (7, 5)), ((3, 4), (1, 1))):
        ours, theirs = make_both(channels)
        maps = make_maps(channels, top, batch=3)
        assert_same(run(ours, maps), run(theirs, maps))


def test_parameters_of_resnet18() -> None:
    """6,375,794 for CIFAR-100 and 7,298,294 for ImageNet, as counted on the published modules."""
    for classes, count in ((100, 6_375_794), (1000, 7_298_294)):
        with torch.device("meta"):
            module = BiFPN([64, 128, 256, 512], classes)
        assert sum(x.numel() for x in module.parameters()) == count


@pytest.mark.parametrize("momentum", [0.3, None])
def test_running_variance_before_upsampling(momentum: float | None) -> None:
    """As after it: three batches, the last of another size; cumulative averages where momentum is None."""
    ours, theirs = make_both((3, 4, 6))
    for module in (*ours.modules(), *theirs.modules()):
        if isinstance(module, nn.BatchNorm2d):
            module.reset_running_stats()
            module.momentum = momentum
    for batch in (2, 2, 3):
        maps = make_maps((3, 4, 6), batch=batch)
        ours(maps)
        theirs(maps)
    expected = BiFPN.convert_authors_state_dict(theirs.state_dict())
    for name, x in ours.state_dict().items():
        torch.testing.assert_close(x, expected[name], rtol=1e-12, atol=1e-12)
    assert ours.layers[0].up[0].norm.num_batches_tracked == 3


def test_norms_without_running_statistics() -> None:
    modules = make_both((3, 4, 6))
    for module in modules:
        for norm in module.modules():
            if isinstance(norm, nn.BatchNorm2d):
                norm.track_running_stats, norm.num_batches_tracked = False, None
                norm.running_mean = norm.running_var = None
        module.eval()
    maps = make_maps((3, 4, 6))
    assert_same(run(modules[0], maps), run(modules[1], maps))


def test_two_forward_passes_before_backward() -> None:
    """What one pass keeps is not touched by the next: rotated copies, or accumulation over views."""
    ours, theirs = make_both((3, 4, 6))
    first, second = make_maps((3, 4, 6)), make_maps((3, 4, 6))
    grads = []
    for module in (ours, theirs):
        logits = module(first)[1], module(second)[1]
        value = logits[0].square().sum() + logits[1].sin().sum()
        grads.append(torch.autograd.grad(value, [*first, *second]))
    torch.testing.assert_close(grads[0], grads[1], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("make", [BiFPN, BiFPNSeg])
def test_another_fusion(make: type[nn.Module]) -> None:
    """Each of them is given by `fuse`."""
    calls = 0

    def fuse(*maps: Tensor, **arguments: Any) -> Tensor:
        nonlocal calls
        calls += 1
        return selfkd.reference.bifpn_fuse(*maps, **arguments)

    channels, found = (4, 4, 4), []
    arguments = ((4, 3), {"repeat": 2}) if make is BiFPNSeg else ((channels, CLASSES), {})
    maps = make_maps(channels)
    for given in ({"fuse": fuse}, {}):
        torch.manual_seed(0)
        outputs = make(*arguments[0], **arguments[1], **given).double()(maps)
        found.append(outputs if make is BiFPNSeg else [*outputs[0], outputs[1]])
    torch.testing.assert_close(*found, rtol=1e-10, atol=1e-10)
    assert calls == (8 if make is BiFPNSeg else 4)


@pytest.mark.parametrize("options", [{}, {"uniform_channels": 6}])
def test_inputs_are_not_written(options: dict[str, Any]) -> None:
    ours = BiFPN((3, 4, 6), CLASSES, **options).double()
    maps = make_maps((3, 4, 6))
    for memory_format in (torch.contiguous_format, torch.channels_last):
        given = [x.detach().contiguous(memory_format=memory_format) for x in maps]
        before = [x.clone() for x in given]
        refined, _ = ours(given)
        assert all(torch.equal(x, y) for x, y in zip(given, before, strict=True))
        assert all((x >= 0).all() for x in refined)


def test_copies_and_state_dicts() -> None:
    ours = BiFPN((3, 4, 6), CLASSES).double()
    maps = make_maps((3, 4, 6))
    ours(maps)
    file = io.BytesIO()
    torch.save(ours.state_dict(), file)
    file.seek(0)
    loaded = BiFPN((3, 4, 6), CLASSES).double()
    loaded.load_state_dict(torch.load(file))
    expected = run(ours.eval(), maps)
    for twin in (copy.deepcopy(ours), loaded.eval()):
        found = run(twin, maps)
        assert all(torch.equal(found[name], x) for name, x in expected.items())


@pytest.mark.parametrize("options", [{}, {"uniform_channels": 6}])
def test_compiled(options: dict[str, Any]) -> None:
    eager = BiFPN((3, 4, 6), CLASSES, **options).double()
    twin = copy.deepcopy(eager)
    maps = make_maps((3, 4, 6))
    compiled = run(torch.compile(twin, fullgraph=True, backend="aot_eager"), maps)
    found = {name.removeprefix("_orig_mod."): x for name, x in compiled.items()}
    for name, x in run(eager, maps).items():
        torch.testing.assert_close(found[name], x, rtol=1e-9, atol=1e-9)
    for name, x in eager.state_dict().items():
        torch.testing.assert_close(twin.state_dict()[name], x)


def test_autocast() -> None:
    """Maps are bfloat16, gradients float32, and no further from the exact ones than the authors' are."""
    target = torch.arange(16) % CLASSES
    maps = [x.detach().float() for x in make_maps((6, 8, 12), batch=16)]
    errors = []
    for module in make_both((6, 8, 12)):

        def gradient(logits: Tensor, module: nn.Module = module) -> Tensor:
            parameters = list(module.parameters())
            grads = torch.autograd.grad(F.cross_entropy(logits.float(), target), parameters)
            assert all(x.dtype == y.dtype for x, y in zip(grads, parameters, strict=True))
            return torch.cat([x.flatten().double() for x in grads])

        exact = gradient(module([x.double() for x in maps])[1])
        with torch.autocast("cpu", torch.bfloat16):
            refined, logits = module.float()(maps)
        assert {x.dtype for x in (*refined, logits)} == {torch.bfloat16}
        errors.append(((gradient(logits) - exact).norm() / exact.norm()).item())
    assert errors[0] < 1.2 * errors[1] < 0.3


def test_what_does_not_fit() -> None:
    for arguments, sentence in (
        ({"channels": (3,)}, "channels has length 1, expected 2 levels or more"),
        ({"repeat": 2}, r"repeat is 2, expected 1 \(or uniform_channels, or width 1\)"),
        ({"repeat": 0}, "repeat is 0, expected 1 or more"),
        ({"depth": 0}, r"depth is 0, expected a number >= 1 or \(lateral, up, down\)"),
        ({"depth": (2, 2)}, r"depth is \(2, 2\), expected a number"),
    ):
        with pytest.raises(ValueError, match=f"BiFPN: {sentence}"):
            BiFPN(**{"channels": (3, 4, 6), "num_classes": CLASSES} | arguments)
    module, maps = BiFPN((3, 4, 6), CLASSES).double(), make_maps((3, 4, 6))
    with pytest.raises(ValueError, match="BiFPN: features has length 2, expected 3"):
        module(maps[1:])
    sentence = r"BiFPN: features\[1\] has shape \(2, 4, 5, 4\), expected \(2, 4, 6, 4\)"
    with pytest.raises(ValueError, match=sentence):
        module([maps[0], maps[1][:, :, :5], maps[2]])
    for key in ("layers.0.lat_conv.0.conv.0.2.bias", "layers.0.middle.0", "backbone.fc.weight"):
        with pytest.raises(ValueError, match=f"BiFPN: state_dict has the key '{key}', expected"):
            BiFPN.convert_authors_state_dict({key: maps[0]})


@pytest.mark.parametrize("variant", VARIANTS)
def test_maps_before_activation(variant: str) -> None:
    """As the authors' modules return them with preact=True; the logits are the same."""
    ours, theirs = make_both(CHANNELS[3], **VARIANTS[variant])
    maps = make_maps(CHANNELS[3])
    before, plain = (
        run(lambda x, preact=preact: ours(x, preact), maps, ours) for preact in (True, False)
    )
    assert_same(before, run(lambda x: theirs(x, preact=True), maps, theirs))
    assert any((before[f"output {k}"] < 0).any() for k in range(3))
    torch.testing.assert_close(before["output 3"], plain["output 3"])
    for k in range(3):
        torch.testing.assert_close(F.relu(before[f"output {k}"]), plain[f"output {k}"])


# ---- the segmentation neck ----

SIZES: dict[str, list[tuple[int, int]]] = {  # of P2 to P7
    "powers of two": [(32, 32), (16, 16), (8, 8), (4, 4), (2, 2), (1, 1)],
    "odd": [(33, 33), (17, 17), (9, 9), (5, 5), (3, 3), (2, 2)],
    "wide": [(16, 48), (8, 24), (4, 12), (2, 6), (1, 3), (1, 3)],
    "odd, heights of another ratio": [(65, 129), (33, 65), (17, 33), (9, 17), (5, 9), (3, 5)],
}
NECKS = {"classifier": (3, True), "self-teacher": (2, False)}


def make_necks(neck: str) -> tuple[BiFPNSeg, nn.Sequential]:
    """Both in float64, with parameters and statistics as after some steps."""
    layers, bottom_up = NECKS[neck]
    ours = BiFPNSeg(8, repeat=layers, bottom_up=bottom_up).double()
    theirs = authors.seg_neck(8, layers, is_last=not bottom_up).double()
    for name, x in theirs.state_dict().items():
        if not name.endswith("num_batches_tracked"):
            x.uniform_(0.5, 1.5) if "running_var" in name else x.uniform_(-0.7, 1)
    ours.load_state_dict(BiFPNSeg.convert_authors_state_dict(theirs.state_dict()))
    return ours, theirs


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("neck", NECKS)
def test_is_the_authors_neck(neck: str, sizes: str, training: bool) -> None:
    """Results, gradients of maps and parameters, running statistics, over two passes."""
    maps = [torch.randn(2, 8, *size).double().requires_grad_() for size in SIZES[sizes]]
    both = make_necks(neck)
    for _ in range(2):
        found = []
        for module in both:
            outputs = module.train(training)(maps)
            value = sum((x * x.detach().cos()).sum() for x in outputs)
            grads = torch.autograd.grad(value, [*maps, *module.parameters()])
            named = dict(zip((k for k, _ in module.named_parameters()), grads[6:], strict=True))
            found.append([outputs, grads[:6], named | dict(module.named_buffers())])
        expected = [*found[1][:2], BiFPNSeg.convert_authors_state_dict(found[1][2])]
        for x, y in zip(found[0][:2], expected[:2], strict=True):
            torch.testing.assert_close(tuple(x), tuple(y), rtol=1e-9, atol=1e-9)
        assert found[0][2].keys() == expected[2].keys()
        for name, x in found[0][2].items():
            torch.testing.assert_close(x, expected[2][name], rtol=1e-9, atol=1e-9)


def test_parameters_of_the_neck() -> None:
    """8 channels, two layers of which the second is the last: 11 and 6 nodes of 32 parameters."""
    both = BiFPNSeg(8, repeat=2, bottom_up=False), authors.seg_neck(8, 2, is_last=True)
    assert [sum(x.numel() for x in module.parameters()) for module in both] == [544, 544]


def test_a_neck_of_maps_that_the_authors_cannot_add() -> None:
    """Of 7 x 8 positions above 13 x 16 theirs makes 14 x 16; here the map is brought to size."""
    module = BiFPNSeg(3, 2, repeat=1, bottom_up=False).double()
    maps = [torch.randn(2, 3, *size).double() for size in ((13, 16), (7, 8))]
    fine, coarse = module.layers[0].top_down
    above = coarse(maps[1])
    expected = [fine(maps[0] + F.interpolate(above, (13, 16), mode="bilinear")), above]
    torch.testing.assert_close(module(maps), expected)


@pytest.mark.parametrize("prefix", ["", "module."])
def test_checkpoints_of_authors(prefix: str) -> None:
    """Of DataParallel too; of a whole segmentation model one neck is taken."""
    ours, theirs = make_necks("self-teacher")
    state = theirs.state_dict()
    whole = {f"{prefix}BiFPN2.{key}": x for key, x in state.items()}
    whole |= {f"{prefix}BiFPN1.0.conv2up.0.bias": torch.ones(8), f"{prefix}head.weight": x0(state)}
    for given in (
        BiFPNSeg.convert_authors_state_dict({prefix + key: x for key, x in state.items()}),
        BiFPNSeg.convert_authors_state_dict(whole, neck="BiFPN2"),
    ):
        twin = BiFPNSeg(8, repeat=2, bottom_up=False).double()
        twin.load_state_dict(given)
        for name, x in ours.state_dict().items():
            assert torch.equal(twin.state_dict()[name], x)
    _, bifpnc = make_both((3, 4, 6))
    given = {prefix + key: x for key, x in bifpnc.state_dict().items()}
    BiFPN((3, 4, 6), CLASSES).load_state_dict(BiFPN.convert_authors_state_dict(given))
    with pytest.raises(ValueError, match="BiFPNSeg: state_dict has no key of BiFPN3"):
        BiFPNSeg.convert_authors_state_dict(whole, neck="BiFPN3")
    for key in (
        "0.conv8up.0.weight",
        "0.conv2dx.0.weight",
        "BiFPN2.0.conv2up.0.bias",
        "head.weight",
    ):
        with pytest.raises(ValueError, match=f"BiFPNSeg: state_dict has the key '{key}', expected"):
            BiFPNSeg.convert_authors_state_dict({prefix + key: torch.ones(8)})


def x0(state: dict[str, Tensor]) -> Tensor:
    return next(iter(state.values()))


def test_what_a_neck_refuses() -> None:
    for arguments, sentence in (
        ({"levels": 1}, "levels is 1, expected 2 or more"),
        ({"repeat": 0}, "repeat is 0, expected 1 or more"),
        ({"channels": 0}, "channels is 0, expected 1 or more"),
    ):
        with pytest.raises(ValueError, match=f"BiFPNSeg: {sentence}"):
            BiFPNSeg(**{"channels": 3, "levels": 3} | arguments)
    maps = [torch.randn(1, 3, 4, 4), torch.randn(1, 3, 2, 2)]
    with pytest.raises(ValueError, match="BiFPNSeg: maps has length 2, expected 3"):
        BiFPNSeg(3, 3)(maps)
    with pytest.raises(TypeError, match=r"BiFPNSeg: maps\[1\] is None, expected a tensor"):
        BiFPNSeg(3, 2)([maps[0], None])
    with pytest.raises(
        TypeError, match=r"BiFPNSeg: maps is a tensor of shape .*, expected a list of"
    ):
        BiFPNSeg(3, 2)(torch.randn(2, 3, 4, 4))
