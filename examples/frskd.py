"""FRSKD: a classifier learns from a self-teacher that refines its own feature maps.

The self-teacher sees the maps F of the classifier's stages; its refined maps G and its logits t are what
the classifier learns from. It learns from the labels, and so does the classifier through it. Both
runs start from one seed; "reference" has plain PyTorch in the loss and in the self-teacher's fusions.

    loss = CE(z, y) + CE(t, y) + weight * (2 T^2 KL(t||z) + 100 * sum of |phi(F) - phi(G)|^2), T = 4

Source: "Refine Myself by Teaching Myself", arXiv 2103.08273.

    python examples/frskd.py                             both, a table, and a picture in runs/
    python examples/frskd.py --data ~/cifar --checkpoint frskd.pt --steps 20000
"""

from __future__ import annotations

import functools
import sys

import common
import self_teacher
import selfkd
import torch

IMPLEMENTATIONS = {"fused": selfkd, "reference": selfkd.reference}


def train(
    impl: str,
    *,
    data: common.Images,
    checkpoint: common.Checkpoint,
    weight: float = 1.0,
    steps: int = 400,
    seed: int = 0,
    device: str = "cpu",
) -> common.Run:
    """Train classifier and self-teacher with one implementation, "fused" or "reference"."""
    torch.manual_seed(seed)
    ops = IMPLEMENTATIONS[impl]
    student = self_teacher.Stages(data.classes, data.images.shape[1]).to(device)
    teacher = selfkd.nn.BiFPN(student.widths, data.classes, fuse=ops.bifpn_fuse).to(device)
    parameters = [*student.parameters(), *teacher.parameters()]
    optimizer = torch.optim.SGD(parameters, lr=0.02, momentum=0.9, weight_decay=1e-4)
    form = {"alpha": 2 * weight, "beta": 100 * weight, "temperature": 4.0}
    criterion = common.TimedLoss(functools.partial(self_teacher.loss, ops, **form))
    run, name = common.Run(impl), f"{impl}, weight {weight}, seed {seed}"
    curves = [run.losses, criterion.calls]
    done = checkpoint.restore(name, curves, student, teacher, optimizer)
    for images, labels in data.batches(steps, 64, seed, impl, done):
        maps = student.maps(images)
        refined, t = teacher(maps)
        everything = [student.classify(maps), t, *maps, *(x.detach() for x in refined)]
        loss = criterion(*everything, target=labels)
        self_teacher.set_rate(optimizer, len(run.losses), rise=300)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        run.losses.append(loss.item())
        checkpoint.after_step(name, curves, student, teacher, optimizer)
    run.accuracy, run.seconds = data.accuracy(student), criterion.seconds
    return run


def main(argv: list[str] | None = None) -> int:
    """Train as the command line says, report, return the exit code."""
    options = common.parse(argv, __doc__, weight=1.0, long=True)
    each = functools.partial(train, **common.prepare(options))
    return common.report("FRSKD", common.train_all(each, options), options.out)


if __name__ == "__main__":
    sys.exit(main())
