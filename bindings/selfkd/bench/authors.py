"""FRSKD's self-teachers and necks in the structure of their authors' code, written from its description.

What :class:`selfkd.nn.BiFPN` and :class:`selfkd.nn.BiFPNSeg` are compared with by the tests, the former
by the bench too. Source: Ji et al., "Refine Myself by Teaching Myself", arXiv 2103.08273, and
MingiJi/FRSKD, classification/models/bifpnc.py and bifpn.py, segmentation/utils/BiFPN.py. Names of
parameters are those of its checkpoints.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Depth = tuple[int, int, int]  # lateral (which has no effect), up, down


class Block(nn.Module):
    """Kernel 1: convolution, batch norm, ReLU. Kernel 3: `depth` separable ones, ReLU between them."""

    def __init__(self, inputs: int, outputs: int, kernel: int, depth: int = 1) -> None:
        super().__init__()
        if kernel == 1:
            conv = nn.Conv2d(inputs, outputs, 1, bias=False)
            self.conv = nn.Sequential(
                nn.Sequential(conv, nn.BatchNorm2d(outputs), nn.ReLU(inplace=True))
            )
            return
        self.conv = nn.Sequential()
        for j in range(depth):
            depthwise = nn.Conv2d(inputs, inputs, 3, padding=1, groups=inputs, bias=False)
            pointwise = nn.Conv2d(inputs, outputs, 1, bias=False)
            relu = [nn.ReLU(inplace=True)] if j else []
            self.conv.append(nn.Sequential(*relu, depthwise, pointwise, nn.BatchNorm2d(outputs)))
            inputs = outputs

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.conv(x)
        return found


class SamePool(nn.Module):
    """Max-pooling 3x3 with stride 2 after TensorFlow's "same" padding with zeros."""

    def forward(self, x: Tensor) -> Tensor:
        padding: list[int] = []
        for size in reversed(x.shape[2:]):
            total = max((-(-size // 2) - 1) * 2 + 3 - size, 0)
            padding += [total // 2, total - total // 2]
        return F.max_pool2d(F.pad(x, padding), 3, 2)


class Layer(nn.Module):
    """A layer of either self-teacher: `scaled` has a 1x1 block after each change of resolution."""

    def __init__(
        self, inputs: Sequence[int], widths: Sequence[int], first: bool, scaled: bool, depth: Depth
    ) -> None:
        super().__init__()
        n = len(widths)
        pairs = list(zip(inputs, widths, strict=True))
        self.lat_conv = nn.ModuleList(Block(*pair, 1) for pair in pairs[: n * first])
        self.lat_conv2 = nn.ModuleList(Block(*pair, 1) for pair in pairs[1:])
        self.up_conv = nn.ModuleList(Block(w, w, 3, depth[1]) for w in widths[:-1])
        self.down_conv = nn.ModuleList(Block(w, w, 3, depth[2]) for w in widths[1:])
        self.up_weight = nn.ParameterList(nn.Parameter(torch.ones(2)) for _ in widths[1:])
        self.down_weight = nn.ParameterList(
            nn.Parameter(torch.ones(3 if i < n - 1 else 2)) for i in range(1, n)
        )
        self.up_sample, self.down_sample = nn.ModuleList(), nn.ModuleList()
        for fine, coarse in pairwise(widths):
            up: list[nn.Module] = [nn.Upsample(scale_factor=2)]
            down: list[nn.Module] = [SamePool()]
            if scaled:
                up, down = [*up, Block(coarse, fine, 1)], [*down, Block(fine, coarse, 1)]
            self.up_sample.append(nn.Sequential(*up))
            self.down_sample.append(nn.Sequential(*down))

    @staticmethod
    def fuse(weight: Tensor, *maps: Tensor) -> Tensor:
        weight = F.relu(weight)
        weight = weight / (weight.sum() + 1e-6)
        terms: Iterator[Tensor] = (w * F.relu(x) for w, x in zip(weight, maps, strict=True))
        return functools.reduce(torch.add, terms)  # sum() would add the first to 0

    def forward(self, feats: Sequence[Tensor], preact: bool = False) -> list[Tensor]:
        feats = [F.relu(x) for x in feats]
        laterals = [lat(x) for lat, x in zip(self.lat_conv, feats, strict=False)] or feats
        skips = [lat(x) for lat, x in zip(self.lat_conv2, feats[1:], strict=True)]
        path = [laterals[-1]]
        for i in reversed(range(len(feats) - 1)):
            up = self.up_sample[i](F.relu(path[0]))
            path.insert(0, self.up_conv[i](self.fuse(self.up_weight[i], laterals[i], up)))
        refined = [path[0]]
        for i, skip in enumerate(skips):
            down = self.down_sample[i](F.relu(refined[-1]))
            middle = path[i + 1 : -1][:1]
            fused = self.fuse(self.down_weight[i], skip, *middle, down)
            refined.append(self.down_conv[i](fused))
        return refined if preact else [F.relu(x) for x in refined]


def through(
    layers: nn.ModuleList, feats: Sequence[Tensor], preact: bool
) -> tuple[list[Tensor], Tensor]:
    """Maps of the last layer, not rectified if `preact`, and its pooled top, which always is."""
    for r, layer in enumerate(layers):
        feats = layer(feats, preact and r == len(layers) - 1)
    return list(feats), F.adaptive_avg_pool2d(F.relu(feats[-1]), 1).flatten(1)


class BiFPNc(nn.Module):
    """The channel-scaled self-teacher: level i has `width` times the classifier's channels."""

    def __init__(
        self,
        channels: Sequence[int],
        classes: int,
        width: int = 2,
        repeat: int = 1,
        depth: Depth = (2, 2, 2),
    ) -> None:
        super().__init__()
        widths = [width * c for c in channels]
        self.layers = nn.ModuleList(
            Layer(channels, widths, r == 0, scaled=True, depth=depth) for r in range(repeat)
        )
        self.fc = nn.Linear(widths[-1], classes)

    def forward(self, feats: Sequence[Tensor], preact: bool = False) -> tuple[list[Tensor], Tensor]:
        feats, pooled = through(self.layers, feats, preact)
        return feats, self.fc(pooled)


class BiFPN(nn.Module):
    """The uniform self-teacher: `width` channels at every level, `repeat` layers."""

    def __init__(
        self,
        channels: Sequence[int],
        classes: int,
        width: int = 256,
        repeat: int = 1,
        depth: Depth = (2, 2, 2),
    ) -> None:
        super().__init__()
        widths = [width] * len(channels)
        self.layers = nn.ModuleList(
            Layer(widths if r else channels, widths, r == 0, scaled=False, depth=depth)
            for r in range(repeat)
        )
        self.linear = nn.Linear(width, classes)

    def forward(self, feats: Sequence[Tensor], preact: bool = False) -> tuple[list[Tensor], Tensor]:
        feats, pooled = through(self.layers, feats, preact)
        return feats, self.linear(pooled)


class BiFPNSeg(nn.Module):
    """One layer of the necks for segmentation, on maps P2 (the finest) to P7.

    Bilinearly up by the ratio of the widths, by nearest neighbours down to the size; `is_last`: up alone.
    """

    def __init__(self, channels: int, is_last: bool = False) -> None:
        super().__init__()
        self.is_last = is_last
        names = [f"conv{k}up" for k in range(7, 1, -1)]
        if not is_last:
            names += [f"conv{k}dw" for k in range(3, 8)]
        for name in names:
            conv = nn.Conv2d(channels, channels, 1, groups=channels)
            self.add_module(name, nn.Sequential(conv, nn.BatchNorm2d(channels), nn.ReLU()))

    def forward(self, maps: Sequence[Tensor]) -> tuple[Tensor, ...]:
        given = dict(zip(range(2, 8), maps, strict=True))
        up = {7: self.get_submodule("conv7up")(given[7])}
        for k in range(6, 1, -1):
            scale = given[k].shape[3] / up[k + 1].shape[3]
            enlarged = F.interpolate(up[k + 1], scale_factor=scale, mode="bilinear")
            up[k] = self.get_submodule(f"conv{k}up")(given[k] + enlarged)
        if self.is_last:
            return tuple(up[k] for k in given)
        out = {2: up[2]}
        for k in range(3, 8):
            reduced = F.interpolate(out[k - 1], up[k].shape[2:])
            out[k] = self.get_submodule(f"conv{k}dw")(given[k] + up[k] + reduced)
        return tuple(out[k] for k in given)
