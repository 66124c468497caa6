"""The picture of a report: speed-ups, and the share of the copy bandwidth."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from .report import NAMES, disturbances, hardware


def draw(found: dict[str, Any], path: Path) -> None:
    """Save the bars of every case: against the fastest form of each kind, and of the roofline."""
    results = list(reversed(found["results"]))
    quiet = [(y, r) for y, r in enumerate(results) if not disturbances(r)]
    kinds = [k for k in NAMES if any(k in result["ratios"] for result in results)]
    figure = Figure(figsize=(11, 2 + 0.35 * (1 + len(kinds)) * len(results)), layout="constrained")
    speed, roofline = figure.subplots(1, 2, sharey=True, width_ratios=(3, 2))
    height = 0.8 / max(1, len(kinds))
    for k, kind in enumerate(kinds):
        bars = [(y, r["ratios"][kind]) for y, r in quiet if kind in r["ratios"]]
        places = [y + 0.4 - height * (k + 0.5) for y, _ in bars]
        drawn = speed.barh(places, [x for _, x in bars], height, label=NAMES[kind])
        speed.bar_label(drawn, fmt="%.1f", padding=2, fontsize=8)
    speed.axvline(1, color="black", linewidth=0.8)
    names = [f"{r['case']}{' (machine busy)' * bool(disturbances(r))}" for r in results]
    speed.set_yticks(range(len(results)), names)
    speed.set_ylim(-0.5, len(results) - 0.5)  # rows without bars too
    speed.set_xlabel("times faster than the fastest form")
    if kinds:
        speed.legend()
    shares = [100 / result["ratios"]["copy"] for _, result in quiet]
    drawn = roofline.barh([y for y, _ in quiet], shares, 0.6, color="tab:gray")
    roofline.bar_label(drawn, fmt="%.0f", padding=2, fontsize=8)
    roofline.axvline(100, color="black", linewidth=0.8)
    roofline.set_xlabel("% of the copy bandwidth")
    about = found["machine"]
    where = f"PyTorch {about['torch']}, {hardware(about)}"
    figure.suptitle(f"selfkd {about['commit']}, {where}", fontsize=10)
    figure.savefig(path, dpi=120)
