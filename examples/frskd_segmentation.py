"""FRSKD for segmentation: every pixel learns from a self-teacher on the network's own pyramid.

Maps F leave a neck of plain sums (selfkd.nn.BiFPNSeg); the self-teacher is two more such layers, with
maps G, and a head of its own, t. In the first two thirds of training only the cross-entropies count,
which skip pixels of unknown label; then the weight of the rest rises.

    loss = CE(z, y) + CE(t, y) + weight * ramp * (KL(t||z) + beta * sum of |phi(F) - phi(G)|^2)

Source: "Refine Myself by Teaching Myself", arXiv 2103.08273, and its code. beta is 50 there, where the
finest maps have 128 x 128 positions, over which the distance is a mean; here it is in proportion.

    python examples/frskd_segmentation.py                both, a table, and a picture in runs/
    python examples/frskd_segmentation.py --data ~/voc --checkpoint voc.pt --steps 20000
"""

from __future__ import annotations

import functools
import sys

import common
import self_teacher
import selfkd
import torch
from self_teacher import Segmenter, SegmenterTeacher
from selfkd.nn import frskd_rampup

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
    """Train network and self-teacher with one implementation, "fused" or "reference"."""
    torch.manual_seed(seed)
    ops = IMPLEMENTATIONS[impl]
    student = Segmenter(data.classes, data.images.shape[1], ops.bifpn_fuse).to(device)
    teacher = SegmenterTeacher(data.classes, ops.bifpn_fuse).to(device)
    parameters = [*student.parameters(), *teacher.parameters()]
    optimizer = torch.optim.SGD(parameters, lr=0.1, momentum=0.9, weight_decay=5e-4)
    form = {"temperature": 1.0, "ignore_index": self_teacher.IGNORED}
    criterion = common.TimedLoss(functools.partial(self_teacher.loss, ops, **form))
    run, name = common.Run(impl), f"{impl}, weight {weight}, seed {seed}"
    curves = [run.losses, criterion.calls]
    done = checkpoint.restore(name, curves, student, teacher, optimizer)
    for images, labels in data.batches(steps, 16, seed, impl, done):
        step, maps = len(run.losses), student.maps(images)
        refined, t = teacher(maps)
        everything = [student.classify(maps), t, *maps, *(x.detach() for x in refined)]
        ramp = weight * frskd_rampup(step, 2 * steps // 3, steps)
        beta = 50 * maps[0][0, 0].numel() / 128**2
        loss = criterion(*everything, target=labels, alpha=ramp, beta=beta * ramp)
        self_teacher.set_rate(optimizer, step, rise=200, power=4, drop=2 * steps // 3)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        run.losses.append(loss.item())
        checkpoint.after_step(name, curves, student, teacher, optimizer)
    run.accuracy, run.seconds = self_teacher.mean_iou(data, student), criterion.seconds
    return run


def main(argv: list[str] | None = None) -> int:
    """Train as the command line says, report, return the exit code."""
    options = common.parse(argv, __doc__, weight=1.0, long=True)
    prepared = common.prepare(options, large=self_teacher.VOC, small=self_teacher.Canvases)
    runs = common.train_all(functools.partial(train, **prepared), options)
    return common.report("FRSKD segmentation", runs, options.out, "held-out mean IoU")


if __name__ == "__main__":
    sys.exit(main())
