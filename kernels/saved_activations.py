"""Activations saved for the backward: the outputs of ``triton_loop_forward`` after the first.

N = B*S rows, D width, H heads, L blocks, W window. "operand" is the dtype of matrix products.
Tensors of a block have one slot per (block l, window step w): l * W + w, so that one block's steps
are one matrix [W N, D], the operand of its weight gradients. A tensor that is not saved has shape
[0].
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class SavedActivations(NamedTuple):
    """Tensors in the order of the op's outputs; ``fold.fold`` makes ``folded_*``."""

    folded_weights: Tensor  # [L, 12 D D] operand
    folded_biases: Tensor  # [L, 9 D] fp32
    start: Tensor  # [B, S, D] fp32: the state before the window's first step
    states: Tensor  # [W, B, S, D] fp32: needed, and not the op's result
    xhat1: Tensor  # [L W, N, D] operand: LN1's output before its scale, in the step it feeds
    rstd1: Tensor  # [L W, N] fp32
    qkv: Tensor  # [L W, N, 3D] operand
    attention: Tensor  # [L W, N, D] operand: before the output projection
    lse: Tensor  # [L W, B, H, S] fp32: log of the sum of exp of attention scores, natural
    xhat2: Tensor  # [L W, N, D] operand
    rstd2: Tensor  # [L W, N] fp32
    xhatf: Tensor  # [W, N, D]: the final LayerNorm's; fp16 for operands of 16 bits, see below
    rstdf: Tensor  # [W, N] fp32


def empty_saved(
    embeddings: Tensor,
    n_layer: int,
    n_heads: int,
    window: int,
    operand: torch.dtype,
    save_activations: bool,
    save_start: bool,
    save_states: bool,
) -> SavedActivations:
    """Allocate saved activations for ``embeddings`` [B, S, D] fp32, which may be a fake tensor.

    Args:
        embeddings: gives B, S, D and the device.
        n_layer: L.
        n_heads: H.
        window: W.
        operand: dtype of the matrix products' operands.
        save_activations, save_start, save_states: what to save; other tensors get shape [0].
    """
    D, empty = embeddings.shape[-1], embeddings.new_empty
    n_steps = window if save_activations else 0
    return SavedActivations(
        folded_weights=empty((n_layer, 12 * D * D), dtype=operand),
        folded_biases=empty((n_layer, 9 * D)),
        start=empty(embeddings.shape if save_start else (0,)),
        states=empty((window, *embeddings.shape) if save_states else (0,)),
        **_activations(embeddings, n_layer, n_heads, n_steps, operand),
    )


def with_scratch(
    saved: SavedActivations, embeddings: Tensor, n_heads: int, n_layer: int = 1
) -> SavedActivations:
    """``saved`` with room for one step of ``n_layer`` blocks, which every step overwrites."""
    operand = saved.folded_weights.dtype
    return saved._replace(**_activations(embeddings, n_layer, n_heads, 1, operand))


def _activations(
    embeddings: Tensor, n_layer: int, n_heads: int, n_steps: int, operand: torch.dtype
) -> dict[str, Tensor]:
    B, S, D = embeddings.shape

    def empty(n_slots: int, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return embeddings.new_empty((n_slots, *shape) if n_slots else (0,), dtype=dtype)

    slots, N = n_layer * n_steps, B * S
    # Nothing multiplies xhatf as a matrix: gradients of the final LayerNorm and of the read-out are
    # sums of products with it. Below sqrt(D) it is in fp16's range, with 3 more bits than in bf16.
    norm_dtype = torch.float32 if operand == torch.float32 else torch.float16
    return {
        "xhat1": empty(slots, N, D, dtype=operand),
        "rstd1": empty(slots, N),
        "qkv": empty(slots, N, 3 * D, dtype=operand),
        "attention": empty(slots, N, D, dtype=operand),
        "lse": empty(slots, B, n_heads, S),
        "xhat2": empty(slots, N, D, dtype=operand),
        "rstd2": empty(slots, N),
        "xhatf": empty(n_steps, N, D, dtype=norm_dtype),
        "rstdf": empty(n_steps, N),
    }
