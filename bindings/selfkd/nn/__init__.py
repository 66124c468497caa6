"""Loss modules."""

from .sd_dropout import SDDropout
from .simreg import SimRegHead, SimRegLoss

__all__ = ["SDDropout", "SimRegHead", "SimRegLoss"]
