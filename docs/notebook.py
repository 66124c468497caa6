"""Notebooks as Markdown, which Sphinx builds and the tests run."""

from __future__ import annotations

import json


def markdown(text: str) -> str:
    """The cells of a notebook: text as it stands, code in blocks."""
    parts = []
    for cell in json.loads(text)["cells"]:
        source = "".join(cell["source"])
        parts.append(f"```python\n{source}\n```" if cell["cell_type"] == "code" else source)
    return "\n\n".join(parts) + "\n"
