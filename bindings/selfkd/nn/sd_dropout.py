"""SD-Dropout: a head with its loss."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from .. import arguments
from ..distill import distill
from ..dropout_views import dropout_views
from ..sd_dropout_head import _seed, sd_dropout_head
from ..sd_dropout_kl import sd_dropout_kl

_OP = "SDDropout"
_LEARNS = "call selfkd.reference.sd_dropout_head, which gives it one"
_OF_KL = ("temperature", "forward_weight", "reverse_weight", "detach_target")
_OPTIONS = (
    "p",
    "kl_weight",
    *_OF_KL,
    "label_smoothing",
    "ignore_index",
    "reduction",
    "chunk_bytes",
)
_has_global_hook: Callable[[], Any] = getattr(
    nn.modules.module, "_has_any_global_hook", lambda: False
)


def _is_plain(head: Any) -> bool:
    """Whether a call of the head is its weight and bias, and nothing more."""
    return (
        type(head) is nn.Linear
        # a quantized or sharded layer is an nn.Linear whose weight is of another type
        and type(head.weight) in (nn.Parameter, torch.Tensor)
        and "forward" not in vars(head)
        and not (head._forward_hooks or head._forward_pre_hooks)
        and not (head._backward_hooks or head._backward_pre_hooks)
        and not _has_global_hook()
    )


def _check_rows(
    features: torch.Tensor, target: torch.Tensor, row_weight: torch.Tensor | None
) -> None:
    """The contract of rows, before PyTorch broadcasts what does not fit."""
    if features.ndim != 2:
        raise ValueError(f"{_OP}: features has shape {tuple(features.shape)}, expected (N, K)")
    arguments.expect_shape(_OP, "target", target, features.shape[:1])
    if row_weight is None:
        return
    arguments.without_gradient(_OP, "row_weight", row_weight, _LEARNS)
    arguments.expect_shape(_OP, "row_weight", row_weight, features.shape[:1])
    arguments.expect_weight(_OP, "row_weight", row_weight, features)


def _logits(found: Any, rows: int) -> torch.Tensor:
    """What the head returned, if it is logits."""
    if not isinstance(found, torch.Tensor):
        raise TypeError(
            f"{_OP}: head returned {arguments.described(found)}, expected logits ({rows}, C)"
        )
    if found.ndim != 2 or len(found) != rows:
        raise ValueError(
            f"{_OP}: head returned shape {tuple(found.shape)}, expected logits ({rows}, C)"
        )
    return found


class SDDropout(nn.Module):
    """A head trained with SD-Dropout.

    The loss is ``F.cross_entropy(head(h), target) + kl_weight * sd_dropout_kl(u, v)``, where u and
    v are the head's logits of two dropout samples of the features h.

    Parameters
    ----------
    head
        The classifier, (N, K) features -> (N, C) logits; a module is registered here, so its parameters
        are this module's. A plain ``nn.Linear`` is computed by :func:`selfkd.sd_dropout_head`, which does
        not store its logits. Anything else (a subclass, a Sequential, LoRA, hooks, parametrizations) is
        called as it is, on the features and on each of the samples: same masks, same loss.
    p
        Dropout probability of each sample, in [0, 1).
    temperature, forward_weight, reverse_weight, detach_target
        As for :func:`selfkd.sd_dropout_kl`.
    kl_weight
        Weight of the KL term; the paper uses 1 alone and 0.1 beside other distillation losses.
    label_smoothing, ignore_index
        As for :func:`torch.nn.functional.cross_entropy`. Rows with target `ignore_index` count in
        neither term.
    reduction, chunk_bytes
        As for :func:`selfkd.sd_dropout_head`.

    Raises
    ------
    TypeError
        A head that cannot be called.
    ValueError
        A number that is not accepted.

    Notes
    -----
    Source: arXiv 2208.05642 and its authors' code. The cross-entropy sees the features
    without dropout.

    Checkpoints: ``net.fc = SDDropout(net.fc)`` calls the head's entries ``fc.head.weight``. Those saved
    before, ``fc.weight``, load all the same. After training ``net.fc = net.fc.head`` takes the head out
    again.

    Examples
    --------
    >>> net.fc = selfkd.nn.SDDropout(net.fc)
    >>> logits, loss = net.fc(features, target)
    """

    def __init__(
        self,
        head: Callable[[torch.Tensor], torch.Tensor],
        p: float = 0.5,
        temperature: float = 3.0,
        kl_weight: float = 1.0,
        *,
        forward_weight: float = 1.0,
        reverse_weight: float = 1.0,
        detach_target: bool = False,
        label_smoothing: float = 0.0,
        ignore_index: int = -100,
        reduction: str = "mean",
        chunk_bytes: int = 64 << 20,
    ) -> None:
        super().__init__()
        if not callable(head) or isinstance(head, type):
            found = (
                f"the class {head.__name__}"
                if isinstance(head, type)
                else arguments.described(head)
            )
            raise TypeError(
                f"{_OP}: head is {found}, expected a module or function of features, "
                "such as nn.Linear(32, 10)"
            )
        if not 0 <= arguments.number(_OP, "p", p, _LEARNS) < 1:
            raise ValueError(f"{_OP}: p is {p:g}, expected a number in [0, 1)")
        self.head = head
        self.p, self.temperature, self.kl_weight = p, temperature, kl_weight
        self.forward_weight, self.reverse_weight, self.detach_target = (
            forward_weight,
            reverse_weight,
            detach_target,
        )
        self.label_smoothing, self.ignore_index = label_smoothing, ignore_index
        self.reduction, self.chunk_bytes = reduction, chunk_bytes

    @arguments.public(_OP)
    def forward(
        self,
        features: torch.Tensor,
        target: torch.Tensor | None = None,
        return_logits: bool = True,
        *,
        row_weight: torch.Tensor | None = None,
        divisor: float | torch.Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> torch.Tensor | tuple[torch.Tensor | None, torch.Tensor]:
        """Logits and loss where a target is given; in evaluation mode without one, logits alone.

        Parameters
        ----------
        features
            Pooled features, (N, K).
        target
            Class of each row, (N,) int64; needed in training mode. In evaluation mode nothing is
            dropped: the samples are equal, so the loss is the cross-entropy.
        return_logits
            Return the logits without dropout, detached, beside the loss (else None in their place).
        row_weight, divisor, generator
            As for :func:`selfkd.sd_dropout_head`.
        """
        head = self.head
        if target is None:
            if self.training:
                raise ValueError(
                    "SDDropout: target is None, expected the class of each row in training mode"
                )
            return head(features)
        if self.training and _is_plain(head):
            found = sd_dropout_head(
                features,
                head.weight,  # type: ignore[attr-defined]
                head.bias,  # type: ignore[attr-defined]
                target,
                **{name: getattr(self, name) for name in _OPTIONS},
                row_weight=row_weight,
                divisor=divisor,
                generator=generator,
                return_logits=return_logits,
            )
            if isinstance(found, torch.Tensor):
                return None, found
            loss, logits = found
            return logits, loss
        logits, loss = self._composed(features, target, row_weight, divisor, generator)
        return logits.detach() if return_logits else None, loss

    def _composed(
        self,
        features: torch.Tensor,
        target: torch.Tensor,
        row_weight: torch.Tensor | None,
        divisor: float | torch.Tensor | None,
        generator: torch.Generator | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Logits and loss of any head: what :func:`selfkd.sd_dropout_head` does of a linear one."""
        kl_weight = arguments.in_range(_OP, "kl_weight", self.kl_weight, "NONNEGATIVE", _LEARNS)
        ignore_index = arguments.integer(_OP, "ignore_index", self.ignore_index)
        _check_rows(features, target, row_weight)
        counted = target != ignore_index
        weight = counted if row_weight is None else row_weight.masked_fill(~counted, 0)
        # Rows that do not count may hold NaN, which would reach the head's parameters.
        skipped = (weight == 0).unsqueeze(1) & ~features.isfinite()
        features = features.masked_fill(skipped, 0)
        rows: dict[str, Any] = {"weight": weight, "reduction": self.reduction, "divisor": divisor}
        views = [features]
        if self.training:
            seed = _seed(features, generator)
            views = list(dropout_views(features, seed, p=self.p).unbind())
        logits, *samples = (_logits(self.head(x), len(x)) for x in views)
        loss: torch.Tensor = distill(  # type: ignore[assignment]
            logits,
            target,
            label_smoothing=self.label_smoothing,
            ignore_index=ignore_index,
            **rows,
        )
        if samples and kl_weight != 0:  # 0 times an infinite divergence would be NaN
            options = {name: getattr(self, name) for name in _OF_KL}
            kl = sd_dropout_kl(samples[0], samples[1], **options, **rows)
            loss = loss + kl_weight * kl
        return logits, loss

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *args: Any, **named: Any
    ) -> None:
        """Take the entries of the head alone too, saved before it was put here."""
        if isinstance(self.head, nn.Module):
            known = set(self.head.state_dict(keep_vars=True))
            found = {key.removeprefix(prefix) for key in state_dict if key.startswith(prefix)}
            if not any(f"head.{name}" in found for name in known):
                for name in known & found:
                    state_dict[f"{prefix}head.{name}"] = state_dict.pop(prefix + name)
        super()._load_from_state_dict(state_dict, prefix, *args, **named)

    def extra_repr(self) -> str:
        return f"p={self.p}, temperature={self.temperature}, kl_weight={self.kl_weight}"
