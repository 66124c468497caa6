"""The README: one screen before "More", whose code runs and whose claims have a source."""

from __future__ import annotations

import importlib
import re
from types import SimpleNamespace
from typing import Any

import selfkd
import torch
import torch.nn.functional as F
from conftest import ROOT
from pages import DOCS, blocks
from selfkd import contract
from test_docs import version

README = ROOT / "README.md"
FRONT, _, REST = README.read_text().partition("\n## More\n")


def block(wanted: str) -> str:
    """The README's only block of a language."""
    (text,) = (text for language, text in blocks(README) if language == wanted)
    return text


def hunks() -> dict[str, str]:
    """The README's changes by what stands between the signs @@."""
    diff = block("diff")
    _, *parts = re.split(r"^@@ (.*) @@\n", diff, flags=re.MULTILINE)
    return dict(zip(parts[::2], parts[1::2], strict=True))


def test_the_first_screen_is_one() -> None:
    assert len(FRONT.splitlines()) <= 60
    assert REST


def test_pictures_of_the_readme_are_there() -> None:
    """Those of the study once it has a report."""
    studied = any(ROOT.glob("bench/results/study-*.json"))
    names = re.findall(r'"(docs/images/[^"]+)"', README.read_text())
    assert len(names) == 4
    for name in names:
        assert (ROOT / name).exists() or ("study" in name and not studied), name


def test_the_snippet_runs_as_it_stands() -> None:
    names: dict[str, Any] = {}
    exec(block("python"), names)
    weight = names["student"].weight
    z = names["student"](names["images"])
    expected = selfkd.reference.distill(z, names["labels"], names["t"], temperature=4.0)
    torch.testing.assert_close(weight.grad, torch.autograd.grad(expected, weight)[0])
    assert names["loss"].requires_grad
    assert names["logits"].shape == (256, 10)


def test_the_plain_loop_of_the_readme() -> None:
    change = hunks()["a plain loop"]
    found = []
    for sign in "-+":
        torch.manual_seed(0)
        z, t = torch.randn(2, 8, 5, dtype=torch.float64)
        y = torch.randint(5, (8,))
        names = {"selfkd": selfkd, "F": F, "T": 3.0, "z": z.requires_grad_(), "t": t, "y": y}
        exec(version(change, sign), names)
        found.append((names["loss"], *torch.autograd.grad(names["loss"], names["z"])))
    torch.testing.assert_close(found[1], found[0], rtol=1e-9, atol=1e-12)


def test_the_toolkits_of_the_readme() -> None:
    """Each changed line stands in the page of toolkits, whose changes its tests run; the names exist."""
    page = "".join((DOCS / "integrations.md").read_text().split())
    _, torchdistill, transformers = hunks().values()
    for line in torchdistill.splitlines():
        assert "".join(line[1:].split()) in page
    importlib.import_module(re.search(r"'(selfkd\.[\w.]+)'", torchdistill)[1])  # type: ignore[index]
    where = next(name for name in hunks() if name.startswith("Transformers"))
    module = importlib.import_module(where.split()[-1])

    class Trainer:
        args, model = SimpleNamespace(device="cpu"), SimpleNamespace(config=None)

        def __init__(self, *given: Any, **options: Any) -> None:
            pass

    names = {"Trainer": Trainer, "DistillMixin": module.DistillMixin}
    names |= dict.fromkeys(("student", "arguments", "data"))
    names["teacher"] = torch.nn.Linear(2, 2)
    for sign in "-+":
        exec(version(transformers, sign), names)
    assert isinstance(names["trainer"], module.DistillMixin)


def test_memory_moved_is_that_of_the_picture() -> None:
    drawn = (DOCS / "operators" / "pictures" / "sd_dropout_kl.svg").read_text()
    (few, little), (many, much) = re.findall(r": (\d+) kernels move (\d+) times", drawn)
    said = " ".join(REST.split())
    assert f"runs as {many} kernels that move {much} times the memory of one" in said
    assert re.search(rf"`sd_dropout_kl` \[moves {little} times\]\(\S+\), in {few}\.", said)


def test_no_row_of_the_table_of_losses_is_there_twice() -> None:
    first = re.findall(r"^\| ([^|]+) \| `selfkd", REST, re.MULTILINE)
    calls = re.findall(r"^\| [^|]+ \| (`selfkd[^|]+) \|", REST, re.MULTILINE)
    assert len(first) > 5
    mentioned = re.findall(r"`selfkd\.(\w+)`", " ".join(calls))
    assert len(mentioned) == len(set(mentioned))
    assert set(contract.modules()) <= set(mentioned)


def test_ci_runs_the_test_command_of_the_readme() -> None:
    (commands,) = (x for language, x in blocks(README) if language == "sh" and "make test" in x)
    words = [line.split("#")[0].strip() for line in commands.splitlines()]
    assert words == ["make demo", "make test"]
    assert "make test" in (ROOT / ".ci" / "run").read_text().splitlines()


def test_papers_to_cite_are_those_of_the_table() -> None:
    cited = re.findall(r"eprint = \{([\d.]+)\}", block("bibtex"))
    assert sorted(cited) == ["2103.08273", "2201.05131", "2208.05642", "2211.10938"]
    assert all(f"arxiv.org/abs/{number}" in REST for number in cited)
    cff = (ROOT / "CITATION.cff").read_text()
    assert f"\nversion: {selfkd.__version__}\n" in cff
