"""`selfkd bench`: what it says, saves and returns, and the tables made of its reports."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import harness
import matplotlib as mpl
import pytest
import torch
from conftest import ROOT
from selfkd import cli, contract
from selfkd.bench import calls, measure, plot, readme, report, results, run
from selfkd.bench.case import Case
from selfkd.bench.cases import FORMS, PROVEN, make
from selfkd.bench.suite import suite

pytestmark = pytest.mark.skipif(
    bool(harness.SIMT_LIBRARY), reason="the emulator has no PyTorch binding"
)
SIZES = {"N": 3, "K": 4, "C": 5, "D": 5, "H": 4, "W": 6}  # of the letters that a form has
TINY = {op: tuple(SIZES[x] for x in f.letters) + (2,) * f.open for op, f in FORMS.items()}


def bench(*arguments: object) -> int:
    """The exit code of a command in this process."""
    try:
        return cli.main(["bench", *map(str, arguments)])
    except SystemExit as end:
        return int(end.code or 0)


def result_of(
    case: Case, times: dict[str, float], device: str = "cpu", others: float = 0.0
) -> dict[str, Any]:
    """What measuring gives, for times in ms of the contenders and of the copy."""
    samples = {name: [x / 1e3] * 3 for name, x in times.items()}
    timed = [name for name in times if name != "copy"]
    figures = measure.compare(case, samples, {}, device)
    figures["busy"] = measure.disturbances(figures, device, others, others)
    return {
        "case": case.name,
        "dtype": case.dtype,
        "device": device,
        "environment": {},
        "errors": dict.fromkeys(timed, (1e-7, 2e-6)),
        "peak_bytes": {},
        "launches": {},
        "part_name": "",
        "need": dict(case.need),
        **figures,
    }


QUIET = {"selfkd": 1.0, "eager a": 2.0, "eager b": 3.0, "copy": 10.0}  # 53 GB/s


# ---- usage ----

WRONG = {
    "dance is no operator, expected one of adversarial": ["dance"],
    "shape is 128, sd_dropout_kl expects NxCx..., all at least 1": [
        *("sd_dropout_kl", "--shape", "128")
    ],
    "shape is 3x4x5, simreg expects NxD, all at least 1": ["simreg", "--shape", "3x4x5"],
    "shape is 3x0, simreg expects NxD, all at least 1": ["simreg", "--shape", "3x0"],
    "argument --shape: '3xa' is no shape, expected sizes such as 256x1000": [
        *("simreg", "--shape", "3xa")
    ],
    "argument --dtype: 'int8' is unknown, expected float32, float64": ["--dtype", "int8"],
    "argument --against: 'numpy' is unknown, expected eager, compile": ["--against", "numpy"],
    "argument --threads: '0' is no positive number": ["--threads", "0"],
    "--shape is given, expected the operators that it is for": ["--shape", "3x4"],
    "--against graph needs --device cuda": ["--against", "graph"],
    "--min-speedup compares with eager PyTorch, which --against leaves out": [
        *("--against", "compile", "--min-speedup", "2")
    ],
    "bifpn_fuse: H and W must be even": ["bifpn_fuse", "--shape", "1x2x3x4"],
    "--json is nowhere/x.json, but there is no folder nowhere": ["--json", "nowhere/x.json"],
    "--plot is x.txt, expected a name in .png, .pdf or .svg": ["--plot", "x.txt"],
    "no case of the suite is asked for": ["--case", "nothing"],
}


@pytest.mark.parametrize("sentence", WRONG)
def test_usage_errors_are_one_sentence(sentence: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert bench(*WRONG[sentence]) == 2
    said = capsys.readouterr()
    assert said.err.startswith(f"selfkd bench: {sentence}")
    assert said.err.count("\n") == 1
    assert not said.out


def test_what_is_missing_is_said_before_anything_is_measured(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(run, "has", lambda module: False)
    assert bench("simreg", "--shape", "3x4", "--plot", "x.png") == 2
    assert "--plot needs matplotlib: pip install 'selfkd[bench]'" in capsys.readouterr().err
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert bench("simreg", "--shape", "3x4", "--device", "cuda") == 2
    assert "PyTorch sees no GPU here" in capsys.readouterr().err
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert bench("--device", "cuda", "--against", "liger") == 2
    assert "pip install liger-kernel" in capsys.readouterr().err


# ---- cases ----


def test_every_operator_has_a_case_and_every_case_a_name_of_its_own() -> None:
    assert set(contract.modules()) < set(FORMS)
    for device in ("cpu", "cuda"):
        cases = suite(device)
        assert {case.operator for case in cases} == set(FORMS)
        assert len({case.name for case in cases}) == len(cases)


@pytest.mark.parametrize(
    ("operator", "dtype"),
    [(operator, "bfloat16") for operator in TINY]
    + [(operator, "float32") for operator in contract.modules()],
)
def test_baselines_are_the_same_function(operator: str, dtype: str) -> None:
    case = make(operator, *TINY[operator], dtype=dtype)
    contenders = measure.contenders(case.proof or case, "cpu", ["eager"])
    errors = measure.check(case.proof or case, contenders, "cpu")
    assert errors.keys() == {"selfkd", *(f"eager {form}" for form in case.baselines)}
    if case.widen:  # losses of halves are evaluated in float32, as under autocast
        assert max(loss for loss, _ in errors.values()) < 1e-5
    if operator != "BiFPN":
        assert errors["selfkd"][0] < 1e-5 if not case.grad else 1e-2
        assert errors["selfkd"][1] < (1e-5 if dtype == "float32" else 1e-2)


@pytest.mark.parametrize("number", [k for k, x in enumerate(suite("cpu")) if x.part])
def test_parts_run(number: int) -> None:
    """What stands beside a case as a part of it can be called, and its gradients taken."""
    case = suite("cpu")[number]
    small = case.proof if math.prod(case.draw("cpu")[0][0].shape) > 1 << 20 and case.proof else case
    inputs, grad = small.draw("cpu")
    assert small.part
    found = measure.loss_and_gradients(small.part, inputs, grad)
    assert all(x.isfinite().all() for x in found)


@pytest.mark.parametrize("kept", [0.0, 0.5], ids=["its value", "its gradient"])
def test_another_function_is_no_baseline(kept: float) -> None:
    case = make("simreg", 3, 5)

    def half(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return case.reference(x, t) / 2 + kept * case.reference(x.detach(), t)

    with pytest.raises(SystemExit, match="simreg 3x5: half is another function"):
        measure.check(replace(case, baselines={"half": half}), {}, "cpu")


def test_large_cases_are_proved_on_fewer_rows() -> None:
    case = make("distill", 8192, 128256, dtype="bfloat16", compile=1.5)
    assert case.name == "distill 8192x128256 T 4 bfloat16"
    assert (case.need, case.bytes_moved) == ({"compile": 1.5}, 5 * 8192 * 128256 * 2)
    assert case.proof is not None
    assert case.proof.name == f"distill {PROVEN // 128256}x128256 T 4 bfloat16"
    assert make("distill", 8, 10).proof is None


# ---- figures ----


def test_ratios_are_those_of_medians() -> None:
    case = make("sd_dropout_kl", 100, 100)
    times = {"selfkd": 1, "eager a": 4, "eager b": 3, "graph selfkd": 0.5, "graph a": 2, "part": 2}
    samples = {name: [9, x / 1e3, 0, x / 2e3, x / 500] for name, x in times.items()}
    samples["copy"] = [2 * (256 << 20) / 1e9] * 5  # 1 GB/s: 240 kB take 0.24 ms
    found = measure.compare(case, samples, {"selfkd": 10, "eager a": 30, "eager b": 40}, "cpu")
    assert found["fastest"] == {"eager": "eager b", "graph": "graph a"}
    expected = {"eager": 3, "graph": 4, "copy": 1 / 0.24, "part": 0.5, "memory": 0.25}
    assert found["ratios"] == pytest.approx(expected)
    assert found["quartiles"]["selfkd"] == pytest.approx([0.5e-3, 1e-3, 2e-3])


def test_launches_are_sorted() -> None:
    names = ["Memset (Device)", "sd_dropout_kl_kernel<float>", "Memcpy DtoD", "reduce", "reduce"]
    assert measure.count_launches(names) == {"kernels": 3, "memsets": 1, "copies": 1}


def test_peak_memory_is_what_a_call_adds() -> None:
    """What is held at once, small or large, and not what is freed before."""
    x = torch.ones(1000)

    def run() -> torch.Tensor:
        for _ in range(3):
            y = torch.ones(1000) + x
        return y

    assert measure.peak(run, "cpu") == 3 * 4 * 1000
    assert measure.peak(lambda: torch.ones(64 << 20), "cpu") == 256 << 20


def test_a_contender_without_memory_enough_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    case, calls = make("simreg", 3, 5), []

    def greedy(*inputs: torch.Tensor) -> torch.Tensor:
        calls.append(inputs)
        if len(calls) > 2:  # the two that prove it
            raise torch.OutOfMemoryError
        return case.baselines["cosine"](*inputs)

    other = replace(case, baselines={"cosine": case.baselines["cosine"], "greedy": greedy})
    monkeypatch.setitem(measure.COPY_BYTES, "cpu", 1 << 20)
    found = measure.measure(other, "cpu", against=["eager"], repeat=2)
    assert found["out_of_memory"] == ["eager greedy"]
    assert set(found["quartiles"]) == {"selfkd", "eager cosine", "copy"}
    assert "out of memory: eager greedy" in report.notes(found)


@pytest.mark.cuda
@pytest.mark.parametrize("operator", TINY)
def test_on_a_gpu(operator: str, tmp_path: Path) -> None:
    case = make(operator, *TINY[operator])
    found = measure.measure(
        *(case, "cuda"), against=["eager", "graph"], repeat=2, trace=tmp_path / "trace.json"
    )
    assert {"eager", "graph", "copy"} <= set(found["ratios"])
    assert found["launches"]["selfkd"]["forward"]["kernels"] >= 1
    assert found["launches"]["selfkd"]["backward"]["kernels"] >= 1
    assert all(min(times) > 0 for times in found["quartiles"].values())
    assert "selfkd" in (tmp_path / "trace.json").read_text()


# ---- the command ----


def test_an_interrupted_run_keeps_what_it_has(tmp_path: Path) -> None:
    """A case at the user's shape is measured and saved; one that would take hours is interrupted."""
    files = {name: tmp_path / name for name in ("f.json", "f.png", "t.json")}
    command = [sys.executable, "-m", "selfkd", "bench", "sd_dropout_kl"]
    command += ["--shape", "8x10,4096x8192", "--dtype", "bfloat16", "--against", "eager"]
    command += ["--threads", "1", "--repeat", "20"]
    for option, path in zip(("--json", "--plot", "--trace"), files.values(), strict=True):
        command += [option, str(path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        for _ in range(600):
            if files["f.json"].exists():
                break
            time.sleep(0.1)
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
        for _ in range(100):
            if children.read_text():
                break
            time.sleep(0.05)
        (child,) = children.read_text().split()
        process.send_signal(signal.SIGINT)
        out, _ = process.communicate(timeout=60)
    assert process.returncode == 130, out
    assert "interrupted after 1 of 2 cases" in out
    assert not Path(f"/proc/{child}").exists()
    found = json.loads(files["f.json"].read_text())
    assert found["machine"]["threads"] == 1
    (result,) = found["results"]
    assert result["case"] == "sd_dropout_kl 8x10 bfloat16"
    assert set(result["ratios"]) == {"eager", "memory", "copy"}
    assert result["errors"]["selfkd"][1] < 2**-7
    assert files["f.png"].read_bytes().startswith(b"\x89PNG")
    trace = json.loads((tmp_path / "t-sd_dropout_kl-8x10-bfloat16.json").read_text())
    assert {"selfkd", "eager log_target"} <= {event["name"] for event in trace["traceEvents"]}


def feed(monkeypatch: pytest.MonkeyPatch, *found: dict[str, Any] | type[Exception] | None) -> None:
    """Let the cases give these results without being run."""
    left = list(found)

    def run_child(*_: Any) -> dict[str, Any] | None:
        result = left.pop(0)
        if isinstance(result, type):
            raise result
        return result

    monkeypatch.setattr(run, "run_child", run_child)


@pytest.mark.parametrize(("least", "code"), [(1.9, 0), (2.1, 1)])
def test_min_speedup(
    least: float,
    code: int,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """It is the fastest eager form that counts."""
    feed(monkeypatch, result_of(make("simreg", 3, 4), QUIET))
    assert bench("simreg", "--shape", "3x4", "--min-speedup", least) == code
    said = "simreg 3x4: 2.00x the speed of eager a, --min-speedup is 2.1" in capsys.readouterr().out
    assert said == bool(code)


def test_require(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["simreg", "--shape", "3x4"]
    case = make("simreg", 3, 4, eager=2.5, copy=100)
    missed = result_of(case, QUIET)
    held = result_of(replace(case, need={"eager": 1.5}), QUIET)
    busy = result_of(make("simreg", 3, 4), QUIET | {"copy": 40.0})
    for result, required, code in (
        (held, True, 0),
        (missed, False, 0),
        (missed, True, 1),
        (busy, True, 1),
        (None, False, 1),  # a process that failed
    ):
        feed(monkeypatch, result)
        assert bench(*arguments, *["--require"] * required) == code
    out = " ".join(capsys.readouterr().out.split())
    assert "2.00x (must be >= 2.5) MISSED" in out
    assert (
        "missed: simreg 3x4 has 2.00x the speed of eager PyTorch, at least 2.5x is required; simreg 3x4 has"
    ) in out
    assert "x the time of copying its bytes, at most 100x is required" in out
    assert "THE MACHINE IS BUSY (copied at 13.4 GB/s, expected 18 or more)" in out
    assert "missed: simreg 3x4 was measured on a busy machine (copied at 13.4 GB/s" in out
    assert "simreg 3x4: FAILED" in out


def test_a_busy_machine_is_marked_and_not_counted(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """In the table, the picture and the JSON; its ratio, here 773x, is used for nothing."""
    case = make("simreg", 3, 4, eager=900.0)
    wild = result_of(case, QUIET | {"eager a": 773.0, "eager b": 900.0}, others=1.0)
    quiet = result_of(make("simreg", 3, 5), QUIET)
    files = [tmp_path / "r.json", tmp_path / "r.svg"]
    monkeypatch.setitem(mpl.rcParams, "svg.fonttype", "none")  # text stays text
    feed(monkeypatch, wild, quiet)
    options = ("--json", files[0], "--plot", files[1], "--min-speedup", 1.5)
    assert bench("simreg", "--shape", "3x4,3x5", *options) == 1
    out = capsys.readouterr().out
    summary = out[out.index("forward + backward, medians") :]
    assert "773" not in summary
    row = next(line for line in summary.splitlines() if "simreg 3x4" in line)
    assert row.count("busy") == 2
    assert "simreg 3x4: not compared with --min-speedup, as the machine was busy" in out
    assert "missed: simreg 3x4 was measured on a busy machine (other programs kept 1.0 cores" in out
    saved = json.loads(files[0].read_text())["results"]
    assert [bool(result["busy"]) for result in saved] == [True, False]
    drawn = files[1].read_text()
    assert "simreg 3x4 (machine busy)" in drawn
    assert ">773.0<" not in drawn


def test_signs_of_a_busy_machine() -> None:
    quiet = {"quartiles": {"selfkd": [1.0, 1.1, 1.4]}, "bytes_per_second": 30e9}
    assert measure.disturbances(quiet, "cpu", 0.1, 0.1) == []
    assert measure.disturbances(quiet, "cpu", 9.0, 0.0) == []  # on cores that are left over
    assert "kept 0.6 cores busy" in measure.disturbances(quiet, "cpu", 0.6, 0.6)[0]
    assert measure.disturbances(quiet, "cuda", 2.0, 2.0) == []
    slow = quiet | {"bytes_per_second": 17e9}
    assert measure.disturbances(slow, "cpu", 0, 0) == ["copied at 17.0 GB/s, expected 18 or more"]
    wild = quiet | {"quartiles": {"eager a": [1.0, 1.1, 3.0]}}
    assert "eager a took 3.0 times as long" in measure.disturbances(wild, "cuda", 0, 0)[0]
    stat = "cpu  100 20 30 400 50 6 7 8 9 10\ncpu0 1\ncpu1 2\nintr 5\n"
    tick = os.sysconf("SC_CLK_TCK")
    assert measure.busy_seconds(stat) == ((100 + 20 + 30 + 6 + 7 + 8) / tick, 2)


def test_others_are_seen() -> None:
    """A program beside this one, by what the kernel counts."""
    with measure.Others() as alone:
        time.sleep(0.3)
    burn = "while True: pass"
    with subprocess.Popen([sys.executable, "-c", burn]) as process, measure.Others() as others:
        time.sleep(1.5)
        process.kill()
    assert others.cores > 0.2
    assert alone.cores >= 0


def test_every_case_is_saved_at_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    path = tmp_path / "report.json"
    feed(monkeypatch, None, result_of(make("simreg", 3, 5), QUIET), RuntimeError)
    with pytest.raises(RuntimeError):
        bench("simreg", "--shape", "3x4,3x5,3x6", "--json", path)
    found = json.loads(path.read_text())
    assert found["failed"] == ["simreg 3x4"]
    assert [result["case"] for result in found["results"]] == ["simreg 3x5"]
    assert not path.with_name("report.json.part").exists()


def test_without_rich(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(sys.modules, "rich.table", None)
    report.print_result(result_of(make("simreg", 3, 4), QUIET))
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "simreg 3x4: copy 53.7 GB/s"
    assert lines[1].split() == ["ms,", "median", *lines[1].split()[2:]]
    assert lines[4].split()[:3] == ["eager", "b", "3.000"]
    assert "3.00x" in lines[4]


# ---- committed results ----


def test_pages_are_what_the_reports_say() -> None:
    """Texts to the letter; pictures by the stamp of what they were drawn of, and by what is read in them."""
    for path, text in results.regenerate(ROOT).items():
        assert not results.outdated(path, text), f"{path}: run `make results`"
    for name in ("headline", "shown"):
        assert f"<!-- results: {name} -->" in (ROOT / "README.md").read_text()
    assert "<!-- results: all -->" in (ROOT / "docs" / "results.md").read_text()


@pytest.mark.parametrize("theme", plot.INKS)
def test_the_picture_of_the_readme_says_what_its_table_says(theme: str) -> None:
    drawn = (ROOT / "docs" / "images" / f"bench-{theme}.svg").read_text()
    reports = {x.name: json.loads(x.read_text()) for x in ROOT.glob("bench/results/cpu-*.json")}
    found = readme.newest(reports)
    assert set(readme.SHOWN) <= {case.name for case in suite("cpu")}
    assert found
    for result, _ in found.values():
        for kind in readme.KINDS:
            assert f">{plot.ends(report.times(result, kind).values())}<" in drawn
            peaks = report.peaks(result)
            assert not peaks or f">{plot.ends([peaks[kind] / peaks['selfkd']])}<" in drawn
    assert plot.INKS[theme][0] in drawn


def test_a_picture_is_outdated_by_figures_and_not_by_matplotlib(tmp_path: Path) -> None:
    shown = {"simreg": result_of(make("simreg", 3, 4), QUIET)}
    path = tmp_path / "x.svg"
    drawn = plot.svg(shown, "", 4, "light")
    assert drawn == plot.svg(shown, "", 4, "light")
    path.write_text(drawn.replace("<svg ", "<svg  "))
    assert not results.outdated(path, drawn)
    other = {"simreg": result_of(make("simreg", 3, 4), QUIET | {"eager a": 2.01})}
    assert results.outdated(path, plot.svg(other, "", 4, "light"))


def test_tables_from_reports(tmp_path: Path) -> None:
    """Later reports replace earlier figures; a GPU has tables and a page of its own."""
    about = {"cpu": "Z80", "variant": "base", "threads": 1, "torch": "2.13", "commit": "abc"}
    folder = tmp_path / "bench" / "results"
    folder.mkdir(parents=True)
    (tmp_path / "docs" / "operators").mkdir(parents=True)
    markers = "{0}<!-- results: {1} -->\nold\n<!-- end results -->\nafter\n"
    texts = [markers.format("", name) for name in ("headline", "shown", "all")]
    (tmp_path / "README.md").write_text("before\n" + "".join(texts))
    docs = tmp_path / "docs" / "operators" / "simreg.md"
    docs.write_text(markers.format("", "simreg"))

    def write(name: str, machine: dict[str, Any], *found: dict[str, Any]) -> None:
        report.save({"machine": machine, "results": found, "failed": []}, folder / name)

    first, second = make("simreg", 256, 2048), make("adversarial", 8)
    times = QUIET | {"compile a": 4.0}
    peaks = {"selfkd": 3 << 20, "eager a": 6 << 20, "compile a": 9 << 20}
    slow = result_of(first, times | {"selfkd": 2.0})
    write("a.json", {**about, "date": "day 1"}, slow, result_of(second, QUIET))
    write("b.json", {**about, "date": "day 2"}, result_of(first, times) | {"peak_bytes": peaks})
    found = results.regenerate(tmp_path)
    front = found[tmp_path / "README.md"]
    assert front.startswith("before\n<!-- results: headline -->\n")
    assert front.endswith("\n<!-- end results -->\nafter\n")
    assert "old" not in front
    assert "**Speed:** 2.0 times that of eager PyTorch and 4.0 times that of torch.compile" in front
    assert "eager PyTorch takes 2.0 times as much, torch.compile 3.0 times" in " ".join(
        front.split()
    )
    assert "| 1 ms | 2 - 3 ms (2.0x - 3.0x) | 4 ms (4.0x) | 3 / 6 / 9 MB |" in front
    assert "Z80 (base), 1 thread, PyTorch 2.13" in front
    assert "| simreg 256x2048 | 1.000 | 2.0x - 3.0x |" in front
    assert front.index("| simreg 256x2048") < front.index("| adversarial 8")
    assert results.NO_GPU in front
    assert "| simreg 256x2048 | 1.000 | 2.0x (a), 3.0x (b) |" in found[docs]
    assert "`bench/results/b.json` (day 2, abc)" in found[docs]
    assert "a.json" not in found[docs]
    assert "adversarial" not in found[docs]

    gpu = {**about, "date": "day 3", "gpu": "a GPU", "driver": "1"}
    times = QUIET | {"graph selfkd": 0.5, "graph a": 0.75}
    wide = replace(first, name="simreg 256x2048 bfloat16", need={"eager": 3})
    passes = {"forward": 1, "backward": 0}
    launches = {"selfkd": {k: {"kernels": 1, "memsets": n, "copies": 0} for k, n in passes.items()}}
    write("g.json", gpu, result_of(wide, times, "cuda") | {"launches": launches})
    found = results.regenerate(tmp_path)
    assert results.NO_GPU not in found[tmp_path / "README.md"]
    assert "a GPU, PyTorch 2.13; `bench/results/g.json` (day 3, abc)" in found[docs]
    page = found[folder / "g.md"]
    assert "- driver: 1" in page
    assert "| simreg 256x2048 bfloat16 | 1.000 | 2.0x - 3.0x | 1.5x |" in page
    assert "1 (1 memsets) + 1" in page
    assert "Missed: simreg 256x2048 bfloat16 has" in page

    docs.write_text("<!-- results: simreg -->\n")
    with pytest.raises(ValueError, match=r"simreg\.md: a table of results begins and has no end"):
        results.regenerate(tmp_path)


def test_the_suite_of_calls(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Every operator is beside a bare Function with as many inputs that learn; the table is of the report."""
    threads, path = torch.get_num_threads(), tmp_path / "calls.json"
    try:
        assert (
            bench("simreg", "adversarial", "--suite", "calls", "--repeat", 1, "--json", path) == 0
        )
    finally:
        torch.set_num_threads(threads)
    content = json.loads(path.read_text())
    assert [x["call"] for x in content["calls"]] == ["simreg 2x10", "adversarial 2"]
    assert all(x["ratio"] == x["us"] / x["bare"] > 0.5 for x in content["calls"])
    assert content["machine"]["threads"] == 1
    figure = f"{content['calls'][0]['ratio']:.2f}x"
    machines = results.merge({"calls.json": content})
    assert figure in results.block_of_calls(machines)
    assert figure in capsys.readouterr().out
    assert "a bare Function, at most 0.1x" in calls.missed([content["calls"][0] | {"most": 0.1}])[0]
    assert set(calls.MOST) <= set(calls.SHAPES) <= set(FORMS)
    assert bench("BiFPN", "--suite", "calls") == 2
