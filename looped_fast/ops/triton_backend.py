"""The GPU backend: the Triton kernels of ``kernels/``, as differentiable ops.

``looped_fast::triton_loop_forward`` and ``triton_loop_backward`` are registered when the backend
is first asked about, so that importing the package needs no Triton.
"""

from __future__ import annotations

import functools
import os
import threading
from collections.abc import Sequence
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.torch_version import TorchVersion

from looped_fast.kernels.tuning import operand_precision
from looped_fast.ops import loop_autograd
from looped_fast.ops.reference import AUTOCAST_DTYPES

if TYPE_CHECKING:
    from looped_fast.ops.backends import Problem

MIN_TRITON = "3.6"
WIDTHS = (64, 128, 256, 512)
HEAD_DIMS = (16, 32, 64)
MIN_CAPABILITY = (8, 0)
MIN_TORCH = "2.8"  # has products of bf16 and fp16 matrices with a result in fp32
MAX_ELEMENTS = 2**31  # kernels index with 32 bits
MAX_OUTPUTS = 8  # of a read-out in the kernels; more are a matrix product, and PyTorch's business

_registering = threading.Lock()  # functools.cache lets a thread in while another is at work


@functools.cache
def _why_not_installed() -> str | None:
    if find_spec("triton") is None:
        return "Triton is not installed (pip install 'looped_fast[triton]', on Linux)"
    return None


def why_not_loaded() -> str | None:
    """Import Triton and register the kernels' ops, once; the reason where that can't be."""
    if reason := _why_not_installed():
        return reason
    import triton

    if TorchVersion(triton.__version__) < MIN_TRITON:
        return f"Triton is {triton.__version__}; {MIN_TRITON} or later is needed"
    with _registering:
        _register()
    return None


def _interpreting() -> bool:
    # As Triton will see it, without the second that importing it takes.
    return os.environ.get("TRITON_INTERPRET") == "1"


def why_not_interpreted() -> str | None:
    """What stands against Triton's interpreter here: NumPy 2.4 ended a use of arrays as scalars."""
    import numpy
    import triton

    if TorchVersion(triton.__version__) < "3.7" and TorchVersion(numpy.__version__) >= "2.4":
        return (
            f"the interpreter of Triton {triton.__version__} fails with NumPy {numpy.__version__} "
            f"(compiled kernels do not): pip install 'numpy<2.4', or use Triton 3.7 or later"
        )
    return None


def why_not_tensors(device: str, dtype: torch.dtype, width: int) -> str | None:
    """What stands against any kernel on tensors of such a device, dtype and width D; or None."""
    if device not in ("cpu", "cuda"):
        return f"tensors are on {device}"
    if device == "cpu" and not _interpreting():
        return _why_not_installed() or (
            "tensors are on the CPU; move them to a GPU, or for a test set TRITON_INTERPRET=1 "
            "before Python starts"
        )
    if reason := why_not_loaded() or loop_autograd.why_not():
        return reason
    if device == "cpu" and (reason := why_not_interpreted()):
        return reason
    if device == "cuda" and not torch.cuda.is_available():
        return "PyTorch sees no GPU"
    if device == "cuda" and not torch.version.hip:
        capability = torch.cuda.get_device_capability()
        if capability < MIN_CAPABILITY:
            return f"it needs compute capability {MIN_CAPABILITY}, this GPU has {capability}"
    if device == "cuda" and torch.__version__ < MIN_TORCH:
        return f"it needs PyTorch {MIN_TORCH} or later, not {torch.__version__}"
    if dtype != torch.float32:
        return f"it takes float32 tensors, not {dtype}"
    if width not in WIDTHS:
        return f"D = {width} is not one of {WIDTHS}"
    return None


def why_not(problem: Problem) -> str | None:
    """Why the kernels can't run ``problem``; None where they can."""
    D, head_dim = problem.n_embd, problem.n_embd // problem.n_heads
    if head_dim not in HEAD_DIMS:
        return f"head_dim = {head_dim} is not one of {HEAD_DIMS}"
    if reason := why_not_tensors(problem.device, problem.dtype, D):
        return reason
    # After the device: torch.export would take it for a limit of a model on the CPU too.
    if (elements := problem.batch * problem.seq_len * 4 * D) >= MAX_ELEMENTS:
        return f"{elements} hidden activations (B S 4D) are not below 2^31; use smaller batches"
    if problem.precision == "fp32" and D == 512 and operand_precision(torch.float32) == "tf32":
        return f"TF32 at D = {D} does not fit in registers; true float32, bf16 and fp16 do"
    if problem.precision == "fp32" and D == 512 and _has_little_shared_memory(problem):
        return (
            f"fp32 at D = {D} does not fit in the 99 KiB of shared memory that a block has on "
            f"this GPU; bf16 and fp16 do"
        )
    return None


def _has_little_shared_memory(problem: Problem) -> bool:
    """99 KiB to a block, where other GPUs have 163 or more."""
    if problem.device != "cuda" or torch.version.hip:
        return False
    major, minor = torch.cuda.get_device_capability()
    return (major, minor) in ((8, 6), (8, 9)) or major == 12


def loop(
    embeddings: Tensor,
    positions: Tensor,
    state: Tensor | None,
    weights: Sequence[Tensor],
    n_heads: int,
    n_loops: int,
    window: int,
    injection: str,
    precision: str,
    checkpoint: str,
    attention: str,
    read_out: Sequence[Tensor] = (),
    targets: Tensor | None = None,
    n_supervised: int | None = None,
) -> Tensor:
    """Run ``ops.loop`` in Triton kernels (same arguments and result).

    Args:
        state: None only where the injection has a neutral element: ``add`` and ``mul``.
        attention: name of the provider, chosen by ``backends.explain``.
        read_out: one that ``can_read_out`` takes.
        targets: as in ``ops.loop_mse``, but without a gradient. With them the result is the error
            of the last ``n_supervised`` steps' predictions at even tokens, and 0 at odd ones:
            [n_supervised, B, S, n_outputs].
    """
    tensors = [embeddings, positions, *weights, *read_out, *([] if state is None else [state])]
    save, save_inputs = loop_autograd.what_to_save(tensors, checkpoint)
    needs_states = save_inputs or (save and injection == "mul")
    result, *_ = torch.ops.looped_fast.triton_loop_forward(
        embeddings, positions, state, [*weights, *read_out], n_heads, n_loops, window, injection,
        precision, attention, targets, n_supervised, save, needs_states,
    )  # fmt: skip
    return result


def can_read_out(read_out: Sequence[Tensor]) -> bool:
    """Whether the kernels compute predictions themselves, where there is a read-out."""
    return not read_out or 1 <= len(read_out[1]) <= MAX_OUTPUTS


def _operand(precision: str) -> torch.dtype:
    return AUTOCAST_DTYPES[precision] or torch.float32


def _split(weights: Sequence[Tensor]) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
    """The loop's weights, 12 for each block and 2, and the read-out's, 2 or none."""
    n = len(weights) - len(weights) % 12 + 2
    return weights[:n], weights[n:]


def _forward(
    embeddings, positions, state, weights, n_heads, n_loops, window, injection, precision,
    attention, targets, n_supervised, save_activations, needs_states,
):  # fmt: skip
    from looped_fast.kernels.ahead import compile_ahead
    from looped_fast.kernels.forward import loop_forward

    weights, read_out = _split([w.contiguous() for w in weights])
    settings = (n_heads, n_loops, window, injection, _operand(precision), attention)
    keep = _what_to_keep(read_out, n_loops, window, save_activations, needs_states)
    arguments: list[Any] = [
        embeddings.contiguous(), positions.contiguous(), _contiguous(state), weights, read_out,
        *settings, *keep, _contiguous(targets), n_supervised,
    ]  # fmt: skip

    def run() -> tuple[Tensor, Any]:
        return loop_forward(*arguments)

    kind = (
        "forward", embeddings.shape, state is None, len(weights), len(read_out), *settings, *keep,
        targets is None, n_supervised, operand_precision(torch.float32),
    )  # fmt: skip
    compile_ahead(kind, embeddings.device, run)
    result, history = run()
    return result, *history


def _contiguous(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.contiguous()


def _what_to_keep(read_out, n_loops, window, save_activations, needs_states) -> tuple[bool, ...]:
    """``save_activations``, ``save_start`` and ``save_states`` of ``loop_forward``.

    States are its result without a read-out, and where the window covers every step the first one
    is an argument.
    """
    return save_activations, needs_states and window < n_loops, needs_states and bool(read_out)


def _forward_fake(
    embeddings, positions, state, weights, n_heads, n_loops, window, injection, precision,
    attention, targets, n_supervised, save_activations, needs_states,
):  # fmt: skip
    from looped_fast.kernels.history import empty_history

    read_out = _split(weights)[1]
    history = empty_history(
        embeddings, len(weights) // 12, n_heads, window, _operand(precision),
        *_what_to_keep(read_out, n_loops, window, save_activations, needs_states),
    )  # fmt: skip
    B, S, D = embeddings.shape
    shape = (n_supervised or window, B, S, len(read_out[1]) if read_out else D)
    return embeddings.new_empty(shape), *history


def _backward_op(
    grad, result, history, embeddings, positions, state, weights, n_heads, n_loops, window,
    injection, attention,
):  # fmt: skip
    from looped_fast.kernels.ahead import compile_ahead
    from looped_fast.kernels.backward import loop_backward
    from looped_fast.kernels.history import History

    tensors = (
        grad.contiguous(), result, History(*history), embeddings.contiguous(),
        positions.contiguous(), _contiguous(state), *_split([w.contiguous() for w in weights]),
    )  # fmt: skip
    settings = (n_heads, n_loops, window, injection, attention)

    def run() -> list[Tensor]:
        return loop_backward(*tensors, *settings)

    kind = (
        "backward", embeddings.shape, grad.shape, state is None, len(weights), *settings,
        *(len(kept) for kept in history), history[0].dtype,
        operand_precision(torch.float32),
    )  # fmt: skip
    # A backward may run inside an autocast that its forward was not in.
    with torch.autocast(embeddings.device.type, enabled=False):
        compile_ahead(kind, embeddings.device, run)
        return run()


def _backward_fake(
    grad, result, history, embeddings, positions, state, weights, n_heads, n_loops, window,
    injection, attention,
):  # fmt: skip
    def empty(like: Tensor, wanted: bool = True) -> Tensor:
        return embeddings.new_empty(like.shape if wanted else (0,))

    of_state = window == n_loops and state is not None
    grads = [empty(embeddings, injection != "none"), empty(positions), empty(embeddings, of_state)]
    return [*grads, *(empty(w) for w in weights)]


def _gradients(grad, result, history, inputs, settings):
    n_heads, n_loops, window, injection, _, attention = settings  # precision is the history's
    return torch.ops.looped_fast.triton_loop_backward(
        grad, result, history, *inputs, n_heads, n_loops, window, injection, attention
    )


def _read_in(xs: Tensor, ys: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    from looped_fast.kernels.read_in import read_in

    return read_in(*(t.contiguous() for t in (xs, ys, weight, bias)))


def _read_in_fake(xs: Tensor, ys: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return xs.new_empty((xs.shape[0], 2 * xs.shape[1], len(weight)))


def _save_read_in(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs[:3])


def _read_in_backward(ctx, grad):
    xs, ys, weight = ctx.saved_tensors
    of_x, of_y = grad[:, ::2], grad[:, 1::2]  # [B, n, D]
    with torch.autocast(grad.device.type, enabled=False):
        d_weight = torch.einsum("bno,bni->oi", of_x, xs)
        d_first = torch.einsum("bno,bn->o", of_y, ys)  # y is in coordinate 0
        d_weight = torch.cat([d_weight[:, :1] + d_first[:, None], d_weight[:, 1:]], dim=1)
        needs_xs, needs_ys, *_ = ctx.needs_input_grad  # of data: seldom
        d_xs = of_x @ weight if needs_xs else None
        d_ys = of_y @ weight[:, 0] if needs_ys else None
        return d_xs, d_ys, d_weight, grad.sum((0, 1))


@functools.cache
def _register() -> torch.library.Library:
    from looped_fast.kernels.history import History

    tensors = "Tensor embeddings, Tensor positions, Tensor? state, Tensor[] weights"
    settings = "int n_heads, int n_loops, int window, str injection"
    outputs = ", ".join(["Tensor"] * (1 + len(History._fields)))
    library = torch.library.Library("looped_fast", "FRAGMENT")
    library.define(
        f"triton_loop_forward({tensors}, {settings}, str precision, str attention, "
        f"Tensor? targets, int? n_supervised, bool save_activations, bool needs_states) "
        f"-> ({outputs})"
    )
    library.define(
        f"triton_loop_backward(Tensor grad, Tensor result, Tensor[] history, {tensors}, "
        f"{settings}, str attention) -> Tensor[]"
    )
    for key in ("CPU", "CUDA"):
        library.impl("triton_loop_forward", _forward, key)
        library.impl("triton_loop_backward", _backward_op, key)
    name = "looped_fast::triton_loop"
    torch.library.register_fake(f"{name}_forward", _forward_fake, lib=library)
    torch.library.register_fake(f"{name}_backward", _backward_fake, lib=library)
    loop_autograd.register("triton", _gradients, n_settings=6, lib=library)

    library.define("triton_read_in(Tensor xs, Tensor ys, Tensor weight, Tensor bias) -> Tensor")
    for key in ("CPU", "CUDA"):
        library.impl("triton_read_in", _read_in, key)
    name = "looped_fast::triton_read_in"
    torch.library.register_fake(name, _read_in_fake, lib=library)
    torch.library.register_autograd(
        name, _read_in_backward, setup_context=_save_read_in, lib=library
    )
    return library  # whose registrations last as long as it does
