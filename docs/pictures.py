"""Draws what an operator moves through memory, beside the same loss in PyTorch.

Both are run once under a recorder of PyTorch's operators. A column is a kernel, a block in it a
tensor that it reads or writes, as high as the tensor is large. Small ones are not drawn: a number
for each row, weights. What a kernel reads a second time from cache counts once.

    python docs/pictures.py    # writes docs/operators/pictures/*.svg; `make results` runs it
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from selfkd import contract
from selfkd.bench import cases
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

FOLDER = Path(__file__).parent / "operators" / "pictures"
# An operator that is made of others: what its call runs. The recorder does not see into it otherwise.
MADE_OF = {
    "selfkd::sd_dropout_head": importlib.import_module("selfkd.sd_dropout_head")._run,
}
SHAPES = {
    "adversarial": (4096,),
    "attention": (8, 32, 16, 16),
    "bifpn_fuse": (4, 16, 32, 32),
    "dropout_views": (64, 512),
    "sd_dropout_head": (256, 256, 256),  # features, weight and logits of one size
    "simreg": (64, 512),
}
SHAPE = (64, 1000)  # of all others
LEAST = 0.05  # of the first input: what is smaller is not drawn
# What an operator is given to write it, or for its shape and dtype alone.
UNREAD = {"selfkd::dropout_views_backward": 1, "aten::bernoulli_": 0}
READ, WRITTEN, TEXT = "#5b9bd5", "#e6863b", "#7a828c"  # to be told apart on white and on black
BLOCK, WIDTH, GAP, LEFT, TOP = 13, 11, 4, 2, 54


class Kernel(NamedTuple):
    """Bytes of each tensor that a kernel reads and writes."""

    read: list[int]
    written: list[int]


def sizes(tensors: Iterator[torch.Tensor]) -> dict[int, int]:
    """Bytes of each memory; an expanded tensor has few."""
    return {x.data_ptr(): min(x.untyped_storage().nbytes(), x.nbytes) for x in tensors}


def tensors(tree: Any) -> Iterator[torch.Tensor]:
    return (x for x in tree_leaves(tree) if isinstance(x, torch.Tensor))


class Recorder(TorchDispatchMode):
    """Keeps the kernels that run; a view is none."""

    def __init__(self) -> None:
        super().__init__()
        self.kernels: list[Kernel] = []

    def __torch_dispatch__(
        self, operator: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        schema, kwargs = operator._schema, kwargs or {}
        if schema.name in MADE_OF:
            with self:
                return MADE_OF[schema.name](*args, **kwargs)
        found = operator(*args, **kwargs)
        named = {x.name: value for x, value in zip(schema.arguments, args, strict=False)} | kwargs
        unread = UNREAD.get(schema.name)
        read = [named[x.name] for x in schema.arguments if x.name in named and not x.is_out]
        changed = [
            named[x.name]
            for x in schema.arguments
            if x.name in named and x.alias_info is not None and x.alias_info.is_write
        ]
        given = sizes(tensors([x for place, x in enumerate(read) if place != unread]))
        made = sizes(tensors((found, changed)))
        is_view = operator.is_view or (
            not schema.is_mutable and bool(made) and made.keys() <= given.keys()
        )
        if not is_view and "empty" not in operator.__name__:
            self.kernels.append(Kernel(list(given.values()), list(made.values())))
        return found


def record(case: Any, function: Any) -> tuple[list[Kernel], list[Kernel]]:
    """The kernels of forward and backward that move more than numbers."""
    inputs, grad = case.draw("cpu")
    learning = inputs[: case.learning]
    with Recorder() as recorder:
        loss = function(*inputs)
        count = len(recorder.kernels)
        torch.autograd.grad(loss, learning, grad)
    least = LEAST * inputs[0].nbytes
    kept = [Kernel(*([x for x in part if x > least] for part in k)) for k in recorder.kernels]
    forward, backward = kept[:count], kept[count:]
    return [k for k in forward if any(k)], [k for k in backward if any(k)]


def moved(kernels: list[Kernel]) -> int:
    return sum(sum(k.read) + sum(k.written) for k in kernels)


def text(x: float, y: float, words: str, anchor: str = "start") -> str:
    return f'<text x="{x:g}" y="{y:g}" text-anchor="{anchor}">{words}</text>'


def columns(kernels: list[Kernel], x: float, base: float, unit: float) -> Iterator[str]:
    """The blocks of kernels, written ones on top of those that are read."""
    for number, kernel in enumerate(kernels):
        bottom = base
        for color, part in ((READ, kernel.read), (WRITTEN, kernel.written)):
            for size in part:
                height = BLOCK * size / unit
                bottom -= height
                left = x + number * (WIDTH + GAP)
                yield (
                    f'<rect x="{left:g}" y="{bottom:.1f}" width="{WIDTH}" '
                    f'height="{max(height - 1.5, 1):.1f}" fill="{color}"/>'
                )
                bottom -= 0.5


def width_of(kernels: list[Kernel]) -> int:
    return max(len(kernels) * (WIDTH + GAP), 60)


def panel(
    name: str, parts: tuple[list[Kernel], list[Kernel]], top: float, unit: int
) -> tuple[str, float]:
    """One of the two ways to compute a loss, and where it ends."""
    forward, backward = parts
    heights = [sum(k.read) + sum(k.written) for k in forward + backward]
    base = top + 24 + BLOCK * max(heights) / unit + 4
    second = LEFT + width_of(forward) + 20
    count, total = len(forward + backward), moved(forward + backward) / unit
    drawn = [
        text(
            LEFT,
            top + 12,
            f"{name}: {count} kernels move {total:.3g} times the first input's memory",
        ),
        *columns(forward, LEFT, base, unit),
        *columns(backward, second, base, unit),
        text(LEFT, base + 15, "forward"),
        text(second, base + 15, "backward"),
    ]
    return "\n".join(drawn), base + 24


def draw(operator: str) -> str:
    """The picture of an operator; of the forms in PyTorch the one that moves least."""
    case = cases.make(operator, *SHAPES.get(operator, SHAPE))
    unit = case.draw("cpu")[0][0].nbytes
    fused = record(case, case.fused)
    forms = {name: record(case, form) for name, form in case.baselines.items()}
    name, plain = min(forms.items(), key=lambda form: moved(form[1][0] + form[1][1]))
    first, middle = panel(f"selfkd.{operator}", fused, TOP - 26, unit)
    second, bottom = panel(f"PyTorch, eager ({name})", plain, middle + 12, unit)
    wide = max(width_of(x) + width_of(y) for x, y in (fused, plain)) + 30
    wide = max(wide, 520)
    legend = (
        f'<rect x="{LEFT}" y="4" width="{WIDTH}" height="{WIDTH}" fill="{READ}"/>'
        + text(LEFT + 17, 14, "read")
        + f'<rect x="{LEFT + 62}" y="4" width="{WIDTH}" height="{WIDTH}" fill="{WRITTEN}"/>'
        + text(LEFT + 79, 14, f"written; {case.name.partition(' ')[2]}")
    )
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {wide} {bottom:.0f}" width="{wide}" '
        f'height="{bottom:.0f}" font-family="sans-serif" font-size="13" fill="{TEXT}">\n'
        f"{legend}\n{first}\n{second}\n</svg>\n"
    )


def regenerate() -> dict[Path, str]:
    """What the pictures must be."""
    return {FOLDER / f"{name}.svg": draw(name) for name in contract.modules()}


def main() -> None:
    FOLDER.mkdir(exist_ok=True)
    for path, picture in regenerate().items():
        path.write_text(picture)


if __name__ == "__main__":
    main()
