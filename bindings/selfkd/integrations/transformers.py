"""Hugging Face Transformers: distillation in a ``Trainer``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F

from .. import arguments
from ..distill import distill
from . import _shared

__all__ = ["DistillMixin"]

_OP = "DistillMixin"
_WAY = "call selfkd.reference.distill, which gives it one, in a compute_loss_func of your own"
IGNORED = -100  # the label that transformers' losses leave out


def _predicts_the_next(model: Any) -> bool:
    """Whether the model's own loss compares a position with the label of the next."""
    from transformers.loss.loss_utils import LOSS_MAPPING, ForCausalLMLoss
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as CAUSAL

    if hasattr(model, "get_base_model"):  # adapters of peft
        model = model.get_base_model()
    if getattr(model.config, "is_encoder_decoder", False):
        return False
    by_loss = LOSS_MAPPING.get(getattr(model, "loss_type", None)) is ForCausalLMLoss
    return by_loss or type(model).__name__ in CAUSAL.values()


def _logits(whose: str, outputs: Any) -> torch.Tensor:
    """The logits of a model's output."""
    logits = getattr(outputs, "logits", None)
    if not isinstance(logits, torch.Tensor):
        found = f"{arguments.described(outputs)} without logits"
        raise TypeError(
            f"{_OP}: the {whose}'s output is {found}, expected one with a tensor of logits"
        )
    return logits


class DistillMixin:
    """A ``transformers.Trainer`` whose loss distils a teacher: :func:`selfkd.distill`, or its relatives.

    Put it before the trainer's class. The Trainer divides as for its own losses: by the number of
    labels of all batches that are accumulated, on all devices. Positions whose label is -100 count in
    neither term. The loss of evaluation is the same. Without labels, which needs ``ce_weight=0``, the loss is
    the teacher's term, the mean over all positions.

    Parameters
    ----------
    *args, **kwargs
        Those of the trainer, but for ``compute_loss_func``. ``TrainingArguments.label_smoothing_factor``
        holds for the cross-entropy.
    teacher
        Model that takes the student's inputs and returns logits of the same shape; moved to the
        student's device, in evaluation mode, and given no gradient.
    teacher_weight, temperature, ce_weight
        a, T and w_ce in w_ce CE + a T^2 KL(teacher || student): numbers, which get no gradient.
    beta
        What the teacher weighs in the mixture, 0 to 1: 0 is KL(teacher || student), 1 the reverse; between
        them lies the generalised Jensen-Shannon divergence (:func:`selfkd.js_divergence`).
    top_k
        Of how many classes of the teacher, the likeliest ones, the divergence is taken; the others are one
        more class (:func:`selfkd.topk_divergence`). None: of all.
    shift_labels
        Whether a position predicts the label of the next. None: as the model's own loss, which is so
        for causal language models.

    Raises
    ------
    TypeError, ValueError
        An argument is not what it must be; in training, labels are absent, or a model's output has no logits,
        or student and teacher have logits of other shapes.

    Examples
    --------
    >>> class DistillTrainer(DistillMixin, transformers.Trainer):
    ...     pass
    >>> DistillTrainer(student, arguments, train_dataset=data, teacher=teacher, temperature=2.0).train()
    """

    teacher_weight: float
    temperature: float
    ce_weight: float
    beta: float

    def __init__(
        self,
        *args: Any,
        teacher: torch.nn.Module,
        teacher_weight: float = 1.0,
        temperature: float = 4.0,
        ce_weight: float = 1.0,
        beta: float = 0.0,
        top_k: int | None = None,
        shift_labels: bool | None = None,
        **kwargs: Any,
    ) -> None:
        if not isinstance(teacher, torch.nn.Module):
            raise TypeError(f"{_OP}: teacher is {arguments.described(teacher)}, expected a module")
        given = {
            "teacher_weight": teacher_weight,
            "temperature": temperature,
            "ce_weight": ce_weight,
            "beta": beta,
        }
        rules = {"temperature": "POSITIVE", "beta": "FRACTION"}
        for name, value in given.items():
            rule = rules.get(name, "NONNEGATIVE")
            setattr(self, name, arguments.in_range(_OP, name, value, rule, _WAY))
        self.top_k = None if top_k is None else arguments.at_least(_OP, "top_k", top_k, 1)
        super().__init__(*args, compute_loss_func=self._distill, **kwargs)  # type: ignore[call-arg]
        self.teacher = teacher.to(self.args.device).eval()  # type: ignore[attr-defined]
        if shift_labels is None:
            shift_labels = _predicts_the_next(self.model)  # type: ignore[attr-defined]
        self.shift_labels = arguments.flag(_OP, "shift_labels", shift_labels)

    def compute_loss(
        self, model: torch.nn.Module, inputs: Mapping[str, Any], *args: Any, **kwargs: Any
    ) -> Any:
        """The trainer's own, once the teacher has seen the inputs."""
        with torch.no_grad():
            given = {name: value for name, value in inputs.items() if name != "labels"}
            self._teacher_logits = _logits("teacher", self.teacher(**given))
        try:
            return super().compute_loss(model, inputs, *args, **kwargs)  # type: ignore[misc]
        finally:
            del self._teacher_logits  # the graph keeps what backward needs

    def _check(self, outputs: Any, labels: Any, num_items_in_batch: Any = None) -> None:
        names = "the student's logits", "the teacher's logits"
        _shared.check_logits(_OP, names, _logits("student", outputs), self._teacher_logits)
        arguments.tensor(_OP, "labels", labels, optional=True)

    @_shared.explained(_check)
    def _distill(
        self,
        outputs: Any,
        labels: torch.Tensor | None,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> torch.Tensor:
        if labels is None and self.ce_weight != 0:
            raise ValueError(
                f"{_OP}: labels is None, expected a tensor, or ce_weight=0 to train without labels"
            )
        if labels is not None and self.shift_labels:  # the logits are read in place
            labels = F.pad(labels[..., 1:], (0, 1), value=IGNORED)
        of_labels = {
            "label_smoothing": self.args.label_smoothing_factor,  # type: ignore[attr-defined]
            "ignore_index": IGNORED,
            "divisor": num_items_in_batch,
            "dim": -1,
        }
        loss: torch.Tensor
        if self.beta == 0 and self.top_k is None:
            loss = distill(  # type: ignore[assignment]
                outputs.logits,
                labels,
                self._teacher_logits,
                teacher_weights=self.teacher_weight,
                temperature=self.temperature,
                ce_weight=self.ce_weight,
                mask_teachers=labels is not None,
                **of_labels,
            )
            return loss
        loss = self._soft(outputs.logits, labels, num_items_in_batch)
        if self.ce_weight:
            loss += distill(outputs.logits, labels, ce_weight=self.ce_weight, **of_labels)  # type: ignore[arg-type]
        return loss

    def _soft(self, logits: torch.Tensor, labels: Any, count: Any) -> torch.Tensor:
        """The teacher's term, where it is no KL divergence of all classes."""
        options: dict[str, Any] = {
            "beta": self.beta,
            "temperature": self.temperature,
            "weight": None if labels is None else labels != IGNORED,
            "divisor": count,
            "dim": -1,
        }
        if self.top_k is None:
            divergence = _shared.js(logits, self._teacher_logits, **options)
        else:
            divergence = _shared.top_k(logits, self._teacher_logits, self.top_k, **options)
        return self.teacher_weight * self.temperature**2 * divergence
