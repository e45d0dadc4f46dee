"""CUDA graphs: work that Python launches once, and that is replayed as a whole from then on.

A replay repeats the captured kernels on the captured addresses. So whatever changes from call to
call must lie in a tensor, or in the seed of a generator, that is set before the replay; and what
is captured must not look at values on the host, nor depend on them in its shapes. ``Graphs``
keeps captured graphs by key (a stage of the curriculum, a shape), within a budget of memory and a
number.

Source: https://docs.pytorch.org/docs/stable/notes/cuda.html#cuda-graphs
"""

from __future__ import annotations

import contextlib
import functools
import threading
import warnings
from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Generator, Tensor

from looped_fast import ops
from looped_fast.errors import check_name
from looped_fast.ops import loop_autograd
from looped_fast.ops.call import replaying

MODES = ("auto", "on", "off")

Work = Callable[..., Tensor | None]


class Graph(Protocol):
    """Records work once, then repeats it. ``CudaGraph`` is the real one."""

    n_bytes: int  # memory it holds, once captured

    def warm_up(self, work: Work) -> Tensor | None:
        """Do ``work`` as it will be captured: libraries load, kernels compile and are tuned."""

    def capture(self, work: Work) -> Tensor | None:
        """Record ``work`` without doing it; the result holds values after ``replay``."""

    def replay(self) -> None:
        """Do what was recorded."""


class CudaGraph:
    """``torch.cuda.CUDAGraph`` with memory of its own.

    Args:
        device: a CUDA device.
        generator: of random numbers in the captured work; a replay draws what the work itself
            would draw from the generator in its state at that time.
    """

    def __init__(self, device: torch.device, generator: Generator | None = None) -> None:
        self.n_bytes = 0
        self._device = device
        self._generator = generator
        self._graph = torch.cuda.CUDAGraph()

    def warm_up(self, work: Work) -> Tensor | None:
        """Do ``work`` on the stream that captures."""
        with _side_stream(self._device):
            return work()

    def capture(self, work: Work) -> Tensor | None:
        """Record ``work``; raises RuntimeError where CUDA can't."""
        if self._generator is not None:
            self._graph.register_generator_state(self._generator)
        try:
            # Other threads may go on (thread_local): a progress bar, a logger, a data loader.
            with (
                _side_stream(self._device) as stream,
                torch.cuda.graph(self._graph, stream=stream, capture_error_mode="thread_local"),
            ):
                before = torch.cuda.memory_reserved(self._device)
                result = work()
                self.n_bytes = torch.cuda.memory_reserved(self._device) - before
        except BaseException:
            self._survive_failure()
            raise
        return result

    def replay(self) -> None:
        """Launch the graph on the current stream."""
        self._graph.replay()

    def _survive_failure(self) -> None:
        try:
            self._graph.pool()
            return  # the capture has ended in order: the work raised, for want of memory perhaps
        except RuntimeError:
            pass
        # PyTorch's allocator may keep a bare pointer to a graph whose capture did not end, and ask
        # it at every allocation from then on (CUDAGraph::capture_begin, create_allocate_filter).
        _failed.append(self._graph)
        # Versions in which a generator's state knows one capture alone believe that it still goes
        # on, and refuse to draw (CUDAGeneratorState::increase); a copy of the state does not.
        with torch.cuda.device(self._device):
            default = torch.cuda.default_generators[torch.cuda.current_device()]
        default.graphsafe_set_state(default.clone_state())


_failed: list[torch.cuda.CUDAGraph] = []


@contextlib.contextmanager
def _side_stream(device: torch.device) -> Iterator[torch.cuda.Stream]:
    """A stream to warm up and capture on: not the default one, which can't be captured.

    Always the same one, so that per-stream workspaces of libraries exist before a capture. The
    caller's stream is current again after an error, too (``torch.cuda.graph`` may leave its own).
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


# Graphs that ``Graphs`` keeps: more than the 41 lengths of the paper's prompts. The driver's memory
# for a graph is in no budget.
MAX_GRAPHS = 64
MAX_COUNTED = 128  # keys that wait for their capture; a key holds the addresses of all weights


class Graphs:
    """Does work, and once it has come often enough with the same key, replays it as a graph.

    Args:
        new_graph: makes an empty graph.
        budget: bytes that captured graphs may hold together. Those not used for longest go
            first, and so they do beyond ``MAX_GRAPHS``; the newest stays, whatever it holds.
        capture_at: the call with a key that captures. The one before warms up, earlier ones run as
            usual. A key whose graph had to go starts from the beginning: where more kinds of work
            take turns than there is room for, a capture at every call would cost far more than
            it saves.
        why_not: reason to do without graphs.
        required: a capture that fails is an error; otherwise work goes on without graphs, and a
            warning says why.

    Attributes:
        why_not: reason that graphs are not used (any more), or None.
    """

    def __init__(
        self,
        new_graph: Callable[[], Graph],
        budget: int,
        *,
        capture_at: int = 2,
        why_not: str | None = None,
        required: bool = False,
    ) -> None:
        self.why_not = why_not
        self._new_graph = new_graph
        self._budget = budget
        self._required = required
        self._capture_at = capture_at
        # Both have the least recently used first.
        self._calls: dict[Hashable, int] = {}  # of keys that are not captured
        self._captured: dict[Hashable, _Captured] = {}

    def run(
        self,
        key: Hashable,
        work: Work,
        *inputs: Tensor,
        clean_up: Callable[[], None] = lambda: None,
    ) -> Tensor | None:
        """``work(*inputs)``.

        Args:
            key: equal keys promise equal work: the same kernels, on tensors of the same
                addresses but for ``inputs``, which must have the same shapes and dtypes.
            work: returns a tensor, or None if all it does is to change tensors in place.
            inputs: copied into tensors of the graph before a replay.
            clean_up: undoes what a capture that failed half-way has done on the host.

        Raises:
            RuntimeError: the capture failed, and graphs are required.
        """
        with _one_at_a_time, replaying(self.why_not is None):
            if self.why_not is not None:
                return work(*inputs)
            if key not in self._captured:
                left = self._calls_before_capture(key)
                if left > 1:
                    return work(*inputs)
                if left == 1:
                    return self._new_graph().warm_up(functools.partial(work, *inputs))
                self._try_to_capture(key, work, inputs, clean_up)
            if self.why_not is not None:
                return work(*inputs)
            captured = self._captured[key] = self._captured.pop(key)  # now the last one used
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

    def _try_to_capture(
        self, key: Hashable, work: Work, inputs: Sequence[Tensor], clean_up: Callable[[], None]
    ) -> None:
        own = tuple(tensor.clone() for tensor in inputs)
        try:
            self._captured[key] = self._capture(work, own)
        except RuntimeError as error:
            if not (isinstance(error, torch.OutOfMemoryError) and self._captured):
                self._give_up(error)
        if key in self._captured:
            self._evict()
            return
        clean_up()  # not in the handler, where the error keeps memory of the attempt alive
        if self.why_not is None:  # other graphs hold memory that is needed here
            self._captured.clear()
            self._try_to_capture(key, work, inputs, clean_up)

    def _capture(self, work: Work, own: tuple[Tensor, ...]) -> _Captured:
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
            error = error.__context__  # the first of them; ending the capture fails, too, then
        reason = f"{type(error).__name__}: {str(error).strip().splitlines()[0]}"
        if self._required:
            raise RuntimeError(
                f"capturing a CUDA graph failed, and cuda_graphs = 'on' asks for it: {reason}"
            ) from error
        self.why_not = f"a capture failed ({reason})"
        self._captured.clear()
        warnings.warn(f"CUDA graphs are off from here on: {self.why_not}", stacklevel=4)


# Two captures at a time are not possible in one process, and a replay uses a graph's own inputs.
_one_at_a_time = threading.RLock()


def graphs_on(
    device: torch.device,
    mode: str = "auto",
    generator: Callable[[], Generator | None] = lambda: None,
    why_not: str | None = None,
    capture_at: int = 2,
) -> Graphs:
    """``Graphs`` for work on ``device``, in a quarter of its memory at most.

    Args:
        device: where the work's tensors are.
        mode: ``auto`` uses graphs where there is a CUDA device, and does without when a capture
            fails; ``on`` makes both an error; ``off`` does without.
        generator: gives that of the random numbers in the work; see ``CudaGraph``.
        why_not: the caller's reason to do without graphs.
        capture_at: see ``Graphs``. The default suits work that is known to come often, such as the
            steps of a training run.

    Raises:
        ValueError: an unknown mode, or ``on`` without a CUDA device or in spite of ``why_not``.
    """
    check_name("cuda_graphs", mode, MODES)
    if mode == "off":
        why_not = "cuda_graphs = 'off'"
    if device.type != "cuda":
        why_not = why_not or f"they need a CUDA device, and this is {device}"
    if mode == "on" and why_not:
        raise ValueError(f"cuda_graphs = 'on', but {why_not}; use 'auto'")
    budget = 0 if why_not else torch.cuda.get_device_properties(device).total_memory // 4
    return Graphs(
        lambda: CudaGraph(device, generator()),
        budget,
        capture_at=capture_at,
        why_not=why_not,
        required=mode == "on",
    )


class GraphedLoop:
    """``ops.loop``, which on a GPU is replayed from the third call of a kind.

    Not from the second: a capture waits for the device and empties the allocator's cache, and many
    a shape comes once or twice (the last batch of a data set, a trial at the prompt).

    For calls that need no gradient. Parameters may change in place between calls (an optimizer's
    step, ``load_state_dict``); ones that move are another kind of call. Results are the caller's
    own. A copy, by ``copy`` or ``pickle``, starts without graphs.

    Args:
        mode: ``auto``, ``on`` or ``off``; see ``graphs_on``.

    Raises:
        ValueError: an unknown mode; when called, ``on`` with tensors that are not on a GPU.
    """

    def __init__(self, mode: str = "auto") -> None:
        check_name("cuda_graphs", mode, MODES)
        self.mode = mode
        self._graphs: dict[torch.device, Graphs] = {}

    def __reduce__(self) -> tuple[type[GraphedLoop], tuple[str]]:
        return GraphedLoop, (self.mode,)

    def __call__(
        self,
        embeddings: Tensor,
        positions: Tensor,
        state: Tensor | None,
        weights: Sequence[Tensor],
        **settings: Any,
    ) -> Tensor:
        """Arguments and result are those of ``ops.loop``."""

        def run(embeddings: Tensor, state: Tensor | None = None) -> Tensor:
            return ops.loop(embeddings, positions, state, weights, **settings)

        inputs = (embeddings,) if state is None else (embeddings, state)
        parameters = (positions, *weights, settings)
        if not self._applies((*inputs, *parameters)):
            return run(*inputs)
        device = embeddings.device
        if device not in self._graphs:
            self._graphs[device] = graphs_on(device, self.mode, capture_at=3)
        key = (
            *(tensor.shape for tensor in inputs), embeddings.dtype, _identity(parameters),
            _tf32_allowed(), _stream(device),
        )  # fmt: skip
        # Tensors made in inference mode could not be written to outside of it.
        with torch.inference_mode(False), torch.no_grad():
            result = self._graphs[device].run(key, run, *inputs)
        assert result is not None
        return result

    def replays_on(self, device: torch.device) -> bool:
        """True where calls without gradient are replayed, once there are enough of a kind."""
        return device.type == "cuda" and self.mode != "off"

    def _applies(self, arguments: Sequence[Any]) -> bool:
        if self.mode == "off" or torch.compiler.is_compiling() or _watched():
            return False
        if not _is_on_gpu(arguments[0]):
            return self.mode == "on"  # which is an error
        tensors = list(_tensors(arguments))
        if any(type(t) not in (Tensor, torch.nn.Parameter) for t in tensors):  # fake ones, say
            return False
        if loop_autograd.needs_grad(tensors):
            return False
        return _stream(tensors[0].device) is not None


def _is_on_gpu(tensor: Tensor) -> bool:
    return tensor.is_cuda


def _stream(device: torch.device) -> int | None:
    """The current CUDA stream, or None if it is being captured (by the caller, then)."""
    with torch.cuda.device(device):
        if torch.cuda.is_current_stream_capturing():
            return None
        return torch.cuda.current_stream().cuda_stream


def _watched() -> bool:
    """Whether somebody wants to see single operations, such as a counter of FLOPs."""
    return torch.utils._python_dispatch._get_current_dispatch_mode() is not None


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        yield from _tensors(list(value.values()))
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _tensors(item)


def _identity(value: Any) -> Hashable:
    """Equal for equal settings and for tensors that are the same memory."""
    if isinstance(value, Tensor):
        return value.data_ptr(), value.shape, value.stride(), value.dtype
    if isinstance(value, dict):
        return tuple((name, _identity(item)) for name, item in value.items())
    if isinstance(value, list | tuple):
        return tuple(map(_identity, value))
    return value


def _tf32_allowed() -> bool:
    """PyTorch's switch for its own matrix products, which it has under two names."""
    matmul = torch.backends.cuda.matmul
    if hasattr(matmul, "fp32_precision"):  # from PyTorch 2.9 on; follows the older one, too
        return matmul.fp32_precision == "tf32"
    return matmul.allow_tf32
