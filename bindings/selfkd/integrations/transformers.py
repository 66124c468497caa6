"""Hugging Face Transformers: distillation in a ``Trainer``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F

from ..distill import distill

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


class DistillMixin:
    """A ``transformers.Trainer`` whose loss is :func:`selfkd.distill` from a teacher.

    Put it before the trainer's class. The Trainer divides as for its own losses: by the number of
    labels of all batches that are accumulated, on all devices. Positions whose label is -100 count in
    neither term. The loss of evaluation is the same.

    Parameters
    ----------
    *args, **kwargs
        Those of the trainer, but for ``compute_loss_func``. ``TrainingArguments.label_smoothing_factor``
        holds for the cross-entropy.
    teacher
        Model that takes the student's inputs and returns logits of the same shape; moved to the
        student's device, in evaluation mode, and given no gradient.
    teacher_weight, temperature, ce_weight
        a, T and w_ce in w_ce CE + a T^2 KL(teacher || student).
    shift_labels
        Whether a position predicts the label of the next. None: as the model's own loss, which is so
        for causal language models.

    Examples
    --------
    >>> class DistillTrainer(DistillMixin, transformers.Trainer):
    ...     pass
    >>> DistillTrainer(student, arguments, train_dataset=data, teacher=teacher, temperature=2.0).train()
    """

    def __init__(
        self,
        *args: Any,
        teacher: torch.nn.Module,
        teacher_weight: float = 1.0,
        temperature: float = 4.0,
        ce_weight: float = 1.0,
        shift_labels: bool | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, compute_loss_func=self._distill, **kwargs)  # type: ignore[call-arg]
        self.teacher = teacher.to(self.args.device).eval()  # type: ignore[attr-defined]
        self.teacher_weight, self.temperature, self.ce_weight = (
            teacher_weight,
            temperature,
            ce_weight,
        )
        if shift_labels is None:
            shift_labels = _predicts_the_next(self.model)  # type: ignore[attr-defined]
        self.shift_labels = shift_labels

    def compute_loss(
        self, model: torch.nn.Module, inputs: Mapping[str, Any], *args: Any, **kwargs: Any
    ) -> Any:
        """The trainer's own, once the teacher has seen the inputs."""
        with torch.no_grad():
            given = {name: value for name, value in inputs.items() if name != "labels"}
            self._teacher_logits = self.teacher(**given).logits
        try:
            return super().compute_loss(model, inputs, *args, **kwargs)  # type: ignore[misc]
        finally:
            del self._teacher_logits  # the graph keeps what backward needs

    def _distill(
        self,
        outputs: Any,
        labels: torch.Tensor,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> torch.Tensor:
        if self.shift_labels:  # and not the logits, which are read in place
            labels = F.pad(labels[..., 1:], (0, 1), value=IGNORED)
        loss: torch.Tensor = distill(  # type: ignore[assignment]
            outputs.logits,
            labels,
            self._teacher_logits,
            teacher_weights=self.teacher_weight,
            temperature=self.temperature,
            ce_weight=self.ce_weight,
            label_smoothing=self.args.label_smoothing_factor,  # type: ignore[attr-defined]
            ignore_index=IGNORED,
            mask_teachers=True,
            divisor=num_items_in_batch,
            dim=-1,
        )
        return loss
