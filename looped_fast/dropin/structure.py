"""What is known of an architecture, and what the forwards of several architectures share."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from looped_fast.ops.reference import interleave, is_autocast_enabled

Model = Any  # an nn.Module of another code base, known by its attributes only

# ops.loop on one model's blocks: (embeddings [B, S, D], *, n_loops, window, injection, read_out)
# -> states [W, B, S, D], or predictions with a read_out
Loop = Callable[..., Tensor]

EVEN = slice(0, None, 2)  # tokens


class Example:
    """Arguments of one call of a model."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.args = args
        self.kwargs = kwargs


@dataclass(frozen=True)
class Blocks:
    """How a code base writes GPT-2's blocks.

    Attributes:
        heads: attribute of ``attn`` that holds the number of heads.
        linear: -> the class of the four linear layers.
        attention: (block, x [B, S, D]) -> the block's own causal attention, [B, S, D].
    """

    heads: str
    linear: Callable[[], type[nn.Module]]
    attention: Callable[[Model, Tensor], Tensor]


def _linear() -> type[nn.Module]:
    return nn.Linear


def _attention(block: Model, x: Tensor) -> Tensor:
    return block.attn(x)


def _nothing(*args: Any, **kwargs: Any) -> tuple[str, ...]:
    return ()


@dataclass(frozen=True)
class Architecture:
    """One known structure. Functions are module-level, so that accelerated models pickle.

    Attributes:
        name: for messages.
        markers: attributes that tell it from those below it in ``ARCHITECTURES``.
        stack: model -> the module that holds ``wpe``, ``h`` and ``ln_f``.
        forward: (model, loop, *original arguments) -> the original's result.
        needs: further attributes that ``forward`` reads.
        example_calls: (model, generator) -> short calls to verify a model by.
        tokens_per_point: 2 if a point is x and y.
        blocks: how the blocks are written.
        unsupported: (model, *original arguments) -> why this call needs the original forward.
        long_call: (model, generator, tokens) -> a call that verifies that every token sees all
            earlier ones; None: each block's attention is looked at alone.
    """

    name: str
    markers: tuple[str, ...]
    stack: Callable[[Model], Model]
    forward: Callable[..., Any]
    needs: tuple[str, ...]
    example_calls: Callable[[Model, torch.Generator], list[Example]]
    tokens_per_point: int = 2
    blocks: Blocks = Blocks("n_head", _linear, _attention)
    unsupported: Callable[..., Iterable[str]] = _nothing
    long_call: Callable[[Model, torch.Generator, int], Example] | None = None

    def n_heads(self, model: Model) -> int:
        """Attention heads of the first block, which all others have as well."""
        return getattr(self.stack(model).h[0].attn, self.blocks.heads)


def has(module: Model, path: str) -> bool:
    """True if ``module`` has the dotted attribute ``path``."""
    for name in path.split("."):
        if not hasattr(module, name):
            return False
        module = getattr(module, name)
    return True


def weight_and_bias(module: Model) -> list[Tensor]:
    """Parameters of a linear layer, weight [out, in], or of a LayerNorm.

    The bias is zeros where there is none (nanoGPT's ``bias=False``). Hugging Face's ``Conv1D``
    keeps its weight as [in, out], of which this is a view.
    """
    weight = module.weight.t() if type(module).__name__ == "Conv1D" else module.weight
    if getattr(module, "bias", None) is None:
        return [weight, weight.new_zeros(weight.shape[0])]
    return [weight, module.bias]


def block_weights(block: Model) -> list[Tensor]:
    """The block's parameters in the order of the loop op."""
    attn, mlp = block.attn, block.mlp
    modules = (block.ln_1, attn.c_attn, attn.c_proj, block.ln_2, mlp.c_fc, mlp.c_proj)
    return [tensor for module in modules for tensor in weight_and_bias(module)]


def stack_weights(stack: Model) -> list[Tensor]:
    """The ``weights`` argument of ``ops.loop``."""
    weights = [tensor for block in stack.h for tensor in block_weights(block)]
    return weights + weight_and_bias(stack.ln_f)


def embed(model: Model, xs: Tensor, ys: Tensor) -> Tensor:
    """The embedded prompt in the parameters' dtype, [B, 2n, D]; autocast may have lowered it."""
    return model._read_in(interleave(xs, ys)).to(model._read_in.weight.dtype)


def predict(
    read_out: Model,
    loop: Loop,
    embeddings: Tensor,
    settings: dict[str, Any],
    x_tokens: slice = EVEN,
) -> Tensor:
    """Predictions at the x tokens, [W, B, n, n_outputs], read out by the loop if it can."""
    if type(read_out) is nn.Linear and x_tokens == EVEN:  # what the op reads out
        outputs = loop(embeddings, read_out=weight_and_bias(read_out), **settings)
        return outputs.to(_output_dtype(outputs))
    return read_out(loop(embeddings, **settings)[:, :, x_tokens])


def _output_dtype(tensor: Tensor) -> torch.dtype:
    """The dtype that a Linear returns for ``tensor``, under autocast or not."""
    device = tensor.device.type
    is_lowered = is_autocast_enabled(device) and tensor.dtype != torch.float64
    return torch.get_autocast_dtype(device) if is_lowered else tensor.dtype


def prompt(
    read_in: Model, wpe: Model, generator: torch.Generator, *, B: int = 2, most: int = 3
) -> tuple[Tensor, Tensor]:
    """Random float64 xs [B, n, d] and ys [B, n], n at most ``most``, on the CPU."""
    n, d = min(most, wpe.weight.shape[0] // 2), read_in.weight.shape[1]
    xs = torch.randn(B, n, d, generator=generator, dtype=torch.float64, device="cpu")
    ys = torch.randn(B, n, generator=generator, dtype=torch.float64, device="cpu")
    return xs, ys
