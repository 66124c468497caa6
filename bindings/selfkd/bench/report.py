"""Results as text: on the screen, as a page of Markdown, as JSON."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

Result = dict[str, Any]
MEANING = """\
Forward and backward through autograd, float32 unless the case names a dtype. Each loss is written in
PyTorch in up to two ways, its forms: the usual one and a tuned one. Both run eagerly and under
torch.compile (mode max-autotune-no-cudagraphs on CUDA, else its default); there half types become
float32, as under autocast.

- **ms**: selfkd's time, the median of runs in turns with the others in one process.
- **times eager PyTorch's speed**: the time of each form over selfkd's, the fastest form first. Below 1x
  selfkd is slower.
- **peak MB**: what tensors a forward and backward hold at once, at most, beside the inputs (results,
  gradients, what is kept for backward, scratch), in units of 2^20 bytes. Of eager PyTorch and
  torch.compile, by the fastest form. "-": not counted in that report.
- **of copy bandwidth**: the bytes that a separate forward and backward must read and write at least,
  over the time; 100 % is the speed of copying a large buffer in the same run. What stays in the cache
  can be faster.
- **busy**: other programs ran meanwhile, and the figures do not count.
- **gradient error**: the largest error against float64, over the largest gradient of its row (of its
  tensor, where there are no rows of classes); eager's is that of its fastest form."""
Table = list[list[str]]  # the first row is the head
AT_MOST = ("copy", "part", "memory")  # ratios that must not be larger than needed; others: smaller
NAMES = {
    "eager": "eager PyTorch",
    "compile": "torch.compile",
    "graph": "CUDA graph",
    "liger": "Liger",
}
KINKED = ("BiFPN",)  # its largest error is that of a ReLU whose input rounds to the other sign


# ---- judging ----


def unmet(result: Result) -> list[str]:
    """Return the names of the ratios that miss what they must be; what was not measured is left out."""
    ratios, need = ({} if disturbances(result) else result["ratios"]), result["need"]
    return [
        k
        for k, n in need.items()
        if k in ratios and (ratios[k] > n if k in AT_MOST else ratios[k] < n)
    ]


def disturbances(result: Result) -> list[str]:
    """How it showed that something else was running: then no ratio means anything, and none is used."""
    return list(result.get("busy", ()))


def in_words(result: Result, kind: str) -> str:
    """A ratio, and what it must be."""
    ratio, need = result["ratios"][kind], result["need"][kind]
    what = {
        "copy": "the time of copying its bytes",
        "memory": "the peak memory of eager",
        "part": result["part_name"],
    }.get(kind, f"the speed of {NAMES.get(kind, kind)}")
    least = "at most" if kind in AT_MOST else "at least"
    return f"{result['case']} has {ratio:.2f}x {what}, {least} {need:.4g}x is required"


def missed(results: Sequence[Result]) -> list[str]:
    """What does not hold, case by case, in words."""
    found = [in_words(result, kind) for result in results for kind in unmet(result)]
    return found + [
        f"{result['case']} was measured on a busy machine ({', '.join(disturbances(result))}) and does"
        " not count"
        for result in results
        if disturbances(result)
    ]


def hardware(about: Result) -> str:
    """The GPU, or the CPU and how much of it: what makes two reports comparable."""
    threads = f"{about['threads']} thread{'s' * (about['threads'] > 1)}"
    return str(about.get("gpu") or f"{about['cpu']} ({about['variant']}), {threads}")


# ---- a case ----


def milliseconds(quartiles: Sequence[float]) -> list[str]:
    low, middle, high = (f"{1e3 * x:.3f}" for x in quartiles)
    return [middle, f"{low} - {high}"]


def digits(x: float) -> str:
    """Three of them."""
    return f"{x:.3g}" if x < 999.5 else f"{x:,.0f}"


def megabytes(count: float) -> str:
    """Bytes in units of 2^20."""
    number = count / 2**20
    return f"{number:.0f}" if number >= 9.95 else f"{number:.2g}"


def bound(result: Result, kind: str) -> str:
    """What a ratio must be, and whether it is."""
    if kind not in result["need"]:
        return ""
    sign = "<=" if kind in AT_MOST else ">="
    return f" (must be {sign} {result['need'][kind]:.4g}){' MISSED' * (kind in unmet(result))}"


def contenders(result: Result) -> list[str]:
    return [name for name in result["quartiles"] if name not in ("copy", "part")]


def launched(result: Result, name: str) -> str:
    """Kernels of forward and backward, and what else was launched."""
    passes = result.get("launches", {}).get(name)
    if not passes:
        return ""
    return " + ".join(
        f"{x['kernels']}" + "".join(f" ({x[k]} {k})" for k in ("memsets", "copies") if x[k])
        for x in passes.values()
    )


def of_case(result: Result) -> Table:
    """A line for each contender."""
    head = ["", "ms, median", "quartiles", "selfkd is faster", "error of loss", "of gradients"]
    table = [[*head, "peak MB", "launches, forward + backward"]]
    for name in contenders(result):
        kind = name.split()[0]
        own = "graph selfkd" if kind == "graph" and name != "graph selfkd" else "selfkd"
        times = result["quartiles"][name][1] / result["quartiles"][own][1]
        note = "" if name == own else f"{times:.2f}x"
        if name == result["fastest"].get(kind):
            note += bound(result, kind)
        peak = result["peak_bytes"].get(name)
        table.append(
            [
                name,
                *milliseconds(result["quartiles"][name]),
                note,
                *(f"{x:.0e}" for x in result["errors"].get(name, ())),
                *[""] * (2 * (name not in result["errors"])),
                "" if peak is None else megabytes(peak),
                launched(result, name),
            ]
        )
    filled = [k for k in range(len(table[0])) if any(row[k] for row in table[1:])]
    return [[row[k] for k in filled] for row in table]


def notes(result: Result) -> list[str]:
    """What is said of selfkd beside the table."""
    ratios = result["ratios"]
    found = [f"{ratios['copy']:.2f}x the time of copying its bytes{bound(result, 'copy')}"]
    if "part" in ratios:
        found.append(f"{ratios['part']:.2f}x {result['part_name']}{bound(result, 'part')}")
    if "memory" in ratios:
        found.append(f"{ratios['memory']:.2f}x the peak memory of eager{bound(result, 'memory')}")
    found += [f"out of memory: {name}" for name in result.get("out_of_memory", ())]
    return found + [f"with {name}={value}" for name, value in result["environment"].items()]


def title(result: Result) -> str:
    found = ", ".join(disturbances(result))
    busy = f"; THE MACHINE IS BUSY ({found}), repeat the run" if found else ""
    return f"{result['case']}: copy {result['bytes_per_second'] / 1e9:.1f} GB/s{busy}"


# ---- all cases ----


def share(result: Result) -> str:
    """Part of the copy bandwidth that the bytes of a pass are moved at."""
    return f"{100 / result['ratios']['copy']:.0f} %"


def times(result: Result, kind: str) -> dict[str, float]:
    """How many times selfkd's time each form of a kind of contender takes, the fastest first."""
    own = result["quartiles"]["graph selfkd" if kind == "graph" else "selfkd"][1]
    found = {
        name.removeprefix(f"{kind} "): x[1] / own
        for name, x in result["quartiles"].items()
        if name.startswith(f"{kind} ") and name != "graph selfkd"
    }
    return dict(sorted(found.items(), key=lambda form: form[1]))


def faster(result: Result, kind: str, named: bool = False) -> str:
    """The same in words."""
    found = times(result, kind)
    if named and len(found) > 1:
        return ", ".join(f"{x:.1f}x ({form})" for form, x in found.items())
    return " - ".join(dict.fromkeys(f"{x:.1f}x" for x in found.values()))


def peaks(result: Result) -> dict[str, int]:
    """Bytes of selfkd, and of the fastest form of each kind of contender, where they were counted."""
    names = {"selfkd": "selfkd", **result["fastest"]}
    found = result["peak_bytes"]
    return {kind: found[name] for kind, name in names.items() if name in found}


def memory(result: Result, kinds: Sequence[str]) -> str:
    """The peaks of selfkd and of `kinds`."""
    found = peaks(result)
    return " / ".join(megabytes(found[k]) if k in found else "-" for k in ("selfkd", *kinds))


def gradient_errors(result: Result) -> str:
    """Of selfkd, and of the fastest eager form."""
    if result["case"].split()[0] in KINKED:
        return "a ReLU's sign rounds, in both"
    names = ["selfkd", result["fastest"].get("eager", "selfkd")]
    return " / ".join(f"{result['errors'][name][1]:.0e}" for name in dict.fromkeys(names))


def summary(results: Sequence[Result], named: bool = False) -> Table:
    """A row for each case; `named`: with the names of the forms compared."""
    kinds = [k for k in NAMES if any(k in result["ratios"] for result in results)]
    counted = [k for k in kinds if any(k in peaks(result) for result in results)]
    head = ["case", "ms", *(f"times {NAMES[kind]}'s speed" for kind in kinds)]
    head += [f"peak MB: {' / '.join(['selfkd', *(NAMES[k] for k in counted)])}"] * bool(counted)
    table = [[*head, "of copy bandwidth", "gradient error: selfkd / eager"]]
    for result in results:
        figures = [faster(result, kind, named) for kind in kinds]
        part = share(result)
        if disturbances(result):
            figures, part = ["busy"] * len(figures), "busy"
        figures += [memory(result, counted)] * bool(counted)
        time = milliseconds(result["quartiles"]["selfkd"])[0]
        table.append([result["case"], time, *figures, part, gradient_errors(result)])
    return table


# ---- the screen ----


def console(stderr: bool = False) -> Any:
    from rich.console import Console

    return Console(stderr=stderr, width=None if os.isatty(1 + stderr) else 160)


def print_table(table: Table, name: str) -> None:
    """By rich where it is installed, else in plain columns."""
    try:
        import rich.table as tables
    except ModuleNotFoundError:
        widths = [max(map(len, column)) for column in zip(*table, strict=True)]
        print(name)
        for row in table:
            print("  " + "  ".join(x.ljust(n) for x, n in zip(row, widths, strict=True)).rstrip())
        return
    rich = tables.Table(title=name, title_justify="left")
    for k, label in enumerate(table[0]):
        rich.add_column(label, justify="right" if k else "left")
    for row in table[1:]:
        rich.add_row(*row)
    console().print(rich, markup=False)


def print_result(result: Result) -> None:
    """The table of a case and what is said of it."""
    print_table(of_case(result), title(result))
    print("".join(f"  {note}\n" for note in notes(result)), flush=True)


def print_summary(results: Sequence[Result]) -> None:
    if len(results) > 1:
        print_table(
            summary(results), "forward + backward, medians: times faster, fastest form first"
        )


# ---- files ----


def save(found: Result, path: Path) -> None:
    """Write JSON, whole or not at all."""
    new = path.with_name(f"{path.name}.part")
    new.write_text(json.dumps(found, indent=1) + "\n")
    new.replace(path)


def markdown(table: Table) -> str:
    """A table of Markdown."""
    head, *rows = table
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(row)} |" for row in lines)


def page(found: Result, name: str) -> str:
    """A report on one page of Markdown."""
    about = "\n".join(f"- {key}: {value}" for key, value in found["machine"].items())
    parts = [
        f"# {name}",
        about,
        MEANING,
        markdown(summary(found["results"])),
    ]
    for result in found["results"]:
        parts += [f"## {title(result)}", markdown(of_case(result))]
        parts.append("\n".join(f"- {note}" for note in notes(result)))
    lacking = missed(found["results"])
    parts.append(f"Missed: {'; '.join(lacking)}." if lacking else "All required ratios hold.")
    return "\n\n".join(parts) + "\n"
