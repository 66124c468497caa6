"""FRSKD's self-teacher: a bidirectional feature pyramid on a classifier's stages."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from .. import arguments
from ..bifpn_fuse import bifpn_fuse
from .checkpoints import SEPARABLE, converted, key_of_bifpn

Fusion = Callable[..., torch.Tensor]

_OP = "BiFPN"


class _NormOfRepeated(nn.BatchNorm2d):
    """Batch normalisation of maps of which every pixel stands for `repeats` equal ones.

    Mean, biased variance and gradients of a batch do not change when its pixels are repeated. The
    running variance does: it grows by n / (n - 1), and n is `repeats` times larger.
    """

    def __init__(self, channels: int, repeats: int) -> None:
        super().__init__(channels)
        self.repeats = repeats

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not self.training or self.running_var is None:
            return super().forward(x)
        momentum = self.momentum or 0.0
        if self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
            if self.momentum is None:
                momentum = 1 / float(self.num_batches_tracked)
        n = x.numel() // x.shape[1]
        ratio = self.repeats * (n - 1) / (self.repeats * n - 1)
        # The update is linear: scaled before and scaled back, only what this batch adds is corrected.
        scaled = self.running_var / ratio
        x = F.batch_norm(
            x, self.running_mean, scaled, self.weight, self.bias, True, momentum, self.eps
        )
        self.running_var.copy_(scaled * ratio)
        return x


def _pointwise(inputs: int, outputs: int, repeats: int = 1) -> nn.Sequential:
    """1x1 convolution and batch norm; the fusion that follows rectifies."""
    norm = _NormOfRepeated(outputs, repeats) if repeats > 1 else nn.BatchNorm2d(outputs)
    return nn.Sequential(OrderedDict(conv=nn.Conv2d(inputs, outputs, 1, bias=False), norm=norm))


def _separable(channels: int) -> nn.Sequential:
    """3x3 convolution of each channel, 1x1 convolution, batch norm."""
    depthwise = nn.Conv2d(channels, channels, 3, padding=1, groups=channels, bias=False)
    pointwise = nn.Conv2d(channels, channels, 1, bias=False)
    members = zip(SEPARABLE, (depthwise, pointwise, nn.BatchNorm2d(channels)), strict=True)
    return nn.Sequential(OrderedDict(members))


class _Node(nn.Module):
    """Weighted sum of rectified maps, then `depth` separable convolutions, each rectified."""

    def __init__(self, inputs: int, channels: int, depth: int, fuse: Fusion) -> None:
        super().__init__()
        self.fuse = fuse
        self.weight = nn.Parameter(torch.ones(inputs))
        self.conv = nn.ModuleList(_separable(channels) for _ in range(depth))

    def forward(self, maps: Sequence[torch.Tensor], resize: Sequence[str | None]) -> torch.Tensor:
        """The last convolution's result, not rectified."""
        x = self.fuse(*maps, weight=self.weight, resize=resize)
        *first, last = self.conv
        for block in first:
            x = F.relu_(block(x))  # batch norm does not keep what it returns
        found: torch.Tensor = last(x)
        return found


class _Layer(nn.Module):
    """Top-down, then bottom-up. `first`: with laterals; `scaled`: widths differ from level to level."""

    def __init__(
        self,
        channels: Sequence[int],
        widths: Sequence[int],
        depth: tuple[int, int],
        first: bool,
        scaled: bool,
        fuse: Fusion,
    ) -> None:
        super().__init__()
        pairs, steps = list(zip(channels, widths, strict=True)), list(pairwise(widths))
        self.lateral = nn.ModuleList(_pointwise(*pair) for pair in pairs * first)
        self.skip = nn.ModuleList(_pointwise(*pair) for pair in pairs[1:])
        self.up = nn.ModuleList(_pointwise(b, a, repeats=4) for a, b in steps * scaled)
        self.down = nn.ModuleList(_pointwise(a, b) for a, b in steps * scaled)
        self.top_down = nn.ModuleList(_Node(2, width, depth[0], fuse) for width in widths[:-1])
        inputs = [3] * (len(widths) - 2) + [2]
        self.bottom_up = nn.ModuleList(
            _Node(k, width, depth[1], fuse) for k, width in zip(inputs, widths[1:], strict=True)
        )

    def forward(self, maps: Sequence[torch.Tensor], preact: bool = False) -> list[torch.Tensor]:
        """Refine maps that are rectified; so are the results, unless `preact` wants them as they were."""
        laterals = list(maps)
        if self.lateral:
            laterals = [lateral(x) for lateral, x in zip(self.lateral, maps, strict=True)]
        rectified = F.relu if preact else F.relu_
        path, before = [F.relu(laterals[-1])], laterals[-1]
        for i in reversed(range(len(maps) - 1)):
            # Convolution, norm and ReLU of each pixel alone come before the pixels are repeated.
            above = self.up[i](path[0]) if self.up else path[0]
            before = self.top_down[i]([laterals[i], above], (None, "nearest"))
            path.insert(0, rectified(before))
        refined, results = [path[0]], [before]
        for i, node in enumerate(self.bottom_up, start=1):
            between = path[i:-1][:1]  # none at the top, where it would be the lateral
            operands = [self.skip[i - 1](maps[i]), *between, refined[-1]]
            resize: list[str | None] = [None] * (len(operands) - 1) + ["maxpool"]
            if self.down:  # these sizes are even, so that ceil_mode pads as TensorFlow does
                pooled = F.max_pool2d(refined[-1], 3, 2, ceil_mode=True)
                operands[-1], resize[-1] = self.down[i - 1](pooled), None
            results.append(node(operands, resize))
            refined.append(rectified(results[-1]))
        return results if preact else refined


class BiFPN(nn.Module):
    """FRSKD's self-teacher: refines the maps of a classifier's stages, and classifies by the last.

    Every layer sends the coarse maps up (nearest neighbour) and the fine ones down (max-pooling), each
    map being a learned average of rectified ones followed by separable convolutions.

    Parameters
    ----------
    channels
        Channels C_i of the n >= 2 input maps, finest first.
    num_classes
        K, the width of the logits.
    width
        "BiFPNc", the default variant: level i has `width` * C_i channels, and 1x1 convolutions stand at
        each change of resolution.
    uniform_channels
        "BiFPN", the other variant, in place of `width`: all levels have as many channels (256 in the
        paper), without those convolutions.
    repeat
        Layers. More than 1 needs `uniform_channels` or `width` 1.
    depth
        Separable convolutions of a node: one number, or (lateral, up, down) as the authors' option, of
        which the first has no effect there either.
    fuse
        What fuses maps: :func:`selfkd.bifpn_fuse`, or to compare with,
        :func:`selfkd.reference.bifpn_fuse`.

    Raises
    ------
    ValueError
        A number that is not accepted.

    Notes
    -----
    Source: Ji, Shin, Hwang, Park, Moon, "Refine Myself by Teaching Myself: Feature Refinement via
    Self-Knowledge Distillation", arXiv 2103.08273, and its authors' code (MingiJi/FRSKD,
    classification/models/bifpnc.py and bifpn.py). Parameters, results, gradients and running
    statistics are those of their modules. What differs is the work: :func:`selfkd.bifpn_fuse`
    rectifies, resamples and adds in one pass; the 1x1 convolutions stand before the upsampling, the
    same function at a quarter of the arithmetic; on the CPU maps are computed and returned in
    channels_last. (The norms of these convolutions allow for the repeated pixels in their running
    variance; ``nn.SyncBatchNorm`` in their place does not.)

    Examples
    --------
    >>> teacher = selfkd.nn.BiFPN([64, 128, 256, 512], 100)  # of ResNet-18's four stages
    >>> refined, teacher_logits = teacher(features)
    """

    def __init__(
        self,
        channels: Sequence[int],
        num_classes: int,
        *,
        width: int = 2,
        uniform_channels: int | None = None,
        repeat: int = 1,
        depth: int | tuple[int, int, int] = 2,
        fuse: Fusion = bifpn_fuse,
    ) -> None:
        super().__init__()
        arguments.require(_OP, "channels", channels, "Sequence[int]")
        self.channels = tuple(arguments.integer(_OP, "channels", c) for c in channels)
        if len(self.channels) < 2:
            raise ValueError(
                f"{_OP}: channels has length {len(self.channels)}, expected 2 levels or more"
            )
        num_classes = arguments.at_least(_OP, "num_classes", num_classes, 1)
        width = arguments.at_least(_OP, "width", width, 1)
        repeat = arguments.at_least(_OP, "repeat", repeat, 1)
        scaled = uniform_channels is None
        if uniform_channels is not None:
            uniform_channels = arguments.at_least(_OP, "uniform_channels", uniform_channels, 1)
        if repeat > 1 and scaled and width != 1:
            raise ValueError(
                f"{_OP}: repeat is {repeat}, expected 1 (or uniform_channels, or width 1)"
            )
        depths = tuple(depth[1:]) if isinstance(depth, (tuple, list)) else (depth, depth)
        if len(depths) != 2 or min(arguments.integer(_OP, "depth", x) for x in depths) < 1:
            raise ValueError(
                f"{_OP}: depth is {depth}, expected a number >= 1 or (lateral, up, down)"
            )
        widths = [uniform_channels or width * c for c in self.channels]
        self.layers = nn.ModuleList(
            _Layer(widths if r else self.channels, widths, depths, r == 0, scaled, fuse)
            for r in range(repeat)
        )
        self.head = nn.Linear(widths[-1], num_classes)

    @arguments.public(_OP)
    def forward(
        self, features: Sequence[torch.Tensor], preact: bool = False
    ) -> tuple[list[torch.Tensor], torch.Tensor]:
        """Refined maps and logits.

        Parameters
        ----------
        features
            Maps (N, C_i, H_i, W_i) of the classifier's stages, finest first, each twice as high and wide as
            the next. They get gradients; negative values count as 0.
        preact
            Return the maps as they are before the last ReLU, as the authors' module does for distillation
            of features before activation (Heo et al., arXiv 1904.01866). The logits stay the same.

        Returns
        -------
        tuple
            Maps (N, C'_i, H_i, W_i) that are not negative unless `preact`, to be distilled into
            `features`, with C'_i = `width` * C_i or `uniform_channels`; and logits (N, K).

        Raises
        ------
        TypeError
            What is no list of maps of floating dtype.
        ValueError
            A shape that does not fit.
        """
        preact = arguments.flag(_OP, "preact", preact)
        self._check(features)
        if features[0].device.type == "cpu":  # there convolutions work on channels_last
            features = [x.contiguous(memory_format=torch.channels_last) for x in features]
        maps = [F.relu(x) for x in features]
        for layer in self.layers[:-1]:
            maps = layer(maps)
        maps = self.layers[-1](maps, preact)
        last = F.relu(maps[-1]) if preact else maps[-1]
        logits: torch.Tensor = self.head(last.mean((2, 3)))
        return maps, logits

    def _check(self, features: Sequence[torch.Tensor]) -> None:
        """Raise unless there is a map for each level, of the size that upsampling makes."""
        levels = len(self.channels)
        check_maps(_OP, "features", features, levels)
        batch, _, height, width = features[-1].shape
        for i, (x, channels) in enumerate(zip(features, self.channels, strict=True)):
            scale = 2 ** (levels - 1 - i)
            expected = (batch, channels, scale * height, scale * width)
            if x.shape != expected:
                raise ValueError(
                    f"{_OP}: features[{i}] has shape {tuple(x.shape)}, expected {expected}"
                )

    @staticmethod
    def convert_authors_state_dict(
        state_dict: Mapping[str, Any], part: str | None = None
    ) -> dict[str, Any]:
        """Rename the entries of a checkpoint of the authors' modules, BiFPNc or BiFPN, to ours.

        Parameters
        ----------
        state_dict
            State dict of their self-teacher, with or without the ``module.`` of DataParallel.
        part
            Of a larger checkpoint, what the self-teacher is called there; entries of other names are
            left out. Theirs holds classifier, losses and self-teacher as ``"0"`` to ``"3"``.

        Returns
        -------
        dict
            For ``load_state_dict`` of a :class:`BiFPN` of the same variant.

        Raises
        ------
        TypeError
            What is no mapping.
        ValueError
            A key that their modules do not have, or two of one entry; a `part` that is not there.
        """
        return converted(_OP, "BiFPNc or BiFPN", state_dict, part, key_of_bifpn)


def check_maps(op: str, name: str, maps: Sequence[torch.Tensor], levels: int) -> None:
    """Raise unless this is a list of so many maps of shape (N, C, H, W) and floating dtype."""
    if not isinstance(maps, (list, tuple)):
        arguments.require(op, name, maps, "Sequence[torch.Tensor]")  # raises
    if len(maps) != levels:
        last = f" ({name}[-{levels}:])" if len(maps) > levels else ""
        raise ValueError(f"{op}: {name} has length {len(maps)}, expected {levels}{last}")
    for i, x in enumerate(maps):
        if x.ndim != 4:
            raise ValueError(
                f"{op}: {name}[{i}] has shape {tuple(x.shape)}, expected 4 dimensions (N, C, H, W)"
            )
        if not x.is_floating_point():
            found = str(x.dtype).removeprefix("torch.")
            raise TypeError(f"{op}: {name}[{i}] has dtype {found}, expected a floating dtype")
