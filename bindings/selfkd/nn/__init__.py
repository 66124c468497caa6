"""Losses as modules, the heads and self-teachers that go with them, schedules of their weights."""

from typing import Any

from .aikd import AIKDLoss, AIKDParts
from .bifpn import BiFPN
from .bifpn_seg import BiFPNSeg
from .discriminator import Discriminator
from .frskd import FRSKDLoss, FRSKDParts
from .previous_epoch import PreviousEpoch
from .schedules import frskd_rampup, sigmoid_rampup
from .sd_dropout import SDDropout
from .simreg import SimRegHead, SimRegLoss

__all__ = [
    "AIKDLoss",
    "AIKDParts",
    "BiFPN",
    "BiFPNSeg",
    "Discriminator",
    "FRSKDLoss",
    "FRSKDParts",
    "PreviousEpoch",
    "SDDropout",
    "SimRegHead",
    "SimRegLoss",
    "frskd_rampup",
    "sigmoid_rampup",
]


def __getattr__(name: str) -> Any:
    if name == "PlainBiFPN":
        # Not an AttributeError, whose words "from selfkd.nn import PlainBiFPN" would not show.
        raise ImportError(
            "selfkd.nn: PlainBiFPN is gone, expected BiFPNSeg, which has the top node that it left out"
        )
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
