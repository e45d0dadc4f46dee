"""The loop as differentiable PyTorch ops, ``looped_fast::loop`` and ``looped_fast::loop_mse``.

The ops are registered with torch.library: schema, a fake implementation (shapes only, for
torch.compile) and one for the Autograd keys, in which the reference backend decomposes into ATen
ops, so PyTorch differentiates it and Inductor may fuse it.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import _get_current_dispatch_mode

from looped_fast.config import check_whole
from looped_fast.ops import (
    backends,
    compiled_backend,
    cpu_engine,
    loop_autograd,
    reference,
    triton_backend,
)
from looped_fast.ops.block import GPT2, Block, block_names, final_names, shape_of
from looped_fast.ops.call import (
    N_FLAT,
    SCHEMA_GPT2,
    Call,
    LoopSettings,
    LoopTensors,
    SharedWeights,
    is_replayed,
    predicting,
)

_library = torch.library.Library("looped_fast", "DEF")
_TENSORS = (
    "Tensor embeddings, Tensor? positions, Tensor? state, Tensor[] weights, Tensor[] read_out"
)
_library.define(f"loop({_TENSORS}, {SCHEMA_GPT2}, Tensor? seen=None) -> Tensor")
_library.define(
    f"loop_mse({_TENSORS}, Tensor targets, SymInt n_supervised, {SCHEMA_GPT2}) -> Tensor"
)


def loop(
    embeddings: Tensor,
    positions: Tensor | None,
    state: Tensor | None,
    weights: Sequence[Tensor],
    *,
    read_out: Sequence[Tensor] = (),
    seen: Tensor | None = None,
    **settings: Any,
) -> Tensor:
    """Run a shared stack of transformer blocks ``n_loops`` times; return states or predictions.

    Args:
        embeddings: e, the embedded prompt, [B, S, D]; float32, or float64 on the reference.
        positions: p, added at the start of every step, [S, D]; for a block with rotary ones their
            tables, cosines and sines [2, S, D / n_heads], without gradient; None for one without.
        state: z before the first step, [B, S, D]; None for the injection's neutral element (0 for
            ``add``, 1 for ``mul``), or for ``embeddings`` where the injection has none.
        weights: per block, the tensors that ``block.block_names`` lists, as ``BlockWeights``
            describes them: twelve of GPT-2's; then the weight and bias of the final norm. As
            ``SharedWeights`` they are prepared once for all calls that are given the same object.
        read_out: weight [n_outputs, D] and bias [n_outputs] of a Linear. With it the result is
            predictions at the even tokens, which are x, and the ``cpu`` and ``triton`` backends
            keep no states for a backward that does not need them.
        seen: [m] int64, without gradient: the last m tokens are queries that share the S - m
            tokens before them. Query i sees the first ``seen[i]`` of these, and itself. With a
            ``read_out`` the result is the queries' predictions, [W, B, m, n_outputs]. The ``cpu``
            and ``reference`` backends have it.
        settings: the fields of ``LoopSettings`` by name; ``n_heads``, ``n_loops`` and ``window``
            are required. ``block`` describes the transformer blocks: GPT-2's by default.

    Returns:
        States after steps ``n_loops - window + 1 .. n_loops``: [W, B, S, D]; or with ``read_out``
        predictions, [W, B, (S + 1) // 2, n_outputs], computed in the tensors' dtype at any
        precision. Gradients reach embeddings, positions, weights and read-out through those
        steps, and ``state`` too when the window covers every step. Predictions may be changed in
        place, and so may states, but for those that the backward reads: with ``recompute``, or
        with the injection ``mul`` on the triton backend. PyTorch then refuses the backward.

    Raises:
        ValueError: a shape, dtype or setting that does not fit, ``seen`` in a call that autograd
            records, or rotary tables that need a gradient; the message names it.
        TypeError: a setting that is missing or unknown.

    Source: arXiv 2311.12424, section 4; official ``scripts/models.py``,
    ``TransformerModelLooped.forward``.
    """
    weights = weights if isinstance(weights, SharedWeights) else list(weights)
    tensors = LoopTensors(embeddings, positions, state, weights, list(read_out), seen)
    return run(tensors, LoopSettings(**settings))


def loop_mse(
    embeddings: Tensor,
    positions: Tensor | None,
    state: Tensor | None,
    weights: Sequence[Tensor],
    targets: Tensor,
    *,
    read_out: Sequence[Tensor],
    n_supervised: int | None = None,
    **settings: Any,
) -> Tensor:
    """The mean squared error of ``loop``'s predictions.

    That is ``(loop(...)[-n_supervised:] - targets).square().mean()``. The ``cpu`` backend
    computes the error's gradient along with it, sequence by sequence: it keeps activations of a
    sequence per thread instead of those of the batch, whatever ``recompute`` says. The ``triton``
    backend subtracts targets in the kernel that reads out.

    Args:
        embeddings, positions, state, weights, settings: as in ``loop``.
        targets: [B, (S + 1) // 2, n_outputs], in the dtype and on the device of the others.
        read_out: as in ``loop``, but required.
        n_supervised: last steps of the window whose predictions count; all of them by default.

    Returns:
        A scalar, [], in the tensors' dtype; once differentiable in all tensors.

    Raises:
        ValueError: as in ``loop``; or ``targets`` or ``n_supervised`` does not fit.
        TypeError: as in ``loop``.

    Source: official ``scripts/train.py``, ``train_step``.
    """
    tensors = LoopTensors(embeddings, positions, state, list(weights), list(read_out))
    return run_mse(tensors, LoopSettings(**settings), targets, n_supervised)


def run(tensors: LoopTensors, settings: LoopSettings) -> Tensor:
    """Run ``loop`` with its arguments in records."""
    tensors = _check(tensors, settings)
    if torch.compiler.is_compiling():  # otherwise the dispatcher would only cost time
        return torch.ops.looped_fast.loop(*tensors[:5], *_in_graph(settings), seen=tensors.seen)
    return _run(tensors, settings)


def run_mse(
    tensors: LoopTensors, settings: LoopSettings, targets: Tensor, n_supervised: int | None = None
) -> Tensor:
    """Run ``loop_mse`` with its arguments in records."""
    tensors = _check(tensors, settings)
    if not tensors.read_out:
        raise ValueError("loop_mse needs a read_out: errors are those of predictions")
    n_supervised = check_supervised(n_supervised, settings.window)
    B, S, _ = tensors.embeddings.shape
    shape = (B, (S + 1) // 2, len(tensors.read_out[1]))
    targets = cast_in_autocast(targets, tensors.embeddings.dtype)
    _check_tensor("targets", targets, shape, tensors.embeddings)
    if torch.compiler.is_compiling():
        return torch.ops.looped_fast.loop_mse(
            *tensors[:5], targets, n_supervised, *_in_graph(settings)
        )
    return _run_mse(tensors, settings, targets, n_supervised)


def _in_graph(settings: LoopSettings) -> tuple[Any, ...]:
    """The settings for an op in a graph of torch.compile; those of GPT-2's block are its defaults.

    ``torch.compile(dynamic=True)`` would take ``norm_eps`` for symbolic, and start over.
    """
    return settings[:-1] if settings.block is GPT2 else settings.flat()


def run_until(
    tensors: LoopTensors, settings: LoopSettings, tolerance: float
) -> tuple[Tensor, Tensor] | None:
    """Run ``loop`` until each sequence's predictions rest, if the backend can stop by itself.

    A sequence stops after the first step, from the second on, that moves each of its predictions by
    less than ``tolerance``; after ``settings.n_loops`` steps at the latest. Without gradients.

    Returns:
        Predictions as of a window of 1, without that axis, and the steps run, [B] int64; or None
        where the backend can't stop by itself: only ``cpu`` can, and not for an operation counter.
    """
    if torch.compiler.is_compiling() or _get_current_dispatch_mode() is not None:
        return None
    chosen, tensors, settings = _select(_check(tensors, settings), settings)
    if chosen != "cpu" or not (tensors.read_out and cpu_engine.can_read_out(tensors.read_out)):
        return None
    predictions, n_loops = cpu_engine.loop_until(tensors, settings, tolerance)
    return predictions[:, predicting(predictions.shape[1], tensors.seen)], n_loops


def check_supervised(n_supervised: int | None, window: int) -> int:
    """Return ``n_supervised``, or all of the window by default; raise ValueError if outside it."""
    n_supervised = window if n_supervised is None else n_supervised
    check_whole("n_supervised", n_supervised)
    if not 1 <= n_supervised <= window:
        raise ValueError(
            f"n_supervised = {n_supervised} is outside 1..{window} (window); predictions of the "
            f"last n_supervised steps of the window are compared with targets"
        )
    return n_supervised


def _run(tensors: LoopTensors, settings: LoopSettings) -> Tensor:
    return _run_on(*_select(tensors, settings))


def _run_mse(
    tensors: LoopTensors, settings: LoopSettings, targets: Tensor, n_supervised: int
) -> Tensor:
    chosen, tensors, settings = _select(tensors, settings)
    backend, read_out = _BACKENDS[chosen], tensors.read_out
    if _reads_out(chosen, tensors, settings) and not loop_autograd.needs_grad([targets]):
        embeddings, positions, state, weights, *_ = tensors
        arguments = positions, state, weights, settings, read_out, targets, n_supervised
        if chosen == "triton":
            errors = triton_backend.loop(embeddings, *arguments)
            return errors.square().sum() / (n_supervised * targets.numel())  # 0 at odd tokens
        # If only the read-out is trained, predictions keep what little its gradient needs.
        recorded = [t for t in (embeddings, positions, state, *weights) if t is not None]
        if loop_autograd.needs_grad(recorded):
            return backend.loop_mse(embeddings, *arguments)
    predictions = _run_on(chosen, tensors, settings)
    return (predictions[-n_supervised:] - targets).square().mean()


_BACKENDS: dict[str, Any] = {
    "triton": triton_backend,
    "cpu": cpu_engine,
    "compiled": compiled_backend,
    "reference": reference,
}


def _reads_out(chosen: str, tensors: LoopTensors, settings: LoopSettings) -> bool:
    """True if the chosen backend itself computes the read-out, or there is none."""
    if chosen == "triton":
        return triton_backend.can_read_out(tensors.read_out, settings.block)
    return chosen == "cpu" and cpu_engine.can_read_out(tensors.read_out)


def _run_on(chosen: str, tensors: LoopTensors, settings: LoopSettings) -> Tensor:
    """Run the chosen backend; return states, or predictions at the even tokens."""
    backend, read_out, seen = _BACKENDS[chosen], tensors.read_out, tensors.seen
    shared = {} if seen is None else {"seen": seen}  # which only cpu and reference are given
    if _reads_out(chosen, tensors, settings):
        outputs = backend.loop(*tensors[:4], settings, read_out, **shared)
    else:
        outputs = backend.loop(*tensors[:4], settings, **shared)
        if read_out:
            with reference.autocast(outputs.device.type, "fp32"):  # 0.1 % of the work
                outputs = F.linear(outputs, *read_out)
    return outputs[:, :, predicting(outputs.shape[2], seen)] if read_out else outputs


def _select(tensors: LoopTensors, settings: LoopSettings) -> tuple[str, LoopTensors, LoopSettings]:
    """Select a backend; return it, and the arguments with first state and attention filled in."""
    embeddings, _, state, weights, _, seen = tensors
    replayed = is_replayed()
    training = replayed and loop_autograd.needs_grad((embeddings, *weights))
    n_layer = settings.block.n_layer(len(weights))
    device, dtype, (B, S, D) = embeddings.device, embeddings.dtype, embeddings.shape
    n_queries = 0 if seen is None else len(seen)
    call = Call(settings, device, dtype, B, S, D, n_layer, replayed, training, n_queries)
    selection = backends.select(call)
    if selection.attention is not None:
        settings = settings._replace(attention=selection.attention.chosen)
    knows_start = selection.chosen == "triton" and settings.injection in ("add", "mul")
    if state is None and not knows_start:
        state = reference.initial_state(embeddings, settings.injection)
        tensors = tensors._replace(state=state)
    return selection.chosen, tensors, settings


_END = 5 + N_FLAT  # of tensors and settings; ``seen`` follows unless it is None


def _impl(*flat: Any) -> Tensor:
    return _run(LoopTensors(*flat[:5], *flat[_END:]), LoopSettings.from_flat(flat[5:_END]))


def _impl_mse(*flat: Any) -> Tensor:
    return _run_mse(LoopTensors(*flat[:5]), LoopSettings.from_flat(flat[7:]), *flat[5:7])


# One function for all keys: below autograd it only computes, at Autograd it is differentiated, at
# FuncTorchBatched (a vmap inside torch.compile) each of the reference's ops has a batching rule.
for _key in ("CompositeExplicitAutograd", "Autograd", "FuncTorchBatched"):
    _library.impl("loop", _impl, _key)
    _library.impl("loop_mse", _impl_mse, _key)


@torch.library.register_fake("looped_fast::loop", lib=_library)
def _fake(embeddings, positions, state, weights, read_out, *flat):
    (B, S, D), window = embeddings.shape, LoopSettings.from_flat(flat[:N_FLAT]).window
    seen = flat[N_FLAT] if len(flat) > N_FLAT else None
    if not read_out:
        return embeddings.new_empty((window, B, S, D))
    return embeddings.new_empty((window, B, S, len(read_out[0])))[:, :, predicting(S, seen)]


@torch.library.register_fake("looped_fast::loop_mse", lib=_library)
def _fake_mse(embeddings, *_):
    return embeddings.new_empty(())


def cast_in_autocast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """``tensor`` in ``dtype`` if autocast around the call casts it for a Linear, else unchanged."""
    if tensor.dtype == dtype or tensor.dtype not in _CAST_BY_AUTOCAST:
        return tensor
    return tensor.to(dtype) if reference.is_autocast_enabled(tensor.device.type) else tensor


_CAST_BY_AUTOCAST = (torch.float32, torch.bfloat16, torch.float16)


def _check(tensors: LoopTensors, settings: LoopSettings) -> LoopTensors:
    """Return the tensors, as autocast casts them. Raises ValueError: see ``loop``."""
    embeddings, positions, state, weights, read_out, seen = tensors
    like = weights[0] if positions is None and weights else positions
    if like is not None and (embeddings.dtype != like.dtype or state is not None):
        embeddings = cast_in_autocast(embeddings, like.dtype)
        state = None if state is None else cast_in_autocast(state, like.dtype)
        tensors = tensors._replace(embeddings=embeddings, state=state)
    settings.check(embeddings.dtype)
    if embeddings.dim() != 3:
        raise ValueError(f"embeddings have shape {tuple(embeddings.shape)}; [B, S, D] is needed")
    B, S, D = embeddings.shape
    n_heads = settings.n_heads
    if n_heads < 1 or D % n_heads:
        raise ValueError(
            f"D = {D} is not divisible by n_heads = {n_heads}; choose n_heads as a divisor of {D}"
        )
    block = settings.block
    if len(read_out) not in (0, 2):
        raise ValueError(f"read_out holds {len(read_out)} tensors; weight and bias are needed")
    expected = _expected.__wrapped__ if torch.compiler.is_compiling() else _expected
    names, shapes = expected(block, D, len(weights), len(read_out) and len(read_out[1]))
    given = [*weights, *read_out, *_check_positions(positions, block, D // n_heads)]
    if positions is not None:
        of_positions = (2, S, D // n_heads) if block.positions == "rotary" else (S, D)
        names, shapes = [*names, "positions"], [*shapes, of_positions]
    if state is not None:
        given, shapes = [*given, state], [*shapes, (B, S, D)]
    dtypes, devices = [embeddings.dtype] * len(given), [embeddings.device] * len(given)
    fit = [t.dtype for t in given] == dtypes and [t.device for t in given] == devices
    if not fit or [t.shape for t in given] != shapes:
        names = [*names, "state"]
        for name, tensor, shape in zip(names, given, shapes, strict=False):
            _check_tensor(name, tensor, shape, embeddings)
    if seen is not None:
        _check_seen(seen, tensors)
    return tensors


def _check_positions(positions: Tensor | None, block: Block, head_dim: int) -> list[Tensor]:
    """The positions, if the block has any. Raises ValueError unless they are given just then."""
    if (block.positions == "none") != (positions is None):
        given = "None" if positions is None else "given"
        raise ValueError(f"positions are {given}, but the block's are {block.positions!r}")
    found = [] if positions is None else [positions]
    if block.positions == "rotary" and head_dim % 2:
        raise ValueError(f"head_dim = {head_dim} is odd; rotary positions turn pairs")
    if block.positions == "rotary" and loop_autograd.needs_grad(found):
        raise ValueError("positions are rotary tables, which have no gradient; detach() them")
    return found


def _check_seen(seen: Tensor, tensors: LoopTensors) -> None:
    embeddings = tensors.embeddings
    S = embeddings.shape[1]
    if seen.dtype != torch.int64 or seen.dim() != 1 or seen.device != embeddings.device:
        raise ValueError(
            f"seen is {seen.dtype} of shape {tuple(seen.shape)} on {seen.device}; [m] int64 on "
            f"{embeddings.device} is needed"
        )
    if len(seen) > S:
        raise ValueError(f"seen is for {len(seen)} queries; embeddings have only {S} tokens")
    if not torch.compiler.is_compiling() and seen.device.type == "cpu" and len(seen):
        n_shared, least, most = S - len(seen), int(seen.min()), int(seen.max())
        if least < 0 or most > n_shared:
            value = least if least < 0 else most
            raise ValueError(
                f"seen holds {value}; a query sees 0..{n_shared} of the tokens before the queries"
            )
    recorded = [t for t in (embeddings, tensors.positions, tensors.state) if t is not None]
    if loop_autograd.needs_grad((*recorded, *tensors.weights, *tensors.read_out)):
        raise ValueError("seen is for inference; call inside torch.no_grad()")


@functools.lru_cache
def _expected(
    block: Block, D: int, n_weights: int, n_outputs: int
) -> tuple[list[str], list[tuple[int, ...]]]:
    """Expected names and shapes of the loop's weights, and of the read-out's if it has outputs.

    Raises ValueError: that is no number of weights for whole blocks.
    """
    n, n_last = block.n_block_weights, block.n_final_weights
    if n_weights < n + n_last or (n_weights - n_last) % n:
        raise ValueError(
            f"{n_weights} weights; {n} per block and {n_last} for the final norm are needed"
        )
    F, fc = block.hidden(D), block.fc_width(D)  # see ``_in_graph``
    of_blocks, last = block_names(block) * block.n_layer(n_weights), final_names(block)
    names = [f"block {i // n} {name}" for i, name in enumerate(of_blocks)]
    names += [name.replace("ln_f_", "ln_f ") for name in last]
    shapes = [shape_of(name, D, F, fc) for name in (*of_blocks, *last)]
    if n_outputs:
        names, shapes = (
            [*names, "read_out weight", "read_out bias"],
            [*shapes, (n_outputs, D), (n_outputs,)],
        )
    return names, shapes


def _check_tensor(name, tensor, shape, embeddings) -> None:
    if tensor.shape != shape:
        raise ValueError(
            f"{name} has shape {tuple(tensor.shape)}; {shape} is needed for embeddings of "
            f"shape {tuple(embeddings.shape)}"
        )
    if tensor.dtype != embeddings.dtype or tensor.device != embeddings.device:
        raise ValueError(
            f"{name} is {tensor.dtype} on {tensor.device}, embeddings are "
            f"{embeddings.dtype} on {embeddings.device}; move them to one dtype and device"
        )
