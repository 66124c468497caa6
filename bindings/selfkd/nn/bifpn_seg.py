"""FRSKD's neck for segmentation: a bidirectional feature pyramid of plain sums."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from .. import arguments
from ..bifpn_fuse import bifpn_fuse
from .bifpn import Fusion, without_module

_FINEST = 2  # the authors' number of the finest map: P2


def _node(channels: int) -> nn.Sequential:
    """A scale and a shift of each channel, batch norm, ReLU."""
    conv = nn.Conv2d(channels, channels, 1, groups=channels)
    return nn.Sequential(conv, nn.BatchNorm2d(channels), nn.ReLU(inplace=True))


class _Layer(nn.Module):
    """Top-down and, unless told otherwise, bottom-up."""

    def __init__(self, channels: int, levels: int, bottom_up: bool, fuse: Fusion) -> None:
        super().__init__()
        self.fuse = fuse
        self.top_down = nn.ModuleList(_node(channels) for _ in range(levels))
        self.bottom_up = nn.ModuleList(_node(channels) for _ in range((levels - 1) * bottom_up))

    def add(self, *maps: torch.Tensor, way: str | None) -> torch.Tensor:
        """The sum of maps, the last of which is brought to the size of the others."""
        resize = [*[None] * (len(maps) - 1), way]
        return self.fuse(*maps, resize=resize, activation="none")

    def add_upsampled(self, x: torch.Tensor, above: torch.Tensor) -> torch.Tensor:
        """`x` and the coarser map above it, upsampled.

        By the ratio of their widths, as the authors' code has it, which is that of their heights too for
        most sizes. Where it is not and their code cannot add the maps, to the size of `x`.
        """
        (height, width), (rows, columns) = x.shape[2:], above.shape[2:]
        scale = width / columns
        if height * columns != width * rows and math.floor(rows * scale) == height:
            above = F.interpolate(above, scale_factor=scale, mode="bilinear")
            return self.add(x, above, way=None)
        return self.add(x, above, way="bilinear")

    def forward(self, maps: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        *nodes, top = self.top_down
        path = [top(maps[-1])]
        for x, node in zip(maps[-2::-1], reversed(nodes), strict=True):
            path.insert(0, node(self.add_upsampled(x, path[0])))
        if not self.bottom_up:
            return path
        refined = [path[0]]
        for i, node in enumerate(self.bottom_up, start=1):
            refined.append(node(self.add(maps[i], path[i], refined[-1], way="nearest")))
        return refined


class BiFPNSeg(nn.Module):
    """FRSKD's neck for segmentation: layers of a feature pyramid that add maps with equal weights.

    Each sum is followed by a 1x1 convolution of each channel, batch norm and ReLU; the coarsest map has
    such a node of its own on the way down. Sums go up by bilinear and down by nearest-neighbour sampling.

    Parameters
    ----------
    channels
        Channels of all maps.
    levels
        How many maps, at least 2; the authors' neck has the 6 maps P2 to P7.
    repeat
        Layers: 3 for the classifier's neck, 2 for the self-teacher's on top of it.
    bottom_up
        Whether the last layer has its second half; that of the self-teacher has not.
    fuse
        What fuses maps: :func:`selfkd.bifpn_fuse`, or to compare with,
        :func:`selfkd.reference.bifpn_fuse`.

    Raises
    ------
    ValueError
        A number that is not accepted.

    Notes
    -----
    Source: FRSKD (arXiv 2103.08273) and its authors' code, MingiJi/FRSKD, segmentation/utils/BiFPN.py.
    Parameters, results, gradients and running statistics are those of their module.

    Examples
    --------
    >>> neck = selfkd.nn.BiFPNSeg(64, 6)
    >>> teacher = selfkd.nn.BiFPNSeg(64, 6, repeat=2, bottom_up=False)
    >>> maps = neck(pyramid)
    >>> teacher_maps = teacher(maps)
    """

    def __init__(
        self,
        channels: int,
        levels: int = 6,
        *,
        repeat: int = 3,
        bottom_up: bool = True,
        fuse: Fusion = bifpn_fuse,
    ) -> None:
        super().__init__()
        for name, value, least in (
            ("channels", channels, 1),
            ("levels", levels, 2),
            ("repeat", repeat, 1),
        ):
            if arguments.integer("BiFPNSeg", name, value) < least:
                raise ValueError(f"BiFPNSeg: {name} is {value}, expected {least} or more")
        self.levels = levels
        self.layers = nn.Sequential(
            *(_Layer(channels, levels, bottom_up or r < repeat - 1, fuse) for r in range(repeat))
        )

    @arguments.public("BiFPNSeg")
    def forward(self, maps: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Refine maps (N, C, H_i, W_i), finest first, of any sizes; their shapes stay."""
        if len(maps) != self.levels:
            raise ValueError(f"BiFPNSeg: maps has length {len(maps)}, expected {self.levels}")
        refined: list[torch.Tensor] = self.layers(maps)
        return refined

    @staticmethod
    def convert_authors_state_dict(state_dict: Mapping[str, Any], neck: str = "") -> dict[str, Any]:
        """Rename the entries of a checkpoint of the authors' neck to ours.

        Parameters
        ----------
        state_dict
            State dict of their nn.Sequential of layers (keys ``0.conv7up.0.weight``), or with `neck` of
            the whole model. A prefix ``module.``, which DataParallel leaves, is taken off.
        neck
            Which part of a whole model: ``"BiFPN1"``, the classifier's, or ``"BiFPN2"``, the
            self-teacher's. Entries of other parts are left out.

        Returns
        -------
        dict
            For ``load_state_dict`` of a :class:`BiFPNSeg` of as many layers and 6 levels.

        Raises
        ------
        ValueError
            A key that their neck does not have, or no key of that neck.
        """
        prefix = f"{neck}." if neck else ""
        items = without_module(state_dict).items()
        found = {
            _our_key(key.removeprefix(prefix)): x for key, x in items if key.startswith(prefix)
        }
        if not found:
            raise ValueError(f"BiFPNSeg: state_dict has no key of {neck or 'a neck'}")
        return found


def _our_key(key: str) -> str:
    """The name here of an entry of the authors' state dict."""
    match = re.fullmatch(r"(\d+)\.conv([2-7])(up|dw)\.([01])\.(\w+)", key)
    if not match:
        raise ValueError(
            f"BiFPNSeg: state_dict has the key {key!r}, expected those of FRSKD's BiFPNSeg, such as"
            " '0.conv7up.0.weight' (of a whole model: neck=\"BiFPN1\")"
        )
    r, level, way, member, name = match.groups()
    half, first = ("top_down", _FINEST) if way == "up" else ("bottom_up", _FINEST + 1)
    return f"layers.{r}.{half}.{int(level) - first}.{member}.{name}"
