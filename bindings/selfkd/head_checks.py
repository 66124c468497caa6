"""The contract of ``sd_dropout_head``, which is an operator made of others, and its checks."""

from __future__ import annotations

from typing import Any

import torch

from . import arguments, contract

OP = "sd_dropout_head"
CONTRACT = contract.parse(
    OP,
    """
    IN,     features,        NK, FLOATING
    IN,     weight,          CK, SAME
    OPT,    bias,            C,  SAME
    IN,     target,          N,  INDEX
    OPT,    row_weight,      N,  WEIGHT
    OPT,    divisor,         ,   ACC
    IN,     seed,            ,   SEED
    REAL,   p,               BELOW_ONE, 0.5
    REAL,   temperature,     POSITIVE, 3.0
    REAL,   kl_weight,       NONNEGATIVE, 1.0
    REAL,   forward_weight,  NONNEGATIVE, 1.0
    REAL,   reverse_weight,  NONNEGATIVE, 1.0
    BOOL,   detach_target,   ANY, 0
    REAL,   label_smoothing, FRACTION, 0.0
    INT,    ignore_index,    ANY, -100
    CHOICE, reduction,       none|mean|sum, 1
    INT,    chunk_bytes,     NONNEGATIVE, 67108864
    BOOL,   return_logits,   ANY, 0
    INT,    wanted,          NONNEGATIVE, 0
    """,
)
NAMES = [item.name for item in CONTRACT.items]
REDUCTION, NONE, MEAN = NAMES.index("reduction"), 0, 1
BITS = FEATURES, WEIGHT, BIAS = 1, 2, 4  # gradients that are `wanted`


def weights_that_count(
    target: torch.Tensor, row_weight: torch.Tensor | None, ignore_index: int
) -> torch.Tensor:
    """Weight of each row, 0 (False) where its target is ignored."""
    counted = target != ignore_index
    return counted if row_weight is None else torch.where(counted, row_weight, 0)


_passed: set[tuple[Any, ...]] = set()  # by what checks see of the arguments; sizes seldom change


def check_once(values: tuple[Any, ...]) -> None:
    """:func:`check`, but not of what has passed before: it takes longer than a small head."""
    seen = tuple((x.dtype, x.device, x.shape) if isinstance(x, torch.Tensor) else x for x in values)
    if seen not in _passed:
        check(values)
        if len(_passed) >= 256:
            _passed.clear()
        _passed.add(seen)


def check(values: tuple[Any, ...]) -> None:
    """The contract, and room for one row."""
    named = dict(zip(NAMES, values, strict=True))
    contract.check(CONTRACT, named)
    if named["features"].shape[1] == 0:
        raise ValueError(f"{OP}: features has size 0 in dimension K, expected at least 1")
    row = 3 * named["weight"].shape[0] * arguments.accumulator(named["features"]).itemsize
    if named["chunk_bytes"] < row:
        raise ValueError(
            f"{OP}: chunk_bytes is {named['chunk_bytes']}, expected at least {row}, the logits of one row"
        )


def explain_target(target: torch.Tensor, classes: int, ignore_index: int) -> None:
    """Raise ValueError if a target is out of range, with its position in the batch."""
    bad = (target != ignore_index) & ((target < 0) | (target >= classes))
    if bad.any():
        at = int(bad.nonzero()[0])
        raise ValueError(
            f"{OP}: target is {int(target[at])} at position [{at}], expected 0 to {classes - 1}, or "
            f"ignore_index, {ignore_index}"
        )


def check_weights(kept: torch.Tensor) -> None:
    """Raise ValueError if the weight of a row that counts is negative or NaN. (Those of the operator of
    rows may be: in backward they come times an incoming gradient.)"""
    if not (kept >= 0).all():
        at = int((~(kept >= 0)).nonzero()[0])
        raise ValueError(
            f"{OP}: row_weight is {float(kept[at]):g} at position [{at}], expected a number >= 0"
        )
