"""``Task``, the base class of function classes: those of the package and those of its users."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Generator, Tensor

# A baseline: (xs [B, n, d], ys [B, n], queries [B, n, d] or None) -> predictions [B, n].
Baseline = Callable[..., Tensor]

# The sample that measures a variance which a class does not state: 2^15 prompts of 8 points.
_CHUNKS, _CHUNK_PROMPTS, _POINTS, _SEED = 32, 1024, 8, 0


@dataclass(frozen=True)
class Task(ABC):
    """A distribution over functions R^d -> R, and over the points at which they are seen.

    A subclass is a frozen dataclass that gives ``draw`` and ``evaluate``; its fields are its
    options (docs/tasks.md). Both methods run on the device of their arguments, without a loop over
    prompts and without a look at values on the host, so that a CUDA graph can hold them.

    Attributes:
        n_dims: d, the width of x.
        truncates: True if the curriculum zeroes trailing coordinates of x.

    Raises:
        ValueError: ``n_dims`` is below 1, or an annotated attribute is no dataclass field.
    """

    n_dims: int
    truncates: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_fields(type(self))
        self._check_at_least_one("n_dims")

    def _check_at_least_one(self, *names: str) -> None:
        for name in names:
            value = getattr(self, name)
            if value < 1:
                raise ValueError(f"{name} = {value}: at least 1 is needed")

    @abstractmethod
    def draw(self, n_prompts: int, n_points: int, generator: Generator) -> dict[str, Tensor]:
        """Draw one function per prompt: arguments of ``evaluate``, with prompts as first axis."""

    @abstractmethod
    def evaluate(self, xs: Tensor, **function: Tensor) -> Tensor:
        """Values of the functions at xs: [B, n, d] -> [B, n]. It may be a static method."""

    def points(self, n_prompts: int, n_points: int, generator: Generator) -> Tensor:
        """Draw xs [B, n, d]: N(0, I) unless a class says otherwise."""
        return randn(n_prompts, n_points, self.n_dims, generator=generator)

    @property
    def variance(self) -> float:
        """E[y^2]: the squared error of always predicting zero, with every dimension active.

        Measured once (2^15 prompts of 8 points, fixed seed, on the CPU) where a class does not
        state it.

        Raises:
            ValueError: the measured value is zero, infinite or NaN.
        """
        return self._measured_variance

    @functools.cached_property
    def _measured_variance(self) -> float:
        generator, total = Generator().manual_seed(_SEED), 0.0
        for _ in range(_CHUNKS):
            xs = self.points(_CHUNK_PROMPTS, _POINTS, generator)
            function = self.draw(_CHUNK_PROMPTS, _POINTS, generator)
            total += self.evaluate(xs, **function).double().square().mean().item()
        measured = total / _CHUNKS
        if not (measured > 0 and math.isfinite(measured)):
            raise ValueError(
                f"{self}: E[y^2] was measured as {measured}, and errors are divided by it; a "
                f"number above 0 is needed. Correct draw and evaluate, or state the variance"
            )
        return measured

    @property
    def known_baselines(self) -> tuple[str, ...]:
        """Names of the library's baselines that an evaluation compares with."""
        return ("least squares", "3-nearest neighbours", "averaging")

    @property
    def noise_variance(self) -> float:
        """The part of E[y^2] that is noise: the penalty of ``ridge`` among known baselines."""
        return 0.0

    def baselines(self) -> Mapping[str, Baseline]:
        """Baselines of the task's own, by name, besides ``known_baselines``.

        Each takes xs [B, n, d], ys [B, n] and queries [B, n, d] (None: xs), and returns
        predictions [B, n]; that at position i sees the points before i alone.
        """
        return {}

    @property
    def options(self) -> dict[str, Any]:
        """The values of the fields besides ``n_dims``."""
        return {f.name: getattr(self, f.name) for f in option_fields(type(self))}


def option_fields(task: type[Task]) -> list[dataclasses.Field]:
    """The fields that are options: all but ``n_dims``."""
    return [f for f in dataclasses.fields(task) if f.init and f.name != "n_dims"]


def check_fields(task: type[Task]) -> None:
    """Raise ValueError for an annotated attribute that is no field: its class has no decorator."""
    known = task.__dataclass_fields__  # class variables, too
    for cls in task.__mro__:
        for name in inspect.get_annotations(cls) if issubclass(cls, Task) else ():
            if name not in known:
                raise ValueError(
                    f"{cls.__qualname__}.{name} is annotated, but it is no field of the task; put "
                    f"@dataclass(frozen=True) before class {cls.__qualname__}"
                )


def randn(*shape: int, generator: Generator) -> Tensor:
    """Standard normal numbers on the device of ``generator``."""
    return torch.randn(shape, generator=generator, device=generator.device)
