"""The read-in, which embeds a prompt; one kernel launch on the triton backend."""

from __future__ import annotations

import torch
from torch import Tensor
from torch._C import (
    _get_dispatch_mode,
    _len_torch_dispatch_stack,
    _TorchDispatchModeKey,
)
from torch._C._functorch import get_unwrapped, is_functorch_wrapped_tensor
from torch._subclasses.fake_tensor import is_fake

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


def check_finite(xs: Tensor, ys: Tensor) -> None:
    """Raise ValueError at the first NaN or Inf in a prompt on the CPU, if there are values yet.

    On a GPU the check would stall the stream. Inside ``vmap`` it covers the prompts of all samples.
    """
    if xs.device.type != "cpu" or torch.compiler.is_compiling() or _is_symbolic(xs, ys):
        return
    xs, ys = _unwrap(xs), _unwrap(ys)
    if not (xs.sum() + ys.sum()).isfinite():  # two sums are cheaper than a look at every value
        for name, tensor in (("xs", xs), ("ys", ys)):
            if len(where := (~tensor.isfinite()).nonzero()):
                first = where[0].tolist()
                raise ValueError(
                    f"{name}{first} is {tensor[tuple(first)].item()}; prompts must be finite: "
                    f"drop or impute such values"
                )


def _is_symbolic(xs: Tensor, ys: Tensor) -> bool:
    """True if a tensor is fake, or a tracer records what is computed from it."""
    if type(xs) is type(ys) is Tensor and not _len_torch_dispatch_stack():
        return False
    modes = _TorchDispatchModeKey.FAKE, _TorchDispatchModeKey.PROXY
    return is_fake(xs) or is_fake(ys) or any(_get_dispatch_mode(mode) for mode in modes)


def _unwrap(tensor: Tensor) -> Tensor:
    """The tensor inside the wrappers of ``torch.func`` transforms."""
    while is_functorch_wrapped_tensor(tensor):
        tensor = get_unwrapped(tensor)
    return tensor


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


for _key in ("CPU", "CUDA", "FuncTorchBatched"):
    _library.impl("read_in", _run, _key)
torch.library.register_fake("looped_fast::read_in", _fake, lib=_library)
torch.library.register_autograd(
    "looped_fast::read_in", _backward, setup_context=_save, lib=_library
)
