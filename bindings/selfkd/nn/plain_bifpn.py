"""A feature pyramid of plain sums: FRSKD's neck for segmentation."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from ..bifpn_fuse import bifpn_fuse
from .bifpn import Fusion


def _node(channels: int) -> nn.Sequential:
    """A scale and a shift of each channel, batch norm, ReLU."""
    conv = nn.Conv2d(channels, channels, 1, groups=channels)
    return nn.Sequential(conv, nn.BatchNorm2d(channels), nn.ReLU(inplace=True))


class _Layer(nn.Module):
    """Top-down and, unless told otherwise, bottom-up."""

    def __init__(self, channels: int, levels: int, bottom_up: bool, fuse: Fusion) -> None:
        super().__init__()
        self.fuse = fuse
        self.top_down = nn.ModuleList(_node(channels) for _ in range(levels - 1))
        self.bottom_up = nn.ModuleList(_node(channels) for _ in range((levels - 1) * bottom_up))

    def forward(self, maps: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        path = [maps[-1]]
        for x, node in zip(maps[-2::-1], reversed(self.top_down), strict=True):
            path.insert(
                0, node(self.fuse(x, path[0], resize=(None, "bilinear"), activation="none"))
            )
        if not self.bottom_up:
            return path
        refined = [path[0]]
        for i, node in enumerate(self.bottom_up, start=1):
            between = path[i:-1][:1]  # none at the top, where it would be the map itself
            operands = [maps[i], *between, refined[-1]]
            resize = [*[None] * (len(operands) - 1), "nearest"]
            refined.append(node(self.fuse(*operands, resize=resize, activation="none")))
        return refined


class PlainBiFPN(nn.Module):
    """Layers of a bidirectional feature pyramid that add maps with equal weights.

    Sums go up by bilinear and down by nearest-neighbour sampling, each followed by a 1x1 convolution of
    each channel, batch norm and ReLU.

    Parameters
    ----------
    channels
        Channels of all maps.
    levels
        How many maps, at least 2.
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
    Source: FRSKD (arXiv 2103.08273) and its authors' code, MingiJi/FRSKD, segmentation/.

    Examples
    --------
    >>> neck = selfkd.nn.PlainBiFPN(64, 6)
    >>> teacher = selfkd.nn.PlainBiFPN(64, 6, repeat=2, bottom_up=False)
    >>> maps = neck(pyramid)
    >>> teacher_maps = teacher(maps)
    """

    def __init__(
        self,
        channels: int,
        levels: int,
        *,
        repeat: int = 3,
        bottom_up: bool = True,
        fuse: Fusion = bifpn_fuse,
    ) -> None:
        super().__init__()
        for name, value, least in (("levels", levels, 2), ("repeat", repeat, 1)):
            if value < least:
                raise ValueError(f"PlainBiFPN: {name} is {value}, expected {least} or more")
        self.layers = nn.Sequential(
            *(_Layer(channels, levels, bottom_up or r < repeat - 1, fuse) for r in range(repeat))
        )

    def forward(self, maps: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Refine maps (N, C, H_i, W_i), finest first, of any sizes; their shapes stay."""
        refined: list[torch.Tensor] = self.layers(maps)
        return refined
