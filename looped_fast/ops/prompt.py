"""The read-in, which embeds a prompt; one kernel launch on the triton backend."""

from __future__ import annotations

import torch
from torch import Tensor

from looped_fast.config import BACKENDS
from looped_fast.errors import check_name
from looped_fast.ops import backends, loop_autograd, reference

_library = torch.library.Library("looped_fast", "FRAGMENT")
_library.define("read_in(Tensor xs, Tensor ys, Tensor weight, Tensor bias, str backend) -> Tensor")


def read_in(
    xs: Tensor, ys: Tensor, weight: Tensor, bias: Tensor, *, backend: str = "auto"
) -> Tensor:
    """Embed the prompt x_1, y_1, ..., x_n, y_n; y sits in coordinate 0 of its token.

    Args:
        xs: [B, n, d].
        ys: [B, n].
        weight: of the read-in, [D, d].
        bias: [D].
        backend: as in ``loop``; a single kernel on ``triton``, plain PyTorch on the others.

    Returns:
        e, [B, 2n, D]; differentiable in all four.

    Raises:
        ValueError: ``backend`` is unknown, or forced and can't run; the message gives the reason.
    """
    if backend != "triton" and not (backend == "auto" and xs.is_cuda):
        if backend != "auto":
            check_name("backend", backend, ("auto", *BACKENDS))
        if backend in ("auto", "cpu") and _is_trained(xs, ys, weight, bias):
            return _ReadIn.apply(xs, ys, weight, bias)
        return reference.read_in(xs, ys, weight, bias)
    if not torch.compiler.is_compiling():  # tracing can't select; the op does
        selection = backends.select_read_in(xs.device.type, xs.dtype, len(weight), backend)
        if selection.chosen != "triton":
            return reference.read_in(xs, ys, weight, bias)
    return torch.ops.looped_fast.read_in(xs, ys, weight, bias, backend)


def _is_trained(xs: Tensor, ys: Tensor, weight: Tensor, bias: Tensor) -> bool:
    """True if autograd records a call on a CPU, outside of all that the op does not run in."""
    if torch.compiler.is_compiling() or xs.device.type != "cpu":
        return False
    return loop_autograd.needs_grad((xs, ys, weight, bias)) and not loop_autograd.unsupported()


def _run(xs: Tensor, ys: Tensor, weight: Tensor, bias: Tensor, backend: str) -> Tensor:
    selection = backends.select_read_in(xs.device.type, xs.dtype, len(weight), backend)
    if selection.chosen != "triton":
        return reference.read_in(xs, ys, weight, bias)
    from looped_fast.kernels import read_in as kernel  # needs Triton

    return kernel.read_in(*(t.contiguous() for t in (xs, ys, weight, bias)))


def _fake(xs: Tensor, ys: Tensor, weight: Tensor, bias: Tensor, backend: str) -> Tensor:
    return xs.new_empty((xs.shape[0], 2 * xs.shape[1], len(weight)))


def _save(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs[:3])


def _backward(ctx, grad):
    xs, ys, weight = ctx.saved_tensors
    needs_xs, needs_ys, needs_weight, needs_bias, *_ = ctx.needs_input_grad
    D, d = weight.shape
    d_xs = d_ys = d_weight = d_bias = None
    with torch.autocast(grad.device.type, enabled=False):  # the backward's, not the forward's
        if needs_weight:
            tokens = reference.interleave(xs, ys)
            d_weight = grad.reshape(-1, D).transpose(0, 1) @ tokens.reshape(-1, d)
        if needs_bias:
            d_bias = grad.sum((0, 1))
        if needs_xs:
            d_xs = grad[:, ::2] @ weight
        if needs_ys:
            d_ys = grad[:, 1::2] @ weight[:, 0]  # y is in coordinate 0
    return d_xs, d_ys, d_weight, d_bias, None


class _ReadIn(torch.autograd.Function):
    """``reference.read_in`` with the op's backward, at a third of the op's overhead."""

    @staticmethod
    def forward(ctx, xs, ys, weight, bias):
        ctx.save_for_backward(xs, ys, weight)
        return reference.read_in(xs, ys, weight, bias)

    @staticmethod
    def backward(ctx, grad):
        return _backward(ctx, grad)[:4]


for _key in ("CPU", "CUDA"):
    _library.impl("read_in", _run, _key)
torch.library.register_fake("looped_fast::read_in", _fake, lib=_library)
torch.library.register_autograd(
    "looped_fast::read_in", _backward, setup_context=_save, lib=_library
)
