"""The CPU backend: the fused C++ engine of ``csrc/``, as differentiable ops.

``looped_fast::cpu_loop_forward``, ``cpu_loop_backward`` and ``cpu_loop_mse`` are defined by the
extension ``looped_fast.ops._C``; this adds shapes for torch.compile, and autograd.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Sequence
from importlib.machinery import PathFinder
from pathlib import Path

import torch
from torch import Tensor

from looped_fast.ops import loop_autograd

MAX_WIDTH = 1024  # widest D that the engine is tested at
_MAX_OUTPUTS = 8  # of a read-out; more are a matrix product, and PyTorch's business

_loading = threading.Lock()  # functools.cache lets a thread in while another is at work


def why_not_loaded() -> str | None:
    """Load the extension, once; the reason where there is none."""
    with _loading:
        return _load()


@functools.cache
def _load() -> str | None:
    # Beside this file: an editable install would find another copy's.
    spec = PathFinder.find_spec("looped_fast.ops._C", [str(Path(__file__).parent)])
    if spec is None or spec.origin is None:
        return (
            "the C++ extension was not built; with torch and a C++ compiler installed, run "
            "pip install --no-build-isolation ."
        )
    try:
        torch.ops.load_library(spec.origin)
    except OSError as error:
        return f"the C++ extension does not load, rebuild it for this torch: {error}"
    _register()
    return None


@functools.cache
def why_not_precision(precision: str) -> str | None:
    """Why this machine can't run matrix products of ``precision``; None where it can."""
    return why_not_loaded() or torch.ops.looped_fast.cpu_why_not(precision) or None


def can_read_out(read_out: Sequence[Tensor]) -> bool:
    """Whether the engine computes predictions itself, where there is a read-out."""
    return not read_out or 1 <= len(read_out[0]) <= _MAX_OUTPUTS


def loop(
    embeddings: Tensor,
    positions: Tensor,
    state: Tensor,
    weights: Sequence[Tensor],
    n_heads: int,
    n_loops: int,
    window: int,
    injection: str,
    precision: str,
    checkpoint: str,
    read_out: Sequence[Tensor] = (),
) -> Tensor:
    """``ops.loop`` on the engine: arguments and result are its, ``can_read_out`` given."""
    weights = [*weights, *read_out]
    tensors = (embeddings, positions, state, *weights)
    save = loop_autograd.what_to_save(tensors, checkpoint)
    outputs, *_ = torch.ops.looped_fast.cpu_loop_forward(
        embeddings, positions, state, weights, n_heads, n_loops, window, injection, precision, *save
    )
    return outputs


def loop_mse(
    embeddings: Tensor,
    positions: Tensor,
    state: Tensor,
    weights: Sequence[Tensor],
    targets: Tensor,
    n_heads: int,
    n_loops: int,
    window: int,
    n_supervised: int,
    injection: str,
    precision: str,
) -> Tensor:
    """``ops.loop_mse`` on the engine, which computes gradients too; read-out last in weights."""
    error, _ = torch.ops.looped_fast.cpu_loop_mse(
        embeddings, positions, state, weights, targets, n_heads, n_loops, window, n_supervised,
        injection, precision,
    )  # fmt: skip
    return error


def empty_cache() -> None:
    """Give back the memory that the engine keeps from call to call, if it is loaded."""
    if why_not_loaded() is None:
        torch.ops.looped_fast.cpu_empty_cache()


def _forward_fake(
    embeddings, positions, state, weights, n_heads, n_loops, window, injection, precision,
    save_activations, save_states,
):  # fmt: skip
    B, S, D = embeddings.shape
    n_layer, n_last = divmod(len(weights), 12)
    reads_out = n_last == 4
    operands = torch.bfloat16 if precision == "bf16" else torch.float32

    def empty(*shape: int, wanted: bool = True, dtype: torch.dtype = torch.float32) -> Tensor:
        return embeddings.new_empty(shape if wanted else (0,), dtype=dtype)

    return (
        empty(window, B, S, len(weights[-1]) if reads_out else D),
        empty(window, 10 * n_layer, B, S, D, wanted=save_activations, dtype=operands),
        empty(window, (n_heads + 2) * n_layer + 1, B, S, wanted=save_activations),
        empty(window, B, S, D, wanted=save_states and reads_out),
        empty(B, S, D, wanted=(save_activations or save_states) and window < n_loops),
    )


def _backward_fake(
    grad, outputs, activations, statistics, states, start, embeddings, positions, state, weights,
    n_heads, n_loops, window, injection, precision,
):  # fmt: skip
    return _empty_gradients(embeddings, positions, state, weights, n_loops, window)


def _mse_fake(
    embeddings, positions, state, weights, targets, n_heads, n_loops, window, n_supervised,
    injection, precision,
):  # fmt: skip
    grads = _empty_gradients(embeddings, positions, state, weights, n_loops, window)
    return embeddings.new_empty(()), grads


def _mse_backward_fake(grad, gradients, inputs):
    return [torch.empty_like(g) for g in gradients]


def _empty_gradients(embeddings, positions, state, weights, n_loops, window):
    grads = [embeddings, positions, state, *weights]
    grads = [torch.empty_like(t, memory_format=torch.contiguous_format) for t in grads]
    if window < n_loops:
        grads[2] = state.new_empty((0,))
    return grads


def _gradients(grad, outputs, history, inputs, settings):
    return torch.ops.looped_fast.cpu_loop_backward(grad, outputs, *history, *inputs, *settings)


def _register() -> None:
    torch.library.register_fake("looped_fast::cpu_loop_forward")(_forward_fake)
    torch.library.register_fake("looped_fast::cpu_loop_backward")(_backward_fake)
    torch.library.register_fake("looped_fast::cpu_loop_mse")(_mse_fake)
    loop_autograd.register("cpu", _gradients, n_settings=5)
    torch.library.register_fake("looped_fast::cpu_loop_mse_backward")(_mse_backward_fake)
    loop_autograd.register_mse()
