"""AI-KD: a network learns from a pre-trained one, from its own previous epoch, and in a game.

A discriminator learns to tell the pre-trained network's distribution q from the student's p, and the
student to deceive it; r is the student's own, an epoch ago. Both runs start from one seed.

    loss = CE + weight * (T^2 KL(q||p) + ramp * KL(r||p) + softplus(-judge(p)) / 10)

After the abstract of arXiv 2211.10938, whose method section was not available: the form of the game
and all numbers are ours. selfkd.nn.AIKDLoss is the whole loss in one module.

    python examples/aikd.py                              both, a table, and a picture in runs/
    python examples/aikd.py --data ~/cifar --checkpoint aikd.pt --steps 20000
"""

from __future__ import annotations

import functools
import sys

import common
import selfkd
import torch
from selfkd.nn import AIKDLoss, Discriminator, PreviousEpoch, sigmoid_rampup

IMPLEMENTATIONS = {"fused": selfkd, "reference": selfkd.reference}
SGD = functools.partial(torch.optim.SGD, lr=0.05, momentum=0.9, weight_decay=1e-4)


def train(
    impl: str,
    data: common.Images,
    teacher: common.Network,
    checkpoint: common.Checkpoint,
    *,
    weight: float = 1.0,
    steps: int = 400,
    seed: int = 0,
    device: str = "cpu",
) -> common.Run:
    """Train a new student with one implementation of the loss, "fused" or "reference"."""
    torch.manual_seed(seed)
    student = common.Network(data.classes, data.images.shape[1]).to(device)
    judge = Discriminator(data.classes, (64,), activation=torch.nn.SiLU).to(device)
    previous = PreviousEpoch(len(data.labels), data.classes).to(device)
    game, optimizers = AIKDLoss(judge), [SGD(x.parameters()) for x in (student, judge)]
    distill = common.TimedLoss(IMPLEMENTATIONS[impl].distill)
    deceive = common.TimedLoss(IMPLEMENTATIONS[impl].adversarial)
    run, name = common.Run(impl), f"{impl}, weight {weight}, seed {seed}"
    curves, parts = [run.losses, distill.calls, deceive.calls], [student, judge, previous]
    done = checkpoint.restore(name, curves, *parts, *optimizers)
    for ends, index, images, labels in data.epochs(steps, 128, seed, impl, done):
        z, q, r = student(images), teacher(images), previous.lookup(index)
        n = 1 if r is None else 2  # teachers
        weights = [weight, weight * sigmoid_rampup(previous.epochs, 10)][:n]
        soft = {"temperature": [4.0, 1.0][:n], "teacher_kind": ["logits", "probs"][:n]}
        loss = distill(z, target=labels, teachers=[q, r][:n], teacher_weights=weights, **soft)
        loss = loss + 0.1 * weight * deceive(judge(z), side="generator")
        previous.update(index, z)
        for objective, sgd in zip((loss, game.discriminator_loss(z, q)), optimizers, strict=True):
            sgd.zero_grad()
            objective.backward()
            sgd.step()
        run.losses.append(loss.item())
        if ends:
            previous.end_epoch()
            checkpoint.save(name, curves, *parts, *optimizers)
    run.accuracy = data.accuracy(student)
    run.seconds = [a + b for a, b in zip(distill.seconds, deceive.seconds, strict=True)]
    return run


def main(argv: list[str] | None = None) -> int:
    """Train as the command line says, report, return the exit code."""
    options = common.parse(argv, __doc__, weight=1.0, long=True)
    each = functools.partial(train, **common.prepare(options, features=128))
    return common.report("AI-KD", common.train_all(each, options), options.out)


if __name__ == "__main__":
    sys.exit(main())
