"""Predictions without gradient: many queries for one set of examples, and loops until enough.

``LoopedTransformer.predict`` documents arguments and results.
"""

from __future__ import annotations

import functools
import warnings
from typing import Any, NamedTuple

import torch
from torch import Tensor

from looped_fast.config import check_whole, check_window
from looped_fast.model.adaptive import (
    AdaptivePrediction,
    Criterion,
    prediction_change,
    run_until,
)
from looped_fast.model.prompts import check_prompt, check_queries, check_seen, check_tensors
from looped_fast.ops import op, reference
from looped_fast.ops.call import predicting
from looped_fast.ops.prompt import read_in

Model = Any  # a LoopedTransformer, whose module imports this one

_MOST_BYTES = 2**23  # of embedded queries in one call, of which the engine keeps several copies
_LEAST_QUERIES = 512  # in one call all the same: each call runs the examples again


class Options(NamedTuple):
    """The options of ``LoopedTransformer.predict``, by its names."""

    n_loops: int | None
    window: int | None
    tolerance: float | None
    max_loops: int | None
    criterion: Criterion
    anderson: int

    @property
    def last_steps(self) -> int:
        """How many of the last steps predict."""
        return 1 if self.window is None else self.window

    @property
    def steps_one_by_one(self) -> bool:
        """True if something happens between steps, so that no single op runs them all."""
        return self.tolerance is not None or self.anderson > 0

    def check(self) -> None:
        """Raise ValueError for options out of range, or that exclude each other."""
        check_whole("anderson", self.anderson)
        if self.anderson < 0:
            raise ValueError(f"anderson = {self.anderson}: a depth of at least 0 is needed")
        if self.window is not None and self.steps_one_by_one:
            raise ValueError(
                f"window = {self.window} does not go with a tolerance or Anderson acceleration, "
                f"which predict after the last step; leave one of them out"
            )
        if self.tolerance is None and self.max_loops is not None:
            raise ValueError(
                f"max_loops = {self.max_loops} limits the steps until a tolerance is met; give a "
                f"tolerance, or n_loops = {self.max_loops} steps"
            )
        if self.tolerance is None:
            return
        if not self.tolerance >= 0:
            raise ValueError(f"tolerance = {self.tolerance}: at least 0 is needed")
        if self.n_loops is not None:
            raise ValueError(
                f"n_loops = {self.n_loops} steps and a tolerance exclude each other; give "
                f"max_loops = {self.n_loops}"
            )


def predict(
    model: Model,
    xs: Tensor,
    ys: Tensor,
    queries: Tensor | None,
    seen: Tensor | None,
    options: Options,
) -> Tensor | AdaptivePrediction:
    """Run ``model.predict`` (same arguments and result)."""
    options.check()
    with torch.no_grad():
        if queries is None:
            if seen is not None:
                raise ValueError("seen says how many examples queries see; give queries, too")
            if not options.steps_one_by_one:
                return _windowed(_run_prompt(model, xs, ys, options), options)
            return _run_steps(model, model.embed(xs, ys), None, options)
        check_tensors(xs=xs, ys=ys, queries=queries)
        if by_modules := model.deviations():
            if options.steps_one_by_one:
                raise ValueError(
                    f"queries with a tolerance or Anderson acceleration need ops.loop, but "
                    f"{'; '.join(by_modules)}; leave out the option, or predict without queries"
                )
            check_prompt(model.config, xs, ys, None)
            check_queries(model.config, queries, xs, None)
            seen = check_seen(seen, queries, xs.shape[1])
            return _windowed(_one_prompt_each(model, xs, ys, queries, seen, options), options)
        weight, bias = model._read_in.weight, model._read_in.bias
        queries = op.cast_in_autocast(queries, weight.dtype)
        examples = model._embed(xs, ys, by_modules)  # which checks xs and ys
        check_queries(model.config, queries, xs, weight)
        seen = check_seen(seen, queries, xs.shape[1])
        with reference.autocast(queries.device.type, "fp32"):  # y = 0 completes the points
            points = queries, queries.new_zeros(queries.shape[:2])
            embedded = read_in(*points, weight, bias, backend=model.backend)[:, ::2]
        if model.backend == "auto" and queries.device.type != "cpu":
            _say_once_that_nothing_shares(queries.device.type)
        if options.steps_one_by_one:
            return _run_steps(model, torch.cat((examples, embedded), 1), seen, options)
        return _windowed(_run_loop(model, examples, embedded, seen, options), options)


@functools.cache
def _say_once_that_nothing_shares(device: str) -> None:
    warnings.warn(
        f"no fast backend shares examples among queries on {device} yet: predict runs them in "
        f"plain PyTorch (backend='reference' silences this)",
        stacklevel=4,
    )


def _windowed(outputs: Tensor, options: Options) -> Tensor:
    return outputs[-1] if options.window is None else outputs


def _run_prompt(model: Model, xs: Tensor, ys: Tensor, options: Options) -> Tensor:
    """Predictions at the positions of xs, [W, B, n]."""
    n_loops, window = model._loop_counts(options.n_loops, options.last_steps)
    return model._predict(xs, ys, n_loops, window, model.config.injection)


def _run_loop(
    model: Model, examples: Tensor, queries: Tensor, seen: Tensor, options: Options
) -> Tensor:
    """Predictions [W, B, m] in one op, or in several where many queries would need much memory."""
    n_loops, window = model._loop_counts(options.n_loops, options.last_steps)
    check_window(n_loops, window)
    bytes_of_query = len(queries) * queries.shape[2] * queries.element_size()
    size = max(_LEAST_QUERIES, _MOST_BYTES // max(1, bytes_of_query))
    parts = []
    for e, s in zip(queries.split(size, 1), seen.split(size), strict=True):
        embeddings = torch.cat((examples, e), 1)
        arguments = embeddings, None, n_loops, window, model.config.injection, 2 * s
        parts.append(model._squeeze(model.graphed(*model._loop_arguments(*arguments))))
    return torch.cat(parts, 2)


def _one_prompt_each(
    model: Model,
    xs: Tensor,
    ys: Tensor,
    queries: Tensor,
    seen: Tensor,
    options: Options,
) -> Tensor:
    """Predictions [W, B, m] by a prompt for each query, which module by module needs."""
    outputs = []
    for i, n in enumerate(seen.tolist()):
        points = torch.cat((xs[:, :n], queries[:, i : i + 1]), 1)
        values = torch.cat((ys[:, :n], ys.new_zeros(len(ys), 1)), 1)  # the last one is not read
        outputs.append(_run_prompt(model, points, values, options)[:, :, -1:])
    return torch.cat(outputs, 2)


def _run_steps(
    model: Model, embeddings: Tensor, seen: Tensor | None, options: Options
) -> Tensor | AdaptivePrediction:
    """Predictions by one call of the op for each step, or by one that stops by itself."""
    config = model.config
    given = options.n_loops if options.tolerance is None else options.max_loops
    max_loops, _ = model._loop_counts(given, 1)
    check_window(max_loops, 1)
    tokens = None if seen is None else 2 * seen
    tolerance, by_default = options.tolerance, options.criterion is prediction_change
    if tolerance is not None and by_default and not (options.anderson or model.deviations()):
        arguments = embeddings, None, max_loops, 1, config.injection, tokens
        tensors, settings = model._loop_arguments(*arguments)
        if (stopped := op.run_until(tensors, settings, tolerance)) is not None:
            return AdaptivePrediction(model._squeeze(stopped[0]), stopped[1])

    def step(state: Tensor, embeddings: Tensor) -> Tensor:
        return model._run(embeddings, state, 1, tokens)[0]

    def read_out(states: Tensor) -> Tensor:
        with reference.autocast(states.device.type, "fp32"):
            return model._read_out(states[:, predicting(states.shape[1], seen)])

    outputs, n_loops = run_until(
        step,
        read_out,
        embeddings,
        reference.initial_state(embeddings, config.injection),
        max_loops=max_loops,
        tolerance=tolerance,
        criterion=options.criterion,
        anderson=options.anderson,
    )
    predictions = model._squeeze(outputs)
    return predictions if tolerance is None else AdaptivePrediction(predictions, n_loops)
