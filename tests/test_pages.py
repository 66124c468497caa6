"""The documentation's pages: their mistakes are shown, all are plain Markdown, and no link is dead."""

from __future__ import annotations

import importlib
import inspect
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pages
import pytest
import selfkd
import torch
import torch.distributed as dist
from conftest import ROOT, in_ranks

# ---- modules ----


def shown_signatures(path: Path) -> Iterator[tuple[str, inspect.Signature]]:
    """Name and signature of what a page's first block in `py` lists."""
    text = next(text for language, text in pages.blocks(path) if language == "py")
    for name, arguments in re.findall(r"^([\w.]+)\((.*?)\)$", text, re.DOTALL | re.MULTILINE):
        names: dict[str, Any] = {"selfkd": selfkd, "torch": torch}
        exec(f"def listed({arguments}): ...", names)
        yield name, inspect.signature(names["listed"])


def own_signature(name: str) -> inspect.Signature:
    """That of a class's constructor, of a method or of a function, without `self`."""
    owner, _, method = name.partition(".")
    found = getattr(selfkd.nn, owner)
    signature = inspect.signature(getattr(found, method) if method else found)
    kept = [x for x in signature.parameters.values() if x.name != "self"]
    return signature.replace(parameters=kept)


def comparable(signature: inspect.Signature, like: inspect.Signature) -> list[tuple[Any, ...]]:
    """Names, kinds and defaults; a default that `like` leaves open, as `...`, is left open."""
    open_ones = {x.name for x in like.parameters.values() if x.default is ...}
    return [
        (x.name, x.kind, ... if x.name in open_ones else x.default)
        for x in signature.parameters.values()
    ]


PAGES_OF_MODULES = [path for name, path in pages.MODULES.items() if name != "index"]


@pytest.mark.parametrize(
    "path", [*pages.MODULES.values(), *pages.OPERATORS.values()], ids=pages.name_of
)
@pytest.mark.filterwarnings("ignore:.torch.jit.script:DeprecationWarning")
def test_page_runs(path: Path) -> None:
    torch.manual_seed(0)
    pages.run(path)


def mistakes(path: Path) -> dict[str, str]:
    """The text of each common mistake on a page, by the sentence in bold that it begins with."""
    _, found, text = path.read_text().partition("# Common mistakes\n")
    text = re.split(r"^#+ ", text, flags=re.MULTILINE)[0]
    _, *parts = re.split(r"^\*\*(.+?)\*\*", text, flags=re.MULTILINE)
    assert bool(found) == bool(parts)
    return dict(zip(parts[::2], parts[1::2], strict=True))


def hold_table_in_model(rank: int, folder: Path) -> None:
    """Each of two ranks writes a sample of its own, and runs the model once more."""
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    net = torch.nn.Linear(3, 4)
    net.table = selfkd.nn.PreviousEpoch(2, 4)
    model = torch.nn.parallel.DistributedDataParallel(net)
    net.table.update(torch.tensor([rank]), model(torch.randn(1, 3)))
    model(torch.randn(1, 3))
    torch.save(net.table.current_written, folder / f"{rank}.pt")
    dist.destroy_process_group()


def test_table_in_a_model_of_two_ranks_is_lost(tmp_path: Path) -> None:
    in_ranks(2, hold_table_in_model, tmp_path)
    for rank in range(2):
        assert torch.load(tmp_path / f"{rank}.pt").tolist() == [True, False]


# What a dialogue on a page cannot show.
SHOWN_BY = {
    "A part of the model under `DistributedDataParallel`.": test_table_in_a_model_of_two_ranks_is_lost
}


@pytest.mark.parametrize(
    "path",
    [x for x in (*PAGES_OF_MODULES, *pages.OPERATORS.values()) if x.stem != "index"],
    ids=pages.name_of,
)
def test_mistakes_are_shown(path: Path) -> None:
    """Each has a dialogue, which runs with the page."""
    found = mistakes(path)
    assert found
    for name, text in found.items():
        assert "```pycon\n" in text or name in SHOWN_BY, name


@pytest.mark.parametrize("path", PAGES_OF_MODULES, ids=lambda path: path.stem)
def test_page_of_modules(path: Path) -> None:
    """A page has the file name of its module's source, true signatures, and mistakes."""
    importlib.import_module(f"selfkd.nn.{path.stem}")
    headings = re.findall(r"^## (.*)$", path.read_text(), re.MULTILINE)
    assert headings == ["Signature", "Example", "Common mistakes"]
    for name, shown in shown_signatures(path):
        assert comparable(shown, shown) == comparable(own_signature(name), shown), name


def test_every_module_has_its_page() -> None:
    listed = {name for path in PAGES_OF_MODULES for name, _ in shown_signatures(path)}
    modules = {name for name in selfkd.nn.__all__ if not name.endswith("Parts")}
    assert modules <= listed
    index = pages.MODULES["index"].read_text()
    for path in PAGES_OF_MODULES:
        assert f"]({path.name})" in index
    for name in modules:
        assert f"`{name}`" in index


# ---- notebooks ----


LONG = {"frskd"}


@pytest.mark.parametrize(
    "path",
    [
        pytest.param(path, id=path.stem, marks=[pytest.mark.full] * (path.stem in LONG))
        for path in pages.NOTEBOOKS
    ],
)
def test_notebook_runs(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing but their pictures is stored, and they train networks that work."""
    pyplot = pytest.importorskip("matplotlib.pyplot", reason="pip install '.[examples]'")
    pyplot.switch_backend("agg")
    cells = json.loads(path.read_text())["cells"]
    code = [cell for cell in cells if cell["cell_type"] == "code"]
    assert 6 <= len(cells) <= 12
    stored = [output for cell in code for output in cell["outputs"]]
    assert all(list(output["data"]) == ["image/png"] for output in stored)
    assert all(cell["execution_count"] is None for cell in code)
    drawn: list[int] = []
    monkeypatch.setattr(pyplot, "show", lambda: drawn.append(len(pyplot.gcf().axes)))
    accuracy = pages.run(path)["accuracy"]
    pyplot.close("all")
    assert len(drawn) == len(stored) == 1
    assert all(float(torch.as_tensor(found).min()) > 0.8 for found in accuracy.values())


# ---- all pages ----

FENCED = re.compile(r"^(```+).*?^\1$", re.DOTALL | re.MULTILINE)
LINK = re.compile(r"\]\(([^)\s]+)\)")
SHOWN = re.compile(r'\b(?:src|srcset|href)="([^"]+)"')  # by HTML
READ_ALONE = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "SECURITY.md")),
    ROOT / "tests" / "vectors" / "README.md",
]
# HTML that GitHub leaves as it is, and commands that its formulas refuse.
TAGS = {"picture", "source", "img", "br", "sub", "sup", "details", "summary"}
REFUSED = re.compile(
    r"\\(operatorname|def|newcommand|require|href|style|class|unicode|cssId|mathchoice)\b"
)


def prose(path: Path) -> str:
    """A page without its blocks of code."""
    return FENCED.sub("", pages.text_of(path))


def anchors(path: Path) -> set[str]:
    """What a link may name in a page: its headings, as GitHub and Sphinx both spell them."""
    found: list[str] = []
    for heading in re.findall(r"^#+ (.*)$", prose(path), re.MULTILINE):
        name = re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-")
        found.append(f"{name}-{found.count(name)}" if name in found else name)
    return set(found)


@pytest.mark.parametrize("path", pages.ALL, ids=pages.name_of)
def test_page_is_plain_markdown(path: Path) -> None:
    """What only Sphinx understands GitHub shows as it stands; docs/conf.py adds it."""
    text = pages.text_of(path)
    assert not re.findall(r"^[`:]{3,}\s*\{.*$", text, re.MULTILINE)  # a directive
    assert not re.findall(r"\{[\w:-]+\}`", text)  # a role
    assert not re.findall(r"\{\{.*\}\}", prose(path))  # a substitution
    assert (
        "$$" not in text
    )  # GitHub reads a backslash there as Markdown does; it takes blocks of `math`
    for line in re.sub(r"`[^`\n]*`", "", prose(path)).splitlines():
        assert line.count("$") % 2 == 0, line  # a formula is in one line
        assert not [x for x in line.split("$")[1::2] if re.search(r"\\[^a-zA-Z]", x)], line


@pytest.mark.parametrize("path", [*pages.ALL, *READ_ALONE], ids=lambda path: path.name)
def test_page_is_what_github_renders(path: Path) -> None:
    """Formulas begin and end where GitHub looks for it; HTML is what it lets through; tables are whole."""
    text = re.sub(r"`[^`\n]*`", "``", prose(path))
    assert not REFUSED.search(pages.text_of(path))
    assert set(re.findall(r"</?([a-zA-Z]\w*)\b[^<>]*>", text)) <= TAGS
    assert not re.findall(r"^\[[^\]]+\]: |\]\[|\[\^", text, re.MULTILINE)  # links are in place
    for line in text.splitlines():
        for before, formula, after in re.findall(r"(.?)\$([^$]*)\$(.?)", line):
            assert formula == formula.strip(), line
            assert not before.isalnum(), line
            assert not after.isalnum(), line
    for table in re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE):
        cells = {len(re.findall(r"(?<!\\)\|", row)) for row in table.splitlines()}
        assert len(cells) == 1, table


@pytest.mark.parametrize("path", pages.ALL, ids=pages.name_of)
def test_names_are_there(path: Path) -> None:
    """What a page calls `selfkd.something` can be imported; a toolkit's key may be called so, too."""
    keys = re.findall(r"^\| `(selfkd\.\w+)` \|", path.read_text(), re.MULTILINE)
    for name in re.findall(r"`(selfkd(?:\.[a-zA-Z_]\w*)+)`", prose(path)):
        if name in keys:
            continue
        found: Any = selfkd
        module = "selfkd"
        for part in name.split(".")[1:]:
            module = f"{module}.{part}"
            if not hasattr(found, part):
                importlib.import_module(module)
            found = getattr(found, part)


@pytest.mark.parametrize("path", pages.ALL, ids=pages.name_of)
def test_pieces_of_files(path: Path) -> None:
    """What a page shows of a file stands there, indented or not."""
    for file, piece in re.findall(
        r"<!-- from: (\S+) -->\n```\w+\n(.*?)^```$", path.read_text(), re.S | re.M
    ):
        lines = [re.escape(line) for line in piece.splitlines()]
        shown = r"^(?P<indent> *)" + "\n".join(
            [lines[0], *(f"(?P=indent){x}" if x else "" for x in lines[1:])]
        )
        assert re.search(shown, (ROOT / file).read_text(), re.MULTILINE), piece


@pytest.mark.parametrize("path", [*pages.ALL, *READ_ALONE], ids=lambda path: path.name)
def test_links(path: Path) -> None:
    """Files and headings are there; of what lies elsewhere only the form can be looked at."""
    text = re.sub(r"`[^`\n]*`", "", prose(path))
    assert len(LINK.findall(text)) == text.count("](")
    for link in [*LINK.findall(text), *SHOWN.findall(text)]:
        if link.startswith("data:"):  # a picture of a notebook
            continue
        if "://" in link:
            assert re.fullmatch(r"https://[\w.-]+\.\w+(/[\w.,~%+/#?=&:@-]*)?", link), link
            continue
        file, _, anchor = link.partition("#")
        to = (path.parent / file).resolve() if file else path
        assert to.exists(), link
        assert to.suffix != ".html", link
        assert to.is_relative_to(ROOT), link
        assert not anchor or anchor in anchors(to), link


@pytest.mark.parametrize("folder", ["operators", "nn", "notebooks", "."])
def test_index_links_to_every_page(folder: str) -> None:
    index = pages.DOCS / folder / "index.md"
    linked = {
        (index.parent / link.partition("#")[0]).resolve() for link in LINK.findall(prose(index))
    }
    there = {path for path in pages.ALL if path.parent == index.parent and path != index}
    missing = there - linked
    assert not missing
