"""Prompts from outside the training distribution: other points, labels, lengths and queries.

The shifts are those of Garg et al. (arXiv 2208.01066, appendix B; dtsip/in-context-learning,
``src/eval.py``), which the looped paper takes over, with longer prompts and fewer dimensions.
They start from the same draws as ``evaluation_batches``, so errors compare prompt by prompt.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
from torch import Generator, Tensor

from looped_fast.errors import check_name
from looped_fast.evaluation.errors import chunk_sizes
from looped_fast.tasks import EVALUATION, Task, batch_generator

_SCALES = {"1/3": 1 / 3, "1/2": 1 / 2, "2": 2.0, "3": 3.0}
_SIGNAL_TO_NOISE = 20  # Garg et al.: noise of variance 1 where y has variance d = 20


class ShiftedPrompts(NamedTuple):
    """Prompts, with a query and its target at each position.

    At each position a predictor sees the earlier points, xs [B, n, d] with ys [B, n], and a query
    from queries [B, n, d] (None: xs). Targets [B, n] are the function's values at the queries,
    without the noise of a shift but with that of ``noisy_lr`` itself.
    """

    xs: Tensor
    ys: Tensor
    queries: Tensor | None
    targets: Tensor


Points = tuple[Tensor, Tensor | None]  # xs, and queries unless these are the xs


def _same(xs: Tensor, generator: Generator) -> Points:
    return xs, None


@dataclass(frozen=True)
class Shift:
    """One way to leave the training distribution.

    Attributes:
        points: (xs [B, n, d] of the task, generator) -> (xs, queries); queries None: the xs.
        label_scale: factor of every y.
        noise: True if ys, not targets, carry noise with 1/20 of the task's variance.
        longer: True if prompts have as many points as the model has positions for.
        up_to_d: True if there are no queries beyond position d.
    """

    points: Callable[[Tensor, Generator], Points] = _same
    label_scale: float = 1.0
    noise: bool = False
    longer: bool = False
    up_to_d: bool = False


def _scaled(scale: float, xs: Tensor, generator: Generator) -> Points:
    return scale * xs, None


def _with_eigenvalues(eigenvalues: Callable[[int], Tensor], xs: Tensor, gen: Generator) -> Points:
    """x' = U diag(e) U^T x, U a random rotation of each prompt, e scaled to keep E|x|^2 = d."""
    B, _, d = xs.shape
    e = eigenvalues(d).to(xs)
    e *= math.sqrt(d) / e.norm()
    gaussian = torch.randn(B, d, d, generator=gen, device=xs.device)
    rotation = torch.linalg.qr(gaussian).Q
    return ((xs @ rotation) * e) @ rotation.mT, None


def _skewed(d: int) -> Tensor:
    return 1 / torch.arange(1, d + 1)


def _half(d: int) -> Tensor:
    return (torch.arange(d) < max(1, d // 2)).float()


def _fewer_dimensions(xs: Tensor, generator: Generator) -> Points:
    """The last half of the coordinates is zero, as early in the curriculum."""
    return xs * _half(xs.shape[2]).to(xs), None


def _random_quadrants(xs: Tensor, generator: Generator) -> Points:
    """The points of a prompt lie in one random quadrant, its queries anywhere."""
    B, _, d = xs.shape
    signs = torch.randn(B, 1, d, generator=generator, device=xs.device).sign()
    return xs.abs() * signs, xs


def _orthogonal(xs: Tensor, generator: Generator) -> Points:
    """Each query is orthogonal to all points before it, and as long as the point it replaces."""
    q, r = torch.linalg.qr(xs.mT)  # Gram-Schmidt of the points in their order; q: [B, d, n]
    signs = r.diagonal(dim1=1, dim2=2).sign()
    return xs, (q * signs[:, None]).mT * xs.norm(dim=2, keepdim=True)


def _overlapping(xs: Tensor, generator: Generator) -> Points:
    """Each query is one of the points before it."""
    B, n, d = xs.shape
    share = torch.rand(B, n, generator=generator, device=xs.device)
    index = (share * torch.arange(n, device=xs.device)).long()  # below i; 0 at position 0
    return xs, xs.gather(1, index[..., None].expand(-1, -1, d))


SHIFTS: dict[str, Shift] = {
    "none": Shift(),
    "skewed covariance": Shift(partial(_with_eigenvalues, _skewed)),
    "half subspace": Shift(partial(_with_eigenvalues, _half)),
    "lower dimension": Shift(_fewer_dimensions),
    "longer prompts": Shift(longer=True),
    "label noise": Shift(noise=True),
    **{f"inputs x {name}": Shift(partial(_scaled, scale)) for name, scale in _SCALES.items()},
    **{f"weights x {name}": Shift(label_scale=scale) for name, scale in _SCALES.items()},
    "random quadrants": Shift(_random_quadrants),
    "orthogonal queries": Shift(_orthogonal, up_to_d=True),
    "overlapping queries": Shift(_overlapping),
}


def sample_shifted(
    name: str,
    task: Task,
    n_prompts: int,
    n_points: int,
    *,
    seed: int,
    step: int = 0,
    device: torch.device | str = "cpu",
) -> ShiftedPrompts:
    """The evaluation batch of (seed, step), shifted; a pure function of the arguments.

    >>> from looped_fast.tasks import make_task
    >>> prompts = sample_shifted("half subspace", make_task("lr", 4), 64, 9, seed=0)
    >>> prompts.xs.shape, torch.linalg.matrix_rank(prompts.xs)[0]
    (torch.Size([64, 9, 4]), tensor(2))

    Args:
        name: one of ``SHIFTS``.
        task: functions, and the dimension d.
        n_prompts: prompts B.
        n_points: points n of a prompt.
        seed: seed of the evaluation.
        step: index of the batch.
        device: where the prompts are drawn.

    Raises:
        ValueError: an unknown shift, or more points than d for orthogonal queries.
    """
    check_name("shift", name, SHIFTS)
    shift = SHIFTS[name]
    if shift.up_to_d and n_points > task.n_dims:
        raise ValueError(
            f"{name}: nothing is orthogonal to {n_points - 1} points in {task.n_dims} dimensions; "
            f"use n_points of at most {task.n_dims}"
        )
    generator = batch_generator(seed, step, EVALUATION, device)
    xs = task.points(n_prompts, n_points, generator)
    function = task.draw(n_prompts, n_points, generator)
    xs, queries = shift.points(xs, generator)
    ys = shift.label_scale * task.evaluate(xs, **function)
    targets = ys
    if queries is not None:
        targets = shift.label_scale * task.evaluate(queries, **function)
    if shift.noise:
        noise = torch.randn(ys.shape, generator=generator, device=device)
        ys = ys + math.sqrt(task.variance / _SIGNAL_TO_NOISE) * noise
    return ShiftedPrompts(xs, ys, queries, targets)


def shifted_prompts(
    name: str,
    task: Task,
    n_prompts: int,
    n_points: int,
    *,
    seed: int,
    device: torch.device | str = "cpu",
) -> ShiftedPrompts:
    """The prompts of ``evaluation_batches``, shifted, as one batch; see ``sample_shifted``."""
    chunks = [
        sample_shifted(name, task, size, n_points, seed=seed, step=step, device=device)
        for step, size in enumerate(chunk_sizes(n_prompts))
    ]
    xs, ys, queries, targets = zip(*chunks, strict=True)
    joined = None if queries[0] is None else torch.cat(queries)
    return ShiftedPrompts(torch.cat(xs), torch.cat(ys), joined, torch.cat(targets))
