"""The curriculum: active dimensions, in-context points and loop steps grow during training.

Each value is a pure function of the training step. It equals, step for step, that of the official
``Curriculum`` (``scripts/curriculum.py``), which counts updates instead.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NamedTuple


@dataclass(frozen=True)
class Schedule:
    """``start``, plus ``inc`` every ``interval`` training steps, up to ``end``.

    >>> [Schedule(5, 20, 1, 5000).at(step) for step in (0, 4999, 5000, 10**6)]
    [5, 5, 6, 20]
    """

    start: int
    end: int
    inc: int = 1
    interval: int = 1

    def __post_init__(self) -> None:
        if self.interval < 1:
            raise ValueError(f"interval = {self.interval}: at least 1 step is needed")
        if self.inc < 0:
            raise ValueError(f"inc = {self.inc}: a curriculum can't shrink; use inc >= 0")
        if not 1 <= self.start <= self.end:
            raise ValueError(f"start = {self.start}, end = {self.end}: 1 <= start <= end is needed")

    def at(self, step: int) -> int:
        """The value at training step ``step`` (from 0)."""
        return min(self.start + self.inc * (step // self.interval), self.end)


class Stage(NamedTuple):
    """Values of the curriculum at one training step."""

    n_dims: int
    n_points: int
    n_loops: int


@dataclass(frozen=True)
class Curriculum:
    """The three schedules of the paper (section 5, appendix on training)."""

    dims: Schedule
    points: Schedule
    loops: Schedule

    def at(self, step: int) -> Stage:
        """The stage of training step ``step`` (from 0)."""
        return Stage(self.dims.at(step), self.points.at(step), self.loops.at(step))


def learning_rate(config: Any, step: int) -> float:
    """Learning rate of step ``step`` (from 0): linear warm-up, then constant or cosine to 0.

    config: settings lr, warmup_steps, lr_decay and steps.
    """
    warmup = min(1.0, (step + 1) / config.warmup_steps) if config.warmup_steps else 1.0
    decay = 0.5 * (1 + math.cos(math.pi * step / config.steps))
    return config.lr * warmup * (decay if config.lr_decay == "cosine" else 1.0)
