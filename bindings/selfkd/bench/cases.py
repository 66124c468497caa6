"""A case of each operator, at any shape.

An operator without a function here is timed beside its own reference: :func:`by_contract`.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call

from .. import contract
from .._ops import ops
from ..nn import BiFPN
from . import authors, baselines
from .case import Case, Loss, wide

# The package, whose functions mypy takes for the modules of the same names.
SELFKD: Any = importlib.import_module("..", __package__)
PROVEN = 1 << 26  # values; larger cases are compared with the reference on fewer rows


def text(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape))


class BareKL(torch.autograd.Function):
    """The kernels of sd_dropout_kl with T = 3 and no more: what any way to call them costs."""

    @staticmethod
    def forward(ctx: Any, u: Tensor, v: Tensor) -> Tensor:
        with torch._C._AutoDispatchBelowAutograd():
            found = ops.sd_dropout_kl.default(u, v, u, False, u, False, 3.0, 1.0, 1.0, False, 1)
        loss, _, saved, denominator = found
        ctx.save_for_backward(u, v, saved, denominator)
        return loss  # type: ignore[no-any-return]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        u, v, saved, denominator = ctx.saved_tensors
        return ops.sd_dropout_kl_backward.default(
            grad, u, v, u, False, saved, denominator, 3.0, 1.0, 1.0, False, True, True
        )


def of_rows(
    operator: str,
    shape: tuple[int, ...],
    forms: Mapping[str, Loss],
    learning: int,
    *,
    inputs: int = 2,
    spread: float = 3.0,
    **others: Any,
) -> Case:
    """A loss of inputs of one shape, spread * randn.

    Forward reads them all; backward reads them again and writes the gradients.
    """
    return Case(
        name=f"{operator} {text(shape)}",
        fused=getattr(SELFKD, operator),
        reference=getattr(SELFKD.reference, operator),
        baselines=forms,
        inputs=lambda: [spread * torch.randn(shape) for _ in range(inputs)],
        learning=learning,
        values_moved=(2 * inputs + learning) * math.prod(shape),
        **others,
    )


def sd_dropout_kl(*shape: int, **need: float) -> Case:
    """Two samples of logits, which both learn."""
    forms = {
        "log_target": baselines.kl_of_log_targets,
        "probabilities": baselines.kl_of_probabilities,
    }
    return of_rows(
        *("sd_dropout_kl", shape, forms, 2),
        nearest=baselines.liger_kl_of_both if len(shape) == 2 else None,
        need=need,
        part=BareKL.apply if "part" in need else None,
        part_name="an autograd.Function that only calls the kernels",
    )


def js_divergence(*shape: int, **need: float) -> Case:
    """Logits of a student and a fixed teacher, beta 0.5."""
    forms = {
        "log mixture": partial(baselines.js_of_logits, js=baselines.js_of_log_mixture),
        "mixture": partial(baselines.js_of_logits, js=baselines.js_of_mixture),
    }
    nearest = baselines.liger_js if len(shape) == 2 else None
    return of_rows("js_divergence", shape, forms, 1, nearest=nearest, need=need)


def topk_divergence(*shape: int, k: int = 100, **need: float) -> Case:
    """Logits 3 * randn, and the log-probabilities of a teacher's k likeliest classes; beta 0.5.

    Forward reads the logits; backward reads them again and writes their gradient.
    """
    listed = max(1, min(k, shape[1] - 1))  # all classes would leave no tail

    def inputs() -> list[Tensor]:
        teacher, indices = (3 * torch.randn(shape)).log_softmax(1).topk(listed, 1)
        return [3 * torch.randn(shape), indices, teacher]

    return Case(
        name=f"topk_divergence {text(shape)} k {listed}",
        fused=SELFKD.topk_divergence,
        reference=SELFKD.reference.topk_divergence,
        baselines={
            "log_softmax": baselines.topk_of_log_softmax,
            "logsumexp": baselines.topk_of_logsumexp,
        },
        inputs=inputs,
        learning=1,
        values_moved=3 * math.prod(shape),
        need=need,
    )


def adversarial(*shape: int, **need: float) -> Case:
    """Scores of real and generated samples, which both learn."""
    forms = {
        "bce_with_logits": baselines.bce_with_logits,
        "softplus": baselines.softplus_of_scores,
    }
    return of_rows("adversarial", shape, forms, 2, need=need)


def simreg(*shape: int, **need: float) -> Case:
    """Features of a student and a fixed teacher."""
    forms = {
        "cosine": baselines.cosine_of_normalized,
        "distance": baselines.distance_of_normalized,
    }
    return of_rows("simreg", shape, forms, 1, spread=1.0, need=need)


def attention(*shape: int, teacher_channels: int = 0, **need: float) -> Case:
    """Features randn, the teacher with twice the channels unless said otherwise.

    Forward reads both; backward reads the student and writes its gradient.
    """
    teacher_shape = (shape[0], teacher_channels or 2 * shape[1], *shape[2:])
    return Case(
        name=f"attention {text(shape)} of {teacher_shape[1]} channels",
        fused=SELFKD.attention,
        reference=SELFKD.reference.attention,
        baselines={
            "powers": baselines.attention_of_powers,
            "norms": baselines.attention_of_norms,
        },
        inputs=lambda: [torch.randn(shape), torch.randn(teacher_shape)],
        learning=1,
        values_moved=3 * math.prod(shape) + math.prod(teacher_shape),
        need=need,
    )


def distill(
    *shape: int, temperatures: tuple[float, ...] = (4.0,), ignore_index: int = -100, **need: float
) -> Case:
    """Cross-entropy and a teacher for each temperature; logits 3 * randn, a tenth of 255 ignored.

    Forward reads all logits; backward reads them again and writes one gradient.
    """

    def call(function: Loss, count: int, *inputs: Tensor) -> Tensor:
        z, y, *teachers = inputs
        options: dict[str, Any] = {"ignore_index": ignore_index}
        if count == 1:  # as it is written then
            return function(z, y, teachers[0], temperature=temperatures[0], **options)
        return function(z, y, teachers[:count], temperature=temperatures[:count], **options)

    def inputs() -> list[Tensor]:
        z, *teachers = (3 * torch.randn(shape) for _ in range(1 + len(temperatures)))
        y = torch.randint(0, shape[1], (shape[0], *shape[2:]))
        if ignore_index == 255:
            y[torch.rand(y.shape) < 0.1] = 255
        return [z, y, *teachers]

    n = len(temperatures)
    options: dict[str, Any] = {"temperatures": temperatures, "ignore_index": ignore_index}
    return Case(
        name=f"distill {text(shape)} T {', '.join(f'{T:g}' for T in temperatures)}",
        fused=partial(call, SELFKD.distill, n),
        reference=partial(call, SELFKD.reference.distill, n),
        baselines={
            "log_target": partial(baselines.distill_of_log_targets, **options),
            "probabilities": partial(baselines.distill_of_probabilities, **options),
        },
        nearest=partial(baselines.distill_by_liger, **options) if len(shape) == 2 else None,
        inputs=inputs,
        learning=1,
        values_moved=(3 + 2 * n) * math.prod(shape),
        need=need,
        part=partial(call, SELFKD.distill, n - 1) if n > 1 else None,
    )


def bifpn_fuse(*shape: int, resize: str = "nearest", **need: float) -> Case:
    """Maps randn with learned weights, the third half ("nearest") or twice ("maxpool") as large.

    Forward reads three maps and writes one; backward reads them and the gradient and writes three.
    """

    def call(function: Loss, *inputs: Tensor) -> Tensor:
        return function(*inputs[:3], weight=inputs[3], resize=(None, None, resize))

    n, c, h, w = shape
    if resize == "nearest" and (h % 2 or w % 2):
        raise ValueError("bifpn_fuse: H and W must be even")
    other = (n, c, h // 2, w // 2) if resize == "nearest" else (n, c, 2 * h, 2 * w)
    return Case(
        name=f"bifpn_fuse {text(shape)} {resize} {other[2]}",
        fused=partial(call, SELFKD.bifpn_fuse),
        reference=partial(call, SELFKD.reference.bifpn_fuse),
        baselines=baselines.FUSIONS[resize],
        inputs=lambda: [*map(torch.randn, (shape, shape, other)), torch.ones(3)],
        learning=4,
        values_moved=8 * math.prod(shape) + 3 * math.prod(other),
        need=need,
        grad=lambda: torch.randn(shape),
        accumulators=(3,),
        widen=False,
    )


def dropout_views(*shape: int, p: float = 0.5, **need: float) -> Case:
    """Features randn. Forward reads one map and writes three; backward the other way round."""

    def call(function: Loss, h: Tensor, seed: Tensor) -> Tensor:
        return function(h, seed, p=p)

    return Case(
        name=f"dropout_views {text(shape)}",
        fused=partial(call, SELFKD.dropout_views),
        reference=partial(call, SELFKD.reference.dropout_views),
        baselines={"stack": partial(baselines.stacked_views, p=p)},
        inputs=lambda: [torch.randn(shape), torch.randint(2**62, ())],
        learning=1,
        values_moved=8 * math.prod(shape),
        need=need,
        grad=lambda: torch.randn(3, *shape),
        proof=dropout_views(*fewer(shape), p=0.0) if p else None,
        widen=False,
    )


def sd_dropout_head(rows: int, K: int, C: int, p: float = 0.5, **need: float) -> Case:
    """Features randn, weights randn / sqrt(K). `part` is the matrix products alone, stacked.

    Values: features, weight and their gradients, the masked features and what comes back to them.
    """

    def head(space: ModuleType, h: Tensor, w: Tensor, b: Tensor, y: Tensor) -> Tensor:
        loss: Tensor = space.sd_dropout_head(h, w, b, y, p=p)
        return loss

    def objective(kl: Loss) -> Loss:
        return partial(baselines.head_objective, p=p, kl=kl)

    return Case(
        name=f"sd_dropout_head {rows}x{K} to {C}",
        fused=partial(head, SELFKD),
        reference=partial(head, SELFKD.reference),
        baselines={
            "log_target": objective(baselines.kl_of_log_targets),
            "probabilities": objective(baselines.kl_of_probabilities),
        },
        inputs=lambda: [
            torch.randn(rows, K),
            torch.randn(C, K) / K**0.5,
            torch.randn(C) / K**0.5,
            torch.randint(0, C, (rows,)),
        ],
        learning=3,
        values_moved=12 * rows * K + 3 * C * K,
        need=need,
        part=baselines.head_products,
        part_name="its matrix products alone",
        rows=False,
        proof=sd_dropout_head(fewer((rows, C))[0], K, C, p=0.0) if p else None,
        widen=False,
    )


def self_teacher(batch: int, **need: float) -> Case:
    """FRSKD's self-teacher on the maps of ResNet-18 for CIFAR-100, trained through its logits.

    Maps and parameters get gradients; of half types are the maps alone, under autocast. The authors'
    module is the reference, too. Values: all of these read twice and their gradients written once,
    without any map in between. In float32 the sign of a few values before a ReLU is rounding, and
    small gradients differ by percents, theirs as well.
    """
    channels, sizes = (64, 128, 256, 512), (32, 16, 8, 4)
    theirs, ours = authors.BiFPNc(channels, 100), BiFPN(channels, 100)
    parameters = dict(theirs.named_parameters())
    state = parameters | {name: x for name, x in theirs.named_buffers() if x.ndim}
    maps = [(batch, c, size, size) for c, size in zip(channels, sizes, strict=True)]

    def loss(module: nn.Module, names: list[str], *inputs: Tensor) -> Tensor:
        given, held = inputs[: len(maps)], dict(zip(names, inputs[len(maps) :], strict=True))
        device, dtype = given[0].device.type, given[0].dtype
        mixed = torch.autocast(device, dtype) if dtype.itemsize == 2 else nullcontext()
        with mixed:
            logits: Tensor = functional_call(module, held, (given,))[1]
        return wide(logits).logsumexp(1).mean()  # type: ignore[no-any-return]

    their_loss = partial(loss, theirs, list(state))
    return Case(
        name=f"BiFPN {text(maps[0])}",
        fused=partial(loss, ours, list(BiFPN.convert_authors_state_dict(state))),
        reference=their_loss,
        baselines={"authors": their_loss},
        inputs=lambda: [*map(torch.randn, maps), *(x.detach().clone() for x in state.values())],
        learning=len(maps) + len(parameters),
        values_moved=3 * (sum(map(math.prod, maps)) + sum(x.numel() for x in parameters.values())),
        need=need,
        rows=False,
        accumulators=tuple(range(len(maps), len(maps) + len(state))),
        widen=False,
    )


def by_contract(operator: str, *shape: int, **need: float) -> Case:
    """All that a contract says of a loss of rows, beside its reference."""
    forward, backward = contract.contract(operator), contract.contract(f"{operator}_backward")
    inputs = sum(x.is_input and x.kind == "IN" and x.shape == "NC*" for x in forward.items)
    forms = {"reference": getattr(SELFKD.reference, operator)}
    return of_rows(operator, shape, forms, len(backward.outputs), inputs=inputs, need=need)


class Form(NamedTuple):
    """The sizes that a user gives for a case: one a letter, and any number more if `open`."""

    make: Callable[..., Case]
    letters: str
    open: bool = False

    def __str__(self) -> str:
        return "x".join(self.letters) + "x..." * self.open


FORMS = {
    "adversarial": Form(adversarial, "N", True),
    "attention": Form(attention, "NCHW"),
    "bifpn_fuse": Form(bifpn_fuse, "NCHW"),
    "distill": Form(distill, "NC", True),
    "dropout_views": Form(dropout_views, "NC"),
    "js_divergence": Form(js_divergence, "NC", True),
    "sd_dropout_head": Form(sd_dropout_head, "NKC"),
    "sd_dropout_kl": Form(sd_dropout_kl, "NC", True),
    "simreg": Form(simreg, "ND"),
    "topk_divergence": Form(topk_divergence, "NC"),
    "BiFPN": Form(self_teacher, "N"),
}
FORMS |= {
    x: Form(partial(by_contract, x), "NC", True) for x in contract.modules() if x not in FORMS
}


def fewer(shape: tuple[int, ...]) -> tuple[int, ...]:
    """`shape` with as many rows as can be compared with the reference."""
    return (max(1, min(shape[0], shape[0] * PROVEN // math.prod(shape))), *shape[1:])


def make(operator: str, *shape: int, dtype: str = "float32", **options: Any) -> Case:
    """The case of an operator at a shape; `options` are those of its function here.

    Raises
    ------
    ValueError
        The operator takes other sizes.
    """
    form = FORMS[operator]
    count = len(form.letters)
    if min(shape) < 1 or len(shape) < count or (len(shape) > count and not form.open):
        raise ValueError(f"shape is {text(shape)}, {operator} expects {form}, all at least 1")
    case = form.make(*shape, **options)
    if case.proof is None and fewer(shape) != shape:
        few = {name: x for name, x in options.items() if name not in case.need}
        case = replace(case, proof=form.make(*fewer(shape), **few))
    return replace(case.of_dtype(dtype), need=case.need)
