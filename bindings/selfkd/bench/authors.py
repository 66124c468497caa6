"""FRSKD's self-teachers in the structure of their authors' code, written from its description.

What :class:`selfkd.nn.BiFPN` and :class:`selfkd.nn.BiFPNSeg` are compared with, in value by the tests and
in time by the bench. Source: Ji et al., "Refine Myself by Teaching Myself", arXiv 2103.08273, and
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
        for layer in self.layers:
            feats = layer(feats, preact and layer is self.layers[-1])
        return list(feats), self.fc(F.adaptive_avg_pool2d(F.relu(feats[-1]), 1).flatten(1))


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
        for layer in self.layers:
            feats = layer(feats, preact and layer is self.layers[-1])
        return list(feats), self.linear(F.adaptive_avg_pool2d(F.relu(feats[-1]), 1).flatten(1))


class SegLayer(nn.Module):
    """A layer of the segmentation neck on the maps P2 to P7; the last has no bottom-up half."""

    def __init__(self, channels: int, is_last: bool = False) -> None:
        super().__init__()
        self.is_last = is_last
        nodes = [f"conv{level}up" for level in (7, 6, 5, 4, 3, 2)]
        for name in nodes + [f"conv{level}dw" for level in (3, 4, 5, 6, 7)] * (not is_last):
            conv = nn.Conv2d(channels, channels, 1, groups=channels)
            self.add_module(name, nn.Sequential(conv, nn.BatchNorm2d(channels), nn.ReLU()))

    def forward(self, maps: Sequence[Tensor]) -> list[Tensor]:
        given = dict(zip(range(2, 8), maps, strict=True))
        up = {7: self.get_submodule("conv7up")(given[7])}
        for level in (6, 5, 4, 3, 2):
            x, above = given[level], up[level + 1]
            resize = nn.Upsample(scale_factor=x.shape[3] / above.shape[3], mode="bilinear")
            up[level] = self.get_submodule(f"conv{level}up")(x + resize(above))
        if self.is_last:
            return [up[level] for level in range(2, 8)]
        out = {2: up[2]}
        for level in (3, 4, 5, 6, 7):
            below = F.interpolate(out[level - 1], given[level].shape[2:])
            node = self.get_submodule(f"conv{level}dw")
            out[level] = node(given[level] + up[level] + below)
        return [out[level] for level in range(2, 8)]


def seg_neck(channels: int, layers: int, is_last: bool) -> nn.Sequential:
    """``BiFPN1`` (3 layers) or ``BiFPN2`` (2, the second of which is the last) of the segmentation model."""
    return nn.Sequential(*(SegLayer(channels, is_last and r == layers - 1) for r in range(layers)))
