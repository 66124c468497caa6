"""The losses as layers for ``kernels``: modules without a state, of which only ``forward`` is taken.

Every function of selfkd has a layer of its name, with its arguments. ``kernels.kernelize`` puts their
``forward`` in place of that of the user's own layers, which must take the same arguments; without it a layer
is a module like any other.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from . import arguments
from .contract import modules
from .distill import distill as _distill  # the name is that of its layer here

_OP = "ForCausalLMLoss"

__all__ = ["ForCausalLMLoss", *modules()]


class ForCausalLMLoss(torch.nn.Module):
    """Transformers' loss of causal language models, as :func:`selfkd.distill` without a teacher.

    Logits in half precision are read as they are: there is no copy of them in float32, and their gradient is
    rounded once. ``docs/hub.md`` shows how a model gets it.
    """

    can_torch_compile = True

    @arguments.public(_OP)
    def forward(
        self,
        logits: torch.Tensor,
        labels: torch.Tensor | None,
        vocab_size: int,
        num_items_in_batch: torch.Tensor | int | None = None,
        ignore_index: int = -100,
        shift_labels: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> torch.Tensor:
        """Cross-entropy of each position's logits with the label of the next.

        Parameters
        ----------
        logits
            Shape (..., L, vocab_size), float16, bfloat16, float32 or float64.
        labels
            Class of each position, shape (..., L), int64; those of `ignore_index` do not count.
        vocab_size
            Number of classes.
        num_items_in_batch
            What the sum is divided by, such as the labels of all batches that are accumulated; None: the
            number of labels that count.
        ignore_index
            The label that does not count.
        shift_labels
            The label of the next, in place of `labels`.
        **kwargs
            Whatever else the model was called with: not looked at, as in Transformers.

        Returns
        -------
        torch.Tensor
            0-d, float32, or float64 for float64 logits; nan where no label counts.

        Raises
        ------
        TypeError, ValueError
            As :func:`selfkd.distill`, of which `labels` is the target.
        """
        if logits.shape[-1:] != (vocab_size,):
            raise ValueError(
                f"{_OP}: vocab_size is {vocab_size}, expected the last size of logits, whose shape is"
                f" {tuple(logits.shape)}"
            )
        if shift_labels is None:
            if labels is None:
                raise ValueError(f"{_OP}: labels is None, expected them, or shift_labels")
            shift_labels = F.pad(labels[..., 1:], (0, 1), value=ignore_index)
        loss: torch.Tensor = _distill(  # type: ignore[assignment]
            logits.reshape(-1, vocab_size),
            shift_labels.reshape(-1).to(logits.device),
            ignore_index=ignore_index,
            divisor=num_items_in_batch,
        )
        return loss


def _layer(function: Callable[..., Any]) -> type[torch.nn.Module]:
    """A layer whose ``forward`` is the function, and says so where its arguments are looked at."""

    def forward(self: torch.nn.Module, *args: Any, **named: Any) -> Any:
        return function(*args, **named)

    signature = inspect.signature(function)
    own = inspect.Parameter("self", inspect.Parameter.POSITIONAL_OR_KEYWORD)
    forward.__signature__ = signature.replace(  # type: ignore[attr-defined]
        parameters=[own, *signature.parameters.values()]
    )
    name = function.__name__
    # Code of its own: torch.compile gives up on code that it has compiled for eight functions.
    forward.__code__ = forward.__code__.replace(co_name=f"forward_{name}")
    doc = f":func:`selfkd.{name}` as a layer."
    members = {
        "can_torch_compile": True,
        "forward": forward,
        "__doc__": doc,
        "__module__": __name__,
    }
    return type(name, (torch.nn.Module,), members)


for _name in modules():
    globals()[_name] = _layer(getattr(importlib.import_module(f".{_name}", __package__), _name))
