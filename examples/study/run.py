"""Train every setting of the grids with every seed; go on where an earlier run was stopped.

Each finished run is a line of OUT/runs.jsonl. When all of a study are there, study-NAME.json is written;
`make results` makes docs/study.md of those in bench/results. Runs of other code than this do not count.

    python -m study                   all studies, 10 seeds, in runs/study
    python -m study --quick           the same grid, 2 seeds, a quarter of the epochs
    python -m study --only simreg     one study
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import json
import multiprocessing
import os
import signal
import statistics
import sys
import time
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

try:
    import torch
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeElapsedColumn
    from selfkd import __version__
    from selfkd.bench.report import save
    from selfkd.bench.run import machine
    from selfkd.bench.study import NAME, print_study

    from . import aikd, detector, frskd, sd_dropout, segmentation, simreg, train
except ModuleNotFoundError as error:
    sys.exit(f"{error}; the study needs: pip install torch matplotlib rich scikit-learn")

STUDIES = {
    module.STUDY.name: module.STUDY
    for module in (sd_dropout, detector, frskd, segmentation, aikd, simreg)
}
SEEDS = range(1000, 1010)  # none of them was used while the grids were settled
QUICK_SEEDS, QUICK_PART = range(2), 0.25
Key = tuple[str, str, str, int]  # study, task, setting, seed
Job = tuple[str, int, int]  # study, number in its grid, seed
Run = dict[str, Any]  # values of the metrics, median seconds of a step


@functools.cache
def code() -> str:
    """Return what tells runs of this code from those of another."""
    found = hashlib.sha256(__version__.encode())
    for path in sorted(Path(__file__).parent.glob("*.py")):
        found.update(path.read_bytes())
    return found.hexdigest()[:12]


def key(job: Job) -> Key:
    name, number, seed = job
    setting = STUDIES[name].grid[number]
    return name, setting.task, setting.name, seed


def finished(path: Path, part: float) -> dict[Key, Run]:
    """Return the runs that a file holds; a line that was cut off is none."""
    found: dict[Key, Run] = {}
    text = path.read_text() if path.exists() else ""
    for line in text.splitlines():
        with suppress(json.JSONDecodeError):
            run = json.loads(line)
            if (run["code"], run["part"]) == (code(), part):
                found[(*run["key"],)] = run
    if text and not text.endswith("\n"):
        path.write_text(f"{text}\n")  # so that the next line begins one
    return found


def work(jobs: Iterable[Job], path: Path, part: float, parent: int) -> None:
    """Do one job after the other, in a process of its own; append a line for each."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    torch.set_num_threads(1)
    for job in jobs:
        if os.getppid() != parent:  # it was killed
            return
        study, setting = STUDIES[job[0]], STUDIES[job[0]].grid[job[1]]
        train.step_seconds.clear()
        values = {name: round(x, 6) for name, x in study.run(setting, job[2], part).items()}
        # None where nothing is trained; the median leaves out steps that the machine disturbed.
        step = round(statistics.median(train.step_seconds), 6) if train.step_seconds else None
        run = {"code": code(), "part": part, "key": key(job), "values": values, "step": step}
        with path.open("a") as file:  # one write of a line: the other process' lines stay whole
            file.write(json.dumps(run) + "\n")


def lines(path: Path) -> int:
    """Return how many runs were written, of whatever code."""
    return path.read_bytes().count(b"\n") if path.exists() else 0


def train_all(jobs: list[Job], path: Path, part: float, processes: int) -> None:
    """Share what is not finished among processes by its seed, behind a progress bar."""
    seeds, runs = sorted({seed for *_, seed in jobs}), finished(path, part)
    left = [job for job in jobs if key(job) not in runs]
    before = lines(path)
    context = multiprocessing.get_context("spawn")
    shares = [[x for x in left if seeds.index(x[2]) % processes == k] for k in range(processes)]
    workers = [
        context.Process(target=work, args=(share, path, part, os.getpid()))
        for share in shares
        if share
    ]
    bar = Progress(
        *("[progress.description]{task.description}", BarColumn(), MofNCompleteColumn()),
        TimeElapsedColumn(),
        console=Console(stderr=True),
    )
    for worker in workers:
        worker.start()
    try:
        with bar:
            task = bar.add_task("study", total=len(jobs))
            while any(worker.is_alive() for worker in workers):
                time.sleep(0.2)
                bar.update(task, completed=len(jobs) - len(left) + lines(path) - before)
                if any(worker.exitcode for worker in workers):
                    raise SystemExit("a training failed; the same command goes on from here")
    finally:
        for worker in workers:
            worker.terminate()


def here() -> dict[str, Any]:
    """Return what the numbers depend on, as the benchmark's reports say it."""
    about = machine(argparse.Namespace(device="cpu", repeat=None))
    return {name: x for name, x in about.items() if name != "repeat"}


def report(
    study: Any, about: dict[str, Any], seeds: list[int], part: float, runs: dict[Key, Run]
) -> dict[str, Any]:
    """Return all that is known of a study: the grid, the claims, every value of every seed."""

    def of_seeds(setting: Any) -> list[Run]:
        return [runs[study.name, setting.task, setting.name, seed] for seed in seeds]

    return {
        "study": study.name,
        "title": study.title,
        "machine": about,
        "seeds": seeds,
        "part": part,
        "tasks": dict(study.tasks),
        "metrics": {name: asdict(metric) for name, metric in study.metrics.items()},
        "headline": study.headline,
        "baselines": list(study.baselines),
        "references": list(study.references),
        "drawn": list(study.drawn),
        "claims": [asdict(claim) for claim in study.claims],
        "settings": [
            {
                "task": setting.task,
                "name": setting.name,
                "values": {
                    metric: [run["values"][metric] for run in of_seeds(setting)]
                    for metric in study.metrics
                },
                "step": [run["step"] for run in of_seeds(setting)],
            }
            for setting in study.grid
        ],
    }


def main(argv: list[str] | None = None) -> int:
    """Run what the command line says; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="study", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add(
        "--quick", action="store_true", help=f"{len(QUICK_SEEDS)} seeds, {QUICK_PART} of the epochs"
    )
    add("--seeds", type=int, help=f"how many, default: {len(SEEDS)}")
    add("--only", choices=STUDIES, nargs="+", default=list(STUDIES), help="some of the studies")
    add("--task", help="one of their tasks; writes no report")
    add("--processes", type=int, default=2, help="of one thread each, default: 2")
    add("--part", type=float, help=f"of the epochs, default: 1, with --quick {QUICK_PART}")
    add("--out", type=Path, help="folder of the runs, default: runs/study or runs/study-quick")
    add("--report", type=Path, help="folder of study-NAME.json, default: that of the runs")
    options = parser.parse_args(argv)
    folder = options.out or Path("runs") / ("study-quick" if options.quick else "study")
    seeds = list(QUICK_SEEDS if options.quick else SEEDS)
    if options.seeds:
        seeds = list(range(seeds[0], seeds[0] + options.seeds))
    part = options.part or (QUICK_PART if options.quick else 1.0)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "runs.jsonl"
    torch.set_num_threads(1)
    chosen = [STUDIES[name] for name in options.only]
    jobs = [
        (study.name, number, seed)
        for study in chosen
        for seed in seeds
        for number, setting in enumerate(study.grid)
        if options.task in (None, setting.task)
    ]
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # ends as Ctrl-C does
    with suppress(KeyboardInterrupt):
        train_all(jobs, path, part, options.processes)
    runs, about = finished(path, part), here()
    missing = [job for job in jobs if key(job) not in runs]
    for study in chosen if not options.task else ():
        if study.name not in {name for name, *_ in missing}:
            found = report(study, about, seeds, part, runs)
            save(found, (options.report or folder) / f"{NAME}{study.name}.json")
            print_study(found)
    if missing:
        print(f"{len(missing)} of {len(jobs)} runs are missing; the same command goes on from here")
    return 1 if missing else 0
