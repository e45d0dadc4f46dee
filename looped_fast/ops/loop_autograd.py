"""Autograd of the fast backends' ops: first derivatives in reverse mode only.

A fast backend refuses any other derivative, and never gives a wrong one; the reference has them.
Gradients of frozen tensors are neither computed nor allocated. If nothing but the read-out is
trained, the backward is a product with the states.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from looped_fast.ops import flops
from looped_fast.ops.block import Block

# (grad, saved, [e, p, z, weights], wanted, settings) -> gradients of e, p, z, *weights; any
# tensor where not wanted.
Gradients = Callable[[Tensor, list[Tensor], list[Any], list[bool], list[Any]], list[Tensor]]


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
    states: int,
    block_of: Callable[[Sequence[Any]], Block],
    lib: torch.library.Library | None = None,
) -> None:
    """Make ``looped_fast::{backend}_loop_forward`` differentiable, once.

    Args:
        backend: name of the backend. Its op takes the tensors of ``ops.loop``, settings that begin
            with n_heads, n_loops, window and injection, and arguments that no backward needs, of
            which the last is true if the backward needs the states. It returns its result, then
            what it saved.
        gradients: calls ``looped_fast::{backend}_loop_backward``.
        n_settings: number of settings that the op takes.
        states: index, in what the op saved, of the states; empty where they are the result.
        block_of: the settings of the blocks, from the op's.
        lib: the library that defines the ops; None where the extension does.
    """

    def setup_context(ctx, inputs, output) -> None:
        embeddings, positions, state, weights, *others = inputs
        result, *saved = output
        needs_states = others[-1]
        reads_out = block_of(others[:n_settings]).has_read_out(len(weights))
        # A result is saved only if it has to be, so that callers may change it in place.
        if needs_states and not reads_out:
            saved[states] = result
        ctx.n_saved, ctx.n_others, ctx.settings = len(saved), len(others), others[:n_settings]
        ctx.has_read_out_states = needs_states and reads_out
        ctx.save_for_backward(*saved, embeddings, positions, state, *weights)
        ctx.mark_non_differentiable(*output[1:])
        ctx.set_materialize_grads(False)

    def backward(ctx, grad, *_):
        tensors = ctx.saved_tensors  # unpacked once: torch.utils.checkpoint allows no second time
        saved = list(tensors[: ctx.n_saved])
        embeddings, positions, state, *weights = tensors[ctx.n_saved :]
        _, n_loops, window, injection, *_ = ctx.settings
        wanted = _wanted(ctx.needs_input_grad, window == n_loops, injection)
        grads: Sequence[Tensor | None] = [None] * len(wanted)
        if grad is not None and ctx.has_read_out_states and not any(wanted[:-2]):
            grads = [*grads[:-2], *_of_read_out(grad, saved[states])]
        elif grad is not None:
            inputs = [embeddings, positions, state, weights]
            flops.register()  # with a counter that counts the backward only
            grads = gradients(grad, saved, inputs, wanted, ctx.settings)
        return *_of_inputs(grads, wanted), *(None,) * ctx.n_others

    name = f"looped_fast::{backend}_loop"
    torch.library.register_autograd(
        f"{name}_forward", backward, setup_context=setup_context, lib=lib
    )
    _register_backward(f"{name}_backward", backend, lib)


def register_mse() -> None:
    """Make ``looped_fast::cpu_loop_mse``, whose forward returns gradients, differentiable, once."""

    def setup_context(ctx, inputs, output) -> None:
        embeddings, positions, state, weights, *others = inputs
        _, _, _, _, n_loops, window, injection, *_ = others  # targets to n_heads come first
        _, gradients = output
        ctx.n_others, ctx.settings = len(others), (window == n_loops, injection)
        ctx.save_for_backward(*gradients, embeddings, positions, state, *weights)
        ctx.mark_non_differentiable(*gradients)
        ctx.set_materialize_grads(False)

    def backward(ctx, grad, _):
        tensors = ctx.saved_tensors  # unpacked once, as above
        wanted = _wanted(ctx.needs_input_grad, *ctx.settings)
        gradients, inputs = list(tensors[: len(wanted)]), list(tensors[len(wanted) :])
        grads: Sequence[Tensor | None] = [None] * len(wanted)
        if grad is not None:
            # The op does not read inputs; it takes them so that a second derivative is refused.
            grads = torch.ops.looped_fast.cpu_loop_mse_backward(grad, gradients, inputs)
        return *_of_inputs(grads, wanted), *(None,) * ctx.n_others

    name = "looped_fast::cpu_loop_mse"
    torch.library.register_autograd(name, backward, setup_context=setup_context)
    _register_backward(f"{name}_backward", "cpu")


def _wanted(needs_input_grad, reaches_state: bool, injection: str) -> list[bool]:
    """Whether gradients of e, p, z and each weight are wanted, and anything flows there."""
    embeddings, positions, state, weights, *_ = needs_input_grad
    return [embeddings and injection != "none", positions, state and reaches_state, *weights]


def _of_inputs(grads: Sequence[Tensor | None], wanted: list[bool]) -> tuple:
    """Gradients in the structure of the op's first arguments, None where not wanted."""
    grads = [grad if flag else None for grad, flag in zip(grads, wanted, strict=True)]
    return *grads[:3], grads[3:]


def _of_read_out(grad: Tensor, states: Tensor) -> list[Tensor]:
    """Gradients of the read-out's weight and bias.

    grad: of the last R steps' predictions, [R, B, S, n_outputs]; states: [W, B, S, D].
    """
    rows = states[-len(grad) :].reshape(-1, states.shape[-1])
    grad = grad.reshape(-1, grad.shape[-1])
    with torch.autocast(grad.device.type, enabled=False):  # the backward's, not the forward's
        return [grad.transpose(0, 1) @ rows, grad.sum(0)]


def _register_backward(name: str, backend: str, lib: torch.library.Library | None = None) -> None:
    """Make a backward's op run under vmap, sample by sample, and refuse second derivatives."""
    op = getattr(torch.ops.looped_fast, name.removeprefix("looped_fast::"))

    def under_vmap(info, in_dims, *arguments):
        pairs = list(zip(arguments, in_dims, strict=True))
        samples = ([_select(*pair, i) for pair in pairs] for i in range(info.batch_size))
        grads = _stack(op(*sample) for sample in samples)
        return grads, [0] * len(grads)

    def under_is_grads_batched(grad, *others):  # no other argument is batched
        level = torch._C._vmapmode_increment_nesting() - 1
        torch._C._vmapmode_decrement_nesting()
        batch = torch._remove_batch_dim(grad, level, 0, 0)
        grads = _stack(op(sample, *others) for sample in batch)
        return [torch._add_batch_dim(grad, 0, level) for grad in grads]

    def second_backward(ctx, *_):
        raise NotImplementedError(
            f"the {backend} backend has no second derivatives; use backend='reference', inside "
            f"torch.nn.attention.sdpa_kernel(SDPBackend.MATH)"
        )

    torch.library.register_vmap(name, under_vmap, lib=lib)
    (lib or _vmap_library).impl(name, under_is_grads_batched, "Batched")
    torch.library.register_autograd(name, second_backward, lib=lib)


# For rules of the vmap of torch.autograd.grad(is_grads_batched=True), which is not torch.func's.
_vmap_library = torch.library.Library("looped_fast", "FRAGMENT")


def _stack(samples: Iterable[list[Tensor]]) -> list[Tensor]:
    """Stack each of several tensors over samples."""
    return [torch.stack(of_samples) for of_samples in zip(*samples, strict=True)]


def _select(argument: Any, dim: Any, index: int) -> Any:
    """An op's argument, or list of them, at an index of the batch."""
    if isinstance(dim, (list, tuple)):
        return [_select(*pair, index) for pair in zip(argument, dim, strict=True)]
    return argument if dim is None else argument.select(dim, index)
