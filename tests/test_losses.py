"""docs/losses.md: its calls, read from its tables, beside the published formulas in plain PyTorch; what
docs/troubleshooting.md says, tried."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import harness
import pytest
import selfkd
import torch
import torch.nn.functional as F
from conftest import ROOT
from selfkd.integrations import mdistiller
from torch import Tensor

pytestmark = pytest.mark.skipif(
    bool(harness.SIMT_LIBRARY), reason="of PyTorch's functions: run without SELFKD_SIMT_LIBRARY"
)
N, C, D, H, W = 8, 10, 6, 3, 4
F32, F64 = torch.float32, torch.float64
Names = dict[str, Any]


def drawn(dtype: torch.dtype = F64) -> Names:
    """The names that the page uses; those of the student, and both dropout samples, learn."""
    g = torch.Generator().manual_seed(20221111)

    def randn(*shape: int, learns: bool = False) -> Tensor:
        return torch.randn(shape, generator=g, dtype=F64).to(dtype).requires_grad_(learns)

    def scores(learns: bool = False) -> Tensor:
        return (3 * randn(N, C)).requires_grad_(learns)

    names: Names = {"z": scores(True), "t": scores(), "u": scores(True), "v": scores(True)}
    names |= {"x": randn(N, D, learns=True), "h": randn(N, D), "Q": randn(7, D)}
    names |= {"s": randn(N, C, H, W, learns=True), "f": randn(N, C, H, W)}
    names |= {"F": [randn(N, 3, 4, 4, learns=True), randn(N, 5, 2, 2, learns=True)]}
    names |= {"G": [randn(N, 6, 4, 4), randn(N, 10, 2, 2)]}
    names |= {"real": randn(N, learns=True), "fake": randn(N + 1, learns=True)}
    names |= {"y": torch.randint(C, (N,), generator=g), "d": virtual(torch.arange(N) % C, dtype)}
    names |= {key: randn(N, C).softmax(1) for key in ("P", "P0", "P1", "previous")}
    names |= {"pretrained": scores(), "a": 0.3, "m": 50.0, "lam": 3.0, "alpha": 0.7, "w": 0.2}
    listed = names["z"].topk(4, dim=1).indices
    names |= {"I": listed, "L": names["t"].log_softmax(1).gather(1, listed)}
    names |= {"T": 2.5, "tau": 0.4, "eps": 0.1, "k": int(names["y"][0]), "mode": "bce"}
    names |= {"N": N, "C": C, "D": D, "H": H, "W": W, "standardised": standardised}
    names |= {op: getattr(selfkd, op) for op in selfkd.contract.modules()}
    return names | {"nn": selfkd.nn, "mdistiller": mdistiller}


def wide(names: Names) -> Names:
    """The same numbers in float64."""

    def widened(x: Any) -> Any:
        if isinstance(x, list):
            return [widened(part) for part in x]
        if not isinstance(x, Tensor) or not x.is_floating_point():
            return x
        return x.detach().double().requires_grad_(x.requires_grad)

    return {key: widened(x) for key, x in names.items()}


def learning(names: Names) -> list[Tensor]:
    each = [part for x in names.values() for part in (x if isinstance(x, list) else [x])]
    return [x for x in each if isinstance(x, Tensor) and x.requires_grad]


def gradients(loss: Tensor, names: Names) -> tuple[Tensor, ...]:
    """Of all that learns, zeros where nothing comes."""
    live = learning(names)
    return torch.autograd.grad(loss, live, allow_unused=True, materialize_grads=True)


def virtual(y: Tensor, dtype: torch.dtype) -> Tensor:
    """Tf-KD's teacher: 0.99 for the class, the rest for the others."""
    return torch.where(F.one_hot(y, C) == 1, 0.99, 0.01 / (C - 1)).to(dtype)


def standardised(x: Tensor) -> Tensor:
    """Mean 0, deviation 1 in each row, as LogitStd's code has it."""
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


def both_ways(n: Names, T: float = 1.0) -> Tensor:
    p, q = F.softmax(n["u"] / T, 1), F.softmax(n["v"] / T, 1)
    return kl(p, q) + kl(q, p)


def kd(n: Names, T: float) -> Tensor:
    """T^2 KL(q_T||p_T), batchmean."""
    return T**2 * kl(F.softmax(n["t"] / T, 1), F.softmax(n["z"] / T, 1)).mean()


def ce(n: Names, **options: Any) -> Tensor:
    return F.cross_entropy(n["z"], n["y"], **options)


def smoothed_over_others(n: Names) -> Tensor:
    log_p = F.log_softmax(n["z"], 1)
    of_class = log_p.gather(1, n["y"][:, None])[:, 0]
    others = log_p.sum(1) - of_class
    return -((1 - n["eps"]) * of_class + n["eps"] / (C - 1) * others).mean()


def channels(n: Names) -> Tensor:
    p, q = (F.softmax(x.flatten(2) / n["tau"], 2) for x in (n["s"], n["f"]))
    return n["tau"] ** 2 * kl(q, p).sum() / (N * C)


def ps_kd(n: Names) -> Tensor:
    return soft((1 - n["a"]) * F.one_hot(n["y"], C).to(n["z"]) + n["a"] * n["P"], n["z"])


def byot(n: Names) -> Tensor:
    q, T = F.softmax(n["t"] / n["T"], 1), n["T"]
    return (1 - n["a"]) * ce(n) + n["a"] * T**2 * soft(q, n["z"] / T)


def tf_kd(n: Names) -> Tensor:
    q = F.softmax(n["d"] / n["T"], 1)
    return (1 - n["a"]) * ce(n) + n["a"] * n["m"] * kl(q, F.softmax(n["z"], 1)).sum() / (N * C)


def tf_kd_self(n: Names) -> Tensor:
    return (1 - n["a"]) * ce(n) + n["a"] * n["m"] / C * kd(n, n["T"])


def aikd(n: Names) -> Tensor:
    taught = kd(n | {"t": n["pretrained"]}, n["T"])
    return ce(n) + taught + kl(n["previous"], F.softmax(n["z"], 1)).mean()


def dino(n: Names) -> Tensor:
    return (soft(n["P0"], n["z"] / n["tau"]) + soft(n["P1"], n["z"] / n["tau"])) / 2


def queue(n: Names) -> Tensor:
    p, q = (F.softmax(x @ n["Q"].T / n["tau"], 1) for x in (n["x"], n["h"]))
    return kl(q, p).mean()


def logit_std(n: Names) -> Tensor:
    return kd(n | {name: standardised(n[name]) for name in "zt"}, n["T"])


def mixed(n: Names) -> Tensor:
    p, q = F.softmax(n["z"], 1), F.softmax(n["t"], 1)
    return (n["w"] * kl(q, p) + (1 - n["w"]) * kl(p, q)).mean()


def reverse(n: Names) -> Tensor:
    return kl(F.softmax(n["z"] / n["T"], 1), F.softmax(n["t"] / n["T"], 1)).mean()


def mixture(n: Names, beta: float, rows: Callable[[Tensor], Tensor] = lambda x: x) -> Tensor:
    """The generalised Jensen-Shannon divergence of p and q, of which `rows` makes others."""
    p, q = (rows(F.softmax(n[name], 1)) for name in "zt")
    m = beta * q + (1 - beta) * p
    return (beta * kl(q, m) + (1 - beta) * kl(p, m)).mean()


def skewed(n: Names, lam: float, reverse: bool) -> Tensor:
    """KL from a mixture that has `lam` of the side itself."""
    p, q = (F.softmax(n[name], 1) for name in ("zt" if reverse else "tz"))
    return kl(p, lam * p + (1 - lam) * q).mean()


def renormalised(n: Names) -> Callable[[Tensor], Tensor]:
    return lambda x: F.normalize(x.gather(1, n["I"]), p=1, dim=1)


def with_tail(n: Names) -> Callable[[Tensor], Tensor]:
    def rows(x: Tensor) -> Tensor:
        listed = x.gather(1, n["I"])
        return torch.cat([listed, 1 - listed.sum(1, keepdim=True)], 1)

    return rows


def sparse(n: Names) -> Tensor:
    """KL(q||p) over the listed classes, q over its sum and p as it is."""
    return kl(renormalised(n)(F.softmax(n["t"], 1)), F.softmax(n["z"], 1).gather(1, n["I"])).mean()


def sparse_with_tail(n: Names) -> Tensor:
    p, q = (with_tail(n)(F.softmax(n[name], 1)) for name in "zt")
    return kl(q, p).mean()


def variation(n: Names) -> Tensor:
    return (F.softmax(n["z"], 1) - F.softmax(n["t"], 1)).abs().sum(1).mean() / 2


def frskd_pixels(n: Names) -> Tensor:
    """Cross-entropy over the labelled, KL over all."""
    labelled = n["y"] != 255
    of_rows = kl(F.softmax(n["t"], 1), F.softmax(n["z"], 1))
    return F.cross_entropy(n["z"][labelled], n["y"][labelled]) + n["alpha"] * of_rows.mean()


def transfer(features: Tensor, target: Tensor) -> Tensor:
    """Attention transfer; the target is stopped."""
    maps = [x.pow(2).mean(1).flatten(1) for x in (features, target.detach())]
    phi = [x / x.norm(dim=1, keepdim=True) for x in maps]
    return (phi[0] - phi[1]).pow(2).mean()


def levels(n: Names) -> Tensor:
    return transfer(n["F"][0], n["G"][0]) + transfer(n["F"][1], n["G"][1])


def frskd(n: Names) -> Tensor:
    target = n | {"t": n["t"].detach()}
    return ce(n) + F.cross_entropy(n["t"], n["y"]) + 2 * kd(target, 4.0) + 100 * levels(n)


def cosines(n: Names) -> Tensor:
    return (F.normalize(n["x"], dim=1) * F.normalize(n["h"], dim=1)).sum(1)


def discriminator(n: Names) -> Tensor:
    real, fake = n["real"], n["fake"]
    if n["mode"] == "bce":
        judged = [
            F.binary_cross_entropy_with_logits(x, torch.full_like(x, y))
            for x, y in ((real, 1.0), (fake, 0.0))
        ]
        return judged[0] + judged[1]
    if n["mode"] == "hinge":
        return (1 - real).clamp(min=0).mean() + (1 + fake).clamp(min=0).mean()
    if n["mode"] == "lsgan":
        return ((real - 1).pow(2).mean() + fake.pow(2).mean()) / 2
    return fake.mean() - real.mean()


def generator_loss(n: Names) -> Tensor:
    fake = n["fake"]
    if n["mode"] == "bce":
        return F.binary_cross_entropy_with_logits(fake, torch.ones_like(fake))
    return (fake - 1).pow(2).mean() / 2 if n["mode"] == "lsgan" else -fake.mean()


Formula = Callable[[Names], Tensor]
PUBLISHED: dict[str, Formula | tuple[Formula, Formula]] = {  # and a constant that the value lacks
    "cross-entropy": lambda n: ce(n, label_smoothing=n["eps"], ignore_index=n["k"]),
    "label smoothing": smoothed_over_others,
    "KD": lambda n: (1 - n["a"]) * ce(n) + n["a"] * kd(n, n["T"]),
    "KD of language models": lambda n: kd(n, n["T"]) / n["T"] ** 2,
    "FRSKD, soft labels": lambda n: ce(n) + 2 * kd(n, 4.0),
    "FRSKD, segmentation": frskd_pixels,
    "CS-KD": lambda n: ce(n) + n["lam"] * kd(n, 4.0),
    "DML": lambda n: ce(n) + kd(n | {"t": n["t"].detach()}, 1.0),
    "Tf-KD, self-training": tf_kd_self,
    "Tf-KD, virtual teacher d": tf_kd,
    "PS-KD": (ps_kd, lambda n: n["a"] * entropy(n["P"])),
    "BYOT": (byot, lambda n: n["a"] * n["T"] ** 2 * entropy(F.softmax(n["t"] / n["T"], 1))),
    "LogitStd": logit_std,
    "dense targets of mixup or CutMix": (lambda n: soft(n["P"], n["z"]), lambda n: entropy(n["P"])),
    "DINO": (dino, lambda n: (entropy(n["P0"]) + entropy(n["P1"])) / 2),
    "similarities to a queue Q of features": queue,
    "CWD": channels,
    "AI-KD": aikd,
    "SD-Dropout": lambda n: 9 * both_ways(n, 3.0).mean(),
    "R-Drop, its paper": lambda n: n["alpha"] / 2 * both_ways(n).mean(),
    "R-Drop, its README and fairseq code": lambda n: n["alpha"] / 2 * both_ways(n).sum(),
    "R-Drop, its ViT code": lambda n: n["alpha"] * both_ways(n).sum(),
    "reverse KL": reverse,
    "mixed KL": mixed,
    "GKD": lambda n: mixture(n, n["w"]),
    "MiniLLM": lambda n: reverse(n | {"T": 1.0}),
    "DistiLLM, skewed KL": lambda n: skewed(n, 0.1, reverse=False),
    "DistiLLM, skewed reverse KL": lambda n: skewed(n, 0.1, reverse=True),
    "f-distill": variation,
    "SDFT, SDPO of all classes": lambda n: mixture(n, n["alpha"]),
    "SDFT, SDPO of the top k, renormalised": lambda n: mixture(n, n["alpha"], renormalised(n)),
    "SDFT, SDPO of the top k and a tail": lambda n: mixture(n, n["alpha"], with_tail(n)),
    "DistillKit, sparse KL, missing classes zero": sparse,
    "DistillKit, sparse KL, missing classes uniform on both sides": sparse_with_tail,
    "SimReg": lambda n: (2 - 2 * cosines(n)).mean(),
    "hidden-state cosine": lambda n: (1 - cosines(n)).mean(),
    "FitNets": lambda n: F.mse_loss(n["s"], n["f"]),
    "attention transfer": lambda n: transfer(n["s"], n["f"]),
    "FRSKD, feature loss": levels,
    "FRSKD": frskd,
    "GAN losses, the discriminator's": discriminator,
    "GAN losses, the generator's": generator_loss,
}
ELSEWHERE = {  # rows whose call is a module with parameters: compared where the row says
    "FRSKD with mixup or CutMix",
    "FRSKD as a whole, segmentation",
    "FRSKD's self-teacher",
    "FRSKD's necks for segmentation",
}


# ---- the page ----


def rows() -> dict[str, tuple[str, str]]:
    """Of each row of the tables: its method, its calls and its verdict."""
    found = {}
    for line in (ROOT / "docs" / "losses.md").read_text().splitlines():
        cells = [x.strip() for x in re.split(r"(?<!\\)\|", line)[1:-1]]
        if len(cells) == 4 and "`" in cells[2]:
            found[cells[0]] = cells[2], cells[3]
    return found


ROWS = rows()


def key_of(method: str) -> str:
    """The longest name that a row begins with, up to a comma, colon or parenthesis."""
    keys = [
        key for key in PUBLISHED if re.match(rf"{re.escape(key)}($|[,:]| \(| without T²)", method)
    ]
    return max(keys, key=len, default="")


def test_every_row_is_compared_and_says_with_what() -> None:
    lines = (ROOT / "docs" / "losses.md").read_text().splitlines()
    assert len(ROWS) == sum(bool(re.match(r"\| (?!method |---)", line)) for line in lines)
    for method, (call, verdict) in ROWS.items():
        assert re.match(r"equal\b|ours$", verdict), f"{method}: neither equal nor ours"
        if method in ELSEWHERE:
            (test,) = re.findall(r"`(tests/\w+\.py)`", verdict)
            used = Path(ROOT, test).read_text()
            assert all(name in used for name in re.findall(r"nn\.(\w+)", call)), f"{method}: {test}"
            continue
        assert key_of(method), f"{method}: no formula in this file"
        source = r"[\w.-]+/[\w.-]+, \w[\w./-]+|arXiv \d{4}\.\d{4}|PyTorch"
        named = re.search(source, verdict) or verdict == "ours" or method.startswith("FRSKD,")
        assert named, f"{method}: equal to what?"
    assert {key_of(method) for method in ROWS} - {""} == set(PUBLISHED), "a row is gone"
    assert set(ROWS) >= ELSEWHERE


def calls() -> list[Any]:
    """Each call of each row that has a formula here, in each mode if it has modes."""
    found = []
    for method, (cell, _) in ROWS.items():
        if method not in ELSEWHERE:
            for k, call in enumerate(x for x in re.findall(r"`([^`]+)`", cell) if "(" in x):
                for mode in ("bce", "hinge", "lsgan", "wgan") if "mode=mode" in call else ("",):
                    name = "-".join(filter(None, (key_of(method) or method, k and str(k), mode)))
                    found.append(pytest.param(method, call, mode, id=name))
    return found


@pytest.mark.parametrize("dtype", [F64, F32], ids=["float64", "float32"])
@pytest.mark.parametrize(("method", "call", "mode"), calls())
def test_row(method: str, call: str, mode: str, dtype: torch.dtype) -> None:
    """The call as it stands on the page, against the formula in float64."""
    names = drawn(dtype) | {"mode": mode}
    if method.startswith("FRSKD, segmentation"):
        names["y"][::3] = 255
    if key_of(method) in ("DML", "FRSKD, feature loss", "FRSKD"):  # the other side learns elsewhere
        for x in (names["t"], *names["G"]):
            x.requires_grad_()
    exact = wide(names)
    formula = PUBLISHED[key_of(method)]
    formula, constant = formula if isinstance(formula, tuple) else (formula, lambda n: 0.0)
    ours, theirs = eval(call, dict(names)), formula(exact)
    of_value, of_gradient = (1e-9, 1e-9) if dtype == F64 else (3e-6, 1e-5)
    assert ours.dtype == dtype
    torch.testing.assert_close(
        ours.double(), theirs - constant(exact), rtol=of_value, atol=0, msg=lambda m: f"{call}: {m}"
    )
    found, expected = gradients(ours, names), gradients(theirs, exact)
    assert any(x.abs().max() > 1e-4 for x in expected)
    for x, y in zip(found, expected, strict=True):
        assert (x - y).abs().max() <= of_gradient * y.abs().max(), call


# ---- reverse divergences: what becomes of underflow ----


def as_toolkits(u: Tensor, v: Tensor, T: float) -> Tensor:
    """KL(p_T(v)||p_T(u)), whose target is a softmax that learns: R-Drop's and SD-Dropout's codes."""
    return F.kl_div(F.log_softmax(u / T, 1), F.softmax(v / T, 1), reduction="batchmean")


def spread(T: float, apart: float) -> tuple[Tensor, Tensor]:
    """Two samples of rows whose logits are at most `apart` from the largest, the last one exactly."""
    g = torch.Generator().manual_seed(20221111)
    u, v = (T * torch.randn(16, 10, generator=g) for _ in range(2))
    for x in (u, v):
        x[:, 0] = x.amax(1)
        x[:, -1] = x[:, 0] - apart
    return u.requires_grad_(), v.requires_grad_()


@pytest.mark.parametrize("T", [0.05, 1.0, 3.0])
def test_divergences_of_toolkits_give_nan_once_a_probability_underflows(T: float) -> None:
    for apart, underflows in ((95 * T, False), (110 * T, True), (600 * T, True)):
        u, v = spread(T, apart)
        for theirs in (
            as_toolkits(u, v, T),  # reverse KL, of a teacher u
            T**2 * (as_toolkits(u, v, T) + as_toolkits(v, u, T)),  # SD-Dropout
        ):
            (grad,) = torch.autograd.grad(theirs, v)
            assert theirs.isfinite()
            assert grad.isnan().any() == underflows, f"T = {T}, {apart} apart"


@pytest.mark.parametrize("T", [0.05, 1.0, 3.0])
def test_ours_do_not(T: float) -> None:
    for apart in (95 * T, 110 * T, 600 * T):
        u, v = spread(T, apart)
        wide_u, wide_v = (x.detach().double().requires_grad_() for x in (u, v))
        log_p, log_q = F.log_softmax(wide_u / T, 1), F.log_softmax(wide_v / T, 1)
        forward = (log_p.exp() * (log_p - log_q)).sum(1).mean()
        backward = (log_q.exp() * (log_q - log_p)).sum(1).mean()
        for ours, exact in (
            (selfkd.sd_dropout_kl(u, v, temperature=T, reverse_weight=0) / T**2, forward),
            (selfkd.sd_dropout_kl(u, v, temperature=T), T**2 * (forward + backward)),
        ):
            torch.testing.assert_close(ours.double(), exact, rtol=3e-6, atol=0)
            found = torch.autograd.grad(ours, (u, v), retain_graph=True)
            expected = torch.autograd.grad(exact, (wide_u, wide_v), retain_graph=True)
            for x, y in zip(found, expected, strict=True):
                assert (x - y).abs().max() <= 1e-5 * y.abs().max()


# ---- docs/troubleshooting.md ----

TROUBLE = (ROOT / "docs" / "troubleshooting.md").read_text()


def troubled() -> Names:
    """The names of the page, beside those of docs/losses.md."""
    g = torch.Generator().manual_seed(20221111)

    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=g, dtype=F64)

    n = drawn()
    n |= {"maps": randn(N, C, H, W).requires_grad_(), "taught": randn(N, C, H, W)}
    n |= {"tokens": randn(2, 7, C).requires_grad_(), "heard": randn(2, 7, C), "count": 40}
    n |= {"hidden": randn(2, 7, D).requires_grad_(), "taught_hidden": randn(2, 7, D)}
    n |= {"targets": torch.randint(C, (2, 7), generator=g), "q": n["P"], "F": F}
    n["targets"][:, 5:] = -100
    n |= {"pad_mask": torch.arange(N) >= 5, "mask": torch.zeros(N, dtype=torch.bool)}
    n |= {"class_weights": torch.rand(C, generator=g, dtype=F64), "reference": selfkd.reference}
    return n | {"learned": torch.nn.Parameter(torch.tensor(2.0, dtype=F64))}


def temperate(z: Tensor, t: Tensor, T: float | Tensor, reduction: str = "batchmean") -> Tensor:
    """T^2 KL(q_T||p_T) by F.kl_div, classes in dimension 1."""
    log_p, q = F.log_softmax(z / T, 1), F.softmax(t / T, 1)
    return T**2 * F.kl_div(log_p, q, reduction=reduction)


def token_ce(n: Names, reduction: str = "mean") -> Tensor:
    return F.cross_entropy(n["tokens"].flatten(0, 1), n["targets"].flatten(), reduction=reduction)


def of_kept_tokens(n: Names) -> Tensor:
    kept = n["targets"] != -100
    return token_ce(n) + temperate(n["tokens"][kept], n["heard"][kept], 4.0)


def of_kept_rows(n: Names) -> Tensor:
    z, y, t = (n[name][:5] for name in "zyt")
    return F.cross_entropy(z, y) + temperate(z, t, 4.0)


def targets_detached(n: Names) -> Tensor:
    u, v = n["u"], n["v"]
    return temperate(u, v.detach(), 3.0) + temperate(v, u.detach(), 3.0)


def token_cosines(n: Names) -> Tensor:
    cos = F.cosine_similarity(n["hidden"], n["taught_hidden"], dim=-1)
    return (2 - 2 * cos).mean()


def both_of_fixed(n: Names) -> Tensor:
    z, t, T = n["z"], n["t"].detach(), n["T"]
    return temperate(z, t, T) + temperate(t, z, T)


ANSWERS: dict[str, Formula] = {
    "distill(z, teachers=t, temperature=T, teacher_weights=1/T**2)": (
        lambda n: kd(n, n["T"]) / n["T"] ** 2
    ),
    "distill(z, teachers=t, temperature=T, teacher_weights=1/C)": (
        lambda n: temperate(n["z"], n["t"], n["T"], "mean")
    ),
    "distill(maps, teachers=taught, divisor=len(maps))": (
        lambda n: temperate(n["maps"], n["taught"], 4.0)
    ),
    'sd_dropout_kl(u, v, temperature=1, reduction="sum")': lambda n: both_ways(n).sum(),
    "sd_dropout_kl(u, v, temperature=1, forward_weight=0.5, reverse_weight=0.5)": (
        lambda n: both_ways(n).mean() / 2
    ),
    "simreg(x, h, normalize=False) / D": lambda n: F.mse_loss(n["x"], n["h"]),
    "distill(tokens, targets, dim=-1, divisor=count)": (
        lambda n: token_ce(n, reduction="sum") / n["count"]
    ),
    "distill(z, y, label_smoothing=eps*C/(C-1))": smoothed_over_others,
    "sd_dropout_kl(z, t, temperature=T, reverse_weight=0)": lambda n: n["T"] ** 2 * reverse(n),
    "distill(z, y, t, weight=mask, divisor=mask.sum().clamp(min=1))": lambda n: 0 * n["z"].sum(),
    "distill(z, y, t, weight=~pad_mask)": of_kept_rows,
    'distill(z, y, q, teacher_kind="probs", temperature=1)': (
        lambda n: ce(n) + kl(n["q"], F.softmax(n["z"], 1)).mean()
    ),
    "simreg(hidden, taught_hidden, dim=-1)": token_cosines,
    "distill(tokens, targets, dim=-1)": token_ce,
    "distill(tokens, targets, heard, dim=-1, mask_teachers=True)": of_kept_tokens,
    "F.cross_entropy(z, y, weight=class_weights) + distill(z, teachers=t)": (
        lambda n: ce(n, weight=n["class_weights"]) + kd(n, 4.0)
    ),
    "distill(z, y, t.detach())": lambda n: ce(n) + temperate(n["z"], n["t"].detach(), 4.0),
    "sd_dropout_kl(t, z, temperature=T, reverse_weight=0)": (
        lambda n: temperate(n["z"], n["t"], n["T"])
    ),
    "reference.distill(z, y, t, temperature=learned)": (
        lambda n: ce(n) + temperate(n["z"], n["t"], n["learned"])
    ),
    "sd_dropout_kl(z, t.detach(), temperature=T)": both_of_fixed,
    "sd_dropout_kl(u, v, detach_target=True)": targets_detached,
}


def test_every_answer_is_compared() -> None:
    lines = [line for line in TROUBLE.splitlines() if line.startswith("| ")]
    cells = [re.split(r"(?<!\\)\|", line)[3] for line in lines]
    found = {call for cell in cells for call in re.findall(r"`([^`]+\([^`]*)`", cell)}
    assert found - {"selfkd.nn.SDDropout(head)"} == set(ANSWERS)


@pytest.mark.parametrize("call", ANSWERS)
def test_answer(call: str) -> None:
    """What the page tells to write is what it says, also of a teacher that learns or is detached."""
    names = troubled()
    if "t.detach()" in call or "kl(t, z" in call:
        names["t"].requires_grad_()
    ours, theirs = eval(call, dict(names)), ANSWERS[call](names)
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)
    for x, y in zip(gradients(ours, names), gradients(theirs, names), strict=True):
        torch.testing.assert_close(x, y, rtol=1e-9, atol=1e-12)


def test_recipe() -> None:
    """The lines that compare with the reference: silent where all is right, not where it is not."""
    (recipe,) = re.findall(r"^```python\n(.*?)^```$", TROUBLE, re.DOTALL | re.MULTILINE)
    names = drawn(F32)
    exec(recipe, {"selfkd": selfkd, "torch": torch} | names)
    wrong = recipe.replace("found.double()", "1.00001 * found.double()")
    with pytest.raises(AssertionError, match="index"):
        exec(wrong, {"selfkd": selfkd, "torch": torch} | names)


def test_factors() -> None:
    """The ratio of what one writes first to the other code's value is the factor that the page names."""
    n = troubled()
    T = n["T"]
    ours = selfkd.distill(n["z"], teachers=n["t"], temperature=T)
    positions = selfkd.distill(n["maps"], teachers=n["taught"])
    both = selfkd.sd_dropout_kl(n["u"], n["v"], temperature=1)
    squares = selfkd.simreg(n["x"], n["h"], normalize=False)
    for factor, ratio in {
        "T²": ours / temperate(n["z"], n["t"], T) * T**2 / T**2,
        "C": ours / temperate(n["z"], n["t"], T, "mean") / C,
        "H x W": temperate(n["maps"], n["taught"], 4.0) / positions / (H * W),
        "N": both_ways(n).sum() / both / N,
        "2": both / (both_ways(n).mean() / 2) / 2,
        "D": squares / F.mse_loss(n["x"], n["h"]) / D,
    }.items():
        assert re.search(rf"^\| {re.escape(factor)}[ ,]", TROUBLE, re.MULTILINE), factor
        assert ratio.item() == pytest.approx(1, rel=1e-9), factor


SENTENCES: dict[str, Callable[[Names], Any]] = {
    "size 1 in dimension C": lambda n: selfkd.simreg(n["x"].view(N, 1, D), n["h"].view(N, 1, D)),
    "is written again": lambda n: forgotten_end_of_epoch(n)[1],
    "classes in the last dimension": lambda n: selfkd.distill(n["tokens"], n["targets"]),
    "it weights positions": lambda n: selfkd.distill(n["z"], n["y"], weight=n["class_weights"]),
    "teachers[0] requires grad": lambda n: selfkd.distill(n["z"], n["y"], n["u"]),
    "temperature requires grad": lambda n: selfkd.distill(
        n["z"], n["y"], n["t"], temperature=n["learned"]
    ),
}


def forgotten_end_of_epoch(n: Names) -> tuple[Tensor, None]:
    """Two epochs without ``end_epoch()``: the third term of the first, and the second's update."""
    previous, index = selfkd.nn.PreviousEpoch(N, C), torch.arange(N)
    previous.update(index, n["t"])
    assert previous.lookup(index) is None
    return previous.current, previous.update(index, n["t"])


@pytest.mark.parametrize("sentence", SENTENCES)
def test_sentence(sentence: str) -> None:
    with pytest.raises(ValueError, match=re.escape(sentence)):
        SENTENCES[sentence](troubled())


def test_every_sentence_is_raised() -> None:
    symptoms = [line.split("|")[1] for line in TROUBLE.splitlines() if line.startswith("| ")]
    quoted = {text for cell in symptoms for text in re.findall(r'"([^"]+)"', cell)}
    assert quoted == set(SENTENCES)


def test_what_stands_still() -> None:
    """NaN of nothing, 0 of an inverted mask, KL of probabilities taken for logits, SimReg over positions."""
    n = troubled()
    z, y, t = n["z"], n["y"], n["t"]
    assert selfkd.distill(z, y, t, weight=n["mask"]).isnan()
    assert F.cross_entropy(z, torch.full_like(y, -100)).isnan()
    everything = torch.ones(N, dtype=torch.bool)  # nothing is padding
    assert selfkd.distill(z, y, t, weight=~everything, reduction="sum") == 0
    assert selfkd.distill(z.softmax(1), None, t.softmax(1)) < 0.05 * selfkd.distill(z, None, t)
    twice = F.softmax(t.softmax(1) / 4, 1)
    assert twice.max() < 1.3 / C
    far = torch.randn(4, 7, 64, generator=torch.Generator().manual_seed(1), dtype=F64)
    near = far + 0.1 * far.flip(0)  # features (N, L, D) that nearly agree
    assert selfkd.simreg(far, near, dim=-1) < 0.05
    assert 1.8 < selfkd.simreg(far, far.roll(1, 0)) < 2.2


def test_tokens_whose_number_is_that_of_the_classes() -> None:
    """Without dim=-1 nothing is raised where both are equal, or without a target: another loss."""
    square = torch.randn(2, C, C, generator=torch.Generator().manual_seed(1), dtype=F64)
    targets = torch.arange(C).expand(2, C) // 2
    expected = F.cross_entropy(square.flatten(0, 1), targets.flatten())
    torch.testing.assert_close(selfkd.distill(square, targets, dim=-1), expected)
    assert abs(selfkd.distill(square, targets) - expected) > 1e-3
    n = troubled()
    rows = selfkd.distill(n["tokens"], None, n["heard"], dim=-1)
    assert abs(selfkd.distill(n["tokens"], None, n["heard"]) - rows) > 0.01
    of_all = selfkd.distill(n["tokens"], n["targets"], n["heard"], dim=-1)
    assert abs(of_all - of_kept_tokens(n)) > 0.001  # the teacher counts on padding


def test_default_temperatures() -> None:
    n = drawn()
    torch.testing.assert_close(selfkd.distill(n["z"], None, n["t"]), kd(n, 4.0))
    torch.testing.assert_close(selfkd.sd_dropout_kl(n["u"], n["v"]), 9 * both_ways(n, 3.0).mean())


def test_samples_that_nearly_agree() -> None:
    """Eager PyTorch in float32 loses all but the first digits; and detached targets halve the gradient."""
    g = torch.Generator().manual_seed(20221111)
    u = 3 * torch.randn(64, 100, generator=g)
    v = (u + 1e-3 * torch.randn(64, 100, generator=g)).requires_grad_()
    exact = temperate(v.double(), u.double(), 1.0).item()
    assert abs(temperate(v, u, 1.0).item() / exact - 1) > 1e-3
    assert abs(selfkd.distill(v, None, u, temperature=1).item() / exact - 1) < 3e-6
    grads = [
        torch.autograd.grad(selfkd.sd_dropout_kl(u, v, detach_target=stopped), v)[0]
        for stopped in (False, True)
    ]
    assert (grads[0] - 2 * grads[1]).norm() < 0.01 * grads[0].norm()


def test_bfloat16() -> None:
    g = torch.Generator().manual_seed(20221111)
    z, t = (3 * torch.randn(64, 1000, generator=g).bfloat16() for _ in range(2))
    exact = temperate(z.double(), t.double(), 1.0).item()
    found = selfkd.distill(z, None, t, temperature=1)
    assert found.dtype == torch.float32
    assert selfkd.distill(z.half(), None, t.half()).dtype == torch.float32
    assert abs(found.item() / exact - 1) < 3e-6
    assert 3e-4 < abs(temperate(z, t, 1.0).item() / exact - 1) < 1e-2


def test_class_of_previous_epoch_that_is_not_ended() -> None:
    """AI-KD's third term is 0 as long as nothing ends an epoch."""
    n = drawn()
    previous, index = selfkd.nn.PreviousEpoch(N, C), torch.arange(N)
    criterion = selfkd.nn.AIKDLoss(selfkd.nn.Discriminator(C).double())
    for ended in (False, True):
        _, parts = criterion(n["z"], n["t"], previous.lookup(index), n["y"])
        assert (parts.previous == 0) == (not ended)
        if not ended:
            previous.update(index, n["t"])
            previous.end_epoch()
