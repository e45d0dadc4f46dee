"""Modules of a Tiny Recursive Model: they hold parameters under the public names, and compute.

``ops.loop`` computes faster with the parameters of the blocks. The blocks' forwards here run where
a module is hooked, wrapped or replaced, so that the op would not compute what the module does.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from looped_fast.model.blocks import Part
from looped_fast.model.trm_config import TRMConfig
from looped_fast.ops import reference

# Of a standard normal: the part within two sigma, and the standard deviation of that part.
_WITHIN = math.erf(math.sqrt(2))
_STD_WITHIN = math.sqrt(1 - 4 * math.exp(-2) / (math.sqrt(2 * math.pi) * _WITHIN))


@torch.no_grad()
def truncated_normal_(tensor: Tensor, std: float) -> Tensor:
    """Fill with normal values of standard deviation ``std`` after they are cut off at two sigma.

    Values are those that the public ``models/common.py``, ``trunc_normal_init_``, draws after the
    same ``torch.manual_seed``: uniform ones through the inverse of the distribution.
    """
    sigma = std / _STD_WITHIN
    tensor.uniform_(-_WITHIN, _WITHIN).erfinv_().mul_(math.sqrt(2) * sigma)
    return tensor.clamp_(-2 * sigma, 2 * sigma)


def linear(n_in: int, n_out: int, bias: bool = False) -> nn.Linear:
    """A Linear whose weight is drawn from a truncated LeCun normal, and whose bias is 0."""
    device = torch.get_default_device()
    layer = nn.utils.skip_init(nn.Linear, n_in, n_out, bias=bias, device=device)
    truncated_normal_(layer.weight, 1 / math.sqrt(n_in))
    if bias:
        nn.init.zeros_(layer.bias)
    return layer


class Embedding(nn.Module):
    """Vectors of tokens or positions, [n, D], under the public name."""

    def __init__(self, n: int, D: int) -> None:
        super().__init__()
        self.embedding_weight = nn.Parameter(truncated_normal_(torch.empty(n, D), 1 / math.sqrt(D)))

    def forward(self, indices: Tensor) -> Tensor:
        """indices: [B, S] -> [B, S, D]."""
        return F.embedding(indices.int(), self.embedding_weight)


class PuzzleEmbedding(nn.Module):
    """A vector for each puzzle identifier, [n, width], 0 at first.

    The public code keeps them in a buffer of the same name, which an optimizer of its own updates.
    """

    def __init__(self, n: int, width: int) -> None:
        super().__init__()
        self.weights = nn.Parameter(torch.zeros(n, width))

    def forward(self, identifiers: Tensor) -> Tensor:
        """identifiers: [B] -> [B, width]."""
        return F.embedding(identifiers.int(), self.weights)


class RotaryEmbedding(nn.Module):
    """Tables of rotary positions, as ``ops.loop`` takes them."""

    tables: Tensor

    def __init__(self, config: TRMConfig) -> None:
        super().__init__()
        exponents = torch.arange(0, config.head_dim, 2, dtype=torch.float32) / config.head_dim
        tokens = torch.arange(config.n_tokens, dtype=torch.float32)
        angles = torch.outer(tokens, 1 / config.rope_theta**exponents).repeat(1, 2)
        self.register_buffer("tables", torch.stack((angles.cos(), angles.sin())), persistent=False)

    def forward(self) -> Tensor:
        """Cosines and sines, [2, S, D / n_heads]."""
        return self.tables


class Attention(nn.Module):
    """Full self-attention with its projections."""

    def __init__(self, config: TRMConfig) -> None:
        super().__init__()
        self.num_heads = config.num_heads
        self.qkv_proj = linear(config.hidden_size, 3 * config.hidden_size)
        self.o_proj = linear(config.hidden_size, config.hidden_size)

    def forward(self, x: Tensor, tables: Tensor | None) -> Tensor:
        """x: [B, S, D], tables: [2, S, D / n_heads] -> [B, S, D]."""
        y = reference.attend(self.qkv_proj(x), self.num_heads, mask="full", tables=tables)
        return self.o_proj(y)


class SwiGLU(nn.Module):
    """Linear to gates and what they scale, SiLU, Linear."""

    def __init__(self, config: TRMConfig) -> None:
        super().__init__()
        self.gate_up_proj = linear(config.hidden_size, 2 * config.mlp_hidden)
        self.down_proj = linear(config.mlp_hidden, config.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        """x: [B, S, D] -> [B, S, D]."""
        gate, up = self.gate_up_proj(x).chunk(2, -1)
        return self.down_proj(F.silu(gate) * up)


class Block(nn.Module):
    """One block: each sublayer is added to the residual stream, which is then normalised."""

    def __init__(self, config: TRMConfig) -> None:
        super().__init__()
        self.settings = config.block
        self.self_attn = Attention(config)
        self.mlp = SwiGLU(config)

    def forward(self, x: Tensor, tables: Tensor | None) -> Tensor:
        """x: [B, S, D], tables: [2, S, D / n_heads] -> [B, S, D]."""
        x = reference.norm(x + self.self_attn(x, tables), None, None, self.settings)
        return reference.norm(x + self.mlp(x), None, None, self.settings)

    def op_weights(self) -> list[Tensor]:
        """The block's parameters in the order of the loop op."""
        attn, mlp = self.self_attn, self.mlp
        layers = attn.qkv_proj, attn.o_proj, mlp.gate_up_proj, mlp.down_proj
        return [layer.weight for layer in layers]

    def parts(self, config: TRMConfig) -> Iterator[Part]:
        """Modules that the op stands in for, in the order of their names."""
        D, F = config.hidden_size, config.mlp_hidden
        yield Part("self_attn", self.self_attn, Attention)
        if type(self.self_attn) is Attention:
            yield _linear("self_attn.qkv_proj", self.self_attn.qkv_proj, (3 * D, D))
            yield _linear("self_attn.o_proj", self.self_attn.o_proj, (D, D))
        yield Part("mlp", self.mlp, SwiGLU)
        if type(self.mlp) is SwiGLU:
            yield _linear("mlp.gate_up_proj", self.mlp.gate_up_proj, (2 * F, D))
            yield _linear("mlp.down_proj", self.mlp.down_proj, (D, F))


def _linear(name: str, module: nn.Module, shape: tuple[int, int]) -> Part:
    return Part(name, module, nn.Linear, shape, has_bias=False)


class Network(nn.Module):
    """The one network, which updates both states: z <- f(z + what is injected)."""

    def __init__(self, config: TRMConfig) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Block(config) for _ in range(config.L_layers))

    def forward(self, state: Tensor, injected: Tensor, tables: Tensor | None) -> Tensor:
        """state, injected: [B, S, D], tables: [2, S, D / n_heads] -> [B, S, D]."""
        x = state + injected
        for layer in self.layers:
            x = layer(x, tables)
        return x

    def op_weights(self) -> list[Tensor]:
        """The ``weights`` of ``ops.loop``."""
        layers: Any = self.layers
        return [weight for layer in layers for weight in layer.op_weights()]

    def parts(self, config: TRMConfig) -> Iterator[Part]:
        """Modules that the op stands in for, in the order of their names."""
        for i, layer in enumerate(self.layers):
            yield Part(f"layers.{i}", layer, Block)
            if type(layer) is Block:
                for part in layer.parts(config):
                    yield part._replace(name=f"layers.{i}.{part.name}")

    def unlike(self, config: TRMConfig) -> Iterator[str]:
        """Settings of the modules that the op takes from ``config``, where they differ."""
        layers: Any = self.layers
        for i, layer in enumerate(layers):
            for name, value, expected in (
                ("settings", layer.settings, config.block),
                ("self_attn.num_heads", layer.self_attn.num_heads, config.num_heads),
            ):
                if value != expected:
                    yield f"L_level.layers.{i}.{name} is {value}, not {expected}"
