"""Schedules of loss weights over the epochs, as plain functions."""

from __future__ import annotations

import math

from .. import arguments

_LEARNS = "write the ramp in PyTorch"


def sigmoid_rampup(epoch: float, length: float) -> float:
    """exp(-5 (1 - t)^2) with t = epoch / length: from 0.0067 at epoch 0 to 1 at `length` and after.

    Parameters
    ----------
    epoch
        Where training is; fractions of an epoch are fine. Before 0 counts as 0.
    length
        Epochs of the ramp; 0 or less: no ramp, always 1.

    Notes
    -----
    Source: Laine and Aila, "Temporal Ensembling for Semi-Supervised Learning", arXiv 1610.02242.
    """
    epoch = arguments.number("sigmoid_rampup", "epoch", epoch, _LEARNS)
    length = arguments.number("sigmoid_rampup", "length", length, _LEARNS)
    if epoch >= length:
        return 1.0
    return math.exp(-5 * (1 - max(epoch, 0) / length) ** 2)


def frskd_rampup(epoch: float, warmup: int = 40, epochs: int = 60) -> float:
    """0 in the first `warmup` epochs, then exp(-5 (1 - t)^2), t = (epoch + 1 - warmup) / (epochs - warmup).

    What FRSKD's weights for segmentation are multiplied by.

    Parameters
    ----------
    epoch
        The epoch, from 0; 1 is reached in the last one, `epochs` - 1.
    warmup
        Epochs in which only the cross-entropies count.
    epochs
        Length of training.

    Notes
    -----
    Source: Ji et al., arXiv 2103.08273, as in its authors' code (MingiJi/FRSKD, segmentation).
    """
    epoch = arguments.number("frskd_rampup", "epoch", epoch, _LEARNS)
    warmup = arguments.number("frskd_rampup", "warmup", warmup, _LEARNS)
    epochs = arguments.number("frskd_rampup", "epochs", epochs, _LEARNS)
    return 0.0 if epoch < warmup else sigmoid_rampup(epoch + 1 - warmup, epochs - warmup)
