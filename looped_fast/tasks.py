"""The function classes of the paper: prompts of (x, f(x)) with a fresh f for each prompt.

Distributions are those of the official ``scripts/tasks.py``. There, trees and sparse weights are
drawn and evaluated in Python loops over the batch; here nothing loops over prompts. A batch is a
pure function of (seed, step, rank) on a given kind of device, so a resumed or repeated training
sees the same data. (PyTorch's CPU and GPU generators give different numbers for one seed.)
"""

from __future__ import annotations

import dataclasses
import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Generator, Tensor

from looped_fast.errors import unknown_name


class Batch(NamedTuple):
    """Prompts: xs [B, n, d] and ys [B, n], float32."""

    xs: Tensor
    ys: Tensor


@dataclass(frozen=True)
class Task(ABC):
    """A distribution over functions R^d -> R, and over the points at which they are seen.

    Attributes:
        n_dims: d, the width of x.
    """

    n_dims: int
    truncates: ClassVar[bool] = True  # whether the curriculum zeroes trailing coordinates of x

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
        """The arguments of ``evaluate`` but for xs: one function a prompt, first axis prompts."""

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
        return {"w": _randn(n_prompts, self.n_dims, 1, generator=generator)}

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
        noise = _randn(n_prompts, n_points, generator=generator)
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
            "W1": _randn(n_prompts, self.n_dims, self.hidden, generator=generator),
            "W2": _randn(n_prompts, self.hidden, 1, generator=generator),
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
            "leaf_values": _randn(n_prompts, 2**self.depth, generator=generator),
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
        node = (xs.gather(2, root.unsqueeze(-1)).squeeze(-1) > 0).long()  # number in its level
        for level in range(1, depth):
            asked = coordinates[:, 2**level - 1 :].gather(1, node)
            is_positive = xs.gather(2, asked.unsqueeze(-1)).squeeze(-1) > 0
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
    """Settings that task ``name`` has besides ``n_dims``.

    Raises:
        ValueError: unknown task; the message holds the nearest valid name.
    """
    if name not in TASKS:
        raise unknown_name("task", name, TASKS)
    return [f.name for f in dataclasses.fields(TASKS[name]) if f.name != "n_dims"]


def make_task(name: str, n_dims: int, **options: float) -> Task:
    """The task of that short name, such as ``make_task("dt", n_dims=20, depth=4)``.

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


def batch_seed(seed: int, step: int, rank: int) -> int:
    """What a generator is seeded with to draw one batch: 64 bits.

    PyTorch's CPU generator keeps only the low 32 bits of a seed. The key therefore counts up
    from a hash of (seed, rank) in odd strides: within a run no two of 2^32 steps share a batch.
    """
    key = _hash64(_hash64(seed) + rank) + step * 0x9E3779B97F4A7C15
    return key & 0xFFFFFFFFFFFFFFFF


def batch_generator(seed: int, step: int, rank: int, device: torch.device | str) -> Generator:
    """The random stream of one batch."""
    return Generator(device=device).manual_seed(batch_seed(seed, step, rank))


def sample_batch(
    task: Task,
    batch_size: int,
    n_points: int,
    *,
    seed: int,
    step: int,
    rank: int = 0,
    n_dims: int | None = None,
    device: torch.device | str = "cpu",
) -> Batch:
    """Draw the batch of (seed, step, rank): xs ~ N(0, I) [B, n, d], ys [B, n], float32.

    Args:
        task: what to draw.
        batch_size: prompts B.
        n_points: (x, y) pairs n of a prompt.
        seed: of the run.
        step: training step, or index of an evaluation batch.
        rank: of the process in a distributed run.
        n_dims: coordinates of x that are active, the others are 0 (curriculum); all by default.
        device: where the batch is drawn.

    Raises:
        ValueError: ``n_dims`` is outside 1..d.

    >>> xs, ys = sample_batch(make_task("dt", n_dims=4, depth=2), 64, 32, seed=0, step=7)
    >>> xs.shape, ys.shape
    (torch.Size([64, 32, 4]), torch.Size([64, 32]))
    """
    if n_dims is not None and not 1 <= n_dims <= task.n_dims:
        raise ValueError(f"n_dims = {n_dims} is outside 1..{task.n_dims}, the task's dimensions")
    generator = batch_generator(seed, step, rank, device)
    return draw_batch(task, batch_size, n_points, generator, n_dims)


def draw_batch(
    task: Task,
    batch_size: int,
    n_points: int,
    generator: Generator,
    n_dims: int | Tensor | None = None,
) -> Batch:
    """The next batch of ``generator``, on its device; other arguments as in ``sample_batch``.

    With ``n_dims`` in a tensor (integer, no axes, on that device) nothing here reads it on the
    host, so a CUDA graph of this call serves all its values.
    """
    return _evaluate(task, *_draw(task, batch_size, n_points, generator), n_points, n_dims)


class FixedPrompts:
    """A fixed set of N distinct prompts, visited in a new random order every epoch.

    For the paper's study of sample efficiency (section 5; official ``use_fixed_dataset``). A
    batch is a pure function of (seed, step, rank); every prompt is used once an epoch. (The
    official loop reuses a stale batch at the end of each epoch.)

    Args:
        task: what to draw.
        n_prompts: N, at least ``batch_size * world_size``; the remainder of N by that product
            sits out an epoch, other prompts in each.
        n_points: points of each prompt; batches take the first of them.
        batch_size: prompts B of a batch.
        seed: of the run.
        device: where the prompts live.
        world_size: processes that share an epoch.

    Raises:
        ValueError: fewer prompts than one step uses.
    """

    def __init__(
        self,
        task: Task,
        n_prompts: int,
        n_points: int,
        batch_size: int,
        *,
        seed: int,
        device: torch.device | str = "cpu",
        world_size: int = 1,
    ) -> None:
        per_step = batch_size * world_size
        if n_prompts < per_step:
            raise ValueError(
                f"{n_prompts} training prompts are fewer than a step uses ({per_step}); "
                f"lower batch_size or raise train_prompts"
            )
        self._task, self._n_prompts, self._batch_size, self._seed = (
            task, n_prompts, batch_size, seed,
        )  # fmt: skip
        self._world_size = world_size
        self._steps_per_epoch = n_prompts // per_step
        generator = batch_generator(seed, 0, _FIXED_PROMPTS, device)
        self._xs, self._function = _draw(task, n_prompts, n_points, generator)

    def batch(self, n_points: int, *, step: int, rank: int = 0, n_dims: int | None = None) -> Batch:
        """The batch of a training step; arguments as in ``sample_batch``.

        Raises:
            ValueError: more points than the prompts have.
        """
        return self.take(self.rows(step, rank).to(self._xs.device), n_points, n_dims)

    def rows(self, step: int, rank: int = 0) -> Tensor:
        """Numbers of the prompts in the batch of a training step: [B] int64, on the CPU."""
        epoch, position = divmod(step, self._steps_per_epoch)
        order = torch.randperm(
            self._n_prompts,
            generator=batch_generator(self._seed, epoch, _EPOCH_ORDER, "cpu"),
        )
        first = (position * self._world_size + rank) * self._batch_size
        return order[first : first + self._batch_size]

    def take(self, rows: Tensor, n_points: int, n_dims: int | Tensor | None = None) -> Batch:
        """The prompts of those ``rows`` ([B] int64, where the prompts live), as a batch.

        Raises:
            ValueError: more points than the prompts have.
        """
        if n_points > self._xs.shape[1]:
            raise ValueError(
                f"n_points = {n_points} exceeds the {self._xs.shape[1]} points of these prompts"
            )
        function = {name: value[rows] for name, value in self._function.items()}
        return _evaluate(self._task, self._xs[rows], function, n_points, n_dims)


# Streams of their own, away from the ranks of training batches.
_FIXED_PROMPTS, _EPOCH_ORDER, EVALUATION = -1, -2, -3


def _draw(
    task: Task, n_prompts: int, n_points: int, generator: Generator
) -> tuple[Tensor, dict[str, Tensor]]:
    xs = _randn(n_prompts, n_points, task.n_dims, generator=generator)
    return xs, task.draw(n_prompts, n_points, generator)


def _evaluate(
    task: Task, xs: Tensor, function: dict[str, Tensor], n_points: int, n_dims: int | Tensor | None
) -> Batch:
    xs = xs[:, :n_points]
    if task.truncates and n_dims is not None:
        # Zeroing x alone is enough: the trailing weights no longer count.
        xs = xs.masked_fill(torch.arange(task.n_dims, device=xs.device) >= n_dims, 0)
    return Batch(xs, task.evaluate(xs, **function))


def _randn(*shape: int, generator: Generator) -> Tensor:
    return torch.randn(shape, generator=generator, device=generator.device)


def _hash64(value: int) -> int:
    """splitmix64, a bijection of 64-bit integers."""
    mask = 0xFFFFFFFFFFFFFFFF
    value = (value + 0x9E3779B97F4A7C15) & mask
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & mask
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & mask
    return value ^ (value >> 31)
