"""`make new LOSS=name`: lays out the files of a new row loss, which works once its formula is written.

Each file of cmake/new_loss becomes one of the project, with the name in the place of @NAME@. The README's
table, the list of operators' pages and CHANGELOG.md get a line each.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

HERE = Path(__file__).parent / "new_loss"
ROOT = HERE.parent.parent
LINES = {  # file, what the line stands before or after, the line
    "README.md": ("", "\nEach function has a page:", "| WRITE: what it is | `selfkd.{name}` | |\n"),
    "docs/operators/index.md": (
        "",
        "\n## What they share",
        "- [{name}]({name}.md): WRITE what it is\n",
    ),
    "CHANGELOG.md": ("### Added\n\n", "", "- `{name}`: WRITE what it is, and its source.\n"),
}


def main(name: str) -> None:
    if not re.fullmatch(r"[a-z][a-z0-9]*(_[a-z0-9]+)*", name):
        sys.exit(
            f'new: LOSS is "{name}", expected words of a-z and 0-9 joined by "_": make new LOSS=my_loss'
        )
    targets = {
        path: ROOT / str(path.relative_to(HERE)).removesuffix(".in").replace("@NAME@", name)
        for path in sorted(HERE.rglob("*"))
        if path.is_file()
    }
    there = [str(path.relative_to(ROOT)) for path in targets.values() if path.exists()]
    if there:
        sys.exit(f"new: {there[0]} is there already")
    for template, path in targets.items():
        path.write_text(template.read_text().replace("@NAME@", name))
        print(path.relative_to(ROOT))
    for path, (after, before, line) in LINES.items():
        text = (ROOT / path).read_text()
        found = text.replace(after + before, after + line.format(name=name) + before, 1)
        (ROOT / path).write_text(found)
    print(f"{', '.join(LINES)} have a line each. Next: the places that say WRITE.")


if __name__ == "__main__":
    main(*sys.argv[1:])
