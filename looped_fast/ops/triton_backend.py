"""The GPU backend: the Triton kernels of ``kernels/``, as differentiable ops.

The ops ``looped_fast::triton_loop_forward`` and ``triton_loop_backward`` are registered here. Code
that launches kernels is imported when it runs, so that importing the package needs no Triton.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Sequence
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor
from torch.torch_version import TorchVersion

from looped_fast.errors import pip_install
from looped_fast.kernels.candidates import operand_precision
from looped_fast.kernels.saved_activations import SavedActivations, empty_saved
from looped_fast.ops import loop_autograd, reference
from looped_fast.ops.block import GPT2, TRM, Block, unlike
from looped_fast.ops.call import N_FLAT, SCHEMA, UNSHARED, Call, LoopSettings

MIN_TRITON = "3.6"
WIDTHS = (64, 128, 256, 512)
HEAD_DIMS = (16, 32, 64)
MIN_CAPABILITY = (8, 0)
MAX_ELEMENTS = 2**31  # kernels index with 32 bits
# Families of blocks that have kernels, and the settings that these take as they come.
FAMILIES = (
    (GPT2, ("mask",)),
    (TRM, ("mask", "positions", "mlp_hidden", "norm_eps")),
)
HIDDEN_MULTIPLE = 64  # of the hidden width of TRM's MLP
MAX_OUTPUTS = 8  # outputs of a read-out in the kernels; PyTorch computes wider ones


@functools.cache
def load_error() -> str | None:
    """Return why there is no Triton that can compile the kernels, or None."""
    if find_spec("triton") is None:
        return f"Triton is not installed ({pip_install('triton')}, on Linux)"
    import triton

    if TorchVersion(triton.__version__) < MIN_TRITON:
        return f"Triton is {triton.__version__}; {MIN_TRITON} or later is needed"
    return None


def _interpreting() -> bool:
    # As Triton will read it, but without importing Triton, which takes a second.
    return os.environ.get("TRITON_INTERPRET") == "1"


def uninterpretable() -> str | None:
    """Return why Triton's interpreter fails here, or None: NumPy 2.4 rejects arrays as scalars."""
    import numpy
    import triton

    if TorchVersion(triton.__version__) < "3.7" and TorchVersion(numpy.__version__) >= "2.4":
        return (
            f"the interpreter of Triton {triton.__version__} fails with NumPy {numpy.__version__} "
            f"(compiled kernels do not): pip install 'numpy<2.4', or use Triton 3.7 or later"
        )
    return None


def unsupported_tensors(device: str, dtype: torch.dtype, width: int) -> str | None:
    """Return why no kernel runs on tensors of that device, dtype and width D, or None."""
    if device not in ("cpu", "cuda"):
        return f"tensors are on {device}"
    if device == "cpu" and not _interpreting():
        return (
            "tensors are on the CPU; move them to a GPU, or for a test set TRITON_INTERPRET=1 "
            "before Python starts"
        )
    if reason := load_error() or loop_autograd.unsupported():
        return reason
    if device == "cpu" and (reason := uninterpretable()):
        return reason
    if device == "cuda" and not torch.cuda.is_available():
        return "PyTorch sees no GPU"
    if device == "cuda" and not torch.version.hip:
        capability = torch.cuda.get_device_capability()
        if capability < MIN_CAPABILITY:
            return f"it needs compute capability {MIN_CAPABILITY}, this GPU has {capability}"
    if dtype != torch.float32:
        return f"it takes float32 tensors, not {dtype}"
    if width not in WIDTHS:
        return f"D = {width} is not one of {WIDTHS}"
    return None


def unsupported(call: Call) -> str | None:
    """Return why the kernels can't run ``call``, or None."""
    D, precision, block = call.n_embd, call.settings.precision, call.settings.block
    if call.n_queries:
        return UNSHARED
    differing = [unlike(block, [family], free) for family, free in FAMILIES]
    if all(differing):
        nearest = min((names for names in differing if names), key=lambda names: names.count(" = "))
        return f"it has no kernels for a block with {nearest}"
    if call.head_dim not in HEAD_DIMS:
        return f"head_dim = {call.head_dim} is not one of {HEAD_DIMS}"
    if reason := unsupported_tensors(call.device.type, call.dtype, D):
        return reason
    if (hidden := block.hidden(D)) % HIDDEN_MULTIPLE:
        return f"mlp_hidden = {hidden} is not a multiple of {HIDDEN_MULTIPLE}"
    # Checked after the device: torch.export would apply this limit to a model on the CPU too.
    widest = max(block.fc_width(D), 3 * D)
    if (elements := call.batch * call.seq_len * widest) >= MAX_ELEMENTS:
        return (
            f"{elements} hidden activations (B S {widest}) are not below 2^31; use smaller batches"
        )
    if precision == "fp32" and D == 512 and operand_precision(torch.float32) == "tf32":
        return f"TF32 at D = {D} does not fit in registers; true float32, bf16 and fp16 do"
    if precision == "fp32" and D == 512 and _has_little_shared_memory(call.device.type):
        return (
            f"fp32 at D = {D} does not fit in the 99 KiB of shared memory that a block has on "
            f"this GPU; bf16 and fp16 do"
        )
    return None


def _has_little_shared_memory(device: str) -> bool:
    """True on GPUs with 99 KiB of shared memory for a block; others have 163 or more."""
    if device != "cuda" or torch.version.hip:
        return False
    major, minor = torch.cuda.get_device_capability()
    return (major, minor) in ((8, 6), (8, 9)) or major == 12


def loop(
    embeddings: Tensor,
    positions: Tensor | None,
    state: Tensor | None,
    weights: Sequence[Tensor],
    settings: LoopSettings,
    read_out: Sequence[Tensor] = (),
    targets: Tensor | None = None,
    n_supervised: int | None = None,
) -> Tensor:
    """Run ``ops.loop`` in Triton kernels: same arguments, predictions of all tokens.

    Args:
        embeddings, positions, weights: as in ``ops.loop``.
        state: None only if the injection has a neutral element: ``add`` and ``mul``.
        settings: settings of the call; ``attention`` is what ``backends.select`` chose.
        read_out: must satisfy ``can_read_out``.
        targets: as in ``ops.loop_mse``, but without a gradient. With them the result is the error
            of the last ``n_supervised`` steps' predictions at even tokens, and 0 at odd ones:
            [n_supervised, B, S, n_outputs].

    Returns:
        States [W, B, S, D], or with a read-out predictions [W, B, S, n_outputs].
    """
    tensors = [t for t in (embeddings, positions, state, *weights) if t is not None]
    trains_loop = loop_autograd.needs_grad(tensors)
    save = trains_loop and not settings.recompute
    save_states = trains_loop and (settings.recompute or settings.injection == "mul")
    save_states = save_states or (not trains_loop and loop_autograd.needs_grad(read_out))
    result, *_ = torch.ops.looped_fast.triton_loop_forward(
        embeddings, positions, state, [*weights, *read_out], *settings.flat(), targets,
        n_supervised, save, save_states,
    )  # fmt: skip
    return result


def can_read_out(read_out: Sequence[Tensor], block: Block = GPT2) -> bool:
    """True if the kernels can compute this read-out of such blocks, or there is none."""
    return not read_out or (block.final_norm and 1 <= len(read_out[1]) <= MAX_OUTPUTS)


def _split(
    weights: Sequence[Tensor], settings: LoopSettings
) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
    """Split the loop's weights from the read-out's, 2 or none."""
    n = len(weights) - 2 * settings.block.has_read_out(len(weights))
    return weights[:n], weights[n:]


def _forward(embeddings, positions, state, weights, *others):
    from looped_fast.kernels.ahead import compile_ahead
    from looped_fast.kernels.forward import loop_forward

    *flat, targets, n_supervised, save_activations, save_states = others
    settings = LoopSettings.from_flat(flat)
    weights, read_out = _split([w.contiguous() for w in weights], settings)
    keep = _what_to_keep(read_out, settings, save_activations, save_states)
    arguments: list[Any] = [
        embeddings.contiguous(), _contiguous(positions), _contiguous(state), weights, read_out,
        settings, *keep, _contiguous(targets), n_supervised,
    ]  # fmt: skip

    def run() -> tuple[Tensor, Any]:
        return loop_forward(*arguments)

    kind = (
        "forward", embeddings.shape, state is None, len(weights), len(read_out), settings, keep,
        targets is None, n_supervised, operand_precision(torch.float32),
    )  # fmt: skip
    compile_ahead(kind, embeddings.device, run)
    result, saved = run()
    return result, *saved


def _contiguous(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.contiguous()


def _what_to_keep(read_out, settings, save_activations, save_states) -> tuple[bool, bool, bool]:
    """``save_activations``, ``save_start`` and ``save_states`` of ``loop_forward``.

    Without a read-out the states are its result; if the window covers every step, the first state
    is an argument.
    """
    save_start = save_states and settings.window < settings.n_loops
    return save_activations, save_start, save_states and bool(read_out)


def _forward_fake(embeddings, positions, state, weights, *others):
    *flat, _, n_supervised, save_activations, save_states = others
    settings = LoopSettings.from_flat(flat)
    read_out = _split(weights, settings)[1]
    saved = empty_saved(
        embeddings, settings.block.n_layer(len(weights)), settings,
        reference.AUTOCAST_DTYPES[settings.precision] or torch.float32,
        *_what_to_keep(read_out, settings, save_activations, save_states),
    )  # fmt: skip
    B, S, D = embeddings.shape
    shape = (n_supervised or settings.window, B, S, len(read_out[1]) if read_out else D)
    return embeddings.new_empty(shape), *saved


def _backward_op(grad, saved, embeddings, positions, state, weights, wanted, *flat):
    from looped_fast.kernels.ahead import compile_ahead
    from looped_fast.kernels.backward import loop_backward

    settings = LoopSettings.from_flat(flat)
    tensors = (
        grad.contiguous(), SavedActivations(*(tensor.contiguous() for tensor in saved)),
        embeddings.contiguous(), _contiguous(positions), _contiguous(state),
        *_split([w.contiguous() for w in weights], settings),
    )  # fmt: skip

    def run() -> list[Tensor]:
        return loop_backward(*tensors, settings, wanted)

    kind = (
        "backward", embeddings.shape, grad.shape, state is None, len(weights), settings,
        *(len(tensor) for tensor in saved), operand_precision(torch.float32),
    )  # fmt: skip
    # A backward may run under an autocast that its forward did not run under.
    with torch.autocast(embeddings.device.type, enabled=False):
        compile_ahead(kind, embeddings.device, run)
        return run()


def _backward_fake(grad, saved, embeddings, positions, state, weights, wanted, *flat):
    settings = LoopSettings.from_flat(flat)

    of_embeddings = wanted[0] and settings.injection != "none"
    of_state = wanted[2] and settings.window == settings.n_loops and state is not None
    wanted = [of_embeddings, wanted[1], of_state, *wanted[3:]]
    has_gradient = positions is not None and settings.block.positions == "learned"
    of_positions = positions.shape if has_gradient else (0,)
    shapes = [embeddings.shape, of_positions, embeddings.shape, *(w.shape for w in weights)]
    pairs = zip(shapes, wanted, strict=True)
    return [embeddings.new_empty(shape if flag else (0,)) for shape, flag in pairs]


def _gradients(grad, saved, inputs, wanted, settings):
    return torch.ops.looped_fast.triton_loop_backward(grad, saved, *inputs, wanted, *settings)


_TENSORS = "Tensor embeddings, Tensor? positions, Tensor? state, Tensor[] weights"
_OUTPUTS = ", ".join(["Tensor"] * (1 + len(SavedActivations._fields)))
_library = torch.library.Library("looped_fast", "FRAGMENT")
_library.define(
    f"triton_loop_forward({_TENSORS}, {SCHEMA}, Tensor? targets, SymInt? n_supervised, "
    f"bool save_activations, bool save_states) -> ({_OUTPUTS})"
)
_library.define(
    f"triton_loop_backward(Tensor grad, Tensor[] saved, {_TENSORS}, bool[] wanted, {SCHEMA}) "
    f"-> Tensor[]"
)
for _key in ("CPU", "CUDA"):
    _library.impl("triton_loop_forward", _forward, _key)
    _library.impl("triton_loop_backward", _backward_op, _key)
_name = "looped_fast::triton_loop"
torch.library.register_fake(f"{_name}_forward", _forward_fake, lib=_library)
torch.library.register_fake(f"{_name}_backward", _backward_fake, lib=_library)
loop_autograd.register(
    "triton",
    _gradients,
    N_FLAT,
    SavedActivations._fields.index("states"),
    lambda flat: LoopSettings.from_flat(flat).block,
    _library,
)
