"""AI-KD's discriminator, which scores predictive distributions."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import nn

from .. import arguments


def _dtype_of(judge: nn.Module) -> torch.dtype | None:
    """The dtype of the first floating parameter. ``judge.parameters()`` takes five times as long."""
    for x in (judge._parameters or getattr(judge, "_former_parameters", {})).values():
        if x is not None and x.is_floating_point():
            return x.dtype
    for module in judge._modules.values():
        if module is not None and (found := _dtype_of(module)):
            return found
    return None


def in_dtype_of(judge: nn.Module, logits: torch.Tensor) -> torch.Tensor:
    """Logits in the dtype that a discriminator computes in; autocast sees to it, but not of float64."""
    dtype = _dtype_of(judge)
    if dtype in (None, logits.dtype):
        return logits
    if logits.dtype != torch.float64 and arguments.under_autocast(logits):
        return logits
    return logits.to(dtype)


class Discriminator(nn.Module):
    """Scores predictive distributions: an MLP on softmax(logits / temperature).

    Parameters
    ----------
    num_classes
        C, the width of its input.
    hidden
        Widths of the hidden layers, any number of them.
    activation
        Makes the activation after each hidden layer.
    normalization
        Makes the normalisation before each activation from the layer's width, for example
        ``nn.LayerNorm``; None: none. (Batch normalisation sees both kinds of distributions in the
        discriminator's step and only the student's in the student's.)
    temperature
        T of the softmax, finite and > 0.

    Notes
    -----
    The defaults are ours: the paper's discriminator is not known (see :class:`AIKDLoss`).
    """

    def __init__(
        self,
        num_classes: int,
        hidden: Sequence[int] = (256, 256),
        *,
        activation: Callable[[], nn.Module] = lambda: nn.LeakyReLU(0.2),
        normalization: Callable[[int], nn.Module] | None = None,
        temperature: float = 1.0,
    ) -> None:
        super().__init__()
        arguments.at_least("Discriminator", "num_classes", num_classes, 1)
        arguments.require("Discriminator", "hidden", hidden, "Sequence[int]")
        for k, wide in enumerate(hidden):
            arguments.at_least("Discriminator", f"hidden[{k}]", wide, 1)
        for name, made in (("activation", activation), ("normalization", normalization)):
            if not callable(made) and (made is not None or name == "activation"):
                raise TypeError(
                    f"Discriminator: {name} is {arguments.described(made)}, expected a function that makes a "
                    "module, such as nn.ReLU"
                )
        way = "leave it to a layer"
        temperature = arguments.in_range(
            "Discriminator", "temperature", temperature, "POSITIVE", way
        )
        self.num_classes, self.temperature = num_classes, temperature
        layers: list[nn.Module] = []
        width = num_classes
        for wide in hidden:
            layers.append(nn.Linear(width, wide))
            if normalization is not None:
                layers.append(normalization(wide))
            layers.append(activation())
            width = wide
        self.layers = nn.Sequential(*layers, nn.Linear(width, 1))

    @arguments.public("Discriminator")
    def forward(self, logits: torch.Tensor) -> torch.Tensor:
        """Scores (N,) of logits (N, C): high where the pre-trained model is taken for their source."""
        if logits.ndim != 2 or logits.shape[1] != self.num_classes:
            raise ValueError(
                f"Discriminator: logits has shape {tuple(logits.shape)}, "
                f"expected (N, {self.num_classes})"
            )
        logits = in_dtype_of(self, logits)
        if self.temperature != 1:
            logits = logits / self.temperature
        scores: torch.Tensor = self.layers(torch.softmax(logits, 1))
        return scores.squeeze(1)

    def extra_repr(self) -> str:
        return f"temperature={self.temperature}"
