"""bifpn_fuse: cases, and what only this operator promises. The checks are in harness.py."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

import harness
import pytest
import selfkd
import torch
import torch.nn.functional as F
from harness import Case

OP = "bifpn_fuse"
F32 = torch.float32
NAN, INF = float("nan"), float("inf")
Make = Callable[[torch.Generator], dict[str, torch.Tensor]]
Size = tuple[int, int]


def maps(
    n: int,
    c: int,
    *sizes: Size,
    weight: Sequence[float] | None = None,
    whole: bool = False,
) -> Make:
    """Maps of these sizes, the first that of the result; `whole`: small whole numbers, full of ties."""

    def make(generator: torch.Generator) -> dict[str, torch.Tensor]:
        draw = [
            torch.randn(n, c, *size, generator=generator, dtype=torch.float64) for size in sizes
        ]
        if whole:
            draw = [x.mul(1.5).round() for x in draw]
        tensors = dict(zip("abc", draw, strict=False))
        if weight is not None:
            tensors["weight"] = torch.tensor(weight, dtype=torch.float64)
        tensors["grad"] = torch.randn(n, c, *sizes[0], generator=generator, dtype=torch.float64)
        return tensors

    return make


def ways(b: str = "none", c: str = "none", **more: Any) -> dict[str, Any]:
    return {"resize_b": b, "resize_c": c, **more}


W2, W3 = (0.7, 1.9), (1.3, 0.4, 2.2)
SILU, NO = {"activation": "silu"}, {"activation": "none"}
LATE = {"activate": "output"}

CASES = [
    Case("two", maps(2, 3, (4, 5), (4, 5), weight=W2)),
    Case("plain_sum", maps(2, 3, (4, 5), (4, 5), (4, 5))),
    Case("top_down", maps(2, 3, (8, 6), (4, 3), weight=W2), ways("nearest")),
    Case("bottom_up", maps(2, 3, (4, 3), (4, 3), (8, 6), weight=W3), ways(c="maxpool")),
    Case("pooled_second", maps(2, 2, (4, 4), (8, 7), (2, 2)), ways("maxpool", "nearest")),
    Case("bilinear_up", maps(2, 3, (8, 6), (4, 3), weight=W2), ways("bilinear")),
    Case("three_halves", maps(1, 3, (9, 6), (6, 4), (6, 4), weight=W3), ways("bilinear", "nearest")),
    Case("down", maps(2, 3, (3, 4), (7, 9), (8, 10), weight=W3), ways("nearest", "bilinear")),
    Case("far_down", maps(1, 2, (2, 3), (40, 50), (41, 37), weight=W3), ways("bilinear", "nearest")),
    Case("far_up", maps(1, 2, (30, 41), (2, 3), (1, 1), weight=W3), ways("bilinear", "nearest")),
    Case("up_and_down", maps(1, 2, (3, 17), (9, 4), (5, 40)), ways("bilinear", "nearest", **NO)),
    Case("one_pixel", maps(3, 2, (1, 1), (1, 1), (2, 1), weight=W3), ways("maxpool", "bilinear")),
    Case("pooled_1x2", maps(1, 1, (1, 1), (2, 1), (1, 2), weight=W3), ways("maxpool", "maxpool")),
    Case("ties", maps(2, 3, (4, 4), (7, 8), (8, 7), whole=True), ways("maxpool", "maxpool", **NO)),
    Case("ties_relu", maps(2, 3, (5, 9), (9, 17), (10, 18), whole=True), ways("maxpool", "maxpool")),
    Case("silu", maps(2, 3, (4, 4), (2, 2), (7, 7), weight=W3), ways("bilinear", "maxpool", **SILU)),
    Case("silu_nearest", maps(2, 3, (4, 6), (2, 3), weight=W2), ways("nearest", **SILU)),
    Case("late_relu", maps(2, 3, (4, 6), (2, 3), (8, 11), weight=W3), ways("nearest", "maxpool", **LATE)),
    Case("late_silu", maps(2, 3, (5, 4), (3, 7), (9, 8), weight=W3), ways("bilinear", "maxpool", **SILU, **LATE)),
    Case("late_none", maps(2, 3, (5, 4), (3, 7), weight=W2), ways("bilinear", **NO, **LATE)),
    Case("negative_weight", maps(2, 3, (4, 4), (4, 4), (2, 2), weight=(0.5, -1, 2)), ways(c="nearest")),
    # Its one gradient is d eps / t^2, of which the textbook formula of the reference keeps few digits.
    Case("zero_weight", maps(2, 3, (4, 4), (4, 4), weight=(0, 2)), exact=1e-9),
    Case("large_eps", maps(2, 3, (4, 4), (4, 4), weight=W2), {"eps": 0.75}),
    Case("width_15", maps(1, 3, (3, 15), (3, 8), (6, 30), weight=W3), ways("nearest", "maxpool")),
    Case("width_16", maps(1, 3, (3, 16), (5, 7), (6, 31), weight=W3), ways("bilinear", "maxpool")),
    Case("width_17", maps(1, 3, (3, 17), (3, 9), (5, 33), weight=W3), ways("nearest", "maxpool")),
    Case("width_33", maps(1, 2, (5, 33), (9, 65), (3, 17), weight=W3), ways("maxpool", "bilinear")),
    Case("many_channels", maps(2, 37, (4, 4), (2, 2), (7, 7), weight=W3), ways("nearest", "maxpool")),
    Case("frskd", maps(2, 64, (16, 16), (8, 8), (32, 32), weight=(1, 1, 1)), ways("nearest", "maxpool"), big=True),
    Case("wide_channels", maps(1, 600, (3, 4), (2, 2), (6, 7), weight=W3), ways("bilinear", "maxpool"), big=True),
    Case("wide_rows", maps(1, 2, (3, 2500), (2, 1250), (5, 5000), weight=W3), ways("nearest", "maxpool"), big=True),
    Case("wide_bilinear", maps(1, 2, (3, 2500), (2, 3700), (4, 900), weight=W3), ways("bilinear", "bilinear"), big=True),
    Case("wide_late", maps(1, 2, (3, 2500), (2, 3), (5, 5000), weight=W3), ways("bilinear", "maxpool", **LATE), big=True),
    Case("very_far_up", maps(1, 2, (3, 5000), (2, 1), (1, 2), weight=W3), ways("nearest", "bilinear"), big=True),
    Case("very_far_down", maps(1, 2, (2, 3), (4, 5000), (3, 9000), weight=W3), ways("nearest", "bilinear"), big=True),
]  # fmt: skip


@pytest.mark.parametrize("backend", harness.backends(), ids=str)
@pytest.mark.parametrize("layout", harness.LAYOUTS)
@pytest.mark.parametrize("dtype", harness.DTYPES)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_cases(
    backend: harness.Backend, case: Case, dtype: str, layout: str, generator: torch.Generator
) -> None:
    harness.check_case(OP, case, backend, dtype, layout, generator)
