"""What the page shows: two models' predictions after every loop, on a grid of queries.

Both models ship with the package, so a scene takes seconds on a CPU. Numbers are packed for the
page (``pack``); errors are kept as they are.
"""

from __future__ import annotations

import base64
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from looped_fast.model import LoopedTransformer
from looped_fast.pretrained import from_pretrained, train_config
from looped_fast.tasks import EVALUATION, Task, batch_generator
from looped_fast.training.config import TrainConfig

AVERAGED = 128  # prompts of the average error, after those on show
_AVERAGED_QUERIES = 128  # of the grid, at most


class View(NamedTuple):
    """How a shipped model is shown: ``name`` of the model, ``side`` of the grid along an axis,
    ``span`` of every x, and ``bits`` of a packed number."""

    name: str
    side: int
    span: tuple[float, float]
    bits: int


CURVE = View("fourier-1d-small", side=161, span=(-2.0, 2.0), bits=16)
PLANE = View("dt-2d-small", side=48, span=(-2.5, 2.5), bits=8)


def scene(view: View, n_prompts: int, max_loops: int, seed: int) -> dict[str, Any]:
    """Predictions, truth and errors of ``n_prompts`` prompts, for the page's JSON.

    Args:
        view: the model, and the grid of its queries.
        n_prompts: prompts on show.
        max_loops: predictions are made after each of this many loop steps.
        seed: of the prompts.

    Raises:
        ValueError: fewer loops than the model was trained with.
    """
    model, config = from_pretrained(view.name), train_config(view.name)
    if max_loops < config.n_loops:
        raise ValueError(
            f"max_loops = {max_loops}: {view.name} was trained with {config.n_loops} loops, and "
            f"at least as many are needed"
        )
    task, queries = config.make_task(), grid(view, config.n_dims)
    n_examples = config.n_points - 1  # the last point of a training prompt has so many before it
    xs, ys, function = draw(task, n_prompts + AVERAGED, n_examples, seed)
    truth = evaluate(task, queries, function)
    shown, others = slice(n_prompts), slice(n_prompts, None)
    predictions = predict(model, xs[shown], ys[shown], queries, max_loops)
    few = slice(0, None, max(1, len(queries) // _AVERAGED_QUERIES))
    average = relative_error(
        predict(model, xs[others], ys[others], queries[few], max_loops), truth[others, few], task
    ).mean(1)
    errors = relative_error(predictions, truth[shown], task)
    return {
        "model": view.name,
        "n_loops": config.n_loops,
        "n_examples": n_examples,
        "span": view.span,
        "note": _note(view, model, config, average),
        "average": average.tolist(),
        "prompts": [
            _prompt(view, xs[i], ys[i], truth[i], predictions[:, i], errors[:, i])
            for i in range(n_prompts)
        ],
    }


def grid(view: View, n_dims: int) -> Tensor:
    """The queries [side^d, d]: for d = 2 row by row from the top, as the pixels of an image."""
    low, high = view.span
    if n_dims == 1:
        return torch.linspace(low, high, view.side)[:, None]
    centres = low + (torch.arange(view.side) + 0.5) * (high - low) / view.side
    return torch.stack(torch.meshgrid(centres, centres.flip(0), indexing="xy"), -1).flatten(0, 1)


def pack(values: Tensor, low: float, high: float, bits: int) -> dict[str, Any]:
    """Round numbers to 2^bits levels from ``low`` to ``high``, which also limit them."""
    levels = 2**bits - 1
    scaled = ((values.double().numpy() - low) / (high - low)).clip(0, 1) * levels
    whole = scaled.round().astype(np.dtype(f"uint{bits}").newbyteorder("<"))
    text = base64.b64encode(whole.tobytes()).decode("ascii")
    return {"base64": text, "bits": bits, "low": low, "high": high}


def draw(task: Task, n_prompts: int, n_points: int, seed: int) -> tuple[Tensor, Tensor, dict]:
    """Held-out prompts: xs [B, n, d], ys [B, n], and the arguments of ``Task.evaluate``."""
    generator = batch_generator(seed, 0, EVALUATION, "cpu")
    xs = task.points(n_prompts, n_points, generator)
    function = task.draw(n_prompts, n_points, generator)
    return xs, task.evaluate(xs, **function), function


def evaluate(task: Task, queries: Tensor, function: dict[str, Tensor]) -> Tensor:
    """Every function at every query [m, d]: [B, m]."""
    n_prompts = len(next(iter(function.values())))
    return task.evaluate(queries.expand(n_prompts, -1, -1), **function)


def predict(
    model: LoopedTransformer, xs: Tensor, ys: Tensor, queries: Tensor, n_loops: int
) -> Tensor:
    """Predictions of every prompt at ``queries`` [m, d] after each loop step: [n_loops, B, m]."""
    queries = queries.expand(len(xs), -1, -1)
    return model.predict(xs, ys, queries, n_loops=n_loops, window=n_loops)


def relative_error(predictions: Tensor, truth: Tensor, task: Task) -> Tensor:
    """Mean squared error over the queries / variance of y: [L, B, m], [B, m] -> [L, B]."""
    return (predictions.double() - truth).square().mean(-1) / task.variance


def _prompt(
    view: View, xs: Tensor, ys: Tensor, truth: Tensor, predictions: Tensor, errors: Tensor
) -> dict[str, Any]:
    """One prompt: xs [n, d], ys [n], truth [m], predictions [L, m], errors [L]."""
    seen = torch.cat((ys, truth))
    low, high = seen.min().item(), seen.max().item()
    if xs.shape[1] == 1:
        margin = 0.25 * (high - low)
        span = low - margin, high + margin
    else:  # colours: 0 is in the middle
        span = -max(-low, high), max(-low, high)
    return {
        "xs": [[round(value, 4) for value in x] for x in xs.tolist()],
        "ys": [round(value, 4) for value in ys.tolist()],
        "span": span,
        "truth": pack(truth, *span, view.bits),
        "predictions": pack(predictions, *span, view.bits),
        "errors": errors.tolist(),
    }


def _note(view: View, model: LoopedTransformer, config: TrainConfig, average: Tensor) -> str:
    """What the model is and how well it does, in numbers of this run."""
    n_weights = sum(parameter.numel() for parameter in model.parameters())
    b, last = config.n_loops, len(average)
    return (
        f"{view.name}: {n_weights:,} weights, trained for {config.steps:,} steps of "
        f"{config.batch_size} prompts, with {b} loops. Average error after {b} loops: "
        f"{average[b - 1]:#.2g}; after {last}: {average[-1]:#.2g}."
    )
