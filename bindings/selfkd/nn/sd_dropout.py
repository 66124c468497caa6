"""SD-Dropout: a linear head with its loss."""

from __future__ import annotations

import torch
from torch import nn

from ..sd_dropout_head import sd_dropout_head


class SDDropout(nn.Module):
    """A linear head trained with SD-Dropout: :func:`selfkd.sd_dropout_head` as a module.

    The loss is ``F.cross_entropy(head(h), target) + kl_weight * sd_dropout_kl(u, v)``, where u and
    v are the head's logits of two dropout samples of the features h.

    Parameters
    ----------
    head
        The classifier, (K features -> C classes). Registered here, so its parameters are this
        module's.
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

    Notes
    -----
    Source: arXiv 2208.05642 and its authors' code. The cross-entropy sees the features
    without dropout.
    """

    def __init__(
        self,
        head: nn.Linear,
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
        if not 0 <= p < 1:
            raise ValueError(f"SDDropout: p is {p:g}, expected a number in [0, 1)")
        self.head = head
        self.p, self.temperature, self.kl_weight = p, temperature, kl_weight
        self.forward_weight, self.reverse_weight, self.detach_target = (
            forward_weight,
            reverse_weight,
            detach_target,
        )
        self.label_smoothing, self.ignore_index = label_smoothing, ignore_index
        self.reduction, self.chunk_bytes = reduction, chunk_bytes

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
        """Logits and loss in training mode, logits in evaluation mode.

        Parameters
        ----------
        features
            Pooled features, (N, K).
        target
            Class of each row, (N,) int64; needed in training mode.
        return_logits
            Return the logits without dropout, detached, beside the loss (else None in their place).
        row_weight, divisor, generator
            As for :func:`selfkd.sd_dropout_head`.
        """
        if not self.training:
            logits: torch.Tensor = self.head(features)
            return logits
        if target is None:
            raise ValueError(
                "SDDropout: target is None, expected the class of each row in training mode"
            )
        found = sd_dropout_head(
            features,
            self.head.weight,
            self.head.bias,
            target,
            p=self.p,
            temperature=self.temperature,
            kl_weight=self.kl_weight,
            forward_weight=self.forward_weight,
            reverse_weight=self.reverse_weight,
            detach_target=self.detach_target,
            label_smoothing=self.label_smoothing,
            ignore_index=self.ignore_index,
            row_weight=row_weight,
            reduction=self.reduction,
            divisor=divisor,
            generator=generator,
            chunk_bytes=self.chunk_bytes,
            return_logits=return_logits,
        )
        if isinstance(found, torch.Tensor):
            return None, found
        loss, logits = found
        return logits, loss

    def extra_repr(self) -> str:
        return f"p={self.p}, temperature={self.temperature}, kl_weight={self.kl_weight}"
