"""SimReg: regression of a teacher's features, row by row."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from . import functions


def _check(student: torch.Tensor, target: torch.Tensor, normalize: bool, dim: int) -> None:
    """A row of one feature has no direction."""
    if normalize and student.ndim > 1 and student.shape[1] == 1:
        raise ValueError(
            "simreg: student has size 1 in dimension C, expected at least 2 with normalize=True; "
            f"dim={dim} is not the features' dimension, or there is one feature: normalize=False"
        )


@functions.row_loss(_check)
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
        Divide both by their length, as :func:`torch.nn.functional.normalize` does; rows of one feature
        have no direction and are refused. False: the squared distance :math:`|x - t|^2` of the features
        themselves, summed over D.
    dim
        Dimension of the features, D, as in :func:`torch.nn.functional.cosine_similarity`; -1 for
        tokens (N, L, D).

    Notes
    -----
    Source: Navaneet, Koohpayegani, Tejankar, Pirsiavash, "SimReg: Regression as a Simple Yet
    Effective Tool for Self-supervised Knowledge Distillation", arXiv 2201.05131, and its authors'
    code (UCDvision/simreg). Rows that point the same way keep their digits, and equal rows give
    exactly 0. Where a row is zero the value is that of the distance (1, or 0 if both are), and
    the gradient is finite, as that of :func:`torch.nn.functional.normalize`.

    Examples
    --------
    >>> with torch.no_grad():
    ...     target = teacher(images)
    >>> loss = selfkd.simreg(head(student(images)), target)
    """
    if normalize:
        student, target = F.normalize(student, dim=1), F.normalize(target, dim=1)
    return (student - target).square().sum(1)


reference = functions.reference(simreg)
