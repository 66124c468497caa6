"""Sphinx: `make docs` builds these pages; the API reference comes from the docstrings."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from collections.abc import Iterator

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
    (r"py:.*", r"(Tensor|Generator|Module|Linear|dtype|Any|Callable|Mapping|Sequence|CDLL)"),
]


def public_modules() -> Iterator[str]:
    """The modules that `selfkd` offers, packages first announced by their folder."""
    yield "selfkd"
    offered = {name for name in selfkd.__all__ if inspect.ismodule(getattr(selfkd, name))}
    offered |= {found.name for found in pkgutil.iter_modules(selfkd.__path__) if found.ispkg}
    for name in sorted(offered):
        module = importlib.import_module(f"selfkd.{name}")
        yield module.__name__
        if hasattr(module, "__path__") and not hasattr(module, "__all__"):
            yield from (
                f"{module.__name__}.{x.name}" for x in pkgutil.iter_modules(module.__path__)
            )


_BLOCK = "## {0}\n\n```{{eval-rst}}\n.. automodule:: {0}\n   :members:\n```\n"
myst_substitutions = {"modules": "\n".join(map(_BLOCK.format, public_modules()))}
