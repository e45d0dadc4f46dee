"""Time work on a GPU without launches: in a replayed CUDA graph, as in training."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import TypeVar

import torch

from looped_fast.ops.graphs import CudaGraph

Result = TypeVar("Result")


def milliseconds(work: Callable[[], object], device: torch.device, repeats: int = 9) -> float:
    """Median time of a replay of ``work``; on a CPU, of one plain call."""

    def run() -> None:
        work()

    if device.type == "cpu":
        start = time.perf_counter()
        run()
        return 1e3 * (time.perf_counter() - start)
    graph = CudaGraph(device)
    for _ in range(2):  # compiles, loads libraries, and allocates their workspaces
        graph.warm_up(run)
    graph.capture(run)
    graph.replay()
    times = []
    for _ in range(repeats):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end))
    return statistics.median(times)


def on_capturing_stream(work: Callable[[], Result], device: torch.device) -> Result:
    """Do ``work`` on the stream of ``milliseconds``: a backward runs on that of its forward."""
    if device.type == "cpu":
        return work()
    return CudaGraph(device).warm_up(work)
