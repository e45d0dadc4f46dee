"""Measure which backend is fastest on this GPU, once for each kind of training step.

A training run measures before its first step; ``backends`` then selects by the times.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping

import torch
from torch import Generator

from looped_fast.model import LoopedTransformer
from looped_fast.ops import backend_times, backends
from looped_fast.ops.call import Call
from looped_fast.ops.graphs import CudaGraph

# Compiling takes up to half a minute, which a run that ends sooner than this would not win back.
MIN_SECONDS = 300.0

Work = Callable[[], None]


def measure(
    call: Call,
    n_steps: int,
    model: LoopedTransformer,
    works: Mapping[bool, Work],
    milliseconds: Callable[[Work], float],
) -> str | None:
    """Time the backends that can run ``call``, and remember their times.

    ``compiled`` comes last, and only if ``n_steps`` on the fastest of the others would take
    ``MIN_SECONDS``. Known times, from an earlier run perhaps, are not measured again.

    Args:
        call: a training step that is replayed.
        n_steps: number of such training steps to come.
        model: its ``backend`` is set to each candidate while that is measured.
        works: for key True such a training step of ``model``, for False an inference call of the
            same shape.
        milliseconds: replays the given work, and returns its time.

    Returns:
        A line with the times, and with failures; None where nothing was compared.
    """
    unkept, is_new, before = None, False, model.backend
    for backend in _candidates(call):
        known = backend_times.lookup(call)
        if backend == "compiled" and known:
            seconds = n_steps * min(known.values()) / 1000
            if seconds < MIN_SECONDS:
                break
        for training in (True, False):
            kind = call._replace(training=training)
            if backend in backend_times.lookup(kind) | backend_times.failures(kind):
                continue
            is_new, model.backend = True, backend
            try:
                unkept = backend_times.remember(kind, {backend: milliseconds(works[training])})
            except Exception as error:
                backend_times.remember_failure(kind, backend, _first_line(error))
            finally:
                model.backend = before
    return _describe(call, unkept) if is_new else None


def _candidates(call: Call) -> list[str]:
    """Backends worth timing, with ``compiled`` last: only it compiles for each shape."""
    able = backends.able(call)
    if "triton" in able and backend_times.operands(call) in ("bf16", "fp16"):
        able.remove("reference")  # ``compiled`` runs the same with less memory traffic
    return sorted(able, key=lambda backend: backend == "compiled")


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


def _describe(call: Call, unkept: str | None) -> str | None:
    inference = call._replace(training=False)
    times, failures = backend_times.lookup(call), backend_times.failures(call)
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
    line += f": {backends.select(call).chosen}"
    line += "".join(f"; {backend} failed, {why}" for backend, why in failures.items())
    where = f"not remembered, {unkept}" if unkept else f"remembered in {backend_times.path()}"
    return f"{line}; {where}"


def replay_milliseconds(work: Work, device: torch.device, generator: Generator) -> float:
    """Median time of a replay of ``work``, after warming up and capturing it.

    Args:
        work: launches kernels on ``device``, and reads no values on the host.
        device: a CUDA device.
        generator: source of random numbers in ``work``; see ``CudaGraph``.

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
    return statistics.median(times[20:])  # clocks rise during the first 20
