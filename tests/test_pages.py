"""The documentation's pages: those of selfkd.nn run, all are plain Markdown, and no link is dead."""

from __future__ import annotations

import importlib
import inspect
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pages
import pytest
import selfkd
import torch
from conftest import ROOT

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


@pytest.mark.parametrize("path", pages.MODULES.values(), ids=pages.MODULES)
@pytest.mark.filterwarnings("ignore:.torch.jit.script:DeprecationWarning")
def test_page_of_modules_runs(path: Path) -> None:
    torch.manual_seed(0)
    pages.run(path)


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
