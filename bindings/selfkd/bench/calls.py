"""``selfkd bench --suite calls``: what a call costs where there is nothing to compute.

Each operator is called, forward and backward, at sizes so small that its kernels take no time: what is
measured are Python, PyTorch's dispatcher and its autograd. Beside it runs a bare ``autograd.Function`` with
as many inputs that learn, the least that any loss of one's own costs.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from . import report
from .cases import make

SHAPES: dict[str, tuple[int, ...]] = {
    "sd_dropout_kl": (2, 10),
    "distill": (2, 10),
    "adversarial": (2,),
    "simreg": (2, 10),
    "attention": (2, 4, 2, 2),
    "bifpn_fuse": (2, 4, 4, 4),
    "js_divergence": (2, 10),
    "topk_divergence": (2, 10),
    "sd_dropout_head": (2, 16, 10),
}
MOST = {  # times a bare Function
    "sd_dropout_kl": 1.5,
    "distill": 2.0,
    "adversarial": 1.5,
    "simreg": 1.5,
    "attention": 1.5,
    "bifpn_fuse": 1.8,
    "js_divergence": 1.6,
    "sd_dropout_head": 4.0,
}
CALLS = 200  # in a sample

Step = Callable[[], None]


class Bare(torch.autograd.Function):
    """Keeps its inputs, and makes a result and gradients without values."""

    @staticmethod
    def forward(ctx: Any, *inputs: Tensor) -> Tensor:
        ctx.save_for_backward(*inputs)
        return inputs[0].new_empty(())

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, ...]:
        return tuple(map(torch.empty_like, ctx.saved_tensors))


def step(loss: Callable[..., Tensor], inputs: list[Tensor], grad: Tensor | None = None) -> Step:
    """A call, its backward, and the gradients thrown away."""
    live = [x for x in inputs if x.requires_grad]

    def run() -> None:
        loss(*inputs).backward(grad)  # type: ignore[no-untyped-call]
        for x in live:
            x.grad = None

    return run


def steps(operator: str) -> dict[str, Step]:
    """What is compared of an operator: "selfkd" and "bare"."""
    case = make(operator, *SHAPES[operator])
    inputs, grad = case.draw("cpu")
    live = [x for x in inputs if x.requires_grad]
    return {"selfkd": step(case.fused, inputs, grad), "bare": step(Bare.apply, live)}


def microseconds(run: Step) -> float:
    start = time.perf_counter()
    for _ in range(CALLS):
        run()
    return (time.perf_counter() - start) / CALLS * 1e6


def measure(operators: list[str], repeat: int) -> list[report.Result]:
    """Medians, in turns, on one thread: each operator's and its bare Function's, in microseconds."""
    torch.set_num_threads(1)
    passes = {operator: steps(operator) for operator in operators}
    samples: dict[tuple[str, str], list[float]] = {}
    for turn in range(repeat + 1):  # the first is warm-up
        for operator, both in passes.items():
            for name, run in both.items():
                found = microseconds(run)
                if turn > 0:
                    samples.setdefault((operator, name), []).append(found)
    results = []
    for operator in operators:
        fused, bare = (statistics.median(samples[operator, x]) for x in ("selfkd", "bare"))
        shape = "x".join(map(str, SHAPES[operator]))
        result = {"call": f"{operator} {shape}", "us": fused, "bare": bare, "ratio": fused / bare}
        results.append(result | {"most": MOST.get(operator)})
    return results


def table(results: list[report.Result]) -> report.Table:
    """A row for each call."""
    rows = [["forward + backward, one thread", "us", "bare Function, us", "ratio", "aim"]]
    for x in results:
        most = "-" if x["most"] is None else f"{x['most']:.1f}x"
        figures = [f"{x['us']:.1f}", f"{x['bare']:.1f}", f"{x['ratio']:.2f}x"]
        rows.append([x["call"], *figures, most])
    return rows


def missed(results: list[report.Result]) -> list[str]:
    """The calls that take longer than they may."""
    return [
        f"{x['call']} takes {x['ratio']:.2f}x the time of a bare Function, at most {x['most']:g}x is"
        " required"
        for x in results
        if x["most"] and x["ratio"] > x["most"]
    ]
