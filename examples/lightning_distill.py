"""Distillation in Lightning: a small network learns from labels and from a larger network.

Trains a teacher on digits, then a student with Lightning's Trainer, with the loss in plain PyTorch
and with the fused loss. Both runs start from one seed.

    loss = CE(z, y) + weight * T^2 KL(softmax(t/T) || softmax(z/T)),  z = student(x), t = teacher(x)

Source: Hinton, Vinyals, Dean, arXiv 1503.02531.

    python examples/lightning_distill.py
"""

from __future__ import annotations

import sys

import common
import selfkd
import torch
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

try:
    import lightning
except ModuleNotFoundError as error:
    sys.exit(f"{error}; this example needs: pip install lightning")

IMPLEMENTATIONS = {"fused": selfkd.distill, "reference": selfkd.reference.distill}


class Distillation(lightning.LightningModule):
    """A student in training; `distill` is :func:`selfkd.distill` or does the same."""

    def __init__(self, teacher: common.Network, distill: common.TimedLoss, weight: float) -> None:
        super().__init__()
        self.student = common.Network(common.Digits.classes, features=32)
        self.teacher, self.distill, self.weight = teacher, distill, weight
        self.losses: list[float] = []

    def training_step(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        images, labels = batch
        with torch.no_grad():
            teacher = self.teacher.eval()(images)
        loss = self.distill(
            self.student(images), labels, teacher, teacher_weights=self.weight, temperature=4.0
        )
        self.losses.append(loss.item())
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.student.parameters(), lr=0.05, momentum=0.9)


def main(argv: list[str] | None = None) -> int:
    """Train as the command line says, report, return the exit code."""
    options = common.parse(argv, __doc__, weight=1.0)
    torch.set_num_threads(options.threads)
    data = common.Digits(options.device)
    teacher = common.train_teacher(data, options.steps, common.Checkpoint(None), features=128)

    def train(impl: str, *, weight: float, steps: int, seed: int, device: str) -> common.Run:
        lightning.seed_everything(seed)
        distill = common.TimedLoss(IMPLEMENTATIONS[impl])
        module = Distillation(teacher, distill, weight)
        trainer = lightning.Trainer(
            accelerator="gpu" if device.startswith("cuda") else "cpu",
            devices=1,
            max_steps=steps,
            logger=False,
            enable_checkpointing=False,
            enable_model_summary=False,
        )
        batches = DataLoader(TensorDataset(data.images, data.labels), batch_size=64, shuffle=True)
        trainer.fit(module, batches)
        accuracy = data.accuracy(module.student.to(device))
        return common.Run(impl, module.losses, accuracy, distill.seconds)

    return common.report("Lightning", common.train_all(train, options), options.out)


if __name__ == "__main__":
    sys.exit(main())
