"""What the training examples share: command line, data, the timing of a loss, the report."""

from __future__ import annotations

import argparse
import csv
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from statistics import fmean

PACKAGES = {
    "torch": "torch",
    "sklearn": "scikit-learn",
    "matplotlib": "matplotlib",
    "rich": "rich",
    "selfkd": "<the folder of this project>",
}
missing = [package for module, package in PACKAGES.items() if find_spec(module) is None]
if missing:
    sys.exit(f"Something is missing, install it with: python -m pip install {' '.join(missing)}")

import torch
from matplotlib.figure import Figure
from rich.console import Console
from rich.progress import track
from rich.table import Table
from sklearn.datasets import load_digits
from torch import Tensor, nn

FIRST_STEPS = 50
TOLERANCE = 1e-4  # relative difference of fused and reference over the first steps


@dataclass
class Run:
    """What one training run leaves behind: the loss of every step, and how it ended."""

    name: str
    losses: list[float] = field(default_factory=list)
    accuracy: float = 0.0
    loss_seconds: float = 0.0

    def final_loss(self) -> float:
        """Return the mean of the last 20 losses."""
        return fmean(self.losses[-20:])

    def difference(self, other: Run, steps: int | None = None) -> float:
        """Return the largest relative difference from another run's losses, in the first steps."""
        pairs = zip(self.losses[:steps], other.losses[:steps], strict=True)
        return max(abs(mine - theirs) / abs(theirs) for mine, theirs in pairs)


class Digits:
    """scikit-learn's 1,797 handwritten digits, 8 x 8 pixels; 360 are held out.

    Attributes
    ----------
    images, held_out_images
        (N, 1, 8, 8), float32 in [0, 1].
    labels, held_out_labels
        (N,), int64.
    """

    classes = 10

    def __init__(self, device: str, held_out: int = 360) -> None:
        data = load_digits()
        order = torch.randperm(len(data.target), generator=torch.Generator().manual_seed(0))
        images = (torch.from_numpy(data.images).float() / 16).unsqueeze(1)[order].to(device)
        labels = torch.from_numpy(data.target).long()[order].to(device)
        self.images, self.held_out_images = images[:-held_out], images[-held_out:]
        self.labels, self.held_out_labels = labels[:-held_out], labels[-held_out:]

    def batches(self, steps: int, size: int, seed: int, title: str) -> Iterator[tuple[Tensor, ...]]:
        """Yield random batches behind a progress bar."""
        generator = torch.Generator().manual_seed(seed)
        for _ in track(range(steps), description=f"{title:<9}"):
            index = torch.randint(len(self.labels), (size,), generator=generator)
            yield self.images[index], self.labels[index]

    @torch.no_grad()
    def accuracy(self, model: nn.Module) -> float:
        """Return the share of held-out digits that the model recognises."""
        predictions = model.eval()(self.held_out_images).argmax(1)
        return (predictions == self.held_out_labels).float().mean().item()


class TimedLoss:
    """A loss function with a clock around its own forward and backward pass.

    The loss is evaluated and differentiated by autograd on detached inputs, between two readings
    of the clock; these gradients then enter the graph of the training step. So the time is
    that of the loss alone, on the tensors of the real run. The first call, which loads
    libraries and starts threads, is left out.
    """

    def __init__(self, function: Callable[..., Tensor]) -> None:
        self.function = function
        self.times: list[float] = []

    def __call__(self, *tensors: Tensor, **keywords: object) -> Tensor:
        inputs = [tensor.detach().requires_grad_() for tensor in tensors]
        start = now(tensors[0])
        loss = self.function(*inputs, **keywords)
        gradients = torch.autograd.grad(loss, inputs)
        self.times.append(now(tensors[0]) - start)
        loss = loss.detach()
        for tensor, gradient in zip(tensors, gradients, strict=True):
            loss = loss + (gradient * (tensor - tensor.detach())).sum()  # adds 0, but has a gradient
        return loss

    def seconds(self) -> float:
        """Return the seconds of all calls but the first."""
        return sum(self.times[1:])


def now(tensor: Tensor) -> float:
    """Return the seconds on the clock, once the tensor's device has no work left."""
    if tensor.is_cuda:
        torch.cuda.synchronize(tensor.device)
    return time.perf_counter()


def parse(
    argv: list[str] | None, description: str | None, weight: float, steps: int
) -> argparse.Namespace:
    """Read the command line that every example understands."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    device = "cuda" if torch.cuda.is_available() else "cpu"
    option = parser.add_argument
    option("--impl", choices=["fused", "reference", "both"], default="both", help="loss to use")
    option("--weight", type=float, default=weight, help="weight of the self-distillation loss")
    option("--control", action="store_true", help="train with weight 0 as well, to compare")
    option("--steps", type=int, default=steps, help="training steps")
    option("--seed", type=int, default=0, help="of parameters, batches and dropout masks")
    option("--device", default=device, help="device to train on")
    option("--out", type=Path, default=Path("runs"), help="folder for the picture and the curves")
    return parser.parse_args(argv)


def train_all(train: Callable[..., Run], options: argparse.Namespace) -> list[Run]:
    """Train once per implementation, from the same seed, and with weight 0 if it was asked for."""
    common = {"steps": options.steps, "seed": options.seed, "device": options.device}
    names = ["reference", "fused"] if options.impl == "both" else [options.impl]
    runs = [train(name, weight=options.weight, **common) for name in names]
    if options.control:
        runs.append(train(names[0], weight=0.0, **common))
        runs[-1].name = "weight 0"
    return runs


def report(title: str, runs: list[Run], out: Path) -> int:
    """Print the table, save picture and curves.

    Returns
    -------
    int
        Exit code: 1 when fused and reference differ by more than the tolerance, else 0.
    """
    first, *others = runs
    table = Table("", *(run.name for run in runs), title=title)

    def row(text: str, form: str, cell: Callable[[Run], float]) -> None:
        table.add_row(text, *(form.format(cell(run)) for run in runs))

    row("held-out accuracy", "{:.2%}", lambda run: run.accuracy)
    row("final loss (mean of 20 steps)", "{:.6f}", Run.final_loss)
    row("seconds in the loss, forward + backward", "{:.4f}", lambda run: run.loss_seconds)
    if others:
        label = f"largest difference from {first.name}"
        row("speed-up of the loss", "{:.1f}x", lambda run: first.loss_seconds / run.loss_seconds)
        row(f"{label}, first {FIRST_STEPS} steps", "{:.1e}", lambda run: run.difference(first, FIRST_STEPS))
        row(f"{label}, all steps", "{:.1e}", lambda run: run.difference(first))

    console = Console(width=110)
    console.print(table)
    out.mkdir(parents=True, exist_ok=True)
    path = out / title.lower().replace("-", "_").replace(" ", "_")
    save_curves(runs, path.with_suffix(".csv"))
    save_picture(title, runs, path.with_suffix(".png"))
    console.print(f"Curves saved in {path}.png and {path}.csv")

    by_name = {run.name: run for run in runs}
    if {"fused", "reference"} <= by_name.keys():
        found = by_name["fused"].difference(by_name["reference"], FIRST_STEPS)
        if not found <= TOLERANCE:
            console.print(f"FAILED: fused and reference differ by {found:.1e}, allowed {TOLERANCE:.0e}")
            return 1
    return 0


def save_curves(runs: list[Run], path: Path) -> None:
    """Write one line per step and one column per run."""
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["step", *(run.name for run in runs)])
        writer.writerows([step, *row] for step, row in enumerate(zip(*(run.losses for run in runs), strict=True)))


def save_picture(title: str, runs: list[Run], path: Path) -> None:
    """Draw the losses over the steps."""
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    for run, style in zip(runs, ["-", "--", ":"], strict=False):
        axes.plot(run.losses, style, label=run.name)
    axes.set(title=f"{title}: training loss", xlabel="step", ylabel="loss", yscale="log")
    axes.legend()
    figure.savefig(path, dpi=150)
