"""The arguments of ``selfkd bench``; looked at before PyTorch is loaded."""

from __future__ import annotations

import argparse
from pathlib import Path

DTYPES = ("float32", "float64", "float16", "bfloat16")
CONTENDERS = ("eager", "compile", "graph", "liger")
DESCRIPTION = """\
Times operators, forward and backward, beside the code one would write without them, and beside the
copying of a large buffer. Without --shape: the suite's cases. BiFPN stands for selfkd.nn.BiFPN.

  selfkd bench                                             the whole suite (hours on a small machine)
  selfkd bench distill                                     the suite's cases of one operator
  selfkd bench --suite calls                               a call where there is nothing to compute
  selfkd bench sd_dropout_kl --shape 256x1000              a shape of your own
  selfkd bench sd_dropout_kl --shape 256x1000 --against eager --min-speedup 3
"""


class UsageError(Exception):
    """What the user asked for cannot be done; one sentence."""


def numbers(text: str) -> tuple[int, ...]:
    """A shape: sizes with an x between them."""
    try:
        return tuple(int(size) for size in text.split("x"))
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"'{text}' is no shape, expected sizes such as 256x1000"
        ) from None


def shapes(text: str) -> list[tuple[int, ...]]:
    return [numbers(part) for part in text.split(",")]


def names(text: str) -> list[str]:
    found = text.split(",")
    for name in found:
        if name not in CONTENDERS:
            raise argparse.ArgumentTypeError(f"'{name}' is unknown, expected {one_of(CONTENDERS)}")
    return found


def one_of(words: tuple[str, ...]) -> str:
    *most, last = words
    return f"{', '.join(most)} or {last}"


def dtype(text: str) -> str:
    if text not in DTYPES:
        raise argparse.ArgumentTypeError(f"'{text}' is unknown, expected {one_of(DTYPES)}")
    return text


def count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"'{text}' is no positive number")
    return int(text)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare what the command understands."""
    parser.description = DESCRIPTION
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    add = parser.add_argument
    add("operators", nargs="*", metavar="OP", help="operators; default: all")
    add("--shape", type=shapes, metavar="NxC,...", help="shapes of the inputs, for each OP")
    add("--dtype", type=dtype, metavar="DTYPE", help=f"of the inputs: {one_of(DTYPES)}")
    add("--device", choices=("cpu", "cuda"), default="cpu", help="default: cpu")
    add("--threads", type=count, metavar="N", help="threads of the CPU; default: PyTorch's")
    add(
        *("--against",),
        type=names,
        metavar="A,B,...",
        help="eager; compile: torch.compile; graph: replay of a CUDA graph; liger: the nearest loss of "
        "Liger, if installed; default: all that the device has",
    )
    add("--repeat", type=count, default=21, metavar="N", help="samples of each; default: 21")
    add("--case", default="", metavar="TEXT", help="only cases whose name contains this")
    add(
        *("--suite",),
        choices=("all", "required", "calls"),
        default="all",
        help="required: cases with bounds; calls: what a call costs where there is nothing to compute",
    )
    add("--json", type=Path, metavar="FILE", help="save machine, quartiles, ratios and errors")
    add(
        "--plot",
        type=Path,
        metavar="FILE",
        help="save a picture: time and peak memory over selfkd's",
    )
    add("--trace", type=Path, metavar="FILE", help="save a Chrome trace of a pass of each")
    add(
        *("--min-speedup",),
        type=float,
        metavar="X",
        help="exit code 1 unless every case is X times faster than its fastest eager form",
    )
    add(
        "--require",
        action="store_true",
        help="exit code 1 when a bound of the suite is missed, or the machine busy",
    )
    add("--child", type=int, help=argparse.SUPPRESS)
