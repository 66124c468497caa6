"""The study: it goes on where it was stopped; what is made of its reports."""

from __future__ import annotations

import importlib
import json
import os
import re
import subprocess
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import harness
import pytest
import torch
from conftest import ROOT
from selfkd import cli
from selfkd.bench import report, results, study

EXAMPLES = ROOT / "examples"
sys.path.append(str(EXAMPLES))
grid, run, train = (importlib.import_module(f"study.{name}") for name in ("grid", "run", "train"))
pytestmark = pytest.mark.skipif(
    bool(harness.SIMT_LIBRARY), reason="the emulator has no PyTorch binding"
)


# ---- going on ----


def toy(calls: list[Any]) -> Any:
    """A study of two settings whose values are known."""

    def values(setting: Any, seed: int, part: float) -> dict[str, float]:
        calls.append((setting.name, seed))
        seconds = {"a": 1e-3, "b": 1.5e-3, "c": 3e-3}.get(setting.name)
        train.step_seconds += [] if seconds is None else [seconds, seconds * (seed + 1), 1.0, 0, 0]
        gain = {"a": 0.0, "b": 2.0, "c": -2.0, "d": 0.0}[setting.name]
        return {"score": 10 * seed + gain + 0.1 * (seed % 2) * (gain != 0), "loss": 1.0}

    def claim(text: str, name: str) -> Any:
        return grid.Claim(text, name, "a", "one", "score")

    return grid.Study(
        name="sd_dropout",
        title="A toy",
        tasks={"one": "the one task"},
        metrics={
            "score": grid.Metric("score, %"),
            "loss": grid.Metric("loss", 3, False, "other"),
        },
        headline="b",
        baselines=("a",),
        references=("d",),
        grid=[grid.Setting("one", name) for name in "abcd"],
        claims=[claim("rises", "b"), claim("falls", "c"), claim("stays", "d")],
        drawn=("score",),
        run=values,
    )


@pytest.fixture
def content(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> dict[str, Any]:
    """The report of a toy, run in two halves, the first of which was killed while it wrote."""
    calls: list[Any] = []
    monkeypatch.setattr(run, "STUDIES", {"sd_dropout": toy(calls)})
    seeds, path = [0, 1, 2], tmp_path / "runs.jsonl"
    jobs = [("sd_dropout", number, seed) for seed in seeds for number in range(4)]
    monkeypatch.setattr(torch, "set_num_threads", lambda _: None)
    monkeypatch.setattr(run.signal, "signal", lambda *_: None)
    run.work(jobs[:5], path, 1.0, os.getppid())
    with path.open("a") as file:
        file.write('{"code": "cut o')
    left = [job for job in jobs if run.key(job) not in run.finished(path, 1.0)]
    assert left == jobs[5:]
    run.work(left, path, 1.0, os.getppid())
    assert len(calls) == len(set(calls)) == len(jobs)
    assert not run.finished(path, 0.5)  # runs of shorter trainings do not count
    return run.report(toy(calls), run.here(), seeds, 1.0, run.finished(path, 1.0))


def test_runs_of_other_code_do_not_count(content: Any, tmp_path: Path) -> None:
    path = tmp_path / "runs.jsonl"
    path.write_text(path.read_text().replace(run.code(), "another"))
    assert not run.finished(path, 1.0)


@pytest.mark.full
def test_a_killed_study_goes_on(tmp_path: Path) -> None:
    """Killed once some runs are done, and started again, it reports what one does that is left alone."""

    def command(folder: str) -> list[str]:
        options = ["--only", "segmentation", "--part", "0.05", "--seeds", "2"]
        return [sys.executable, "-m", "study", *options, "--out", str(tmp_path / folder)]

    environment = os.environ | {"PYTHONPATH": f"{EXAMPLES}:{os.environ.get('PYTHONPATH', '')}"}
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL, "env": environment}
    path = tmp_path / "killed" / "runs.jsonl"
    with subprocess.Popen(command("killed"), **quiet) as process:
        while run.lines(path) < 3:
            assert process.poll() is None
            time.sleep(0.02)
        process.kill()
    time.sleep(5)  # the processes of the trainings end by themselves
    done = run.lines(path)
    assert 3 <= done < 10
    kept = path.read_text().splitlines()[:done]
    for folder in ("killed", "whole"):
        subprocess.run(command(folder), check=True, **quiet)
    found = [
        json.loads((tmp_path / folder / "study-segmentation.json").read_text())
        for folder in ("killed", "whole")
    ]
    for report_ in found:
        for setting in report_["settings"]:
            assert all(0 < seconds < 1 for seconds in setting.pop("step"))  # no two are alike
    assert found[0] == found[1]
    assert path.read_text().splitlines()[:done] == kept


# ---- reports ----


def test_the_readmes_sentence_has_the_interval_of_what_a_study_is_named_after(content: Any) -> None:
    row = study.verdicts(study.Found(content))[1]
    (task,) = content["tasks"].values()
    said = study.gains([content])
    assert f" A toy, score ({task}: {row[4]})." in said
    assert said.endswith(
        "Of 3 claims, the papers' and controls, 1 show, of 1 the opposite ([study](docs/study.md))."
    )
    assert study.gains([]) == ""


def test_verdicts_follow_the_intervals(content: dict[str, Any]) -> None:
    table = study.verdicts(study.Found(content))
    assert [row[-1] for row in table[1:]] == ["**shows**", "**the opposite shows**", "not shown"]
    assert table[1][3].startswith("+2.03 ± 0.03")
    turned = json.loads(json.dumps(content))
    turned["metrics"]["score"]["higher"] = False
    table = study.verdicts(study.Found(turned))
    assert [row[-1] for row in table[1:]] == ["**the opposite shows**", "**shows**", "not shown"]


def test_tables(content: dict[str, Any]) -> None:
    first, other = (table for _, table in study.tables(study.Found(content)))
    assert first[0] == ["setting", "score, %", "time of a step", "minus a", "95 % interval"]
    assert first[1] == ["a", "10.0", "1 (1 ms)", "", ""]
    assert first[2] == ["b", "12.0", "1.50", "+2.03 ± 0.03", "+1.89 to +2.18"]
    assert [row[2] for row in first[3:]] == ["3.00", ""]
    assert other[1:] == [
        ["a", "1.000"],
        *([name, "1.000 (+0.0000 ± 0.0000)"] for name in "bcd"),
    ]
    assert study.summary([content])[1] == ["A toy", "b", "1.50", "3", "1", "1", "1"]
    (_, row) = study.first_choices([content])
    assert row == [
        *("A toy", "the one task", "b", "score, %: 12.0", "+1.89 to +2.18", "none"),
    ]
    worse = json.loads(json.dumps(content))
    worse["settings"][0]["values"]["score"] = [20, 30, 40]
    (_, row) = study.first_choices([worse])
    assert row[2:] == ["a", "score, %: 30.0", "it is the baseline", "none"]
    close = json.loads(json.dumps(content))
    close["settings"][0]["values"]["score"] = [3, 11, 22]
    (_, row) = study.first_choices([close])
    assert row[-1] == "a"


def test_what_the_page_shows(content: dict[str, Any], tmp_path: Path) -> None:
    folder = tmp_path / "bench" / "results"
    folder.mkdir(parents=True)
    (tmp_path / "README.md").touch()
    (tmp_path / "docs").mkdir()
    page = tmp_path / "docs" / "study.md"
    marker = "<!-- results: study_{} -->\nbefore\n<!-- end results -->\n"
    page.write_text("".join(marker.format(name) for name in ("all", "sd_dropout", "simreg")))
    report.save(content, folder / "study-sd_dropout.json")
    written = results.regenerate(tmp_path)
    text = written[page]
    for title, table in study.tables(study.Found(content)):
        assert title in text
        assert report.markdown(table) in text
    assert "\nbefore\n" not in text
    assert "-->\n\nNot yet run: `make study`.\n\n<!--" in text
    drawn = {path: x for path, x in written.items() if path.suffix == ".svg"}
    assert {path.relative_to(page.parent).as_posix() for path in drawn} == set(
        re.findall(r"images/[^\"]*", text)
    )
    for path, picture in drawn.items():
        assert "95 % intervals, 3 seeds" in picture
        assert ("A toy, the one task: score" in picture) == ("-all-" in path.name)
        path.parent.mkdir(exist_ok=True)
        path.write_text(picture.replace("<svg ", "<svg  "))
        assert not results.outdated(path, picture)  # by what it shows, not by its bytes
    content["settings"][1]["values"]["score"][0] += 1
    report.save(content, folder / "study-sd_dropout.json")
    again = results.regenerate(tmp_path)
    assert all(results.outdated(path, again[path]) for path in drawn)


def test_a_report_on_the_screen(
    content: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "study-toy.json"
    report.save(content, path)
    assert cli.main(["study", "--show", str(path)]) == 0
    out = capsys.readouterr().out
    assert re.search(r"b +│ +12\.0 │ +1\.50 │ +\+2\.03 ± 0\.03", out)
    assert "too short for conclusions" not in out
    report.save({**content, "part": 0.25}, path)
    assert cli.main(["study", "--show", str(path)]) == 0
    assert "trained for 0.25 of the epochs: too short for conclusions" in capsys.readouterr().out
    path.write_text('{"machine": {}}')
    for wrong in (path, tmp_path / "nothing.json"):
        assert cli.main(["study", "--show", str(wrong)]) == 2
        assert capsys.readouterr().err.startswith("selfkd study: ")


def test_a_claim_names_settings() -> None:
    with pytest.raises(ValueError, match="no nobody in one"):
        replace(toy([]), claims=[grid.Claim("wrong", "nobody", "a", "one", "score")])
    with pytest.raises(ValueError, match="one lacks the headline or the first baseline"):
        replace(toy([]), headline="nobody")


def test_committed_reports_are_of_this_grid() -> None:
    """The page shows all of the grid: none is selected."""
    found = study.load(ROOT)
    assert found.keys() <= set(run.STUDIES)
    for name, content in found.items():
        grid_of = [(x.task, x.name) for x in run.STUDIES[name].grid]
        assert [(x["task"], x["name"]) for x in content["settings"]] == grid_of
        assert (content["part"], content["seeds"]) == (1, list(run.SEEDS))
        assert content["claims"] == [asdict(x) for x in run.STUDIES[name].claims]
        assert content["metrics"] == {x: asdict(y) for x, y in run.STUDIES[name].metrics.items()}
        for setting in content["settings"]:
            lengths = {len(x) for x in (*setting["values"].values(), setting["step"])}
            assert lengths == {len(run.SEEDS)}
    text = (ROOT / "docs" / "study.md").read_text()
    for name in ("all", *run.STUDIES):
        assert f"<!-- results: study_{name} -->" in text
