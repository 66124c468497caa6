"""What the ranks of a group exchange of the rows whose classes they share, and how it makes up whole rows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from .. import arguments, contract, functions, gradients, kernels
from ..sd_dropout_kl import sd_dropout_kl

_FORM = 2 + contract.MAX_RANK  # numbers that describe a shard: classes, dtype, shape of the rows

_call = functions.operator(sd_dropout_kl)
_values = kernels.in_order(contract.contract("sd_dropout_kl"))


# ---- what the ranks exchange ----


def gather(x: torch.Tensor, group: dist.ProcessGroup | None) -> torch.Tensor:
    """`x` of every rank, along a new first dimension."""
    found = [torch.empty_like(x) for _ in range(dist.get_world_size(group))]
    dist.all_gather(found, x, group=group)
    return torch.stack(found)


def sizes_of_ranks(
    op: str,
    name: str,
    x: torch.Tensor,
    sizes: Sequence[int] | None,
    group: dist.ProcessGroup | None,
) -> list[int]:
    """The number of classes of each rank: as given, or exchanged and the shards' forms compared."""
    ranks, rank = dist.get_world_size(group), dist.get_rank(group)
    if sizes is not None:
        if len(sizes) != ranks:
            raise ValueError(
                f"{op}: sizes has {len(sizes)} values, expected one for each rank ({ranks})"
            )
        if sizes[rank] != x.shape[1]:
            raise ValueError(
                f"{op}: {name} has size {x.shape[1]} in dimension C, expected {sizes[rank]} as sizes says of "
                f"rank {rank}"
            )
        return list(sizes)
    dtypes = [torch.float16, torch.bfloat16, torch.float32, torch.float64, x.dtype]
    rows = [*x.shape[:1], *x.shape[2:]]
    message = [x.shape[1], dtypes.index(x.dtype), *rows]
    message += [-1] * (_FORM - len(message))
    forms = gather(torch.tensor(message, device=x.device), group).tolist()
    for other, (_, code, *shape) in enumerate(forms):
        if code != forms[0][1]:
            mine, first = (str(dtypes[k]).removeprefix("torch.") for k in (code, forms[0][1]))
            raise TypeError(
                f"{op}: {name} has dtype {mine} on rank {other}, expected {first} like rank 0"
            )
        if shape != forms[0][2:]:
            mine, first = (str(tuple(k for k in x if k >= 0)) for x in (shape, forms[0][2:]))
            raise ValueError(
                f"{op}: {name} has rows of shape {mine} on rank {other}, expected {first} like rank 0"
            )
    return [form[0] for form in forms]


class Pair(NamedTuple):
    """What is known of two distributions p, q of each row: by shard (along dimension 0), or of the whole.

    lse and ratio as the operators save them: log-sum-exp of p, and how much larger it is than that of q.
    """

    lse: torch.Tensor
    ratio: torch.Tensor
    forward: torch.Tensor
    reverse: torch.Tensor

    @property
    def lse_q(self) -> torch.Tensor:
        """That of q, which the operators save in place of the ratio where p has nothing."""
        return torch.where(self.lse == -torch.inf, self.ratio, self.lse - self.ratio)


def _within(mass: torch.Tensor, kl: torch.Tensor, both: torch.Tensor) -> torch.Tensor:
    """The sum of mass * KL over the shards; what only one side has is a matter of the masses."""
    inside = torch.where(kl == torch.inf, kl, mass * kl)  # inf also where the mass rounds to 0
    return torch.where(both, inside, 0).sum(0)


def whole_of(shards: Pair) -> Pair:
    """Both KL divergences of whole rows, and what their gradients need, by the chain rule."""
    lse_q = shards.lse_q
    both = shards.ratio.isfinite() & (shards.lse != -torch.inf)
    # The shards' lse are logits of the masses. They are taken relative to those of one shard, the
    # largest, so that ratios that agree stay so to the last bit.
    largest = shards.lse.argmax(0, keepdim=True)
    top, ratio = shards.lse.gather(0, largest), shards.ratio.gather(0, largest)
    usual = both.gather(0, largest)
    top_q = torch.where(usual, top - ratio, lse_q.amax(0, keepdim=True))
    p = shards.lse - top
    q = torch.where(both & usual, p - (shards.ratio - ratio), lse_q - top_q)
    values = _values(u=p.movedim(0, 1), v=q.movedim(0, 1), temperature=1.0, reduction=0)
    _, _, saved, _ = _call.outputs(*values)
    lse, gap, forward, reverse = saved.unbind()
    return Pair(
        lse + top[0],
        gap + torch.where(usual, ratio, top - top_q)[0],
        forward + _within((p - lse).exp(), shards.forward, both),
        reverse + _within((q - (lse - gap)).exp(), shards.reverse, both),
    )


# ---- results ----


def gradient(op: str) -> type[torch.autograd.Function]:
    """The autograd.Function of a result found without autograd, which the operator differentiates."""
    run = kernels.kernel(op)
    values = kernels.in_order(contract.contract(op))
    live = len(contract.contract(op).outputs)

    class Gradient(torch.autograd.Function):
        @staticmethod
        def forward(
            ctx: Any,
            result: torch.Tensor,
            numbers: dict[str, Any],
            names: tuple[str, ...],
            *tensors: torch.Tensor,
        ) -> torch.Tensor:
            """The tensors' names and the numbers are those of the operator; the first `live` learn."""
            ctx.numbers, ctx.names, ctx.others = numbers, names, ()
            if torch.compiler.is_dynamo_compiling():  # versions of `ctx.others` are not counted
                tensors, ctx.others = tensors[:live], tensors[live:]
                ctx.save_for_backward(*tensors)
            else:
                ctx.save_for_backward(*gradients.savable(tensors))
            return result.clone()

        @staticmethod
        def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
            if torch.is_grad_enabled():
                raise RuntimeError(
                    f"selfkd: {op} of a shard has no derivative; use selfkd.reference on all classes"
                )
            named = dict(zip(ctx.names, (*ctx.saved_tensors, *ctx.others), strict=True))
            found = run(grad.contiguous(), *values(**named, **ctx.numbers))
            grads = found if isinstance(found, tuple) else (found,)
            return (None, None, None, *grads, *[None] * (len(ctx.names) - live))

    return type(op, (Gradient,), {})  # a backward node is named after its class


def attach(
    gradient: type[torch.autograd.Function], result: torch.Tensor, **named: Any
) -> torch.Tensor:
    """The result with that gradient; `named` are the operator's arguments, those absent None."""
    tensors = {name: x for name, x in named.items() if isinstance(x, torch.Tensor)}
    numbers = {name: x for name, x in named.items() if x is not None and name not in tensors}
    return gradient.apply(result, numbers, tuple(tensors), *tensors.values())  # type: ignore[no-any-return, no-untyped-call]


def denominator_of(
    weights: torch.Tensor, reduction: str, divisor: torch.Tensor | None
) -> torch.Tensor:
    if reduction != "mean":
        return weights.new_ones(())
    return weights.sum() if divisor is None else divisor.double()


def weights_of(op: str, like: torch.Tensor, weight: torch.Tensor | None) -> torch.Tensor:
    """The weight of each row, in float64."""
    if weight is None:
        return torch.ones_like(like[:, 0], dtype=torch.float64)
    arguments.without_gradient(op, "weight", weight)
    arguments.expect_weight(op, "weight", weight, like)
    return weight.double()
