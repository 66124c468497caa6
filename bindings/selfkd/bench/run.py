"""The command: one process per case, and what is made of the results, also after Ctrl-C."""

from __future__ import annotations

import argparse
import datetime
import importlib.util
import json
import math
import os
import platform
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch

from .. import __version__, library
from . import calls, report
from .case import Case
from .cases import FORMS, make
from .measure import Result, measure
from .options import UsageError, one_of
from .suite import suite

Tell = Callable[[str, int], None]  # what is going on, and how many cases are done
PICTURES = (".png", ".pdf", ".svg")
TOLD = "selfkd bench: "  # begins the lines that the process of a case writes for this one
ENDING = {signal.SIGINT, signal.SIGTERM}  # Ctrl-C, kill
INTERRUPTED = 130  # exit code, as the shell has it for Ctrl-C


def select(options: argparse.Namespace) -> list[Case]:
    """The cases that are asked for."""
    for name in options.operators:
        if name not in FORMS:
            raise UsageError(f"{name} is no operator, expected one of {', '.join(FORMS)}")
    if options.shape is None:
        found = suite(options.device)
        if options.suite == "required":
            found = [case for case in found if case.need]
        if options.dtype:
            found = [case.of_dtype(options.dtype) for case in found]
        if options.operators:
            found = [case for case in found if case.operator in options.operators]
    elif not options.operators:
        raise UsageError("--shape is given, expected the operators that it is for, too")
    else:
        try:
            found = [
                make(operator, *shape, dtype=options.dtype or "float32")
                for operator in options.operators
                for shape in options.shape
            ]
        except ValueError as error:
            raise UsageError(str(error)) from None
    found = [case for case in found if options.case in case.name]
    if not found:
        raise UsageError("no case of the suite is asked for, expected other OP, --case or --suite")
    return found


def has(module: str) -> bool:
    return importlib.util.find_spec(module) is not None


def check(options: argparse.Namespace) -> None:
    """What cannot be done here is said before anything is measured; fills in what is not given."""
    on_gpu = options.device == "cuda"
    if on_gpu and not torch.cuda.is_available():
        raise UsageError("--device is cuda, but PyTorch sees no GPU here")
    if options.against is None:
        options.against = ["eager", "compile"] + ["graph"] * on_gpu
        options.against += ["liger"] * (on_gpu and has("liger_kernel"))
    for name in ("graph", "liger"):
        if name in options.against and not on_gpu:
            raise UsageError(f"--against {name} needs --device cuda")
    if "liger" in options.against and not has("liger_kernel"):
        raise UsageError("--against liger needs Liger: pip install liger-kernel")
    for option in ("json", "plot", "trace"):
        path = getattr(options, option)
        if path and not path.parent.is_dir():
            raise UsageError(f"--{option} is {path}, but there is no folder {path.parent}")
    if options.plot and options.plot.suffix not in PICTURES:
        raise UsageError(f"--plot is {options.plot}, expected a name in {one_of(PICTURES)}")
    if options.plot and not has("matplotlib"):
        raise UsageError("--plot needs matplotlib: pip install 'selfkd[bench]'")
    if options.min_speedup is not None and "eager" not in options.against:
        raise UsageError("--min-speedup compares with eager PyTorch, which --against leaves out")


# ---- a case in a process of its own ----


def child(options: argparse.Namespace) -> int:
    """Measure one case; a line of JSON for each stage, and one for the result."""
    signal.pthread_sigmask(signal.SIG_UNBLOCK, ENDING)
    cases = select(options)

    def say(stage: str) -> None:
        print(TOLD + json.dumps({"stage": stage}), flush=True)

    case = cases[options.child]
    trace = options.trace
    if trace and len(cases) > 1:
        trace = trace.with_stem(f"{trace.stem}-{case.name.replace(' ', '-')}")
    result = measure(
        *(case, options.device),
        against=options.against,
        repeat=options.repeat,
        trace=trace,
        say=say,
    )
    print(TOLD + json.dumps({"result": result}), flush=True)
    return 0


def run_child(options: argparse.Namespace, number: int, case: Case, tell: Tell) -> Result | None:
    """The result of case `number`; None if it failed. The process starts with the case's environment."""
    command = [sys.executable, "-m", "selfkd", *options.given, "--child", str(number)]
    environment = os.environ | dict(case.environment)
    result: Result | None = None
    signal.pthread_sigmask(signal.SIG_BLOCK, ENDING)  # until there is a process to end
    try:
        # A session of its own, so that Ctrl-C reaches this process alone, which then ends the other.
        with subprocess.Popen(
            command, env=environment, stdout=subprocess.PIPE, text=True, start_new_session=True
        ) as process:
            try:
                signal.pthread_sigmask(signal.SIG_UNBLOCK, ENDING)
                for line in process.stdout or ():
                    told = line.startswith(TOLD)
                    message = json.loads(line.removeprefix(TOLD)) if told else {}
                    if "stage" in message:
                        tell(f"{case.name}: {message['stage']}", number)
                    result = message.get("result", result)
            except BaseException:
                with suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()  # after Ctrl-C Popen itself gives up after a quarter of a second
                raise
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, ENDING)
    return result


# ---- the machine ----


def output(*command: str) -> str:
    """What a command prints; "unknown" where it fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return done.stdout.strip()


def commit() -> str:
    """The state of the checkout that this is run in or from; a release has its version alone."""
    for folder in (Path.cwd(), Path(__file__).parents[3]):
        if (folder / "ops" / "selfkd.h").exists():
            return output("git", "-C", str(folder), "describe", "--always", "--dirty")
    return f"v{__version__}"


def machine(options: argparse.Namespace) -> dict[str, Any]:
    """Describe what the numbers depend on."""

    def line(path: str, start: str) -> str:
        lines = Path(path).read_text().splitlines() if Path(path).exists() else []
        return next((x.split(":", 1)[-1].strip() for x in lines if x.startswith(start)), "unknown")

    about: dict[str, Any] = {
        "date": datetime.date.today().isoformat(),
        "commit": commit(),
        "cpu": line("/proc/cpuinfo", "model name"),
        "cores": len(os.sched_getaffinity(0)),
        "huge pages": line("/sys/kernel/mm/transparent_hugepage/enabled", ""),
        "variant": library.text("selfkd_isa"),
        "selfkd": __version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "threads": torch.get_num_threads(),
        "repeat": options.repeat,
    }
    if options.device == "cuda":
        driver = output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
        about["gpu"] = torch.cuda.get_device_name()
        about["driver"] = driver.splitlines()[0]
        about["cuda"] = f"PyTorch's {torch.version.cuda}; selfkd: {library.text('selfkd_cuda')}"
    return about


# ---- the whole run ----


@contextmanager
def progress(total: int) -> Iterator[Tell]:
    """A bar, if rich is installed."""
    if not has("rich"):
        yield lambda text, done: None
        return
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    text = TextColumn("{task.description}", markup=False)
    columns = (text, BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=report.console(stderr=True), transient=True) as bar:
        task = bar.add_task("", total=total)
        yield lambda text, done: bar.update(task, description=text, completed=done)


def run_cases(options: argparse.Namespace, cases: list[Case], found: dict[str, Any]) -> None:
    """Fill `found` case by case, and keep it in the JSON file: nothing is lost, whatever happens."""
    with progress(len(cases)) as tell:
        for number, case in enumerate(cases):
            tell(case.name, number)
            result = run_child(options, number, case, tell)
            if result:
                found["results"].append(result)
                report.print_result(result)
            else:
                found["failed"].append(case.name)
                print(f"{case.name}: FAILED\n", flush=True)
            if options.json:
                report.save(found, options.json)


def verdict(options: argparse.Namespace, found: dict[str, Any]) -> int:
    """Print what was missed; returns the exit code."""
    missed = report.missed(found["results"])
    if missed or any(result["need"] for result in found["results"]):
        print(f"missed: {'; '.join(missed)}" if missed else "all required ratios hold")
    code = 1 if found["failed"] or (missed and options.require) else 0
    for result in found["results"] if options.min_speedup is not None else ():
        if report.disturbances(result):
            print(f"{result['case']}: not compared with --min-speedup, as the machine was busy")
            code = 1
            continue
        speedup = result["ratios"].get("eager", math.inf)  # no eager form had memory enough
        if speedup < options.min_speedup:
            print(
                f"{result['case']}: {speedup:.2f}x the speed of {result['fastest']['eager']}, "
                f"--min-speedup is {options.min_speedup:g}"
            )
            code = 1
    return code


def run_calls(options: argparse.Namespace) -> int:
    """Measure the suite of calls, print and save it; returns the exit code."""
    operators = options.operators or list(calls.SHAPES)
    if unknown := set(operators) - set(calls.SHAPES):
        raise UsageError(
            f"{min(unknown)} is no operator of the calls, expected {', '.join(calls.SHAPES)}"
        )
    if options.shape or options.device != "cpu":
        raise UsageError("--suite calls has shapes of its own, on the CPU")
    found = calls.measure(operators, options.repeat)
    report.print_table(calls.table(found), "a call where there is nothing to compute")
    if options.json:
        content = {"machine": machine(options), "results": [], "failed": [], "calls": found}
        report.save(content, options.json)
    missed = calls.missed(found)
    print(f"missed: {'; '.join(missed)}" if missed else "all required ratios hold")
    return 1 if missed and options.require else 0


def main(options: argparse.Namespace) -> int:
    """Run the cases, print and save what they gave, return the exit code."""
    check(options)
    if options.suite == "calls":
        return run_calls(options)
    if options.threads:
        torch.set_num_threads(options.threads)
    if options.child is not None:
        return child(options)
    cases = select(options)
    found: dict[str, Any] = {"machine": machine(options), "results": [], "failed": []}
    print("\n".join(f"{name}: {value}" for name, value in found["machine"].items()), end="\n\n")
    interrupted = False
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)  # ends as Ctrl-C does
    try:
        run_cases(options, cases, found)
    except KeyboardInterrupt:
        interrupted = True
        print(f"interrupted after {len(found['results'])} of {len(cases)} cases")
    finally:
        signal.signal(signal.SIGTERM, before)
    report.print_summary(found["results"])
    if options.json:
        report.save(found, options.json)
    if options.plot:
        from . import plot

        plot.draw(found, options.plot)
    code = verdict(options, found)
    return INTERRUPTED if interrupted else code
