"""What the training examples share: command line, data, the timing of a loss, the report."""

from __future__ import annotations

import argparse
import csv
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import pairwise
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
    from selfkd.nn import sigmoid_rampup
    from sklearn.datasets import load_digits
    from torch import Tensor, nn
except ModuleNotFoundError as error:
    sys.exit(f"{error}; the examples need: pip install torch matplotlib rich scikit-learn")

EARLY = 50  # steps before rounding can grow
WARM_UP = 300  # steps in which the learning rate of a self-teacher rises
IGNORED = 255  # label of pixels that do not count
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
    def mean_iou(self, model: nn.Module) -> float:
        """Return intersection over union of the held-out pixels of a class, its mean over the classes."""
        parts = [model.eval()(part).argmax(1) for part in self.held_out_images.split(100)]
        labels, found = self.held_out_labels.flatten(), torch.cat(parts).flatten()
        labels, found = labels[labels != IGNORED], found[labels != IGNORED]
        pairs = (self.classes * labels + found).bincount(minlength=self.classes**2)
        counts = pairs.view(self.classes, self.classes)
        union = counts.sum(0) + counts.sum(1) - counts.diag()
        return (counts.diag() / union).nanmean().item()

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


class Canvases(Images):
    """Canvases of 16 x 16, four of scikit-learn's digits on each, some missing.

    Labels (N, H, W): 0 where nothing is, the digit plus 1 on a stroke, IGNORED at its edge.
    """

    classes = 11

    def __init__(self, device: str) -> None:
        digits, generator = Digits(device), torch.Generator().manual_seed(0)

        def draw(images: Tensor, labels: Tensor, count: int) -> tuple[Tensor, Tensor]:
            index = torch.randint(len(labels), (4 * count,), generator=generator)
            there = torch.rand(4 * count, 1, 1, 1, generator=generator) < 0.8
            strokes = images[index] * there.to(device)
            marks = (labels[index] + 1).view(-1, 1, 1, 1) * (strokes > 0.5)
            marks = marks.masked_fill((strokes > 0.2) & (strokes <= 0.5), IGNORED)
            both = torch.cat([strokes, marks], 1).view(count, 2, 2, 2, 8, 8)
            canvases = both.permute(0, 3, 1, 4, 2, 5).reshape(count, 2, 16, 16)
            shifts = torch.randint(16, (count, 2), generator=generator).tolist()
            pairs = zip(canvases, shifts, strict=True)
            canvases = torch.stack([canvas.roll(shift, (1, 2)) for canvas, shift in pairs])
            return canvases[:, :1], canvases[:, 1].long()

        self.images, self.labels = draw(digits.images, digits.labels, 2000)
        self.held_out_images, self.held_out_labels = draw(
            digits.held_out_images, digits.held_out_labels, 300
        )


class VOC(Images):
    """Pascal VOC 2012 by torchvision, from a folder that it is loaded into, 128 x 128."""

    classes = 21

    def __init__(self, folder: Path, device: str) -> None:
        from torchvision.datasets import VOCSegmentation
        from torchvision.transforms.functional import InterpolationMode, pil_to_tensor, resize

        def load(part: str) -> tuple[Tensor, Tensor]:
            pairs = VOCSegmentation(folder, "2012", part, download=True)
            nearest = InterpolationMode.NEAREST
            images = [pil_to_tensor(resize(x, [128, 128])) for x, _ in pairs]
            labels = [pil_to_tensor(resize(y, [128, 128], nearest))[0] for _, y in pairs]
            return torch.stack(images).to(device).float() / 255, torch.stack(labels).to(
                device
            ).long()

        self.images, self.labels = load("train")
        self.held_out_images, self.held_out_labels = load("val")


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


class Stages(nn.Module):
    """A classifier of three stages, each of half the size of the one before, for a self-teacher."""

    widths = (32, 64, 128)

    def __init__(self, classes: int, channels: int = 1) -> None:
        super().__init__()
        inputs = (channels, *self.widths)
        self.stages = nn.ModuleList(
            nn.Sequential(*convolution(a, b, stride=2 if k else 1), *convolution(b, b))
            for k, (a, b) in enumerate(pairwise(inputs))
        )
        self.head = nn.Linear(self.widths[-1], classes)

    def maps(self, images: Tensor) -> list[Tensor]:
        """Return what every stage gives, finest first."""
        return [images := stage(images) for stage in self.stages]

    def classify(self, features: Tensor) -> Tensor:
        return self.head(features.mean((2, 3)))

    def forward(self, images: Tensor) -> Tensor:
        return self.classify(self.maps(images)[-1])


class Segmenter(nn.Module):
    """A pyramid of five maps behind a neck, and a head on the finest: logits of every pixel."""

    width, levels = 32, 5

    def __init__(self, neck: nn.Module, classes: int, channels: int = 1) -> None:
        super().__init__()
        widths = (channels, 32, 48, 64)
        self.stages = nn.ModuleList(
            nn.Sequential(*convolution(a, b, stride=2 if k else 1), *convolution(b, b))
            for k, (a, b) in enumerate(pairwise(widths))
        )
        self.laterals = nn.ModuleList(nn.Conv2d(b, self.width, 1) for b in widths[1:])
        self.neck, self.head = neck, self.make_head(classes)

    @classmethod
    def make_head(cls, classes: int) -> nn.Sequential:
        return nn.Sequential(
            *convolution(cls.width, 2 * cls.width), nn.Conv2d(2 * cls.width, classes, 1)
        )

    def maps(self, images: Tensor) -> list[Tensor]:
        """Return the neck's maps, finest first, the first as large as the images."""
        stages = [images := stage(images) for stage in self.stages]
        pyramid = [lateral(x) for lateral, x in zip(self.laterals, stages, strict=True)]
        while len(pyramid) < self.levels:
            pyramid.append(F.avg_pool2d(pyramid[-1], 2))
        return self.neck(pyramid)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.maps(images)[0])


class Checkpoint:
    """What some training runs have reached, in one file; without a file, nothing is kept."""

    def __init__(self, path: Path | None) -> None:
        self.path = path
        self.states = torch.load(path) if path and path.exists() else {}

    def restore(self, name: str, curves: list[list[float]], *parts: Any) -> int:
        """Restore modules and optimizers, append to the curves, return the steps that are done."""
        if name not in self.states:
            return 0
        for part, state in zip(parts, self.states[name]["parts"], strict=True):
            part.load_state_dict(state)
        for curve, values in zip(curves, self.states[name]["curves"], strict=True):
            curve.extend(values)
        return len(curves[0])

    def save(self, name: str, curves: list[list[float]], *parts: Any) -> None:
        """Save what `restore` restores."""
        if self.path:
            state = {"curves": curves, "parts": [part.state_dict() for part in parts]}
            torch.save({**self.states, name: state}, self.path.with_suffix(".new"))
            self.path.with_suffix(".new").replace(self.path)
            self.states = torch.load(self.path)


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
    argv: list[str] | None, description: str, weight: float, long: bool = False
) -> argparse.Namespace:
    """Read the command line that every example understands; `long`: that may run for hours, too."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    device = "cuda" if torch.cuda.is_available() else "cpu"
    add = parser.add_argument
    add("--impl", choices=["fused", "reference", "both"], default="both", help="default: both")
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
    return parser.parse_args(argv)


def prepare(
    options: argparse.Namespace, features: int = 0, segmentation: bool = False
) -> dict[str, Any]:
    """Return data and checkpoint, as the command line of a `long` example says.

    With `features`, a teacher of so many as well.
    """
    torch.set_num_threads(options.threads)
    device, checkpoint = options.device, Checkpoint(options.checkpoint)
    real, small = (VOC, Canvases) if segmentation else (CIFAR100, Digits)
    data = real(options.data, device) if options.data else small(device)
    found = {"data": data, "checkpoint": checkpoint}
    if features:
        found["teacher"] = train_teacher(data, options.steps, checkpoint, features)
    return found


def warm_up(optimizer: torch.optim.Optimizer, step: int) -> None:
    """Set the learning rate of a step: slowly up, over WARM_UP steps, to that of the optimizer.

    A self-teacher is full of ReLUs and max-pooling, where the last bit of a value decides which way a
    gradient goes; at full speed two runs that differ in rounding soon part.
    """
    for group in optimizer.param_groups:
        group["lr"] = optimizer.defaults["lr"] * sigmoid_rampup(step, WARM_UP) ** 2


def frskd(
    ops: Any,
    z: Tensor,
    t: Tensor,
    *maps: Tensor,
    target: Tensor,
    alpha: float,
    beta: float,
    temperature: float,
    ignore_index: int = -100,
) -> Tensor:
    """FRSKD's loss: logits, the self-teacher's, the maps of both (the latter ones without gradient).

    selfkd.nn.FRSKDLoss is the same; here `ops` may be selfkd or selfkd.reference.
    """
    half, ignored = len(maps) // 2, {"ignore_index": ignore_index}
    teacher = {"teachers": t.detach(), "teacher_weights": alpha, "temperature": temperature}
    loss = ops.distill(z, target, **teacher, **ignored) + ops.distill(t, target, **ignored)
    pairs = zip(maps[:half], maps[half:], strict=True)
    return loss + beta * sum(ops.attention(f, g) for f, g in pairs)


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
