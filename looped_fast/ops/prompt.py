"""The read-in, which embeds a prompt; one kernel launch on the triton backend."""

from __future__ import annotations

import torch
from torch import Tensor

from looped_fast.config import BACKENDS
from looped_fast.errors import check_name
from looped_fast.ops import backends, reference

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
        return reference.read_in(xs, ys, weight, bias)
    if not torch.compiler.is_compiling():  # tracing can't select; the op does
        selection = backends.select_read_in(xs.device.type, xs.dtype, len(weight), backend)
        if selection.chosen != "triton":
            return reference.read_in(xs, ys, weight, bias)
    return torch.ops.looped_fast.read_in(xs, ys, weight, bias, backend)


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
    of_x, of_y = grad[:, ::2], grad[:, 1::2]  # gradients of tokens, [B, n, D]
    with torch.autocast(grad.device.type, enabled=False):
        d_weight = torch.einsum("bno,bni->oi", of_x, xs)
        d_first = torch.einsum("bno,bn->o", of_y, ys)  # y is in coordinate 0
        d_weight = torch.cat([d_weight[:, :1] + d_first[:, None], d_weight[:, 1:]], dim=1)
        needs_xs, needs_ys, *_ = ctx.needs_input_grad  # prompts seldom need one
        d_xs = of_x @ weight if needs_xs else None
        d_ys = of_y @ weight[:, 0] if needs_ys else None
        return d_xs, d_ys, d_weight, grad.sum((0, 1)), None


for _key in ("CPU", "CUDA"):
    _library.impl("read_in", _run, _key)
torch.library.register_fake("looped_fast::read_in", _fake, lib=_library)
torch.library.register_autograd(
    "looped_fast::read_in", _backward, setup_context=_save, lib=_library
)
