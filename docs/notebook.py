"""Notebooks: as Markdown, which Sphinx builds and the tests run; and the pictures that are stored in them.

python docs/notebook.py docs/notebooks/*.ipynb    # runs them, in a minute, and stores their pictures
"""

from __future__ import annotations

import base64
import io
import json
import sys
from pathlib import Path
from typing import Any


def picture_of(cell: dict[str, Any]) -> str:
    """What a cell has drawn, in base64; "" of one that draws nothing."""
    found = [output["data"]["image/png"] for output in cell.get("outputs", [])]
    return found[0].strip() if found else ""


def markdown(text: str) -> str:
    """The cells of a notebook: text as it stands, code in blocks, pictures."""
    parts = []
    for cell in json.loads(text)["cells"]:
        source = "".join(cell["source"])
        parts.append(f"```python\n{source}\n```" if cell["cell_type"] == "code" else source)
        if picture_of(cell):
            parts.append(f"![What this draws](data:image/png;base64,{picture_of(cell)})")
    return "\n\n".join(parts) + "\n"


def draw(path: Path) -> None:
    """Run a notebook, and store the pictures that it shows."""
    from matplotlib import pyplot

    pyplot.switch_backend("agg")
    names: dict[str, Any] = {}
    notebook = json.loads(path.read_text())
    for cell in notebook["cells"]:
        if cell["cell_type"] != "code":
            continue
        cell["outputs"] = []
        pyplot.show = lambda *_: None
        exec("".join(cell["source"]), names)
        if pyplot.get_fignums():
            file = io.BytesIO()
            pyplot.savefig(file, dpi=70, bbox_inches="tight", metadata={"Software": None})
            data = {"image/png": base64.b64encode(file.getvalue()).decode()}
            output = {"data": data, "metadata": {}, "output_type": "display_data"}
            cell["outputs"].append(output)
            pyplot.close("all")
    path.write_text(json.dumps(notebook, indent=1, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    for name in sys.argv[1:]:
        draw(Path(name))
