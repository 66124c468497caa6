"""What is timed: every operator's cases, and the code a good user would write without selfkd.

A baseline uses what PyTorch offers and nothing of selfkd. Where two forms are natural both are
timed, and the faster counts. A new operator adds its baselines, and its cases to `CASES`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial

import selfkd
import torch
import torch.nn.functional as F
from torch import Tensor

Loss = Callable[..., Tensor]

# glibc gives blocks over 32 MB back on every free, so that each step pays for fresh pages. This
# setting keeps freed memory in the process, for every contender.
KEEP_MEMORY = {
    "GLIBC_TUNABLES": "glibc.malloc.mmap_max=0:"
    "glibc.malloc.trim_threshold=17179869184:"
    "glibc.malloc.top_pad=268435456"
}


@dataclass(frozen=True)
class Case:
    """One shape of one operator.

    Attributes
    ----------
    name
        "operator shape".
    fused, reference
        The function timed, and the one that, in float64, says what is right.
    baselines
        The same function in plain PyTorch, by the name of the form.
    inputs
        Makes the inputs, float32.
    learning
        How many of them, the first ones, get gradients.
    bytes_moved
        The least a fused forward and backward can read and write.
    grad
        Makes the gradient that comes in, where the result is a map.
    part
        A call of selfkd that does a part of the same, timed beside it.
    need
        What the ratios must be: at least, against "eager" and "compile"; at most, against "copy" and
        "part".
    environment
        Environment variables of the process that runs the case.
    """

    name: str
    fused: Loss
    reference: Loss
    baselines: Mapping[str, Loss]
    inputs: Callable[[], list[Tensor]]
    learning: int
    bytes_moved: int
    need: Mapping[str, float] = field(default_factory=dict)
    environment: Mapping[str, str] = field(default_factory=dict)
    part: Loss | None = None
    grad: Callable[[], Tensor] | None = None


def kl_of_log_targets(u: Tensor, v: Tensor) -> Tensor:
    """SD-Dropout loss of logits (N, C, ...), T = 3, from log-probabilities only."""
    log_p, log_q = F.log_softmax(u / 3, 1), F.log_softmax(v / 3, 1)
    forward = F.kl_div(log_q, log_p, reduction="sum", log_target=True)
    reverse = F.kl_div(log_p, log_q, reduction="sum", log_target=True)
    return 3 * 3 * (forward + reverse) / (u.numel() // u.shape[1])


def kl_of_probabilities(u: Tensor, v: Tensor) -> Tensor:
    """SD-Dropout loss of logits (N, C, ...), T = 3, in the form of the authors' code."""
    forward = F.kl_div(F.log_softmax(v / 3, 1), F.softmax(u / 3, 1), reduction="sum")
    reverse = F.kl_div(F.log_softmax(u / 3, 1), F.softmax(v / 3, 1), reduction="sum")
    return 3 * 3 * (forward + reverse) / (u.numel() // u.shape[1])


def sd_dropout_kl(*shape: int, **need: float) -> Case:
    """Logits 3 * randn. Forward reads both; backward reads both and writes two gradients."""
    return Case(
        name=f"sd_dropout_kl {'x'.join(map(str, shape))}",
        fused=selfkd.sd_dropout_kl,
        reference=selfkd.reference.sd_dropout_kl,
        baselines={"log_target": kl_of_log_targets, "probabilities": kl_of_probabilities},
        inputs=lambda: [3 * torch.randn(shape) for _ in range(2)],
        learning=2,
        bytes_moved=6 * math.prod(shape) * 4,
        need=need,
    )


def bce_with_logits(real: Tensor, fake: Tensor) -> Tensor:
    """Discriminator's loss as it is usually written."""
    one, zero = torch.ones_like(real), torch.zeros_like(fake)
    bce = F.binary_cross_entropy_with_logits
    return bce(real, one) + bce(fake, zero)


def softplus_of_scores(real: Tensor, fake: Tensor) -> Tensor:
    """Discriminator's loss without targets."""
    return F.softplus(-real).mean() + F.softplus(fake).mean()


def adversarial(*shape: int, **need: float) -> Case:
    """Scores 3 * randn. Forward reads both; backward reads both and writes two gradients."""
    return Case(
        name=f"adversarial {'x'.join(map(str, shape))}",
        fused=selfkd.adversarial,
        reference=selfkd.reference.adversarial,
        baselines={"bce_with_logits": bce_with_logits, "softplus": softplus_of_scores},
        inputs=lambda: [3 * torch.randn(shape) for _ in range(2)],
        learning=2,
        bytes_moved=6 * math.prod(shape) * 4,
        need=need,
    )


def cosine_of_normalized(student: Tensor, target: Tensor) -> Tensor:
    """SimReg loss of features (N, D) in the form of the authors' code."""
    x, t = F.normalize(student, dim=1), F.normalize(target, dim=1)
    return (2 - 2 * (x * t).sum(1)).mean()


def distance_of_normalized(student: Tensor, target: Tensor) -> Tensor:
    """SimReg loss of features (N, D) as a squared distance, which does not cancel."""
    return (F.normalize(student, dim=1) - F.normalize(target, dim=1)).square().sum(1).mean()


def simreg(*shape: int, **need: float) -> Case:
    """Features randn. Forward reads both; backward reads both and writes one gradient."""
    return Case(
        name=f"simreg {'x'.join(map(str, shape))}",
        fused=selfkd.simreg,
        reference=selfkd.reference.simreg,
        baselines={"cosine": cosine_of_normalized, "distance": distance_of_normalized},
        inputs=lambda: [torch.randn(shape) for _ in range(2)],
        learning=1,
        bytes_moved=5 * math.prod(shape) * 4,
        need=need,
    )


def distill(
    *shape: int, temperatures: tuple[float, ...] = (4.0,), ignore_index: int = -100, **need: float
) -> Case:
    """Cross-entropy and a teacher for each temperature; logits 3 * randn, a tenth of 255 ignored.

    Forward reads all logits; backward reads them again and writes one gradient.
    """

    def cross_entropy(z: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(z, y, ignore_index=ignore_index)

    def of_probabilities(z: Tensor, y: Tensor, *teachers: Tensor) -> Tensor:
        loss, rows = cross_entropy(z, y), z.numel() // z.shape[1]
        for t, T in zip(teachers, temperatures, strict=True):
            kl = F.kl_div(F.log_softmax(z / T, 1), F.softmax(t / T, 1), reduction="sum")
            loss = loss + T * T * kl / rows
        return loss

    def of_log_targets(z: Tensor, y: Tensor, *teachers: Tensor) -> Tensor:
        loss, rows = cross_entropy(z, y), z.numel() // z.shape[1]
        for t, T in zip(teachers, temperatures, strict=True):
            p, q = F.log_softmax(z / T, 1), F.log_softmax(t / T, 1)
            loss = loss + T * T * F.kl_div(p, q, reduction="sum", log_target=True) / rows
        return loss

    def call(function: Loss, count: int, *inputs: Tensor) -> Tensor:
        z, y, *teachers = inputs
        return function(
            z,
            y,
            teachers[:count],
            temperature=temperatures[:count],
            ignore_index=ignore_index,
        )

    def inputs() -> list[Tensor]:
        z, *teachers = (3 * torch.randn(shape) for _ in range(1 + len(temperatures)))
        y = torch.randint(0, shape[1], (shape[0], *shape[2:]))
        if ignore_index == 255:
            y[torch.rand(y.shape) < 0.1] = 255
        return [z, y, *teachers]

    n = len(temperatures)
    at = f" T {', '.join(f'{T:g}' for T in temperatures)}"
    return Case(
        name=f"distill {'x'.join(map(str, shape))}{at}",
        fused=partial(call, selfkd.distill, n),
        reference=partial(call, selfkd.reference.distill, n),
        baselines={"log_target": of_log_targets, "probabilities": of_probabilities},
        inputs=inputs,
        learning=1,
        bytes_moved=(3 + 2 * n) * math.prod(shape) * 4,
        need=need,
        part=partial(call, selfkd.distill, n - 1) if n > 1 else None,
    )


def bifpn_fuse(
    *shape: int, third: int, resize: str, baselines: Mapping[str, Loss], **need: float
) -> Case:
    """Maps randn with learned weights, the third of size `third`.

    Forward reads three maps and writes one; backward reads them and the gradient and writes three.
    """

    def call(function: Loss, *inputs: Tensor) -> Tensor:
        return function(*inputs[:3], weight=inputs[3], resize=(None, None, resize))

    n, c, *_ = shape
    other = (n, c, third, third)
    return Case(
        name=f"bifpn_fuse {'x'.join(map(str, shape))} {resize} {third}",
        fused=partial(call, selfkd.bifpn_fuse),
        reference=partial(call, selfkd.reference.bifpn_fuse),
        baselines=baselines,
        inputs=lambda: [*map(torch.randn, (shape, shape, other)), torch.ones(3)],
        learning=4,
        bytes_moved=(8 * math.prod(shape) + 3 * math.prod(other)) * 4,
        need=need,
        grad=lambda: torch.randn(shape),
    )


def fused_weights(weight: Tensor) -> Tensor:
    """The factors of three maps."""
    factors = F.relu(weight)
    return factors / (factors.sum() + 1e-6)


def sum_of_upsampled(x: Tensor, y: Tensor, z: Tensor, weight: Tensor) -> Tensor:
    """Fusion with a map of half the size."""
    w = fused_weights(weight)
    return w[0] * F.relu(x) + w[1] * F.relu(y) + w[2] * F.interpolate(F.relu(z), scale_factor=2)


def upsampled_last(x: Tensor, y: Tensor, z: Tensor, weight: Tensor) -> Tensor:
    """The same, its small map weighted before it is upsampled."""
    w = fused_weights(weight)
    return w[0] * F.relu(x) + w[1] * F.relu(y) + F.interpolate(w[2] * F.relu(z), scale_factor=2)


def sum_of_padded(x: Tensor, y: Tensor, z: Tensor, weight: Tensor) -> Tensor:
    """Fusion with a map of twice the size, padded as the authors' code does."""
    w = fused_weights(weight)
    pooled = F.max_pool2d(F.pad(F.relu(z), (0, 1, 0, 1)), 3, 2)
    return w[0] * F.relu(x) + w[1] * F.relu(y) + w[2] * pooled


def sum_of_pooled(x: Tensor, y: Tensor, z: Tensor, weight: Tensor) -> Tensor:
    """The same without padding."""
    w = fused_weights(weight)
    pooled = F.max_pool2d(F.relu(z), 3, 2, ceil_mode=True)
    return w[0] * F.relu(x) + w[1] * F.relu(y) + w[2] * pooled


large_vocabulary = sd_dropout_kl(512, 32000, eager=15, compile=4.5, copy=2)

CASES = [
    sd_dropout_kl(128, 100, eager=5, compile=2.5),
    sd_dropout_kl(256, 1000, eager=10, compile=4),
    sd_dropout_kl(1024, 1000, eager=12, compile=4),
    replace(large_vocabulary, environment=KEEP_MEMORY),
    replace(large_vocabulary, name=f"{large_vocabulary.name} (plain malloc)", need={}),
    sd_dropout_kl(4, 21, 256, 256, eager=8, compile=5, copy=3),
    adversarial(128, 1),  # one score each
    adversarial(16, 1, 256, 256),  # of patches
    distill(256, 1000, eager=5.5, compile=3),
    distill(256, 1000, temperatures=(4.0, 4.0), part=1.5),
    distill(256, 1000, temperatures=(4.0, 2.0), part=1.8),
    distill(4, 21, 256, 256, temperatures=(1.0,), ignore_index=255, eager=6, compile=4, copy=2.2),
    simreg(256, 2048, eager=4.5, compile=2.3),
    bifpn_fuse(
        *(32, 128, 32, 32),
        third=16,
        resize="nearest",
        baselines={"weighted": sum_of_upsampled, "weighted small": upsampled_last},
        eager=4,
        compile=4,
    ),
    bifpn_fuse(
        *(32, 128, 32, 32),
        third=64,
        resize="maxpool",
        baselines={"padded": sum_of_padded, "ceil_mode": sum_of_pooled},
        eager=8,
        compile=9,
    ),
]
