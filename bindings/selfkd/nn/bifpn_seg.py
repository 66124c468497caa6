"""FRSKD's neck for segmentation: layers of a bidirectional feature pyramid of plain sums."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from .. import arguments
from ..bifpn_fuse import bifpn_fuse
from .bifpn import Fusion, check_maps
from .checkpoints import NORM, converted

_OP = "BiFPNSeg"
# By the authors' names, which count the levels from 2.
_NODES = {f"conv{i + 2}up": f"top_down.{i}" for i in range(6)}
_NODES |= {f"conv{i + 3}dw": f"bottom_up.{i}" for i in range(5)}


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

    def forward(self, maps: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        path: list[torch.Tensor] = []
        for x, node in zip(reversed(maps), reversed(self.top_down), strict=True):
            path.insert(0, node(self._risen(x, path[0]) if path else x))
        if not self.bottom_up:
            return path
        refined = [path[0]]
        for x, up, node in zip(maps[1:], path[1:], self.bottom_up, strict=True):
            resize = (None, None, "nearest")
            refined.append(node(self.fuse(x, up, refined[-1], resize=resize, activation="none")))
        return refined

    def _risen(self, x: torch.Tensor, above: torch.Tensor) -> torch.Tensor:
        """The sum of a map and the one above it, brought to its size."""
        way: str | None = "bilinear"
        (height, width), (rows, columns) = x.shape[2:], above.shape[2:]
        if height * columns != rows * width:
            # The authors enlarge both sides by the ratio of the widths, of the rows what fits into it. Where
            # that makes this height, a row's place is not what the ratio of the heights says.
            ratio = width / columns
            if (int(rows * ratio), int(columns * ratio)) == (height, width):
                above, way = F.interpolate(above, scale_factor=ratio, mode="bilinear"), None
        found: torch.Tensor = self.fuse(x, above, resize=(None, way), activation="none")
        return found


class BiFPNSeg(nn.Module):
    """FRSKD's neck for segmentation: layers of a feature pyramid that add maps with equal weights.

    A layer goes from the coarsest map to the finest, then back. At each map stands a node: a 1x1
    convolution of each channel with bias, batch norm and ReLU. Going up it sees the map and, enlarged
    bilinearly, what the node above made (the top sees its map alone); going down the map, what the first
    half made of it, and, by nearest-neighbour sampling, what the node below made.

    Parameters
    ----------
    channels
        Channels of all maps.
    levels
        How many maps, at least 2; the authors have 6.
    repeat
        Layers: 3 for the classifier's neck, 2 for the self-teacher's on top of it.
    bottom_up
        Whether the last layer has its second half; that of the self-teacher has not (the authors'
        ``is_last``).
    fuse
        What fuses maps: :func:`selfkd.bifpn_fuse`, or to compare with,
        :func:`selfkd.reference.bifpn_fuse`.

    Raises
    ------
    TypeError, ValueError
        A number that is not accepted.

    Notes
    -----
    Source: FRSKD (arXiv 2103.08273) and its authors' code, class BiFPNSeg (MingiJi/FRSKD,
    segmentation/utils/BiFPN.py). Parameters, results, gradients and running statistics are those of
    their modules. Maps may have any sizes: where theirs raises, because a height is not that of the map
    above times the ratio of the widths, rounded down, here each side is enlarged by a ratio of its own.

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
        self.channels = arguments.at_least(_OP, "channels", channels, 1)
        self.levels = arguments.at_least(_OP, "levels", levels, 2)
        repeat = arguments.at_least(_OP, "repeat", repeat, 1)
        bottom_up = arguments.flag(_OP, "bottom_up", bottom_up)
        self.layers = nn.Sequential(
            *(
                _Layer(self.channels, self.levels, bottom_up or r < repeat - 1, fuse)
                for r in range(repeat)
            )
        )

    @arguments.public(_OP)
    def forward(self, maps: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Refine maps (N, C, H_i, W_i), finest first, of any sizes; their shapes stay.

        Raises
        ------
        TypeError
            What is no list of maps of floating dtype.
        ValueError
            Another number of maps, a shape that does not fit.
        """
        check_maps(_OP, "maps", maps, self.levels)
        for i, x in enumerate(maps):
            expected = (maps[0].shape[0], self.channels, *x.shape[2:])
            if x.shape != expected:
                raise ValueError(
                    f"{_OP}: maps[{i}] has shape {tuple(x.shape)}, expected {expected}"
                )
        refined: list[torch.Tensor] = self.layers(list(maps))
        return refined

    @staticmethod
    def convert_authors_state_dict(
        state_dict: Mapping[str, Any], part: str | None = None
    ) -> dict[str, Any]:
        """Rename the entries of a checkpoint of the authors' necks to ours.

        Parameters
        ----------
        state_dict
            State dict of one of their layers (``conv7up.0.weight``, ...) or of an nn.Sequential of them
            (``0.conv7up.0.weight``, ...), with or without the ``module.`` of DataParallel.
        part
            Of a larger checkpoint, what the neck is called there; entries of other names are left out.
            In that of their network ``"BiFPN1"`` is the classifier's neck, ``"BiFPN2"`` the self-teacher's.

        Returns
        -------
        dict
            For ``load_state_dict`` of a :class:`BiFPNSeg` of 6 levels with as many layers.

        Raises
        ------
        TypeError
            What is no mapping.
        ValueError
            A key that their layers do not have, or two of one entry; a `part` that is not there.

        Examples
        --------
        >>> theirs = torch.load("efficientdet.pth")
        >>> neck.load_state_dict(BiFPNSeg.convert_authors_state_dict(theirs, "BiFPN1"))
        """
        return converted(_OP, "BiFPNSeg", state_dict, part, _our_key)


def _our_key(key: str) -> str | None:
    """The name here of an entry of the authors' state dict; None: they have no such entry."""
    match key.split("."):
        case [node, k, name]:
            r = "0"
        case [r, node, k, name] if r.isdigit():
            pass
        case _:
            return None
    entries = {"0": ("weight", "bias"), "1": NORM}.get(k, ())
    return f"layers.{r}.{_NODES[node]}.{k}.{name}" if node in _NODES and name in entries else None
