"""Squared error at every in-context position, of models and of baselines, on held-out prompts."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from looped_fast.model import LoopedTransformer
from looped_fast.tasks import EVALUATION, Batch, Task, sample_batch

_CHUNK = 256  # prompts in memory at once


def evaluation_batches(
    task: Task, n_prompts: int, n_points: int, *, seed: int, device: torch.device | str
) -> Iterator[Batch]:
    """``n_prompts`` held-out prompts, in chunks; a pure function of the arguments."""
    for chunk, first in enumerate(range(0, n_prompts, _CHUNK)):
        size = min(_CHUNK, n_prompts - first)
        yield sample_batch(
            task, size, n_points, seed=seed, step=chunk, rank=EVALUATION, device=device
        )


def position_errors(
    predict: Callable[[Tensor, Tensor], Tensor], task: Task, batches: Iterator[Batch]
) -> Tensor:
    """Mean squared error at each position over ``task.variance``: [n], float64 on the CPU.

    Predicting zero scores 1. For linear regression the variance is d, so this is the paper's
    squared error / d (section 5).

    Args:
        predict: (xs [B, n, d], ys [B, n]) -> predictions [B, n].
        task: gives the variance.
        batches: what to average over.
    """
    totals, count = torch.zeros(()), 0
    for xs, ys in batches:
        errors = (predict(xs, ys).double() - ys.double()).square()
        totals = totals + errors.sum(0).cpu()
        count += len(xs)
    return totals / (count * task.variance)


def model_errors(
    model: LoopedTransformer,
    task: Task,
    loop_counts: Sequence[int],
    n_prompts: int,
    n_points: int,
    *,
    seed: int,
    autocast: Callable[[], AbstractContextManager] = nullcontext,
) -> dict[int, Tensor]:
    """``position_errors`` of ``model`` after each of ``loop_counts`` loop steps."""
    device = next(model.parameters()).device
    errors = {}
    for n_loops in loop_counts:

        def predict(xs: Tensor, ys: Tensor, n_loops: int = n_loops) -> Tensor:
            with torch.no_grad(), autocast():
                return model(xs, ys, n_loops, 1)[-1]

        batches = evaluation_batches(task, n_prompts, n_points, seed=seed, device=device)
        errors[n_loops] = position_errors(predict, task, batches)
    return errors
