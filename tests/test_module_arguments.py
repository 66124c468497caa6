"""What the constructors of SD-Dropout's, AI-KD's and SimReg's modules, and the ramps, are given wrongly."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import harness
import numpy as np
import pytest
import torch
from selfkd import nn

pytestmark = pytest.mark.skipif(
    bool(harness.SIMT_LIBRARY), reason="the emulator has no PyTorch binding"
)
THINGS: dict[str, Any] = {
    "None": None,
    "a list": [[]],
    "a name": "x",
    "a dict": {},
    "an array": np.ones(3),
    "True": True,
    "a fraction": 2.5,
    "less than 0": -1,
    "nan": math.nan,
    "a module": torch.nn.Linear(2, 2),
    "a tensor": torch.ones(2),
    "a parameter": torch.nn.Parameter(torch.tensor(2.0)),
    "a dtype": torch.int64,
}
Make = Callable[..., Any]
ARGUMENTS: dict[str, tuple[Make, dict[str, set[str]]]] = {  # and the things that each one may be
    "Discriminator": (
        lambda **named: nn.Discriminator(**{"num_classes": 5, **named}),
        {
            "num_classes": set(),
            "hidden": set(),
            "activation": {"a module"},
            "normalization": {"None", "a module"},
            "temperature": {"a fraction"},
        },
    ),
    "PreviousEpoch": (
        lambda **named: nn.PreviousEpoch(**{"num_samples": 9, "num_classes": 5, **named}),
        {"num_samples": set(), "num_classes": set(), "dtype": set(), "rewrite": {"True"}},
    ),
    "AIKDLoss": (
        lambda **named: nn.AIKDLoss(**{"discriminator": nn.Discriminator(5), **named}),
        {"discriminator": {"a module"}},
    ),
    "SDDropout": (
        lambda **named: nn.SDDropout(**{"head": torch.nn.Linear(4, 3), **named}),
        {"head": {"a module"}, "p": set()},
    ),
    "SimRegHead": (
        lambda **named: nn.SimRegHead(**{"in_features": 5, "out_features": 6, **named}),
        {"in_features": set(), "out_features": set(), "layers": set()},
    ),
    "sigmoid_rampup": (
        lambda **named: nn.sigmoid_rampup(**{"epoch": 1, "length": 4, **named}),
        {x: {"a fraction", "less than 0", "nan"} for x in ("epoch", "length")},
    ),
    "frskd_rampup": (
        lambda **named: nn.frskd_rampup(**{"epoch": 50, **named}),
        {x: {"a fraction", "less than 0", "nan"} for x in ("epoch", "warmup", "epochs")},
    ),
}
CASES = [
    (of, name, thing)
    for of, (_, names) in ARGUMENTS.items()
    for name, accepted in names.items()
    for thing in THINGS
    if thing not in accepted
]


@pytest.mark.parametrize(("of", "name", "thing"), CASES)
def test_a_sentence_names_the_argument(of: str, name: str, thing: str) -> None:
    sentence = rf"^{of}: {name}(\[0\])? (is|has|requires) .*expected "
    value = {} if (name, thing) == ("hidden", "a dict") else THINGS[thing]
    with pytest.raises((TypeError, ValueError), match=sentence):
        ARGUMENTS[of][0](**{name: value})


@pytest.mark.parametrize("value", [np.int64(4), torch.tensor(4)], ids=["NumPy", "PyTorch"])
def test_numbers_of_numpy_and_tensors(value: Any) -> None:
    for made in (
        nn.Discriminator(value, hidden=[value], temperature=value),
        nn.PreviousEpoch(value, value),
        nn.SimRegHead(value, value, layers=value),
    ):
        assert made is not None
    assert nn.sigmoid_rampup(value / 2, value) == nn.sigmoid_rampup(2, 4)
    assert type(nn.frskd_rampup(value * 12)) is float
    assert len(nn.PreviousEpoch(value, value).current) == 4


# ---- SimReg's modules ----


def test_a_head_of_one_row_without_batch_statistics() -> None:
    """Frozen or replaced normalisation needs no second row."""
    frozen, replaced = nn.SimRegHead(5, 6), nn.SimRegHead(5, 6)
    for k, layer in enumerate(frozen):
        if isinstance(layer, torch.nn.BatchNorm1d):
            layer.eval()
            replaced[k] = torch.nn.LayerNorm(layer.num_features)
    x = torch.randn(1, 5)
    assert frozen.training
    assert frozen(x).shape == replaced(x).shape == (1, 6)
    with pytest.raises(ValueError, match=r"SimRegHead: x has 1 row.*drop_last=True"):
        nn.SimRegHead(5, 6)(x)


@pytest.mark.parametrize("shape", [(), (5,), (4, 3, 5), (4, 5, 1, 1), (4, 6)], ids=str)
def test_features_that_do_not_fit(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"^SimRegHead: x has shape \(.*\), expected \(N, 5\)"):
        nn.SimRegHead(5, 6)(torch.ones(shape))


def test_a_linear_head_takes_any_positions() -> None:
    assert nn.SimRegHead(5, 6, layers=1)(torch.ones(4, 3, 5)).shape == (4, 3, 6)


def test_rows_of_several_teachers() -> None:
    x, y = torch.randn(4, 5), torch.randn(2, 5)
    sentence = r"SimRegLoss: losses have shapes \[\(4,\), \(2,\)\], expected one"
    with pytest.raises(ValueError, match=sentence):
        nn.SimRegLoss(reduction="none")([x, y], [x + 1, y + 1])
    assert nn.SimRegLoss()([x, y], [x + 1, y + 1]).ndim == 0
