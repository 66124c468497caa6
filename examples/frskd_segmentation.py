"""FRSKD for segmentation: every pixel learns from a self-teacher on the network's own pyramid.

Six maps F go through a neck of plain sums (selfkd.nn.PlainBiFPN); the self-teacher is two more such
layers, with maps G and a head of its own, t. Only the cross-entropies, which skip pixels of unknown
label, count in the first two thirds of training; then the weight of the rest rises.

    loss = CE(z, y) + CE(t, y) + weight * ramp * (KL(t||z) + 50 * sum of |phi(F) - phi(G)|^2)

Source: "Refine Myself by Teaching Myself", arXiv 2103.08273, and its code.

    python examples/frskd_segmentation.py                both, a table, and a picture in runs/
    python examples/frskd_segmentation.py --data ~/voc --checkpoint voc.pt --steps 20000
"""

from __future__ import annotations

import functools
import sys

import common
import selfkd
import torch
from selfkd.nn import PlainBiFPN, frskd_rampup

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
    ops, size = IMPLEMENTATIONS[impl], (common.Segmenter.width, common.Segmenter.levels)
    neck = PlainBiFPN(*size, fuse=ops.bifpn_fuse)
    student = common.Segmenter(neck, data.classes, data.images.shape[1])
    refine = PlainBiFPN(*size, repeat=2, bottom_up=False, fuse=ops.bifpn_fuse)
    head = student.make_head(data.classes)
    modules = torch.nn.ModuleList([student, refine, head]).to(device)
    optimizer = torch.optim.SGD(modules.parameters(), lr=0.02, momentum=0.9, weight_decay=5e-4)
    form = {"temperature": 1.0, "ignore_index": common.IGNORED}
    criterion = common.TimedLoss(functools.partial(common.frskd, ops, **form))
    run, name = common.Run(impl), f"{impl}, weight {weight}, seed {seed}"
    curves = [run.losses, criterion.calls]
    done = checkpoint.restore(name, curves, modules, optimizer)
    for images, labels in data.batches(steps, 16, seed, impl, done):
        step, maps = len(run.losses), student.maps(images)
        refined, ramp = refine(maps), weight * frskd_rampup(step, 2 * steps // 3, steps)
        everything = [
            student.head(maps[0]),
            head(refined[0]),
            *maps,
            *(x.detach() for x in refined),
        ]
        loss = criterion(*everything, target=labels, alpha=ramp, beta=50 * ramp)
        common.warm_up(optimizer, step)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        run.losses.append(loss.item())
        if len(run.losses) % 100 == 0:
            checkpoint.save(name, curves, modules, optimizer)
    run.accuracy, run.seconds = data.mean_iou(student), criterion.seconds
    return run


def main(argv: list[str] | None = None) -> int:
    """Train as the command line says, report, return the exit code."""
    options = common.parse(argv, __doc__, weight=1.0, long=True)
    each = functools.partial(train, **common.prepare(options, segmentation=True))
    runs = common.train_all(each, options)
    return common.report("FRSKD segmentation", runs, options.out, score="held-out mean IoU")


if __name__ == "__main__":
    sys.exit(main())
