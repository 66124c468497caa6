"""Reads the documentation's pages, as GitHub shows them and as Sphinx builds them."""

from __future__ import annotations

import doctest
import importlib.util
import re
from pathlib import Path
from types import ModuleType
from typing import Any

from conftest import ROOT

DOCS = ROOT / "docs"
NOTEBOOKS = sorted(DOCS.glob("notebooks/*.ipynb"))
ALL = [*sorted(DOCS.glob("**/*.md")), *NOTEBOOKS]
OPERATORS = {path.stem: path for path in sorted((DOCS / "operators").glob("*.md"))}
MODULES = {path.stem: path for path in sorted((DOCS / "nn").glob("*.md"))}


def load(name: str) -> ModuleType:
    """A script of docs/ as a module."""
    spec = importlib.util.spec_from_file_location(name, DOCS / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


markdown = load("notebook").markdown


def name_of(path: Path) -> str:
    """A page by its place below docs/, without the suffix."""
    return str(path.relative_to(DOCS).with_suffix(""))


def text_of(path: Path) -> str:
    """A page; a notebook as Markdown."""
    text = path.read_text()
    return str(markdown(text)) if path.suffix == ".ipynb" else text


def blocks(path: Path) -> list[tuple[str, str]]:
    """Language and text of each fenced block of a page."""
    return re.findall(r"^```(\w+)\n(.*?)^```$", text_of(path), re.DOTALL | re.MULTILINE)


def run(path: Path) -> dict[str, Any]:
    """Run a page: its Python, and its dialogues, which must give what they show.

    A long sentence of an error may be broken into lines; `...` stands for anything.
    """
    names: dict[str, Any] = {"__name__": path.stem}
    runner = doctest.DocTestRunner(optionflags=doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS)
    wrong: list[str] = []
    for language, text in blocks(path):
        if language == "python":
            exec(text, names)
        elif language == "pycon":
            dialogue = doctest.DocTestParser().get_doctest(text, names, path.stem, str(path), 0)
            runner.run(dialogue, out=wrong.append, clear_globs=False)
            names = dialogue.globs
    assert not wrong, "".join(wrong)
    return names
