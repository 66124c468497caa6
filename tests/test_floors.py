"""The house as CONTRIBUTING.md draws it: no file includes or imports a file above it, none in a circle."""

from __future__ import annotations

import ast
import fnmatch
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest
from conftest import ROOT

DRAWING = re.search(
    r"<!-- floors -->\n```\n(.*?)```", (ROOT / "CONTRIBUTING.md").read_text(), re.DOTALL
)
SOURCES = {".c", ".h", ".cpp", ".cu", ".cuh", ".py"}
GENERATED = {"selfkd_ops.h"}
MOST_LINES = 400
# Files that were longer when the rule came. The list only gets shorter.
LONGER = {
    "cuda/attention.cu",
    "tests/simt/simt.cpp",
    "tests/test_adversarial.py",
    "tests/test_aikd.py",
    "tests/test_arguments.py",
    "tests/test_bench.py",
    "tests/test_bifpn.py",
    "tests/test_bifpn_fuse.py",
    "tests/test_core.c",
    "tests/test_distill.py",
    "tests/test_distributed.py",
    "tests/test_frskd.py",
    "tests/test_integrations.py",
    "tests/test_library.py",
    "tests/test_losses.py",
    "tests/test_pytorch.py",
    "tests/test_sd_dropout_head.py",
    "tests/test_sd_dropout_module.py",
}


# ---- the drawing ----


@dataclass(frozen=True)
class Tower:
    """A folder's floors, from the top, each a list of patterns; and where it stands."""

    on: str
    floors: tuple[tuple[str, ...], ...]

    def floor(self, path: str) -> int:
        """The floor of a file: that of its own name, else of the longest pattern; -1: none."""
        found = [
            ("*" not in pattern, len(pattern), k)
            for k, patterns in enumerate(self.floors)
            for pattern in patterns
            if matches(path, pattern)
        ]
        return max(found)[2] if found else -1


def matches(path: str, pattern: str) -> bool:
    """`*` is within a folder; a pattern that ends with / is all that is in the folder."""
    if pattern.endswith("/"):
        return path.startswith(pattern)
    return path.count("/") == pattern.count("/") and fnmatch.fnmatchcase(path, pattern)


def read(drawing: str) -> dict[str, Tower]:
    """Each block is ``folder/ on another/`` and a line for each floor: patterns, two spaces, what it is."""
    towers = {}
    for block in drawing.strip().split("\n\n"):
        head, *lines = block.splitlines()
        folder, _, on = head.partition(" on ")
        floors = (re.split(r"\s{2,}", line.strip())[0].split() for line in lines)
        towers[folder] = Tower(on, tuple(map(tuple, floors)))
    return towers


def place(path: str, towers: Mapping[str, Tower]) -> tuple[str, int]:
    """The innermost tower that a file is in, and its floor."""
    folder = max((folder for folder in towers if path.startswith(folder)), key=len)
    return folder, towers[folder].floor(path.removeprefix(folder))


def is_allowed(path: str, other: str, towers: Mapping[str, Tower]) -> bool:
    """Whether a file may include or import another."""
    (tower, floor), (lower, found) = place(path, towers), place(other, towers)
    if tower == lower:
        return found >= floor
    on = towers[tower].on
    return on.startswith(lower) and (on == lower or found >= place(on, towers)[1])


def house() -> tuple[dict[str, Tower], list[str]]:
    """The towers, and every source file in them."""
    assert DRAWING, "CONTRIBUTING.md has no drawing after <!-- floors -->"
    towers = read(DRAWING[1])
    files = {path for folder in towers for path in (ROOT / folder).rglob("*")}
    return towers, sorted(map(named, filter(is_source, files)))


def is_source(path: Path) -> bool:
    return path.suffix in SOURCES and "__pycache__" not in path.parts


def named(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


# ---- what the files say ----


def includes(path: Path) -> Iterator[str]:
    """The files that a C or CUDA file includes with quotes, found as the compilers find them."""
    folders = [
        path.parent,
        ROOT,
        ROOT / "ops",
        *[ROOT / "cuda"] * path.is_relative_to(ROOT / "cuda"),
    ]
    for name in re.findall(r'^[ \t]*#[ \t]*include[ \t]+"(.+?)"', path.read_text(), re.MULTILINE):
        if name in GENERATED:
            continue
        found = [folder / name for folder in folders if (folder / name).is_file()]
        assert found, f"{path} includes {name}, which is nowhere"
        yield named(found[0].resolve())


def imports(path: Path) -> Iterator[str]:
    """The files of the package that a module imports, at its top or in a function."""
    for node in ast.walk(ast.parse(path.read_text())):
        if not isinstance(node, ast.ImportFrom) or node.level == 0:
            continue
        base = path.parents[node.level - 1].joinpath(*(node.module or "").split("."))
        for alias in node.names:
            for found in (base / alias.name, base):
                files = (found.with_suffix(".py"), found / "__init__.py")
                file = next((file for file in files if file.is_file()), None)
                if file:
                    break
            assert file, f"{path} imports {alias.name} from {base}, which is nowhere"
            yield named(file)


def arrows(path: str) -> set[str]:
    file = ROOT / path
    return set(imports(file) if file.suffix == ".py" else includes(file))


def unit(path: str) -> str:
    """A C file and the header that declares its functions are one."""
    return path if path.endswith(".py") else path.rpartition(".")[0]


def circle(graph: Mapping[str, set[str]]) -> list[str]:
    """Some circle of arrows, or nothing."""
    done: set[str] = set()

    def walk(node: str, trail: list[str]) -> list[str]:
        if node in trail:
            return [*trail[trail.index(node) :], node]
        if node in done:
            return []
        for other in sorted(graph.get(node, ())):
            if found := walk(other, [*trail, node]):
                return found
        done.add(node)
        return []

    return next(filter(None, (walk(node, []) for node in sorted(graph))), [])


# ---- tests ----


def test_every_file_is_on_a_floor_and_every_floor_has_a_file() -> None:
    towers, files = house()
    assert [path for path in files if place(path, towers)[1] < 0] == []
    empty = [
        folder + pattern
        for folder, tower in towers.items()
        for patterns in tower.floors
        for pattern in patterns
        if not any(
            place(path, towers)[0] == folder and matches(path.removeprefix(folder), pattern)
            for path in files
        )
    ]
    assert empty == [], "drawn, and not there"


def test_no_arrow_runs_up() -> None:
    towers, files = house()
    wrong = [
        f"{path} -> {other}"
        for path in files
        for other in sorted(arrows(path))
        if not is_allowed(path, other, towers)
    ]
    assert wrong == []


def test_nothing_goes_in_a_circle() -> None:
    graph: dict[str, set[str]] = {}
    for path in house()[1]:
        graph.setdefault(unit(path), set()).update(map(unit, arrows(path)))
        graph[unit(path)].discard(unit(path))
    assert " -> ".join(circle(graph)) == ""


@pytest.mark.parametrize("header", sorted(path.name for path in (ROOT / "ops/core").glob("*.h")))
def test_what_a_header_declares_is_in_the_file_of_its_name(header: str) -> None:
    """Then includes are calls: a file that calls up would include a header of a floor above."""
    path = ROOT / "ops/core" / header
    declared = re.findall(
        r"^[a-z][\w *]*?\b(sk_\w+)\([^;{}]*?\)[^;{}()]*(?:\(.*\))*;", path.read_text(), re.MULTILINE
    )
    if not declared:
        return
    code = path.with_suffix(".c").read_text()
    assert [
        name for name in declared if not re.search(rf"^[a-z][\w *]*\b{name}\(", code, re.MULTILINE)
    ] == []


def test_no_file_is_longer_than_a_reader_bears() -> None:
    longer = {
        named(path)
        for folder in ("ops", "cpu", "cuda", "bindings", "tests")
        for path in (ROOT / folder).rglob("*")
        if is_source(path) and len(path.read_text().splitlines()) > MOST_LINES
    }
    assert longer - LONGER == set(), f"more than {MOST_LINES} lines"
    assert LONGER - longer == set(), "no longer so long: take them off the list"


@pytest.mark.parametrize(
    ("graph", "expected"),
    [
        ({"a": {"b"}, "b": {"c"}, "c": set()}, []),
        ({"a": {"b"}, "b": {"c"}, "c": {"b"}}, ["b", "c", "b"]),
    ],
)
def test_a_circle_is_seen(graph: dict[str, set[str]], expected: list[str]) -> None:
    assert circle(graph) == expected


def test_an_arrow_up_or_aside_is_seen() -> None:
    towers = read(
        "a/ on b/z.h\n    x.c y.*   both\n    *.c\n\nb/\n    top.h\n    z.h\n\nc/ on b/\n    w.c"
    )
    floors = [place(path, towers)[1] for path in ("a/x.c", "a/other.c", "a/y.h", "a/z.h")]
    assert floors == [0, 1, 0, -1]
    down = [
        ("a/x.c", "a/other.c"),
        ("a/x.c", "a/y.h"),
        ("a/other.c", "b/z.h"),
        ("c/w.c", "b/top.h"),
    ]
    up = [("a/other.c", "a/x.c"), ("b/z.h", "a/x.c"), ("a/x.c", "b/top.h"), ("a/x.c", "c/w.c")]
    assert [is_allowed(*arrow, towers) for arrow in down + up] == [True] * 4 + [False] * 4
