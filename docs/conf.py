"""Sphinx: `make docs` builds these pages; the API reference comes from the docstrings.

The pages are plain Markdown, which GitHub shows as well. What Sphinx alone can do is added here.
"""

from __future__ import annotations

import importlib.util
import inspect
import pkgutil
import re
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import selfkd
from docutils import nodes
from latex2mathml import converter
from sphinx.application import Sphinx
from sphinx.util.nodes import make_refnode

sys.path.insert(0, str(Path(__file__).parent))
from notebook import markdown

project = "selfkd"
author = "the selfkd authors"
release = selfkd.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
source_suffix = {".md": "markdown", ".ipynb": "markdown"}
myst_enable_extensions = ["dollarmath"]
myst_fence_as_directive = ["math"]
myst_heading_anchors = 3
html_math_renderer = "mathml"
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


_MODULE = "## {0}\n\n```{{eval-rst}}\n.. automodule:: {0}\n   :members:\n```\n"
_PARTS = "```{eval-rst}\n.. autoclass:: selfkd.distill.DistillParts\n```\n"
_TREE = "```{{toctree}}\n:glob:\n:hidden:\n\n{}\n```\n"
ADDED = {
    "api": "\n".join([*map(_MODULE.format, public_modules()), _PARTS]),
    "index": _TREE.format("choosing\nlosses\noperators/index\nnn/index\nnotebooks/index\n*"),
    "operators/index": _TREE.format("*"),
    "nn/index": _TREE.format("*"),
    "notebooks/index": _TREE.format("*"),
}
# A line that is a link to a file of the project, as "[ops/simreg.h](../../ops/simreg.h)".
_FILE = re.compile(r"^\[(\w+/[\w/.]+)\]\(((?:\.\./)+\1)\)$", re.MULTILINE)
_LISTING = "```{{literalinclude}} {}\n:language: {}\n```"
_LANGUAGES = {"h": "c", "c": "c", "py": "python"}


def add_to_page(app: Sphinx, page: str, source: list[str]) -> None:
    """What GitHub would show as it stands: tables of contents, the API, files in full."""

    def listing(link: re.Match[str]) -> str:
        return _LISTING.format(link[2], _LANGUAGES[link[1].rpartition(".")[2]])

    if app.env.doc2path(page).suffix == ".ipynb":
        source[0] = markdown(source[0])
    source[0] = _FILE.sub(listing, source[0]) + "\n" + ADDED.get(page, "")


def link_names(app: Sphinx, doctree: nodes.document, page: str) -> None:
    """Make a link of each public name that stands in code, such as `selfkd.distill`."""
    known = app.env.domains["py"].objects
    for name in list(doctree.findall(nodes.literal)):
        found = known.get(name.astext())
        if found and not isinstance(name.parent, nodes.reference):
            to = (found.docname, found.node_id)
            name.replace_self(make_refnode(app.builder, page, *to, name.deepcopy()))


def write_math(display: str) -> Any:
    """Formulas as MathML, which browsers show without a script."""

    def write(translator: Any, node: nodes.Element) -> None:
        formula = converter.convert(node.astext(), display=display)
        if display == "block":  # one that is wider than the page scrolls
            formula = (
                f'<div style="margin: 1em 0; padding: 0.3em 0; overflow: auto">{formula}</div>'
            )
        translator.body.append(formula)
        raise nodes.SkipNode

    return write


def copy_pictures(app: Sphinx, error: Exception | None) -> None:
    """Copy those that pages show by HTML, which Sphinx does not read."""
    images = Path(app.srcdir) / "images"
    if images.is_dir():
        shutil.copytree(images, Path(app.outdir) / "images", dirs_exist_ok=True)


def setup(app: Sphinx) -> None:
    app.connect("build-finished", copy_pictures)
    app.connect("source-read", add_to_page)
    app.connect("doctree-resolved", link_names)
    inline, block = write_math("inline"), write_math("block")
    app.add_html_math_renderer("mathml", (inline, None), (block, None))
