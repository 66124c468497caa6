"""FRSKD's loss against a plain transcription of the authors' code, its gradients, its schedule."""

from __future__ import annotations

import math
from typing import Any

import harness
import pytest
import selfkd
import torch
import torch.nn.functional as F
from selfkd.nn import FRSKDLoss, frskd_rampup, sigmoid_rampup

pytestmark = pytest.mark.skipif(
    bool(harness.SIMT_LIBRARY), reason="the emulator has no PyTorch binding"
)


def transcription(
    o: torch.Tensor,
    o_teacher: torch.Tensor,
    features: list[torch.Tensor],
    teacher_features: list[torch.Tensor],
    y: torch.Tensor,
    *,
    alpha: float,
    beta: float,
    T: float,
    ignore_index: int = -100,
) -> torch.Tensor:
    """CE(o, y) + CE(o', y) + alpha L_KD(o, sg o') + beta sum_i L_F(F_i, sg T_i)."""

    def phi(x: torch.Tensor) -> torch.Tensor:
        return F.normalize(x.pow(2).mean(1).view(x.size(0), -1))

    ce = sum(F.cross_entropy(x, y, ignore_index=ignore_index) for x in (o, o_teacher))
    p = F.softmax(o_teacher.detach() / T, 1)
    kd = T**2 * F.kl_div(F.log_softmax(o / T, 1), p, reduction="sum") / y.numel()
    transfer = sum(
        (phi(f) - phi(t.detach())).pow(2).mean()
        for f, t in zip(features, teacher_features, strict=True)
    )
    return ce + alpha * kd + beta * transfer


def batch(g: torch.Generator, spatial: tuple[int, ...] = (), requires_grad: bool = True) -> Any:
    """Logits of both, four levels of features of both (twice the channels), classes."""

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=g, dtype=torch.float64).requires_grad_(requires_grad)

    levels = [(8, 8), (12, 4), (16, 2), (20, 1)]
    return (
        draw(6, 10, *spatial),
        draw(6, 10, *spatial),
        [draw(6, c, s, s + 1) for c, s in levels],
        [draw(6, 2 * c, s, s + 1) for c, s in levels],
        torch.randint(0, 10, (6, *spatial), generator=g),
    )


def gradients(loss: torch.Tensor, given: Any) -> list[torch.Tensor]:
    o, o_teacher, features, teacher_features, _ = given
    live = [o, o_teacher, *features, *teacher_features]
    return list(torch.autograd.grad(loss, live, allow_unused=True, materialize_grads=True))


@pytest.mark.parametrize("weights", [(2.0, 100.0, 4.0), (1.0, 50.0, 1.0), (0.3, 0.0, 3.0)], ids=str)
def test_the_authors_loss(weights: tuple[float, float, float], generator: torch.Generator) -> None:
    given = batch(generator)
    alpha, beta, T = weights
    loss, parts = FRSKDLoss(*weights)(*given)
    expected = transcription(*given, alpha=alpha, beta=beta, T=T)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(gradients(loss, given), gradients(expected, given))
    torch.testing.assert_close(sum(parts), loss.detach())
    assert not any(part.requires_grad for part in parts)
    torch.testing.assert_close(parts.ce, F.cross_entropy(given[0], given[4]).detach())
    torch.testing.assert_close(parts.teacher_ce, F.cross_entropy(given[1], given[4]).detach())
    levels = [selfkd.attention(f, t.detach()) for f, t in zip(*given[2:4], strict=True)]
    torch.testing.assert_close(parts.features, beta * sum(levels).detach())


def test_what_learns_from_what(generator: torch.Generator) -> None:
    """The self-teacher's logits learn from their cross-entropy alone, its features from nothing."""
    given = batch(generator)
    o, o_teacher, features, teacher_features, y = given
    loss, _ = FRSKDLoss()(*given)
    found = torch.autograd.grad(loss, [o, o_teacher, *features], retain_graph=True)
    ce = F.cross_entropy(o_teacher, y)
    torch.testing.assert_close(found[1], torch.autograd.grad(ce, o_teacher)[0])
    assert all(x.abs().max() > 0 for x in found)
    with pytest.raises(RuntimeError, match="not have been used in the graph"):
        torch.autograd.grad(loss, teacher_features[0])


def test_features_that_enter_the_self_teacher_learn_from_its_cross_entropy(
    generator: torch.Generator,
) -> None:
    """Detaching is of the targets only: a feature's gradient has a part that came through o'."""
    given = batch(generator, requires_grad=False)
    o, _, features, _, y = given
    features[0].requires_grad_()

    def self_teacher() -> tuple[torch.Tensor, list[torch.Tensor]]:
        refined = [torch.cat([x, x.sin()], 1) for x in features]
        return refined[0].mean((2, 3))[:, :10], refined

    o_teacher, refined = self_teacher()
    loss, _ = FRSKDLoss()(o, o_teacher, features, refined, y)
    expected = transcription(o, o_teacher, features, refined, y, alpha=2, beta=100, T=4)
    found = [torch.autograd.grad(x, features[0], retain_graph=True)[0] for x in (loss, expected)]
    torch.testing.assert_close(*found)
    o_teacher, refined = (o_teacher.detach(), [x.detach() for x in refined])
    stopped = FRSKDLoss()(o, o_teacher, features, refined, y)[0]
    assert not torch.allclose(torch.autograd.grad(stopped, features[0])[0], found[0])


def test_segmentation(generator: torch.Generator) -> None:
    """Cross-entropies without label 255, soft labels of all pixels, T = 1, weights that ramp up."""
    given = batch(generator, spatial=(5, 7))
    given[4][:, :2] = 255
    criterion = FRSKDLoss(alpha=1, beta=50, temperature=1, ignore_index=255)
    for epoch in (0, 39, 40, 52, 59):
        ramp = frskd_rampup(epoch)
        loss, parts = criterion(*given, ramp=ramp)
        expected = transcription(*given, alpha=ramp, beta=50 * ramp, T=1, ignore_index=255)
        torch.testing.assert_close(loss, expected)
        torch.testing.assert_close(gradients(loss, given), gradients(expected, given))
        torch.testing.assert_close(sum(parts), loss.detach())
        assert (parts.kl == 0) == (parts.features == 0) == (epoch < 40)


def test_without_features(generator: torch.Generator) -> None:
    """FRSKD\\F, and warm-up."""
    o, o_teacher, _, _, y = batch(generator)
    loss, parts = FRSKDLoss(beta=0)(o, o_teacher, None, None, y)
    torch.testing.assert_close(loss, transcription(o, o_teacher, [], [], y, alpha=2, beta=0, T=4))
    assert parts.features == 0
    loss, parts = FRSKDLoss()(o, o_teacher, None, None, y, ramp=0.0)
    torch.testing.assert_close(loss, F.cross_entropy(o, y) + F.cross_entropy(o_teacher, y))
    assert parts.kl == 0


def test_weights_are_attributes_and_smoothing_is_of_both(generator: torch.Generator) -> None:
    given = batch(generator)
    o, o_teacher, _, _, y = given
    criterion = FRSKDLoss(label_smoothing=0.1)
    _, parts = criterion(*given)
    for found, x in ((parts.ce, o), (parts.teacher_ce, o_teacher)):
        torch.testing.assert_close(found, F.cross_entropy(x, y, label_smoothing=0.1).detach())
    criterion.alpha, criterion.beta = 1.0, 25.0
    _, other = criterion(*given)
    torch.testing.assert_close(other.kl, parts.kl / 2)
    torch.testing.assert_close(other.features, parts.features / 4)
    assert "alpha=1.0, beta=25.0, temperature=4.0" in repr(criterion)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_mixed_precision(dtype: torch.dtype, generator: torch.Generator) -> None:
    """Half precision in, a float32 loss out, near that of float64."""
    o, o_teacher, features, teacher_features, y = batch(generator, requires_grad=False)
    narrow = [x.to(dtype) for x in (o, o_teacher)]
    maps = [[x.to(dtype) for x in levels] for levels in (features, teacher_features)]
    loss, _ = FRSKDLoss()(*narrow, *maps, y)
    assert loss.dtype == torch.float32
    wide = [[x.double() for x in levels] for levels in maps]
    exact = transcription(*(x.double() for x in narrow), *wide, y, alpha=2, beta=100, T=4)
    torch.testing.assert_close(loss.double(), exact, rtol=3e-6, atol=0)


def test_compile(generator: torch.Generator) -> None:
    given = batch(generator)
    torch._dynamo.reset()
    found = torch.compile(lambda *x: FRSKDLoss()(*x)[0], fullgraph=True)(*given)
    expected, _ = FRSKDLoss()(*given)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(gradients(found, given), gradients(expected, given))


def test_sentences(generator: torch.Generator) -> None:
    o, o_teacher, features, teacher_features, y = batch(generator)
    sentence = "FRSKDLoss: teacher_features has 3 levels, expected those of features, 4"
    with pytest.raises(ValueError, match=f"^{sentence}"):
        FRSKDLoss()(o, o_teacher, features, teacher_features[:3], y)
    sentence = "FRSKDLoss: features or teacher_features are missing, expected at least one level"
    for missing in (None, []):
        with pytest.raises(ValueError, match=f"^{sentence}"):
            FRSKDLoss()(o, o_teacher, features, missing, y)
        with pytest.raises(ValueError, match=f"^{sentence}"):
            FRSKDLoss()(o, o_teacher, missing, teacher_features, y)
    with pytest.raises(
        ValueError, match="attention: teacher has size 4 in dimension 2, expected 8"
    ):
        FRSKDLoss()(o, o_teacher, features, teacher_features[1:] + teacher_features[:1], y)


def test_rampup() -> None:
    assert [frskd_rampup(epoch) for epoch in (0, 17, 39)] == [0, 0, 0]
    for epoch in (40, 47, 58):
        assert frskd_rampup(epoch) == pytest.approx(math.exp(-5 * (1 - (epoch + 1 - 40) / 20) ** 2))
    assert frskd_rampup(59) == frskd_rampup(70) == 1
    assert frskd_rampup(3, warmup=2, epochs=6) == sigmoid_rampup(2, 4)
    assert frskd_rampup(0, warmup=0, epochs=1) == 1
