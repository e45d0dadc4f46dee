"""CUDA graphs: kernels that Python launches once, and that are then replayed as a whole.

A replay repeats the captured kernels on the captured addresses. Whatever changes from call to call
must therefore lie in a tensor, or in the seed of a generator, that is set before the replay; and
the captured work must not read values on the host, nor take shapes from them. ``Graphs`` keeps
captured graphs by key (a stage of the curriculum, a shape), within limits on memory and number.

Source: https://docs.pytorch.org/docs/stable/notes/cuda.html#cuda-graphs
"""

from __future__ import annotations

import contextlib
import functools
import threading
import warnings
from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Generator, Tensor

from looped_fast.errors import check_name
from looped_fast.ops.call import replaying

MODES = ("auto", "on", "off")

Work = Callable[..., Tensor | None]


class Graph(Protocol):
    """Records work once, then repeats it. ``CudaGraph`` is the real one."""

    n_bytes: int  # memory it holds, once captured

    def warm_up(self, work: Work) -> Tensor | None:
        """Run ``work`` as it will be captured: libraries load, kernels are compiled and tuned."""

    def capture(self, work: Work) -> Tensor | None:
        """Record ``work`` without running it; its result holds values only after ``replay``."""

    def replay(self) -> None:
        """Run the recorded work."""


class CudaGraph:
    """``torch.cuda.CUDAGraph`` with memory of its own.

    Args:
        device: a CUDA device.
        generator: source of random numbers in the captured work; a replay draws what the work
            would draw from the generator's state at that time.
    """

    def __init__(self, device: torch.device, generator: Generator | None = None) -> None:
        self.n_bytes = 0
        self._device = device
        self._generator = generator
        self._graph = torch.cuda.CUDAGraph()

    def warm_up(self, work: Work) -> Tensor | None:
        """Run ``work`` on the stream that will capture it."""
        with _side_stream(self._device):
            return work()

    def capture(self, work: Work) -> Tensor | None:
        """Record ``work``; raises RuntimeError if CUDA can't."""
        if self._generator is not None:
            self._graph.register_generator_state(self._generator)
        # thread_local lets other threads use CUDA: a progress bar, a logger, a data loader.
        with (
            _side_stream(self._device) as stream,
            torch.cuda.graph(self._graph, stream=stream, capture_error_mode="thread_local"),
        ):
            before = torch.cuda.memory_reserved(self._device)
            result = work()
            self.n_bytes = torch.cuda.memory_reserved(self._device) - before
        return result

    def replay(self) -> None:
        """Launch the graph on the current stream."""
        self._graph.replay()


@contextlib.contextmanager
def _side_stream(device: torch.device) -> Iterator[torch.cuda.Stream]:
    """A stream to warm up and capture on, as the default stream can't be captured.

    Every call gets the same stream, so that per-stream workspaces of libraries exist before a
    capture. The caller's stream is restored even after an error, where ``torch.cuda.graph`` may
    leave its own.
    """
    with torch.cuda.device(device):
        stream = _side_stream_of(torch.cuda.current_device())
        caller = torch.cuda.current_stream()
        stream.wait_stream(caller)
        with torch.cuda.stream(stream):
            yield stream
        caller.wait_stream(stream)


@functools.cache
def _side_stream_of(index: int) -> torch.cuda.Stream:
    return torch.cuda.Stream(index)


class _Captured(NamedTuple):
    graph: Graph
    inputs: tuple[Tensor, ...]  # the graph reads them
    result: Tensor | None  # the graph writes it


# More than the paper's 41 prompt lengths. The number of graphs is limited because the budget does
# not count the driver's own memory for a graph.
MAX_GRAPHS = 64
MAX_COUNTED = 128  # keys waiting for their capture; a key holds the addresses of all weights


class Graphs:
    """Runs work, and replays it as a graph after ``capture_at`` calls with the same key.

    Args:
        new_graph: makes an empty graph.
        budget: bytes that captured graphs may hold together. Beyond it, or beyond ``MAX_GRAPHS``,
            the least recently used graphs are dropped; the newest one always stays.
        capture_at: which call with a key captures, counted from 1. The call before it warms up,
            and earlier calls run as usual. A key whose graph was dropped counts from the start:
            if more kinds of work alternate than there is room for, a capture at every call would
            cost far more than it saves.
        unsupported: reason to do without graphs, or None.
        required: raise if a capture fails; otherwise warn, and continue without graphs.

    Attributes:
        unsupported: reason that graphs are not used, or no longer used; or None.
    """

    def __init__(
        self,
        new_graph: Callable[[], Graph],
        budget: int,
        *,
        capture_at: int = 2,
        unsupported: str | None = None,
        required: bool = False,
    ) -> None:
        self.unsupported = unsupported
        self._new_graph = new_graph
        self._budget = budget
        self._required = required
        self._capture_at = capture_at
        # Both have the least recently used key first.
        self._calls: dict[Hashable, int] = {}  # only keys that are not captured
        self._captured: dict[Hashable, _Captured] = {}

    def run(
        self,
        key: Hashable,
        work: Work,
        *inputs: Tensor,
        clean_up: Callable[[], None] = lambda: None,
    ) -> Tensor | None:
        """Run ``work(*inputs)``, or replay it if ``key`` was captured.

        Args:
            key: equal keys promise equal work: the same kernels on tensors at the same
                addresses, except ``inputs``, which must have the same shapes and dtypes.
            work: returns a tensor, or None if it only changes tensors in place.
            inputs: copied into tensors of the graph before a replay.
            clean_up: undoes what a failed capture has done on the host.

        Raises:
            RuntimeError: the capture failed, and graphs are required.
        """
        with _one_at_a_time, replaying(self.unsupported is None):
            if self.unsupported is not None:
                return work(*inputs)
            if key not in self._captured:
                left = self._calls_before_capture(key)
                if left > 1:
                    return work(*inputs)
                if left == 1:
                    return self._new_graph().warm_up(functools.partial(work, *inputs))
                self._capture(key, work, inputs, clean_up)
            if self.unsupported is not None:
                return work(*inputs)
            captured = self._captured[key] = self._captured.pop(key)  # most recently used
            for own, given in zip(captured.inputs, inputs, strict=True):
                own.copy_(given)
            captured.graph.replay()
            return None if captured.result is None else captured.result.clone()

    def _calls_before_capture(self, key: Hashable) -> int:
        calls = self._calls.pop(key, 0) + 1
        if calls < self._capture_at:
            self._calls[key] = calls
            if len(self._calls) > MAX_COUNTED:
                del self._calls[next(iter(self._calls))]
        return self._capture_at - calls

    def _capture(
        self, key: Hashable, work: Work, inputs: Sequence[Tensor], clean_up: Callable[[], None]
    ) -> None:
        """Capture ``work`` and keep its graph, or set ``unsupported``."""
        own = tuple(tensor.clone() for tensor in inputs)
        while self.unsupported is None:
            try:
                self._captured[key] = self._new_captured(work, own)
                self._evict()
                return
            except RuntimeError as error:
                # Out of memory: try once more after dropping all other graphs.
                if not (isinstance(error, torch.OutOfMemoryError) and self._captured):
                    self._give_up(error)
            # Retry outside of the handler: the error in it keeps memory of the attempt alive.
            clean_up()
            self._captured.clear()

    def _new_captured(self, work: Work, own: tuple[Tensor, ...]) -> _Captured:
        graph = self._new_graph()
        return _Captured(graph, own, graph.capture(functools.partial(work, *own)))

    def _evict(self) -> None:
        def held() -> int:
            return sum(captured.graph.n_bytes for captured in self._captured.values())

        def too_many() -> bool:
            return held() > self._budget or len(self._captured) > MAX_GRAPHS

        while len(self._captured) > 1 and too_many():
            del self._captured[next(iter(self._captured))]

    def _give_up(self, error: BaseException) -> None:
        while isinstance(error.__context__, Exception):
            error = error.__context__  # the cause: ending a broken capture raises a second error
        first_line, *_ = str(error).strip().split("\n")
        reason = f"{type(error).__name__}: {first_line}"
        if self._required:
            raise RuntimeError(
                f"capturing a CUDA graph failed, and cuda_graphs = 'on' asks for it: {reason}"
            ) from error
        self.unsupported = f"a capture failed ({reason})"
        warnings.warn(f"CUDA graphs are off from here on: {self.unsupported}", stacklevel=4)


# A process can capture only one graph at a time, and threads must not share a graph's own inputs.
_one_at_a_time = threading.RLock()


def graphs_on(
    device: torch.device,
    mode: str = "auto",
    generator: Callable[[], Generator | None] = lambda: None,
    unsupported: str | None = None,
    capture_at: int = 2,
) -> Graphs:
    """Make ``Graphs`` for work on ``device``, limited to a quarter of its memory.

    Args:
        device: where the work's tensors are.
        mode: ``auto`` uses graphs on a CUDA device, and continues without if a capture fails;
            ``on`` raises on another device or if a capture fails; ``off`` uses no graphs.
        generator: returns the generator of random numbers in the work; see ``CudaGraph``.
        unsupported: the caller's reason to do without graphs, or None.
        capture_at: see ``Graphs``. The default suits work that is known to come often, such as the
            steps of a training run.

    Raises:
        ValueError: an unknown mode, or ``on`` without a CUDA device or in spite of ``unsupported``.
    """
    check_name("cuda_graphs", mode, MODES)
    if mode == "off":
        unsupported = "cuda_graphs = 'off'"
    if device.type != "cuda":
        unsupported = unsupported or f"they need a CUDA device, and this is {device}"
    if mode == "on" and unsupported:
        raise ValueError(f"cuda_graphs = 'on', but {unsupported}; use 'auto'")
    budget = 0 if unsupported else torch.cuda.get_device_properties(device).total_memory // 4
    return Graphs(
        lambda: CudaGraph(device, generator()),
        budget,
        capture_at=capture_at,
        unsupported=unsupported,
        required=mode == "on",
    )
