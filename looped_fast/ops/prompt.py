"""The read-in, which embeds a prompt: one kernel on the triton backend and on the CPU engine."""

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
from looped_fast.ops import backends, cpu_engine, flops, forks, loop_autograd, reference
from looped_fast.ops.modules import constant_in_graphs

_DENSE = {Tensor, torch.nn.Parameter}

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
        backend: as in ``loop``; a single kernel on ``triton`` and on ``cpu``, which gives a prompt
            the same bits in any batch; plain PyTorch on the others.

    Returns:
        e, [B, 2n, D]; differentiable in all four.

    Raises:
        ValueError: ``backend`` is unknown, or forced and can't run; the message gives the reason.
    """
    if backend != "triton" and not (backend == "auto" and xs.is_cuda):
        if backend != "auto":
            check_name("backend", backend, ("auto", *BACKENDS))
        if backend not in ("auto", "cpu"):
            return reference.read_in(xs, ys, weight, bias)
        if torch.compiler.is_compiling() and not _is_transformed():  # the same bits in a graph
            return torch.ops.looped_fast.read_in(xs, ys, weight, bias, backend)
        read = _ReadIn.apply if _is_trained(xs, ys, weight, bias) else _read_in_on_cpu
        return read(xs, ys, weight, bias)
    if not torch.compiler.is_compiling():  # tracing can't select; the op does
        selection = backends.select_read_in(xs.device.type, xs.dtype, len(weight), backend)
        if selection.chosen != "triton":
            return reference.read_in(xs, ys, weight, bias)
    return torch.ops.looped_fast.read_in(xs, ys, weight, bias, backend)


@constant_in_graphs
def _is_transformed() -> bool:
    """True inside a transform of torch.func, also while torch.compile traces it."""
    return loop_autograd.unsupported() is not None


def _is_for_engine(*tensors: Tensor) -> bool:
    """True if the CPU engine embeds these: dense float32 with values."""
    return (
        all(t.device.type == "cpu" and t.dtype == torch.float32 for t in tensors)
        and not torch.compiler.is_compiling()
        and not _is_symbolic(*tensors[:2])
        and {type(t) for t in tensors} <= _DENSE
        and len(tensors[2]) % cpu_engine.WIDTH_UNIT == 0
        and not loop_autograd.unsupported()
        and not cpu_engine.unsupported_precision("fp32")
    )


def _read_in_on_cpu(xs: Tensor, ys: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    if _is_for_engine(xs, ys, weight, bias):
        if _len_torch_dispatch_stack():
            flops.register()  # one of them may be a counter, of which this is the first call
        return torch.ops.looped_fast.cpu_read_in(xs, ys, weight, bias)
    return reference.read_in(xs, ys, weight, bias)


def check_finite(**tensors: Tensor) -> None:
    """Raise ValueError at the first NaN or Inf in tensors on the CPU, if there are values yet.

    On a GPU the check would stall the stream. Inside ``vmap`` it covers the prompts of all samples.
    """
    if not _have_values(*tensors.values()):
        return
    forks.keep_to_one_thread()
    unwrapped = {name: _unwrap(tensor) for name, tensor in tensors.items()}
    if all(t.sum().isfinite() for t in unwrapped.values()):
        return  # a sum is cheaper than a look at every value
    for name, tensor in unwrapped.items():
        if len(where := (~tensor.isfinite()).nonzero()):
            first = [int(i) for i in where[0]]  # not tolist(): it may be inside a transform
            raise ValueError(
                f"{name}{first} is {tensor[tuple(first)].item()}; prompts must be finite: "
                f"drop or impute such values"
            )


def check_indices(limit: int, remedy: str, **tensors: Tensor) -> None:
    """Raise ValueError at an index outside 0 .. limit - 1, where ``check_finite`` could look."""
    if not _have_values(*tensors.values()):
        return
    forks.keep_to_one_thread()
    for name, tensor in tensors.items():
        if tensor.numel():
            least, most = (int(bound) for bound in _unwrap(tensor).aminmax())
            if least < 0 or most >= limit:
                value = least if least < 0 else most
                raise ValueError(f"{name} hold {value}, outside 0..{limit - 1}: {remedy}")


def _have_values(*tensors: Tensor) -> bool:
    """True if the tensors are on the CPU, and computed by now."""
    if any(t.device.type != "cpu" for t in tensors) or torch.compiler.is_compiling():
        return False
    return not _is_symbolic(*tensors)


def _is_symbolic(*tensors: Tensor) -> bool:
    """True if a tensor is fake, or a tracer records what is computed from it."""
    if {type(t) for t in tensors} == {Tensor} and not _len_torch_dispatch_stack():
        return False
    modes = _TorchDispatchModeKey.FAKE, _TorchDispatchModeKey.PROXY
    return any(map(is_fake, tensors)) or any(_get_dispatch_mode(mode) for mode in modes)


def _unwrap(tensor: Tensor) -> Tensor:
    """The tensor inside the wrappers of ``torch.func`` transforms."""
    while is_functorch_wrapped_tensor(tensor):
        tensor = get_unwrapped(tensor)
    return tensor


def _is_trained(xs: Tensor, ys: Tensor, weight: Tensor, bias: Tensor) -> bool:
    """True if autograd records a call on a CPU, outside of transforms."""
    if xs.device.type != "cpu":
        return False
    return loop_autograd.needs_grad((xs, ys, weight, bias)) and not loop_autograd.unsupported()


def _run(xs: Tensor, ys: Tensor, weight: Tensor, bias: Tensor, backend: str) -> Tensor:
    selection = backends.select_read_in(xs.device.type, xs.dtype, len(weight), backend)
    if selection.chosen != "triton":
        return _read_in_on_cpu(xs, ys, weight, bias)
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
        if needs_xs:  # prompts seldom need one
            d_xs = grad[:, ::2] @ weight
        if needs_ys:
            d_ys = grad[:, 1::2] @ weight[:, 0]  # y is in coordinate 0
    return d_xs, d_ys, d_weight, d_bias, None


class _ReadIn(torch.autograd.Function):
    """``read_in`` on a CPU with the op's backward, at a third of the op's overhead."""

    @staticmethod
    def forward(ctx, xs, ys, weight, bias):
        # A tensor made in inference mode can't be saved.
        xs, ys = (t.clone() if t.is_inference() else t for t in (xs, ys))
        ctx.save_for_backward(xs, ys, weight)
        return _read_in_on_cpu(xs, ys, weight, bias)

    @staticmethod
    def backward(ctx, grad):
        return _backward(ctx, grad)[:4]


for _key in ("CPU", "CUDA", "FuncTorchBatched"):
    _library.impl("read_in", _run, _key)
torch.library.register_fake("looped_fast::read_in", _fake, lib=_library)
torch.library.register_autograd(
    "looped_fast::read_in", _backward, setup_context=_save, lib=_library
)
