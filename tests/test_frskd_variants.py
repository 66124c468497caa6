"""The compositions of docs/losses.md for FRSKD's variants: rotations (SLA), mixed images."""

from __future__ import annotations

from collections.abc import Callable

import harness
import pytest
import selfkd
import torch
import torch.nn.functional as F
from conftest import ROOT
from selfkd import attention, distill
from torch import Tensor

pytestmark = pytest.mark.skipif(
    bool(harness.SIMT_LIBRARY), reason="the emulator has no PyTorch binding"
)

B, K, ALPHA, BETA, AUX = 6, 5, 2.0, 100.0, 0.7
Losses = dict[str, Tensor]


def kd(student: Tensor, target: Tensor) -> Tensor:
    """T^2 KL(target || student) over the rows, T = 4, the target stopped."""
    log_p, q = F.log_softmax(student / 4, 1), F.softmax(target.detach() / 4, 1)
    return 16 * F.kl_div(log_p, q, reduction="sum") / len(student)


def transfer(features: Tensor, target: Tensor) -> Tensor:
    """Mean over batch and positions of the squared difference of attention maps, the target stopped."""
    phi = [F.normalize(x.square().mean(1).flatten(1)) for x in (features, target.detach())]
    return (phi[0] - phi[1]).square().mean()


def documented(heading: str) -> Callable[..., None]:
    """The code below a heading of docs/losses.md."""
    text = (ROOT / "docs" / "losses.md").read_text()
    code = text.split(f"{heading}\n", 1)[1].split("```python\n", 1)[1].split("```", 1)[0]
    return lambda names: exec(code, names)


def assert_equal(found: Tensor, expected: Tensor, inputs: list[Tensor]) -> None:
    grads = [torch.autograd.grad(x, inputs, allow_unused=True) for x in (found, expected)]
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=0)
    for x, y in zip(*grads, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-9, atol=1e-12)


def test_rotations(generator: torch.Generator) -> None:
    """FRSKD + SLA, with its concatenations written out; the four turns of an image follow each other."""

    def randn(*shape: int) -> Tensor:
        return (2 * torch.randn(shape, generator=generator, dtype=torch.float64)).requires_grad_()

    z, t, a, c = randn(B, K), randn(B, K), randn(4 * B, 4 * K), randn(4 * B, 4 * K)
    f, g, fr, gr = ([randn(n, w, s, s) for w, s in ((3, 4), (5, 2))] for n in (B, B, 4 * B, 4 * B))
    y = torch.randint(K, (B,), generator=generator)
    names = {
        "z": z,
        "t": t,
        "a": a,
        "c": c,
        "F": f,
        "G": g,
        "F_rotated": fr,
        "G_rotated": gr,
        "y": y,
    }
    names |= {"alpha": ALPHA, "beta": BETA, "aux": AUX}
    names |= {"torch": torch, "distill": distill, "attention": attention}
    documented("## FRSKD with rotated images (SLA)")(names)

    images = torch.randn(B, 3, 5, 5, generator=generator)
    turned = [torch.rot90(images[b], r, (1, 2)) for b in range(B) for r in range(4)]
    assert torch.equal(names["rotation"](images), torch.stack(turned))
    # Row 4b + r is image b, turned r times; its class and turn are column 4k + r.
    joint = torch.tensor([4 * int(y[b]) + r for b in range(B) for r in range(4)])
    mean_a, mean_c = (torch.stack([x[r::4, r::4] for r in range(4)], dim=1).mean(1) for x in (a, c))
    loss = F.cross_entropy(z, y) + F.cross_entropy(t, y)
    loss = loss + F.cross_entropy(a, joint) + F.cross_entropy(c, joint)
    loss = loss + AUX * (kd(z, mean_a) + kd(t, mean_c))
    loss = loss + ALPHA * kd(torch.cat([z, mean_a]), torch.cat([t, mean_c]))
    for i in range(2):
        loss = loss + BETA * transfer(torch.cat([f[i], fr[i]]), torch.cat([g[i], gr[i]]))
    assert_equal(names["loss"], loss, [z, t, a, c, *f, *g, *fr, *gr])


def test_mixed_images(generator: torch.Generator) -> None:
    """FRSKD with mixup or CutMix: cross-entropies of two labels, the rest as it is."""
    z, t = (torch.randn(B, K, generator=generator, dtype=torch.float64) for _ in range(2))
    z, t = z.requires_grad_(), t.requires_grad_()
    f, g = (
        [torch.randn(B, w, s, s, generator=generator).double().requires_grad_() for w, s in sizes]
        for sizes in (((3, 4), (5, 2)), ((6, 4), (10, 2)))
    )
    ya, yb = (torch.randint(K, (B,), generator=generator) for _ in range(2))
    names = {"z": z, "t": t, "F": f, "G": g, "y_a": ya, "y_b": yb, "lam": 0.3, "selfkd": selfkd}
    documented("## FRSKD with mixed images (mixup, CutMix)")(names)
    loss = ALPHA * kd(z, t) + BETA * sum(transfer(*pair) for pair in zip(f, g, strict=True))
    for x in (z, t):
        loss = loss + 0.3 * F.cross_entropy(x, ya) + 0.7 * F.cross_entropy(x, yb)
    assert_equal(names["loss"], loss, [z, t, *f])
