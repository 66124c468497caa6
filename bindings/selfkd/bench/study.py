"""What is made of the reports of ``make study``: tables, verdicts and pictures, all from their JSON.

A report holds every value of every seed. Each setting was run with the same seeds, so a difference of two
settings is one of pairs: its mean, its standard error and the 95 % interval of Student's t.
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from . import report

Report = dict[str, Any]
NAME = "study-"  # begins the names of the files
MINUS = "\N{MINUS SIGN}"
ORDER = ("sd_dropout", "detector", "frskd", "segmentation", "aikd", "simreg")  # on the page
PICTURE = "docs/images/study-{name}-{shade}.svg"
SHADES = ("light", "dark")
VERDICTS = ("**shows**", "**the opposite shows**", "not shown")


# ---- numbers ----


def t_quantile(freedom: int, share: float = 0.95) -> float:
    """Within plus and minus this is that share of Student's t with so many degrees of freedom."""

    def within(t: float) -> float:
        theta = math.atan(t / math.sqrt(freedom))
        cos, odd = math.cos(theta) ** 2, freedom % 2
        term = math.cos(theta) if odd else 1.0
        total = term * (freedom > 1)
        for k in range(3 if odd else 2, freedom - 1, 2):
            term *= cos * (k - 1) / k
            total += term
        total *= math.sin(theta)
        return 2 / math.pi * (theta + total) if odd else total

    low, high = 0.0, 1e4
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if within(middle) < share else (low, middle)
    return high


@dataclass(frozen=True)
class Difference:
    """The mean of paired differences, its standard error, half the width of its 95 % interval."""

    mean: float
    error: float
    half: float

    @property
    def counts(self) -> bool:
        """Whether the interval leaves 0 out."""
        return abs(self.mean) > self.half


def difference(values: Sequence[float], others: Sequence[float]) -> Difference:
    """Of values and others, of the same seeds; of one seed nothing is known but the mean."""
    pairs = [a - b for a, b in zip(values, others, strict=True)]
    if len(pairs) < 2:
        return Difference(pairs[0], math.nan, math.inf)
    error = statistics.stdev(pairs) / math.sqrt(len(pairs))
    return Difference(statistics.fmean(pairs), error, error * t_quantile(len(pairs) - 1))


class Found:
    """A report, by task and setting."""

    def __init__(self, content: Report) -> None:
        self.content = content
        self.metrics: dict[str, Any] = content["metrics"]
        self.values = {(x["task"], x["name"]): x["values"] for x in content["settings"]}
        # Seconds of a step: a setting that trains nothing has none, nor have older reports.
        self.steps = {(x["task"], x["name"]): x.get("step", ()) for x in content["settings"]}

    def names(self, task: str) -> list[str]:
        return [name for where, name in self.values if where == task]

    def baselines(self, task: str) -> list[str]:
        return [name for name in self.content["baselines"] if (task, name) in self.values]

    def mean(self, task: str, name: str, metric: str) -> str:
        found = statistics.fmean(self.values[task, name][metric])
        return f"{found:.{self.metrics[metric]['digits']}f}"

    def between(self, task: str, metric: str, name: str, against: str) -> Difference:
        return difference(self.values[task, name][metric], self.values[task, against][metric])

    def time(self, task: str, name: str) -> str:
        """A step's time over the first baseline's of the same seed: the median over the seeds."""
        own, base = self.steps[task, name], self.steps[task, self.baselines(task)[0]]
        ratios = [a / b for a, b in zip(own, base, strict=False) if a and b]
        if not ratios:
            return ""
        if own is base:
            return f"1 ({report.digits(1e3 * statistics.median(base))} ms)"
        return f"{statistics.median(ratios):.2f}"

    def number(self, metric: str, value: float) -> str:
        """With its sign, and one digit more than the metric has."""
        return f"{value:+.{self.metrics[metric]['digits'] + 1}f}".replace("-", MINUS)

    def interval(self, metric: str, d: Difference) -> str:
        if math.isinf(d.half):
            return "unknown"
        ends = (self.number(metric, d.mean + side * d.half) for side in (-1, 1))
        return " to ".join(ends)


# ---- tables ----


def first_table(found: Found, task: str) -> report.Table:
    """The first metric: mean; time; against each baseline difference, standard error, interval."""
    metric = next(iter(found.metrics))
    digits = found.metrics[metric]["digits"] + 1
    baselines = found.baselines(task)
    table = [["setting", found.metrics[metric]["title"], "time of a step"]]
    for name in baselines:
        table[0] += [f"minus {name}", "95 % interval"]
    for name in found.names(task):
        row = [name, found.mean(task, name, metric), found.time(task, name)]
        for base in baselines:
            d = found.between(task, metric, name, base)
            cell = f"{found.number(metric, d.mean)} ± {d.error:.{digits}f}"
            row += ["", ""] if base == name else [cell, found.interval(metric, d)]
        table.append(row)
    return table


def other_table(found: Found, task: str, group: str) -> report.Table:
    """Other metrics: mean, and in brackets the difference to the first baseline, half its interval."""
    metrics = [name for name, x in found.metrics.items() if x["group"] == group]
    base = found.baselines(task)[0]
    table = [["setting", *(found.metrics[metric]["title"] for metric in metrics)]]
    for name in found.names(task):
        cells = []
        for metric in metrics:
            d, cell = found.between(task, metric, name, base), found.mean(task, name, metric)
            if name != base:
                digits = found.metrics[metric]["digits"]
                cell += f" ({found.number(metric, d.mean)} ± {d.half:.{digits + 1}f})"
            cells.append(f"**{cell}**" if d.counts and name != base else cell)
        table.append([name, *cells])
    return table


def verdict(found: Found, claim: Mapping[str, str]) -> str:
    """Whether a claim shows: whether the interval leaves 0 out on the side that is better."""
    metric = claim["metric"]
    d = found.between(claim["task"], metric, claim["name"], claim["against"])
    better = (d.mean > 0) == found.metrics[metric]["higher"]
    return VERDICTS[0 if better else 1] if d.counts else VERDICTS[2]


def verdicts(found: Found) -> report.Table:
    """Each claim with its difference, and whether it shows."""
    table = [["claim", "task", "metric", "difference", "95 % interval", "verdict"]]
    for claim in found.content["claims"]:
        task, metric = claim["task"], claim["metric"]
        d = found.between(task, metric, claim["name"], claim["against"])
        who = f"{claim['text']} ({claim['name']} against {claim['against']})"
        mean = f"{found.number(metric, d.mean)} ± {d.error:.{found.metrics[metric]['digits'] + 1}f}"
        interval, title = found.interval(metric, d), found.metrics[metric]["title"]
        words = found.content["tasks"][task]
        table.append([who, words, title, mean, interval, verdict(found, claim)])
    return table


def tables(found: Found) -> Iterable[tuple[str, report.Table]]:
    """Every table of a study with its title."""
    groups = dict.fromkeys(x["group"] for x in found.metrics.values())
    first = next(iter(groups))
    for task, words in found.content["tasks"].items():
        yield words, first_table(found, task)
        for group in groups:
            if group != first:
                yield f"{words}: {group}", other_table(found, task, group)


def best(found: Found, task: str) -> list[str]:
    """The setting of the best mean of the first metric, its gain, and what cannot be told from it."""
    metric, base = next(iter(found.metrics)), found.baselines(task)[0]
    names = [name for name in found.names(task) if name not in found.content["references"]]
    top = max(names, key=lambda name: statistics.fmean(found.values[task, name][metric]))
    alike = [
        name for name in names if name != top and not found.between(task, metric, name, top).counts
    ]
    d = found.between(task, metric, top, base)
    gain = found.interval(metric, d) if top != base else "it is the baseline"
    title = f"{found.metrics[metric]['title']}: {found.mean(task, top, metric)}"
    words = found.content["tasks"][task]
    more = f"; {len(alike) - 4} more" if len(alike) > 4 else ""
    return [found.content["title"], words, top, title, gain, "; ".join(alike[:4]) + more or "none"]


def first_choices(contents: Iterable[Report]) -> report.Table:
    """What was best in each task of each study."""
    head = ["study", "task", "best", "its mean", "95 % interval of its gain", "not told from it"]
    rows = [best(Found(content), task) for content in contents for task in content["tasks"]]
    return [head, *rows]


def counted(contents: Iterable[Report]) -> list[int]:
    """How many claims have each of the verdicts."""
    given = [verdict(Found(content), claim) for content in contents for claim in content["claims"]]
    return [given.count(x) for x in VERDICTS]


def summary(contents: Iterable[Report]) -> report.Table:
    """How many claims of each study show, and what a step of its method takes."""
    table = [["study", "its method", "time of a step", "claims", *VERDICTS]]
    for content in contents:
        found, name = Found(content), content["headline"]
        counts = counted([content])
        time = found.time(next(iter(content["tasks"])), name)
        table.append([content["title"], name, time, *map(str, (sum(counts), *counts))])
    return table


# ---- where they are shown ----


def print_study(content: Report) -> None:
    """The tables of a report on the screen."""
    found = Found(content)
    if content["part"] != 1:
        print(f"trained for {content['part']:g} of the epochs: too short for conclusions")
    for title, table in tables(found):
        plain = [[cell.replace("**", "") for cell in row] for row in table]
        report.print_table(plain, f"{content['title']}: {title}")
    plain = [[cell.replace("**", "") for cell in row] for row in verdicts(found)]
    report.print_table(plain, f"{content['title']}: claims")


def show(path: Path) -> None:
    """Print the file of a study."""
    content = json.loads(path.read_text())
    if "study" not in content:
        raise ValueError(f"{path} is no report of a study")
    print_study(content)


def folded(title: str, text: str) -> str:
    """Text that is shown once its title is clicked."""
    return f"<details><summary>{title}</summary>\n\n{text}\n\n</details>"


def block(name: str, contents: Mapping[str, Report]) -> str:
    """What the page shows of a study: picture, verdicts, folded tables; of "all", what was best."""
    if name == "all" and contents:
        picture = shown("all", "Differences of each paper's method to the best baseline")
        found = [summary(contents.values()), first_choices(contents.values())]
        return "\n\n".join([picture, *map(report.markdown, found)]) + "\n"
    if name not in contents:
        return "Not yet run: `make study`.\n"
    content = contents[name]
    about, seeds = content["machine"], len(content["seeds"])
    parts = [
        f"{seeds} seeds, {len(content['settings'])} settings; {report.hardware(about)}, PyTorch "
        f"{about['torch']}; `bench/results/{NAME}{name}.json` ({about['date']}, {about['commit']}). "
        f"With {seeds} seeds an interval is ± {t_quantile(max(1, seeds - 1)):.2f} standard errors.",
        shown(name, f"{content['title']}: differences to {content['baselines'][0]}"),
        "**What is claimed**",
        report.markdown(verdicts(Found(content))),
    ]
    for title, table in tables(Found(content)):
        parts.append(folded(title, report.markdown(table)))
    return "\n\n".join(parts) + "\n"


Row = tuple[str, Difference, bool]  # what it is of, the difference, whether it is for the better


def of_setting(found: Found, task: str, metric: str, name: str, base: str) -> Row:
    """The difference of a setting to another of its task."""
    d = found.between(task, metric, name, base)
    return name, d, (d.mean > 0) == found.metrics[metric]["higher"]


def of_methods(contents: Iterable[Report]) -> Iterable[tuple[str, str, str, Row]]:
    """The setting that each study is named after, in each of its tasks, by the first metric, in points.

    Titles of study and metric, the task, the difference to the baseline with the best mean: that a
    method beats one that lacks its dropout, its epochs or its network would say little.
    """
    for content in contents:
        found = Found(content)
        metric = next(iter(found.metrics))
        title = found.metrics[metric]["title"].removesuffix(", %")
        for task, words in content["tasks"].items():
            sign = 1 if found.metrics[metric]["higher"] else -1
            means = {
                base: sign * statistics.fmean(found.values[task, base][metric])
                for base in found.baselines(task)
            }
            best_base = max(means, key=means.__getitem__)
            _, d, better = of_setting(found, task, metric, content["headline"], best_base)
            yield content["title"], title, words, (found.interval(metric, d), d, better)


def gains(contents: Collection[Report]) -> str:
    """In sentences what each paper's method brings in each of its tasks, and how many claims show."""
    if not contents:
        return ""
    kinds: dict[str, dict[str, list[str]]] = {"Better": {}, "Worse": {}, "Not shown": {}}
    for study, title, task, (interval, d, better) in of_methods(contents):
        kind, name = "Better" if better else "Worse", f"{study}, {title}"
        if d.counts:
            kinds[kind].setdefault(name, []).append(f"{task}: {interval}")
        else:
            kinds["Not shown"].setdefault(study, []).append(task)
    said = []
    for kind, studies in kinds.items():
        named = [f"{name} ({'; '.join(tasks)})" for name, tasks in studies.items()]
        said += [f"*{kind}:* {'; '.join(named)}."] if named else []
    counts = counted(contents)
    shows, opposite, _ = counts
    return (
        "**Gain** in points over the best baseline of each task, small images, 95 % intervals. "
        f"{' '.join(said)} Of {sum(counts)} claims, the papers' and controls, {shows} show, of {opposite} "
        "the opposite ([study](docs/study.md))."
    )


def shown(name: str, words: str) -> str:
    """A picture on a page, in the shade that the reader's system has."""
    light, dark = (PICTURE.format(name=name, shade=x).removeprefix("docs/") for x in SHADES)
    return (
        f'<picture><source media="(prefers-color-scheme: dark)" srcset="{dark}">'
        f'<img src="{light}" alt="{words}"></picture>'
    )


def load(root: Path) -> Mapping[str, Report]:
    """The reports that are committed, by the study's name, in the page's order."""
    paths = root.glob(f"bench/results/{NAME}*.json")
    found = {x["study"]: x for x in (json.loads(path.read_text()) for path in paths)}
    return dict(sorted(found.items(), key=lambda pair: ORDER.index(pair[0])))
