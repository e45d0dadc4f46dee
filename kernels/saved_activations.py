"""Activations saved for the backward: the outputs of ``triton_loop_forward`` after the first.

N = B*S rows, D width, F hidden width, H heads, L blocks, W window. "operand" is the dtype of matrix
products. Tensors of a block have one slot per (block l, window step w): l * W + w, so that one
block's steps are one matrix [W N, D], the operand of its weight gradients. A tensor that is not
saved has shape [0].
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from looped_fast.ops.call import LoopSettings


class SavedActivations(NamedTuple):
    """Tensors in the order of the op's outputs; ``fold.py`` makes ``folded_*``.

    Shapes of weights and biases are those of GPT-2's block. In TRM's, the norms come after the
    sublayers: ``xhat1`` is a block's input, and a block has one more norm, ``xhatf`` its output.
    """

    folded_weights: Tensor  # [L, 12 D D] operand; TRM's: [L, 4 D D + 3 D F]
    folded_biases: Tensor  # [L, 9 D] fp32; [0] without biases
    start: Tensor  # [B, S, D] fp32: the state before the window's first step
    states: Tensor  # [W, B, S, D] fp32: needed, and not the op's result
    xhat1: Tensor  # [L W, N, D] operand: what Wqkv multiplies; LN1's output before its scale
    rstd1: Tensor  # [L W, N] fp32; [0] in TRM's block
    qkv: Tensor  # [L W, N, 3D] operand: with rotary positions turned
    attention: Tensor  # [L W, N, D] operand: before the output projection
    lse: Tensor  # [L W, B, H, S] fp32: log of the sum of exp of attention scores, natural
    xhat2: Tensor  # [L W, N, D] operand: what the MLP multiplies, after a norm
    rstd2: Tensor  # [L W, N] fp32
    xhatf: Tensor  # [W, N, D]: the final LayerNorm's; fp16 for operands of 16 bits, see below;
    # [L W, N, D] in TRM's block: of the norm after each MLP
    rstdf: Tensor  # [W, N] fp32; [L W, N]


def empty_saved(
    embeddings: Tensor,
    n_layer: int,
    settings: LoopSettings,
    operand: torch.dtype,
    save_activations: bool,
    save_start: bool,
    save_states: bool,
) -> SavedActivations:
    """Allocate saved activations for ``embeddings`` [B, S, D] fp32, which may be a fake tensor.

    Args:
        embeddings: gives B, S, D and the device.
        n_layer: L.
        settings: gives H, W and the block's.
        operand: dtype of the matrix products' operands.
        save_activations, save_start, save_states: what to save; other tensors get shape [0].
    """
    D, empty, window = embeddings.shape[-1], embeddings.new_empty, settings.window
    block = settings.block
    fc, hidden = block.fc_width(D), block.hidden(D)
    n_steps = window if save_activations else 0
    return SavedActivations(
        folded_weights=empty((n_layer, (4 * D + fc + hidden) * D), dtype=operand),
        folded_biases=empty((n_layer, 5 * D + fc) if block.bias else (0,)),
        start=empty(embeddings.shape if save_start else (0,)),
        states=empty((window, *embeddings.shape) if save_states else (0,)),
        **_activations(embeddings, n_layer, settings, n_steps, operand),
    )


def with_scratch(
    saved: SavedActivations, embeddings: Tensor, settings: LoopSettings, n_layer: int = 1
) -> SavedActivations:
    """``saved`` with room for one step of ``n_layer`` blocks, which every step overwrites."""
    operand = saved.folded_weights.dtype
    return saved._replace(**_activations(embeddings, n_layer, settings, 1, operand))


def _activations(
    embeddings: Tensor, n_layer: int, settings: LoopSettings, n_steps: int, operand: torch.dtype
) -> dict[str, Tensor]:
    B, S, D = embeddings.shape

    def empty(n_slots: int, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return embeddings.new_empty((n_slots, *shape) if n_slots else (0,), dtype=dtype)

    slots, N = n_layer * n_steps, B * S
    after_norm = settings.block.norm_place == "after"
    n_final = slots if after_norm else n_steps
    # Nothing multiplies xhatf as a matrix: gradients of the final LayerNorm and of the read-out are
    # sums of products with it. Below sqrt(D) it is in fp16's range, with 3 more bits than in bf16.
    norm_dtype = torch.float32 if operand == torch.float32 else torch.float16
    return {
        "xhat1": empty(slots, N, D, dtype=operand),
        "rstd1": empty(0 if after_norm else slots, N),
        "qkv": empty(slots, N, 3 * D, dtype=operand),
        "attention": empty(slots, N, D, dtype=operand),
        "lse": empty(slots, B, settings.n_heads, S),
        "xhat2": empty(slots, N, D, dtype=operand),
        "rstd2": empty(slots, N),
        "xhatf": empty(n_final, N, D, dtype=norm_dtype),
        "rstdf": empty(n_final, N),
    }
