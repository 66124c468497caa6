"""The operator ``sd_dropout_head``: what it gives, and its gradients, which forward makes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from . import arguments, gradients, kernels
from . import head_checks as checks

_OUTPUTS = ["loss", "rows", "denominator", "logits", "grad_features", "grad_weight", "grad_bias"]


def _fake(*values: Any) -> tuple[torch.Tensor, ...]:
    checks.check(values)
    features, weight, *_, return_logits, wanted = values
    (N, K), C, acc = features.shape, weight.shape[0], arguments.accumulator(features)
    logits = features.new_empty((N, C) if return_logits else (0,))
    shapes = [
        (N, K) if wanted & checks.FEATURES else (0,),
        (C, K) if wanted & checks.WEIGHT else (0,),
    ]
    shapes += [(C,) if wanted & checks.BIAS else (0,)]
    loss, rows, denominator, *grads = (
        features.new_empty(shape, dtype=acc) for shape in [(), (N,), (), *shapes]
    )
    return loss, rows, denominator, logits, *grads


def define(run: Callable[..., Any]) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """The operator that `run` computes, and its call with gradients, which the compiler needs not."""

    class Gradient(torch.autograd.Function):
        """Forward makes the gradients of the sum of rows, where the logits are; backward scales them.

        With reduction "none" each row is scaled by a number of its own: then backward makes them.
        """

        @staticmethod
        def forward(
            ctx: Any, values: tuple[Any, ...], *live: torch.Tensor | None
        ) -> tuple[torch.Tensor, ...]:
            wanted = sum(
                bit
                for bit, needed in zip(checks.BITS, ctx.needs_input_grad[1:], strict=True)
                if needed
            )
            ctx.by_row = values[checks.REDUCTION] == checks.NONE
            ctx.values = tuple(
                None if isinstance(x, torch.Tensor) else x for x in (*values[:-1], wanted)
            )
            ctx.dtypes = [None if x is None else x.dtype for x in live]
            with kernels.below_autograd():
                outputs: tuple[torch.Tensor, ...] = head(*values[:-1], 0 if ctx.by_row else wanted)
            _, _, denominator, _, *grads = outputs
            if ctx.by_row:
                tensors = [x for x in values if isinstance(x, torch.Tensor)]
                found = iter(gradients.savable(tuple(tensors)))
                ctx.save_for_backward(
                    *(next(found) if isinstance(x, torch.Tensor) else None for x in values)
                )
            else:
                ctx.save_for_backward(denominator, *grads)
            result = int(ctx.by_row)
            ctx.set_materialize_grads(False)
            ctx.mark_non_differentiable(*outputs[:result], *outputs[result + 1 :])
            return outputs

        @staticmethod
        def backward(ctx: Any, *incoming: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
            grad = incoming[int(ctx.by_row)]
            if grad is None:
                return (None,) * 4
            if torch.is_grad_enabled():
                raise RuntimeError(
                    f"{checks.OP} has no double backward; for create_graph=True compose it of "
                    "u, v and logits = F.linear(selfkd.dropout_views(features, seed), weight, bias), "
                    "F.cross_entropy and selfkd.sd_dropout_kl"
                )
            if ctx.by_row:
                tensors = zip(ctx.saved_tensors, ctx.values, strict=True)
                named = dict(
                    zip(
                        checks.NAMES,
                        (number if x is None else x for x, number in tensors),
                        strict=True,
                    )
                )
                w = named["row_weight"]
                named["row_weight"] = grad if w is None else torch.where(w == 0, 0, grad * w)
                named["return_logits"] = False
                _, _, _, _, *grads = head(*named.values())
                scale = None
            else:
                denominator, *grads = ctx.saved_tensors
                scale = torch.where(denominator == 0, 0, grad / denominator)
            found = [
                (x if scale is None else x * scale).to(dtype) if ctx.values[-1] & bit else None
                for bit, x, dtype in zip(checks.BITS, grads, ctx.dtypes, strict=True)
            ]
            return None, *found

    def autograd(*values: Any) -> tuple[torch.Tensor, ...]:
        kernels.refuse_transforms(checks.OP, values)
        live = values[: len(checks.BITS)]
        if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in live):
            return Gradient.apply(values, *live)  # type: ignore[no-any-return, no-untyped-call]
        with kernels.below_autograd():
            return head(*values)  # type: ignore[no-any-return]

    head = kernels.define(checks.CONTRACT, _OUTPUTS, run=run, fake=_fake, autograd=autograd)
    return head, autograd
