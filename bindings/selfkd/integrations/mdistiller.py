"""mdistiller: its functions ``kd_loss`` and ``at_loss``, and those of the forks that standardise logits."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F

from .. import arguments
from . import _shared

__all__ = ["at_loss", "kd_loss"]


def _check_kd(
    logits_student: Any,
    logits_teacher: Any,
    temperature: Any,
    *by_position: Any,
    reduce: Any = True,
    logit_stand: Any = False,
) -> None:
    op = "kd_loss"
    if len(by_position) == 1:
        raise TypeError(
            f"{op}: the fourth argument is {arguments.described(by_position[0])} by position, expected its"
            " name, reduce= or logit_stand=, since mdistiller's forks differ in it"
        )
    if len(by_position) > 2:
        raise TypeError(
            f"{op}: {3 + len(by_position)} arguments are given by position, expected 3 or 5"
        )
    _shared.check_logits(op, ("logits_student", "logits_teacher"), logits_student, logits_teacher)
    _shared.number(op, "temperature", temperature, "POSITIVE")
    arguments.flag(op, "reduce", reduce)
    arguments.flag(op, "logit_stand", logit_stand)


@_shared.explained(_check_kd)
def kd_loss(
    logits_student: torch.Tensor,
    logits_teacher: torch.Tensor,
    temperature: float,
    *by_position: bool,
    reduce: bool = True,
    logit_stand: bool = False,
) -> torch.Tensor:
    """T^2 KL(softmax(teacher/T) || softmax(student/T)).

    Parameters
    ----------
    logits_student, logits_teacher
        (N, C). A teacher that requires grad gets one, as there.
    temperature
        T, finite and > 0; it may require grad too.
    reduce
        The mean over the batch; False: a value for each row.
    logit_stand
        Standardise each row of both first (arXiv 2403.01427).
    *by_position
        `reduce` and `logit_stand`, both or neither: a single fourth argument is `logit_stand` in the
        fork's ``KD.py`` and `reduce` in its ``MLKD.py``, so it must be named.

    Returns
    -------
    torch.Tensor
        0-d, or (N,); float32, or float64 for float64 logits.

    Raises
    ------
    TypeError, ValueError
        An argument is not what it must be.

    Notes
    -----
    Equal to ``mdistiller/distillers/KD.py`` of megvii-research/mdistiller (commit a08d46f, 2023-11-05), and
    to ``KD.py`` and ``MLKD.py`` of the fork sunshangquan/logit-standardization-KD (commit 6083e2d).
    """
    if by_position:
        reduce, logit_stand = by_position
    if arguments.flag("kd_loss", "logit_stand", logit_stand):
        _check_kd(logits_student, logits_teacher, temperature)
        logits_student = _shared.standardized(logits_student, 1e-7)
        logits_teacher = _shared.standardized(logits_teacher, 1e-7)
    reduction = "mean" if arguments.flag("kd_loss", "reduce", reduce) else "none"
    return _shared.kl(logits_student, logits_teacher, temperature=temperature, reduction=reduction)


def _single_at_loss(op: str, names: _shared.Names, f_s: Any, f_t: Any, p: Any) -> torch.Tensor:
    _shared.check_pair(op, names, f_s, f_t, 3)
    height, other = f_s.shape[2], f_t.shape[2]
    if height != other:
        for name, x in zip(names, (f_s, f_t), strict=True):
            if x.ndim != 4:
                raise ValueError(
                    f"{op}: {name} has {x.ndim} dimensions, expected 4, (N, C, H, W), where heights differ"
                )
        least = min(height, other)
        pooled = F.adaptive_avg_pool2d(f_s if height > other else f_t, least)
        f_s, f_t = (pooled, f_t) if height > other else (f_s, pooled)
    _shared.check_maps(op, names, f_s, f_t, " once the larger is pooled to the smaller's height")
    if not isinstance(p, torch.Tensor) and p == 2:
        return _shared.at(f_s, f_t)
    q, r = (F.normalize(x.pow(p).mean(1).flatten(1)) for x in (f_s, f_t))
    return (q - r).square().mean()


def at_loss(g_s: Sequence[torch.Tensor], g_t: Sequence[torch.Tensor], p: float) -> torch.Tensor:
    """Attention transfer: the sum over pairs of features of :func:`selfkd.attention`.

    Parameters
    ----------
    g_s, g_t
        Features (N, C, H, W) of student and teacher, as many of each. Where heights differ the larger
        map is brought to the square of the smaller height by adaptive average pooling, as there. A
        teacher that requires grad gets one.
    p
        The power of the features before the mean over channels. 2, mdistiller's own, is fused; others
        are plain PyTorch.

    Returns
    -------
    torch.Tensor
        0-d.

    Raises
    ------
    TypeError, ValueError
        An argument is not what it must be.

    Notes
    -----
    Equal to ``mdistiller/distillers/AT.py`` of megvii-research/mdistiller (commit a08d46f), which leaves
    out what the longer list has more; here that is an error.
    """
    op = "at_loss"
    for name, features in (("g_s", g_s), ("g_t", g_t)):
        if not isinstance(features, (list, tuple)):
            found = arguments.described(features)
            raise TypeError(f"{op}: {name} is {found}, expected a list of features")
    if len(g_s) != len(g_t) or not g_s:
        raise ValueError(
            f"{op}: g_t has {len(g_t)} features, expected {len(g_s) or 'at least 1'} like g_s"
        )
    p = _shared.number(op, "p", p)
    losses = [
        _single_at_loss(op, (f"g_s[{k}]", f"g_t[{k}]"), f_s, f_t, p)
        for k, (f_s, f_t) in enumerate(zip(g_s, g_t, strict=True))
    ]
    return torch.stack(losses).sum()
