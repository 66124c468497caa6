"""The pictures of the reports of ``make study``: differences with their intervals."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.figure import Figure

from .plot import INKS, text_of
from .study import PICTURE, Found, Report, Row, of_methods, of_setting

COLOURS = {  # of lines, and of what counts
    "light": {"grid": "#d1d9e0", "better": "#1a7f37", "worse": "#cf222e"},
    "dark": {"grid": "#3d444d", "better": "#3fb950", "worse": "#f85149"},
}


def draw(content: Report, shade: str) -> str:
    """The first task of a study: each setting's differences in several metrics."""
    found, task = Found(content), next(iter(content["tasks"]))
    base, *_ = found.baselines(task)
    panels = {
        found.metrics[metric]["title"]: [
            of_setting(found, task, metric, name, base)
            for name in found.names(task)
            if name != base
        ]
        for metric in content["drawn"]
    }
    words = f"{content['title']}: difference to {base}; {content['tasks'][task]}"
    return svg(panels, f"{words}; {seeds_of(content)}", shade)


def draw_all(contents: Collection[Report], shade: str) -> str:
    """Each paper's method in each of its tasks."""
    rows = [
        (f"{study}, {task}: {title}", d, better)
        for study, title, task, (_, d, better) in of_methods(contents)
    ]
    # The README has it beside another picture: half as wide as a page.
    seeds = "; ".join(sorted(set(map(seeds_of, contents))))
    return svg({"points more than the best baseline": rows}, seeds, shade, 5.2)


def seeds_of(content: Report) -> str:
    return f"95 % intervals, {len(content['seeds'])} seeds"


def svg(panels: Mapping[str, Sequence[Row]], words: str, shade: str, width: float = 9) -> str:
    """Points with their intervals, a panel for each metric, all of the same rows; `width` in inches."""
    ink = INKS[shade][0]
    colours = {"text": ink, **COLOURS[shade]}
    labels = [name for name, *_ in next(iter(panels.values()))]
    parts = ("text.color", "axes.labelcolor", "xtick.color", "ytick.color")
    style: Any = dict.fromkeys(parts, ink)
    style |= {"grid.color": colours["grid"], "font.size": 9}
    with mpl.rc_context(style):
        figure = Figure(figsize=(width, 0.9 + 0.22 * len(labels)), layout="constrained")
        axes = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
        for axis, (title, rows) in zip(axes, panels.items(), strict=True):
            axis.grid(axis="x", linewidth=0.5)
            axis.axvline(0, color=ink, linewidth=0.8)
            for y, (_, d, better) in enumerate(rows):
                kind = ("better" if better else "worse") if d.counts else "text"
                marker = {"better": "^", "worse": "v", "text": "o"}[kind]
                half = d.half if math.isfinite(d.half) else 0
                axis.errorbar(
                    d.mean, y, xerr=half, fmt=marker, ms=4, color=colours[kind], linewidth=1.2
                )
            axis.set_title(title, fontsize=9)
            axis.tick_params(length=0)
            for side in axis.spines.values():
                side.set_visible(False)
        axes[0].set_yticks(range(len(labels)), labels)
        axes[0].set_ylim(len(labels) - 0.4, -0.6)
        figure.suptitle(words, fontsize=9)
        return text_of(figure, repr((panels, words, shade, width)) + Path(__file__).read_text())


def pictures(root: Path, contents: Mapping[str, Report]) -> dict[Path, str]:
    """What the pictures of reports by name must be."""
    found: dict[Path, str] = {}
    for shade in COLOURS:
        drawn = {name: draw(content, shade) for name, content in contents.items()}
        drawn["all"] = draw_all(contents.values(), shade)
        found |= {root / PICTURE.format(name=x, shade=shade): text for x, text in drawn.items()}
    return found
