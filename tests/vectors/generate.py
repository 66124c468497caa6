"""Writes the vectors: ``python tests/vectors/generate.py``. README.md says how they are read."""

from __future__ import annotations

from math import prod
from pathlib import Path
from random import Random
from typing import Any

from formulas import FORMULAS
from mixture import mixtures, stored
from mpmath import mp, mpf
from rows import Tensor, draw, integers, near, of, probabilities

FOLDER = Path(__file__).parent
Case = dict[str, Any]
_MIXTURE: Case = {
    "beta": 0.5,
    "teacher_weight": 0.5,
    "student_weight": 0.5,
    "temperature": 1.0,
    "teacher_temperature": 1.0,
    "kind": "js",
}
NUMBERS: dict[str, Case] = {
    "sd_dropout_kl": {
        "temperature": 3.0,
        "forward_weight": 1.0,
        "reverse_weight": 1.0,
        "detach_target": 0,
        "needs_u": 1,
        "needs_v": 1,
        "reduction": "mean",
    },
    "simreg": {"normalize": 1, "reduction": "mean"},
    "js_divergence": {
        **_MIXTURE,
        "needs_student": 1,
        "needs_teacher": 1,
        "reduction": "mean",
    },
    "topk_divergence": {
        "tail": "bucket",
        **_MIXTURE,
        "reduction": "mean",
    },
    "distill": {
        "ce_weight": 1.0,
        "label_smoothing": 0.0,
        "ignore_index": -100,
        **{
            f"{k}{name}": value
            for k in ("", "second_")
            for name, value in (
                ("teacher_weight", 1.0),
                ("temperature", 4.0),
                ("teacher_temperature", 4.0),
                ("teacher_kind", "logits"),
            )
        },
        "mask_teachers": 0,
        "classes": 0,
        "reduction": "mean",
    },
    "adversarial": {"mode": "bce", "side": "discriminator", "reduction": "mean"},
    "attention": {"eps": 1e-12},
    "bifpn_fuse": {
        "resize_b": "none",
        "resize_c": "none",
        "activation": "relu",
        "activate": "inputs",
        "eps": 1e-6,
    },
    "dropout_views": {"p": 0.5, "first_row": 0},
    "sd_dropout_head_rows": {
        "temperature": 3.0,
        "kl_weight": 1.0,
        "forward_weight": 1.0,
        "reverse_weight": 1.0,
        "detach_target": 0,
        "label_smoothing": 0.0,
        "ignore_index": -100,
        "differentiate": 1,
    },
}
CHOICES = {
    "reduction": ("none", "mean", "sum"),
    "kind": ("js", "tv"),
    "tail": ("bucket", "renormalize", "drop"),
    "mode": ("bce", "hinge", "lsgan", "wgan"),
    "side": ("discriminator", "generator"),
    "teacher_kind": ("logits", "probs", "log_probs"),
    "second_teacher_kind": ("logits", "probs", "log_probs"),
    "resize_b": ("none", "nearest", "bilinear", "maxpool"),
    "resize_c": ("none", "nearest", "bilinear", "maxpool"),
    "activation": ("none", "relu", "silu"),
    "activate": ("inputs", "output"),
}
# What backward needs of forward: a letter is the size of a dimension, * all that follow C.
PASSED = {
    "sd_dropout_kl": {"saved": "4N*"},
    "simreg": {"saved": "3N*"},
    "js_divergence": {"saved": "4N*"},
    "topk_divergence": {"saved": "4N*"},
    "distill": {"levels": "4N*", "ratios": "2N*", "denominators": "2"},
    "adversarial": {"rows": "N", "fake_rows": "M"},
    "attention": {"maps": "2N*", "slopes": "2N"},
}
VALUES, GRADIENTS, CLOSE = "each 3e-6 1e-12", "row 1e-5 1e-12", "row 1e-4 1e-12"
BOUNDS = {"fused": "all 1e-5 1e-12", "views": "each 1e-6 1e-15"}


def pairs(g: Random) -> dict[str, Case]:
    """sd_dropout_kl: two sides of logits."""
    u, v, far = draw(g, 3, 7), draw(g, 3, 7), draw(g, 2, 19, spread=64)
    same = draw(g, 2, 5)
    shifted = Tensor(same.shape, [x + (8 if i < 5 else 0) for i, x in enumerate(same.values)])
    hole = draw(g, 3, 4)
    other = Tensor(hole.shape, list(hole.values))
    hole.values[1] = hole.values[6] = other.values[6] = mpf("-inf")
    other.values[8] += 1
    other.values[2] -= 2
    return {
        "ordinary rows": {"u": u, "v": v},
        "rows, weighted": {
            **{"u": draw(g, 2, 3, 2), "v": draw(g, 2, 3, 2), "weight": of([1.5, 0, 0.25, 2], 2, 2)},
            **{"reduction": "none", "grad": of([1, 0.5, -2, 0.125], 2, 2), "temperature": 1.0},
        },
        "a divisor, each side its weight": {
            **{"u": v, "v": u, "divisor": of([2.5]), "forward_weight": 0.75},
            **{"reverse_weight": 1.5, "grad": of([0.375])},
        },
        "the target detached": {"u": u, "v": v, "detach_target": 1, "reduction": "sum"},
        "close rows": {"u": u, "v": near(u, g, 2.0**-13), "close": True, "temperature": 1.0},
        "rows that are equal, or but for a constant": {"u": same, "v": shifted},
        "large logits": {"u": far, "v": draw(g, 2, 19, spread=64), "temperature": 2.0},
        "rows far from each other": {"u": near(far, g, 20), "v": draw(g, 2, 19, spread=512)},
        "classes at -inf on both sides": {"u": other, "v": near(other, g, 0.25)},
        "a class at -inf on the left side alone": {
            "u": hole,
            "v": other,
            "forward_weight": 1.0,
            "reverse_weight": 0.0,
        },
        "a row of one class": {"u": draw(g, 2, 1), "v": draw(g, 2, 1)},
    }


def features(g: Random) -> dict[str, Case]:
    """simreg."""
    x, t = draw(g, 3, 6), draw(g, 3, 6)
    x.set_row(2, 0, [mpf(0)] * 6)
    y = draw(g, 2, 8)
    return {
        "ordinary rows and one of zeros": {"student": x, "target": t},
        "as they are": {"student": x, "target": t, "normalize": 0, "reduction": "sum"},
        "weighted positions": {
            **{"student": draw(g, 2, 3, 2), "target": draw(g, 2, 3, 2)},
            **{"weight": of([0, 1.5, 1, 0.5], 2, 2), "grad": of([2.5])},
        },
        "close rows": {"student": y, "target": near(y, g, 2.0**-12), "close": True},
        "equal rows": {"student": y, "target": y, "reduction": "none", "grad": of([1, 3])},
    }


def students(g: Random) -> dict[str, Case]:
    """distill."""
    z, target = draw(g, 3, 7), integers(2, -100, 6)
    sure = draw(g, 2, 5)
    sure.set_row(0, 0, [mpf(x) for x in (40, 0, 1, 2, 3)])
    return {
        "a target": {"logits": z, "target": target},
        "a sure row": {"logits": sure, "target": integers(0, 3), "grad": of([0.5])},
        "label smoothing, weighted": {
            **{"logits": z, "target": target, "label_smoothing": 0.125},
            **{"weight": of([0.5, 2, 1.5]), "reduction": "none", "grad": of([1, 2, -0.5])},
        },
        "a teacher": {"logits": z, "teacher": draw(g, 3, 7)},
        "a target and a teacher": {
            **{"logits": z, "teacher": draw(g, 3, 7), "target": target, "mask_teachers": 1},
            **{"teacher_temperature": 2.0, "ce_weight": 0.25, "teacher_weight": 0.75},
        },
        "two teachers, one of probabilities": {
            **{"logits": z, "teacher": draw(g, 3, 7), "second_teacher": probabilities(g, 3, 7)},
            **{"second_teacher_kind": "probs", "second_temperature": 1.0, "divisor": of([4.0])},
            **{"second_teacher_temperature": 1.0, "target": integers(0, 1, 2)},
        },
        "a teacher that agrees": {"logits": z, "teacher": z},
    }


def scores(g: Random) -> dict[str, Case]:
    """adversarial."""
    found = {}
    for mode in CHOICES["mode"]:
        real, fake = draw(g, 5), draw(g, 4)
        found[f"{mode}, discriminator"] = {"mode": mode, "real": real, "fake": fake}
        found[f"{mode}, generator"] = {
            **{"mode": mode, "side": "generator", "real": real, "fake": of([]), "grad": of([2.5])},
        }
    both = {
        "real": of([-200, -1, 0.5, 30, 1]),
        "fake": of([30, -1, 2, -200, 0.0]),
        "reduction": "none",
    }
    grad = of([1, 2, -1, 0.5, 0.25])
    return found | {f"{m}, none": {"mode": m, **both, "grad": grad} for m in ("bce", "hinge")}


def maps(g: Random) -> dict[str, Case]:
    """attention."""
    zero = draw(g, 2, 2, 3)
    zero.values[:6] = [mpf(0)] * 6
    return {
        "maps of 2 x 3": {"student": draw(g, 2, 3, 2, 3), "teacher": draw(g, 2, 4, 2, 3)},
        "a student of zeros": {"student": zero, "teacher": draw(g, 2, 2, 3), "grad": of([3.0])},
        "a map shorter than eps": {
            "student": draw(g, 1, 2, 3),
            "teacher": draw(g, 1, 2, 3),
            "eps": 1024.0,
        },
    }


def pyramids(g: Random) -> dict[str, Case]:
    """bifpn_fuse; no two values are equal that a maximum is taken of."""

    def distinct(*shape: int) -> Tensor:
        order = list(range(prod(shape)))
        g.shuffle(order)
        return Tensor(shape, [mpf(k - len(order) // 2) / 8 + mpf(1) / 16 for k in order])

    a = draw(g, 1, 2, 4, 4)
    found: dict[str, Case] = {}
    for way, size in (
        ("nearest", (2, 2)),
        ("nearest", (3, 5)),
        ("bilinear", (3, 5)),
        ("maxpool", (7, 8)),
    ):
        for activate in ("inputs", "output"):
            found[f"{way} from {size[0]} x {size[1]}, {activate}"] = {
                **{"a": a, "b": distinct(1, 2, *size), "weight": of([0.75, 1.5]), "resize_b": way},
                **{"activation": "silu", "activate": activate, "grad": draw(g, 1, 2, 4, 4)},
            }
    b, c = draw(g, 1, 2, 2, 2), draw(g, 1, 2, 4, 4)
    three = {"a": a, "b": b, "c": c, "resize_b": "nearest", "grad": draw(g, 1, 2, 4, 4)}
    weight = of([0.5, -1, 2])
    return found | {
        "three maps, a weight that is negative": {**three, "weight": weight},
        "three maps without weights": {**three, "activation": "none"},
    }


def views(g: Random) -> dict[str, Case]:
    """dropout_views."""
    x = draw(g, 3, 7)
    return {
        f"p = {p}, seed {seed}, row {row}": {
            **{"features": x, "seed": integers(seed), "p": p, "first_row": row},
            "grad": draw(g, 3, 3, 7),
        }
        for p, seed, row in ((0.5, 42, 0), (0.1, -1, 5), (0.75, 2**40 + 3, 2**33))
    }


def chunks(g: Random) -> dict[str, Case]:
    """sd_dropout_head_rows."""
    x = {name: draw(g, 3, 7) for name in "zuv"} | {"target": integers(4, 0, -100)}
    return {
        "gradients over the logits": x,
        "weighted, smooth": {
            **{**x, "weight": of([-0.5, 1.5, 1]), "label_smoothing": 0.125, "kl_weight": 0.5},
            **{"temperature": 1.5, "forward_weight": 0.25, "detach_target": 1},
        },
        "rows alone": {**x, "differentiate": 0},
    }


CASES = {
    "sd_dropout_kl": pairs,
    "simreg": features,
    "js_divergence": mixtures,
    "topk_divergence": stored,
    "distill": students,
    "adversarial": scores,
    "attention": maps,
    "bifpn_fuse": pyramids,
    "dropout_views": views,
    "sd_dropout_head_rows": chunks,
}


def text_of(x: Any) -> str:
    """A number as C and Python read it; 0x1.8p+1 is 3. Correctly rounded to float64."""
    if isinstance(x, int):
        return str(x)
    if mp.isinf(x):
        return str(float(x))
    mantissa, _, exponent = float(x).hex().partition("p")
    return mantissa.rstrip("0").rstrip(".") + "p" + exponent if "." in mantissa else float(x).hex()


def lines_of(kind: str, name: str, x: Tensor, bound: str = "") -> list[str]:
    """A tensor, a line for each run along its last dimension."""
    sizes = ",".join(map(str, x.shape))
    length = x.shape[-1] if x.shape and x.shape[-1] else 1
    runs = [x.values[i : i + length] for i in range(0, len(x.values), length)]
    head = " ".join(filter(None, (kind, name, f"[{sizes}]", bound)))
    return [head, *("    " + " ".join(map(text_of, run)) for run in runs)]


def case_lines(op: str, name: str, case: Case) -> list[str]:
    """The text of a case: numbers, inputs, what forward gives backward, and results."""
    case = dict(case)
    close = case.pop("close", False)
    x = NUMBERS[op] | case
    backward = op != "sd_dropout_head_rows"
    for key in ("divisor", "seed"):
        if key in x:
            x[key] = Tensor((), x[key].values)
    if (
        backward
        and len(x.setdefault("grad", of([1.0])).values) == 1
        and x.get("reduction") != "none"
    ):
        x["grad"] = Tensor((), x["grad"].values)
    lines = ["", f"case {name}", f"operator {op}"]
    for key in NUMBERS[op]:
        value = x[key]
        number = CHOICES[key].index(value) if isinstance(value, str) else value
        lines.append(f"number {key} {text_of(number if isinstance(number, int) else mpf(number))}")
    for key, value in case.items():
        if isinstance(value, Tensor) and key != "grad":
            lines += lines_of("input", key, x[key])
    if backward:
        lines += lines_of("input", "grad", x["grad"])
    found = FORMULAS[op](x)
    first = next(y for y in case.values() if isinstance(y, Tensor))
    sizes = {"N": first.shape[:1], "M": x["fake"].shape if op == "adversarial" else ()}
    sizes["*"] = first.shape[2:]
    for key, shape in PASSED.get(op, {}).items():
        if key not in found:
            dims = [
                d
                for letter in shape
                for d in sizes.get(letter, (int(letter),) if letter.isdigit() else ())
            ]
            lines.append(f"passed {key} [{','.join(map(str, dims))}]")
    for key, value in found.items():
        gradient = key.startswith("grad_") or (op == "sd_dropout_head_rows" and key != "rows")
        bound = (CLOSE if close else GRADIENTS) if gradient else BOUNDS.get(key, VALUES)
        if gradient and (op in ("bifpn_fuse", "attention") or len(value.shape) < 2):
            bound = bound.replace("row", "all")
        lines += lines_of("output", key, value, bound)
    return [*lines, "end"]


def file_text(op: str) -> str:
    """The text of an operator's file."""
    lines = [f"# Written by generate.py. README.md describes the format, ops/{op}.h the arguments."]
    for name, case in CASES[op](Random(op)).items():
        lines += case_lines(op, name, case)
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    for op in CASES:
        (FOLDER / f"{op}.txt").write_text(file_text(op))
