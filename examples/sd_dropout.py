"""SD-Dropout: a network learns from two dropout views of its own features.

Trains a small network on scikit-learn's digits, once with the loss in plain PyTorch and once with the
fused loss, from the same seed: same parameters, same batches, same dropout masks. Only the
function changes.

    h = backbone(images), z = head(h), u = head(dropout(h)), v = head(dropout(h))
    loss = CE(z, labels) + weight * T^2 * (KL(p||q) + KL(q||p)),  p = softmax(u / T), q = softmax(v / T)

Lee, Park, Seo, Kang: "Self-Knowledge Distillation via Dropout", arXiv 2208.05642. `selfkd.nn.SDDropout`
is the same head and loss as one module.

    python examples/sd_dropout.py                 # both, a table, a picture in runs/
    python examples/sd_dropout.py --control       # and what the loss changes: the same with weight 0
"""

from __future__ import annotations

import sys

import common
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import selfkd

DROPOUT = 0.5
TEMPERATURE = 3.0
LOSSES = {"fused": selfkd.sd_dropout_kl, "reference": selfkd.reference.sd_dropout_kl}


def block(inputs: int, outputs: int, stride: int = 1) -> list[nn.Module]:
    """Return convolution, normalisation and a smooth activation.

    At the kink of a ReLU, the last bit of a loss would decide between two different runs.
    """
    convolution = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
    return [convolution, nn.BatchNorm2d(outputs), nn.SiLU()]


class Network(nn.Module):
    """Backbone of three convolutions, global average pooling, one linear layer."""

    def __init__(self, classes: int, width: int = 128) -> None:
        super().__init__()
        self.backbone = nn.Sequential(
            *block(1, 32),
            *block(32, 64, stride=2),
            *block(64, width),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
        )
        self.head = nn.Linear(width, classes)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.backbone(images))


def train(
    impl: str, *, weight: float = 1.0, steps: int = 400, seed: int = 0, device: str = "cpu"
) -> common.Run:
    """Train the network with one implementation of the loss.

    Parameters
    ----------
    impl
        "fused" or "reference".
    weight
        Weight of the SD-Dropout loss; 0 trains with cross-entropy alone.
    steps
        Training steps of 128 images.
    seed
        Seed of parameters, batches and dropout masks.
    device
        Device to train on.
    """
    torch.manual_seed(seed)
    digits = common.Digits(device)
    network = Network(digits.classes).to(device)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-4)
    sd_dropout_kl = common.TimedLoss(LOSSES[impl])
    run = common.Run(impl)
    for images, labels in digits.batches(steps, 128, seed, title=impl):
        h = network.backbone(images)
        z, u, v = network.head(h), network.head(F.dropout(h, DROPOUT)), network.head(F.dropout(h, DROPOUT))
        loss = F.cross_entropy(z, labels) + weight * sd_dropout_kl(u, v, temperature=TEMPERATURE)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        run.losses.append(loss.item())
    run.accuracy = digits.accuracy(network)
    run.loss_seconds = sd_dropout_kl.seconds()
    return run


def main(argv: list[str] | None = None) -> int:
    """Train as the command line says and report."""
    options = common.parse(argv, __doc__, weight=1.0, steps=400)
    return common.report("SD-Dropout", common.train_all(train, options), options.out)


if __name__ == "__main__":
    sys.exit(main())
