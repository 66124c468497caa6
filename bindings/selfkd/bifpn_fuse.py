"""BiFPN's fast normalised fusion of two or three maps, resized to the first."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F

from . import arguments, contract, functions, kernels, operators

_OP = "bifpn_fuse"
_activation = contract.Choice(_OP, "activation")
_activate = contract.Choice(_OP, "activate")
_resize = (contract.Choice(_OP, "resize_b"), contract.Choice(_OP, "resize_c"))


def _ways(resize: Sequence[str | None] | None, count: int) -> list[str]:
    """How each input but the first is resized."""
    if resize is None:
        return ["none"] * (count - 1)
    if isinstance(resize, str) or len(resize) != count:
        found = f'is "{resize}"' if isinstance(resize, str) else f"has {len(resize)} entries"
        raise ValueError(f"{_OP}: resize {found}, expected {count} entries, one for each input")
    if resize[0] is not None:
        raise ValueError(
            f'{_OP}: resize is "{resize[0]}" for the first input, expected None (the result has its size)'
        )
    return ["none" if way is None else way for way in resize[1:]]


def _check(inputs: Sequence[torch.Tensor]) -> None:
    if not 2 <= len(inputs) <= 3:
        raise ValueError(f"{_OP}: inputs has {len(inputs)} maps, expected 2 or 3")


def _resized(x: torch.Tensor, way: str, size: torch.Size) -> torch.Tensor:
    if way == "nearest":
        return F.interpolate(x, size=size, mode="nearest")
    if way == "bilinear":
        return F.interpolate(x, size=size, mode="bilinear", align_corners=False)
    if way == "maxpool":  # "same" padding: both sides of an odd size, else beyond the end only
        odd = (x.shape[2] % 2, x.shape[3] % 2)
        return F.max_pool2d(x, kernel_size=3, stride=2, padding=odd, ceil_mode=True)
    return x


def _as_read(weight: torch.Tensor, first: torch.Tensor) -> torch.Tensor:
    """The weight as it is read; a gradient comes back in its own dtype, as of a module in half."""
    dtype = arguments.accumulator(first)
    return weight if weight.dtype == dtype or not weight.is_floating_point() else weight.to(dtype)


def _fused(
    inputs: tuple[torch.Tensor, ...],
    weight: torch.Tensor | None,
    resize: Sequence[str | None] | None,
    activation: str,
    activate: str,
    eps: float,
) -> torch.Tensor:
    _check(inputs)
    ways = _ways(resize, len(inputs))
    codes = [choice(way) for choice, way in zip(_resize[: len(ways)], ways, strict=True)]
    if any(x.dtype != inputs[0].dtype for x in inputs):
        inputs = arguments.same_dtype(*inputs)
    first = inputs[0]
    named = {"c": inputs[2], "resize_c": codes[1]} if len(inputs) == 3 else {}
    values = _values(
        a=first,
        b=inputs[1],
        weight=None if weight is None else _as_read(weight, first),
        resize_b=codes[0],
        activation=_activation(activation),
        activate=_activate(activate),
        eps=eps,
        **named,
    )
    return _call(*values)


@functions.fused(_fused)
def bifpn_fuse(
    *inputs: torch.Tensor,
    weight: torch.Tensor | None = None,
    resize: Sequence[str | None] | None = None,
    activation: str = "relu",
    activate: str = "inputs",
    eps: float = 1e-6,
) -> torch.Tensor:
    r"""Fusion of two or three maps, as in BiFPN: activation, resizing and weighted sum in one pass.

    .. math::
        \sum_i f_i \, resize_i(act(x_i)), \quad
        f_i = \frac{relu(w_i)}{\sum_j relu(w_j) + \epsilon}

    Parameters
    ----------
    inputs
        Two or three maps (N, C, H, W), called a, b and c in errors, of one dtype (float16, bfloat16,
        float32 or float64; under autocast the narrower are cast to the widest) and one device. N
        and C agree; H and W of the first are those of the result. Any strides: NCHW and
        channels_last are both read and written in place.
    weight
        Weights w, one for each input, shape (2,) or (3,), of any of these dtypes; read in float32
        (float64 with float64 maps). None: a plain sum, all factors 1.
    resize
        How each input comes to the first one's size; None: all have it already. One entry for each
        input, the first None:

        - ``None``: it has that size;
        - ``"nearest"``, ``"bilinear"``: as :func:`torch.nn.functional.interpolate`
          (``align_corners=False``, no antialiasing), up or down, from any size;
        - ``"maxpool"``: 3x3, stride 2, with "same" padding as in TensorFlow, which never wins: H and
          W are half of the input's, rounded up.
    activation
        ``"none"``, ``"relu"`` or ``"silu"``.
    activate
        What is activated: ``"inputs"``, each before it is resized, or the ``"output"``.
    eps
        :math:`\epsilon \ge 0`.

    Returns
    -------
    torch.Tensor
        Shape, dtype and strides of the first input.

    Raises
    ------
    TypeError
        A dtype or device that is not accepted.
    ValueError
        One map only or more than three, a shape, a size that does not fit its way of resizing,
        a weight that has not one entry for each input, an unknown name.

    Notes
    -----
    All inputs and `weight` get gradients, those of relu being 0 at 0. Ties of the pooling are resolved
    as in PyTorch: the first maximum of a window gets the gradient, and NaN wins. Sums are in float32
    (float64 for float64 maps), as are the positions of ``"nearest"``, for every dtype. For backward
    nothing is kept but the inputs.

    Source: Ji, Shin, Hwang, Park, Moon, "Refine Myself by Teaching Myself: Feature Refinement via
    Self-Knowledge Distillation" (FRSKD), CVPR 2021, and its authors' code; Tan, Pang, Le,
    "EfficientDet", arXiv 1911.09070, section 3.3.

    Examples
    --------
    >>> weight = torch.nn.Parameter(torch.ones(3))
    >>> fused = selfkd.bifpn_fuse(
    ...     lateral, previous, finer, weight=weight, resize=(None, None, "maxpool")
    ... )
    """
    _check(inputs)
    _activation(activation), _activate(activate)
    act: Callable[[torch.Tensor], torch.Tensor] = {
        "none": lambda x: x,
        "relu": F.relu,
        "silu": F.silu,
    }[activation]
    first = inputs[0]
    acc = arguments.accumulator(first)
    factors: Sequence[Any] = [1] * len(inputs)
    if weight is not None:
        weight = _as_read(weight, first)
        factors = (F.relu(weight) / (F.relu(weight).sum() + eps)).unbind()
    fused: Any = 0
    for x, factor, way in zip(inputs, factors, ["none", *_ways(resize, len(inputs))], strict=True):
        operand = act(x.to(acc)) if activate == "inputs" else x.to(acc)
        operand = _resized(operand, way, first.shape[2:])
        if operand.shape != first.shape:
            raise ValueError(
                f"{_OP}: an input has shape {tuple(x.shape)}, expected {tuple(first.shape)} once"
                f" resize is {way}"
            )
        fused = fused + factor * operand
    return (fused if activate == "inputs" else act(fused)).to(first.dtype)


reference = functions.reference(bifpn_fuse)


def by_contract(
    function: Callable[..., torch.Tensor],
    a: torch.Tensor,
    b: torch.Tensor,
    c: torch.Tensor | None = None,
    *,
    resize_b: str = "none",
    resize_c: str = "none",
    **named: Any,
) -> torch.Tensor:
    """Call :func:`bifpn_fuse` or its reference with the arguments of the contract."""
    inputs = (a, b) if c is None else (a, b, c)
    ways = [None if way == "none" else way for way in ("none", resize_b, resize_c)]
    return function(*inputs, resize=ways[: len(inputs)], **named)


_call = operators.register(_OP, functools.partial(by_contract, reference))
_values = kernels.in_order(contract.contract(_OP))
