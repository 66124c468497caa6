"""The divergence from a mixture, of sharded classes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist

from .. import arguments, contract, functions, kernels
from ..js_divergence import js_divergence, numbers_of
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

_CLASSES = 2**20  # of all rows, at a time in float64
_LEAST = 1e-20  # a mass of classes below which float32 may hold none of their probabilities

_call = functions.operator(js_divergence)
_reduction, _kind = (contract.Choice("js_divergence", name) for name in ("reduction", "kind"))
_values = kernels.in_order(contract.contract("js_divergence"))
_slopes = kernels.in_order(contract.contract("js_divergence_backward"))
_run = kernels.kernel("js_divergence_backward")
_gradient = gradient("js_divergence_backward")


def _weighted_slopes(
    dtype: torch.dtype, logits: Sequence[torch.Tensor], sums: torch.Tensor, **numbers: Any
) -> torch.Tensor:
    """Sums of p (slope_p - A) and q (slope_q - B) over the classes, (N, 2, S); A, B as in sums, (N, 4, S)."""
    student, teacher = (x.to(dtype) for x in logits)
    saved, ones = sums.movedim(1, 0), torch.ones_like(student[:, 0])
    named = {"student": student, "teacher": teacher, "saved": saved}
    grads = _run(ones, *_slopes(**named, denominator=ones.new_ones(()), **numbers))
    factors = numbers["temperature"], numbers["teacher_temperature"]
    found = [t * x.sum(1, dtype=torch.float64) for t, x in zip(factors, grads, strict=True)]
    return torch.stack(found, 1)


def _infinite(
    student: torch.Tensor, teacher: torch.Tensor, numbers: Mapping[str, Any]
) -> torch.Tensor | float:
    """What is added to the loss: infinity where it is a KL divergence and has a class that M lacks, or 0."""
    ends = {0: (teacher, student, "teacher_weight"), 1: (student, teacher, "student_weight")}
    if numbers["kind"] != _kind("js") or numbers["beta"] not in ends:
        return 0
    of, mixture, weight = ends[numbers["beta"]]
    lacks = ((of != -torch.inf) & (mixture == -torch.inf)).any(1, keepdim=True)
    return torch.where(lacks, torch.inf, 0.0) if numbers[weight] != 0 else 0


def _share(
    student: torch.Tensor, teacher: torch.Tensor, whole: torch.Tensor, **numbers: Any
) -> torch.Tensor:
    """The classes' share of the loss, of A and of B, (N, 3, S), of logits (N, C_r, S).

    `whole`, (N, 4, S), are lse and dl of whole rows, and what of p and q is in these classes. A term of the
    loss is of first order in (p, q): phi = p slope_p + q slope_q. In rows that nearly agree its parts
    cancel to their squares, so they are summed in float64. A and B are to be those of the slopes that
    backward finds, to the last bit: what these differ by from a mean is summed in their own arithmetic.
    """
    of, (sums, masses) = (student, teacher), whole.chunk(2, 1)
    first = _weighted_slopes(
        torch.float64, of, torch.cat([sums, torch.zeros_like(sums)], 1), **numbers
    )
    means = torch.where(masses > _LEAST, first / masses, 0)
    own = arguments.accumulator(student)
    more = _weighted_slopes(own, of, torch.cat([sums, means], 1), **numbers)
    loss = first.sum(1, keepdim=True) + _infinite(student, teacher, numbers)
    return torch.cat([loss, means * masses + more], 1)


def _shares(
    student: torch.Tensor, teacher: torch.Tensor, whole: torch.Tensor, **numbers: Any
) -> torch.Tensor:
    """:func:`_share` of logits (N, C_r, ...) and `whole` (4, N, ...): (3, N, ...)."""
    of_all = [x.unsqueeze(-1).flatten(2) for x in (student, teacher, whole.movedim(0, 1))]
    _, classes, positions = of_all[0].shape
    rows, few = (max(1, _CLASSES // max(1, x)) for x in (classes * positions, classes))
    found = []
    for of_rows in zip(*(torch.split(x, rows) for x in of_all), strict=True):
        at = zip(*(torch.split(x, few, 2) for x in of_rows), strict=True)
        found.append(torch.cat([_share(*x, **numbers) for x in at], 2))
    return torch.cat(found).movedim(1, 0).reshape(3, *whole.shape[1:])


@arguments.public("vocab_parallel_js_divergence")
def vocab_parallel_js_divergence(
    student: torch.Tensor,
    teacher: torch.Tensor,
    *,
    beta: float = 0.5,
    teacher_weight: float | None = None,
    student_weight: float | None = None,
    temperature: float = 1.0,
    teacher_temperature: float | None = None,
    kind: str = "js",
    weight: torch.Tensor | None = None,
    reduction: str = "mean",
    divisor: float | torch.Tensor | None = None,
    dim: int = 1,
    sizes: Sequence[int] | None = None,
    group: dist.ProcessGroup | None = None,
) -> torch.Tensor:
    """:func:`selfkd.js_divergence` of logits whose classes are sharded over the ranks of a group.

    Every rank calls it with its shard, and gets the loss of whole rows and the gradients of its shard.
    The mixture is one of classes, so that a shard needs the log-sum-exps of whole rows before it has a
    loss: the ranks exchange 16 bytes a row in one all-gather, and 24 in a second; backward exchanges nothing.

    Parameters
    ----------
    student, teacher
        The rank's classes of both sides, shape (N, C_r) or (N, C_r, ...). Rows are the same on all ranks,
        C_r may differ, and be 1. A side that requires no gradient costs none in backward.
    sizes, group
        As for :func:`vocab_parallel_sd_dropout_kl`.
    others
        As for :func:`selfkd.js_divergence`, the same on all ranks.

    Returns
    -------
    torch.Tensor
        As :func:`selfkd.js_divergence`, the same bits on all ranks.

    Raises
    ------
    TypeError, ValueError
        As :func:`selfkd.js_divergence`; shards of different dtypes or rows; `sizes` that do not fit.

    Notes
    -----
    A second derivative (``create_graph=True``) is refused. Forward visits the classes twice more than
    without shards, once of them in float64, a million classes at a time.
    """
    op = "vocab_parallel_js_divergence"
    student, teacher = arguments.same_dtype(student, teacher)
    z = arguments.logits_view(op, "student", student, dim)
    t = arguments.logits_view(op, "teacher", teacher, dim)
    _reduction(reduction)
    sizes_of_ranks(op, "student", z, sizes, group)
    w = weights_of(op, z, weight)
    mask = None if weight is None else w != 0
    divided = None if divisor is None else arguments.divisor_tensor(op, divisor, reduction, z)
    given = numbers_of(beta, teacher_weight, student_weight, temperature, teacher_temperature)
    names = ("beta", "teacher_weight", "student_weight", "temperature", "teacher_temperature")
    numbers = {name: arguments.number(op, name, x) for name, x in zip(names, given, strict=True)}
    numbers["kind"] = _kind(kind)
    with torch.no_grad():
        values = _values(student=z, teacher=t, weight=mask, reduction=0, **numbers)
        _, rows, saved, _ = _call.outputs(*values)
        none = torch.zeros_like(saved[0])
        here = Pair(saved[0], saved[1], none, none)
        lse, ratio = gather(saved[:2], group).unbind(1)
        whole = whole_of(Pair(lse, ratio, torch.zeros_like(lse), torch.zeros_like(lse)))
        masses = [(here.lse - whole.lse).exp(), (here.lse_q - whole.lse_q).exp()]
        shares = _shares(z, t, torch.stack([*whole[:2], *masses]), **numbers)
        l, *slopes = gather(shares, group).sum(0)
        l = torch.where(w != 0, w * l, 0)
        denominator = denominator_of(w, reduction, divided)
        result = (l if reduction == "none" else l.sum() / denominator).to(rows.dtype)
    return attach(
        _gradient,
        result,
        student=z,
        teacher=t,
        weight=None if weight is None else w.to(rows.dtype),
        saved=torch.stack([*whole[:2], *slopes]),
        denominator=denominator.to(rows.dtype),
        needs_student=arguments.wants_gradient(z),
        needs_teacher=arguments.wants_gradient(t),
        **numbers,
    )
