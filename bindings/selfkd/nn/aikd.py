"""AI-KD: the loss of a pre-trained model, the previous epoch and a discriminator."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from .. import arguments
from ..adversarial import adversarial
from ..distill import distill
from .discriminator import in_dtype_of

_LEARNS = "call selfkd.reference.distill, which gives it one"
_WEIGHTS = ("pretrained_weight", "previous_weight", "adversarial_weight")
_TEMPERATURES = ("temperature", "previous_temperature")


def _former_parameters(judge: nn.Module) -> list[tuple[str, torch.Tensor]]:
    """What stands for the parameters in a replica of ``DataParallel``, which has none."""
    return [
        (f"{prefix}.{name}" if prefix else name, x)
        for prefix, module in judge.named_modules()
        for name, x in getattr(module, "_former_parameters", {}).items()
    ]


class AIKDParts(NamedTuple):
    """The weighted terms of :class:`AIKDLoss`, detached: their sum is the loss.

    `previous` is 0 in the first epoch; if it stays 0, ``PreviousEpoch.end_epoch()`` is not called.
    """

    ce: torch.Tensor
    pretrained: torch.Tensor
    previous: torch.Tensor
    adversarial: torch.Tensor


def _logarithms(probs: torch.Tensor, acc: torch.dtype) -> torch.Tensor:
    """Logarithms of the previous probabilities: on the CPU PyTorch is quicker at them than `distill`."""
    if probs.device.type == "cpu" and not torch.compiler.is_compiling() and (probs < 0).any():
        raise ValueError(
            "AIKDLoss: previous_probs has negative values, expected probabilities: what "
            "PreviousEpoch.lookup() returns, or logits.softmax(1)"
        )
    return probs.to(acc).log()


class AIKDLoss(nn.Module):
    r"""Cross-entropy, both distillations and the deceiving of the discriminator.

    .. math::
        CE(z, y) + w_{pre} T^2 KL(q_T \| p_T) + w_{prev} T_p^2 KL(r_{T_p} \| p_{T_p})
        + w_{adv} A(D(z))

    with p the student's distribution of logits z, q the pre-trained model's, r the previous epoch's,
    and A the generator's :func:`selfkd.adversarial` of the discriminator's scores. q and r are detached
    here: the method learns from both and teaches neither.

    Parameters
    ----------
    discriminator
        Scores (N,) of logits (N, C): a :class:`Discriminator` or any other module, also wrapped in
        ``DistributedDataParallel``. A part of this module; give its parameters an optimizer.
    pretrained_weight, previous_weight, adversarial_weight
        w_pre, w_prev, w_adv, finite and >= 0. Plain attributes, which a schedule may set before any
        epoch: ``criterion.previous_weight = 0.5 * sigmoid_rampup(epoch, 80)``.
    temperature, previous_temperature
        T and T_p, finite and > 0.
    mode
        Form of the game: ``"bce"``, ``"hinge"``, ``"lsgan"`` or ``"wgan"``.
    label_smoothing, ignore_index
        Of the cross-entropy, as for :func:`torch.nn.functional.cross_entropy`.

    Notes
    -----
    This follows the abstract of AI-KD (arXiv 2211.10938), whose method section was not available: the
    form of the game, weights, temperatures and schedules are the user's choice, the defaults are
    ours, and no number of the paper is claimed.

    Examples
    --------
    >>> loss, parts = criterion(logits, pretrained_logits, previous.lookup(index), target)
    >>> loss.backward()  # no gradient reaches the discriminator or the pre-trained model
    >>> student_optimizer.step()
    >>> criterion.discriminator_loss(logits, pretrained_logits).backward()  # none reaches the student
    >>> discriminator_optimizer.step()
    """

    def __init__(
        self,
        discriminator: nn.Module,
        *,
        pretrained_weight: float = 1.0,
        previous_weight: float = 1.0,
        adversarial_weight: float = 0.1,
        temperature: float = 4.0,
        previous_temperature: float = 1.0,
        mode: str = "bce",
        label_smoothing: float = 0.0,
        ignore_index: int = -100,
    ) -> None:
        super().__init__()
        if not isinstance(discriminator, nn.Module):
            raise TypeError(
                f"AIKDLoss: discriminator is {arguments.described(discriminator)}, expected a module, such "
                "as selfkd.nn.Discriminator(num_classes)"
            )
        self.discriminator = discriminator
        self.pretrained_weight, self.previous_weight = pretrained_weight, previous_weight
        self.adversarial_weight, self.mode = adversarial_weight, mode
        self.temperature, self.previous_temperature = temperature, previous_temperature
        self.label_smoothing, self.ignore_index = label_smoothing, ignore_index

    @arguments.public("AIKDLoss")
    def forward(
        self,
        logits: torch.Tensor,
        pretrained_logits: torch.Tensor,
        previous_probs: torch.Tensor | None,
        target: torch.Tensor,
    ) -> tuple[torch.Tensor, AIKDParts]:
        """Loss of the student's step, and its parts.

        Parameters
        ----------
        logits, pretrained_logits
            Of the student and of the pre-trained model, (N, C). Only `logits` gets a gradient.
        previous_probs
            What :meth:`PreviousEpoch.lookup` gave, (N, C) probabilities; None in epoch 0.
        target
            Class of each row, (N,) int64. `ignore_index` counts in the other terms all the same.
        """
        weights = [self._number(x, "NONNEGATIVE") for x in _WEIGHTS]
        temperatures = [self._number(x, "POSITIVE") for x in _TEMPERATURES]
        teachers = {"pretrained_logits": pretrained_logits, "previous_probs": previous_probs}
        for name, x in teachers.items():
            if isinstance(x, torch.Tensor):
                arguments.expect_shape("AIKDLoss", name, x, logits.shape)
        loss, ce, pretrained = distill(
            logits,
            target,
            pretrained_logits.detach(),
            teacher_weights=weights[0],
            temperature=temperatures[0],
            label_smoothing=self.label_smoothing,
            ignore_index=self.ignore_index,
            return_parts=True,
        )
        parts = [ce, pretrained]
        if previous_probs is not None and weights[1] != 0:
            previous: Any = distill(
                logits,
                teachers=_logarithms(previous_probs.detach(), loss.dtype),
                teacher_weights=weights[1],
                temperature=temperatures[1],
                teacher_temperature=temperatures[1],
                teacher_kind="log_probs",
            )
            loss = loss + previous
            parts.append(previous.detach())
        else:
            parts.append(torch.zeros_like(ce))
        if weights[2] != 0:
            game = adversarial(self._judge(logits), mode=self.mode, side="generator")
            game = weights[2] * game
            loss = loss + game
            parts.append(game.detach())
        else:
            parts.append(torch.zeros_like(ce))
        return loss, AIKDParts(*parts)

    def _number(self, name: str, rule: str) -> Any:
        """An attribute as a number in its range."""
        return arguments.in_range("AIKDLoss", name, getattr(self, name), rule, _LEARNS)

    @arguments.public("AIKDLoss")
    def discriminator_loss(
        self, logits: torch.Tensor, pretrained_logits: torch.Tensor
    ) -> torch.Tensor:
        """Loss of the discriminator's step: no gradient reaches either model.

        Both kinds go through the discriminator as one batch.
        """
        if logits.shape[1:] != pretrained_logits.shape[1:]:
            rest = "".join(f", {x}" for x in logits.shape[1:])
            raise ValueError(
                f"AIKDLoss: pretrained_logits has shape {tuple(pretrained_logits.shape)}, expected "
                f"(N{rest}) like logits"
            )
        both = torch.cat([pretrained_logits.detach(), logits.detach()])
        judge = self.discriminator
        scores = judge(in_dtype_of(judge, both))
        real, fake = scores.split([len(pretrained_logits), len(logits)])
        return adversarial(real, fake, mode=self.mode)

    def _judge(self, logits: torch.Tensor) -> torch.Tensor:
        """The discriminator's scores, with a gradient to the logits but none to its parameters."""
        judge = self.discriminator
        if isinstance(judge, (DistributedDataParallel, nn.DataParallel)):
            judge = judge.module
        named = list(judge.named_parameters()) or _former_parameters(judge)
        frozen = {name: parameter.detach() for name, parameter in named}
        given = (in_dtype_of(judge, logits),)
        scores: torch.Tensor = torch.func.functional_call(judge, frozen, given)
        return scores

    def extra_repr(self) -> str:
        names = (*_WEIGHTS, *_TEMPERATURES, "mode")
        return ", ".join(f"{name}={getattr(self, name)}" for name in names)
