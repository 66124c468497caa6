"""What a study is made of: settings that are trained, what is measured of each, what is claimed."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Setting:
    """One way to train in one task; `options` are for the study's `run`."""

    task: str
    name: str
    options: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Metric:
    """What a number is, how many digits of it count, and which way is better."""

    title: str
    digits: int = 1
    higher: bool | None = True  # None: neither is better
    group: str = "accuracy"  # metrics that stand in one table


@dataclass(frozen=True)
class Claim:
    """That a setting is better than another in a metric of a task."""

    text: str
    name: str
    against: str
    task: str
    metric: str


@dataclass(frozen=True)
class Study:
    """A grid, written down before it is run."""

    name: str
    title: str
    tasks: Mapping[str, str]  # in words
    metrics: Mapping[str, Metric]
    headline: str  # the setting that is the paper's method
    baselines: tuple[str, ...]  # every difference is to one of these
    grid: list[Setting]
    claims: list[Claim]
    drawn: tuple[str, ...]  # metrics of the picture
    run: Callable[[Setting, int, float], dict[str, float]]  # of setting, seed, part of the epochs
    references: tuple[str, ...] = ()  # settings that nobody chooses: what others are held against

    def __post_init__(self) -> None:
        named = {(x.task, x.name) for x in self.grid}
        if len(named) != len(self.grid):
            raise ValueError(f"{self.name}: two settings of one task have one name")
        for task in self.tasks:
            if not {(task, self.headline), (task, self.baselines[0])} <= named:
                raise ValueError(f"{self.name}: {task} lacks the headline or the first baseline")
        for claim in self.claims:
            for name in (claim.name, claim.against):
                if (claim.task, name) not in named:
                    raise ValueError(f"{self.name}: {claim.text}: no {name} in {claim.task}")
