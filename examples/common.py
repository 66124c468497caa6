"""What the training examples share: command line, data, the timing of a loss, the report."""

from __future__ import annotations

import argparse
import csv
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean, median
from typing import Any

try:
    import torch
    import torch.nn.functional as F
    from matplotlib.figure import Figure
    from rich.console import Console
    from rich.progress import track
    from rich.table import Table
    from sklearn.datasets import load_digits
    from torch import Tensor, nn
except ModuleNotFoundError as error:
    sys.exit(f"{error}; the examples need: pip install torch matplotlib rich scikit-learn")

EARLY = 50  # steps before rounding can grow
TOLERANCE = 1e-4  # relative difference of fused and reference over the early steps


@dataclass
class Run:
    """What one training run leaves behind."""

    name: str
    losses: list[float] = field(default_factory=list)  # of every step
    accuracy: float = 0.0  # on the held-out data
    seconds: list[float] = field(default_factory=list)  # spent in the timed loss, call by call

    def difference(self, other: Run, steps: int | None = None) -> float:
        """Return the largest relative difference from another run, in the first `steps` or all."""
        pairs = zip(self.losses[:steps], other.losses[:steps], strict=True)
        return max(abs(mine - theirs) / abs(theirs) for mine, theirs in pairs)


class Images:
    """Labelled images, some of them held out: (N, C, H, W) float32 in [0, 1], labels (N,) int64."""

    images: Tensor
    labels: Tensor
    held_out_images: Tensor
    held_out_labels: Tensor
    classes: int

    def batches(
        self, steps: int, size: int, seed: int, title: str, done: int = 0
    ) -> Iterator[tuple[Tensor, ...]]:
        """Yield random batches of images and labels after the first `done`, behind a progress bar."""
        generator = torch.Generator().manual_seed(seed)
        for step in track(range(steps), description=f"{title:<9}"):
            index = torch.randint(len(self.labels), (size,), generator=generator)
            if step >= done:
                yield self.images[index], self.labels[index]

    def epochs(
        self, steps: int, size: int, seed: int, title: str, done: int = 0
    ) -> Iterator[tuple[bool, Tensor, Tensor, Tensor]]:
        """Yield what PreviousEpoch needs: whether a batch ends an epoch, indices, images, labels."""
        each = -(-len(self.labels) // size)
        for step in track(range(steps), description=f"{title:<9}"):
            if step % each == 0:
                generator = torch.Generator().manual_seed(1000 * seed + step // each)
                order = torch.randperm(len(self.labels), generator=generator).split(size)
            index = order[step % each]
            if step >= done:
                yield step % each == each - 1, index, self.images[index], self.labels[index]

    @torch.no_grad()
    def accuracy(self, model: nn.Module) -> float:
        """Return the share of held-out images that the model recognises."""
        predictions = model.eval()(self.held_out_images).argmax(1)
        return (predictions == self.held_out_labels).float().mean().item()

    @torch.no_grad()
    def neighbour_accuracy(self, backbone: nn.Module) -> float:
        """Return the share of held-out images of the class of their nearest neighbour, by cosine."""
        known, new = (
            F.normalize(torch.cat([backbone.eval()(part) for part in images.split(1000)]))
            for images in (self.images, self.held_out_images)
        )
        found = self.labels[(new @ known.T).argmax(1)]
        return (found == self.held_out_labels).float().mean().item()


class Digits(Images):
    """scikit-learn's 1,797 handwritten digits, 8 x 8; 360 are held out."""

    classes = 10

    def __init__(self, device: str, held_out: int = 360) -> None:
        data = load_digits()
        order = torch.randperm(len(data.target), generator=torch.Generator().manual_seed(0))
        images = (torch.from_numpy(data.images).float() / 16).unsqueeze(1)[order].to(device)
        labels = torch.from_numpy(data.target)[order].to(device)
        self.images, self.held_out_images = images[:-held_out], images[-held_out:]
        self.labels, self.held_out_labels = labels[:-held_out], labels[-held_out:]


class CIFAR100(Images):
    """CIFAR-100 by torchvision, from a folder that it is loaded into if it is not there."""

    classes = 100

    def __init__(self, folder: Path, device: str) -> None:
        from torchvision.datasets import CIFAR100 as Dataset

        both = [Dataset(folder, train, download=True) for train in (True, False)]
        self.images, self.held_out_images = (
            torch.from_numpy(x.data).movedim(-1, 1).float().div(255).to(device) for x in both
        )
        self.labels, self.held_out_labels = (torch.tensor(x.targets, device=device) for x in both)


def convolution(inputs: int, outputs: int, stride: int = 1) -> list[nn.Module]:
    """Return a convolution, its normalisation and a smooth activation.

    Smooth, because at the kink of a ReLU the last bit of a loss decides between two different runs.
    """
    conv = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
    return [conv, nn.BatchNorm2d(outputs), nn.SiLU()]


class Network(nn.Module):
    """Three convolutions, global average pooling to `features`, a linear head."""

    def __init__(self, classes: int, channels: int = 1, features: int = 128) -> None:
        super().__init__()
        layers = [
            *convolution(channels, features // 4),
            *convolution(features // 4, features // 2, stride=2),
            *convolution(features // 2, features),
        ]
        self.backbone = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.head = nn.Linear(features, classes)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.backbone(images))


class Checkpoint:
    """What some training runs have reached, in one file; without a file, nothing is kept."""

    def __init__(self, path: Path | None, every: int = 100) -> None:
        self.path, self.every = path, every
        self.states = torch.load(path, weights_only=True) if path and path.exists() else {}

    def restore(self, name: str, curves: list[list[float]], *parts: Any) -> int:
        """Restore modules and optimizers, append to the curves, return the steps that are done."""
        if name not in self.states:
            return 0
        for part, state in zip(parts, self.states[name]["parts"], strict=True):
            part.load_state_dict(state)
        for curve, values in zip(curves, self.states[name]["curves"], strict=True):
            curve.extend(values)
        return len(curves[0])

    def after_step(self, name: str, curves: list[list[float]], *parts: Any) -> None:
        """Save after every `every` steps."""
        if len(curves[0]) % self.every == 0:
            self.save(name, curves, *parts)

    def save(self, name: str, curves: list[list[float]], *parts: Any) -> None:
        """Save what `restore` restores."""
        if self.path:
            state = {"curves": curves, "parts": [part.state_dict() for part in parts]}
            torch.save({**self.states, name: state}, self.path.with_suffix(".new"))
            self.path.with_suffix(".new").replace(self.path)
            self.states = torch.load(self.path, weights_only=True)


def train_teacher(data: Images, steps: int, checkpoint: Checkpoint, features: int) -> Network:
    """Train a classifier on the labels, and freeze it."""
    torch.manual_seed(0)
    network = Network(data.classes, data.images.shape[1], features).to(data.images.device)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-4)
    losses: list[float] = []
    done = checkpoint.restore("teacher", [losses], network, optimizer)
    for images, labels in data.batches(steps, 64, 0, "teacher", done):
        loss = F.cross_entropy(network(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    checkpoint.save("teacher", [losses], network, optimizer)
    print(f"teacher: held-out accuracy {data.accuracy(network):.2%}")
    return network.requires_grad_(False).eval()


class TimedLoss:
    """A loss function with a clock around its own forward and backward pass.

    The loss is evaluated and differentiated by autograd on detached inputs, between two readings
    of the clock; the gradients then enter the graph of the training step. So the time is that of
    the loss alone, on the tensors of the real run, whatever else the step does. The first call,
    which loads libraries and starts threads, is left out.
    """

    def __init__(self, function: Callable[..., Tensor]) -> None:
        self.function = function
        self.calls: list[float] = []

    def __call__(self, *tensors: Tensor, **arguments: Any) -> Tensor:
        inputs = [tensor.detach().requires_grad_(tensor.requires_grad) for tensor in tensors]
        start = clock(tensors[0])
        loss = self.function(*inputs, **arguments)
        gradients = torch.autograd.grad(loss, [x for x in inputs if x.requires_grad])
        self.calls.append(clock(tensors[0]) - start)
        loss = loss.detach()
        live = [tensor for tensor in tensors if tensor.requires_grad]
        for tensor, gradient in zip(live, gradients, strict=True):
            loss = loss + (gradient * (tensor - tensor.detach())).sum()  # adds 0, with a gradient
        return loss

    @property
    def seconds(self) -> list[float]:
        """Seconds of every call but the first."""
        return self.calls[1:]


def clock(tensor: Tensor) -> float:
    """Return the time in seconds, once the tensor's device has no work left."""
    if tensor.is_cuda:
        torch.cuda.synchronize(tensor.device)
    return time.perf_counter()


def parse(
    argv: list[str] | None,
    description: str,
    weight: float,
    long: bool = False,
    *,
    impls: tuple[str, ...] = (),
    more: Callable[[argparse.ArgumentParser], Any] | None = None,
) -> argparse.Namespace:
    """Read the command line that every example understands; `long`: that may run for hours, too.

    `impls` are implementations beside "fused" and "reference"; `more` adds options.
    """
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    device = "cuda" if torch.cuda.is_available() else "cpu"
    add = parser.add_argument
    add(
        "--impl",
        choices=["fused", "reference", *impls, "both"],
        default="both",
        help="default: both",
    )
    add("--weight", type=float, default=weight, help=f"of the extra loss, default: {weight}")
    add("--control", action="store_true", help="train a third time, with weight 0")
    add("--steps", type=int, default=400, help="training steps, default: 400")
    add("--seed", type=int, default=0, help="of parameters, batches and dropout, default: 0")
    add("--threads", type=int, default=1, help="CPU threads; the networks are small, default: 1")
    add("--device", default=device, help=f"default: {device}")
    add("--out", type=Path, default=Path("runs"), help="folder of picture and csv, default: runs")
    if long:
        add("--data", type=Path, help="folder of CIFAR-100 (or VOC), default: digits")
        add("--checkpoint", type=Path, help="file to save to and to go on from")
        add("--every", type=int, default=100, help="steps between two saves, default: 100")
    if more:
        more(parser)
    return parser.parse_args(argv)


def prepare(
    options: argparse.Namespace,
    features: int = 0,
    large: type[Images] = CIFAR100,
    small: type[Images] = Digits,
) -> dict[str, Any]:
    """Return data and checkpoint, as the command line of a `long` example says.

    With `features`, a teacher of so many as well. Data are `large`, from a folder, or `small`.
    """
    torch.set_num_threads(options.threads)
    device, checkpoint = options.device, Checkpoint(options.checkpoint, options.every)
    data = large(options.data, device) if options.data else small(device)
    found = {"data": data, "checkpoint": checkpoint}
    if features:
        found["teacher"] = train_teacher(data, options.steps, checkpoint, features)
    return found


def train_all(train: Callable[..., Run], options: argparse.Namespace) -> list[Run]:
    """Train with each implementation, and with weight 0 for --control, from the same seed."""
    torch.set_num_threads(options.threads)
    same = {"steps": options.steps, "seed": options.seed, "device": options.device}
    names = ["reference", "fused"] if options.impl == "both" else [options.impl]
    runs = [train(name, weight=options.weight, **same) for name in names]
    if options.control:
        runs.append(train(names[0], weight=0.0, **same))
        runs[-1].name = "weight 0"
    return runs


def report(title: str, runs: list[Run], folder: Path, score: str = "held-out accuracy") -> int:
    """Print the table of some runs and save their curves.

    Returns
    -------
    int
        Exit code: 1 when fused and reference are further apart than the tolerance, else 0.
    """
    console = Console(width=max(100, Console().width))
    table = Table(title, *(run.name for run in runs))
    first = runs[0]

    def row(text: str, form: str, cell: Callable[[Run], float]) -> None:
        table.add_row(text, *(form.format(cell(run)) for run in runs))

    row(score, "{:.2%}", lambda run: run.accuracy)
    row("final loss (mean of 20 steps)", "{:.6f}", lambda run: fmean(run.losses[-20:]))
    row("loss alone, forward + backward: seconds", "{:.4f}", lambda run: sum(run.seconds))
    row("... median of a step, microseconds", "{:.0f}", lambda run: 1e6 * median(run.seconds))
    if len(runs) > 1:
        base, text = median(first.seconds), f"largest difference from {first.name}"
        row("... speed-up by the median", "{:.1f}x", lambda run: base / median(run.seconds))
        row(f"{text}, first {EARLY} steps", "{:.1e}", lambda run: run.difference(first, EARLY))
        row(f"{text}, all steps", "{:.1e}", lambda run: run.difference(first))
    console.print(table)
    path = folder / title.lower().replace("-", "_").replace(" ", "_")
    save_curves(title, runs, path)
    console.print(f"curves: {path}.png and {path}.csv", soft_wrap=True)

    by_name = {run.name: run for run in runs}
    if not {"fused", "reference"} <= by_name.keys():
        return 0
    apart = by_name["fused"].difference(by_name["reference"], EARLY)
    console.print(f"fused and reference: {apart:.1e} apart, allowed {TOLERANCE:.0e}")
    return 0 if apart <= TOLERANCE else 1


def save_curves(title: str, runs: list[Run], path: Path) -> None:
    """Save the losses over the steps as a picture and as a table, a column for each run."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.with_suffix(".csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["step", *(run.name for run in runs)])
        losses = zip(*(run.losses for run in runs), strict=True)
        writer.writerows([step, *row] for step, row in enumerate(losses))
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    for run, style in zip(runs, ("-", "--", ":"), strict=False):
        axes.plot(run.losses, style, label=run.name)
    axes.set(title=title, xlabel="step", ylabel="training loss", yscale="log")
    axes.legend()
    figure.savefig(path.with_suffix(".png"), dpi=150)
