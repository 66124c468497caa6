"""Data parallelism: a network learns from its own previous epoch, on one process or on several.

Each process takes its rows of the same batches, so that any number of processes gives the same curve:

    loss = (sum of CE + weight * KL(r||p) over all rows) / (number of all rows)

with r the student's own probabilities, an epoch ago (PS-KD, arXiv 2006.12000). DistributedDataParallel
averages gradients over processes, which may have different numbers of rows: `divisor` is the number of
all rows over that of processes. selfkd.nn.PreviousEpoch gathers what each process has seen.

    torchrun --standalone --nproc-per-node 1 examples/ddp.py --out runs/one
    torchrun --standalone --nproc-per-node 2 examples/ddp.py --out runs/two    NCCL on GPUs, else gloo
"""

from __future__ import annotations

import contextlib
import os
import sys

import common
import selfkd
import torch
import torch.distributed as dist
from selfkd.nn import PreviousEpoch, sigmoid_rampup
from torch import nn
from torch.nn.parallel import DistributedDataParallel

IMPLEMENTATIONS = {"fused": selfkd.distill, "reference": selfkd.reference.distill}


def network_of(classes: int) -> common.Network:
    """Return a new network whose normalisation does not depend on the other rows of a batch."""
    network = common.Network(classes)
    for k, layer in enumerate(network.backbone):
        if isinstance(layer, nn.BatchNorm2d):
            network.backbone[k] = nn.GroupNorm(8, layer.num_features)
    return network


def train(
    impl: str, *, weight: float = 1.0, steps: int = 400, seed: int = 0, device: str = "cpu"
) -> common.Run:
    """Train a new network with one implementation of the loss, "fused" or "reference"."""
    torch.manual_seed(seed)
    rank, processes = dist.get_rank(), dist.get_world_size()
    digits = common.Digits(device)
    network = network_of(digits.classes).to(device)
    student = DistributedDataParallel(network)
    previous = PreviousEpoch(len(digits.labels), digits.classes, dtype=torch.float32).to(device)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-4)
    distill = common.TimedLoss(IMPLEMENTATIONS[impl])
    run = common.Run(impl)
    for ends, *batch in digits.epochs(steps, 128, seed, title=impl):
        index, images, labels = (x[rank::processes] for x in batch)
        rows = torch.tensor(float(len(index)), device=device)
        dist.all_reduce(rows)
        z, r = student(images), previous.lookup(index)
        loss = distill(
            z,
            target=labels,
            teachers=[] if r is None else [r],
            teacher_weights=weight * sigmoid_rampup(previous.epochs, 10),
            temperature=1.0,
            teacher_kind="probs",
            divisor=rows / processes,
        )
        previous.update(index, z)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        mean = loss.detach() / processes
        dist.all_reduce(mean)
        run.losses.append(mean.item())
        if ends:
            previous.end_epoch()
    run.accuracy = digits.accuracy(network)
    run.seconds = distill.seconds
    return run


def main(argv: list[str] | None = None) -> int:
    """Train as the command line says; the first process reports and returns the exit code."""
    options = common.parse(argv, __doc__, weight=1.0)
    if "RANK" not in os.environ:
        sys.exit("start it by torchrun: torchrun --standalone --nproc-per-node 2 examples/ddp.py")
    if options.device == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl" if options.device == "cuda" else "gloo")
    try:
        if dist.get_rank() == 0:
            return common.report("DDP", common.train_all(train, options), options.out)
        with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
            common.train_all(train, options)
        return 0
    finally:
        dist.destroy_process_group()


if __name__ == "__main__":
    sys.exit(main())
