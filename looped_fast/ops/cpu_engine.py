"""The CPU backend: the fused C++ engine of ``csrc/``, as differentiable ops.

The engine defines ``looped_fast::cpu_loop_infer``, ``cpu_loop_forward``, ``cpu_loop_backward`` and
``cpu_loop_mse``; this module loads it, and adds shapes for torch.compile, and autograd.
"""

from __future__ import annotations

import functools
import os
import threading
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes, _get_current_dispatch_mode

from looped_fast.ops import engine_file, forks, loop_autograd
from looped_fast.ops.block import GPT2, KINDS, Block, unlike
from looped_fast.ops.call import Call, LoopSettings, LoopTensors, SharedWeights

MAX_WIDTH = 1024  # widest D that the engine is tested at
WIDTH_UNIT = 32  # D is a multiple of it
N_SETTINGS = 9  # of its ops, see ``_settings``
# Settings that a call chooses in any kind of block that it has kernels for.
_FREE = ("mask", "positions", "norm_eps", "mlp_hidden")
_MAX_OUTPUTS = 8  # outputs of a fused read-out; PyTorch computes wider ones

_loading = threading.Lock()  # functools.cache may call the function in two threads at once


def load_error() -> str | None:
    """Load the engine once, compiling it if there is none; return why it can't be used, or None."""
    with _loading:
        return _load()[1]


def file() -> Path | None:
    """The engine's file, which is loaded first as in ``load_error``; None if it can't be."""
    with _loading:
        return _load()[0]


@functools.cache
def _load() -> tuple[Path | None, str | None]:
    if os.environ.get("LOOPED_FAST_NO_ENGINE", "0") not in ("", "0"):
        return None, "LOOPED_FAST_NO_ENGINE is set"
    if reason := engine_file.unsupported():
        return None, reason
    try:
        loaded = engine_file.load()
    except engine_file.BuildError as error:
        warnings.warn(
            f"the CPU engine is missing, so looped_fast runs plain PyTorch here, which is slower: "
            f"{error}. LOOPED_FAST_NO_ENGINE=1 silences this",
            stacklevel=2,
        )
        return None, str(error)
    _register()
    return loaded, None


@functools.cache
def unsupported_precision(precision: str) -> str | None:
    """Return why this machine can't run matrix products of ``precision``, or None."""
    return load_error() or torch.ops.looped_fast.cpu_unsupported(precision) or None


def unsupported(call: Call) -> str | None:
    """Return why the engine can't run ``call``, or None."""
    if call.device.type != "cpu":
        return f"tensors are on {call.device.type}"
    if call.dtype != torch.float32:
        return f"it takes float32 tensors, not {call.dtype}"
    if call.n_embd % WIDTH_UNIT or call.n_embd > MAX_WIDTH:
        return f"D = {call.n_embd} is not a multiple of {WIDTH_UNIT} up to {MAX_WIDTH}"
    if call.head_dim % 8:
        return f"head_dim = {call.head_dim} is not a multiple of 8"
    if reason := _unsupported_block(call):
        return reason
    precision = call.settings.precision
    return (
        loop_autograd.unsupported() or _switched_off(precision) or unsupported_precision(precision)
    )


def _unsupported_block(call: Call) -> str | None:
    """Return why the engine has no kernels for the block of ``call``, or None."""
    block = call.settings.block
    if block is GPT2:
        return None
    if differing := unlike(block, KINDS.values(), _FREE):
        return f"it has no kernels for a block with {differing}"
    kind, hidden = _kind(block), block.hidden(call.n_embd)
    unit = 32 if kind == "trm" else 64
    if hidden % unit or hidden > 4 * MAX_WIDTH:
        return f"mlp_hidden = {hidden} is not a multiple of {unit} up to {4 * MAX_WIDTH}"
    if block.positions == "rotary" and kind == "gpt2":
        return "it has no kernels for a block with positions = 'rotary' and bias = True"
    if block.positions == "rotary" and call.head_dim not in (8, 16, 32, 64):
        return f"with rotary positions it takes head_dim 8, 16, 32 or 64, not {call.head_dim}"
    return None


def _kind(block: Block) -> str:
    """Name of the kind of block that a block with kernels is."""
    return "gpt2" if block.norm_place == "before" else "trm"


def _settings(settings: LoopSettings, n_embd: int) -> tuple[Any, ...]:
    """A call's settings as the engine's ops take them."""
    block = settings.block
    return *settings[:5], _kind(block), block.hidden(n_embd), block.mask, block.norm_eps


def _block(settings: Sequence[Any]) -> Block:
    """The block of an op's settings, but for its positions."""
    kind, hidden, mask, eps = settings[5:N_SETTINGS]
    return KINDS[kind]._replace(mlp_hidden=hidden, mask=mask, norm_eps=eps)


def _switched_off(precision: str) -> str | None:
    """Return why matrix products of ``precision`` do not run at the moment, or None."""
    if precision == "bf16" and not torch._C._get_mkldnn_enabled():
        return "oneDNN, which multiplies in bf16, is switched off by torch.backends.mkldnn"
    return None


def can_read_out(read_out: Sequence[Tensor]) -> bool:
    """True if the engine can compute this read-out, or there is none."""
    return not read_out or 1 <= len(read_out[0]) <= _MAX_OUTPUTS


def loop(
    embeddings: Tensor,
    positions: Tensor | None,
    state: Tensor,
    weights: Sequence[Tensor],
    settings: LoopSettings,
    read_out: Sequence[Tensor] = (),
    seen: Tensor | None = None,
) -> Tensor:
    """Run ``ops.loop`` on the engine: same arguments, predictions of all tokens.

    ``read_out`` must satisfy ``can_read_out``. Nothing needs a gradient where ``seen`` is given.
    """
    flat = _settings(settings, embeddings.shape[-1])
    arguments = embeddings, positions, state, [*weights, *read_out], *flat
    inputs = [t for t in (embeddings, positions, state, *weights) if t is not None]
    trains_loop = loop_autograd.needs_grad(inputs)
    packed = _packed(embeddings, weights, flat)
    if not trains_loop and not loop_autograd.needs_grad(read_out):
        return torch.ops.looped_fast.cpu_loop_infer(*arguments, packed, seen)
    save_states = settings.recompute or not trains_loop
    outputs, *_ = torch.ops.looped_fast.cpu_loop_forward(*arguments, packed, save_states)
    return outputs


def _packed(embeddings: Tensor, weights: Sequence[Tensor], flat: tuple[Any, ...]) -> Tensor | None:
    """The weights as products read them, if several calls share these; packed by the first."""
    if not isinstance(weights, SharedWeights) or _get_current_dispatch_mode() is not None:
        return None
    n_heads, _, _, _, precision, kind, hidden, *_ = flat
    key = "cpu", precision, kind, hidden
    if key not in weights.kept:
        with torch.no_grad():
            weights.kept[key] = torch.ops.looped_fast.cpu_pack(
                embeddings, weights, n_heads, precision, kind, hidden
            )
    return weights.kept[key]


def loop_until(
    tensors: LoopTensors, settings: LoopSettings, tolerance: float
) -> tuple[Tensor, Tensor]:
    """Run ``ops.loop`` until predictions rest; see ``op.run_until``. Predictions of all tokens."""
    embeddings, positions, state, weights, read_out, seen = tensors
    n_heads, max_loops, _, *others = _settings(settings, embeddings.shape[-1])
    return torch.ops.looped_fast.cpu_loop_until(
        embeddings, positions, state, [*weights, *read_out], n_heads, max_loops, *others, tolerance,
        seen,
    )  # fmt: skip


def loop_mse(
    embeddings: Tensor,
    positions: Tensor | None,
    state: Tensor,
    weights: Sequence[Tensor],
    settings: LoopSettings,
    read_out: Sequence[Tensor],
    targets: Tensor,
    n_supervised: int,
) -> Tensor:
    """Run ``ops.loop_mse`` on the engine, which computes gradients along with the error."""
    forks.keep_to_one_thread()
    weights = [*weights, *read_out]
    tensors = (embeddings, positions, state, *weights)
    wanted = [t is not None and t.requires_grad for t in tensors]
    error, _ = torch.ops.looped_fast.cpu_loop_mse(
        embeddings, positions, state, weights, targets, n_supervised, wanted,
        *_settings(settings, embeddings.shape[-1]),
    )  # fmt: skip
    return error


def thread_limit() -> str | None:
    """Say why the engine uses fewer threads than ``torch.get_num_threads()``, or None."""
    if load_error() is not None:
        return None
    n_threads, wanted = torch.ops.looped_fast.cpu_threads(), torch.get_num_threads()
    if n_threads == wanted:
        return None
    return (
        f"on {n_threads} of {wanted} threads (torch.get_num_threads()), since the affinity and the "
        f"control groups (cgroup) of this process leave it no more CPUs"
    )


def empty_cache() -> None:
    """Free the memory that the CPU engine keeps for its next call; 1 GiB at most.

    The next call takes as much again, which slows it by a few percent. Memory is also freed when a
    model dies. Compiled steps and CUDA graphs stay: they die with their shapes and models.

        >>> import looped_fast
        >>> looped_fast.empty_cache()
    """
    if hasattr(torch.ops.looped_fast, "cpu_empty_cache"):  # else it is not loaded
        with _disable_current_modes():  # fake tensors, say: a model may die at any place
            torch.ops.looped_fast.cpu_empty_cache()


def _infer_fake(embeddings, positions, state, weights, *flat):
    flat = *flat[:N_SETTINGS], None  # without packed matrices and ``seen``
    return _forward_fake(embeddings, positions, state, weights, *flat, False)[0]


def _forward_fake(embeddings, positions, state, weights, *flat):
    n_heads, n_loops, window, _, precision, *_, save_states = flat
    save_activations, block = not save_states, _block(flat)
    B, S, D = embeddings.shape
    reads_out, n_layer = block.has_read_out(len(weights)), block.n_layer(len(weights))
    operands = torch.bfloat16 if precision == "bf16" else torch.float32
    # Columns of StepActivations in csrc/activations.h.
    before = block.norm_place == "before"
    n_operands = n_layer * ((6 if before else 4) * D + block.fc_width(D)) - before * D
    n_floats = (1 if before else 2 * n_layer) * D + n_layer * (2 * n_heads + 2) + before

    def empty(*shape: int, wanted: bool = True, dtype: torch.dtype = torch.float32) -> Tensor:
        return embeddings.new_empty(shape if wanted else (0,), dtype=dtype)

    return (
        empty(window, B, S, len(weights[-1]) if reads_out else D),
        empty(window, n_operands, B, S, wanted=save_activations, dtype=operands),
        empty(window, n_floats, B, S, wanted=save_activations),
        empty(window, B, S, D, wanted=save_states and reads_out),
        empty(B, S, D, wanted=window < n_loops),
    )


def _until_fake(embeddings, positions, state, weights, *_):
    B, S, _ = embeddings.shape
    n_loops = embeddings.new_empty((B,), dtype=torch.int64)
    return embeddings.new_empty((B, S, len(weights[-1]))), n_loops


def _backward_fake(
    grad, operands, floats, states, start, embeddings, positions, state, weights, wanted, *settings
):
    return _empty_gradients(embeddings, positions, state, weights, wanted, *settings)


def _mse_fake(embeddings, positions, state, weights, targets, n_supervised, wanted, *settings):
    grads = _empty_gradients(embeddings, positions, state, weights, wanted, *settings)
    return embeddings.new_empty(()), grads


def _mse_backward_fake(grad, gradients, inputs):
    return [torch.empty_like(g) for g in gradients]


def _empty_gradients(embeddings, positions, state, weights, wanted, n_heads, n_loops, window, *_):
    flags = [*wanted[:2], wanted[2] and window == n_loops, *wanted[3:]]
    tensors = (embeddings, state if positions is None else positions, state, *weights)
    pairs = zip(tensors, flags, strict=True)
    return [like.new_empty(like.shape if flag else (0,)) for like, flag in pairs]


def _gradients(grad, saved, inputs, wanted, settings):
    if reason := _switched_off(settings[4]):
        raise RuntimeError(f"backend 'cpu' can't run this backward: {reason}")
    return torch.ops.looped_fast.cpu_loop_backward(grad, *saved, *inputs, wanted, *settings)


def _register() -> None:
    torch.library.register_fake("looped_fast::cpu_loop_infer")(_infer_fake)
    torch.library.register_fake("looped_fast::cpu_loop_until")(_until_fake)
    torch.library.register_fake("looped_fast::cpu_loop_forward")(_forward_fake)
    torch.library.register_fake("looped_fast::cpu_loop_backward")(_backward_fake)
    torch.library.register_fake("looped_fast::cpu_loop_mse")(_mse_fake)
    loop_autograd.register("cpu", _gradients, N_SETTINGS, 2, _block)
    torch.library.register_fake("looped_fast::cpu_loop_mse_backward")(_mse_backward_fake)
    loop_autograd.register_mse()
