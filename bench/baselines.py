"""What is timed: every operator's cases, and the code a good user would write without selfkd.

A baseline uses what PyTorch offers and nothing of selfkd. Where two forms are natural both are
timed, and the faster counts. A new operator adds its baselines, and its cases to `CASES`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from types import ModuleType

import authors
import selfkd
import torch
import torch.nn.functional as F
from selfkd.nn import BiFPN
from torch import Tensor, nn
from torch.func import functional_call

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
        A call that does a part of the same, timed beside it; `part_name` says which.
    proof
        Stands for the case where functions are compared, if they are random: without the randomness.
    rows
        Whether gradients have rows of classes, in which an error is relative to the row's largest;
        else to the tensor's.
    need
        What the ratios must be: at least, against "eager" and "compile"; at most, against "copy",
        "part" and, of the memory that a call takes at its peak, against eager's: "memory".
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
    part_name: str = "a call with one teacher less"
    proof: Case | None = None
    grad: Callable[[], Tensor] | None = None
    rows: bool = True


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


def attention_of_powers(student: Tensor, teacher: Tensor) -> Tensor:
    """FRSKD's feature loss of maps (N, C, H, W) in the form of the authors' code."""

    def attention_map(x: Tensor) -> Tensor:
        return F.normalize(x.pow(2).mean(1).flatten(1))

    return (attention_map(student) - attention_map(teacher)).pow(2).mean()


def attention_of_norms(student: Tensor, teacher: Tensor) -> Tensor:
    """The same without a square of each feature."""

    def attention_map(x: Tensor) -> Tensor:
        return F.normalize(torch.linalg.vector_norm(x, dim=1).square().flatten(1))

    return F.mse_loss(attention_map(student), attention_map(teacher))


def attention(*shape: int, teacher_channels: int, **need: float) -> Case:
    """Features randn. Forward reads both; backward reads the student and writes its gradient."""
    teacher_shape = (shape[0], teacher_channels, *shape[2:])
    return Case(
        name=f"attention {'x'.join(map(str, shape))} of {teacher_channels} channels",
        fused=selfkd.attention,
        reference=selfkd.reference.attention,
        baselines={"powers": attention_of_powers, "norms": attention_of_norms},
        inputs=lambda: [torch.randn(shape), torch.randn(teacher_shape)],
        learning=1,
        bytes_moved=(3 * math.prod(shape) + math.prod(teacher_shape)) * 4,
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


def self_teacher(batch: int, **need: float) -> Case:
    """FRSKD's self-teacher on the maps of ResNet-18 for CIFAR-100, trained through its logits.

    Maps and parameters get gradients. The authors' module is the reference, too. Bytes: all of these
    read twice and their gradients written once, without any map in between. In float32 the sign of
    a few values before a ReLU is rounding, and small gradients differ by percents, theirs as well.
    """
    channels, sizes = (64, 128, 256, 512), (32, 16, 8, 4)
    theirs, ours = authors.BiFPNc(channels, 100), BiFPN(channels, 100)
    parameters = dict(theirs.named_parameters())
    maps = [(batch, c, size, size) for c, size in zip(channels, sizes, strict=True)]

    def loss(module: nn.Module, names: list[str], *inputs: Tensor) -> Tensor:
        state = {name: x.to(inputs[0].dtype) for name, x in module.named_buffers() if x.ndim}
        state |= dict(zip(names, inputs[len(maps) :], strict=True))
        logits: Tensor = functional_call(module, state, (inputs[: len(maps)],))[1]
        return logits.logsumexp(1).mean()

    their_loss = partial(loss, theirs, list(parameters))
    return Case(
        name=f"BiFPN {'x'.join(map(str, maps[0]))}",
        fused=partial(loss, ours, list(BiFPN.convert_authors_state_dict(parameters))),
        reference=their_loss,
        baselines={"authors": their_loss},
        inputs=lambda: [
            *map(torch.randn, maps),
            *(x.detach().clone() for x in parameters.values()),
        ],
        learning=len(maps) + len(parameters),
        bytes_moved=12 * (sum(map(math.prod, maps)) + sum(x.numel() for x in parameters.values())),
        need=need,
        rows=False,
    )


def sd_dropout_head(rows: int, K: int, C: int, p: float = 0.5, **need: float) -> Case:
    """Features randn, weights randn / sqrt(K). `part` is the matrix products alone, stacked.

    Bytes: features, weight and their gradients, the masked features and what comes back to them.
    """

    def objective(h: Tensor, w: Tensor, b: Tensor, y: Tensor, kl: Loss) -> Tensor:
        u, v = (F.linear(F.dropout(h, p), w, b) for _ in range(2))
        return F.cross_entropy(F.linear(h, w, b), y) + kl(u, v)

    def head(space: ModuleType, h: Tensor, w: Tensor, b: Tensor, y: Tensor) -> Tensor:
        loss: Tensor = space.sd_dropout_head(h, w, b, y, p=p)
        return loss

    def products(h: Tensor, w: Tensor, b: Tensor, y: Tensor) -> Tensor:
        return F.linear(h.repeat(3, 1), w, b).sum()

    case = Case(
        name=f"sd_dropout_head {rows}x{K} to {C}",
        fused=partial(head, selfkd),
        reference=partial(head, selfkd.reference),
        baselines={
            "log_target": partial(objective, kl=kl_of_log_targets),
            "probabilities": partial(objective, kl=kl_of_probabilities),
        },
        inputs=lambda: [
            torch.randn(rows, K),
            torch.randn(C, K) / K**0.5,
            torch.randn(C) / K**0.5,
            torch.randint(0, C, (rows,)),
        ],
        learning=3,
        bytes_moved=4 * (12 * rows * K + 3 * C * K),
        need=need,
        part=products,
        part_name="its matrix products alone",
        rows=False,
    )
    return replace(case, proof=sd_dropout_head(rows, K, C, p=0.0)) if p else case


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
    attention(128, 64, 32, 32, teacher_channels=128, eager=5, compile=1.5, copy=1.7),
    attention(128, 512, 4, 4, teacher_channels=1024),
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
    self_teacher(32, eager=1.35),
    sd_dropout_head(128, 512, 100, eager=4),
    sd_dropout_head(256, 2048, 1000, eager=1.6),
    sd_dropout_head(1024, 512, 32000, eager=2.5, memory=0.2),
]
