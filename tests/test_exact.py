"""exact.py: of two that differ, the one that errs is named."""

from __future__ import annotations

from typing import Any

import exact
import harness
import pytest
import torch

CASES = [("simreg", "1e-01_apart_1000"), ("sd_dropout_kl", "digits")]  # where both are right

pytestmark = harness.needs_torch_backend


def off(result: torch.Tensor, grads: dict[str, torch.Tensor]) -> Any:
    """The rows, but for one part in 10^9."""
    return result * (1 + 1.5e-9), grads


@pytest.mark.parametrize(("op", "name"), CASES)
@pytest.mark.parametrize("wrong", ["", "reference", "through_torch"])
def test_who_errs(op: str, name: str, wrong: str, monkeypatch: pytest.MonkeyPatch) -> None:
    (case,) = exact.cases(op, name)[:1]
    if wrong:
        right = getattr(harness, wrong)
        monkeypatch.setattr(harness, wrong, lambda *given: off(*right(*given)))
    reference, kernel = exact.measure(op, case, "float64", draws=2)
    expected = {
        "": "both are right",
        "reference": "the reference errs: exact=1e-08",
        "through_torch": "the kernel errs by 1.5e-09",
    }
    assert exact.advice(case, reference, kernel).startswith(expected[wrong])
    errors = {"reference": reference, "through_torch": kernel}
    assert all((x.rows > 1e-9) == (name == wrong) for name, x in errors.items())


def test_a_reference_that_cancels() -> None:
    """Of rows 1e-3 apart the textbook formula loses digits that the kernel keeps."""
    (case,) = exact.cases("sd_dropout_kl", "rows_1e-3_apart")[:1]
    reference, kernel = exact.measure("sd_dropout_kl", case, "float64")
    assert kernel.both < 1e-13 < 1e-12 < reference.both < case.exact


def test_sentences() -> None:
    with pytest.raises(SystemExit, match='exact: no case of "simreg" begins with "nothing"'):
        exact.main("simreg", "nothing")
    with pytest.raises(SystemExit, match=r"exact: .* no formula of bifpn_fuse in 80 bits"):
        exact.main("bifpn_fuse", "")
