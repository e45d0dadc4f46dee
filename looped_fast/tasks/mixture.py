"""Mixtures: each prompt's function is from one of two tasks."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Generator, Tensor

from looped_fast.errors import naming
from looped_fast.tasks.base import Baseline, Task
from looped_fast.tasks.options import TaskOptions
from looped_fast.tasks.registry import make_task, register, task_name


@register("mixture")
@dataclass(frozen=True)
class Mixture(Task):
    """Each prompt is from task ``first`` with probability ``share``, else from ``second``.

    Neither the model nor a baseline is told which. Both tasks see x ~ N(0, I); the curriculum
    truncates x if it does so for both.

    Attributes:
        first: name of a task, short or a path.
        second: name of the other task.
        share: share of prompts from ``first``.
        first_options: options of the first task; defaults where not given.
        second_options: options of the second.

    Raises:
        ValueError: a task or option is unknown, ``share`` is outside 0..1, or a task draws its
            points in its own way.
    """

    first: str = "lr"
    second: str = "dt"
    share: float = 0.5
    first_options: dict[str, Any] = field(default_factory=dict)
    second_options: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.share <= 1:
            raise ValueError(f"share = {self.share}: a number from 0 to 1 is needed")
        for name, task in self.components.items():
            if type(task).points is not Task.points:
                raise ValueError(
                    f"{name} = {getattr(self, name)!r} draws its points in its own way, and the "
                    f"tasks of a mixture share N(0, I); choose a task without points()"
                )
            known_as = task_name(type(task))
            object.__setattr__(self, name, known_as)
            object.__setattr__(self, f"{name}_options", TaskOptions.of(known_as, task))
        both = all(task.truncates for task in self.components.values())
        object.__setattr__(self, "truncates", both)

    @functools.cached_property
    def components(self) -> dict[str, Task]:
        """``first`` and ``second``, made."""
        made = {}
        for name in ("first", "second"):
            component = getattr(self, name)
            options = TaskOptions.fitting(getattr(self, f"{name}_options"), component)
            with naming(f"{name} = {component!r}"):
                made[name] = make_task(component, self.n_dims, **options)
        return made

    def _mean(self, first: float, second: float) -> float:
        return self.share * first + (1 - self.share) * second

    @property
    def variance(self) -> float:
        """E[y^2], the mean of both, weighted by their shares."""
        return self._mean(*(task.variance for task in self.components.values()))

    @property
    def noise_variance(self) -> float:
        """The mean of both, weighted by their shares."""
        return self._mean(*(task.noise_variance for task in self.components.values()))

    @property
    def known_baselines(self) -> tuple[str, ...]:
        """Those of both."""
        names = [name for task in self.components.values() for name in task.known_baselines]
        return tuple(dict.fromkeys(names))

    def baselines(self) -> Mapping[str, Baseline]:
        """Those of both."""
        first, second = self.components.values()
        return {**second.baselines(), **first.baselines()}

    def draw(self, n_prompts: int, n_points: int, generator: Generator) -> dict[str, Tensor]:
        """from_first: [B] bool; ``first.NAME`` and ``second.NAME``: functions of both tasks."""
        uniform = torch.rand(n_prompts, generator=generator, device=generator.device)
        function = {"from_first": uniform < self.share}
        for name, task in self.components.items():
            drawn = task.draw(n_prompts, n_points, generator)
            function |= {f"{name}.{part}": value for part, value in drawn.items()}
        return function

    def evaluate(self, xs: Tensor, **function: Tensor) -> Tensor:
        """Values of each prompt's own function. Both tasks are evaluated for all prompts."""
        first, second = (
            task.evaluate(
                xs,
                **{
                    key.removeprefix(f"{name}."): value
                    for key, value in function.items()
                    if key.startswith(f"{name}.")
                },
            )
            for name, task in self.components.items()
        )
        return torch.where(function["from_first"][:, None], first, second)
