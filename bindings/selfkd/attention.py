"""Attention transfer: the distance between two networks' attention maps, FRSKD's feature loss."""

from __future__ import annotations

import torch

from . import arguments, functions, operators


def _fused(student: torch.Tensor, teacher: torch.Tensor, eps: float) -> torch.Tensor:
    if teacher.requires_grad:
        arguments.without_gradient("attention", "teacher", teacher)
    return _call(arguments.merged(student, 2), arguments.merged(teacher, 2), eps)


@functions.fused(_fused)
def attention(student: torch.Tensor, teacher: torch.Tensor, *, eps: float = 1e-12) -> torch.Tensor:
    r"""Mean squared difference of two feature maps' attention, where each sample's has length 1.

    .. math::
        \frac{1}{N S} \sum_n | \phi(x_n) - \phi(t_n) |^2, \quad
        \phi(x) = a / \max(|a|, \epsilon), \; a_s = \frac{1}{C} \sum_c x_{cs}^2

    Parameters
    ----------
    student
        Features x, shape (N, C, H, W) or (N, C, ...), S positions in all, float16, bfloat16, float32
        or float64. Any strides; both memory formats are read in place.
    teacher
        Features t, shape (N, D, ...): as many positions, any number of channels; on the same
        device, in any of these dtypes: it is read as stored. Never gets a gradient.
    eps
        Least length that a map is divided by, > 0.

    Returns
    -------
    torch.Tensor
        0-d, float32, or float64 for a float64 student; nan where there are no samples or positions.

    Notes
    -----
    Source: Ji et al., "Refine Myself by Teaching Myself: Feature Refinement via Self-Knowledge
    Distillation", arXiv 2103.08273, as in its authors' code (MingiJi/FRSKD), where the weight 100 goes
    with this mean of squares; and Zagoruyko, Komodakis, arXiv 1612.03928. Maps that nearly agree
    keep their digits, and equal maps give exactly 0. A sample of zeros has the map 0 and gradient 0.
    Kept for backward are 16 bytes a position.

    Examples
    --------
    >>> loss = sum(selfkd.attention(f, t.detach()) for f, t in zip(features, teacher_features))
    """
    acc = arguments.accumulator(student)
    maps = [x.to(acc).square().mean(1).unsqueeze(-1).flatten(1) for x in (student, teacher)]
    lengths = (x.norm(dim=1, keepdim=True).clamp_min(eps) for x in maps)
    q, p = (x / length for x, length in zip(maps, lengths, strict=True))
    loss: torch.Tensor = (q - p).square().mean()
    return loss


reference = functions.reference(attention)
_call = operators.register("attention", reference)
