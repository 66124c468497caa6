"""Measures one case in this process.

Contenders take turns, so that a slow moment of the machine meets all of them. A sample is a forward
and a backward pass through autograd; medians are compared. Each baseline is first proved equal to
the float64 reference.
"""

from __future__ import annotations

import gc
import json
import math
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .case import Case, Loss, widened
from .others import Others
from .others import busy_seconds as busy_seconds

COPY_BYTES = {"cpu": 256 << 20, "cuda": 1 << 30}
SAMPLE_SECONDS = 5e-3  # short calls are repeated until a sample takes this long
GRAPHED = 1 << 30  # bytes of inputs; beyond it launches cost nothing, and a graph keeps its memory
SLOW_COPY = 18e9  # bytes/s; a CPU below it is busy with something else
LACKING = 0.25  # cores that others had and this process wanted
UNSTEADY = 2.5  # of the quartiles of a contender's times, when a quiet machine gives 1.1 to 1.5
OWN = ("selfkd", "graph selfkd")
Errors = tuple[float, float]  # of the loss, of the gradients
Result = dict[str, Any]
Pass = Callable[[], Any]
Say = Callable[[str], None]


def loss_and_gradients(
    loss: Loss, inputs: list[Tensor], grad: Tensor | None = None
) -> tuple[Tensor, ...]:
    """Return the loss and the gradients of the inputs that get one; `grad` comes in if it is a map."""
    value = loss(*inputs)
    return value.detach(), *torch.autograd.grad(value, [x for x in inputs if x.requires_grad], grad)


# ---- what is right ----


def errors(case: Case, found: tuple[Tensor, ...], exact: tuple[Tensor, ...]) -> Errors:
    """Return the relative error of the loss, and the largest of the gradients.

    The latter is the largest error in a row of classes, or in a tensor if the case has no rows, over
    the largest gradient there (in a row of zeros: over the tensor's).
    """
    loss = ((found[0] - exact[0]).abs().max() / exact[0].abs().max()).item()
    worst = 0.0
    for x, y in zip(found[1:], exact[1:], strict=True):
        error, size = (x - y).abs(), y.abs()
        if case.rows and x.ndim > 1:
            error, largest = error.amax(1), size.amax(1)
            error /= torch.where(largest == 0, size.max(), largest)
        else:
            error /= size.max()
        worst = max(worst, error.max().item())
    return loss, worst


def check(case: Case, contenders: Mapping[str, Loss], device: str) -> dict[str, Errors]:
    """Prove the baselines equal to the reference in float64; return the errors of the contenders."""
    inputs, grad = case.draw(device)
    doubles = [
        x.detach().double().requires_grad_(x.requires_grad) if x.is_floating_point() else x
        for x in inputs
    ]
    wide = None if grad is None else grad.double()
    exact = loss_and_gradients(case.reference, doubles, wide)
    for form, baseline in case.baselines.items():
        difference = max(errors(case, loss_and_gradients(baseline, doubles, wide), exact))
        if not difference < 1e-9:
            raise SystemExit(f"{case.name}: {form} is another function ({difference:.1e})")
    return {
        name: errors(case, loss_and_gradients(loss, inputs, grad), exact)
        for name, loss in contenders.items()
    }


# ---- who takes part ----


def contenders(case: Case, device: str, against: Iterable[str]) -> dict[str, Loss]:
    """Return what is timed: "selfkd", and each baseline as "eager <form>" and "compile <form>"."""
    mode = "max-autotune-no-cudagraphs" if device == "cuda" else None
    found = {"selfkd": case.fused}
    for form, baseline in case.baselines.items():
        loss = widened(baseline) if case.widen else baseline
        if "eager" in against:
            found[f"eager {form}"] = loss
        if "compile" in against:
            found[f"compile {form}"] = torch.compile(loss, dynamic=False, mode=mode)
    if "liger" in against and case.nearest:
        found["liger nearest"] = widened(case.nearest)
    return found


def replayed(run: Pass) -> Pass:
    """`run` as a CUDA graph."""
    stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # capture wants a warm start
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kept = run()

    def replay(_: Any = kept) -> None:  # whose results stay in the graph's memory
        graph.replay()

    return replay


def graphs(case: Case, inputs: list[Tensor], grad: Tensor | None) -> dict[str, Pass]:
    """Forward and backward of selfkd and of the baselines, captured: "graph <form>"."""
    if sum(x.nbytes for x in inputs) > GRAPHED:
        return {}
    forms = {"selfkd": case.fused} | {
        form: widened(baseline) if case.widen else baseline
        for form, baseline in case.baselines.items()
    }
    return {
        f"graph {form}": replayed(partial(loss_and_gradients, loss, inputs, grad))
        for form, loss in forms.items()
    }


# ---- memory and launches ----


def peak(run: Pass, device: str) -> int:
    """Return the bytes of tensors that a call holds at once, at most, beside those there before.

    PyTorch's allocators tell it: results, gradients, what is kept for backward and scratch count. On the CPU
    the process's memory would not do, which keeps freed blocks and hands them out again.
    """
    gc.collect()
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        torch.cuda.synchronize()
        return int(torch.cuda.max_memory_allocated() - before)
    with tempfile.NamedTemporaryFile(suffix=".json") as file:
        profiled(run, "cpu", memory=True).export_chrome_trace(file.name)
        events = json.loads(Path(file.name).read_text())["traceEvents"]
    changes = sorted((x for x in events if x["name"] == "[memory]"), key=lambda x: x["ts"])
    return max(accumulate((int(x["args"]["Bytes"]) for x in changes), initial=0))


@contextmanager
def no_standard_error() -> Iterator[None]:
    """Nothing is written there: PyTorch's profiler says when it begins and ends, whatever its log level."""
    sys.stderr.flush()
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)


def profiled(run: Pass, device: str, memory: bool = False) -> Any:
    """A call under PyTorch's profiler, which notes what is allocated if `memory`."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    if device == "cuda":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    recording = torch.profiler.profile(activities=activities, profile_memory=memory)
    with no_standard_error(), recording as profile:
        run()
        if device == "cuda":
            torch.cuda.synchronize()
    return profile


def count_launches(names: Iterable[str]) -> dict[str, int]:
    """Sort what ran on the device into kernels, memsets and copies."""
    found = {"kernels": 0, "memsets": 0, "copies": 0}
    for name in names:
        kind = {"Memset": "memsets", "Memcpy": "copies"}.get(name[:6], "kernels")
        found[kind] += 1
    return found


def launches(loss: Loss, inputs: list[Tensor], grad: Tensor | None) -> dict[str, dict[str, int]]:
    """Return what a forward and what a backward pass launch on CUDA."""
    kept: list[Tensor] = []

    def forward() -> None:
        kept.append(loss(*inputs))

    def backward() -> None:  # the gradient that comes in is made before: no launch for it
        torch.autograd.grad(kept[0], [x for x in inputs if x.requires_grad], incoming)

    def count(run: Pass) -> dict[str, int]:
        events = profiled(run, "cuda").events()
        return count_launches(x.name for x in events if x.device_type.name == "CUDA")

    in_forward = count(forward)
    incoming = torch.ones_like(kept[0]) if grad is None else grad
    return {"forward": in_forward, "backward": count(backward)}


def write_trace(passes: Mapping[str, Pass], device: str, path: Path) -> None:
    """Save one pass of each contender as a Chrome trace."""

    def run() -> None:
        for name, one in passes.items():
            with torch.profiler.record_function(name):
                one()

    run()  # nothing is compiled or loaded for the first time in the trace
    profiled(run, device).export_chrome_trace(str(path))


# ---- time ----


def seconds(function: Pass, device: str, calls: int = 1) -> float:
    """Return the time of a call: on CUDA between two events, from and to an idle device."""
    if device == "cpu":
        start = time.perf_counter()
        for _ in range(calls):
            function()
        return (time.perf_counter() - start) / calls
    torch.cuda.synchronize()
    first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
    first.record()
    for _ in range(calls):
        function()
    last.record()
    last.synchronize()
    return float(first.elapsed_time(last)) / 1e3 / calls


def take_samples(
    passes: Mapping[str, Pass], device: str, repeat: int, say: Say
) -> dict[str, list[float]]:
    """Time the contenders in turns, and the copying of a large buffer ("copy"), in seconds."""
    source = torch.ones(COPY_BYTES[device] // 4, device=device)
    target = source.clone()
    calls = {
        name: math.ceil(SAMPLE_SECONDS / seconds(run, device, 2)) for name, run in passes.items()
    }
    samples: dict[str, list[float]] = {name: [] for name in [*passes, "copy"]}
    turns = list(passes)
    gc.disable()  # as timeit does: a collection would be charged to whoever runs when it is due
    for turn in range(repeat):
        say(f"turn {turn + 1} of {repeat}")
        for name in turns:
            if calls[name] > 1:  # untimed: the threads of whoever came before spin for a while
                seconds(passes[name], device, calls[name])
            samples[name].append(seconds(passes[name], device, calls[name]))
        samples["copy"].append(seconds(lambda: target.copy_(source), device))
        turns.append(turns.pop(0))  # nobody always comes first after the copy
    return samples


# ---- a case ----


def compare(
    case: Case, samples: Mapping[str, list[float]], memory: Mapping[str, int], device: str
) -> Result:
    """The figures that a report is made of."""
    medians = {name: statistics.median(times) for name, times in samples.items()}
    kinds = dict.fromkeys(name.split()[0] for name in medians if " " in name)
    fastest = {
        kind: min((x for x in medians if x.split()[0] == kind and x not in OWN), key=medians.get)  # type: ignore[arg-type]
        for kind in kinds
    }
    bandwidth = 2 * COPY_BYTES[device] / medians["copy"]
    ratios = {
        kind: medians[name] / medians["graph selfkd" if kind == "graph" else "selfkd"]
        for kind, name in fastest.items()
    }
    ratios["copy"] = medians["selfkd"] / (case.bytes_moved / bandwidth)
    if "part" in medians:
        ratios["part"] = medians["selfkd"] / medians["part"]
    if memory and "eager" in fastest:
        ratios["memory"] = memory["selfkd"] / max(1, memory[fastest["eager"]])
    return {
        "quartiles": {
            name: statistics.quantiles(times, n=4, method="inclusive")
            if len(times) > 1
            else 3 * times
            for name, times in samples.items()
        },
        "fastest": fastest,
        "ratios": ratios,
        "bytes_per_second": bandwidth,
        "busy": [],
    }


def disturbances(figures: Result, device: str, others: float, lacking: float) -> list[str]:
    """How it shows that something else was running; then no ratio means anything.

    `others` and `lacking` are those of :class:`Others`.
    """
    found = []
    bandwidth = figures["bytes_per_second"]
    if device == "cpu" and bandwidth < SLOW_COPY:
        found.append(
            f"copied at {bandwidth / 1e9:.1f} GB/s, expected {SLOW_COPY / 1e9:.0f} or more"
        )
    if device == "cpu" and lacking > LACKING:
        found.append(f"other programs kept {others:.1f} cores busy")
    for name, (low, _, high) in figures["quartiles"].items():
        if high > UNSTEADY * low:
            found.append(f"{name} took {high / low:.1f} times as long in one quarter as in another")
    return found


def measure(
    case: Case,
    device: str,
    *,
    against: Iterable[str],
    repeat: int,
    trace: Path | None = None,
    say: Say = lambda stage: None,
) -> Result:
    """Check and time one case in this process."""
    say("checking")
    found = contenders(case, device, against)
    error = check(case.proof or case, contenders(case.proof or case, device, against), device)
    inputs, grad = case.draw(device)
    passes: dict[str, Pass] = {
        name: partial(loss_and_gradients, loss, inputs, grad) for name, loss in found.items()
    }
    memory, launched, failed = {}, {}, []
    for name, run in list(passes.items()):
        try:
            run()  # compiles
        except torch.OutOfMemoryError:
            if name == "selfkd":
                raise
            failed.append(name)
            del passes[name]
            continue
        memory[name] = peak(run, device)
        if device == "cuda":
            launched[name] = launches(found[name], inputs, grad)
    if trace:
        write_trace(passes, device, trace)
    if device == "cuda" and "graph" in against:
        passes |= graphs(case, inputs, grad)
    if case.part:
        passes["part"] = partial(loss_and_gradients, case.part, inputs, grad)
    with Others() as others:
        samples = take_samples(passes, device, repeat, say)
    figures = compare(case, samples, memory, device)
    figures["busy"] = disturbances(figures, device, others.cores, others.lacking)
    return {
        "case": case.name,
        "operator": case.operator,
        "dtype": case.dtype,
        "device": device,
        "environment": dict(case.environment),
        "bytes_moved": case.bytes_moved,
        "errors": error,
        "peak_bytes": memory,
        "launches": launched,
        "out_of_memory": failed,
        "part_name": case.part_name,
        "need": dict(case.need),
        **figures,
    }
