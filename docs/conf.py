"""Sphinx: `make docs` builds these pages; the API reference comes from the docstrings."""

from __future__ import annotations

import importlib.util
import inspect
import pkgutil
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import selfkd

project = "selfkd"
author = "the selfkd authors"
release = selfkd.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.mathjax", "sphinx.ext.napoleon"]
myst_enable_extensions = ["dollarmath", "substitution"]
myst_heading_anchors = 3
html_theme = "furo"
html_title = f"selfkd {release}"
html_show_copyright = False
pygments_style = "tango"  # furo's own leaves added lines without a colour

autodoc_inherit_docstrings = False
autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
maximum_signature_line_length = 90
napoleon_google_docstring = False
napoleon_use_rtype = False

# Every name that is referred to must exist, but for those of other projects: their inventories would
# have to be downloaded.
nitpicky = True
nitpick_ignore_regex = [
    (r"py:.*", r"(torch|nn|np|ctypes|collections|typing)\..*"),
    (
        r"py:.*",
        r"(Tensor|Generator|ProcessGroup|Module|Linear|dtype|Any|Callable|Mapping|Sequence|CDLL)",
    ),
]


def public_modules() -> Iterator[str]:
    """What `selfkd` offers beside its functions, and the adapters, each of which is a module."""
    yield "selfkd"
    for name in selfkd.__all__:
        if inspect.ismodule(getattr(selfkd, name)):
            yield f"selfkd.{name}"
    if importlib.util.find_spec("selfkd.integrations"):
        adapters = importlib.import_module("selfkd.integrations")
        yield adapters.__name__
        names = (module.name for module in pkgutil.iter_modules(adapters.__path__))
        yield from (f"{adapters.__name__}.{name}" for name in names if not name.startswith("_"))


_BLOCK = "## {0}\n\n```{{eval-rst}}\n.. automodule:: {0}\n   :members:\n```\n"
myst_substitutions = {"modules": "\n".join(map(_BLOCK.format, public_modules()))}


def setup(app: Any) -> None:
    """Copy the pictures that pages show by HTML, which Sphinx does not read."""

    def copy(app: Any, error: Exception | None) -> None:
        images = Path(app.srcdir) / "images"
        if images.is_dir():
            shutil.copytree(images, Path(app.outdir) / "images", dirs_exist_ok=True)

    app.connect("build-finished", copy)
