"""The function classes of the paper: prompts of (x, f(x)) with a fresh f for each prompt.

Distributions are those of the official ``scripts/tasks.py``. There, trees and sparse weights are
drawn and evaluated in Python loops over the batch; here nothing loops over prompts.
"""

from __future__ import annotations

import dataclasses
import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Generator, Tensor

from looped_fast.errors import check_name, unknown_name


@dataclass(frozen=True)
class Task(ABC):
    """A distribution over functions R^d -> R, and over the points at which they are seen.

    Attributes:
        n_dims: d, the width of x.
    """

    n_dims: int
    truncates: ClassVar[bool] = True  # the curriculum zeroes trailing coordinates of x

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.type == "int" and value < 1:
                raise ValueError(f"{field.name} = {value}: at least 1 is needed")

    @property
    @abstractmethod
    def variance(self) -> float:
        """E[y^2]: the squared error of always predicting zero, with every dimension active."""

    @abstractmethod
    def draw(self, n_prompts: int, n_points: int, generator: Generator) -> dict[str, Tensor]:
        """Draw one function per prompt: arguments of ``evaluate``, with prompts as first axis."""

    @staticmethod
    @abstractmethod
    def evaluate(xs: Tensor, **function: Tensor) -> Tensor:
        """Values of the functions at xs: [B, n, d] -> [B, n]."""


@dataclass(frozen=True)
class LinearRegression(Task):
    """y = w·x, w ~ N(0, I_d)."""

    @property
    def variance(self) -> float:
        """E[y^2] = d."""
        return self.n_dims

    def draw(self, n_prompts: int, n_points: int, generator: Generator) -> dict[str, Tensor]:
        """w: [B, d, 1]."""
        return {"w": randn(n_prompts, self.n_dims, 1, generator=generator)}

    @staticmethod
    def evaluate(xs: Tensor, **function: Tensor) -> Tensor:
        """x·w."""
        return (xs @ function["w"]).sum(-1)


@dataclass(frozen=True)
class NoisyLinearRegression(LinearRegression):
    """y = w·x + noise, noise ~ N(0, noise_std^2)."""

    noise_std: float = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.noise_std >= 0:
            raise ValueError(f"noise_std = {self.noise_std}: at least 0 is needed")

    @property
    def variance(self) -> float:
        """E[y^2] = d + noise_std^2."""
        return self.n_dims + self.noise_std**2

    def draw(self, n_prompts: int, n_points: int, generator: Generator) -> dict[str, Tensor]:
        """w: [B, d, 1]; noise: [B, n]."""
        function = super().draw(n_prompts, n_points, generator)
        noise = randn(n_prompts, n_points, generator=generator)
        return {**function, "noise": noise * self.noise_std}

    @staticmethod
    def evaluate(xs: Tensor, **function: Tensor) -> Tensor:
        """x·w + noise."""
        return LinearRegression.evaluate(xs, w=function["w"]) + function["noise"][:, : xs.shape[1]]


@dataclass(frozen=True)
class SparseLinearRegression(LinearRegression):
    """y = w·x, w ~ N(0, I_d) on ``sparsity`` coordinates chosen at random, 0 elsewhere."""

    sparsity: int = 3

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.sparsity > self.n_dims:
            raise ValueError(
                f"sparsity = {self.sparsity} exceeds n_dims = {self.n_dims}; lower sparsity"
            )

    @property
    def variance(self) -> float:
        """E[y^2] = sparsity."""
        return self.sparsity

    def draw(self, n_prompts: int, n_points: int, generator: Generator) -> dict[str, Tensor]:
        """w: [B, d, 1]."""
        w = super().draw(n_prompts, n_points, generator)["w"]
        order = torch.rand(w.shape, generator=generator, device=generator.device)
        kept = order.topk(self.sparsity, dim=1).indices  # [B, s, 1]
        return {"w": torch.zeros_like(w).scatter(1, kept, w.gather(1, kept))}


@dataclass(frozen=True)
class Relu2LayerNetwork(Task):
    """y = sqrt(2 / h) W2·relu(W1·x), all weights ~ N(0, 1), h = ``hidden``."""

    hidden: int = 100

    @property
    def variance(self) -> float:
        """E[y^2] = (2 / h) * h * d / 2 = d."""
        return self.n_dims

    def draw(self, n_prompts: int, n_points: int, generator: Generator) -> dict[str, Tensor]:
        """W1: [B, d, h]; W2: [B, h, 1]."""
        return {
            "W1": randn(n_prompts, self.n_dims, self.hidden, generator=generator),
            "W2": randn(n_prompts, self.hidden, 1, generator=generator),
        }

    @staticmethod
    def evaluate(xs: Tensor, **function: Tensor) -> Tensor:
        """sqrt(2 / h) W2·relu(W1·x)."""
        hidden = torch.relu(xs @ function["W1"])  # [B, n, h]
        return (hidden @ function["W2"])[:, :, 0] * math.sqrt(2 / hidden.shape[-1])


@dataclass(frozen=True)
class DecisionTree(Task):
    """A complete binary tree: each inner node asks whether one coordinate is positive.

    Inner nodes and leaves are numbered level by level; a positive coordinate goes right. Leaf
    values ~ N(0, 1), coordinates uniform. As in the official code the curriculum does not
    truncate x here.
    """

    depth: int = 4
    truncates: ClassVar[bool] = False

    @property
    def variance(self) -> float:
        """E[y^2] = 1."""
        return 1.0

    def draw(self, n_prompts: int, n_points: int, generator: Generator) -> dict[str, Tensor]:
        """coordinates: [B, 2^depth - 1] int64, of inner nodes; leaf_values: [B, 2^depth]."""
        shape = (n_prompts, 2**self.depth - 1)
        device = generator.device
        return {
            "coordinates": torch.randint(self.n_dims, shape, generator=generator, device=device),
            "leaf_values": randn(n_prompts, 2**self.depth, generator=generator),
        }

    @staticmethod
    def evaluate(xs: Tensor, **function: Tensor) -> Tensor:
        """The value of the leaf that each x reaches.

        Raises:
            ValueError: the numbers of leaves and inner nodes are not those of a complete tree.
        """
        coordinates, leaf_values = function["coordinates"], function["leaf_values"]
        n_leaves, n_inner = leaf_values.shape[1], coordinates.shape[1]
        depth = n_leaves.bit_length() - 1
        if depth < 1 or n_leaves != 2**depth or n_inner != n_leaves - 1:
            raise ValueError(
                f"leaf_values of width {n_leaves} and coordinates of width {n_inner} do not make a "
                "complete binary tree; give 2^depth leaf values (2, 4, 8, ...) and one coordinate "
                "fewer"
            )
        root = coordinates[:, :1].expand(-1, xs.shape[1])  # [B, n]
        node = (xs.gather(2, root.unsqueeze(-1)).squeeze(-1) > 0).long()  # index within its level
        for level in range(1, depth):
            coordinate = coordinates[:, 2**level - 1 :].gather(1, node)
            is_positive = xs.gather(2, coordinate.unsqueeze(-1)).squeeze(-1) > 0
            node = torch.add(is_positive, node, alpha=2)
        return leaf_values.gather(1, node)


TASKS: dict[str, type[Task]] = {
    "lr": LinearRegression,
    "noisy_lr": NoisyLinearRegression,
    "sparse_lr": SparseLinearRegression,
    "dt": DecisionTree,
    "relu_2nn": Relu2LayerNetwork,
}

# Names in the official configurations (``training.task_name``).
OFFICIAL_TASK_NAMES = {
    "linear_regression": "lr",
    "noisy_linear_regression": "noisy_lr",
    "sparse_linear_regression": "sparse_lr",
    "decision_tree": "dt",
    "relu_2nn_regression": "relu_2nn",
}


def task_options(name: str) -> list[str]:
    """The settings of task ``name`` besides ``n_dims``.

    Raises:
        ValueError: unknown task; the message suggests the nearest valid name.
    """
    check_name("task", name, TASKS)
    return [f.name for f in dataclasses.fields(TASKS[name]) if f.name != "n_dims"]


def make_task(name: str, n_dims: int, **options: float) -> Task:
    """Make a task by its short name, such as ``make_task("dt", n_dims=20, depth=4)``.

    Raises:
        ValueError: unknown task or option, or an option out of range.
    """
    valid = task_options(name)
    for option in options:
        if option not in valid:
            if not valid:
                raise ValueError(f"task {name!r} has no setting {option!r}, nor any other")
            raise unknown_name(f"setting of task {name!r}", option, valid)
    return TASKS[name](n_dims, **options)


def randn(*shape: int, generator: Generator) -> Tensor:
    """Standard normal numbers on the device of ``generator``."""
    return torch.randn(shape, generator=generator, device=generator.device)
