"""FRSKD's loss against a plain transcription of the authors' code, its gradients, its schedule."""

from __future__ import annotations

import math
from typing import Any

import harness
import numpy as np
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
    y: Any,
    *,
    alpha: float,
    beta: float,
    T: float,
    ignore_index: int = -100,
    smoothing: float = 0.0,
) -> torch.Tensor:
    """CE(o, y) + CE(o', y) + alpha L_KD(o, sg o') + beta sum_i L_F(F_i, sg T_i).

    y may be (y_a, y_b, lam), whose cross-entropies are lam CE(y_a) + (1 - lam) CE(y_b).
    """

    def phi(x: torch.Tensor) -> torch.Tensor:
        return F.normalize(x.pow(2).mean(1).view(x.size(0), -1))

    def ce_of(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(x, y, ignore_index=ignore_index, label_smoothing=smoothing)

    y_a, y_b, lam = y if isinstance(y, tuple) else (y, y, 1.0)
    ce = sum(lam * ce_of(x, y_a) + (1 - lam) * ce_of(x, y_b) for x in (o, o_teacher))
    p = F.softmax(o_teacher.detach() / T, 1)
    rows = o.numel() // o.shape[1]
    kd = T**2 * F.kl_div(F.log_softmax(o / T, 1), p, reduction="sum") / rows
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


# ---- mixed images and probabilities ----


def check_mixed(given: Any, criterion: FRSKDLoss, **options: Any) -> Any:
    """Value, gradients and parts against the transcription; returns the parts."""
    loss, parts = criterion(*given)
    expected = transcription(
        *given, alpha=criterion.alpha, beta=criterion.beta, T=criterion.temperature, **options
    )
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(gradients(loss, given), gradients(expected, given))
    torch.testing.assert_close(sum(parts), loss.detach())
    assert not any(part.requires_grad for part in parts)
    return parts


def mixed(given: Any, g: torch.Generator, lam: Any) -> Any:
    """The same batch with the labels of another order of the images as second ones."""
    y = given[4]
    return (*given[:4], (y, y[torch.randperm(len(y), generator=g)], lam))


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("lam", [0.3, 1.0, 0.0, np.float64(0.7), torch.tensor(0.25)], ids=str)
def test_mixup_and_cutmix(lam: Any, smoothing: float, generator: torch.Generator) -> None:
    given = mixed(batch(generator), generator, lam)
    parts = check_mixed(given, FRSKDLoss(label_smoothing=smoothing), smoothing=smoothing)
    o, o_teacher, *_, (y_a, y_b, _) = given
    lam = float(lam)
    for found, x in ((parts.ce, o), (parts.teacher_ce, o_teacher)):
        terms = [F.cross_entropy(x, y, label_smoothing=smoothing) for y in (y_a, y_b)]
        torch.testing.assert_close(found, (lam * terms[0] + (1 - lam) * terms[1]).detach())
    _, plain = FRSKDLoss(label_smoothing=smoothing)(*given[:4], y_a)
    assert (parts.kl, parts.features) == (plain.kl, plain.features)


def test_mixed_segmentation(generator: torch.Generator) -> None:
    """What is ignored of either map of labels is left out of its own mean."""
    given = mixed(batch(generator, spatial=(5, 7)), generator, 0.4)
    y_a, y_b, _ = given[4]
    y_a, y_b = y_a.clone(), y_b.clone()
    y_a[:, :2], y_b[3:, 1:4] = 255, 255
    criterion = FRSKDLoss(1, 50, 1, ignore_index=255)
    check_mixed((*given[:4], (y_a, y_b, 0.4)), criterion, ignore_index=255)


@pytest.mark.parametrize("spatial", [(), (5, 7)])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_probabilities(
    spatial: tuple[int, ...], smoothing: float, generator: torch.Generator
) -> None:
    """As F.cross_entropy takes them, also where they do not sum to 1."""
    given = batch(generator, spatial=spatial)
    p, q = (x.detach().softmax(1) for x in given[:2])
    criterion = FRSKDLoss(label_smoothing=smoothing)
    for y in (p, 0.5 * p, (p, q, 0.3), F.one_hot(given[4], 10).movedim(-1, 1).double()):
        check_mixed((*given[:4], y), criterion, smoothing=smoothing)


def test_half_logits_with_probabilities(generator: torch.Generator) -> None:
    """A float32 loss, near that of float64, as with classes."""
    o, o_teacher, *_ = batch(generator, requires_grad=False)
    p = o_teacher.softmax(1)
    loss, _ = FRSKDLoss(beta=0)(o.bfloat16(), o_teacher.bfloat16(), None, None, p)
    assert loss.dtype == torch.float32
    wide = [x.bfloat16().double() for x in (o, o_teacher)]
    exact = transcription(*wide, [], [], p, alpha=2, beta=0, T=4)
    torch.testing.assert_close(loss.double(), exact, rtol=3e-6, atol=0)


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


# ---- who learns, and what is a number ----


def test_a_self_teacher_made_under_inference_mode(generator: torch.Generator) -> None:
    """The same as from one without gradient."""
    given = batch(generator)
    o, o_teacher, features, teacher_features, y = given
    plain = (o, o_teacher.detach(), features, [x.detach() for x in teacher_features], y)
    with torch.inference_mode():
        made = (o, o_teacher.clone(), features, [x.clone() for x in teacher_features], y)
    assert made[1].is_inference()
    losses = [FRSKDLoss()(*x)[0] for x in (made, plain)]
    assert torch.equal(*losses)
    grads = [torch.autograd.grad(x, [o, *features]) for x in losses]
    assert all(torch.equal(x, y) for x, y in zip(*grads, strict=True))


@pytest.mark.parametrize("name", ["alpha", "beta", "temperature", "label_smoothing"])
def test_numbers(name: str, generator: torch.Generator) -> None:
    """Of NumPy and of a tensor they are numbers; what asks for a gradient is refused, here and when set."""
    given = batch(generator)
    expected, _ = FRSKDLoss(**{name: 0.5})(*given)
    for value in (np.float32(0.5), np.float64(0.5), torch.tensor(0.5), torch.tensor([0.5])):
        criterion = FRSKDLoss(**{name: value})
        assert torch.equal(criterion(*given)[0], expected)
        criterion = FRSKDLoss()
        setattr(criterion, name, value)
        assert torch.equal(criterion(*given)[0], expected)
    learned = torch.nn.Parameter(torch.tensor(0.5))
    sentence = (
        f"^FRSKDLoss: {name} requires grad, expected one without, as it would get no gradient here; detach"
        rf" it \({name}.detach\(\)\), or compose the loss of selfkd.reference.distill and selfkd.reference."
    )
    with pytest.raises(ValueError, match=sentence):
        FRSKDLoss(**{name: learned})
    criterion = FRSKDLoss()
    with pytest.raises(TypeError, match=f"^FRSKDLoss: {name} is True, expected a number"):
        FRSKDLoss(**{name: True})
    del criterion.__dict__[name]  # a module keeps a parameter elsewhere
    setattr(criterion, name, learned)
    op = "FRSKDLoss" if name in ("alpha", "beta") else "distill"
    with pytest.raises(ValueError, match=f"^{op}: {name} requires grad, expected one without"):
        criterion(*given)
    with pytest.raises(ValueError, match=f": {name} requires grad, expected one without"):
        criterion(*given[:4], given[0].detach().softmax(1))


def test_ramp_and_lam(generator: torch.Generator) -> None:
    given = batch(generator)
    expected, _ = FRSKDLoss()(*given, ramp=0.5)
    for value in (np.float32(0.5), torch.tensor(0.5)):
        assert torch.equal(FRSKDLoss()(*given, ramp=value)[0], expected)
    learned = torch.tensor(0.5, requires_grad=True)
    with pytest.raises(ValueError, match=r"^FRSKDLoss: ramp requires grad, expected one without"):
        FRSKDLoss()(*given, ramp=learned)
    with pytest.raises(ValueError, match=r"^FRSKDLoss: lam requires grad, expected one without"):
        FRSKDLoss()(*mixed(given, generator, learned))


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ({"alpha": -1}, "alpha is -1, expected a finite number >= 0"),
        ({"beta": math.nan}, "beta is nan, expected a finite number >= 0"),
        ({"temperature": 0}, "temperature is 0, expected a finite number > 0"),
        ({"label_smoothing": 1.5}, "label_smoothing is 1.5, expected a number from 0 to 1"),
        ({"ignore_index": 2.5}, "ignore_index is the number 2.5, expected a whole number"),
    ],
)
def test_numbers_out_of_range(given: dict[str, Any], sentence: str) -> None:
    with pytest.raises((ValueError, TypeError), match=f"^FRSKDLoss: {sentence}"):
        FRSKDLoss(**given)


def test_a_level_alone(generator: torch.Generator) -> None:
    """A tensor is a list of one."""
    o, o_teacher, features, teacher_features, y = batch(generator)
    found, _ = FRSKDLoss()(o, o_teacher, features[0], teacher_features[0], y)
    expected, _ = FRSKDLoss()(o, o_teacher, features[:1], teacher_features[:1], y)
    assert torch.equal(found, expected)
    with pytest.raises(
        ValueError, match="teacher_features has 4 levels, expected those of features, 1"
    ):
        FRSKDLoss()(o, o_teacher, features[0], teacher_features, y)


def test_compile(generator: torch.Generator) -> None:
    given = batch(generator)
    torch._dynamo.reset()
    found = torch.compile(lambda *x: FRSKDLoss()(*x)[0], fullgraph=True)(*given)
    expected, _ = FRSKDLoss()(*given)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(gradients(found, given), gradients(expected, given))


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compile_mixed(backend: str, generator: torch.Generator) -> None:
    """Every step has another share: neither an earlier one nor a graph for each."""
    criterion = FRSKDLoss()
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compiled = torch.compile(lambda *x: criterion(*x)[0], fullgraph=True, backend=backend)
    for share in torch.rand(10, generator=generator).tolist():
        given = mixed(batch(generator), generator, share)
        found, expected = compiled(*given), criterion(*given)[0]
        torch.testing.assert_close(found, expected)
        torch.testing.assert_close(gradients(found, given), gradients(expected, given))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 2


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
    for wrong, sentence in (
        ((y, y), r"target has 2 entries, expected a tensor or \(y_a, y_b, lam\)"),
        ((y, None, 0.5), "y_b is None, expected a tensor"),
        (([1], y, 0.5), "y_a is a list, expected a tensor"),
        (y.numpy(), r"target is a NumPy array, expected a tensor \(torch.from_numpy\(x\)\)"),
        (None, "target is None, expected a tensor"),
        ((y, y, 1.5), "lam is 1.5, expected a number from 0 to 1"),
        ((y, y, torch.rand(6)), r"lam has shape \(6,\), expected a number"),
        ((y, y, None), "lam is None, expected a number"),
    ):
        with pytest.raises((ValueError, TypeError), match=f"^FRSKDLoss: {sentence}"):
            FRSKDLoss()(o, o_teacher, features, teacher_features, wrong)
    with pytest.raises(TypeError, match=r"^distill: target has dtype float64, expected int64"):
        FRSKDLoss()(o, o_teacher, features, teacher_features, y.double())
    sentence = "FRSKDLoss: ignore_index is 255, expected -100 with a target of probabilities"
    with pytest.raises(ValueError, match=f"^{sentence}"):
        FRSKDLoss(ignore_index=255)(o, o_teacher, features, teacher_features, o.detach().softmax(1))
    named = {"features": features, "teacher_features": teacher_features}
    for name, levels in named.items():
        for wrong, found in (
            (
                dict(enumerate(levels)),
                f"{name} is a dict, expected a tensor, a list of tensors or None",
            ),
            ([*levels[:3], None], rf"{name}\[3\] is None, expected a tensor"),
            ("maps", f'{name} is the string "maps", expected a tensor, a list of tensors or None'),
        ):
            with pytest.raises(TypeError, match=f"^FRSKDLoss: {found}"):
                FRSKDLoss()(o, o_teacher, **named | {name: wrong}, target=y)
    with pytest.raises(TypeError, match=r"^FRSKDLoss: teacher_logits is None, expected a tensor"):
        FRSKDLoss()(o, None, features, teacher_features, y)
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
