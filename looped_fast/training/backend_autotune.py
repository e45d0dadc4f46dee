"""Measure which backend is fastest on this GPU, once for each kind of training step.

A training run has this done before its first step; ``backends`` then goes by the times.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping
from dataclasses import replace

import torch
from torch import Generator

from looped_fast.model import LoopedTransformer
from looped_fast.ops import backend_times, backends
from looped_fast.ops.graphs import CudaGraph

# Compiling takes up to half a minute: a run that is over in less than this is better off without.
MIN_SECONDS = 300.0

Work = Callable[[], None]


def measure(
    problem: backends.Problem,
    n_steps: int,
    model: LoopedTransformer,
    works: Mapping[bool, Work],
    milliseconds: Callable[[Work], float],
) -> str | None:
    """Time the backends that can run ``problem``, and remember their times.

    ``compiled`` comes last, and only if ``n_steps`` on the fastest of the others would take
    ``MIN_SECONDS``. Times that are known, from an earlier run perhaps, are not measured again.

    Args:
        problem: a training step that is replayed.
        n_steps: how many of them there will be.
        model: whose ``backend`` is set while it is measured.
        works: under True such a training step of ``model``, under False an inference call of the
            same shape.
        milliseconds: replays the work that it is given, and times that.

    Returns:
        A line with the times, and with failures; None where nothing was compared.
    """
    unkept, is_new, before = None, False, model.backend
    for backend in _candidates(problem):
        known = backend_times.lookup(problem)
        if backend == "compiled" and known:
            seconds = n_steps * min(known.values()) / 1000
            if seconds < MIN_SECONDS:
                break
        for training in (True, False):
            kind = replace(problem, training=training)
            if backend in backend_times.lookup(kind) | backend_times.failures(kind):
                continue
            is_new, model.backend = True, backend
            try:
                unkept = backend_times.remember(kind, {backend: milliseconds(works[training])})
            except Exception as error:
                backend_times.remember_failure(kind, backend, _first_line(error))
            finally:
                model.backend = before
    return _describe(problem, unkept) if is_new else None


def _candidates(problem: backends.Problem) -> list[str]:
    """Backends worth timing, ``compiled`` last: the others need not compile for each shape."""
    able = backends.able(problem)
    if "triton" in able and backend_times.operands(problem) in ("bf16", "fp16"):
        able.remove("reference")  # ``compiled`` is the same with less traffic to memory
    return sorted(able, key=lambda backend: backend == "compiled")


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


def _describe(problem: backends.Problem, unkept: str | None) -> str | None:
    inference = replace(problem, training=False)
    times, failures = backend_times.lookup(problem), backend_times.failures(problem)
    failures = backend_times.failures(inference) | failures
    if len(times) + len(failures) < 2:
        return None
    steps, calls = (
        ", ".join(f"{backend} {ms:.3g} ms" for backend, ms in found.items())
        for found in (times, backend_times.lookup(inference))
    )
    line = f"{steps} a training step"
    if calls:
        line += f" ({calls} an inference call)"
    line += f": {backends.explain(problem).chosen}"
    line += "".join(f"; {backend} failed, {why}" for backend, why in failures.items())
    where = f"not remembered, {unkept}" if unkept else f"remembered in {backend_times.path()}"
    return f"{line}; {where}"


def replay_milliseconds(work: Work, device: torch.device, generator: Generator) -> float:
    """Median time of a replay of ``work``, which warms up and is captured before.

    Args:
        work: launches kernels on ``device``, and looks at no values.
        device: a CUDA device.
        generator: of random numbers in ``work``; see ``CudaGraph``.

    Raises:
        RuntimeError: the work can't be captured.
    """
    graph = CudaGraph(device, generator)
    for _ in range(2):
        graph.warm_up(work)
    graph.capture(work)

    def milliseconds() -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        return start.elapsed_time(end)

    with torch.cuda.device(device):
        times = [milliseconds() for _ in range(40)]
    return statistics.median(times[20:])  # clocks rise in the first ones
