"""Loss modules."""

from .aikd import AIKDLoss, AIKDParts, Discriminator, PreviousEpoch
from .schedules import sigmoid_rampup
from .sd_dropout import SDDropout

__all__ = [
    "AIKDLoss",
    "AIKDParts",
    "Discriminator",
    "PreviousEpoch",
    "SDDropout",
    "sigmoid_rampup",
]
