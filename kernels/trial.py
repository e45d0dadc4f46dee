"""Find the fastest of a kernel's configurations whose results are right.

A trial launches the kernel on tensors of its own, which have the shapes and alignments of the real
ones. So it can run before the real ones are filled, and does not change them.

Each configuration starts from the same random numbers. Tensors with a part for each program, whose
shapes differ, start from zero, and their sums are compared. A configuration is out if it can't be
compiled or launched, or if its results are not finite or differ from those of the first by more
than rounding can. The others are timed as the loop runs them: in a replayed CUDA graph, without the
host's overhead, and with warm caches, since weights stay in L2 from step to step.
"""

from __future__ import annotations

import itertools
import logging
import statistics
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from looped_fast.ops.graphs import CudaGraph

from .ahead import compiling_together
from .candidates import Config
from .launch import Call, intercepting

logger = logging.getLogger(__name__)

# How far an element may be from the first configuration's, relative to its own size plus the root
# mean square of all. Configurations sum products in different orders, in fp32, so some operands are
# rounded the other way: 8 roundings of an operand are far more than that. With fp32 operands only
# the order of the sums, of up to 4D = 2048 products, differs.
TOLERANCE = {"bf16": 8 * 2**-8, "fp16": 8 * 2**-11, "tf32": 8 * 2**-10, "fp32": 2**-14}

STD = 0.1  # of the random numbers: gradients through two layers stay in the range of fp16

LAUNCHES = 10  # in a graph
REPLAYS = 5  # in a row, in each round
ROUNDS = 4  # through all configurations, so that a change of clock rate affects them all


class NotTimed(RuntimeError):
    """A trial ran out of memory, or CUDA can't capture a graph here; ``config`` is to be used."""

    def __init__(self, config: Config, reason: BaseException) -> None:
        super().__init__(f"{type(reason).__name__}: {reason}".splitlines()[0])
        self.config = config


def fastest(options: Sequence[Config], run: Callable[[Config], None], precision: str) -> Config:
    """The configuration that takes the least time; the first among equals.

    Args:
        options: what to choose from.
        run: calls ``launch`` once, with a configuration, on contiguous floating-point tensors.
        precision: operands of matrix products: ``bf16``, ``fp16``, ``tf32`` or ``fp32``.

    Raises:
        NotTimed: timing failed, or there is no room for two more sets of the tensors.
        RuntimeError: none of the configurations runs.
    """
    calls = {config: _only_call(run, config) for config in options}
    with compiling_together():
        for call in calls.values():
            call.compile()
    try:
        right = _correct_calls(calls, TOLERANCE[precision])
    except torch.OutOfMemoryError as error:
        raise NotTimed(options[0], error) from error
    try:
        times = dict(zip(right, milliseconds(list(right.values())), strict=True))
    except RuntimeError as error:
        raise NotTimed(next(iter(right)), error) from error
    return min(times, key=times.__getitem__)


def _only_call(run: Callable[[Config], None], config: Config) -> Call:
    calls: list[Call] = []

    def keep(call: Call) -> bool:
        calls.append(call)
        return False

    with intercepting(keep):
        run(config)
    (call,) = calls
    return call


def _correct_calls(calls: dict[Config, Call], tolerance: float) -> dict[Config, Call]:
    """Those of ``calls`` whose results are right, on tensors of the trial's own."""
    part_axes = _part_axes(list(calls.values()))
    tensors: dict[Any, Tensor] = {}
    expected: dict[str, Tensor] = {}
    right: dict[Config, Call] = {}
    failures: list[str] = []
    for config, real in calls.items():
        call = _with_own_tensors(real, tensors)
        try:
            results = _results(call, part_axes)
            fault = _fault(results, expected, tolerance)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # Triton's errors have no common base class
            fault = f"{type(error).__name__}: {error}".splitlines()[0]
        if fault is None:
            right[config] = call
            expected = expected or {name: result.clone() for name, result in results.items()}
        else:
            failures.append(f"{call.kernel.__name__} with {config}: {fault}")
            logger.warning("not used on this GPU: %s", failures[-1])
    if not right:
        reasons = "\n".join(failures)
        raise RuntimeError(f"no configuration runs on this GPU; use another backend\n{reasons}")
    return right


def _with_own_tensors(call: Call, tensors: dict[Any, Tensor]) -> Call:
    """``call`` on ``tensors``, by position and shape; missing ones are allocated."""
    args = list(call.args)
    for i, arg in enumerate(args):
        if isinstance(arg, Tensor):
            key = i, arg.shape
            if key not in tensors:
                skip = arg.data_ptr() % 16 // arg.element_size()  # Triton compiles for alignment
                tensors[key] = arg.new_empty(skip + arg.numel())[skip:].view(arg.shape)
            args[i] = tensors[key]
    return call._replace(args=tuple(args))


def _part_axes(calls: Sequence[Call]) -> dict[int, list[int]]:
    """Axes along which an argument's shapes differ between configurations, by its position."""
    found = {}
    for i, args in enumerate(zip(*(call.args for call in calls), strict=True)):
        if isinstance(args[0], Tensor):
            sizes = enumerate(zip(*(arg.shape for arg in args), strict=True))
            found[i] = [axis for axis, lengths in sizes if len(set(lengths)) > 1]
    return {i: axes for i, axes in found.items() if axes}


def _results(call: Call, part_axes: dict[int, list[int]]) -> dict[str, Tensor]:
    """Execute ``call``; its tensors by name of the parameter, those in parts as their sum."""
    names = call.kernel.arg_names[: len(call.args)]
    tensors = {i: arg for i, arg in enumerate(call.args) if isinstance(arg, Tensor)}
    for i, tensor in tensors.items():
        if i in part_axes:
            tensor.zero_()
        else:
            generator = torch.Generator(tensor.device).manual_seed(i)
            tensor.normal_(std=STD, generator=generator)
    call.execute()
    return {
        names[i]: tensor.sum(part_axes[i]) if i in part_axes else tensor
        for i, tensor in tensors.items()
    }


def _fault(results: dict[str, Tensor], right: dict[str, Tensor], tolerance: float) -> str | None:
    """What is wrong with ``results``, or None; ``right`` is empty for the first configuration."""
    for name, result in results.items():
        if not result.isfinite().all():
            return f"{name} is not finite"
        if name in right:
            expected = right[name].float()
            size = expected.abs() + expected.square().mean().sqrt()
            error = ((result.float() - expected).abs() / size).nan_to_num().max().item()  # 0 / 0
            if error > tolerance:
                return f"{name} is off by {error:.1e}, and rounding explains {tolerance:.1e}"
    return None


def milliseconds(calls: Sequence[Call]) -> list[float]:
    """Median time of one launch of each call."""

    def launches(call: Call) -> None:
        for _ in range(LAUNCHES):
            call.execute()

    def replays(graph: CudaGraph) -> list[float]:
        events = [torch.cuda.Event(enable_timing=True) for _ in range(REPLAYS + 1)]
        for event in events:  # the first replay comes before the first event
            graph.replay()
            event.record()
        events[-1].synchronize()
        return [start.elapsed_time(end) for start, end in itertools.pairwise(events)]

    with torch.cuda.device(calls[0].device):
        graphs = [CudaGraph(call.device) for call in calls]
        for graph, call in zip(graphs, calls, strict=True):
            graph.capture(lambda call=call: launches(call))
        rounds = [list(map(replays, graphs)) for _ in range(ROUNDS)]
    by_call = ([time for times in found for time in times] for found in zip(*rounds, strict=True))
    return [statistics.median(times) / LAUNCHES for times in by_call]
