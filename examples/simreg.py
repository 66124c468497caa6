"""SimReg: a small network learns, without labels, to predict a larger one's features.

Trains a teacher on labelled digits, then a student with half its width and no labels: a head on the
student's features regresses the teacher's, with the loss in plain PyTorch and with the fused loss.
Both runs start from one seed. How good the student's features are is shown by the class of the
nearest neighbour, without its head.

    x = head(student(images)),  t = teacher(images)
    loss = weight * |x/|x| - t/|t||^2

Source: "SimReg", arXiv 2201.05131.

    python examples/simreg.py                              both, a table, and a picture in runs/
    python examples/simreg.py --data ~/cifar --checkpoint simreg.pt --steps 20000
"""

from __future__ import annotations

import functools
import sys

import common
import selfkd
import torch

IMPLEMENTATIONS = {"fused": selfkd.simreg, "reference": selfkd.reference.simreg}


def train(
    impl: str,
    *,
    data: common.Images,
    teacher: common.Network,
    checkpoint: common.Checkpoint,
    weight: float = 1.0,
    steps: int = 400,
    seed: int = 0,
    device: str = "cpu",
) -> common.Run:
    """Train a new student with one implementation of the loss, "fused" or "reference"."""
    torch.manual_seed(seed)
    backbone = common.Network(data.classes, data.images.shape[1]).backbone.to(device)
    head = selfkd.nn.SimRegHead(128, 256).to(device)
    parameters = [*backbone.parameters(), *head.parameters()]
    optimizer = torch.optim.SGD(parameters, lr=0.05, momentum=0.9, weight_decay=1e-4)
    simreg, run = common.TimedLoss(IMPLEMENTATIONS[impl]), common.Run(impl)
    name, curves = f"{impl}, weight {weight}, seed {seed}", [run.losses, simreg.calls]
    done = checkpoint.restore(name, curves, backbone, head, optimizer)
    for images, _ in data.batches(steps, 64, seed, impl, done):
        loss = simreg(head(backbone(images)), teacher.backbone(images))
        optimizer.zero_grad()
        (weight * loss).backward()
        optimizer.step()
        run.losses.append(loss.item())
        checkpoint.after_step(name, curves, backbone, head, optimizer)
    run.accuracy, run.seconds = data.neighbour_accuracy(backbone), simreg.seconds
    return run


def main(argv: list[str] | None = None) -> int:
    """Train as the command line says, report, return the exit code."""
    options = common.parse(argv, __doc__, weight=1.0, long=True)
    each = functools.partial(train, **common.prepare(options, features=256))
    return common.report("SimReg", common.train_all(each, options), options.out)


if __name__ == "__main__":
    sys.exit(main())
