"""The loop as a CUDA graph, for calls without gradient.

``GraphedLoop`` makes a key of each call of ``ops.loop`` (shapes, settings, addresses of the
weights); ``graphs.Graphs`` captures and replays by that key.
"""

from __future__ import annotations

import weakref
from collections.abc import Hashable, Sequence

import torch
from torch import Tensor

from looped_fast.errors import check_name
from looped_fast.kernels.candidates import operand_precision
from looped_fast.ops import cpu_engine, loop_autograd, op
from looped_fast.ops.call import LoopSettings, LoopTensors
from looped_fast.ops.graphs import MODES, Graphs, graphs_on


class GraphedLoop:
    """``ops.loop``, replayed on a GPU from the third call with the same shapes and settings.

    The second call does not capture yet: a capture waits for the device and empties the
    allocator's cache, and many shapes come only once or twice (the last batch of a data set, an
    interactive trial).

    Calls that need a gradient run as usual. Parameters may change in place between calls (an
    optimizer's step, ``load_state_dict``); parameters at new addresses need a new graph. Results
    belong to the caller: no replay overwrites them. A copy or an unpickled loop has no graphs yet.

    Args:
        mode: ``auto``, ``on`` or ``off``; see ``graphs_on``.

    Raises:
        ValueError: an unknown mode; when called, ``on`` with tensors that are not on a GPU.
    """

    def __init__(self, mode: str = "auto") -> None:
        check_name("cuda_graphs", mode, MODES)
        self.mode = mode
        self._graphs: dict[torch.device, Graphs] = {}
        # It dies with its model, whose buffers the CPU engine then need not keep.
        weakref.finalize(self, cpu_engine.empty_cache).atexit = False

    def __reduce__(self) -> tuple[type[GraphedLoop], tuple[str]]:
        return GraphedLoop, (self.mode,)

    def __call__(self, tensors: LoopTensors, settings: LoopSettings) -> Tensor:
        """Run ``op.run`` (same arguments and result)."""
        on_cpu = not _is_on_gpu(tensors.embeddings) and self.mode != "on"
        if on_cpu or tensors.seen is not None:
            return op.run(tensors, settings)

        def run(embeddings: Tensor, state: Tensor | None = None) -> Tensor:
            return op.run(tensors._replace(embeddings=embeddings, state=state), settings)

        embeddings, positions, state, weights, read_out, _ = tensors
        inputs = (embeddings,) if state is None else (embeddings, state)
        parameters = [t for t in (positions, *weights, *read_out) if t is not None]
        if not self._applies((*inputs, *parameters)):
            return run(*inputs)
        device = embeddings.device
        if device not in self._graphs:
            self._graphs[device] = graphs_on(device, self.mode, capture_at=3)
        key = (
            *(tensor.shape for tensor in inputs), embeddings.dtype, settings,
            *map(_identity, parameters), operand_precision(torch.float32), _stream(device),
        )  # fmt: skip
        # A graph's own inputs, if made in inference mode, could not be written to outside of it.
        with torch.inference_mode(False), torch.no_grad():
            result = self._graphs[device].run(key, run, *inputs)
        assert result is not None
        return result

    def replays_on(self, device: torch.device) -> bool:
        """True if calls without gradient are replayed on ``device`` from the third of a kind."""
        return device.type == "cuda" and self.mode != "off"

    def _applies(self, tensors: Sequence[Tensor]) -> bool:
        if self.mode == "off" or torch.compiler.is_compiling() or _watched():
            return False
        if not _is_on_gpu(tensors[0]):
            return self.mode == "on"  # so that ``graphs_on`` refuses
        if any(type(t) not in (Tensor, torch.nn.Parameter) for t in tensors):  # fake tensors, say
            return False
        if loop_autograd.needs_grad(tensors):
            return False
        return _stream(tensors[0].device) is not None


def _is_on_gpu(tensor: Tensor) -> bool:
    return tensor.is_cuda


def _stream(device: torch.device) -> int | None:
    """The current CUDA stream, or None if the caller is capturing it."""
    with torch.cuda.device(device):
        if torch.cuda.is_current_stream_capturing():
            return None
        return torch.cuda.current_stream().cuda_stream


def _watched() -> bool:
    """True under a TorchDispatchMode (a FLOP counter, say), which a graph replay would bypass."""
    return torch.utils._python_dispatch._get_current_dispatch_mode() is not None


def _identity(tensor: Tensor) -> Hashable:
    """A key that is equal for tensors in the same memory with the same layout."""
    return tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype
