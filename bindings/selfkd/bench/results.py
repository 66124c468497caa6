"""Writes the tables and pictures of README.md and docs/ from the committed reports: ``make results``.

A text stands between ``<!-- results: NAME -->`` and ``<!-- end results -->``, NAME being an operator,
"all", "calls", "cases" (what each is), "meaning" (of the columns), "headline" or "shown" (of README.md). Of
reports of one machine, one whose name comes later in the alphabet replaces the earlier one's figures
case by case. A report of a GPU also gets a page of its own beside it.
"""

from __future__ import annotations

import inspect
import json
import re
import sys
import textwrap
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from . import calls, readme, report, study

BLOCK = re.compile(r"(<!-- results: (\w+) -->\n).*?(<!-- end results -->)", re.DOTALL)
STAMP = re.compile(r"selfkd-drawn \w+")  # of a picture: equal where figures and drawing code are
NO_GPU = (
    "**GPU speed is not measured**: the CUDA kernels pass every case in an emulator, and their machine "
    "code is inspected."
)
TO_DO = "On a GPU run `make gpu-check` and `selfkd bench --device cuda`."


@dataclass
class Machine:
    """What was measured on one machine, by case, and the reports that say so."""

    about: report.Result
    sources: dict[str, list[str]] = field(default_factory=dict)  # the cases of each report
    results: dict[str, report.Result] = field(default_factory=dict)
    calls: dict[str, report.Result] = field(default_factory=dict)

    def caption(self, cases: Iterable[str]) -> str:
        """What the figures depend on, and where they are from."""
        about, shown = self.about, set(cases)
        names = [name for name, found in self.sources.items() if shown & set(found)]
        where = report.hardware(about)
        return f"{where}, PyTorch {about['torch']}; {', '.join(names)}."


def merge(reports: Mapping[str, report.Result]) -> list[Machine]:
    """The machines of reports by file name, CPUs first."""
    found: dict[str, Machine] = {}
    for name, content in sorted(reports.items()):
        about = content["machine"]
        machine = found.setdefault(report.hardware(about), Machine(about))
        calls_of = {result["call"]: result for result in content.get("calls", ())}
        cases = [result["case"] for result in content["results"]] + list(calls_of)
        for earlier in machine.sources.values():
            earlier[:] = [case for case in earlier if case not in cases]
        source = f"`bench/results/{name}` ({about['date']}, {about['commit']})"
        machine.sources[source] = cases
        machine.results |= {result["case"]: result for result in content["results"]}
        machine.calls |= calls_of
    return sorted(found.values(), key=lambda machine: "gpu" in machine.about)


def cases() -> str:
    """What the operators of the cases are given, and how sizes are written."""
    from .cases import FORMS

    lines = []
    for name, form in FORMS.items():
        text = inspect.getdoc(getattr(form.make, "func", form.make)) or ""
        line = f"- `{name} {form}`: {' '.join(text.split())}"
        lines.append(textwrap.fill(line, 118, subsequent_indent="  "))
    return "\n".join(lines) + "\n"


def block(name: str, machines: Iterable[Machine]) -> str:
    """The text of a table: of one operator, with the names of the forms compared, or of all."""
    parts = []
    for machine in machines:
        shown = [x for x in machine.results.values() if name in ("all", x["case"].split()[0])]
        if shown:
            caption = machine.caption(x["case"] for x in shown)
            parts += [caption, report.markdown(report.summary(shown, named=name != "all"))]
    if not any("gpu" in machine.about for machine in machines):
        parts.append(f"{NO_GPU} {TO_DO}" if parts else "Not yet measured.")
    return "\n\n".join(parts) + "\n"


def block_of_calls(machines: Iterable[Machine]) -> str:
    """The text of the tables of calls."""
    parts = []
    for machine in machines:
        if machine.calls:
            table = calls.table(list(machine.calls.values()))
            parts += [machine.caption(machine.calls), report.markdown(table)]
    return "\n\n".join(parts or ["Not yet measured."]) + "\n"


def text_of(name: str, machines: Iterable[Machine], studies: Mapping[str, report.Result]) -> str:
    """What stands between the markers of a name: that of a study begins with "study_"."""
    if name.startswith("study_"):
        return study.block(name.removeprefix("study_"), studies)
    return block(name, machines)


def regenerate(root: Path) -> dict[Path, str]:
    """What the files that show results must contain."""
    reports = {
        path.name: json.loads(path.read_text())
        for path in root.glob("bench/results/*.json")
        if not path.name.startswith(study.NAME)
    }
    machines, studies, shown = merge(reports), study.load(root), readme.newest(reports)
    on_gpu = "" if any("gpu" in machine.about for machine in machines) else NO_GPU
    gains = study.gains(list(studies.values()))
    texts: dict[str, Callable[[], str]] = {
        "headline": lambda: readme.headline(shown, gains, on_gpu),
        "shown": lambda: f"{readme.table(shown)}\n",
        "cases": cases,
        "calls": lambda: block_of_calls(machines),
        "meaning": lambda: f"{report.MEANING}\n",
    }

    def written(match: re.Match[str]) -> str:
        name = match[2]
        text = texts[name]() if name in texts else text_of(name, machines, studies)
        return f"{match[1]}\n{text}\n{match[3]}"

    found = {}
    for path in (root / "README.md", *sorted(root.glob("docs/**/*.md"))):
        text = path.read_text()
        if text.count("<!-- results: ") != len(BLOCK.findall(text)):
            raise ValueError(f"{path}: a table of results begins and has no end")
        found[path] = BLOCK.sub(written, text)
    for name, content in reports.items():
        if "gpu" in content["machine"]:
            path = root / "bench" / "results" / Path(name).with_suffix(".md")
            found[path] = report.page(content, path.stem)
    for theme, drawn in readme.pictures(shown).items() if shown else ():
        found[root / "docs" / "images" / f"bench-{theme}.svg"] = drawn
    if studies:
        from . import study_plot

        found |= study_plot.pictures(root, studies)
    return found


def outdated(path: Path, text: str) -> bool:
    """Whether a file must be written. Of a picture the bytes depend on matplotlib's version, too."""
    if not path.exists():
        return True
    old = path.read_text()
    stamps = STAMP.findall(old), STAMP.findall(text)
    return stamps[0] != stamps[1] if all(stamps) else old != text


def main() -> int:
    """Write the files that have changed."""
    root = Path.cwd()
    for path, text in regenerate(root).items():
        if outdated(path, text):
            path.parent.mkdir(exist_ok=True)
            path.write_text(text)
            print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
