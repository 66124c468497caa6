"""Adversarial losses of a discriminator's scores, for it and for the model it judges."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from . import arguments, contract, functions, operators

_OP = "adversarial"
_mode = contract.Choice(_OP, "mode")
_side = contract.Choice(_OP, "side")
_reduction = contract.Choice(_OP, "reduction")


def _softplus(x: torch.Tensor) -> torch.Tensor:
    """log(1 + e^x) as max(x, 0) + log1p(e^-|x|): F.softplus is linear beyond 20."""
    return -F.logsigmoid(-x)


def _of_real(score: torch.Tensor, mode: str) -> torch.Tensor:
    if mode == "bce":
        return _softplus(-score)
    if mode == "lsgan":
        return 0.5 * (score - 1) ** 2
    return F.relu(1 - score) if mode == "hinge" else -score


def _of_fake(score: torch.Tensor, mode: str) -> torch.Tensor:
    if mode == "bce":
        return _softplus(score)
    if mode == "lsgan":
        return 0.5 * score**2
    return F.relu(1 + score) if mode == "hinge" else score


def _check(real: torch.Tensor, fake: torch.Tensor | None, side: str, reduction: str) -> None:
    """What the contract cannot say of the two sides."""
    if side == "generator":
        if fake is not None:
            raise ValueError(
                f'{_OP}: fake is given, expected None with side "generator" (the scores of the '
                "fakes are its first argument)"
            )
    elif fake is None:
        raise ValueError(
            f'{_OP}: fake is None, expected the scores of the fakes with side "discriminator"'
        )
    elif reduction == "none" and real.shape != fake.shape:
        raise ValueError(
            f"{_OP}: fake has shape {tuple(fake.shape)}, expected {tuple(real.shape)} like real "
            'with reduction "none"'
        )


def _fused(
    real: torch.Tensor, fake: torch.Tensor | None, mode: str, side: str, reduction: str
) -> torch.Tensor:
    codes = _mode(mode), _side(side), _reduction(reduction)
    _check(real, fake, side, reduction)
    if fake is None:
        fake = real.new_empty(0)
    elif real.dtype != fake.dtype:
        real, fake = arguments.same_dtype(real, fake)
    scores = [x if x.ndim == 1 else x.reshape(-1) for x in (real, fake)]
    result = _call(*scores, *codes)
    return result.view(real.shape) if reduction == "none" else result


@functions.fused(_fused)
def adversarial(
    real: torch.Tensor,
    fake: torch.Tensor | None = None,
    *,
    mode: str = "bce",
    side: str = "discriminator",
    reduction: str = "mean",
) -> torch.Tensor:
    r"""Loss of a discriminator that tells real from fake, or of the generator that deceives it.

    ===========  ==============================================================  ==========================
    mode         discriminator, scores r and f                                   generator, scores f
    ===========  ==============================================================  ==========================
    ``"bce"``    mean softplus(-r) + mean softplus(f)                            mean softplus(-f)
    ``"hinge"``  mean relu(1 - r) + mean relu(1 + f)                             -mean f
    ``"lsgan"``  mean (r - 1)\ :sup:`2` / 2 + mean f\ :sup:`2` / 2               mean (f - 1)\ :sup:`2` / 2
    ``"wgan"``   mean f - mean r                                                 -mean f
    ===========  ==============================================================  ==========================

    Parameters
    ----------
    real
        Scores of the real examples; on the generator's side those of the fakes. The last layer's
        output, without a sigmoid. Any shape, float16, bfloat16, float32 or float64.
    fake
        Scores of the fakes, any shape, dtype and device of `real` (under autocast the narrower is
        cast to the wider); their number may differ. None on the generator's side.
    mode
        The form of the game, as in the table.
    side
        ``"discriminator"`` or ``"generator"``: whose loss.
    reduction
        ``"mean"``: each side's mean; ``"sum"``; ``"none"``: element by element, the sum of both
        sides, which must then have one shape.

    Returns
    -------
    torch.Tensor
        0-d (``"none"``: shape of `real`), float32, or float64 for float64 scores. An empty batch
        gives nan for ``"mean"`` and 0 for ``"sum"``, as in PyTorch.

    Raises
    ------
    TypeError
        A dtype or device that is not accepted.
    ValueError
        An unknown mode, side or reduction; `fake` where there must be none, or none where there
        must be; two shapes with reduction ``"none"``.

    Notes
    -----
    Both inputs get gradients: detach the fakes before they are scored in the discriminator's step.
    Nothing overflows, whatever the scores, and small values keep their digits: softplus(-60) is
    e\ :sup:`-60`. relu has the gradient 0 at 0, as in PyTorch.

    Sources: arXiv 1406.2661 (bce, the generator's non-saturating form), 1705.02894 (hinge),
    1611.04076 (lsgan), 1701.07875 (wgan; its constraint on the discriminator is not part of this).

    Examples
    --------
    >>> d_loss = selfkd.adversarial(judge(real), judge(fake.detach()))
    >>> g_loss = selfkd.adversarial(judge(fake), side="generator")
    """
    _mode(mode), _side(side), _reduction(reduction)
    _check(real, fake, side, reduction)
    acc = arguments.accumulator(real)
    rows = _of_real(real.to(acc), "wgan" if (side, mode) == ("generator", "hinge") else mode)
    if fake is None:
        return arguments.reduce_rows(rows, None, reduction, None)
    fake_rows = _of_fake(fake.to(acc), mode)
    if reduction == "none":
        return rows + fake_rows
    real_loss, fake_loss = (
        arguments.reduce_rows(x, None, reduction, None) for x in (rows, fake_rows)
    )
    return real_loss + fake_loss


reference = functions.reference(adversarial)


def _of_contract(real: torch.Tensor, fake: torch.Tensor, side: str, **options: str) -> torch.Tensor:
    """The reference for the arguments of the contract, in which `fake` is empty where there is none."""
    return reference(real, None if side == "generator" else fake, side=side, **options)


_call = operators.register(_OP, _of_contract)
