"""The documentation: every operator has its page, and what the pages show runs and is true."""

from __future__ import annotations

import importlib
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import selfkd
import torch
import torch.nn.functional as F
from conftest import ROOT
from selfkd import contract

DOCS = ROOT / "docs"
PAGES = {path.stem: path for path in sorted((DOCS / "operators").glob("*.md"))}
HEADINGS = [
    "Formula",
    "Shapes and dtypes",
    "What it replaces",
    "Measured",
    "Limits",
    "The contract",
]
OTHER_MASKS = ("sd_dropout_head", "dropout_views")  # their masks are not those of F.dropout
SEED = 7


@pytest.fixture(autouse=True)
def _in_float64() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def blocks(path: Path) -> list[tuple[str, str]]:
    """Language and text of each fenced block of a page."""
    return re.findall(r"^```(\w+)\n(.*?)^```$", path.read_text(), re.DOTALL | re.MULTILINE)


def diffs() -> list[Any]:
    """Each diff of the operators' pages, with the Python above it."""
    found = []
    for name, path in PAGES.items():
        setup = ""
        for language, text in blocks(path):
            if language == "python":
                setup += text
            elif language == "diff":
                found.append(pytest.param(name, setup, text, id=f"{name}-{len(found)}"))
    return found


def version(diff: str, sign: str) -> str:
    """The lines before ("-") or after ("+") a change."""
    lines = [line for line in diff.splitlines() if line[:1] in ("", " ", sign)]
    return "\n".join(line[1:] for line in lines)


def one_pair_of_masks(patch: pytest.MonkeyPatch) -> None:
    """Let F.dropout give the samples of one seed in turn, and let every seed be that one."""
    samples: list[torch.Tensor] = []

    def dropout(x: torch.Tensor) -> torch.Tensor:
        if not samples:
            _, *both = selfkd.reference.dropout_views(x, torch.tensor(SEED), p=0.5)
            samples.extend(both)
        return samples.pop(0)

    patch.setattr(F, "dropout", dropout)
    patch.setattr(torch, "randint", lambda *_, **__: torch.tensor(SEED))


def trained(name: str, setup: str, text: str) -> dict[str, torch.Tensor]:
    """What a version leaves behind: losses, parameters and their gradients."""
    torch.manual_seed(SEED)
    names: dict[str, Any] = {"__name__": name}
    exec(setup, names)
    with pytest.MonkeyPatch.context() as patch:
        if name in OTHER_MASKS:
            one_pair_of_masks(patch)
        exec(text, names)
    left = {key: x for key, x in names.items() if key.endswith("loss")}
    for key, module in names.items():
        if isinstance(module, torch.nn.Module):
            for part, x in module.named_parameters():
                left[f"{key}.{part}"] = x
                if x.grad is not None:
                    left[f"{key}.{part}.grad"] = x.grad
    return left


@pytest.mark.parametrize(("name", "setup", "diff"), diffs())
def test_before_is_after(name: str, setup: str, diff: str) -> None:
    before, after = (trained(name, setup, version(diff, sign)) for sign in "-+")
    assert f"selfkd.{name}(" not in version(diff, "-")
    assert f"selfkd.{name}(" in version(diff, "+")
    assert "loss" in before
    assert any(key.endswith(".grad") for key in before)
    torch.testing.assert_close(after, before, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", contract.modules())
def test_every_operator_has_its_page(name: str) -> None:
    assert name in PAGES, f"docs/operators/{name}.md is missing"
    text = PAGES[name].read_text()
    sections = re.findall(r"^## (.*)$", text, re.MULTILINE)
    assert sections == HEADINGS
    assert f"{{py:func}}`selfkd.{name}`" in text
    assert f"{{literalinclude}} ../../ops/{name}.h" in text
    assert re.search(
        rf"^<!-- results: {name} -->\n(.*\n)*?<!-- end results -->$", text, re.MULTILINE
    )
    assert name in [block.values[0] for block in diffs()]


def test_every_page_is_an_operators() -> None:
    assert set(PAGES) - {"index"} == set(contract.modules())


# ---- choosing a loss ----


def situations() -> dict[str, Any]:
    """The names that docs/choosing.md uses."""
    torch.manual_seed(SEED)
    fc = torch.nn.Linear(6, 5)
    z, t, s, r, u, v = torch.randn(6, 8, 5)
    y, y_other = torch.randint(5, (2, 8))
    pixels, taught = torch.randn(2, 2, 5, 3, 3)
    labels = torch.randint(5, (2, 3, 3))
    labels[0, 0] = 255
    tokens, heard = torch.randn(2, 2, 7, 5)
    targets = torch.randint(5, (2, 7))
    targets[:, -1] = -100
    maps, teacher_maps = torch.randn(2, 2, 4, 3, 3)
    x, features = torch.randn(2, 8, 6)
    real, fake = torch.randn(2, 8)
    class_weights, learned = torch.rand(5), torch.nn.Parameter(torch.tensor(2.0))
    cosine_classifier = torch.nn.Sequential(fc)
    log_q, classes = t.log_softmax(1).topk(3, dim=1)
    h, q, count, mask, epoch = torch.randn(8, 6), t.softmax(1), 11, targets != -100, 41
    return locals() | {"F": F}


CALLS = re.findall(r"`([^`\n]*selfkd\.[^`\n]*\))`", (DOCS / "choosing.md").read_text())


def run_situation(call: str, impl: object) -> Any:
    """Evaluate a call; the same names, and for masks the same seed, each time."""
    names = situations() | {"selfkd": impl}
    torch.manual_seed(SEED)
    return eval(call, names)


@pytest.mark.parametrize("call", CALLS)
def test_calls_of_choosing(call: str) -> None:
    found = run_situation(call, selfkd)
    if "selfkd.nn" in call:
        assert isinstance(found, (torch.nn.Module, float))
        return
    if "selfkd.reference" in call:
        assert found.requires_grad  # of what is learned
        return
    expected = run_situation(call, selfkd.reference)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)
    assert all(bool(x.isfinite().all()) for x in (found if isinstance(found, tuple) else [found]))


def test_reverse_divergence() -> None:
    """The call that stands for KL(student || teacher) is that divergence."""
    call = next(call for call in CALLS if "reverse_weight=0.0" in call)
    names = situations()
    log_p, log_t = names["z"].log_softmax(1), names["t"].log_softmax(1)
    expected = F.kl_div(log_t, log_p, reduction="batchmean", log_target=True)
    torch.testing.assert_close(run_situation(call, selfkd), expected)


def test_numpy_page() -> None:
    names: dict[str, Any] = {}
    for language, text in blocks(DOCS / "numpy.md"):
        if language == "python":
            exec(text, names)
    u, v = (torch.from_numpy(names[key]) for key in "uv")
    loss = torch.as_tensor(names["forward"].loss)
    torch.testing.assert_close(loss, selfkd.reference.sd_dropout_kl(u, v), rtol=3e-6, atol=0)


# ---- the README ----

README = ROOT / "README.md"
FRONT, _, REST = README.read_text().partition("\n## More\n")


def hunks() -> dict[str, str]:
    """The README's changes by what stands between the signs @@."""
    (diff,) = (text for language, text in blocks(README) if language == "diff")
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
    (text,) = (text for language, text in blocks(README) if language == "python")
    torch.manual_seed(SEED)
    names: dict[str, Any] = {}
    exec(text, names)
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
        names = situations() | {"selfkd": selfkd, "T": 3.0}
        names["z"].requires_grad_()
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
    (where,) = (name for name in hunks() if name.startswith("Transformers"))
    module = importlib.import_module(where.split()[-1])

    class Trainer:
        args, model = SimpleNamespace(device="cpu"), torch.nn.Linear(2, 2)

        def __init__(self, *given: Any, **options: Any) -> None:
            pass

    names = {"Trainer": Trainer, "DistillMixin": module.DistillMixin}
    names |= dict.fromkeys(("student", "arguments", "data"))
    names["teacher"] = torch.nn.Linear(2, 2)
    for sign in "-+":
        exec(version(transformers, sign), names)
    assert isinstance(names["trainer"], module.DistillMixin)


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
    (text,) = (text for language, text in blocks(README) if language == "bibtex")
    cited = re.findall(r"eprint = \{([\d.]+)\}", text)
    assert sorted(cited) == ["2103.08273", "2201.05131", "2208.05642", "2211.10938"]
    assert all(f"arxiv.org/abs/{number}" in REST for number in cited)
    cff = (ROOT / "CITATION.cff").read_text()
    assert f"\nversion: {selfkd.__version__}\n" in cff


# ---- the build ----


def test_sphinx_builds_without_a_warning(tmp_path: Path) -> None:
    """Every name, link and file that a page refers to is there."""
    for module in ("furo", "myst_parser"):
        pytest.importorskip(module, reason=f"there is no {module}: pip install '.[docs]'")
    command = [sys.executable, "-m", "sphinx", "-W", "--keep-going", "-q", "-d", tmp_path / "cache"]
    done = subprocess.run(
        [*command, DOCS, tmp_path / "html"],
        capture_output=True,
        text=True,
        timeout=300,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    api = (tmp_path / "html" / "api.html").read_text()
    for name in contract.modules():
        assert f'id="selfkd.{name}"' in api
        assert f'id="selfkd.reference.{name}"' in api
    for name in selfkd.nn.__all__:
        assert f'id="selfkd.nn.{name}"' in api
