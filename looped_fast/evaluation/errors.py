"""Squared error at every in-context position, of models and of baselines, on held-out prompts."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from looped_fast.model import LoopedTransformer
from looped_fast.tasks import EVALUATION, Batch, Task, sample_batch

_CHUNK = 256  # prompts in memory at once
_STATE_BYTES = 2**28  # limit on the loop states that one run of a model returns
BOOTSTRAP_TRIALS = 1000
MIN_PROMPTS = 20  # with fewer, less than one prompt lies below the 5 % quantile

Predictor = Callable[[Tensor, Tensor], Tensor]  # (xs [B, n, d], ys [B, n]) -> [B, n]


def chunk_sizes(n_prompts: int) -> list[int]:
    """Sizes of the batches of an evaluation, which decide what prompts are drawn."""
    return [min(_CHUNK, n_prompts - first) for first in range(0, n_prompts, _CHUNK)]


def evaluation_batches(
    task: Task, n_prompts: int, n_points: int, *, seed: int, device: torch.device | str
) -> Iterator[Batch]:
    """``n_prompts`` held-out prompts, in chunks; a pure function of the arguments."""
    for chunk, size in enumerate(chunk_sizes(n_prompts)):
        yield sample_batch(
            task, size, n_points, seed=seed, step=chunk, rank=EVALUATION, device=device
        )


def model_predictor(
    model: LoopedTransformer, n_loops: int
) -> Callable[[Tensor, Tensor, Tensor | None], Tensor]:
    """``model`` after ``n_loops`` loop steps, called as a baseline: (xs, ys, queries) -> [B, n].

    A query at position i sees the i points before it; the points run once for all queries.
    """

    @torch.no_grad()
    def predict(xs: Tensor, ys: Tensor, queries: Tensor | None = None) -> Tensor:
        n = xs.shape[1]
        parts = []
        for first in range(0, len(xs), _CHUNK):
            x, y = xs[first : first + _CHUNK], ys[first : first + _CHUNK]
            if queries is None:
                parts.append(model.predict(x, y, n_loops=n_loops))
                continue
            seen = torch.arange(n, device=xs.device)
            examples = x[:, :-1], y[:, :-1]  # no query sees the last one
            q = queries[first : first + _CHUNK]
            parts.append(model.predict(*examples, q, seen=seen, n_loops=n_loops))
        return torch.cat(parts)

    return predict


def prompt_errors(predict: Predictor, task: Task, batches: Iterable[Batch]) -> Tensor:
    """Squared error of each prompt at each position over ``task.variance``.

    Predicting zero scores 1 on average. For linear regression the variance is d, so the mean is
    the paper's squared error / d (section 5).

    Args:
        predict: (xs [B, n, d], ys [B, n]) -> predictions [B, n].
        task: gives the variance.
        batches: the P prompts.

    Returns:
        [P, n], float64 on the CPU.
    """
    errors = [(predict(xs, ys).double() - ys.double()).square().cpu() for xs, ys in batches]
    return torch.cat(errors) / task.variance


def position_errors(predict: Predictor, task: Task, batches: Iterable[Batch]) -> Tensor:
    """The mean of ``prompt_errors`` over prompts: [n], float64 on the CPU."""
    return prompt_errors(predict, task, batches).mean(0)


def loop_errors(
    model: LoopedTransformer,
    task: Task,
    batches: Iterable[Batch],
    loop_counts: Sequence[int],
    *,
    autocast: Callable[[], AbstractContextManager] = nullcontext,
) -> Tensor:
    """``prompt_errors`` of ``model`` after each of ``loop_counts`` loop steps.

    One run of the loop to the largest count serves all of them.

    Args:
        model: on the same device as the batches.
        task: gives the variance.
        batches: the P prompts.
        loop_counts: C counts, each at least 1, in any order.
        autocast: makes the context in which the model runs.

    Returns:
        [C, P, n], float32 on the CPU.

    Raises:
        ValueError: no count, or a count below 1.
    """
    if not loop_counts or min(loop_counts) < 1:
        raise ValueError(f"loop counts {list(loop_counts)}: one or more of at least 1 are needed")
    n_loops, window = max(loop_counts), max(loop_counts) - min(loop_counts) + 1
    kept = torch.tensor(loop_counts) - min(loop_counts)
    errors = []
    for xs, ys in batches:
        state_bytes = window * 2 * xs.shape[1] * model.config.n_embd * 4  # per prompt
        size = max(1, _STATE_BYTES // state_bytes)
        for x, y in zip(xs.split(size), ys.split(size), strict=True):
            with torch.no_grad(), autocast():
                predictions = model(x, y, n_loops, window)[kept]  # [C, B, n]
            errors.append((predictions - y).square().cpu())
    return torch.cat(errors, dim=1) / task.variance


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
    """The mean of ``loop_errors`` over fresh prompts: {loop count: [n]}, float64 on the CPU."""
    device = next(model.parameters()).device
    batches = evaluation_batches(task, n_prompts, n_points, seed=seed, device=device)
    errors = loop_errors(model, task, batches, loop_counts, autocast=autocast)
    return dict(zip(loop_counts, errors.double().mean(1), strict=True))


@dataclass(frozen=True)
class Curve:
    """Mean over prompts with its 5 % and 95 % bootstrap quantiles: three lists of equal length."""

    mean: list[float]
    low: list[float]
    high: list[float]


def bootstrap_curve(errors: Tensor, *, seed: int) -> Curve:
    """Mean and 5-95 % band of errors [P, n] over prompts, by the percentile bootstrap.

    A trial draws P prompts with replacement. Only how often each is drawn matters, so all trials
    are one product of matrices. Source: official ``jupyter_notebooks/utils.py``,
    ``aggregate_metrics`` (1000 trials).

    Raises:
        ValueError: fewer than ``MIN_PROMPTS`` prompts.
    """
    n_prompts = len(errors)
    if n_prompts < MIN_PROMPTS:
        raise ValueError(
            f"{n_prompts} prompts are too few for a 5-95 % bootstrap band; use at least "
            f"{MIN_PROMPTS}"
        )
    values = errors.double().numpy()
    generator = np.random.default_rng(seed)
    shares = np.full(n_prompts, 1 / n_prompts)
    times_drawn = generator.multinomial(n_prompts, shares, size=BOOTSTRAP_TRIALS)
    means = times_drawn @ values / n_prompts  # [trials, n]
    low, high = np.quantile(means, (0.05, 0.95), axis=0)
    return Curve(values.mean(0).tolist(), low.tolist(), high.tolist())
