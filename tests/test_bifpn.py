"""FRSKD's self-teacher beside the structure of its authors' code: results, gradients, statistics."""

from __future__ import annotations

import copy
import io
from collections.abc import Sequence
from typing import Any

import harness
import pytest
import selfkd
import torch
import torch.nn.functional as F
from selfkd.bench import authors
from selfkd.nn import BiFPN, BiFPNSeg
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, update_bn

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


def run(module: nn.Module, maps: Sequence[Tensor], *, preact: bool = False) -> dict[str, Tensor]:
    """Results and all gradients, of a random projection of all results, by names."""
    refined, logits = module(maps, preact)
    outputs = [*refined, logits]
    torch.manual_seed(1)
    value = sum((x * torch.randn(x.shape, dtype=x.dtype)).sum() for x in outputs)
    named = dict(module.named_parameters())
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


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("variant", VARIANTS)
def test_maps_before_their_last_relu(variant: str, training: bool) -> None:
    """As the authors' bifpn(feats, preact=True): the same logits, maps without their last ReLU."""
    ours, theirs = (x.train(training) for x in make_both(CHANNELS[4], **VARIANTS[variant]))
    maps = make_maps(CHANNELS[4])
    assert_same(run(ours, maps, preact=True), run(theirs, maps, preact=True))
    raw, logits = ours.eval()(maps, preact=True)
    refined, same = ours(maps, preact=False)
    assert all((x < 0).any() for x in raw)
    for x, y in zip((*(F.relu(x) for x in raw), logits), (*refined, same), strict=True):
        torch.testing.assert_close(x, y, rtol=1e-12, atol=1e-12)


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


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("way", ["autocast", "cast"])
def test_narrow(way: str, dtype: torch.dtype) -> None:
    """Gradients in the parameters' dtype are no further from the exact ones than the authors' are."""
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
        if way == "cast":
            refined, logits = module.to(dtype)([x.to(dtype) for x in maps])
        else:
            with torch.autocast("cpu", dtype):
                refined, logits = module.float()(maps)
        assert {x.dtype for x in (*refined, logits)} == {dtype}
        errors.append(((gradient(logits) - exact).norm() / exact.norm()).item())
    assert errors[0] < 1.2 * errors[1] < 0.3


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("momentum", [0.1, None])
def test_narrow_running_statistics(momentum: float | None, dtype: torch.dtype) -> None:
    """In half too those of the norms before the upsampling are the authors', which follow it."""
    ours, theirs = (x.to(dtype) for x in make_both((3, 4, 6)))
    for norm in (*ours.modules(), *theirs.modules()):
        if isinstance(norm, nn.BatchNorm2d):
            norm.reset_running_stats()
            norm.momentum = momentum
    for _ in range(3):
        maps = [x.detach().to(dtype) for x in make_maps((3, 4, 6), top=(1, 2))]
        ours(maps), theirs(maps)
    expected = BiFPN.convert_authors_state_dict(theirs.state_dict())
    found = ours.state_dict()
    for name in found:
        if ".up." in name and "running" in name:
            assert found[name].dtype == dtype
            scale = expected[name].float().abs().max().item()
            rounding = 8 * torch.finfo(dtype).eps * scale
            torch.testing.assert_close(found[name], expected[name], rtol=0, atol=rounding)


class Net(nn.Module):
    """A self-teacher on maps of an image, as within a network."""

    def __init__(self, teacher: nn.Module) -> None:
        super().__init__()
        self.teacher = teacher

    def forward(self, x: Tensor) -> Any:
        maps = [x.narrow(1, 0, c) for c in (3, 4, 6)]
        return self.teacher([F.avg_pool2d(y, 2**k) if k else y for k, y in enumerate(maps)])


def test_weight_averaging() -> None:
    """AveragedModel and update_bn, which starts the statistics again and takes the mean over all batches."""
    images = [torch.randn(n, 6, 12, 8, dtype=torch.float64) for n in (4, 4, 2)]
    states = []
    for module in make_both((3, 4, 6)):
        averaged = AveragedModel(Net(module))
        averaged.update_parameters(Net(module))
        update_bn(images, averaged)
        states.append(averaged.module.teacher.state_dict())
    expected = BiFPN.convert_authors_state_dict(states[1])
    assert states[0].keys() == expected.keys()
    for name, x in states[0].items():
        torch.testing.assert_close(x, expected[name], rtol=1e-12, atol=1e-12)


def test_sync_batch_norm() -> None:
    """All norms are replaced; names, parameters and results (without a GPU: in eval) stay."""
    ours, _ = make_both((3, 4, 6))
    maps = make_maps((3, 4, 6))
    expected = run(ours.eval(), maps)
    synchronised = nn.SyncBatchNorm.convert_sync_batchnorm(copy.deepcopy(ours))
    norms = [x for x in synchronised.modules() if isinstance(x, nn.modules.batchnorm._BatchNorm)]
    assert {type(x) for x in norms} == {nn.SyncBatchNorm}
    assert synchronised.state_dict().keys() == ours.state_dict().keys()
    found = run(synchronised.eval(), maps)
    for name, x in expected.items():
        torch.testing.assert_close(found[name], x, rtol=1e-12, atol=1e-12)


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
    with pytest.raises(ValueError, match=r"features has length 4, expected 3 \(features\[-3:\]\)"):
        module([maps[0], *maps])
    sentence = r"BiFPN: features\[2\] has shape \(6, 3, 2\), expected 4 dimensions \(N, C, H, W\)"
    with pytest.raises(ValueError, match=sentence):
        module([*maps[:2], maps[2][0]])
    for wrong, sentence in (
        ([*maps[:2], maps[2].long()], r"features\[2\] has dtype int64, expected a floating dtype"),
        ([x.detach().numpy() for x in maps], r"features\[0\] is a NumPy array, expected a tensor"),
        (dict(enumerate(maps)), "features is a dict, expected a list of tensors"),
        (maps[2], "features is a tensor of shape .*, expected a list of tensors"),
        (None, "features is None, expected a list of tensors"),
    ):
        with pytest.raises(TypeError, match=f"^BiFPN: {sentence}"):
            module(wrong)
    with pytest.raises(
        TypeError, match='BiFPN: preact is the string "yes", expected True or False'
    ):
        module(maps, "yes")
    with pytest.raises(
        TypeError, match="BiFPN: channels is the number 64, expected a list of whole"
    ):
        BiFPN(64, CLASSES)
    with pytest.raises(ValueError, match="BiFPN: num_classes is 0, expected 1 or more"):
        BiFPN((3, 4), 0)


# ---- checkpoints ----


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("prefix", ["", "module.", "3.", "module.net.module."])
def test_authors_checkpoints(variant: str, prefix: str) -> None:
    """Alone or within a larger one, wrapped by DataParallel or not: equal results after a strict load."""
    _, theirs = make_both(CHANNELS[4], **VARIANTS[variant])
    state = {prefix + key: x for key, x in theirs.state_dict().items()}
    part = {"3.": "3", "module.net.module.": "net"}.get(prefix)
    if part:
        state |= {"0.conv1.weight": torch.ones(1), "33.fc.weight": torch.ones(1)}
    ours = BiFPN(CHANNELS[4], CLASSES, **VARIANTS[variant]).double()
    ours.load_state_dict(BiFPN.convert_authors_state_dict(state, part), strict=True)
    maps = make_maps(CHANNELS[4])
    assert_same(run(ours.eval(), maps), run(theirs.eval(), maps))


UNKNOWN = [
    "backbone.fc.weight",
    "fc.running_mean",
    "layers.0.middle.0",
    "layers.x.up_weight.0",
    "layers.0.up_weight.0.weight",
    "layers.0.lat_conv.0",
    "layers.0.lat_conv.0.conv.0.0.bias",
    "layers.0.lat_conv.0.conv.0.2.bias",
    "layers.0.lat_conv.0.conv.1.0.weight",
    "layers.0.lat_conv.0.1.conv.0.0.weight",
    "layers.0.up_sample.0.conv.0.0.weight",
    "layers.0.up_conv.0.conv.0.3.weight",
    "layers.0.up_conv.0.conv.0.2.scale",
    "layers.0.up_conv.0.conv.1.0.weight",
    "layers.0.down_conv.0.conv.1.4.weight",
    "layers.0.down_conv.0.conv.a.1.weight",
    "layers.0.down_conv.0.conv.0.-1.weight",
]


@pytest.mark.parametrize("key", UNKNOWN)
def test_a_key_that_the_authors_do_not_have(key: str) -> None:
    sentence = f"^BiFPN: state_dict has the key '{key}', expected those of FRSKD's BiFPNc or BiFPN"
    with pytest.raises(ValueError, match=sentence):
        BiFPN.convert_authors_state_dict({key: torch.ones(1)})


def test_state_dicts_that_cannot_be_converted() -> None:
    module = BiFPN((3, 4), CLASSES)
    with pytest.raises(
        TypeError, match=r"state_dict is a module \(BiFPN\), expected a dict of tensors"
    ):
        BiFPN.convert_authors_state_dict(module)
    twice = {"fc.weight": torch.ones(1), "module.fc.weight": torch.ones(1)}
    with pytest.raises(ValueError, match=r"has 'module\.fc\.weight' twice, expected one"):
        BiFPN.convert_authors_state_dict(twice)
    with pytest.raises(ValueError, match=r'BiFPN: part is "teacher", expected one of bifpn, net$'):
        BiFPN.convert_authors_state_dict(
            {"module.net.fc.weight": 1, "bifpn.fc.weight": 1}, "teacher"
        )
