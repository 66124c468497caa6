"""js_divergence: the cases every back end runs, and what the operator promises beside them."""

from __future__ import annotations

from functools import partial

import harness
from harness import Case, divided, weighted

OP = "js_divergence"
pair = partial(harness.pair, "student", "teacher")  # of logits, shape (N, C) or (N, C, ...)


def of(beta: float, a: float, b: float, **numbers: object) -> dict[str, object]:
    return {"beta": beta, "teacher_weight": a, "student_weight": b, **numbers}


KINDS = {
    "jensen_shannon": {},
    "beta_0.1": of(0.1, 0.1, 0.9),
    "beta_0.9": of(0.9, 0.9, 0.1),
    "forward_kl": of(0.0, 1.0, 0.0),
    "reverse_kl": of(1.0, 0.0, 1.0),
    "skewed_kl": of(0.1, 1.0, 0.0),
    "skewed_reverse_kl": of(0.1, 0.0, 1.0),
    "uneven": of(0.7, 2.0, 0.5),
    "tv": {"kind": "tv"},
}
CASES = [
    Case("one_class", pair(3, 1)),
    *[Case(f"{n}_classes", pair(5, n)) for n in (2, 15, 16, 17, 100)],
    *[Case(f"chunk_{n}", pair(3, n)) for n in (1000, 1024, 1025, 3000)],
    *[Case(name, pair(9, 50), numbers) for name, numbers in KINDS.items()],
    *[
        Case(f"{name}_1e-3_apart", pair(9, 100, apart=1e-3), numbers, close=True, exact=1e-9)
        for name, numbers in KINDS.items()
    ],
    *[
        Case(f"{name}_1e4_apart", pair(9, 100, shift=1e4), numbers, exact=1e-11)
        for name, numbers in KINDS.items()
    ],
    *[
        Case(f"{name}_far", pair(9, 100, scale=1e3), numbers, exact=1e-11)
        for name, numbers in KINDS.items()
    ],
    Case("cold", pair(9, 50), {"temperature": 0.5, "teacher_temperature": 0.5}, exact=1e-11),
    Case("hot", pair(9, 50), {"temperature": 20.0, "teacher_temperature": 20.0}),
    *[
        Case(f"{name}_two_temperatures", pair(9, 50), {**numbers, "temperature": 2.0})
        for name, numbers in KINDS.items()
    ],
    Case("weighted", weighted(pair(33, 100))),
    Case("masked", weighted(pair(33, 100), boolean=True)),
    Case("divisor", divided(weighted(pair(33, 10)))),
    Case("no_rows", pair(0, 10), {"reduction": "sum"}),
]
MAPS = [
    Case("voc", pair(2, 21, 16, 24), exact=1e-11),
    Case("voc_masked", weighted(pair(2, 21, 9, 13), boolean=True)),
    Case("few_positions", pair(3, 130, 7)),
    Case("uneven", pair(2, 30, 40), of(0.7, 2.0, 0.5)),
    Case("two_temperatures", pair(2, 30, 40), {"temperature": 2.0}),
    Case("tv", pair(2, 30, 40), {"kind": "tv"}),
    Case("rows_1e-3_apart", pair(1, 40, 3, 50, apart=1e-3), close=True, exact=1e-9),
    Case("no_positions", pair(2, 9, 0, 4), {"reduction": "sum"}),
]
globals().update(harness.standard_tests(OP, pair, CASES, maps=MAPS, excludes=True))
