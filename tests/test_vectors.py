"""tests/vectors: their formulas give them again, and the library meets them from NumPy.

tests/test_vectors.c does the same from C.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import selfkd
from selfkd.contract import contract

FOLDER = Path(__file__).parent / "vectors"
FILES = sorted(FOLDER.glob("*.txt"))


def cases(file: Path) -> Iterator[list[list[str]]]:
    """The lines of each case, in words; the numbers of a tensor follow its line's."""
    case: list[list[str]] = []
    for line in file.read_text().splitlines():
        words = line.split()
        if not words or words[0] == "#":
            continue
        if line.startswith(" "):
            case[-1] += words
        elif words == ["end"]:
            yield case
            case = []
        else:
            case.append(words)


def shape_of(word: str) -> tuple[int, ...]:
    return tuple(int(size) for size in word[1:-1].split(",") if size)


def element_type(rule: str, dtype: type) -> type:
    return {"INDEX": np.int64, "CLASSES": np.int64, "SEED": np.int64, "F64": np.float64}.get(
        rule, dtype
    )


def number_of(word: str) -> float:
    return float.fromhex(word)


def errors(found: Any, exact: Any, kind: str) -> Any:
    """Relative to each number, to the largest of its row, or to the largest of all."""
    off = np.abs(found.astype(np.float64) - exact)
    if kind == "each":
        scale = np.abs(exact)
    else:
        scale = np.abs(exact).max(axis=1 if kind == "row" else None, keepdims=True, initial=0)
    return np.divide(off, scale, out=np.where(off == 0, 0.0, np.inf), where=scale > 0)


def check(case: list[list[str]], dtype: type) -> None:
    head, (_, op), *lines = case
    numbers, tensors, outputs, exact = {}, {}, {}, {}
    rules = {i.name: i.rule for name in both(op) for i in contract(name).items}
    for kind, name, *words in lines:
        if kind == "number":
            numbers[name] = int(words[0]) if "x" not in words[0] else number_of(words[0])
            continue
        shape = shape_of(words[0])
        of = element_type(rules[name], dtype)
        if kind == "input":
            values = [number_of(word) if of == dtype else int(word) for word in words[1:]]
            tensors[name] = np.array(values, of).reshape(shape)
            continue
        outputs[name] = tensors.get(name, np.full(shape, np.nan, of))
        if kind == "output":
            values = [number_of(word) for word in words[4:]]
            exact[name] = (words[1], *map(float, words[2:4]), np.array(values).reshape(shape))
    for name in both(op):
        of_call = {**numbers, **tensors, **outputs}
        items = {item.name for item in contract(name).items}
        for item in contract(name).outputs:
            if item.name not in outputs and not selfkd.contract.is_absent(item, of_call):
                shape = selfkd.contract.output_shape(
                    item, selfkd.contract.check(contract(name), of_call)
                )
                outputs[item.name] = np.full(shape, np.nan, element_type(item.rule, dtype))
                of_call[item.name] = outputs[item.name]
        given = {key: x for key, x in of_call.items() if key in items}
        selfkd.library.check(selfkd.c.run(selfkd.library.library(), name, given))
    for name, (kind, single, double, values) in exact.items():
        bound = double if dtype == np.float64 else single
        worst = errors(outputs[name], values, kind).max(initial=0)
        assert worst <= bound, f"{' '.join(head)}: {name} is off by {worst:.2e}"


def both(op: str) -> list[str]:
    return [name for name in (op, f"{op}_backward") if name in selfkd.contract.operators()]


@pytest.mark.parametrize("dtype", [np.float32, np.float64], ids=["float32", "float64"])
@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_library_meets_the_vectors(file: Path, dtype: type) -> None:
    found = list(cases(file))
    assert found
    for case in found:
        check(case, dtype)


def test_formulas_give_the_vectors_again() -> None:
    pytest.importorskip("mpmath", reason="install mpmath")
    script = (
        "import generate\n"
        "for op in generate.CASES:\n"
        "    assert generate.file_text(op) == (generate.FOLDER / f'{op}.txt').read_text(), op\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=FOLDER, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


def test_vectors_are_of_operators() -> None:
    """An operator gets its own once its formula is settled: it runs without."""
    forward = {name for name in selfkd.contract.operators() if not name.endswith("_backward")}
    assert {file.stem for file in FILES} <= forward
