"""The study of `examples/study`: its numbers by hand, its data, its grids."""

from __future__ import annotations

import importlib
import sys
import time
from types import SimpleNamespace

import harness
import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT
from selfkd.bench import study

sys.path.append(str(ROOT / "examples"))
data, detector, frskd, metrics, run, sd_dropout, train = (
    importlib.import_module(f"study.{name}")
    for name in ("data", "detector", "frskd", "metrics", "run", "sd_dropout", "train")
)
self_teacher = importlib.import_module("self_teacher")
pytestmark = pytest.mark.skipif(
    bool(harness.SIMT_LIBRARY), reason="the emulator has no PyTorch binding"
)


# ---- numbers ----


def test_calibration_error() -> None:
    """Of two rows of 0.9, one right, and two of 0.6, both right: (0.8 + 0.8) / 4."""
    confidence = torch.tensor([0.9, 0.9, 0.6, 0.6], dtype=torch.double)
    logits = torch.stack([confidence, 1 - confidence], 1).log()
    labels = torch.tensor([0, 1, 0, 0])
    assert metrics.calibration_error(logits, labels) == pytest.approx(0.4)
    assert metrics.calibration_error(100 * logits, torch.zeros(4).long()) == pytest.approx(0)
    # In one bin the four gaps add up to 4 * |3/4 - 3/4| = 0.
    assert metrics.calibration_error(logits, labels, bins=1) == pytest.approx(0)


def test_fitted_temperature() -> None:
    """Three of four rows are of the class that leads by 6: the best T makes that log 3."""
    logits = torch.tensor([[6.0, 0.0]] * 4)
    assert metrics.fitted_temperature(logits, torch.tensor([0, 0, 0, 1])) == pytest.approx(
        6 / torch.tensor(3.0).log().item(), rel=1e-6
    )


def test_auroc_counts_pairs() -> None:
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randint(20, (2, 50), generator=generator).double()  # many ties
    above, same = (a[:, None] > b).double().mean(), (a[:, None] == b).double().mean()
    assert metrics.auroc(a, b[:30]) != metrics.auroc(a, b)
    assert metrics.auroc(a, b) == pytest.approx((above + same / 2).item())


def test_attacks_move_along_the_sign() -> None:
    """Of a linear model the slope is known: that of the other class' weights less the label's."""
    weight = torch.tensor([[1.0, -1.0, 2.0, 0.5], [-1.0, 1.0, -2.0, 1.0]])
    images, labels = torch.full((3, 1, 2, 2), 0.5), torch.tensor([0, 1, 0])
    images[0, 0, 0, 0] = 0.02  # a step to below 0 is cut off
    sign = (weight[1 - labels] - weight[labels]).sign().view(3, 1, 2, 2)
    expected = (images + 0.1 * sign).clamp(0, 1)

    def model(x: torch.Tensor) -> torch.Tensor:
        return x.flatten(1) @ weight.T

    torch.testing.assert_close(metrics.fgsm(model, images, labels), expected)
    torch.testing.assert_close(metrics.pgd(model, images, labels), expected)
    one = metrics.pgd(model, images, labels, steps=1)
    torch.testing.assert_close(one, (images + 0.025 * sign).clamp(0, 1))


def test_odin_moves_towards_its_class() -> None:
    """Of a linear model the slope is known: the weights of the likeliest class less their mean by
    the probabilities of logits / T; an epsilon of 0 and a T of 1 leave the largest probability."""
    weight = torch.tensor([[1.0, -1.0, 2.0, 0.5], [-1.0, 1.0, -2.0, 1.0], [0.0, 2.0, 1.0, -3.0]])
    images = torch.rand(5, 1, 2, 2, generator=torch.Generator().manual_seed(0))

    def model(x: torch.Tensor) -> torch.Tensor:
        return x.flatten(1) @ weight.T

    probability = (model(images) / 7).softmax(1)
    sign = (weight[probability.argmax(1)] - probability @ weight).sign().view(images.shape)
    expected = (model(images + 0.01 * sign).double() / 7).softmax(1).max(1).values.log()
    torch.testing.assert_close(metrics.odin(model, images, 7, 0.01), expected)
    plain = metrics.confidence(model, images)
    torch.testing.assert_close(metrics.odin(model, images, 1, 0), plain)
    assert (metrics.odin(model, images, 1) > plain).all()


def test_the_page_says_what_odin_is_given() -> None:
    text = " ".join((ROOT / "docs" / "study.md").read_text().split())
    assert f"logits over {metrics.ODIN_TEMPERATURE:,.0f}," in text
    assert f"moved by {metrics.ODIN_EPSILON} " in text


def test_mean_iou() -> None:
    """Class 0: 1 of 3 pixels; class 1: 1 of 3; class 2 does not occur; one pixel does not count."""
    labels = torch.tensor([[[0, 0], [1, 1]], [[self_teacher.IGNORED] * 2] * 2])
    found = torch.tensor([[[0, 1], [1, 0]], [[2, 2], [2, 2]]])
    images = SimpleNamespace(held_out_images=found, held_out_labels=labels, classes=3)
    model = SimpleNamespace(eval=lambda: lambda x: F.one_hot(x, 3).movedim(-1, 1))
    assert self_teacher.mean_iou(images, model) == pytest.approx(1 / 3)


def test_average_precision() -> None:
    """Right at ranks 1 and 3 of three to be found: (1 + 2/3) / 3."""
    scores, right = torch.tensor([0.2, 0.9, 0.5, 0.4]), torch.tensor([False, True, False, True])
    assert detector.average_precision(scores, right, 3) == pytest.approx((1 + 2 / 3) / 3)


def test_mean_average_precision() -> None:
    """What says the truth finds all of it; boxes half a digit away overlap by a third."""
    _, tested = detector.scenes(0)
    assert detector.overlap(torch.zeros(2), torch.tensor([0.0, 4.0])) == pytest.approx(1 / 3)
    logits = 20 * F.one_hot(tested.classes, data.CLASSES + 1).movedim(-1, 1).float()
    found = detector.mean_average_precision
    assert found(logits, tested.offsets, tested) == pytest.approx(100)
    assert found(logits, tested.offsets + 1, tested) < 1  # four pixels down and to the right
    assert found(logits.roll(1, 1), tested.offsets, tested) < 10


def test_t_quantile() -> None:
    stats = pytest.importorskip("scipy.stats", reason="there is no scipy: pip install scikit-learn")
    for freedom in (1, 2, 3, 4, 9, 10, 29):
        for share in (0.5, 0.95, 0.99):
            expected = stats.t.ppf(0.5 + share / 2, freedom)
            assert study.t_quantile(freedom, share) == pytest.approx(expected, rel=1e-9)


def test_difference_is_of_pairs() -> None:
    """Differences 1, 2, 3: mean 2, deviation 1, error 1 / sqrt(3), t of two degrees 4.303."""
    d = study.difference([11, 22, 33], [10, 20, 30])
    assert (d.mean, d.error) == pytest.approx((2, 3**-0.5))
    assert d.half == pytest.approx(4.30265 * 3**-0.5, rel=1e-5)
    assert not d.counts
    assert study.difference([11, 22, 33], [10, 21, 31.9]).counts
    assert not study.difference([1], [0]).counts


# ---- data ----


@pytest.mark.parametrize("task", data.TASKS)
def test_labels_are_few_or_wrong(task: str) -> None:
    count, share = data.TASKS[task]
    split = data.split(task, 3)
    wrong = split.labels != split.pool_labels[:count]
    assert (len(split.labels), wrong.double().mean().item()) == (count, pytest.approx(share))
    assert split.labels.max() < data.CLASSES
    torch.testing.assert_close(split.images, split.pool[:count])
    parts = [split.pool, split.validation, split.test]
    assert sum(map(len, parts)) == len(data.digits()[0])
    again = torch.cat(parts).flatten(1).sum(1).sort().values
    torch.testing.assert_close(again, data.digits()[0].flatten(1).sum(1).sort().values)
    assert not torch.equal(split.test, data.split(task, 4).test)


def test_other_test_images() -> None:
    split, generator = data.split("few", 0), torch.Generator().manual_seed(0)
    images, labels = split.test, split.test_labels
    for corrupt in data.CORRUPTIONS.values():
        found = corrupt(images, generator)
        assert found.shape == images.shape
        assert 0 <= found.min() <= found.max() <= 1
        assert not torch.equal(found, images)
    inner = torch.zeros_like(images)
    inner[..., 3, 4] = 1
    moved = data.shifted(inner, generator).flatten(1).argmax(1)
    assert set(moved.tolist()) == {2 * 8 + 4, 4 * 8 + 4, 3 * 8 + 3, 3 * 8 + 5}
    joined = data.spliced(images, labels, generator)
    torch.testing.assert_close(joined[..., :4], images[..., :4])
    right = (joined[:, None, 0, :, 4:] == images[None, :, 0, :, 4:]).flatten(2).all(2)
    assert right.any(1).all()
    assert not (right & (labels[:, None] == labels)).all(1).any()
    assert data.patches(7, generator).shape == (7, 1, 8, 8)


@pytest.mark.parametrize("mix", frskd.MIXES)
def test_mixed_images(mix: str) -> None:
    """The label's share is that of the image."""
    images = torch.arange(6.0).view(6, 1, 1, 1).expand(6, 1, 8, 8)
    found, (a, b, share) = frskd.mixed(
        images, torch.arange(6), mix, torch.Generator().manual_seed(1)
    )
    torch.testing.assert_close(found.mean((1, 2, 3)), share * a + (1 - share) * b)
    assert 0 < share < 1


# ---- grids ----


def test_the_steps_are_those_of_sgd() -> None:
    """Every image once an epoch, but for a batch that is not full; at half the steps half the rate."""
    layer = torch.nn.Linear(1, 1, bias=False)
    seen: list[list[int]] = [[], []]
    weights = []
    for epoch, index in train.training([layer], 7, 2, 0, batch=3, decay=0):
        seen[epoch] += index.tolist()
        weights.append(layer.weight.item())
        if len(weights) in (1, 3):
            layer.weight.sum().backward()
    assert [len(set(x)) for x in seen] == [6, 6]
    first, after, halfway, then = weights
    assert first - after == pytest.approx(0.05, rel=1e-4)
    assert after - halfway == 0  # nothing was left to step with
    assert halfway - then == pytest.approx(0.025 * (1 + 0.9), rel=1e-4)


def test_a_step_takes_processor_time() -> None:
    """What the caller computes between two batches belongs to a step; waiting does not."""
    for _ in range(2):  # those of the last training alone
        for _, index in train.training([torch.nn.Linear(1, 1)], 2, 1, 0, batch=1):
            begun = time.process_time()
            time.sleep(0.2)
            while index == 0 and time.process_time() < begun + 0.05:
                pass
    short, long = sorted(train.step_seconds)
    assert short < 0.04 < 0.05 <= long < 0.2


@pytest.mark.parametrize("name", run.STUDIES)
def test_the_first_setting_of_each_grid_runs(name: str) -> None:
    found = run.STUDIES[name]
    values = found.run(found.grid[0], 0, 0.01)
    assert values.keys() == found.metrics.keys()
    assert all(value == value for value in values.values())  # no NaN


@pytest.mark.full
@pytest.mark.parametrize("name", run.STUDIES)
def test_every_setting_of_each_grid_runs(name: str) -> None:
    found = run.STUDIES[name]
    for setting in found.grid:
        assert found.run(setting, 0, 0.02).keys() == found.metrics.keys(), setting


def test_hosts_without_weight_are_cross_entropy() -> None:
    """Every way of SD-Dropout's study has the cross-entropy's loss once its own terms are 0."""
    split, index = data.split("few", 0), torch.arange(50)
    losses = []
    for options in (
        *({}, {"dropout": 0.0}, {"smoothing": 0.0}, {"cskd": 0.0}, {"pskd": 0.0}),
        *({"sdd": {"p": 0.0}}, {"sdd": {"kl_weight": 0}}),
    ):
        torch.manual_seed(0)
        method = sd_dropout.Method(train.Network(), split, options)
        losses.append(method.loss(index, 0, 10).item())
    assert losses == pytest.approx([losses[0]] * len(losses), rel=1e-5)
