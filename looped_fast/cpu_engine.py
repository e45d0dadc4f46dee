"""The CPU backend: the fused C++ engine of ``csrc/``, as differentiable ops.

``looped_fast::cpu_loop_forward``, ``cpu_read_out``, their backward ops and ``cpu_evaluate_trees``
are defined by the extension ``looped_fast._C``; this adds shapes for torch.compile, and autograd.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Sequence
from importlib.machinery import PathFinder
from pathlib import Path

import torch
from torch import Tensor

from looped_fast import loop_autograd

MAX_WIDTH = 1024  # widest D that the engine is tested at

_loading = threading.Lock()  # functools.cache lets a thread in while another is at work


def why_not_loaded() -> str | None:
    """Load the extension, once; the reason where there is none."""
    with _loading:
        return _load()


@functools.cache
def _load() -> str | None:
    # Beside this file: an editable install would find another copy's.
    spec = PathFinder.find_spec("looped_fast._C", [str(Path(__file__).parent)])
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
) -> Tensor:
    """``ops.loop`` on the engine: arguments and result are its."""
    tensors = (embeddings, positions, state, *weights)
    save = loop_autograd.what_to_save(tensors, n_loops, window, injection, checkpoint)
    states, *_ = torch.ops.looped_fast.cpu_loop_forward(
        embeddings, positions, state, list(weights), n_heads, n_loops, window, injection,
        precision, *save,
    )  # fmt: skip
    return states


def _forward_fake(
    embeddings, positions, state, weights, n_heads, n_loops, window, injection, precision,
    save_activations, save_start,
):  # fmt: skip
    B, S, D = embeddings.shape
    n_layer = len(weights) // 12
    operands = torch.bfloat16 if precision == "bf16" else torch.float32
    empty = embeddings.new_empty
    states = empty((window, B, S, D))
    if save_activations:
        activations = empty((window, 10 * n_layer, B, S, D), dtype=operands)
        statistics = empty((window, (n_heads + 2) * n_layer + 1 + D, B, S))
    else:
        activations, statistics = empty((0,), dtype=operands), empty((0,))
    return states, activations, statistics, empty((B, S, D) if save_start else (0,))


def _backward_fake(
    grad_states, states, activations, statistics, start, embeddings, positions, state, weights,
    n_heads, n_loops, window, injection, precision,
):  # fmt: skip
    grads = [embeddings, positions, state, *weights]
    grads = [torch.empty_like(t, memory_format=torch.contiguous_format) for t in grads]
    if window < n_loops:
        grads[2] = state.new_empty((0,))
    return grads


def _gradients(grad_states, states, history, inputs, settings):
    return torch.ops.looped_fast.cpu_loop_backward(
        grad_states, states, *history, *inputs, *settings
    )


def _read_out_fake(states, weight, bias):
    return states.new_empty((*states.shape[:-1], len(weight)))


def _read_out_backward_fake(grad, states, weight):
    empty = states.new_empty
    return empty(states.shape), empty(weight.shape), empty(len(weight))


def _save_read_out(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs[:2])


def _read_out_gradients(ctx, grad):
    with torch.autocast(grad.device.type, enabled=False):  # around a backward, too
        return torch.ops.looped_fast.cpu_read_out_backward(grad, *ctx.saved_tensors)


def _evaluate_trees_fake(xs, coordinates, leaf_values):
    return leaf_values.new_empty(xs.shape[:2])


def _register() -> None:
    torch.library.register_fake("looped_fast::cpu_evaluate_trees")(_evaluate_trees_fake)
    torch.library.register_fake("looped_fast::cpu_loop_forward")(_forward_fake)
    torch.library.register_fake("looped_fast::cpu_loop_backward")(_backward_fake)
    loop_autograd.register("cpu", _gradients)
    name = "looped_fast::cpu_read_out"
    torch.library.register_fake(name, _read_out_fake)
    torch.library.register_fake(f"{name}_backward", _read_out_backward_fake)
    torch.library.register_autograd(name, _read_out_gradients, setup_context=_save_read_out)
    loop_autograd.refuse_second_derivatives(f"{name}_backward", "cpu")
