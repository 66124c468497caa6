"""What the adapters share: KL and attention in which whoever asks for a gradient gets one, and the checks.

A toolkit's own lines give a gradient to all that asks for one. Here a teacher that asks for none takes the
fused path, in which it is a constant; one that asks takes the operator with two sides; a number that asks
(a learned temperature) takes :mod:`selfkd.reference`.

The fused operators refuse what is wrong in the words of their own arguments; :func:`explained` then finds the
sentence in those of the adapter, so that a right call pays for no looking. Plain PyTorch would take some of
what is wrong: there the checks come first.
"""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

import torch
import torch.nn.functional as F

from .. import arguments
from ..attention import attention
from ..attention import reference as attention_reference
from ..distill import distill
from ..js_divergence import js_divergence
from ..js_divergence import reference as js_reference
from ..sd_dropout_kl import reference as kl_reference
from ..sd_dropout_kl import sd_dropout_kl
from ..topk_divergence import reference as topk_reference
from ..topk_divergence import topk_divergence

_P = ParamSpec("_P")
_R = TypeVar("_R")
Names = tuple[str, str]  # what sentences call the student's and the teacher's tensor

_RAISES = """Raises
------
TypeError, ValueError
    An argument is not what it must be: it is no tensor, holds none, or does not go with the others.
"""
REDUCTIONS = ("batchmean", "sum", "mean", "none")  # those of F.kl_div


def check_reduction(op: str, reduction: Any) -> None:
    """Raise ValueError for a reduction that :func:`torch.nn.functional.kl_div` does not have."""
    if reduction not in REDUCTIONS:
        raise ValueError(
            f"{op}: reduction is {arguments.described(reduction)},"
            ' expected "batchmean", "sum", "mean" or "none"'
        )


def from_kl_div(reduction: str, logits: torch.Tensor) -> tuple[str, float]:
    """The reduction of selfkd, and the factor that makes it that of F.kl_div, for logits (N, C, ...).

    ``"batchmean"`` divides the sum by N, ``"mean"`` by the number of logits; selfkd's mean divides
    it by the number of positions.
    """
    if reduction == "sum":
        return "sum", 1.0
    factor = (
        math.prod(logits.shape[2:]) if reduction == "batchmean" else 1 / max(logits.shape[1], 1)
    )
    return "mean", factor


def number(op: str, name: str, value: Any, rule: str = "", *, optional: bool = False) -> Any:
    """`value` as a Python number within its rule; a tensor of one element that requires grad as it is.

    So is None where it is `optional`.

    Raises
    ------
    TypeError
        It is no number.
    ValueError
        It is outside the rule, or has more elements than one.
    """
    if value is None and optional:
        return None
    if isinstance(value, torch.Tensor) and value.requires_grad:
        if value.numel() != 1:
            raise ValueError(f"{op}: {name} has shape {tuple(value.shape)}, expected a number")
        return value
    if rule:
        return arguments.in_range(op, name, value, rule)
    return arguments.number(op, name, value)


def check_tensor(op: str, name: str, x: Any, least: int) -> None:
    """Raise the sentence for what is no floating tensor of at least so many dimensions."""
    arguments.tensor(op, name, x)
    if not x.is_floating_point():
        dtype = str(x.dtype).removeprefix("torch.")
        raise TypeError(
            f"{op}: {name} has dtype {dtype}, expected a floating dtype ({name}.float())"
        )
    if x.ndim < least:
        plural = "" if x.ndim == 1 else "s"
        raise ValueError(f"{op}: {name} has {x.ndim} dimension{plural}, expected at least {least}")


def check_pair(op: str, names: Names, student: Any, teacher: Any, least: int = 2) -> None:
    """:func:`check_tensor` for both; and they must be on one device."""
    check_tensor(op, names[0], student, least)
    check_tensor(op, names[1], teacher, least)
    if teacher.device != student.device:
        raise TypeError(
            f"{op}: {names[1]} is on {teacher.device}, expected {student.device} like {names[0]}"
        )


def check_logits(op: str, names: Names, student: Any, teacher: Any, least: int = 2) -> None:
    """:func:`check_pair`; and they must have one shape."""
    check_pair(op, names, student, teacher, least)
    if teacher.shape != student.shape:
        raise ValueError(
            f"{op}: {names[1]} has shape {tuple(teacher.shape)}, expected {tuple(student.shape)} like"
            f" {names[0]}"
        )


def check_maps(op: str, names: Names, student: Any, teacher: Any, pool: str = "") -> None:
    """:func:`check_pair` for features (N, C, ...); and they must have as many samples and positions.

    `pool` says what brings positions together.
    """
    check_pair(op, names, student, teacher, 3)
    (n, s), (m, t) = ((len(x), math.prod(x.shape[2:])) for x in (student, teacher))
    if (n, s) != (m, t):
        raise ValueError(
            f"{op}: {names[1]} has {m} samples of {t} positions, expected {n} of {s} like {names[0]}{pool}"
        )


def standardized(logits: torch.Tensor, eps: float) -> torch.Tensor:
    """Each row less its mean, over its standard deviation + eps (arXiv 2403.01427)."""
    return (logits - logits.mean(-1, keepdim=True)) / (eps + logits.std(-1, keepdim=True))


def explained(check: Callable[_P, Any]) -> Callable[[Callable[_P, _R]], Callable[_P, _R]]:
    """Decorator: where the function fails, `check` of its arguments raises the sentence, if it has one.

    A docstring that says nothing of errors gets a section about them.
    """

    def decorate(function: Callable[_P, _R]) -> Callable[_P, _R]:
        @functools.wraps(function)
        def call(*args: _P.args, **named: _P.kwargs) -> _R:
            try:
                return function(*args, **named)
            except Exception:
                try:
                    check(*args, **named)
                except (TypeError, ValueError) as mistake:
                    raise mistake from None
                raise

        if "Raises\n" not in (doc := inspect.getdoc(function) or ""):
            call.__doc__ = f"{doc}\n\n{_RAISES}"
        return call

    return decorate


def of_one_dtype(student: torch.Tensor, teacher: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Both in the wider of their dtypes; what no logits are is refused."""
    if teacher.dtype == student.dtype:
        return student, teacher
    check_logits("of_one_dtype", ("student", "teacher"), student, teacher)
    dtype = torch.promote_types(student.dtype, teacher.dtype)
    return student.to(dtype), teacher.to(dtype)


def kl(
    student: torch.Tensor,
    teacher: torch.Tensor,
    *,
    temperature: Any,
    weight: Any = 1.0,
    reduction: str = "mean",
    dim: int = 1,
) -> torch.Tensor:
    """weight T^2 KL(softmax(teacher/T) || softmax(student/T)), reduced as :func:`selfkd.distill` does.

    `weight` and `temperature` may be tensors, which learn where they ask to, and the weight be negative, as
    where a generator is trained to make two networks differ.
    """
    if isinstance(weight, torch.Tensor) or weight < 0:
        of_one = kl(student, teacher, temperature=temperature, reduction=reduction, dim=dim)
        weighted: torch.Tensor = weight * of_one
        return weighted
    learned = arguments.wants_gradient(temperature)
    if not learned and type(temperature) is not float:
        temperature = arguments.number("kl", "temperature", temperature)
    one_sided = isinstance(teacher, torch.Tensor) and not arguments.wants_gradient(teacher)
    if one_sided and not learned:
        loss: torch.Tensor = distill(  # type: ignore[assignment]
            student,
            teachers=teacher,
            teacher_weights=weight,
            temperature=temperature,
            reduction=reduction,
            dim=dim,
        )
        return loss
    check_logits("kl", ("student", "teacher"), student, teacher)
    student, teacher = of_one_dtype(student, teacher)
    two_sided = kl_reference if learned else sd_dropout_kl
    return two_sided(
        teacher,
        student,
        temperature=temperature,
        forward_weight=weight,
        reverse_weight=0.0,
        reduction=reduction,
        dim=dim,
    )


def js(
    student: torch.Tensor, teacher: torch.Tensor, *, temperature: Any = 1.0, **options: Any
) -> torch.Tensor:
    """:func:`selfkd.js_divergence`, in which a temperature that asks for a gradient gets one."""
    learned = arguments.wants_gradient(temperature)
    divergence = js_reference if learned else js_divergence
    return divergence(*of_one_dtype(student, teacher), temperature=temperature, **options)


def top_k(
    student: torch.Tensor,
    teacher: torch.Tensor,
    k: int,
    *,
    of_student: bool = False,
    temperature: float = 1.0,
    teacher_temperature: float | None = None,
    dim: int = 1,
    **options: Any,
) -> torch.Tensor:
    """:func:`selfkd.topk_divergence` over the k likeliest classes of the teacher, or of the student.

    Both are logits. A teacher that asks for a gradient gets one.
    """
    if (teacher.dtype, teacher.shape) != (student.dtype, student.shape):
        check_logits("top_k", ("student", "teacher"), student, teacher)
    indices = (student if of_student else teacher).detach().topk(k, dim=dim).indices
    accumulator = arguments.accumulator(student)
    own = temperature if teacher_temperature is None else teacher_temperature
    whole = None
    if options.get("tail") != "renormalize":  # which reads the k classes alone
        wide = teacher.to(accumulator)
        whole = (wide if own == 1 else wide / own).logsumexp(dim)
    learns = arguments.wants_gradient(teacher)
    return (topk_reference if learns else topk_divergence)(
        student,
        indices,
        teacher.gather(dim, indices).to(accumulator),
        teacher_logsumexp=whole,
        temperature=temperature,
        teacher_temperature=own,
        dim=dim,
        **options,
    )


def kl_of_each_logit(
    student: torch.Tensor, teacher: torch.Tensor, temperature: Any
) -> torch.Tensor:
    """What F.kl_div returns with reduction "none", a value for each logit, which no row fuses.

    Its gradient to the teacher is finite where a probability underflows.
    """
    log_p, log_q = F.log_softmax(student / temperature, 1), F.log_softmax(teacher / temperature, 1)
    return log_q.exp() * (log_q - log_p).masked_fill(log_q == -torch.inf, 0)


def at(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    """:func:`selfkd.attention`, in which a teacher that asks for a gradient gets one."""
    if arguments.wants_gradient(teacher):
        check_maps("at", ("student", "teacher"), student, teacher)
        return attention_reference(student, teacher)
    return attention(student, teacher)


def distances(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    """The sum over the batch of the distance of two maps (arXiv 1612.03928, equation 2)."""
    q, p = (F.normalize(x.pow(2).sum(1).flatten(1)) for x in (student, teacher))
    distances: torch.Tensor = torch.linalg.vector_norm(q - p, dim=1).sum()
    return distances
