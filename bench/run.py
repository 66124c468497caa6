"""Times selfkd against eager PyTorch, torch.compile and the machine's own copy bandwidth.

One process per case. In it the contenders take turns, so that a slow moment of the machine meets
all of them. A sample is a forward and a backward pass through autograd; medians are compared.
Each baseline is first proved equal to the float64 reference; the largest errors are shown as well.

    python bench/run.py                          all cases (also: make bench)
    python bench/run.py --case 128x100 --repeat 50
    python bench/run.py --require                exit code 1 when a required ratio is missed
"""

from __future__ import annotations

import argparse
import datetime
import gc
import json
import math
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import selfkd
import torch
from baselines import CASES, Case, Loss
from selfkd import library
from torch import Tensor

COPY_BYTES = 256 << 20
SLOW_COPY = 18e9  # bytes/s; below it the machine is busy with something else
SAMPLE_SECONDS = 5e-3  # short calls are repeated until a sample takes this long
AT_MOST = (
    "copy",
    "part",
    "memory",
)  # ratios that must not be larger than needed; the others not smaller
Errors = tuple[float, float]  # of the loss, of the gradients
Result = dict[str, Any]


def loss_and_gradients(
    loss: Loss, inputs: list[Tensor], grad: Tensor | None = None
) -> tuple[Tensor, ...]:
    """Return the loss and the gradients of the inputs that get one; `grad` comes in if it is a map."""
    value = loss(*inputs)
    return value.detach(), *torch.autograd.grad(value, [x for x in inputs if x.requires_grad], grad)


def errors(case: Case, found: tuple[Tensor, ...], exact: tuple[Tensor, ...]) -> Errors:
    """Return the relative error of the loss, and the largest of the gradients.

    The latter is the largest error in a row of classes, or in a tensor if the case has no rows, over
    the largest gradient there.
    """
    loss = ((found[0] - exact[0]).abs().max() / exact[0].abs().max()).item()
    pairs = list(zip(found[1:], exact[1:], strict=True))
    if not case.rows:
        pairs = [(x.reshape(1, -1), y.reshape(1, -1)) for x, y in pairs]
    rows = [
        (x - y).abs().amax(min(1, x.ndim - 1)) / y.abs().amax(min(1, x.ndim - 1)) for x, y in pairs
    ]
    return loss, max(row.max().item() for row in rows)


def prepare(case: Case) -> dict[str, Loss]:
    """Return what is timed: "selfkd", and each baseline as "eager <form>" and "compile <form>"."""
    contenders = {"selfkd": case.fused}
    for form, baseline in case.baselines.items():
        contenders[f"eager {form}"] = baseline
        contenders[f"compile {form}"] = torch.compile(baseline, dynamic=False)
    return contenders


def check(
    case: Case, contenders: dict[str, Loss], inputs: list[Tensor], grad: Tensor | None
) -> dict[str, Errors]:
    """Prove the baselines equal to the reference in float64; return the errors in float32."""
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


def peak(run: Callable[[], object]) -> int:
    """Return the bytes that a call adds to the resident memory of the process, at most."""

    def resident(field: str) -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return 1024 * int(next(x for x in lines if x.startswith(field)).split()[1])

    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # the peak is counted from here
    before = resident("VmRSS")
    run()
    return resident("VmHWM") - before


def take_samples(
    contenders: dict[str, Loss], inputs: list[Tensor], grad: Tensor | None, repeat: int
) -> dict[str, list[float]]:
    """Time the contenders in turns, and the copying of a large buffer ("copy"), in seconds."""
    source = torch.ones(COPY_BYTES // 4)
    target = source.clone()

    def seconds(function: Callable[[], object], calls: int = 1) -> float:
        start = time.perf_counter()
        for _ in range(calls):
            function()
        return (time.perf_counter() - start) / calls

    passes = {name: partial(loss_and_gradients, f, inputs, grad) for name, f in contenders.items()}
    calls = {name: math.ceil(SAMPLE_SECONDS / seconds(run, 2)) for name, run in passes.items()}
    samples: dict[str, list[float]] = {name: [] for name in [*passes, "copy"]}
    turns = list(passes)
    gc.disable()  # as timeit does: a collection would be charged to whoever runs when it is due
    for _ in range(repeat):
        for name in turns:
            if calls[name] > 1:  # untimed: the threads of whoever came before spin for a while
                seconds(passes[name], calls[name])
            samples[name].append(seconds(passes[name], calls[name]))
        samples["copy"].append(seconds(lambda: target.copy_(source)))
        turns.append(turns.pop(0))  # nobody always comes first after the copy
    return samples


def measure(case: Case, repeat: int) -> Result:
    """Check and time one case in this process."""
    torch.manual_seed(0)
    inputs = [x.requires_grad_(k < case.learning) for k, x in enumerate(case.inputs())]
    grad = case.grad() if case.grad else None
    contenders = prepare(case)
    proof = case.proof or case
    error = check(proof, prepare(proof), inputs, grad)
    memory = {
        name: peak(partial(loss_and_gradients, run, inputs, grad))
        for name, run in contenders.items()
        if "memory" in case.need  # small blocks stay in the process, and tell nothing
    }
    if case.part:
        contenders["part"] = case.part
    samples = take_samples(contenders, inputs, grad, repeat)

    medians = {name: statistics.median(times) for name, times in samples.items()}
    fastest = {
        kind: min(
            (name for name in medians if name.startswith(kind)), key=lambda name: medians[name]
        )
        for kind in ("eager", "compile")
    }
    bandwidth = 2 * COPY_BYTES / medians["copy"]
    ratios = {kind: medians[name] / medians["selfkd"] for kind, name in fastest.items()}
    ratios["copy"] = medians["selfkd"] / (case.bytes_moved / bandwidth)
    if case.part:
        ratios["part"] = medians["selfkd"] / medians["part"]
    if memory:
        ratios["memory"] = memory["selfkd"] / memory[fastest["eager"]]
    return {
        "case": case.name,
        "environment": dict(case.environment),
        "quartiles": {name: statistics.quantiles(times, n=4) for name, times in samples.items()},
        "errors": error,
        "peak_bytes": memory,
        "part_name": case.part_name,
        "fastest": fastest,
        "ratios": ratios,
        "need": dict(case.need),
        "bytes_per_second": bandwidth,
    }


def unmet(result: Result) -> list[str]:
    """Return the names of the ratios that miss what they must be."""
    ratios, need = result["ratios"], result["need"]
    return [k for k, n in need.items() if (ratios[k] > n if k in AT_MOST else ratios[k] < n)]


def is_busy(result: Result) -> bool:
    """Tell whether something else was running: then no ratio means anything."""
    return bool(result["bytes_per_second"] < SLOW_COPY)


def run_in_child(case: Case, options: argparse.Namespace) -> Result:
    """Measure one case in a process of its own, which starts with the case's environment."""
    command = [sys.executable, __file__, "--child", case.name]
    command += ["--repeat", str(options.repeat), "--threads", str(options.threads)]
    environment = os.environ | dict(case.environment)
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{case.name} failed")
    result: Result = json.loads(done.stdout)
    return result


def machine() -> Result:
    """Describe what the numbers depend on."""

    def text(*command: str) -> str:
        try:
            return subprocess.run(
                command, capture_output=True, text=True, check=True
            ).stdout.strip()
        except (OSError, subprocess.CalledProcessError):
            return "unknown"

    def line(path: str, start: str) -> str:
        lines = Path(path).read_text().splitlines() if Path(path).exists() else []
        return next((x.split(":", 1)[-1].strip() for x in lines if x.startswith(start)), "unknown")

    folder = str(Path(__file__).parent)
    return {
        "date": datetime.date.today().isoformat(),
        "commit": text("git", "-C", folder, "describe", "--always", "--dirty"),
        "cpu": line("/proc/cpuinfo", "model name"),
        "cores": os.cpu_count(),
        "huge pages": line("/sys/kernel/mm/transparent_hugepage/enabled", ""),
        "variant": library.text("selfkd_isa"),
        "selfkd": selfkd.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def show(result: Result) -> str:
    """Return the result as text: a line per contender."""
    bandwidth = result["bytes_per_second"]
    busy = "; THE MACHINE IS BUSY, repeat the run" if is_busy(result) else ""
    lines = [f"{result['case']}: copy {bandwidth / 1e9:.1f} GB/s{busy}"]
    lines += [f"  with {name}={value}" for name, value in result["environment"].items()]

    def bound(kind: str) -> str:
        if kind not in result["need"]:
            return ""
        sign = "<=" if kind in AT_MOST else ">="
        return f" (must be {sign} {result['need'][kind]:g}){' MISSED' * (kind in unmet(result))}"

    for name, (loss, gradient) in result["errors"].items():
        low, middle, high = (1e3 * x for x in result["quartiles"][name])
        kind = name.split()[0]
        if name == "selfkd":
            note = f"{result['ratios']['copy']:.2f}x copying its bytes{bound('copy')}"
        else:
            note = f"{middle / (1e3 * result['quartiles']['selfkd'][1]):.2f}x selfkd"
            note += bound(kind) * (name == result["fastest"][kind])
        times = f"{middle:10.3f} ms [{low:.3f}, {high:.3f}]"
        lines.append(f"  {name:<22}{times:<36}error {loss:.0e}, {gradient:.0e}  {note}")
    if "part" in result["ratios"]:
        lines.append(f"  {result['ratios']['part']:.2f}x {result['part_name']}{bound('part')}")
    if result["peak_bytes"]:
        own, eager = (result["peak_bytes"][k] for k in ("selfkd", result["fastest"]["eager"]))
        lines.append(
            f"  peak memory {own / 2**20:.0f} MB, eager {eager / 2**20:.0f} MB: "
            f"{result['ratios']['memory']:.2f}x{bound('memory')}"
        )
    return "\n".join(lines)


def main() -> int:
    """Run the cases, print and save what they gave, return the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--case", default="", help="only cases whose name contains this")
    add("--repeat", type=int, default=21, help="samples of each contender, default: 21")
    add("--threads", type=int, default=2, help="default: 2")
    add("--json", type=Path, help="save machine, medians, ratios and errors in this file")
    add(
        "--require",
        action="store_true",
        help="exit code 1 when a ratio is missed, or the machine busy",
    )
    add("--child", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        torch.set_num_threads(options.threads)
        case = next(case for case in CASES if case.name == options.child)
        json.dump(measure(case, options.repeat), sys.stdout)
        return 0

    about = machine() | {"threads": options.threads, "repeat": options.repeat}
    print("\n".join(f"{name}: {value}" for name, value in about.items()))
    print("\nmedian [quartiles] of forward + backward; largest error of loss, gradients\n")
    results = []
    for case in CASES:
        if options.case in case.name:
            results.append(run_in_child(case, options))
            print(show(results[-1]), end="\n\n", flush=True)
    if options.json:
        options.json.write_text(json.dumps({"machine": about, "results": results}, indent=1) + "\n")
    missed = [f"{result['case']}: {kind}" for result in results for kind in unmet(result)]
    missed += [f"{result['case']}: quiet machine" for result in results if is_busy(result)]
    print(f"missed: {'; '.join(missed)}" if missed else "all required ratios hold")
    return 1 if missed and options.require else 0


if __name__ == "__main__":
    sys.exit(main())
