"""SimReg: regression of a teacher's features, row by row."""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F

from . import arguments, contract, operators

_OP = "simreg"


def _check(student: torch.Tensor, normalize: bool, dim: int) -> None:
    """A row of one feature has no direction."""
    if normalize and student.ndim > 1 and student.shape[1] == 1:
        raise ValueError(
            f"{_OP}: student has size 1 in dimension C, expected at least 2 with normalize=True; "
            f"dim={dim} is not the features' dimension, or there is one feature: normalize=False"
        )


@arguments.public(_OP, learns=True)
def reference(
    student: torch.Tensor,
    target: torch.Tensor,
    *,
    normalize: bool = True,
    weight: torch.Tensor | None = None,
    reduction: str = "mean",
    divisor: float | torch.Tensor | None = None,
    dim: int = 1,
) -> torch.Tensor:
    """:func:`selfkd.simreg` in plain PyTorch, differentiable any number of times.

    Same arguments and results; arithmetic in float32, or float64 for float64 features.
    """
    acc = torch.float64 if student.dtype == torch.float64 else torch.float32
    _reduction(reduction)
    student = arguments.classes_first(_OP, "student", student, dim).to(acc)
    target = arguments.classes_first(_OP, "target", target, dim).to(acc)
    _check(student, normalize, dim)
    arguments.expect_shape(_OP, "target", target, student.shape)
    arguments.expect_shape(_OP, "weight", weight, student[:, 0].shape)
    if weight is not None:  # what is skipped must not reach the gradient either
        skipped = (weight == 0).unsqueeze(1)
        student, target = student.masked_fill(skipped, 1), target.masked_fill(skipped, 1)
    if normalize:
        student, target = F.normalize(student, dim=1), F.normalize(target, dim=1)
    rows = (student - target).square().sum(1)
    if weight is not None:
        rows = weight.to(acc) * rows
    return arguments.reduce_rows(rows, weight, reduction, divisor)


_call = operators.register(_OP, functools.partial(reference, dim=1))
_reduction = contract.Choice(_OP, "reduction")


@arguments.public(_OP)
def simreg(
    student: torch.Tensor,
    target: torch.Tensor,
    *,
    normalize: bool = True,
    weight: torch.Tensor | None = None,
    reduction: str = "mean",
    divisor: float | torch.Tensor | None = None,
    dim: int = 1,
) -> torch.Tensor:
    r"""Squared distance of a student's features from a teacher's, both of unit length: 2 - 2 cos.

    .. math::
        | \hat x - \hat t |^2 = 2 - 2 \cos(x, t), \quad
        \hat x = x / \max(|x|, 10^{-12}), \; \hat t = t / \max(|t|, 10^{-12})

    Parameters
    ----------
    student
        Predictions x, shape (N, D) or (N, D, ...) such as maps, float16, bfloat16, float32 or float64.
        Any strides; features contiguous and positions contiguous are both read in place.
    target
        Features t of the teacher, of the same shape, on the same device, in any of these dtypes:
        it is read as stored. Never gets a gradient.
    normalize
        Divide both by their length, as :func:`torch.nn.functional.normalize` does. False: the
        squared distance :math:`|x - t|^2` of the features themselves, summed over D.
    weight
        Weight of each row, or a bool mask: shape of the features without D, float32 (float64 with
        a float64 student) or bool. A row of weight 0 is skipped: value 0 and gradient 0, even
        where its features are NaN.
    reduction
        ``"mean"``: sum of the weighted values over the sum of the weights; ``"sum"``; ``"none"``:
        one value for each row.
    divisor
        Denominator of ``"mean"`` in place of the sum of the weights: a positive number or a 0-d
        tensor, such as a row count over all ranks.
    dim
        Dimension of the features, D, as in :func:`torch.nn.functional.cosine_similarity`; -1 for
        tokens (N, L, D).

    Returns
    -------
    torch.Tensor
        0-d (``"none"``: shape of the features without D), float32, or float64 for a float64
        student. An empty batch gives nan for ``"mean"`` and 0 for ``"sum"``, as in PyTorch.

    Raises
    ------
    TypeError
        A dtype or device that is not accepted.
    ValueError
        A shape or number that is not accepted; rows of one feature with `normalize`; or a `target`,
        `weight` or `divisor` that requires grad (detach it; in :func:`selfkd.reference.simreg` both
        sides learn).

    Notes
    -----
    Source: Navaneet, Koohpayegani, Tejankar, Pirsiavash, "SimReg: Regression as a Simple Yet
    Effective Tool for Self-supervised Knowledge Distillation", arXiv 2201.05131, and its authors'
    code (UCDvision/simreg). Rows that point the same way keep their digits, and equal rows give
    exactly 0. Where a row is zero the value is that of the distance (1, or 0 if both are), and
    the gradient is finite, as that of :func:`torch.nn.functional.normalize`. The second derivative
    (``create_graph=True``) goes through :mod:`selfkd.reference`.

    Examples
    --------
    >>> with torch.no_grad():
    ...     target = teacher(images)
    >>> loss = selfkd.simreg(head(student(images)), target)
    """
    code = _reduction(reduction)
    arguments.without_gradient(_OP, "target", target)
    if dim != 1 or student.ndim > 3:
        student = arguments.logits_view(_OP, "student", student, dim)
        target = arguments.logits_view(_OP, "target", target, dim)
    _check(student, normalize, dim)
    return _call(
        student,
        target,
        student if weight is None else arguments.weight_view(_OP, weight),
        weight is not None,
        student if divisor is None else arguments.divisor_tensor(_OP, divisor, reduction, student),
        divisor is not None,
        normalize,
        code,
    )
