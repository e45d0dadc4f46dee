"""Batches of prompts, each a pure function of (seed, step, rank).

A resumed or repeated training therefore sees the same data on the same kind of device. (PyTorch's
CPU and GPU generators give different numbers for one seed.)
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Generator, Tensor

from looped_fast.tasks.base import Task


class Batch(NamedTuple):
    """Prompts: xs [B, n, d] and ys [B, n], float32."""

    xs: Tensor
    ys: Tensor


def batch_seed(seed: int, step: int, rank: int) -> int:
    """The 64-bit seed of the generator that draws one batch.

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
    """Draw the batch of (seed, step, rank): xs [B, n, d], ys [B, n], float32.

    Args:
        task: what to draw.
        batch_size: prompts B.
        n_points: (x, y) pairs n of a prompt.
        seed: seed of the run.
        step: training step, or index of an evaluation batch.
        rank: process in a distributed run.
        n_dims: active coordinates of x (curriculum), all by default; the others are 0.
        device: where the batch is drawn.

    Raises:
        ValueError: ``n_dims`` is outside 1..d.

    >>> from looped_fast.tasks import make_task
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
    """Draw the next batch of ``generator``, on its device; arguments as in ``sample_batch``.

    A tensor ``n_dims`` (integer, no axes, on that device) is never read on the host, so a CUDA
    graph of this call serves all its values.
    """
    return _evaluate(task, *_draw(task, batch_size, n_points, generator), n_points, n_dims)


class FixedPrompts:
    """A fixed set of N distinct prompts, visited in a new random order every epoch.

    Serves the paper's study of sample efficiency (section 5; official ``use_fixed_dataset``). A
    batch is a pure function of (seed, step, rank); no prompt is used twice in an epoch. (The
    official loop reuses a stale batch at the end of each epoch.)

    Args:
        task: what to draw.
        n_prompts: N, at least ``batch_size * world_size``. Each epoch leaves out N modulo that
            product, chosen anew.
        n_points: points of each prompt; batches take the first ones.
        batch_size: prompts B of a batch.
        seed: seed of the run.
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
        """Indices of the prompts in the batch of a training step: [B] int64, on the CPU."""
        epoch, position = divmod(step, self._steps_per_epoch)
        order = torch.randperm(
            self._n_prompts,
            generator=batch_generator(self._seed, epoch, _EPOCH_ORDER, "cpu"),
        )
        first = (position * self._world_size + rank) * self._batch_size
        return order[first : first + self._batch_size]

    def take(self, rows: Tensor, n_points: int, n_dims: int | Tensor | None = None) -> Batch:
        """The batch of the prompts ``rows`` ([B] int64, on the prompts' device).

        Raises:
            ValueError: more points than the prompts have.
        """
        if n_points > self._xs.shape[1]:
            raise ValueError(
                f"n_points = {n_points} exceeds the {self._xs.shape[1]} points of these prompts"
            )
        function = {name: value[rows] for name, value in self._function.items()}
        return _evaluate(self._task, self._xs[rows], function, n_points, n_dims)


# Random streams apart from those of training batches, whose ranks are not negative.
_FIXED_PROMPTS, _EPOCH_ORDER, EVALUATION = -1, -2, -3


def _draw(
    task: Task, n_prompts: int, n_points: int, generator: Generator
) -> tuple[Tensor, dict[str, Tensor]]:
    xs = task.points(n_prompts, n_points, generator)
    _check_shape(task, "points gave xs", xs, (n_prompts, n_points, task.n_dims))
    function = task.draw(n_prompts, n_points, generator)
    for name, value in function.items():
        _check_shape(task, f"draw gave {name}", value, (n_prompts, *value.shape[1:]))
    return xs, function


def _evaluate(
    task: Task, xs: Tensor, function: dict[str, Tensor], n_points: int, n_dims: int | Tensor | None
) -> Batch:
    xs = xs[:, :n_points]
    if task.truncates and n_dims is not None:
        # Zeroing x is enough: the trailing weights no longer count.
        xs = xs.masked_fill(torch.arange(task.n_dims, device=xs.device) >= n_dims, 0)
    ys = task.evaluate(xs, **function)
    _check_shape(task, "evaluate gave ys", ys, xs.shape[:2])
    if ys.dtype != xs.dtype:
        raise ValueError(
            f"{type(task).__name__}.evaluate gave ys of {ys.dtype}; {xs.dtype}, that of xs, is "
            f"needed"
        )
    return Batch(xs, ys)


def _check_shape(task: Task, what: str, tensor: Tensor, shape: tuple[int, ...]) -> None:
    """Raise ValueError for a tensor of another shape, from a class that a user wrote."""
    if tensor.shape != shape:
        raise ValueError(
            f"{type(task).__name__}.{what} of shape {list(tensor.shape)}; {list(shape)} is needed"
        )


def _hash64(value: int) -> int:
    """splitmix64, a bijection of 64-bit integers."""
    mask = 0xFFFFFFFFFFFFFFFF
    value = (value + 0x9E3779B97F4A7C15) & mask
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & mask
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & mask
    return value ^ (value >> 31)
