"""The loop as a differentiable PyTorch op, ``torch.ops.looped_fast.loop``, and ``loop_mse``.

Ops are registered with torch.library: schema, a fake implementation (shapes only, for
torch.compile) and one for the Autograd keys. The reference backend decomposes into ATen ops
there, so PyTorch differentiates it and Inductor may fuse it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from looped_fast.config import INJECTIONS, check_window
from looped_fast.errors import unknown_name
from looped_fast.ops import (
    backends,
    compiled_backend,
    cpu_engine,
    loop_autograd,
    reference,
    triton_backend,
)

_library = torch.library.Library("looped_fast", "DEF")
_SETTINGS = (
    "int n_heads, int n_loops, int window, str injection, str precision, str checkpoint, "
    "str backend, str attention"
)
_TENSORS = "Tensor embeddings, Tensor positions, Tensor? state, Tensor[] weights, Tensor[] read_out"
_library.define(f"loop({_TENSORS}, {_SETTINGS}) -> Tensor")
_library.define(f"loop_mse({_TENSORS}, Tensor targets, int n_supervised, {_SETTINGS}) -> Tensor")
_library.define("read_in(Tensor xs, Tensor ys, Tensor weight, Tensor bias, str backend) -> Tensor")


def _run(
    embeddings: Tensor,
    positions: Tensor,
    state: Tensor | None,
    weights: Sequence[Tensor],
    read_out: Sequence[Tensor],
    n_heads: int,
    n_loops: int,
    window: int,
    injection: str,
    precision: str,
    checkpoint: str,
    backend: str,
    attention: str,
) -> Tensor:
    problem = _problem(
        embeddings, weights, n_heads, n_loops, window, injection, precision, attention
    )
    explanation = backends.explain(problem, backend)
    state = _start(state, embeddings, injection, explanation.chosen)
    arguments: tuple[Any, ...] = (
        embeddings, positions, state, weights, n_heads, n_loops, window, injection, precision,
        checkpoint,
    )  # fmt: skip
    backend_loop: Callable[..., Tensor] = reference.loop
    can_read_out = False
    if explanation.attention is not None:
        arguments += (explanation.attention.chosen,)
        backend_loop, can_read_out = triton_backend.loop, triton_backend.can_read_out(read_out)
    elif explanation.chosen == "cpu":
        backend_loop, can_read_out = cpu_engine.loop, cpu_engine.can_read_out(read_out)
    elif explanation.chosen == "compiled":
        backend_loop = compiled_backend.loop
    if can_read_out:
        return backend_loop(*arguments, read_out)
    states = backend_loop(*arguments)
    if not read_out:
        return states
    with torch.autocast(states.device.type, enabled=False):  # a thousandth of the work
        return F.linear(states, *read_out)


def _run_mse(
    embeddings: Tensor,
    positions: Tensor,
    state: Tensor | None,
    weights: Sequence[Tensor],
    read_out: Sequence[Tensor],
    targets: Tensor,
    n_supervised: int,
    *settings: Any,
) -> Tensor:
    n_heads, n_loops, window, injection, precision, checkpoint, backend, attention = settings
    explanation = backends.explain(
        _problem(embeddings, weights, n_heads, n_loops, window, injection, precision, attention),
        backend,
    )
    state = _start(state, embeddings, injection, explanation.chosen)
    tensors = [embeddings, positions, *weights, *read_out, *([] if state is None else [state])]
    if explanation.attention and triton_backend.can_read_out(read_out) and not _wants_grad(targets):
        errors = triton_backend.loop(
            embeddings, positions, state, weights, n_heads, n_loops, window, injection, precision,
            checkpoint, explanation.attention.chosen, read_out, targets, n_supervised,
        )  # fmt: skip
        return errors.square().sum() / (n_supervised * targets.numel())  # 0 at odd tokens
    if (
        explanation.chosen == "cpu"
        and cpu_engine.can_read_out(read_out)
        and loop_autograd.needs_grad(tensors)
        and not _wants_grad(targets)
    ):
        assert state is not None  # only the triton backend may go without
        return cpu_engine.loop_mse(
            embeddings, positions, state, [*weights, *read_out], targets, n_heads, n_loops,
            window, n_supervised, injection, precision,
        )  # fmt: skip
    predictions = _run(embeddings, positions, state, weights, read_out, *settings)
    return (predictions[-n_supervised:, :, ::2] - targets).square().mean()


def _wants_grad(tensor: Tensor) -> bool:
    return loop_autograd.needs_grad([tensor])


def _start(state: Tensor | None, embeddings: Tensor, injection: str, backend: str) -> Tensor | None:
    """The state before the first step; None where the backend's kernels know it."""
    if state is None and not (backend == "triton" and injection in ("add", "mul")):
        return reference.initial_state(embeddings, injection)
    return state


def _run_read_in(xs: Tensor, ys: Tensor, weight: Tensor, bias: Tensor, backend: str) -> Tensor:
    choice = backends.choose_read_in(xs.device.type, xs.dtype, len(weight), backend)
    if choice.chosen == "triton":
        return torch.ops.looped_fast.triton_read_in(xs, ys, weight, bias)
    return reference.read_in(xs, ys, weight, bias)


# One function under both keys: below autograd it only computes, at autograd it is differentiated.
for _key in ("CompositeExplicitAutograd", "Autograd"):
    _library.impl("loop", _run, _key)
    _library.impl("loop_mse", _run_mse, _key)
    _library.impl("read_in", _run_read_in, _key)


@torch.library.register_fake("looped_fast::loop", lib=_library)
def _fake(
    embeddings, positions, state, weights, read_out, n_heads, n_loops, window, injection,
    precision, checkpoint, backend, attention,
):  # fmt: skip
    B, S, D = embeddings.shape
    return embeddings.new_empty((window, B, S, len(read_out[0]) if read_out else D))


@torch.library.register_fake("looped_fast::loop_mse", lib=_library)
def _fake_mse(embeddings, *_):
    return embeddings.new_empty(())


@torch.library.register_fake("looped_fast::read_in", lib=_library)
def _fake_read_in(xs, ys, weight, bias, backend):
    return xs.new_empty((xs.shape[0], 2 * xs.shape[1], len(weight)))


def _problem(embeddings, weights, n_heads, n_loops, window, injection, precision, attention):
    B, S, D = embeddings.shape
    replayed = backends.is_replayed()
    return backends.Problem(
        device=embeddings.device.type,
        device_index=embeddings.device.index or 0,
        replayed=replayed,
        training=replayed and loop_autograd.needs_grad((embeddings, *weights)),
        dtype=embeddings.dtype,
        precision=precision,
        batch=B,
        seq_len=S,
        n_embd=D,
        n_heads=n_heads,
        n_layer=(len(weights) - 2) // len(reference.Block._fields),
        n_loops=n_loops,
        window=window,
        injection=injection,
        attention=attention,
    )


def loop(
    embeddings: Tensor,
    positions: Tensor,
    state: Tensor | None,
    weights: Sequence[Tensor],
    *,
    n_heads: int,
    n_loops: int,
    window: int,
    read_out: Sequence[Tensor] = (),
    injection: str = "add",
    precision: str = "fp32",
    checkpoint: str = "none",
    backend: str = "auto",
    attention: str = "auto",
) -> Tensor:
    """Run a shared stack of transformer blocks ``n_loops`` times: the last states, or predictions.

    Args:
        embeddings: e, the embedded prompt, [B, S, D]; float32, or float64 on the reference.
        positions: p, added at the start of every step, [S, D].
        state: z before the first step, [B, S, D]; None for the injection's neutral element (0 for
            ``add``, 1 for ``mul``), or for ``embeddings`` where the injection has none.
        weights: per block, the twelve tensors of ``reference.Block``; then the weight and bias
            of the final LayerNorm: ``12 * n_layer + 2`` tensors.
        n_heads: attention heads; D is a multiple of it.
        n_loops: loop steps b.
        window: how many of the last steps W carry gradient and are returned.
        read_out: weight [n_outputs, D] and bias [n_outputs] of a Linear; with it predictions are
            returned, and the ``cpu`` and ``triton`` backends keep no states for a backward that
            does not need them.
        injection: ``add``, ``mul``, ``none`` or ``every_block`` (see ``ModelConfig``).
        precision: operands of matrix products: ``fp32`` (as given), ``bf16`` or ``fp16``.
        checkpoint: what the backward keeps: ``none`` checkpoints, all activations; or ``state``,
            the states alone, and recomputes a step's activations from the state before it.
        backend: ``auto``, or one of ``backends.BACKENDS`` to force it.
        attention: who computes it on the triton backend: ``auto``, or ``flash_attn``, ``sdpa``
            (PyTorch's flash attention) or ``triton`` (this project's kernel) to force it.

    Returns:
        States after steps ``n_loops - window + 1 .. n_loops``: [W, B, S, D]; or with ``read_out``
        their predictions, [W, B, S, n_outputs], computed in the tensors' dtype at any precision.
        Gradients reach embeddings, positions, weights and read-out through those steps, and
        ``state`` too when the window covers every step.

    Raises:
        ValueError: a shape, dtype or setting that does not fit; the message names it.

    Source: arXiv 2311.12424, section 4; official ``scripts/models.py``,
    ``TransformerModelLooped.forward``.
    """
    _check(embeddings, positions, state, weights, read_out, n_heads)
    _check_settings(embeddings.dtype, n_loops, window, injection, precision, checkpoint, attention)
    return torch.ops.looped_fast.loop(
        embeddings, positions, state, list(weights), list(read_out), n_heads, n_loops, window,
        injection, precision, checkpoint, backend, attention,
    )  # fmt: skip


def loop_mse(
    embeddings: Tensor,
    positions: Tensor,
    state: Tensor | None,
    weights: Sequence[Tensor],
    targets: Tensor,
    *,
    read_out: Sequence[Tensor],
    n_heads: int,
    n_loops: int,
    window: int,
    n_supervised: int | None = None,
    injection: str = "add",
    precision: str = "fp32",
    checkpoint: str = "none",
    backend: str = "auto",
    attention: str = "auto",
) -> Tensor:
    """The mean squared error of ``loop``'s predictions of the even tokens, which are x.

    That is ``(loop(...)[-n_supervised:, :, ::2] - targets).square().mean()``. The ``cpu`` backend
    computes the error's gradient along with it, sequence by sequence: it keeps activations of a
    sequence per thread instead of those of the batch, whatever ``checkpoint`` says. The ``triton``
    backend subtracts targets where it reads out.

    Args:
        targets: [B, (S + 1) // 2, n_outputs], in the dtype and on the device of the others.
        read_out: as of ``loop``; needed.
        n_supervised: last steps of the window whose predictions count; all of them by default.

    All other arguments are those of ``loop``.

    Returns:
        A scalar, [], in the tensors' dtype; differentiable, once, in all tensors.

    Raises:
        ValueError: as of ``loop``; or ``targets`` or ``n_supervised`` does not fit.

    Source: official ``scripts/train.py``, ``train_step``.
    """
    _check(embeddings, positions, state, weights, read_out, n_heads)
    _check_settings(embeddings.dtype, n_loops, window, injection, precision, checkpoint, attention)
    if not read_out:
        raise ValueError("loop_mse needs a read_out: errors are those of predictions")
    n_supervised = window if n_supervised is None else n_supervised
    if not 1 <= n_supervised <= window:
        raise ValueError(
            f"n_supervised = {n_supervised} is outside 1..{window} (window); predictions of the "
            f"last n_supervised steps of the window are compared with targets"
        )
    B, S, _ = embeddings.shape
    _check_tensor("targets", targets, (B, (S + 1) // 2, len(read_out[1])), embeddings)
    return torch.ops.looped_fast.loop_mse(
        embeddings, positions, state, list(weights), list(read_out), targets, n_supervised,
        n_heads, n_loops, window, injection, precision, checkpoint, backend, attention,
    )  # fmt: skip


def read_in(
    xs: Tensor, ys: Tensor, weight: Tensor, bias: Tensor, *, backend: str = "auto"
) -> Tensor:
    """Embed the prompt x_1, y_1, ..., x_n, y_n; y sits in coordinate 0 of its token.

    Args:
        xs: [B, n, d].
        ys: [B, n].
        weight: of the read-in, [D, d].
        bias: [D].
        backend: as of ``loop``; one launch on ``triton``, plain PyTorch on the others.

    Returns:
        e, [B, 2n, D]; differentiable in all four.

    Raises:
        ValueError: ``backend`` is unknown, or forced and unable; the reason is in the message.
    """
    return torch.ops.looped_fast.read_in(xs, ys, weight, bias, backend)


def _check(embeddings, positions, state, weights, read_out, n_heads) -> None:
    if embeddings.dim() != 3:
        raise ValueError(f"embeddings have shape {tuple(embeddings.shape)}; [B, S, D] is needed")
    B, S, D = embeddings.shape
    if n_heads < 1 or D % n_heads:
        raise ValueError(
            f"D = {D} is not divisible by n_heads = {n_heads}; choose n_heads as a divisor of {D}"
        )
    n_fields = len(reference.Block._fields)
    if len(weights) < n_fields + 2 or (len(weights) - 2) % n_fields:
        raise ValueError(
            f"{len(weights)} weights; {n_fields} per block and 2 for the final LayerNorm are needed"
        )
    shapes = {
        "c_attn_weight": (3 * D, D), "c_attn_bias": (3 * D,), "attn_c_proj_weight": (D, D),
        "c_fc_weight": (4 * D, D), "c_fc_bias": (4 * D,), "mlp_c_proj_weight": (D, 4 * D),
    }  # fmt: skip  # all others are [D]
    expected: list[tuple[str, Tensor, tuple[int, ...]]] = [("positions", positions, (S, D))]
    expected += [] if state is None else [("state", state, (B, S, D))]
    blocks, ln_f_weight, ln_f_bias = reference.split_weights(weights)
    for i, block in enumerate(blocks):
        for name, tensor in block._asdict().items():
            expected.append((f"block {i} {name}", tensor, shapes.get(name, (D,))))
    expected += [("ln_f weight", ln_f_weight, (D,)), ("ln_f bias", ln_f_bias, (D,))]
    if read_out:
        if len(read_out) != 2:
            raise ValueError(f"read_out holds {len(read_out)} tensors; weight and bias are needed")
        weight, bias = read_out
        expected += [("read_out weight", weight, (len(bias), D))]
        expected += [("read_out bias", bias, (len(bias),))]
    for name, tensor, shape in expected:
        _check_tensor(name, tensor, shape, embeddings)


def _check_tensor(name, tensor, shape, embeddings) -> None:
    if tuple(tensor.shape) != shape:
        raise ValueError(
            f"{name} has shape {tuple(tensor.shape)}; {shape} is needed for embeddings of "
            f"shape {tuple(embeddings.shape)}"
        )
    if tensor.dtype != embeddings.dtype or tensor.device != embeddings.device:
        raise ValueError(
            f"{name} is {tensor.dtype} on {tensor.device}, embeddings are "
            f"{embeddings.dtype} on {embeddings.device}; move them to one dtype and device"
        )


def _check_settings(dtype, n_loops, window, injection, precision, checkpoint, attention) -> None:
    check_window(n_loops, window)
    if injection not in INJECTIONS:
        raise unknown_name("injection", injection, INJECTIONS)
    if precision not in reference.PRECISIONS:
        raise unknown_name("precision", precision, reference.PRECISIONS)
    if attention not in ("auto", *backends.ATTENTION):
        raise unknown_name("attention", attention, ["auto", *backends.ATTENTION])
    if checkpoint not in reference.CHECKPOINTS:
        raise unknown_name("checkpoint", checkpoint, reference.CHECKPOINTS)
    if precision != "fp32" and dtype != torch.float32:
        raise ValueError(
            f"precision {precision!r} needs float32 tensors, not {dtype}; "
            f"use precision='fp32', which computes in the dtype of the tensors"
        )
