"""The SD-Dropout loss of sharded classes."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist

from .. import arguments, contract, functions, kernels
from ..sd_dropout_kl import sd_dropout_kl
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

_call = functions.operator(sd_dropout_kl)
_reduction = contract.Choice("sd_dropout_kl", "reduction")
_values = kernels.in_order(contract.contract("sd_dropout_kl"))
_gradient = gradient("sd_dropout_kl_backward")


@arguments.public("vocab_parallel_sd_dropout_kl")
def vocab_parallel_sd_dropout_kl(
    u: torch.Tensor,
    v: torch.Tensor,
    *,
    temperature: float = 3.0,
    forward_weight: float = 1.0,
    reverse_weight: float = 1.0,
    detach_target: bool = False,
    weight: torch.Tensor | None = None,
    reduction: str = "mean",
    divisor: float | torch.Tensor | None = None,
    dim: int = 1,
    sizes: Sequence[int] | None = None,
    group: dist.ProcessGroup | None = None,
) -> torch.Tensor:
    """:func:`selfkd.sd_dropout_kl` of logits whose classes are sharded over the ranks of a group.

    Every rank calls it with its shard, and gets the loss of whole rows and the gradients of its shard.
    The ranks exchange 32 bytes a row in one all-gather; backward exchanges nothing.

    Parameters
    ----------
    u, v
        The rank's classes of both samples, shape (N, C_r) or (N, C_r, ...). Rows are the same on all
        ranks, C_r may differ, and be 1.
    sizes
        C_r of each rank, as numbers. None: they are exchanged, with dtype and shape of the shards, which
        are compared; on CUDA this waits for the device, and ``torch.compile(fullgraph=True)`` needs them.
    group
        The process group; None: the default one.
    temperature, forward_weight, reverse_weight, detach_target, weight, reduction, divisor, dim
        As for :func:`selfkd.sd_dropout_kl`, the same on all ranks.

    Returns
    -------
    torch.Tensor
        As :func:`selfkd.sd_dropout_kl`, the same bits on all ranks.

    Raises
    ------
    TypeError, ValueError
        As :func:`selfkd.sd_dropout_kl`; shards of different dtypes or rows; `sizes` that do not fit.

    Notes
    -----
    A second derivative (``create_graph=True``) is refused.
    """
    op = "vocab_parallel_sd_dropout_kl"
    u, v = arguments.same_dtype(u, v)
    u, v = arguments.logits_view(op, "u", u, dim), arguments.logits_view(op, "v", v, dim)
    _reduction(reduction)
    sizes_of_ranks(op, "u", u, sizes, group)
    w = weights_of(op, u, weight)
    mask = None if weight is None else w != 0
    divided = None if divisor is None else arguments.divisor_tensor(op, divisor, reduction, u)
    numbers = {"temperature": temperature, "forward_weight": forward_weight}
    numbers |= {"reverse_weight": reverse_weight}
    numbers = {name: arguments.number(op, name, x) for name, x in numbers.items()}
    numbers["detach_target"] = arguments.flag(op, "detach_target", detach_target)
    with torch.no_grad():
        values = _values(u=u, v=v, weight=mask, reduction=0, **numbers)
        _, rows, saved, _ = _call.outputs(*values)
        whole = whole_of(Pair(*gather(saved, group).unbind(1)))
        l = torch.zeros_like(w)
        for name, kl in (("forward_weight", whole.forward), ("reverse_weight", whole.reverse)):
            if numbers[name] != 0:
                l = l + numbers[name] * kl
        l = torch.where(w != 0, numbers["temperature"] ** 2 * w * l, 0)
        denominator = denominator_of(w, reduction, divided)
        result = (l if reduction == "none" else l.sum() / denominator).to(rows.dtype)
    return attach(
        _gradient,
        result,
        u=u,
        v=v,
        weight=None if weight is None else w.to(rows.dtype),
        saved=torch.stack(whole),
        denominator=denominator.to(rows.dtype),
        needs_u=arguments.wants_gradient(u),
        needs_v=arguments.wants_gradient(v),
        **numbers,
    )
