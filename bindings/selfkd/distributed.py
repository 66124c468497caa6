"""Losses of logits whose classes are sharded over a process group (vocabulary parallelism).

Each rank runs the ordinary operator on its shard, as if that were all classes, and the ranks exchange
what it saves for backward: a few float64 numbers for each row, in one all-gather. By the chain rule,

    KL(p||q) = KL(P||Q) + sum over shards r of P_r KL(p_r||q_r)

with P_r = exp(lse_r - lse) the mass of shard r and p_r the distribution within it. KL(P||Q) is the same
operator once more, on the shards' log-sum-exps. No term is negative and rows that agree give exactly
0, as without shards. Backward communicates nothing: the ordinary backward operator, given the
log-sum-exps of whole rows, leaves the gradient of the shard.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from . import arguments, contract, operators
from .distill import DistillParts, _check, _kind, _reduction, _Teacher, _teachers
from .distill import _call as _distill
from .sd_dropout_kl import _call as _sd_dropout_kl

__all__ = ["vocab_parallel_distill", "vocab_parallel_sd_dropout_kl"]

_IGNORED = -100
_FORM = 2 + contract.MAX_RANK  # of a message of _sizes: classes, dtype, the shape without classes

_sd_dropout_kl_values = operators.in_order(contract.contract("sd_dropout_kl"))
_distill_values = operators.in_order(contract.contract("distill"))


# ---- what the ranks exchange ----


def _gather(x: torch.Tensor, group: dist.ProcessGroup | None) -> torch.Tensor:
    """`x` of every rank, along a new first dimension."""
    found = [torch.empty_like(x) for _ in range(dist.get_world_size(group))]
    dist.all_gather(found, x, group=group)
    return torch.stack(found)


def _sizes(
    op: str,
    name: str,
    x: torch.Tensor,
    sizes: Sequence[int] | None,
    group: dist.ProcessGroup | None,
) -> list[int]:
    """The number of classes of each rank: as given, or exchanged and the shards' forms compared."""
    ranks, rank = dist.get_world_size(group), dist.get_rank(group)
    if sizes is not None:
        if len(sizes) != ranks:
            raise ValueError(
                f"{op}: sizes has {len(sizes)} values, expected one for each rank ({ranks})"
            )
        if sizes[rank] != x.shape[1]:
            raise ValueError(
                f"{op}: {name} has size {x.shape[1]} in dimension C, expected {sizes[rank]} as sizes says of "
                f"rank {rank}"
            )
        return list(sizes)
    dtypes = [torch.float16, torch.bfloat16, torch.float32, torch.float64, x.dtype]
    rows = [*x.shape[:1], *x.shape[2:]]
    message = [x.shape[1], dtypes.index(x.dtype), *rows]
    message += [-1] * (_FORM - len(message))
    forms = _gather(torch.tensor(message, device=x.device), group).tolist()
    for other, (_, code, *shape) in enumerate(forms):
        if code != forms[0][1]:
            mine, first = (str(dtypes[k]).removeprefix("torch.") for k in (code, forms[0][1]))
            raise TypeError(
                f"{op}: {name} has dtype {mine} on rank {other}, expected {first} like rank 0"
            )
        if shape != forms[0][2:]:
            mine, first = (str(tuple(k for k in x if k >= 0)) for x in (shape, forms[0][2:]))
            raise ValueError(
                f"{op}: {name} has rows of shape {mine} on rank {other}, expected {first} like rank 0"
            )
    return [form[0] for form in forms]


class _Pair(NamedTuple):
    """What is known of two distributions p, q of each row: by shard (along dimension 0), or of the whole.

    lse and ratio as the operators save them: log-sum-exp of p, and how much larger it is than that of q.
    """

    lse: torch.Tensor
    ratio: torch.Tensor
    forward: torch.Tensor
    reverse: torch.Tensor


def _within(mass: torch.Tensor, kl: torch.Tensor, both: torch.Tensor) -> torch.Tensor:
    """The sum of mass * KL over the shards; what only one side has is a matter of the masses."""
    inside = torch.where(
        kl == torch.inf, kl, mass * kl
    )  # an excluded class counts, whatever its mass
    return torch.where(both, inside, 0).sum(0)


def _whole(shards: _Pair) -> _Pair:
    """Both KL divergences of whole rows, and what their gradients need, by the chain rule."""
    nothing = shards.lse == -torch.inf  # the operators then save the lse of q in place of the ratio
    lse_q = torch.where(nothing, shards.ratio, shards.lse - shards.ratio)
    both = shards.ratio.isfinite() & ~nothing
    # The shards' lse are logits of the masses. They are taken relative to those of one shard, the
    # largest, so that ratios that agree stay so to the last bit.
    largest = shards.lse.argmax(0, keepdim=True)
    top, ratio = shards.lse.gather(0, largest), shards.ratio.gather(0, largest)
    usual = both.gather(0, largest)
    top_q = torch.where(usual, top - ratio, lse_q.amax(0, keepdim=True))
    p = shards.lse - top
    q = torch.where(both & usual, p - (shards.ratio - ratio), lse_q - top_q)
    values = _sd_dropout_kl_values(
        u=p.movedim(0, 1), v=q.movedim(0, 1), temperature=1.0, reduction=0
    )
    _, _, saved, _ = _sd_dropout_kl.outputs(*values)
    lse, gap, forward, reverse = saved.unbind()
    return _Pair(
        lse + top[0],
        gap + torch.where(usual, ratio, top - top_q)[0],
        forward + _within((p - lse).exp(), shards.forward, both),
        reverse + _within((q - (lse - gap)).exp(), shards.reverse, both),
    )


# ---- results ----


def _gradient(op: str) -> type[torch.autograd.Function]:
    """The autograd.Function of a result found without autograd, which the operator differentiates."""
    run = getattr(torch.ops.selfkd, op).default
    values = operators.in_order(contract.contract(op))
    live = len(contract.contract(op).outputs)

    class Gradient(torch.autograd.Function):
        @staticmethod
        def forward(
            ctx: Any,
            result: torch.Tensor,
            numbers: dict[str, Any],
            names: tuple[str, ...],
            *tensors: torch.Tensor,
        ) -> torch.Tensor:
            """The tensors' names and the numbers are those of the operator; the first `live` learn."""
            ctx.numbers, ctx.names = numbers, names
            ctx.save_for_backward(*tensors)
            return result.clone()

        @staticmethod
        def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
            if torch.is_grad_enabled():
                raise RuntimeError(
                    f"selfkd: {op} of a shard has no derivative; use selfkd.reference on all classes"
                )
            named = dict(zip(ctx.names, ctx.saved_tensors, strict=True))
            found = run(grad.contiguous(), *values(**named, **ctx.numbers))
            grads = found if isinstance(found, tuple) else (found,)
            return (None, None, None, *grads, *[None] * (len(ctx.names) - live))

    return type(op, (Gradient,), {})  # a backward node is named after its class


_sd_dropout_kl_gradient = _gradient("sd_dropout_kl_backward")
_distill_gradient = _gradient("distill_backward")


def _attach(
    gradient: type[torch.autograd.Function], result: torch.Tensor, **named: Any
) -> torch.Tensor:
    """The result with that gradient; `named` are the operator's arguments, those absent None."""
    tensors = {name: x for name, x in named.items() if isinstance(x, torch.Tensor)}
    numbers = {name: x for name, x in named.items() if x is not None and name not in tensors}
    return gradient.apply(result, numbers, tuple(tensors), *tensors.values())  # type: ignore[no-any-return, no-untyped-call]


def _denominator(
    weights: torch.Tensor, reduction: str, divisor: torch.Tensor | None
) -> torch.Tensor:
    if reduction != "mean":
        return weights.new_ones(())
    return weights.sum() if divisor is None else divisor.double()


def _weights(op: str, like: torch.Tensor, weight: torch.Tensor | None) -> torch.Tensor:
    """The weight of each row, in float64."""
    if weight is None:
        return torch.ones_like(like[:, 0], dtype=torch.float64)
    arguments.without_gradient(op, "weight", weight)
    accumulator = torch.float64 if like.dtype == torch.float64 else torch.float32
    if weight.dtype not in (accumulator, torch.bool):
        found, expected = (str(x).removeprefix("torch.") for x in (weight.dtype, accumulator))
        raise TypeError(f"{op}: weight has dtype {found}, expected {expected} or bool")
    return weight.double()


def vocab_parallel_sd_dropout_kl(
    u: torch.Tensor,
    v: torch.Tensor,
    *,
    temperature: float = 3.0,
    forward_weight: float = 1.0,
    reverse_weight: float = 1.0,
    detach_target: bool = False,
    weight: torch.Tensor | None = None,
    reduction: str = "mean",
    divisor: float | torch.Tensor | None = None,
    dim: int = 1,
    sizes: Sequence[int] | None = None,
    group: dist.ProcessGroup | None = None,
) -> torch.Tensor:
    """:func:`selfkd.sd_dropout_kl` of logits whose classes are sharded over the ranks of a group.

    Every rank calls it with its shard, and gets the loss of whole rows and the gradients of its shard.
    The ranks exchange 32 bytes a row in one all-gather; backward exchanges nothing.

    Parameters
    ----------
    u, v
        The rank's classes of both samples, shape (N, C_r) or (N, C_r, ...). Rows are the same on all
        ranks, C_r may differ, and be 1.
    sizes
        C_r of each rank, as numbers. None: they are exchanged, with dtype and shape of the shards, which
        are compared; on CUDA this waits for the device, and ``torch.compile(fullgraph=True)`` needs them.
    group
        The process group; None: the default one.
    temperature, forward_weight, reverse_weight, detach_target, weight, reduction, divisor, dim
        As for :func:`selfkd.sd_dropout_kl`, the same on all ranks.

    Returns
    -------
    torch.Tensor
        As :func:`selfkd.sd_dropout_kl`, the same bits on all ranks.

    Raises
    ------
    TypeError, ValueError
        As :func:`selfkd.sd_dropout_kl`; shards of different dtypes or rows; `sizes` that do not fit.

    Notes
    -----
    A second derivative (``create_graph=True``) is refused.
    """
    op = "vocab_parallel_sd_dropout_kl"
    u, v = arguments.same_dtype(u, v)
    u, v = arguments.logits_view(op, "u", u, dim), arguments.logits_view(op, "v", v, dim)
    _reduction(reduction)
    _sizes(op, "u", u, sizes, group)
    with torch.no_grad():
        w = _weights(op, u, weight)
        mask = None if weight is None else w != 0
        divided = None if divisor is None else arguments.divisor_tensor(op, divisor, reduction, u)
        numbers = {"temperature": temperature, "forward_weight": forward_weight}
        numbers |= {"reverse_weight": reverse_weight, "detach_target": detach_target}
        values = _sd_dropout_kl_values(u=u, v=v, weight=mask, reduction=0, **numbers)
        _, rows, saved, _ = _sd_dropout_kl.outputs(*values)
        whole = _whole(_Pair(*_gather(saved, group).unbind(1)))
        l = torch.zeros_like(w)
        for factor, kl in ((forward_weight, whole.forward), (reverse_weight, whole.reverse)):
            if factor != 0:
                l = l + factor * kl
        l = torch.where(w != 0, temperature**2 * w * l, 0)
        denominator = _denominator(w, reduction, divided)
        result = (l if reduction == "none" else l.sum() / denominator).to(rows.dtype)
    return _attach(
        _sd_dropout_kl_gradient,
        result,
        u=u,
        v=v,
        weight=None if weight is None else w.to(rows.dtype),
        saved=torch.stack(whole),
        denominator=denominator.to(rows.dtype),
        **numbers,
    )


# ---- distillation ----


class _Shards(NamedTuple):
    """What is known of each row, by rank along dimension 0."""

    top: torch.Tensor  # the largest logit
    level: torch.Tensor  # log sum exp(z - top)
    above: torch.Tensor  # the mean of top - z
    of_target: torch.Tensor  # the logit of the target, 0 elsewhere
    found: torch.Tensor  # whether the target is here
    pairs: list[_Pair]  # of each teacher: student and teacher at its temperatures


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
        found = _distill.outputs(*_distill_values(**named))
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
        pairs.append(_Pair(lse, ratio, torch.zeros_like(kl), kl))
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


def _of_teachers(teachers: Sequence[_Teacher], logits: Sequence[torch.Tensor]) -> dict[str, Any]:
    """The contract's arguments of each teacher."""
    named: dict[str, Any] = {}
    for prefix, teacher, x in zip(("", "second_"), teachers, logits, strict=False):
        named |= {f"{prefix}teacher": x, f"{prefix}teacher_weight": teacher.weight}
        named |= {f"{prefix}temperature": teacher.temperature}
        named |= {f"{prefix}teacher_temperature": teacher.own_temperature}
        named |= {f"{prefix}teacher_kind": _kind(teacher.kind)}
    return named


def vocab_parallel_distill(
    logits: torch.Tensor,
    target: torch.Tensor | None = None,
    teachers: torch.Tensor | Sequence[torch.Tensor] = (),
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
    given = _teachers(teachers, teacher_weights, temperature, teacher_temperature, teacher_kind)
    _check(logits, target, len(given), mask_teachers)
    _reduction(reduction)
    for name, value in (("ce_weight", ce_weight), *(("teacher_weights", x.weight) for x in given)):
        contract.number_rule(op, name, value, "NONNEGATIVE")
    contract.number_rule(op, "label_smoothing", label_smoothing, "FRACTION")
    z = arguments.logits_view(op, "logits", logits, dim)
    found = [
        x._replace(logits=arguments.logits_view(op, f"teachers[{k}]", x.logits.detach(), dim))
        for k, x in enumerate(given)
        if x.weight != 0
    ]
    sizes = _sizes(op, "logits", z, sizes, group)
    has_ce = target is not None and ce_weight != 0
    with torch.no_grad():
        w = _weights(op, z, weight)
        acc = torch.float64 if z.dtype == torch.float64 else torch.float32
        divided = None if divisor is None else arguments.divisor_tensor(op, divisor, reduction, z)
        local, valid = None, w != 0
        if target is not None:
            local = _local_target(op, target, ignore_index, sizes, dist.get_rank(group))
            valid = valid & (local != _IGNORED)
        taught = valid if mask_teachers else w != 0
        mask = None if weight is None else w != 0
        parts = _measure(z.detach(), mask, local if has_ce else None, label_smoothing != 0, found)
        shards = _shards(_gather(parts, group), has_ce, found)
        wholes = [_whole(pair) for pair in shards.pairs]
        top, zeros = shards.top.amax(0), torch.zeros_like(w)
        level, ce_rows, kl_rows = zeros, zeros, zeros
        if has_ce:
            level, ce_rows = _cross_entropy(shards, sizes, label_smoothing)
            ce_rows = torch.where(valid, ce_weight * w * ce_rows, 0)
        for teacher, whole in zip(found, wholes, strict=True):
            rows = teacher.weight * teacher.temperature**2 * w * whole.reverse
            kl_rows = kl_rows + torch.where(taught, rows, 0)
        denominators = [
            _denominator(torch.where(x, w, 0), reduction, divided) for x in (valid, taught)
        ]
        ce, kl = ce_rows, kl_rows
        if reduction != "none":
            ce = ce_rows.sum() / denominators[0] if has_ce else ce_rows.sum()
            kl = kl_rows.sum() / denominators[1] if found else kl_rows.sum()
        levels = [top, level]
        levels += [x.lse - top / k.temperature for k, x in zip(found, wholes, strict=True)]
        ratios = [x.ratio for x in wholes]
    loss = _attach(
        _distill_gradient,
        (ce + kl).to(acc),
        logits=z,
        target=local,
        weight=None if weight is None else w.to(acc),
        levels=torch.stack((levels + [zeros] * 2)[:4]).to(acc),
        ratios=torch.stack((ratios + [zeros] * 2)[:2]),
        denominators=torch.stack(denominators).to(acc),
        ce_weight=ce_weight,
        label_smoothing=label_smoothing,
        ignore_index=_IGNORED,
        mask_teachers=mask_teachers,
        classes=sum(sizes),
        **_of_teachers(found, [x.logits for x in found]),
    )
    return DistillParts(loss, ce.to(acc), kl.to(acc)) if return_parts else loss
