"""Autograd of the fast backends' ops: first derivatives in reverse mode only.

A fast backend refuses any other derivative, and never gives a wrong one; the reference has them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

# (grad, outputs, saved, [e, p, z, weights], settings) -> gradients of e, p, z, *weights
Gradients = Callable[[Tensor, Tensor, list[Tensor], list[Any], list[Any]], list[Tensor]]


def unsupported() -> str | None:
    """Return which context asks for derivatives that only plain PyTorch has, or None."""
    if forward_ad._current_level >= 0:
        return "inside torch.autograd.forward_ad.dual_level"
    if torch._C._functorch.peek_interpreter_stack() is not None:
        return "inside a torch.func transform"
    return None


def needs_grad(tensors: Sequence[Tensor]) -> bool:
    """True if autograd records what the caller computes from ``tensors``."""
    return torch.is_grad_enabled() and any(t.requires_grad for t in tensors)


def register(
    backend: str,
    gradients: Gradients,
    n_settings: int,
    lib: torch.library.Library | None = None,
) -> None:
    """Make ``looped_fast::{backend}_loop_forward`` differentiable, once.

    Args:
        backend: name of the backend. Its op takes the tensors of ``ops.loop``, settings that begin
            with n_heads, n_loops, window and injection, and arguments that no backward needs.
        gradients: calls ``looped_fast::{backend}_loop_backward``. ``saved`` is what the forward
            returned after its first output.
        n_settings: number of settings that the op takes.
        lib: the library that defines the ops; None where the extension does.
    """

    def setup_context(ctx, inputs, output) -> None:
        embeddings, positions, state, weights, *others = inputs
        ctx.n_outputs, ctx.n_others, ctx.settings = len(output), len(others), others[:n_settings]
        ctx.save_for_backward(*output, embeddings, positions, state, *weights)
        ctx.mark_non_differentiable(*output[1:])
        ctx.set_materialize_grads(False)

    def backward(ctx, grad, *_):
        outputs, *saved = ctx.saved_tensors[: ctx.n_outputs]
        embeddings, positions, state, *weights = ctx.saved_tensors[ctx.n_outputs :]
        of_others = (None,) * ctx.n_others
        if grad is None:
            return None, None, None, [None] * len(weights), *of_others
        inputs = [embeddings, positions, state, weights]
        grads = gradients(grad, outputs, saved, inputs, ctx.settings)
        _, n_loops, window, injection, *_ = ctx.settings
        reaches_state = window == n_loops and state is not None
        return *_of_inputs(grads, reaches_state, injection), *of_others

    name = f"looped_fast::{backend}_loop"
    torch.library.register_autograd(
        f"{name}_forward", backward, setup_context=setup_context, lib=lib
    )
    torch.library.register_autograd(f"{name}_backward", _refuse_second(backend), lib=lib)


def register_mse() -> None:
    """Make ``looped_fast::cpu_loop_mse``, whose forward returns gradients, differentiable, once."""

    def setup_context(ctx, inputs, output) -> None:
        embeddings, positions, state, weights, *others = inputs
        *_, n_loops, window, injection, _ = others
        _, gradients = output
        ctx.n_others, ctx.settings = len(others), (window == n_loops, injection)
        ctx.save_for_backward(*gradients, embeddings, positions, state, *weights)
        ctx.mark_non_differentiable(*gradients)
        ctx.set_materialize_grads(False)

    def backward(ctx, grad, _):
        n = len(ctx.saved_tensors) // 2
        gradients, inputs = list(ctx.saved_tensors[:n]), list(ctx.saved_tensors[n:])
        of_others = (None,) * ctx.n_others
        if grad is None:
            return None, None, None, [None] * (n - 3), *of_others
        # The op does not read inputs; it takes them so that a second derivative is refused.
        grads = torch.ops.looped_fast.cpu_loop_mse_backward(grad, gradients, inputs)
        return *_of_inputs(grads, *ctx.settings), *of_others

    name = "looped_fast::cpu_loop_mse"
    torch.library.register_autograd(name, backward, setup_context=setup_context)
    torch.library.register_autograd(f"{name}_backward", _refuse_second("cpu"))


def _of_inputs(grads: list[Tensor], reaches_state: bool, injection: str) -> tuple:
    """Gradients of embeddings, positions, state and weights, None where nothing flows."""
    d_embeddings = None if injection == "none" else grads[0]
    return d_embeddings, grads[1], grads[2] if reaches_state else None, grads[3:]


def _refuse_second(backend: str) -> Callable[..., Any]:
    def second_backward(ctx, *_):
        raise NotImplementedError(
            f"the {backend} backend has no second derivatives; use backend='reference', inside "
            f"torch.nn.attention.sdpa_kernel(SDPBackend.MATH)"
        )

    return second_backward
