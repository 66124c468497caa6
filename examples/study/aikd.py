"""AI-KD (after the abstract of arXiv 2211.10938): a pre-trained network, the previous epoch, a game."""

from __future__ import annotations

import functools
from typing import Any

import torch
from selfkd.nn import AIKDLoss, Discriminator, PreviousEpoch

from . import data, metrics, train
from .grid import Claim, Setting, Study

CE, LONGER = "cross-entropy", "cross-entropy, twice the epochs"
PRETRAINED, PREVIOUS, BOTH = "pre-trained alone", "previous epoch alone", "both"
GAME, ALL = "discriminator alone", "both, with the discriminator"


def weights(pretrained: float, previous: float, adversarial: float) -> dict[str, float]:
    return {
        "pretrained_weight": pretrained,
        "previous_weight": previous,
        "adversarial_weight": adversarial,
    }


WAYS: dict[str, dict[str, Any]] = {  # the weights are ours: the paper's are not known
    CE: {},
    LONGER: {"longer": 2},
    PRETRAINED: {"weights": weights(1, 0, 0)},
    PREVIOUS: {"weights": weights(0, 1, 0)},
    BOTH: {"weights": weights(1, 1, 0)},
    GAME: {"weights": weights(0, 0, 0.1)},
    ALL: {"weights": weights(1, 1, 0.1)},
}
TASKS = ("few", "wrong20")


@functools.lru_cache(2)
def pretrained(task: str, seed: int, part: float) -> train.Network:
    """Train the network of the same task that the student learns from."""
    split = data.split(task, seed)
    return train.plain(
        split.images, split.labels, train.epochs_of(split.labels, part), seed=seed + 1000
    )


def fit(setting: Setting, split: data.Split, seed: int, part: float) -> train.Network:
    """Train a student as the options say."""
    options = setting.options
    epochs = train.epochs_of(split.labels, options.get("longer", 1) * part)
    if "weights" not in options:
        return train.plain(split.images, split.labels, epochs, seed)
    teacher = pretrained(setting.task, seed, part)
    torch.manual_seed(seed)
    student, judge = train.Network(), Discriminator(data.CLASSES, (64, 64))
    criterion = AIKDLoss(judge, **options["weights"])
    previous = PreviousEpoch(len(split.labels), data.CLASSES)
    judging = torch.optim.SGD(judge.parameters(), lr=0.05, momentum=0.9)
    for epoch, index in train.training([student], len(split.labels), epochs, seed):
        if epoch > previous.epochs:
            previous.end_epoch()
        images, labels = split.images[index], split.labels[index]
        logits, known = student(images), teacher(images)
        loss, _ = criterion(logits, known, previous.lookup(index), labels)
        previous.update(index, logits)
        loss.backward()
        if criterion.adversarial_weight:
            criterion.discriminator_loss(logits, known).backward()
            judging.step()
            judging.zero_grad()
    return student


def run(setting: Setting, seed: int, part: float) -> dict[str, float]:
    """Train and measure."""
    split = data.split(setting.task, seed)
    return metrics.evaluate(fit(setting, split, seed, part), split, seed)


better = functools.partial(Claim, task="few", metric="accuracy")
STUDY = Study(
    name="aikd",
    title="AI-KD",
    tasks={task: data.IN_WORDS[task] for task in TASKS},
    metrics=metrics.CLASSIFICATION,
    headline=ALL,
    baselines=(CE, LONGER),
    grid=[Setting(task, *pair) for task in TASKS for pair in WAYS.items()],
    claims=[
        better("It generalises better", ALL, CE),
        better("... than twice the epochs, which pre-training costs", ALL, LONGER),
        better("... 20 % wrong labels", ALL, CE, task="wrong20"),
        better("The pre-trained network alone helps", PRETRAINED, CE),
        better("The previous epoch alone helps", PREVIOUS, CE),
        better("Both are better than the pre-trained network alone", BOTH, PRETRAINED),
        better("Both are better than the previous epoch alone", BOTH, PREVIOUS),
        better("The discriminator helps beside both", ALL, BOTH),
        better("It is better calibrated", ALL, CE, metric="ece"),
    ],
    drawn=("accuracy", "ece", "fgsm", "spliced"),
    run=run,
)
