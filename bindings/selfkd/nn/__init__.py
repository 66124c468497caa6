"""Loss modules."""

from .aikd import AIKDLoss, AIKDParts, Discriminator, PreviousEpoch
from .bifpn import BiFPN
from .plain_bifpn import PlainBiFPN
from .schedules import sigmoid_rampup
from .sd_dropout import SDDropout
from .simreg import SimRegHead, SimRegLoss

__all__ = [
    "AIKDLoss",
    "AIKDParts",
    "BiFPN",
    "Discriminator",
    "PlainBiFPN",
    "PreviousEpoch",
    "SDDropout",
    "SimRegHead",
    "SimRegLoss",
    "sigmoid_rampup",
]
