"""Blocks of any settings: random inputs, and one loop step from formulas alone."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from looped_fast.ops.block import (
    MASKS,
    MLPS,
    NORM_PLACES,
    NORMS,
    POSITIONS,
    Block,
    block_names,
    final_names,
    shape_of,
)


def all_blocks() -> Iterator[Block]:
    """Every combination of settings, with a hidden width and an eps that are not the defaults."""
    both = (True, False)
    values = (NORMS, both, both, (1e-3,), NORM_PLACES, MLPS, (24,), MASKS, POSITIONS, both, both)
    return itertools.starmap(Block, itertools.product(*values))


def block_inputs(
    block: Block,
    B: int = 2,
    S: int = 6,
    D: int = 16,
    n_layer: int = 1,
    dtype: torch.dtype = torch.float64,
) -> dict[str, Any]:
    """Tensor arguments of ``ops.loop`` but for rotary positions, none of them special values."""
    F, fc = block.hidden(D), block.fc_width(D)
    weights = []
    for name in (*block_names(block) * n_layer, *final_names(block)):
        shape = shape_of(name, D, F, fc)
        weight = torch.randn(shape, dtype=dtype)
        scale = 1 / math.sqrt(shape[1]) if len(shape) == 2 else 0.2
        is_scale = name.startswith("ln") and name.endswith("weight")
        weights.append(is_scale + scale * weight)
    inputs = {
        "embeddings": torch.randn(B, S, D, dtype=dtype),
        "state": torch.randn(B, S, D, dtype=dtype),
        "weights": weights,
    }
    if block.positions == "learned":
        inputs["positions"] = torch.randn(S, D, dtype=dtype)
    return inputs


def rotary_tables(S: int, head_dim: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """Cosines and sines, [2, S, head_dim]; each column its own angle, unlike those of TRM."""
    angles = torch.outer(torch.arange(S, dtype=dtype), torch.linspace(1, 0.1, head_dim).to(dtype))
    return torch.stack((angles.cos(), angles.sin()))


def other_positions(block: Block, S: int, head_dim: int) -> dict[str, Any]:
    """The ``positions`` of ``ops.loop`` where they are no input with a gradient."""
    if block.positions == "learned":
        return {}
    return {"positions": rotary_tables(S, head_dim) if block.positions == "rotary" else None}


def naive_step(
    z: Tensor,
    e: Tensor,
    positions: Tensor | None,
    weights: Sequence[Tensor],
    n_heads: int,
    block: Block,
) -> Tensor:
    """One loop step by formulas, injection ``add``: shares no code with the package."""
    names, last = block_names(block), final_names(block)
    D, S = z.shape[-1], z.shape[-2]
    width = D // n_heads

    def norm(x: Tensor, w: dict[str, Tensor], name: str) -> Tensor:
        if block.norm == "layer_norm":
            x = x - x.sum(-1, keepdim=True) / D
        x = x / ((x * x).sum(-1, keepdim=True) / D + block.norm_eps).sqrt()
        return x * w.get(f"{name}_weight", 1) + w.get(f"{name}_bias", 0)

    def linear(x: Tensor, w: dict[str, Tensor], name: str) -> Tensor:
        return x @ w[f"{name}_weight"].T + w.get(f"{name}_bias", 0)

    def turned(x: Tensor) -> Tensor:
        if block.positions != "rotary":
            return x
        first, second = x[..., : width // 2], x[..., width // 2 :]
        cos, sin = positions
        return torch.cat(
            (
                first * cos[:, : width // 2] - second * sin[:, : width // 2],
                second * cos[:, width // 2 :] + first * sin[:, width // 2 :],
            ),
            -1,
        )

    def attention(x: Tensor, w: dict[str, Tensor]) -> Tensor:
        qkv, heads = linear(x, w, "c_attn"), []
        for h in range(n_heads):
            q, k, v = (qkv[..., i * D + h * width : i * D + (h + 1) * width] for i in range(3))
            weight = (turned(q) @ turned(k).transpose(1, 2) / math.sqrt(width)).exp()
            if block.mask == "causal":
                weight = weight * torch.ones(S, S).tril()
            heads.append(weight / weight.sum(-1, keepdim=True) @ v)
        return linear(torch.cat(heads, -1), w, "attn_c_proj")

    def mlp(x: Tensor, w: dict[str, Tensor]) -> Tensor:
        y = linear(x, w, "c_fc")
        if block.mlp == "gelu":
            y = 0.5 * y * (1 + torch.tanh(math.sqrt(2 / math.pi) * (y + 0.044715 * y**3)))
        else:
            gate, up = y[..., : y.shape[-1] // 2], y[..., y.shape[-1] // 2 :]
            y = gate / (1 + (-gate).exp()) * up
        return linear(y, w, "mlp_c_proj")

    x = z + e + (positions if block.positions == "learned" else 0)
    for first in range(0, len(weights) - len(last), len(names)):
        w = dict(zip(names, weights[first : first + len(names)], strict=True))
        for sublayer, name in ((attention, "ln_1"), (mlp, "ln_2")):
            h = x if block.norm_place == "after" else norm(x, w, name)
            x = x + sublayer(h, w)
            if block.norm_place != "before":
                x = norm(x, w, f"{name}_after")
    if block.final_norm:
        x = norm(x, dict(zip(last, weights[len(weights) - len(last) :], strict=True)), "ln_f")
    return x
