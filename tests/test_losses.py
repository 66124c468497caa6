"""docs/losses.md: its calls, read from its tables, beside the published formulas in plain PyTorch."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import harness
import pytest
import selfkd
import torch
import torch.nn.functional as F
from conftest import ROOT
from torch import Tensor

pytestmark = pytest.mark.skipif(
    bool(harness.SIMT_LIBRARY), reason="of PyTorch's functions: run without SELFKD_SIMT_LIBRARY"
)
N, C, D, H, W = 8, 10, 6, 3, 4


def drawn() -> dict[str, Any]:
    """The names that the page uses, in float64."""
    g = torch.Generator().manual_seed(20221111)

    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=g, dtype=torch.float64)

    z, t, u, v = (3 * randn(N, C) for _ in range(4))
    names: dict[str, Any] = {"z": z, "t": t, "u": u, "v": v, "x": randn(N, D), "h": randn(N, D)}
    names |= {"s": randn(N, C, H, W), "f": randn(N, C, H, W), "Q": randn(7, D)}
    names |= {"y": torch.randint(C, (N,), generator=g), "d": virtual(z, torch.arange(N) % C)}
    names |= {"P": randn(N, C).softmax(1), "P0": randn(N, C).softmax(1)}
    names |= {"P1": randn(N, C).softmax(1), "previous": randn(N, C).softmax(1), "pretrained": t}
    for name in "zuvxs":
        names[name].requires_grad_()
    numbers = {"a": 0.3, "m": 50.0, "lam": 3.0, "alpha": 0.7, "w": 0.2, "T": 2.5, "tau": 0.4}
    numbers |= {"eps": 0.1, "N": N, "C": C, "D": D, "H": H, "W": W}
    functions = {op: getattr(selfkd, op) for op in selfkd.contract.modules()}
    return names | numbers | functions | {"nn": selfkd.nn, "standardised": standardised}


def virtual(z: Tensor, y: Tensor) -> Tensor:
    """Tf-KD's teacher: 0.99 for the class, the rest for the others."""
    return torch.where(F.one_hot(y, C) == 1, 0.99, 0.01 / (C - 1)).to(z)


def standardised(x: Tensor) -> Tensor:
    """Mean 0, deviation 1 in each row, as arXiv 2403.01427 has it."""
    return (x - x.mean(1, keepdim=True)) / (1e-7 + x.std(1, keepdim=True))


# ---- the published formulas ----


def kl(q: Tensor, p: Tensor) -> Tensor:
    """KL(q||p) of each row."""
    return (q * (q.log() - p.log())).sum(-1)


def soft(q: Tensor, z: Tensor) -> Tensor:
    """-sum q log softmax(z), mean over the rows."""
    return -(q * F.log_softmax(z, 1)).sum(1).mean()


def entropy(q: Tensor) -> Tensor:
    return -(q * q.log()).sum(1).mean()


def both_ways(n: dict[str, Any], T: float = 1.0) -> Tensor:
    p, q = F.softmax(n["u"] / T, 1), F.softmax(n["v"] / T, 1)
    return kl(p, q) + kl(q, p)


def kd(n: dict[str, Any], T: float) -> Tensor:
    """T^2 KL(q_T||p_T), batchmean."""
    return T**2 * kl(F.softmax(n["t"] / T, 1), F.softmax(n["z"] / T, 1)).mean()


def ce(n: dict[str, Any], **options: Any) -> Tensor:
    return F.cross_entropy(n["z"], n["y"], **options)


def smoothed_over_others(n: dict[str, Any]) -> Tensor:
    log_p = F.log_softmax(n["z"], 1)
    of_class = log_p.gather(1, n["y"][:, None])[:, 0]
    others = log_p.sum(1) - of_class
    return -((1 - n["eps"]) * of_class + n["eps"] / (C - 1) * others).mean()


def channels(n: dict[str, Any]) -> Tensor:
    p, q = (F.softmax(x.flatten(2) / n["tau"], 2) for x in (n["s"], n["f"]))
    return n["tau"] ** 2 * kl(q, p).sum() / (N * C)


def ps_kd(n: dict[str, Any]) -> Tensor:
    return soft((1 - n["a"]) * F.one_hot(n["y"], C).to(n["z"]) + n["a"] * n["P"], n["z"])


def byot(n: dict[str, Any]) -> Tensor:
    q, T = F.softmax(n["t"] / n["T"], 1), n["T"]
    return (1 - n["a"]) * ce(n) + n["a"] * T**2 * soft(q, n["z"] / T)


def tf_kd(n: dict[str, Any]) -> Tensor:
    q = F.softmax(n["d"] / n["T"], 1)
    return (1 - n["a"]) * ce(n) + n["a"] * n["m"] * kl(q, F.softmax(n["z"], 1)).sum() / (N * C)


def tf_kd_self(n: dict[str, Any]) -> Tensor:
    return (1 - n["a"]) * ce(n) + n["a"] * n["m"] / C * kd(n, n["T"])


def aikd(n: dict[str, Any]) -> Tensor:
    return ce(n) + kd(n, n["T"]) + kl(n["previous"], F.softmax(n["z"], 1)).mean()


def dino(n: dict[str, Any]) -> Tensor:
    return (soft(n["P0"], n["z"] / n["tau"]) + soft(n["P1"], n["z"] / n["tau"])) / 2


def queue(n: dict[str, Any]) -> Tensor:
    p, q = (F.softmax(x @ n["Q"].T / n["tau"], 1) for x in (n["x"], n["h"]))
    return kl(q, p).mean()


def logit_std(n: dict[str, Any]) -> Tensor:
    return kd(n | {name: standardised(n[name]) for name in "zt"}, n["T"])


def mixed(n: dict[str, Any]) -> Tensor:
    p, q = F.softmax(n["z"], 1), F.softmax(n["t"], 1)
    return ((1 - n["w"]) * kl(q, p) + n["w"] * kl(p, q)).mean()


def reverse(n: dict[str, Any]) -> Tensor:
    return kl(F.softmax(n["z"] / n["T"], 1), F.softmax(n["t"] / n["T"], 1)).mean()


def frskd_pixels(n: dict[str, Any]) -> Tensor:
    """Cross-entropy over the labelled, KL over all."""
    labelled = n["y"] != 255
    of_rows = kl(F.softmax(n["t"], 1), F.softmax(n["z"], 1))
    return F.cross_entropy(n["z"][labelled], n["y"][labelled]) + n["alpha"] * of_rows.mean()


Formula = Callable[[dict[str, Any]], Tensor]
PUBLISHED: dict[str, Formula | tuple[Formula, Formula]] = {  # and a constant that the value lacks
    "cross-entropy": lambda n: ce(n, label_smoothing=0.1, ignore_index=3),
    "KD, as in the common toolkits": lambda n: (1 - n["a"]) * ce(n) + n["a"] * kd(n, n["T"]),
    "FRSKD, soft labels": lambda n: ce(n) + 2 * kd(n, 4.0),
    "FRSKD, segmentation": frskd_pixels,
    "Tf-KD, self-training": tf_kd_self,
    "CS-KD": lambda n: ce(n) + n["lam"] * kd(n, 4.0),
    "DML": lambda n: ce(n) + kd(n, 1.0),
    "Tf-KD, virtual teacher": tf_kd,
    "PS-KD": (ps_kd, lambda n: n["a"] * entropy(n["P"])),
    "BYOT": (byot, lambda n: n["a"] * n["T"] ** 2 * entropy(F.softmax(n["t"] / n["T"], 1))),
    "AI-KD": aikd,
    "SD-Dropout": lambda n: 9 * both_ways(n, 3.0).mean(),
    "R-Drop, its paper": lambda n: n["alpha"] / 2 * both_ways(n).mean(),
    "R-Drop, its fairseq": lambda n: n["alpha"] / 2 * both_ways(n).sum(),
    "R-Drop, its ViT": lambda n: n["alpha"] * both_ways(n).sum(),
    "reverse KL": reverse,
    "mixed KL": mixed,
    "CWD": channels,
    "DINO": (dino, lambda n: (entropy(n["P0"]) + entropy(n["P1"])) / 2),
    "FitNets": lambda n: F.mse_loss(n["x"], n["h"]),
    "hidden-state cosine": lambda n: (1 - F.cosine_similarity(n["x"], n["h"])).mean(),
    "dense targets": (lambda n: soft(n["P"], n["z"]), lambda n: entropy(n["P"])),
    "similarities to a queue": queue,
    "LogitStd": logit_std,
    "distillation of language models": lambda n: kd(n, n["T"]) / n["T"] ** 2,
    "label smoothing that spreads": smoothed_over_others,
}
ELSEWHERE = ("SimReg", "attention transfer", "FRSKD", "GAN losses")


# ---- the page ----


def rows() -> dict[str, tuple[str, str]]:
    """Of each row of the tables: its method, its call and its verdict."""
    found = {}
    for line in (ROOT / "docs" / "losses.md").read_text().splitlines():
        cells = [x.strip() for x in re.split(r"(?<!\\)\|", line)[1:-1]]
        if len(cells) == 4 and "`" in cells[2]:
            found[cells[0]] = cells[2], cells[3]
    return found


ROWS = rows()


def published(method: str) -> Formula | tuple[Formula, Formula] | None:
    keys = [key for key in PUBLISHED if method.startswith(key)]
    return PUBLISHED[max(keys, key=len)] if keys else None


def test_every_row_is_compared_with_something() -> None:
    assert len(ROWS) > 30
    for method, (_, verdict) in ROWS.items():
        if published(method):
            continue
        assert method.startswith(ELSEWHERE), method
        (test,) = re.findall(r"`(tests/\w+\.py)`", verdict) or [""]
        assert (ROOT / test).is_file(), f"{method}: the row does not say what it is compared with"
    used = {id(published(method)) for method in ROWS}
    assert {id(x) for x in PUBLISHED.values()} <= used, "a formula of a row that is gone"


@pytest.mark.parametrize("method", [method for method in ROWS if published(method)])
def test_row(method: str) -> None:
    """The call as it stands on the page; only "..." gets numbers."""
    names = drawn()
    call = re.findall(r"`([^`]+)`", ROWS[method][0])[0]
    call = call.replace(
        "label_smoothing=..., ignore_index=...", "label_smoothing=.1, ignore_index=3"
    )
    if method.startswith("FRSKD, segmentation"):
        names["y"][::3] = 255
    formula = published(method)
    constant: Formula = lambda n: torch.zeros(())  # noqa: E731
    if isinstance(formula, tuple):
        formula, constant = formula
    assert formula is not None
    ours, theirs = eval(call, names), formula(names)
    torch.testing.assert_close(ours + constant(names), theirs, rtol=1e-9, atol=1e-12)
    live = [x for x in names.values() if isinstance(x, Tensor) and x.requires_grad]
    grads = [torch.autograd.grad(x, live, allow_unused=True) for x in (ours, theirs)]
    assert any(x is not None and x.abs().max() > 1e-6 for x in grads[1])
    for x, y in zip(*grads, strict=True):
        if y is not None:
            torch.testing.assert_close(x, y, rtol=1e-9, atol=1e-12)


# ---- what the pages say besides ----


@pytest.mark.parametrize("apart", [0.05, 1.0])
def test_reverse_kl_of_toolkits_gives_nan(apart: float) -> None:
    """At T = 0.05, or of logits 200 apart, a probability underflows; theirs is NaN, ours as in float64."""
    torch.manual_seed(2)
    scale = 3.0 if apart == 0.05 else 60.0
    z, t = (scale * torch.randn(64, 100) for _ in range(2))
    z.requires_grad_()
    theirs = F.kl_div(F.log_softmax(t / apart, 1), F.softmax(z / apart, 1), reduction="batchmean")
    assert torch.autograd.grad(theirs, z)[0].isnan().any()
    loss = selfkd.sd_dropout_kl(z, t, temperature=apart, reverse_weight=0) / apart**2
    (grad,) = torch.autograd.grad(loss, z)
    wide = z.detach().double().requires_grad_()
    p, q = F.log_softmax(wide / apart, 1), F.log_softmax(t.double() / apart, 1)
    exact = (p.exp() * (p - q)).sum(1).mean()
    (expected,) = torch.autograd.grad(exact, wide)
    torch.testing.assert_close(loss.double(), exact, rtol=3e-6, atol=0)
    assert (grad - expected).abs().max() < 1e-5 * expected.abs().max()


def test_numbers_of_troubleshooting() -> None:
    """What docs/troubleshooting.md says of factors, masks and dtypes."""
    n = drawn()
    z, t, y = n["z"], n["t"], n["y"]
    T = n["T"]
    plain = kl(F.softmax(t / T, 1), F.softmax(z / T, 1))
    ours = selfkd.distill(z, teachers=t, temperature=T)
    torch.testing.assert_close(ours, T**2 * plain.mean())
    torch.testing.assert_close(ours / C, T**2 * plain.sum() / (N * C))  # reduction="mean" of kl_div
    pad = torch.arange(N) >= 5  # fairseq's mask is True on padding
    kept = selfkd.distill(z, y, t, temperature=T, weight=~pad)
    torch.testing.assert_close(kept, selfkd.distill(z[:5], y[:5], t[:5], temperature=T))
    nothing = torch.zeros(N, dtype=torch.bool)
    assert selfkd.distill(z, y, t, weight=nothing).isnan()
    count = nothing.sum().clamp(min=1)
    assert selfkd.distill(z, y, t, weight=nothing, divisor=count) == 0
    class_weights = torch.rand(C, dtype=torch.float64)
    weighted = F.cross_entropy(z, y, weight=class_weights) + selfkd.distill(z, teachers=t)
    torch.testing.assert_close(weighted, ce(n, weight=class_weights) + kd(n, 4.0))
    assert selfkd.distill(z.half(), y, t).dtype == torch.float32
    tokens, targets = torch.randn(2, 7, C), torch.randint(C, (2, 7))
    expected = F.cross_entropy(tokens.flatten(0, 1), targets.flatten())
    torch.testing.assert_close(selfkd.distill(tokens, targets, dim=-1), expected)
    learned = torch.nn.Parameter(torch.tensor(2.0))
    selfkd.reference.distill(z, y, t, temperature=learned).backward()
    assert learned.grad is not None
