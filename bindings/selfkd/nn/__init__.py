"""Loss modules."""

from .aikd import AIKDLoss, AIKDParts, Discriminator, PreviousEpoch
from .frskd import FRSKDLoss, FRSKDParts
from .schedules import frskd_rampup, sigmoid_rampup
from .sd_dropout import SDDropout
from .simreg import SimRegHead, SimRegLoss

__all__ = [
    "AIKDLoss",
    "AIKDParts",
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
