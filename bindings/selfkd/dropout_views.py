"""Dropout views: features and two dropout samples of them, stacked."""

from __future__ import annotations

import torch

from . import arguments, functions, operators

_OP = "dropout_views"
_LOW = 0xFFFFFFFF
_Words = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]


def _multiply(x: torch.Tensor, factor: int) -> tuple[torch.Tensor, torch.Tensor]:
    """High and low word of the product of two words, of 16 bits of `x` at a time: 48 fit in int64."""
    low, high = (x & 0xFFFF) * factor, (x >> 16) * factor
    low = low + ((high & 0xFFFF) << 16)
    return (high >> 16) + (low >> 32), low & _LOW


def _philox(counter: _Words, seed: torch.Tensor) -> _Words:
    """Philox4x32-10 of counters whose words are int64 from 0 to 2^32 - 1; the key is that of `seed`."""
    x, y, z, w = counter
    low, high = seed & _LOW, (seed >> 32) & _LOW
    for _ in range(10):
        (x_high, x_low), (z_high, z_low) = _multiply(x, 0xD2511F53), _multiply(z, 0xCD9E8D57)
        x, y, z, w = z_high ^ y ^ low, z_low, x_high ^ w ^ high, x_low
        low, high = (low + 0x9E3779B9) & _LOW, (high + 0xBB67AE85) & _LOW
    return x, y, z, w


def _fused(features: torch.Tensor, seed: torch.Tensor, p: float, first_row: int) -> torch.Tensor:
    if not isinstance(seed, torch.Tensor):
        raise TypeError(
            f"{_OP}: seed is of type {type(seed).__name__}, expected a 0-d int64 tensor"
        )
    return _call(features, seed, p, first_row)


@functions.fused(_fused)
def dropout_views(
    features: torch.Tensor, seed: torch.Tensor, *, p: float = 0.5, first_row: int = 0
) -> torch.Tensor:
    r"""Features and two independent dropout samples of them, stacked for one matrix product.

    .. math::
        \big[\; h, \quad m_u \odot h / (1 - p), \quad m_v \odot h / (1 - p) \;\big], \qquad
        m_u, m_v \sim \mathrm{Bernoulli}(1 - p)

    Parameters
    ----------
    features
        Shape (N, C), float16, bfloat16, float32 or float64, any strides. N may be 0.
    seed
        0-d int64 tensor of any value, on the device of the features, where it is read: no
        synchronisation, and a captured CUDA graph sees each new value. One seed gives one pair of
        masks, on every device and for any number of threads. Take a new one for each step:
        ``torch.randint(2**63 - 1, (), device=...)``.
    p
        Probability of a feature to be dropped, 0 <= p < 1. With 0, all views are copies.
    first_row
        Place of row 0 in the whole batch, at least 0: parts of a batch that are given theirs get
        what the whole would.

    Returns
    -------
    torch.Tensor
        Shape (3, N, C), contiguous, in the dtype and on the device of the features: the features
        as they are, sample u and sample v. Kept features are multiplied by 1 / (1 - p) in float32
        (float64 for float64) and rounded once; dropped ones are exactly 0, even where the feature
        is infinite or NaN, and so are their gradients.

    Raises
    ------
    TypeError
        A dtype or device that is not accepted, or a `seed` that is no tensor.
    ValueError
        A shape or number that is not accepted.

    Notes
    -----
    Backward draws the masks again: nothing is saved but the inputs. The gradient is summed over
    the views in float32 (float64) and rounded once. The masks are words of Philox4x32-10 (Salmon,
    Moraes, Dror, Shaw, "Parallel Random Numbers: As Easy as 1, 2, 3", SC 2011), not those of
    PyTorch's generator; ``ops/dropout_views.h`` says which word decides on which feature. The two
    samples are those of Lee, Park, Seo, Kang, "Self-Knowledge Distillation via Dropout", arXiv
    2208.05642.

    Examples
    --------
    >>> seed = torch.randint(2**63 - 1, (), device=features.device)
    >>> logits, u, v = fc(selfkd.dropout_views(features, seed, p=0.5))
    >>> loss = F.cross_entropy(logits, target) + selfkd.sd_dropout_kl(u, v)
    """
    arguments.number_rule(_OP, "p", p, "BELOW_ONE")
    acc = arguments.accumulator(features)
    rows, columns = (torch.arange(size, device=features.device) for size in features.shape)
    element = ((rows + first_row) * features.shape[1]).unsqueeze(1) + columns
    block = element >> 2
    scaled = features.to(acc) * (1 / (1 - p))
    views = [features]
    for sample in (0, 1):
        counter = (
            block & _LOW,
            (block >> 32) & (_LOW >> 2),
            torch.full_like(block, sample),
            torch.zeros_like(block),
        )
        words = torch.stack(_philox(counter, seed), -1)
        word = words.gather(-1, (element & 3).unsqueeze(-1)).squeeze(-1)
        kept = word >= int(p * 2.0**32)
        views.append(torch.where(kept, scaled, 0).to(features.dtype))
    return torch.stack(views)


reference = functions.reference(dropout_views)
_call = operators.register(_OP, reference)
