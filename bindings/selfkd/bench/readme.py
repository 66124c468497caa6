"""What README.md shows of the reports: one case of each common loss, in a sentence, a table and a picture.

Each case is shown as the newest report has it, whatever its figures.
"""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence

from . import report
from .report import NAMES, Result

# Shapes of ImageNet's classes and features, of a vocabulary, and of CIFAR's feature maps.
SHOWN = {
    "distill 256x1000 T 4": "`distill`: cross-entropy and a teacher's KL; 256 rows, 1,000 classes",
    "sd_dropout_kl 512x32000": "`sd_dropout_kl`: KL of two dropout samples; 512 rows, 32,000 classes",
    "js_divergence 512x32000": "`js_divergence`: of a student and a teacher; 512 rows, 32,000 classes",
    "sd_dropout_head 1024x512 to 32000": "`sd_dropout_head`: SD-Dropout with its linear layer; 1,024 rows of "
    "512 features, 32,000 classes",
    "simreg 256x2048": "`simreg`: cosine to a teacher's features; 256 rows of 2,048",
    "attention 128x64x32x32 of 128 channels": "`attention`: FRSKD's feature loss; 128 maps of 64x32x32",
}
KINDS = ("eager", "compile")


def newest(reports: Mapping[str, Result]) -> dict[str, tuple[Result, Result]]:
    """The cases shown that were measured on a CPU: result and machine."""
    found: dict[str, tuple[Result, Result]] = {}
    for _, content in sorted(reports.items(), key=lambda x: (x[1]["machine"]["date"], x[0])):
        about = content["machine"]
        if "gpu" not in about:  # of its results those that compare, on a quiet machine
            for x in content["results"]:
                if set(KINDS) <= set(x["ratios"]) and not report.disturbances(x):
                    found[x["case"]] = x, about
    return {case: found[case] for case in SHOWN if case in found}


def span(values: Sequence[float]) -> str:
    return " to ".join(dict.fromkeys(f"{x:.1f}" for x in (min(values), max(values))))


def headline(found: Mapping[str, tuple[Result, Result]], *more: str) -> str:
    """A list: speed, memory, and what else is said."""
    results = [result for result, _ in found.values()]
    if not results:
        return "Not yet measured.\n"
    fast = [span([next(iter(report.times(x, kind).values())) for x in results]) for kind in KINDS]
    machines = dict.fromkeys(report.hardware(about) for _, about in found.values())
    said = [
        f"**Speed:** {fast[0]} times that of eager PyTorch and {fast[1]} times that of torch.compile, "
        f"forward and backward of {len(results)} losses, each against the faster of two ways to write it "
        f"({'; '.join(machines)})."
    ]
    peaks = [x for x in map(report.peaks, results) if set(x) >= {"selfkd", *KINDS}]
    if peaks:
        less = [span([x[kind] / x["selfkd"] for x in peaks]) for kind in KINDS]
        some = f" ({len(peaks)} of them counted)" if len(peaks) < len(results) else ""
        said.append(
            f"**Peak memory:** eager PyTorch takes {less[0]} times as much, torch.compile {less[1]} "
            f"times{some}."
        )
    wrap = textwrap.TextWrapper(118, subsequent_indent="  ", break_on_hyphens=False)
    return "\n".join(wrap.fill(f"- {text}") for text in (*said, *more) if text) + "\n"


def table(found: Mapping[str, tuple[Result, Result]]) -> str:
    """A row for each case, in absolute numbers."""
    head = ["forward + backward, float32", "selfkd", *(NAMES[kind] for kind in KINDS)]
    rows = [[*head, f"peak memory, {' / '.join(head[1:])}"]]
    for case, (result, _) in found.items():
        own = result["quartiles"]["selfkd"][1]
        cells = [f"{report.digits(1e3 * own)} ms"]
        for kind in KINDS:
            forms = report.times(result, kind).values()
            ends = dict.fromkeys(report.digits(1e3 * own * x) for x in (min(forms), max(forms)))
            cells.append(f"{' - '.join(ends)} ms ({report.faster(result, kind)})")
        counted = report.peaks(result)
        cells.append(f"{report.memory(result, KINDS)} MB" if counted else "not counted")
        rows.append([SHOWN[case], *cells])
    return report.markdown(rows)


def pictures(found: Mapping[str, tuple[Result, Result]]) -> dict[str, str]:
    """The SVG for pages of each theme."""
    from . import plot

    results = {"\n".join(case.split()[:2]): result for case, (result, _) in found.items()}
    title = "Forward + backward, float32. Pale: from the faster\nto the slower of two ways to write the loss"
    return {theme: plot.svg(results, title, 4.6, theme) for theme in plot.INKS}
