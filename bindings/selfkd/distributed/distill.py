"""Distillation with sharded classes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from .. import arguments, contract, kernels
from ..distill import (
    DistillParts,
    _call,
    _check,
    _reduction,
    _Teacher,
    _teachers,
    of_contract,
)
from ..distill import given as _given
from .shards import (
    Pair,
    attach,
    denominator_of,
    gather,
    gradient,
    sizes_of_ranks,
    weights_of,
    whole_of,
)

_IGNORED = -100
_values = kernels.in_order(contract.contract("distill"))
_gradient = gradient("distill_backward")


class _Shards(NamedTuple):
    """What is known of each row, by rank along dimension 0."""

    top: torch.Tensor  # the largest logit
    level: torch.Tensor  # log sum exp(z - top)
    above: torch.Tensor  # the mean of top - z
    of_target: torch.Tensor  # the logit of the target, 0 elsewhere
    found: torch.Tensor  # whether the target is here
    pairs: list[Pair]  # student and teacher at the temperatures of each teacher


def _as_logits(teacher: _Teacher) -> torch.Tensor:
    """What softmax(x / T') takes: logarithms of a part of the probabilities need not sum to 1."""
    x = teacher.logits
    if teacher.kind != "probs":
        return x
    return (x if x.dtype == torch.float64 else x.float()).log()


def _measure(
    logits: torch.Tensor,
    mask: torch.Tensor | None,
    local: torch.Tensor | None,
    smooth: bool,
    teachers: Sequence[_Teacher],
) -> torch.Tensor:
    """The rank's parts of _Shards, (parts, N, ...) float64: the operator once, for a second teacher twice.

    `local` is the target's index in this shard, C_r where it is elsewhere.
    """
    of_student: list[torch.Tensor] = []
    of_teachers: list[torch.Tensor] = []
    for k in range(max(1, len(teachers))):
        named: dict[str, Any] = {"logits": logits, "weight": mask, "reduction": 0}
        if k == 0 and local is not None:
            named |= {"target": torch.zeros_like(local), "label_smoothing": 1.0 if smooth else 0.0}
        if teachers:
            _, _, temperature, own, _ = teachers[k]
            named |= {"teacher": _as_logits(teachers[k]), "temperature": temperature}
            named |= {"teacher_temperature": own}
        found = _call.outputs(*_values(**named))
        ce, kl, levels, ratios = found[4], found[5], found[6].double(), found[7]
        if k == 0:
            of_student = [levels[0]]
        if k == 0 and local is not None:
            index = local.clamp(0, logits.shape[1] - 1).unsqueeze(1)
            inside = (local >= 0) & (local < logits.shape[1])
            z = torch.where(inside, logits.gather(1, index).squeeze(1).double(), 0)
            of_student += [levels[1], ce.double() - levels[1], z, inside.double()]
        if teachers:
            of_teachers += [levels[2], ratios[0], kl.double() / temperature**2]
    return torch.stack([*of_student, *of_teachers])


def _shards(parts: torch.Tensor, has_ce: bool, teachers: Sequence[_Teacher]) -> _Shards:
    """The parts of all ranks by name."""
    found = list(parts.unbind(1))
    top = found.pop(0)
    level, above, of_target, inside = (found.pop(0) if has_ce else top for _ in range(4))
    pairs = []
    for teacher in teachers:
        level_t, ratio, kl = (found.pop(0) for _ in range(3))
        lse = torch.where(top == -torch.inf, top, top / teacher.temperature + level_t)
        pairs.append(Pair(lse, ratio, torch.zeros_like(kl), kl))
    return _Shards(top, level, above, of_target, inside != 0, pairs)


def _cross_entropy(
    shards: _Shards, sizes: Sequence[int], smoothing: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Each row's largest logit h, log sum exp(z - h), and -sum y log p.

    As in the kernels the sum is 1 + rest, so that a row that is sure of its class keeps its digits.
    """
    h, largest = shards.top.max(0, keepdim=True)
    ranks = torch.arange(len(sizes), device=h.device).view(-1, *[1] * (h.ndim - 1))
    terms = (shards.top - h + shards.level).exp()
    terms = torch.where(shards.top == -torch.inf, 0, terms)
    level = torch.where(ranks == largest, shards.level.expm1(), terms).sum(0).log1p()
    ce = torch.zeros_like(level)
    if smoothing != 1:
        of_target = torch.where(shards.found.any(0), shards.of_target.sum(0), torch.nan)
        ce = ce + (1 - smoothing) * ((h[0] - of_target) + level)
    if smoothing != 0:
        above = torch.where(shards.top == -torch.inf, torch.inf, shards.above + (h - shards.top))
        share = above.new_tensor(sizes).view_as(ranks) / sum(sizes)
        ce = ce + smoothing * (level + (share * above).sum(0))
    return level, ce


def _kept(
    top: torch.Tensor, level: torch.Tensor, teachers: Sequence[_Teacher], wholes: Sequence[Pair]
) -> tuple[torch.Tensor, torch.Tensor]:
    """The operator's levels and ratios of whole rows; 0 for teachers that are not there."""
    absent = [torch.zeros_like(top)] * (2 - len(teachers))
    levels = [x.lse - top / k.temperature for k, x in zip(teachers, wholes, strict=True)]
    ratios = [x.ratio for x in wholes]
    return torch.stack([top, level, *levels, *absent]), torch.stack([*ratios, *absent])


def _local_target(
    op: str, target: torch.Tensor, ignore_index: int, sizes: Sequence[int], rank: int
) -> torch.Tensor:
    """The target's index in the shard of a rank, its size where the target is elsewhere; or _IGNORED."""
    ignored, classes = target == ignore_index, sum(sizes)
    if target.device.type == "cpu" and not torch.compiler.is_compiling():
        bad = ((target < 0) | (target >= classes)) & ~ignored
        if bad.any():
            at = tuple(bad.nonzero()[0].tolist())
            raise ValueError(
                f"{op}: target is {target[at]} at position {list(at)}, expected 0 to {classes - 1}, or "
                f"ignore_index, {ignore_index}"
            )
    local = target - sum(sizes[:rank])
    local = torch.where((local >= 0) & (local < sizes[rank]), local, sizes[rank])
    return local.masked_fill(ignored, _IGNORED)


def _of_teachers(teachers: Sequence[_Teacher]) -> dict[str, Any]:
    """The contract's arguments of each teacher."""
    named: dict[str, Any] = {}
    names = ("teacher_weight", "temperature", "teacher_temperature", "teacher_kind")
    for prefix, teacher in zip(("", "second_"), teachers, strict=False):
        values = (teacher.logits, *of_contract(teacher))
        named |= {prefix + name: x for name, x in zip(("teacher", *names), values, strict=True)}
    return named


def _prepared(op: str, k: int, teacher: _Teacher, dim: int) -> _Teacher:
    """A teacher with its classes in dimension 1, and its numbers."""
    x, weight, temperature, own, kind = teacher
    way = "call selfkd.reference.distill on all classes, which gives it one"
    arguments.without_gradient(op, f"teachers[{k}]", x, way)
    weight = arguments.in_range(op, "teacher_weights", weight, "NONNEGATIVE")
    return _Teacher(
        arguments.logits_view(op, f"teachers[{k}]", x, dim),
        weight,
        arguments.number(op, "temperature", temperature),
        arguments.number(op, "teacher_temperature", own),
        kind,
    )


@arguments.public("vocab_parallel_distill")
def vocab_parallel_distill(
    logits: torch.Tensor,
    target: torch.Tensor | None = None,
    teachers: torch.Tensor | Sequence[torch.Tensor | None] | None = (),
    *,
    teacher_weights: float | Sequence[float] = 1.0,
    temperature: float | Sequence[float] = 4.0,
    teacher_temperature: float | Sequence[float | None] | None = None,
    teacher_kind: str | Sequence[str] = "logits",
    ce_weight: float = 1.0,
    label_smoothing: float = 0.0,
    ignore_index: int = -100,
    mask_teachers: bool = False,
    weight: torch.Tensor | None = None,
    reduction: str = "mean",
    divisor: float | torch.Tensor | None = None,
    dim: int = 1,
    return_parts: bool = False,
    sizes: Sequence[int] | None = None,
    group: dist.ProcessGroup | None = None,
) -> torch.Tensor | DistillParts:
    """:func:`selfkd.distill` of logits whose classes are sharded over the ranks of a group.

    Every rank calls it with its shard, and gets the loss of whole rows and the gradient of its shard.
    The ranks exchange at most 40 bytes a row, and 24 for each teacher, in one all-gather; backward
    exchanges nothing.

    Parameters
    ----------
    logits, teachers
        The rank's classes of student and teachers, shape (N, C_r) or (N, C_r, ...). Rows are the same on
        all ranks, C_r may differ, and be 1. Teachers that are probabilities are those of the whole
        distribution; that they sum to 1 is not looked at, and they are copied as logarithms.
    target
        Class of each position among all classes, the same on all ranks: rank r holds those from
        ``sum(sizes[:r])`` on. On CUDA, and when compiled, a target out of range gives nan.
    sizes, group
        As for :func:`vocab_parallel_sd_dropout_kl`.
    others
        As for :func:`selfkd.distill`, the same on all ranks.

    Returns
    -------
    torch.Tensor or DistillParts
        As :func:`selfkd.distill`, the same bits on all ranks.

    Raises
    ------
    TypeError, ValueError
        As :func:`selfkd.distill`; shards of different dtypes or rows; `sizes` that do not fit.

    Notes
    -----
    A second derivative (``create_graph=True``) is refused.
    """
    op = "vocab_parallel_distill"
    given = _given(
        _teachers(teachers, teacher_weights, temperature, teacher_temperature, teacher_kind)
    )
    _check(logits, target, len(given), mask_teachers)
    _reduction(reduction)
    ce_weight = arguments.in_range(op, "ce_weight", ce_weight, "NONNEGATIVE")
    label_smoothing = arguments.in_range(op, "label_smoothing", label_smoothing, "FRACTION")
    z = arguments.logits_view(op, "logits", logits, dim)
    found = [_prepared(op, k, x, dim) for k, x in enumerate(given)]
    found = [x for x in found if x.weight != 0]
    sizes = sizes_of_ranks(op, "logits", z, sizes, group)
    has_ce = target is not None and ce_weight != 0
    w = weights_of(op, z, weight)
    divided = None if divisor is None else arguments.divisor_tensor(op, divisor, reduction, z)
    acc = arguments.accumulator(z)
    with torch.no_grad():
        local, valid = None, w != 0
        if target is not None:
            local = _local_target(op, target, ignore_index, sizes, dist.get_rank(group))
            valid = valid & (local != _IGNORED)
        taught = valid if mask_teachers else w != 0
        mask = None if weight is None else w != 0
        parts = _measure(z.detach(), mask, local if has_ce else None, label_smoothing != 0, found)
        shards = _shards(gather(parts, group), has_ce, found)
        wholes = [whole_of(pair) for pair in shards.pairs]
        zeros = torch.zeros_like(w)
        level, ce_rows, kl_rows = zeros, zeros, zeros
        if has_ce:
            level, ce_rows = _cross_entropy(shards, sizes, label_smoothing)
            ce_rows = torch.where(valid, ce_weight * w * ce_rows, 0)
        for teacher, whole in zip(found, wholes, strict=True):
            rows = teacher.weight * teacher.temperature**2 * w * whole.reverse
            kl_rows = kl_rows + torch.where(taught, rows, 0)
        denominators = [
            denominator_of(torch.where(x, w, 0), reduction, divided) for x in (valid, taught)
        ]
        ce, kl = ce_rows, kl_rows
        if reduction != "none":
            ce = ce_rows.sum() / denominators[0] if has_ce else ce_rows.sum()
            kl = kl_rows.sum() / denominators[1] if found else kl_rows.sum()
        levels, ratios = _kept(shards.top.amax(0), level, found, wholes)
    loss = attach(
        _gradient,
        (ce + kl).to(acc),
        logits=z,
        target=local,
        weight=None if weight is None else w.to(acc),
        levels=levels.to(acc),
        ratios=ratios,
        denominators=torch.stack(denominators).to(acc),
        ce_weight=ce_weight,
        label_smoothing=label_smoothing,
        ignore_index=_IGNORED,
        mask_teachers=mask_teachers,
        classes=sum(sizes),
        **_of_teachers(found),
    )
    return DistillParts(loss, ce.to(acc), kl.to(acc)) if return_parts else loss
