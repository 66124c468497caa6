"""SD-Dropout: a network learns from two dropout views of its own features.

Trains a small network on scikit-learn's digits with the loss in plain PyTorch and with the fused
loss. Both runs start from one seed: same parameters, batches and dropout masks; only the function
that computes the loss differs.

    h = backbone(images),  z = head(h),  u = head(dropout(h)),  v = head(dropout(h))
    p = softmax(u / T),  q = softmax(v / T)
    loss = CE(z, labels) + weight * T^2 * (KL(p||q) + KL(q||p))

Source: "Self-Knowledge Distillation via Dropout", arXiv 2208.05642. selfkd.nn.SDDropout is the head
and both terms of the loss in one module.

    python examples/sd_dropout.py              both, a table, and a picture in runs/
    python examples/sd_dropout.py --control    and a run with weight 0: what the loss changes
"""

from __future__ import annotations

import sys

import common
import selfkd
import torch
import torch.nn.functional as F

DROPOUT = 0.5
TEMPERATURE = 3.0
IMPLEMENTATIONS = {"fused": selfkd.sd_dropout_kl, "reference": selfkd.reference.sd_dropout_kl}


def train(
    impl: str, *, weight: float = 1.0, steps: int = 400, seed: int = 0, device: str = "cpu"
) -> common.Run:
    """Train a new network with one implementation of the loss, "fused" or "reference"."""
    torch.manual_seed(seed)
    digits = common.Digits(device)
    network = common.Network(digits.classes).to(device)
    backbone, head = network.backbone, network.head
    optimizer = torch.optim.SGD(network.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-4)
    sd_dropout_kl = common.TimedLoss(IMPLEMENTATIONS[impl])
    run = common.Run(impl)
    for images, labels in digits.batches(steps, 128, seed, title=impl):
        h = backbone(images)
        u, v = head(F.dropout(h, DROPOUT)), head(F.dropout(h, DROPOUT))
        loss = F.cross_entropy(head(h), labels)
        loss = loss + weight * sd_dropout_kl(u, v, temperature=TEMPERATURE)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        run.losses.append(loss.item())
    run.accuracy = digits.accuracy(network)
    run.seconds = sd_dropout_kl.seconds
    return run


def main(argv: list[str] | None = None) -> int:
    """Train as the command line says, report, return the exit code."""
    options = common.parse(argv, __doc__, weight=1.0)
    return common.report("SD-Dropout", common.train_all(train, options), options.out)


if __name__ == "__main__":
    sys.exit(main())
