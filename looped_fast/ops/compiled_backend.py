"""The ``compiled`` backend: the reference's loop with a step compiled by ``torch.compile``.

AOTAutograd differentiates the step, so gradients, the window and ``recompute`` work as in
``reference``. A step is compiled for each shape, which takes seconds to half a minute.
"""

from __future__ import annotations

import functools
import os
import shutil
import sys
import types
from collections.abc import Callable, Hashable, Sequence
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import _get_current_dispatch_mode

from looped_fast.ops import loop_autograd, reference
from looped_fast.ops.call import UNSHARED, Call, LoopSettings

# Compiled steps to keep. The paper's curricula have 16 shapes, each with and without gradients.
MAX_STEPS = 128


def unsupported(call: Call) -> str | None:
    """Why ``torch.compile`` can't run ``call`` here; None where it can."""
    if reason := loop_autograd.unsupported():
        return reason
    if call.n_queries:
        return UNSHARED
    # torch.compile around the call traces it under a dispatch mode; a FLOP counter is one, too.
    if _get_current_dispatch_mode() is not None:
        return (
            "inside torch.compile or another TorchDispatchMode, which sees single operations; "
            "the reference backend has them"
        )
    if is_switched_off():
        return "torch.compile is switched off (TORCH_COMPILE_DISABLE or TORCHDYNAMO_DISABLE)"
    return _missing_compiler(call.device.type)


def is_switched_off() -> bool:
    """True where ``torch.compile`` would silently return the function as it is."""
    if os.environ.get("TORCHDYNAMO_DISABLE") == "1":
        return True
    dynamo = sys.modules.get("torch._dynamo")  # importing it takes a second
    if dynamo is not None:
        return dynamo.config.disable
    return os.environ.get("TORCH_COMPILE_DISABLE") == "1"


@functools.cache
def _missing_compiler(device: str) -> str | None:
    if device == "cuda":
        return None if find_spec("triton") else "torch.compile needs Triton, not installed here"
    if device != "cpu":
        return f"tensors are on {device}; it compiles for CPUs and CUDA devices"
    # The same compiler as in torch._inductor.cpp_builder, whose import would take a second.
    by_default = {"darwin": "clang++", "win32": "cl"}.get(sys.platform, "g++")
    compiler = os.environ.get("CXX", by_default)
    if shutil.which(compiler.split()[0]) is None:
        return (
            f"torch.compile needs a C++ compiler, and there is no {compiler}; install it or set CXX"
        )
    return None


def loop(
    embeddings: Tensor,
    positions: Tensor | None,
    state: Tensor,
    weights: Sequence[Tensor],
    settings: LoopSettings,
) -> Tensor:
    """Run ``reference.loop`` with a compiled step (same arguments and result)."""
    tensors = [t for t in (embeddings, positions, *weights) if t is not None]
    without = None if positions is None else positions.detach()
    detached = embeddings.detach(), without, [w.detach() for w in weights]
    constants = settings.n_heads, settings.injection, settings.block
    kind = (
        embeddings.shape, embeddings.dtype, embeddings.device, len(weights), constants,
        settings.precision,
    )  # fmt: skip

    def step(state: Tensor, *arguments: Any) -> Tensor:
        # torch.compile specialises on which tensors require gradients, and on whether the first
        # state is the embeddings. Making these equal lets all steps of a kind share one.
        recorded = loop_autograd.needs_grad((state, *tensors))
        if not recorded:
            state, arguments = state.detach(), (*detached, *constants)
        elif not state.requires_grad:
            state = state.detach().requires_grad_()  # its gradient is not read
        return _compiled_step((*kind, recorded))(state, *arguments)

    return reference.loop(embeddings, positions, state, weights, settings, step)


def empty_cache() -> None:
    """Drop the compiled steps."""
    _compiled_step.cache_clear()


@functools.lru_cache(MAX_STEPS)
def _compiled_step(kind: Hashable) -> Callable[..., Tensor]:
    """Compile the reference's step for calls of one ``kind``: shapes, settings, gradients or not.

    ``torch.compile`` counts recompilations per code object, and fails at the ninth shape. So each
    kind gets a copy of the code; dropping the copy from the cache also frees what was compiled.
    """
    step = reference.step
    code, scope, name, defaults = step.__code__, step.__globals__, step.__name__, step.__defaults__
    copied = types.FunctionType(code.replace(), scope, name, defaults)
    return torch.compile(copied, dynamic=False, fullgraph=True)
