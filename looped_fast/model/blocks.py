"""The shared stack of blocks: holds parameters under their official names, and computes with them.

``ops.loop`` computes faster with the same parameters. The forwards here run where a module is
hooked, wrapped or replaced, so that the op would not compute what the module does.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from looped_fast.config import LAYER_NORM_EPS, ModelConfig
from looped_fast.ops import reference
from looped_fast.ops.modules import deviation


class Attention(nn.Module):
    """Causal self-attention with its projections."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.n_head = config.n_head
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd)

    def forward(self, x: Tensor) -> Tensor:
        """x: [B, S, D] -> [B, S, D]."""
        return self.c_proj(reference.attend(self.c_attn(x), self.n_head))


class MLP(nn.Module):
    """Linear, GELU (tanh form), Linear."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd)
        self.c_proj = nn.Linear(4 * config.n_embd, config.n_embd)

    def forward(self, x: Tensor) -> Tensor:
        """x: [B, S, D] -> [B, S, D]."""
        return self.c_proj(F.gelu(self.c_fc(x), approximate="tanh"))


class Block(nn.Module):
    """One pre-norm block on the residual stream."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd, eps=LAYER_NORM_EPS)
        self.attn = Attention(config)
        self.ln_2 = nn.LayerNorm(config.n_embd, eps=LAYER_NORM_EPS)
        self.mlp = MLP(config)

    def forward(self, x: Tensor) -> Tensor:
        """x: [B, S, D] -> [B, S, D]."""
        x = x + self.attn(self.ln_1(x))
        return x + self.mlp(self.ln_2(x))

    def op_weights(self) -> list[Tensor]:
        """The block's parameters in the order of the loop op."""
        modules: Any = self._modules
        attn, mlp = modules["attn"]._modules, modules["mlp"]._modules
        return weights_and_biases(
            modules["ln_1"], attn["c_attn"], attn["c_proj"],
            modules["ln_2"], mlp["c_fc"], mlp["c_proj"],
        )  # fmt: skip

    def parts(self, D: int) -> Iterator[Part]:
        """Modules of the block, as in ``Backbone.parts``."""
        yield Part("ln_1", self.ln_1, nn.LayerNorm, (D,))
        yield Part("attn", self.attn, Attention)
        if type(self.attn) is Attention:
            yield Part("attn.c_attn", self.attn.c_attn, nn.Linear, (3 * D, D))
            yield Part("attn.c_proj", self.attn.c_proj, nn.Linear, (D, D))
        yield Part("ln_2", self.ln_2, nn.LayerNorm, (D,))
        yield Part("mlp", self.mlp, MLP)
        if type(self.mlp) is MLP:
            yield Part("mlp.c_fc", self.mlp.c_fc, nn.Linear, (4 * D, D))
            yield Part("mlp.c_proj", self.mlp.c_proj, nn.Linear, (D, 4 * D))


class Backbone(nn.Module):
    """Positions, blocks and the final LayerNorm: what a loop step runs."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.transformer = nn.ModuleDict(
            {
                # official block_size is 2 * n_positions + 1
                "wpe": nn.Embedding(2 * config.n_positions + 1, config.n_embd),
                "h": nn.ModuleList(Block(config) for _ in range(config.n_layer)),
                "ln_f": nn.LayerNorm(config.n_embd, eps=LAYER_NORM_EPS),
            }
        )
        self._init_weights(config)

    def _init_weights(self, config: ModelConfig) -> None:
        """GPT-2's initialisation, drawn in the official order (``nano_gpt.py``)."""
        std = config.init_std
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=std)
                nn.init.zeros_(module.bias)
            elif isinstance(module, nn.Embedding):
                nn.init.normal_(module.weight, std=std)
        for name, parameter in self.named_parameters():
            if name.endswith("c_proj.weight"):
                nn.init.normal_(parameter, std=std / math.sqrt(2 * config.n_layer))

    def forward(self, inputs_embeds: Tensor, embeddings: Tensor | None = None) -> Tensor:
        """Run one loop step on injected inputs, [B, S, D] -> [B, S, D].

        Args:
            inputs_embeds: the injected state, without positions.
            embeddings: added before every block, [B, S, D]; None to add nothing.
        """
        stack: Any = self.transformer
        tokens = torch.arange(inputs_embeds.shape[1], device=inputs_embeds.device)
        x = inputs_embeds + stack["wpe"](tokens)
        for block in stack["h"]:
            x = block(x if embeddings is None else x + embeddings)
        return stack["ln_f"](x)

    def op_tensors(self) -> tuple[Tensor, list[Tensor]]:
        """All positions, [2 * n_positions + 1, D], and the ``weights`` of ``ops.loop``."""
        modules: Any = self.transformer._modules
        weights = [w for block in modules["h"] for w in block.op_weights()]
        return modules["wpe"].weight, weights + weights_and_biases(modules["ln_f"])

    def parts(self, D: int) -> Iterator[Part]:
        """Modules that the op stands in for, in the order of their names."""
        stack: Any = self.transformer
        yield Part("transformer.wpe", stack["wpe"], nn.Embedding, (None, D))
        for i, block in enumerate(stack["h"]):
            name = f"transformer.h.{i}"
            yield Part(name, block, Block)
            if type(block) is Block:
                yield from (part._replace(name=f"{name}.{part.name}") for part in block.parts(D))
        yield Part("transformer.ln_f", stack["ln_f"], nn.LayerNorm, (D,))


class Part(NamedTuple):
    """A module that the op stands in for, and what the op takes it to be."""

    name: str
    module: nn.Module
    kind: type[nn.Module]
    shape: tuple[int | None, ...] | None = None  # of its weight; None for a container
    has_bias: bool = True  # a Linear or a norm has

    def unfit(self) -> str | None:
        """Why the op would not compute what the module does, or None."""
        why = deviation(self.module, self.kind) or self._unfit_parameters()
        return why and f"{self.name} {why}"

    def _unfit_parameters(self) -> str | None:
        if self.shape is None:
            return None
        tensors: Any = self.module._parameters
        has_bias = self.has_bias and self.kind is not nn.Embedding
        for name, needed in (("weight", True), ("bias", has_bias)):
            if (tensors.get(name) is not None) != needed:
                return f"has {'no' if needed else 'a'} {name}"
        shape = tuple(tensors["weight"].shape)
        expected = (self.shape[0] or shape[0], *self.shape[1:])
        if shape != expected:
            return f"has a weight of shape {shape}, not {expected}"
        if isinstance(self.module, nn.LayerNorm) and self.module.eps != LAYER_NORM_EPS:
            return f"has eps {self.module.eps}, not {LAYER_NORM_EPS}"
        return None


def weights_and_biases(*layers: Any) -> list[Tensor]:
    """Weight and bias of each layer.

    They come out of the dictionaries of nn.Module: as an attribute, each of the forty lookups in a
    call would take half a microsecond.
    """
    try:
        return [layer._parameters[name] for layer in layers for name in ("weight", "bias")]
    except KeyError:  # a replica of nn.DataParallel holds them as attributes
        return [tensor for layer in layers for tensor in (layer.weight, layer.bias)]
