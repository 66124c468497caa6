"""Distillation: cross-entropy and the KL divergence from up to two teachers, in one pass."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeVar

import torch
import torch.nn.functional as F

from . import arguments, contract, functions, operators

_OP = "distill"
_LEARNS_TOO = (
    "call selfkd.sd_dropout_kl(teacher, student, temperature=T, reverse_weight=0), in which both learn, or"
    " selfkd.reference.distill"
)
_ABSENT = [0.0, 4.0, 4.0, 0]  # numbers and kind of a teacher that is not there
_T = TypeVar("_T")


class DistillParts(NamedTuple):
    """What :func:`selfkd.distill` returns with ``return_parts=True``: ``loss = ce + kl``.

    Only `loss` has a gradient.
    """

    loss: torch.Tensor
    ce: torch.Tensor
    kl: torch.Tensor


class _Teacher(NamedTuple):
    logits: torch.Tensor
    weight: Any
    temperature: Any
    own_temperature: Any
    kind: str


def _each(name: str, value: _T | Sequence[_T], count: int) -> list[_T]:
    """`value` for each teacher: one for all, or a sequence of as many."""
    if not isinstance(value, (tuple, list)):
        return [value] * count  # type: ignore[list-item]
    if len(value) != count:
        raise ValueError(
            f"{_OP}: {name} has {len(value)} values, expected one, or one for each teacher ({count})"
        )
    return list(value)


def _tensors(teachers: Any) -> list[torch.Tensor | None]:
    """The teachers, None in place of one that is None."""
    if not isinstance(teachers, (list, tuple)):
        return [] if teachers is None else [teachers]
    if len(teachers) > 2:
        raise ValueError(
            f"{_OP}: teachers has {len(teachers)} tensors, expected at most 2; add a third by a second"
            " call with ce_weight=0, or average teachers' probabilities"
        )
    return list(teachers)


def _options(
    count: int,
    weights: float | Sequence[float],
    temperature: float | Sequence[float],
    own: float | Sequence[float | None] | None,
    kind: str | Sequence[str],
) -> list[tuple[Any, Any, Any, str]]:
    """Weight, temperature, its own temperature and kind of each teacher.

    Its own temperature is that of the student, or 1 for probabilities.
    """
    kinds: list[str] = (
        [kind] * count if isinstance(kind, str) else _each("teacher_kind", kind, count)
    )
    temperatures = _each("temperature", temperature, count)
    owns = [
        (t if k == "logits" else 1.0) if o is None else o
        for o, t, k in zip(
            _each("teacher_temperature", own, count), temperatures, kinds, strict=True
        )
    ]
    found = _each("teacher_weights", weights, count)
    return list(zip(found, temperatures, owns, kinds, strict=True))


def _teachers(teachers: Any, *options: Any) -> list[_Teacher | None]:
    """The arguments of each teacher, None in place of one that is None."""
    found = _tensors(teachers)
    rows = zip(found, _options(len(found), *options), strict=True)
    return [None if x is None else _Teacher(x, *row) for x, row in rows]


def given(teachers: Sequence[_Teacher | None]) -> list[_Teacher]:
    """The teachers that are there."""
    return [x for x in teachers if x]


def _check(logits: torch.Tensor, target: Any, count: int, mask_teachers: bool) -> None:
    if target is None and count == 0:
        raise ValueError(
            f"{_OP}: neither target nor teachers is given, expected at least one of them"
        )
    if target is None and mask_teachers:
        raise ValueError(f"{_OP}: mask_teachers is True, expected a target with it")
    if target is not None and target.is_floating_point() and target.shape == logits.shape:
        raise ValueError(
            f"{_OP}: target has dtype {str(target.dtype).removeprefix('torch.')}, expected int64; of "
            "one-hot rows target.argmax(dim); probabilities (mixup, class weights) are a teacher of kind "
            '"probs" at temperature 1, or add F.cross_entropy(logits, target) to the loss'
        )


def _kl_rows(logits: torch.Tensor, teacher: _Teacher) -> torch.Tensor:
    """T^2 KL(q||p) for each position."""
    given = teacher.logits.to(logits.dtype)
    if teacher.kind == "probs":
        given = given.log()
    log_q = F.log_softmax(given / teacher.own_temperature, 1)
    log_p = F.log_softmax(logits / teacher.temperature, 1)
    excluded = log_q == -torch.inf
    d = log_q.masked_fill(excluded, 0) - log_p.masked_fill(excluded, 0)
    kl: torch.Tensor = (log_q.exp() * d).sum(1)
    found: torch.Tensor = kl * teacher.temperature**2
    return found


_OF_A_TEACHER = {  # the contract's names, those of the functions, and what stands for None
    "teacher": ("teachers", None),
    "teacher_weight": ("teacher_weights", 1.0),
    "temperature": ("temperature", 4.0),
    "teacher_temperature": ("teacher_temperature", 4.0),
    "teacher_kind": ("teacher_kind", "logits"),
}


def of_contract(teacher: _Teacher) -> list[Any]:
    """Numbers and kind of a teacher, in the contract's order."""
    return [*teacher[1:4], _kind(teacher.kind)]


def _numbers(is_given: tuple[bool, ...], *options: Any) -> list[Any]:
    """Numbers and kinds of two teachers, in the contract's order."""
    rows = zip(is_given, _options(len(is_given), *options), strict=True)
    found = [[*row[:3], _kind(row[3])] if given else _ABSENT for given, row in rows]
    first, second = [*found, _ABSENT, _ABSENT][:2]
    return [*first, *second]


@functools.lru_cache(256)
def _numbers_of_types(types: tuple[Any, ...], *call: Any) -> list[Any]:
    """:func:`_numbers`, once for each call: by types, too, since True is equal to 1."""
    return _numbers(*call)


_PLAIN = {float, int, str, type(None)}  # what cannot change behind the back of a cache


@functools.lru_cache(256)
def _is_plain(types: tuple[Any, ...]) -> bool:
    """Whether options of these types, alone or in a tuple, can be remembered."""
    return all(_PLAIN.issuperset(x if isinstance(x, tuple) else (x,)) for x in types)


def _fused(
    logits: torch.Tensor, target: torch.Tensor | None, teachers: Any, *others: Any
) -> torch.Tensor | DistillParts:
    of_teachers, numbers = others[:4], others[4:7]
    mask_teachers, weight, reduction, divisor, dim, return_parts = others[7:]
    code = _reduction(reduction)
    found = _tensors(teachers)
    is_given = tuple([x is not None for x in found])
    types = tuple([tuple(map(type, x)) if type(x) is tuple else type(x) for x in of_teachers])
    if not torch.compiler.is_compiling() and _is_plain(types):
        options = _numbers_of_types(types, is_given, *of_teachers)
    else:
        options = _numbers(is_given, *of_teachers)
    _check(logits, target, sum(is_given), mask_teachers)
    z = arguments.logits_view(_OP, "logits", logits, dim)
    values: list[Any] = [z]
    values += [z, False] if target is None else [arguments.merged(target, 1), True]
    for k in (0, 1):
        x = found[k] if k < len(found) else None
        if x is None:
            values += [z, False]
            continue
        if x.requires_grad:
            arguments.without_gradient(_OP, f"teachers[{k}]", x, _LEARNS_TOO)
        values += [arguments.logits_view(_OP, f"teachers[{k}]", x, dim), True]
    values += [z if weight is None else arguments.weight_view(_OP, weight), weight is not None]
    values += [
        z if divisor is None else arguments.divisor_tensor(_OP, divisor, reduction, z),
        divisor is not None,
    ]
    values += [*numbers, *options, mask_teachers, code]
    if not return_parts:
        return _call(*values)
    loss, ce, kl, rows, ce_rows, kl_rows, *_ = _call.outputs(*values)
    if reduction == "none":
        return DistillParts(rows, ce_rows, kl_rows)
    return DistillParts(loss, ce, kl)


@functions.fused(_fused)
def distill(
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
) -> torch.Tensor | DistillParts:
    r"""Cross-entropy plus the KL divergence from up to two teachers, in one pass over the student's logits.

    .. math::
        w_{ce} \, CE(z, y) + \sum_k a_k \, T_k^2 \, KL(q_k \| p_k), \quad
        p_k = softmax(z/T_k), \; q_k = softmax(t_k/T'_k)

    Parameters
    ----------
    logits
        The student's, shape (N, C) or (N, C, ...), float16, bfloat16, float32 or float64. Any strides;
        classes contiguous and positions contiguous are both read in place.
    target
        Class of each position, int64, shape of the logits without classes; None: no cross-entropy. An
        empty mean (every position ignored) is nan, as in :func:`torch.nn.functional.cross_entropy`.
    teachers
        One tensor or up to two, each of the logits' shape and any floating dtype, on their device; they
        may be expanded. None is no teacher, also in place of one of two, whose weight, temperature and
        kind are then not looked at. They get no gradient: one that asks for it is an error.
    teacher_weights, temperature, teacher_temperature, teacher_kind
        a_k >= 0 (a teacher of weight 0 is not looked at), T_k > 0, T'_k > 0 (default: T_k, or 1 for
        probabilities), and what the tensor holds: ``"logits"``, ``"probs"`` or ``"log_probs"``
        (probabilities are renormalised: q = softmax(log p / T')). One value, or one for each teacher.
    ce_weight
        w_ce >= 0.
    label_smoothing, ignore_index
        As for :func:`torch.nn.functional.cross_entropy`.
    mask_teachers
        Leave the positions whose target is `ignore_index` out of the KL terms too.
    reduction
        ``"mean"``: each term's weighted sum over the sum of the weights of its positions; ``"sum"``;
        ``"none"``: one value for each position.
    divisor
        Denominator of ``"mean"`` in place of the sums of the weights: a positive number or a 0-d tensor,
        such as a token count over all ranks.
    return_parts
        Return :class:`~selfkd.distill.DistillParts` (loss, ce, kl), the last two for logging:
        detached, and already on the device.

    Returns
    -------
    torch.Tensor or DistillParts
        0-d (``"none"``: shape of the logits without classes), float32, or float64 for float64 logits.

    Raises
    ------
    TypeError
        A dtype or device that is not accepted.
    ValueError
        A shape or number that is not accepted; a teacher, weight, divisor or number that requires grad
        (detach it; or :func:`selfkd.reference.distill`, in which everything learns, or
        :func:`selfkd.sd_dropout_kl`, in which both sides do); more than two teachers; neither target nor
        teachers; on the CPU also a target out of range and probabilities that do not sum to 1 (within
        1 %). On CUDA a target out of range is a device assertion.

    Notes
    -----
    Sources: Hinton, Vinyals, Dean, arXiv 1503.02531; FRSKD's soft-label term, arXiv 2103.08273; PS-KD,
    arXiv 2006.12000. ``docs/losses.md`` says which call reproduces which published loss. Class weights and
    mixed targets: add ``F.cross_entropy`` to ``distill(..., ce_weight=0)``.

    Examples
    --------
    >>> loss = selfkd.distill(student(x), y, teacher(x), temperature=4.0)
    >>> loss, ce, kl = selfkd.distill(z, y, (pretrained, previous), teacher_weights=(1.0, 0.3),
    ...                               temperature=(4.0, 1.0), teacher_kind=("logits", "probs"),
    ...                               return_parts=True)
    """
    acc = arguments.accumulator(logits)
    found = given(
        _teachers(teachers, teacher_weights, temperature, teacher_temperature, teacher_kind)
    )
    _check(logits, target, len(found), mask_teachers)
    _reduction(reduction)
    logits = arguments.classes_first(_OP, "logits", logits, dim).to(acc)
    found = [
        x._replace(logits=arguments.classes_first(_OP, "teachers", x.logits, dim))
        for x in found
        if not arguments.is_zero(x.weight)
    ]
    for teacher in found:
        arguments.expect_shape(_OP, "teachers", teacher.logits, logits.shape)
    for name, x in (("target", target), ("weight", weight)):
        arguments.expect_shape(_OP, name, x, logits[:, 0].shape)
    live = torch.ones_like(logits[:, 0], dtype=torch.bool)
    if weight is not None:  # what is skipped must not reach the gradient either
        live = weight != 0
        logits = logits.masked_fill(~live.unsqueeze(1), 0)
    w = live.to(acc) if weight is None else weight.to(acc)
    valid = live if target is None else live & (target != ignore_index)
    taught = valid if mask_teachers else live

    ce_rows, kl_rows = torch.zeros_like(w), torch.zeros_like(w)
    has_ce = target is not None and not arguments.is_zero(ce_weight)
    if target is not None and has_ce:
        rows = arguments.cross_entropy(logits, target.masked_fill(~valid, 0), label_smoothing)
        ce_rows = torch.where(valid, ce_weight * w * rows, 0)
    for teacher in found:
        rows = torch.where(taught, teacher.weight * w * _kl_rows(logits, teacher), 0)
        kl_rows = kl_rows + rows
    if reduction == "none":
        ce, kl = ce_rows, kl_rows
    else:
        ce = arguments.reduce_rows(ce_rows, w * valid, reduction, divisor)
        kl = arguments.reduce_rows(kl_rows, w * taught, reduction, divisor)
        if not has_ce:
            ce = ce_rows.sum()
        if not found:
            kl = kl_rows.sum()
    loss = ce + kl
    return DistillParts(loss, ce.detach(), kl.detach()) if return_parts else loss


reference = functions.reference(distill)


def by_contract(function: Callable[..., Any], **named: Any) -> Any:
    """Call :func:`distill` or its reference with the arguments of the contract."""
    columns: dict[str, list[Any]] = {public: [] for public, _ in _OF_A_TEACHER.values()}
    for prefix in ("", "second_"):
        values = [named.pop(prefix + name, None) for name in _OF_A_TEACHER]
        if values[0] is None:
            continue
        for value, (public, default) in zip(values, _OF_A_TEACHER.values(), strict=True):
            columns[public].append(default if value is None else value)
    return function(**named, **columns)


_NAMES = {
    prefix + name: public + index
    for prefix, index in (("", ""), ("second_", "[1]"))
    for name, (public, _) in _OF_A_TEACHER.items()
} | {"teacher": "teachers[0]"}
_call = operators.register(_OP, lambda **named: by_contract(reference, **named), _NAMES)
_reduction = contract.Choice(_OP, "reduction")
_kind = contract.Choice(_OP, "teacher_kind")
