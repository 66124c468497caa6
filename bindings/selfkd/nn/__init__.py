"""Loss modules."""

from .sd_dropout import SDDropout

__all__ = ["SDDropout"]
