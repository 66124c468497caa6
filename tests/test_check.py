"""`selfkd check`: it passes here, in every environment, and sees what is wrong."""

from __future__ import annotations

import functools
import os
import subprocess
import sys
from typing import Any

import harness
import pytest
import selfkd
import torch
from selfkd import check, check_torch, cli, contract, library
from test_library import WITHOUT_TORCH

pytestmark = pytest.mark.skipif(
    bool(harness.SIMT_LIBRARY), reason="the emulator has no PyTorch binding"
)


def test_check(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    best = library.text("selfkd_isa")
    assert cli.main(["check"]) == 0
    out = capsys.readouterr().out
    assert library.text("selfkd_isa") == best
    for name in contract.modules():
        assert any(line.startswith(name) and " ok " in line for line in out.splitlines()), name
    right = selfkd.reference.simreg

    @functools.wraps(right)
    def wrong(*tensors: torch.Tensor, **options: Any) -> torch.Tensor:
        return 1.0001 * right(*tensors, **options)

    monkeypatch.setattr(selfkd.reference, "simreg", wrong)
    monkeypatch.setattr(check_torch, "modules", lambda: ("adversarial", "simreg"))
    assert cli.main(["check"]) == 1
    first, second, *_ = capsys.readouterr().out.splitlines()
    assert (first.split()[0], " ok " in first) == ("adversarial", True)
    assert (second.split()[0], " WRONG " in second) == ("simreg", True)


@pytest.mark.parametrize(
    ("part", "broken", "says"),
    [
        ("gradients", "_alias", "Inference tensors cannot be saved"),
        ("arguments", "without_gradient", "asks for a gradient and gets none without a word"),
    ],
)
def test_check_sees_what_scripts_hand_over(
    part: str, broken: str, says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert check_torch.check_operator("simreg", "cpu", check.variants()).is_right
    monkeypatch.setattr(getattr(selfkd, part), broken, lambda *x, **named: x[0])
    monkeypatch.setattr(check_torch, "modules", lambda: ("simreg",))
    (line,) = check_torch.with_torch()
    assert says in line.failure
    assert not line.is_right


def test_check_without_torch_and_numpy() -> None:
    blocked = WITHOUT_TORCH.replace('== "torch"', 'in ("torch", "numpy")')
    code = f'import sys\n{blocked}\nfrom selfkd.cli import main\nsys.exit(main(["check"]))'
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=600, env=os.environ
    )
    assert done.returncode == 0, done.stdout + done.stderr
    for name in contract.operators():
        if not name.endswith("_backward"):
            assert f"\n{name} " in done.stdout
    assert done.stdout.endswith("all is right\n")


@pytest.mark.parametrize(
    ("kind", "what"),
    [("formula", "_simreg"), ("gradient", "differences"), ("float32", "forward")],
)
def test_check_without_torch_sees_errors(
    kind: str, what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = check.check_operator("simreg", check.variants())
    assert right.is_right
    if kind == "formula":
        formula = check.FORMULAS["simreg"]
        monkeypatch.setitem(check.FORMULAS, "simreg", lambda *x: 1.0001 * formula(*x))
    elif kind == "gradient":
        differences = check.differences
        monkeypatch.setattr(check, "differences", lambda *x: [1.0001 * y for y in differences(*x)])
    else:
        forward = check.forward
        monkeypatch.setattr(
            check,
            "forward",
            lambda op, given, dtype: [
                (1.0001 if dtype == "float32" else 1) * x for x in forward(op, given, dtype)
            ],
        )
    wrong = check.check_operator("simreg", check.variants())
    assert not wrong.is_right
    assert [k for k, x in wrong.errors.items() if x > wrong.allowed[k]] == [kind]
    assert "WRONG" in str(wrong)
