"""Arguments that the row losses share: views, weights, reductions, divisors."""

from __future__ import annotations

from typing import Any

import torch

from .contract import number_rule


def merged(x: torch.Tensor, first: int) -> torch.Tensor:
    """`x`, copied only where the strides of its dimensions from `first` on cannot be merged into one."""
    if x.ndim <= first + 1:
        return x
    expected = None
    for size, stride in zip(reversed(x.shape[first:]), reversed(x.stride()[first:]), strict=True):
        if size == 1:
            continue
        if expected is not None and stride != expected:
            return x.contiguous()
        expected = stride * size
    return x


def logits_view(op: str, name: str, x: torch.Tensor, dim: int) -> torch.Tensor:
    """`x` with its classes in dimension 1, as a view where strides allow."""
    if dim != 1:
        if not -x.ndim <= dim < x.ndim:
            raise ValueError(f"{op}: dim is {dim}, expected {-x.ndim} to {x.ndim - 1} for {name}")
        x = x.movedim(dim, 1)
    return merged(x, 2)


def without_gradient(op: str, name: str, x: torch.Tensor) -> None:
    """Refuse a tensor that will never get the gradient it asks for."""
    if x.requires_grad:
        raise ValueError(
            f"{op}: {name} requires grad, expected a tensor without (it never gets a gradient)"
        )


def weight_view(op: str, weight: torch.Tensor) -> torch.Tensor:
    """Per-position weights, ready for the operator."""
    without_gradient(op, "weight", weight)
    return merged(weight, 1)


def divisor_tensor(
    op: str, divisor: float | torch.Tensor, reduction: str, like: torch.Tensor
) -> torch.Tensor:
    """The divisor as a 0-d tensor of the loss's dtype on the device of `like`."""
    if reduction != "mean":
        raise ValueError(
            f'{op}: divisor is given, expected reduction "mean" with it (not "{reduction}")'
        )
    dtype = torch.float64 if like.dtype == torch.float64 else torch.float32
    if isinstance(divisor, torch.Tensor):
        without_gradient(op, "divisor", divisor)
        return divisor.to(device=like.device, dtype=dtype, non_blocking=True)
    number_rule(op, "divisor", divisor, "POSITIVE")
    return torch.full((), divisor, dtype=dtype, device=like.device)


def same_dtype(u: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Under autocast two live inputs may differ: the narrower is cast to the wider."""
    if u.dtype != v.dtype and torch.is_autocast_enabled(u.device.type):
        dtype = torch.promote_types(u.dtype, v.dtype)
        return u.to(dtype), v.to(dtype)
    return u, v


def reduce_rows(
    rows: torch.Tensor, weight: torch.Tensor | None, reduction: str, divisor: Any
) -> torch.Tensor:
    """Reduction of the references: `rows` are already weighted."""
    if reduction == "none":
        return rows
    if reduction == "sum":
        return rows.sum()
    if divisor is None:
        divisor = rows.new_tensor(rows.numel()) if weight is None else weight.to(rows.dtype).sum()
    mean: torch.Tensor = rows.sum() / divisor
    return mean
