"""The picture of a report: time and peak memory of each case, in units of selfkd's."""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from .report import NAMES, Result, digits, disturbances, hardware, megabytes, peaks, times

# Orange and blue differ for every kind of colour blindness, and in grey.
BARS = {"eager": "#e69f00", "compile": "#3b8bc2", "graph": "#009e73", "liger": "#b07aa1"}
INKS = {"light": ("#1f2328", "#59636e"), "dark": ("#f0f6fc", "#9198a1")}  # of text; of the rest
Span = tuple[float, list[float]]  # the place of a case, and the values of the forms of a kind
STAMP = "selfkd-drawn"  # before the digest that says of what a picture was drawn, and by which code


def ends(values: Iterable[float]) -> str:
    """The values of a bar as its text."""
    return f"{' - '.join(dict.fromkeys(f'{x:.1f}' if x < 9.95 else f'{x:.0f}' for x in values))}x"


def bars(axes: Axes, spans: Mapping[str, list[Span]], ink: str) -> None:
    """Draw spans (place, values) of each kind: a bar from 1 to the least value, pale to the largest."""
    height = 0.76 / max(1, len(spans))
    values = [x for of_kind in spans.values() for _, found in of_kind for x in found]
    axes.set_xscale("log")
    axes.set_xlim(min([0.7, *(x / 1.2 for x in values)]), 3 * max([2, *values]))
    for k, (kind, of_kind) in enumerate(spans.items()):
        for place, found in of_kind:
            y = place + 0.38 - height * (k + 0.5)
            axes.barh(y, found[0] - 1, 0.9 * height, left=1, color=BARS[kind])
            axes.barh(
                y, found[-1] - found[0], 0.9 * height, left=found[0], color=BARS[kind], alpha=0.4
            )
            axes.annotate(
                ends(found), (max(1, found[-1]), y), (3, 0), textcoords="offset points", va="center"
            )
    axes.axvline(1, color=ink, linewidth=1)
    ticks = [
        x for x in (0.5, 1, 2, 5, 10, 20, 50, 100) if axes.get_xlim()[0] < x <= max([2, *values])
    ]
    axes.set_xticks(ticks, [f"{x:g}" for x in ticks])
    axes.minorticks_off()


def label(name: str, result: Result) -> str:
    """A case, and what the unit of its bars is."""
    if disturbances(result):
        return f"{name} (machine busy)"
    counted = peaks(result)
    memory = [f"{megabytes(counted['selfkd'])} MB"] if "selfkd" in counted else []
    unit = ", ".join([f"{digits(1e3 * result['quartiles']['selfkd'][1])} ms", *memory])
    return f"{name}\n{unit}"


def picture(
    results: Mapping[str, Result], title: str, width: float, theme: str = "light"
) -> Figure:
    """The bars of results by the names shown, the first on top; `width` in inches."""
    shown = list(results.items())[::-1]
    quiet = [(place, x) for place, (_, x) in enumerate(shown) if not disturbances(x)]
    kinds = [k for k in NAMES if any(k in result["ratios"] for _, result in shown)]
    spans: dict[str, list[Span]] = {
        kind: [(y, list(times(x, kind).values())) for y, x in quiet if kind in x["ratios"]]
        for kind in kinds
    }
    memory: dict[str, list[Span]] = {}
    for place, result in quiet:
        counted = peaks(result)
        for kind in [kind for kind in kinds if kind in counted]:
            share = counted[kind] / max(1, counted["selfkd"])
            memory.setdefault(kind, []).append((place, [share]))
    drawn = {"time": spans, "peak memory": memory}
    ink, pale = INKS[theme]
    style: dict[Any, Any] = {
        "text.color": ink,
        "xtick.color": ink,
        "ytick.color": ink,
        "axes.labelcolor": ink,
    }
    with mpl.rc_context({**style, "axes.edgecolor": pale, "font.size": 9, "svg.fonttype": "none"}):
        height = 1.3 + (0.24 + 0.16 * len(kinds)) * len(shown)
        figure = Figure(figsize=(width, height), layout="constrained")
        panels = figure.subplots(1, 1 + bool(memory), sharey=True, squeeze=False)[0]
        for axes, (what, of_kind) in zip(panels, drawn.items(), strict=False):
            bars(axes, of_kind, pale)
            axes.set_xlabel(f"{what}, selfkd = 1", loc="right")
            axes.spines[["top", "right", "left"]].set_visible(False)
            axes.tick_params(left=False)
        for place, _ in quiet if memory else ():
            if not any(place == y for of_kind in memory.values() for y, _ in of_kind):
                panels[1].annotate(
                    "not counted",
                    (1, place),
                    (3, 0),
                    textcoords="offset points",
                    va="center",
                    color=pale,
                )
        panels[0].set_yticks(range(len(shown)), [label(name, result) for name, result in shown])
        panels[0].set_ylim(-0.5, len(shown) - 0.5)
        handles = [mpl.patches.Patch(color=BARS[kind], label=NAMES[kind]) for kind in kinds]
        figure.legend(handles=handles, loc="outside lower center", ncols=4, frameon=False)
        figure.suptitle(title, fontsize=9)
    return figure


def of_dtypes(results: Mapping[str, Result]) -> str:
    return ", ".join(dict.fromkeys(str(x["dtype"]) for x in results.values()))


def draw(found: dict[str, Any], path: Path) -> None:
    """Save the picture of a report, on white."""
    about, results = found["machine"], {x["case"]: x for x in found["results"]}
    title = (
        f"Forward + backward, {of_dtypes(results)}; pale: from the faster to the slower form\n"
        f"selfkd {about['commit']}, PyTorch {about['torch']}, {hardware(about)}"
    )
    picture(results, title, 10).savefig(path, dpi=120)


def text_of(figure: Figure, drawn: str) -> str:
    """A figure as SVG without a background, stamped with data and code that drew it."""
    digest = hashlib.sha256(drawn.encode()).hexdigest()
    about = {"Date": None, "Creator": None, "Description": f"{STAMP} {digest}"}
    file = io.StringIO()
    with mpl.rc_context({"svg.hashsalt": "selfkd", "svg.fonttype": "none"}):
        figure.savefig(file, format="svg", transparent=True, metadata=about)
    return file.getvalue()


def svg(results: Mapping[str, Result], title: str, width: float, theme: str) -> str:
    """The picture for a page of that theme; the same text for the same figures."""
    drawn = json.dumps([results, title, width, theme]) + Path(__file__).read_text()
    return text_of(picture(results, title, width, theme), drawn)
