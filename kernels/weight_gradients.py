"""Gradients of a block's weights, over many steps of the loop at once.

    y = x @ W^T + b:    dW = sum over steps and rows of dy^T x        db = sum of dy

A block has the same weights in every step, so the sum over steps is one long sum over rows: one
library matrix product per weight. Its operands are kept for a chunk of steps (``Outputs``).
Gradients of biases are summed where dy is computed, in the row kernel.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from looped_fast.ops.block import Block, block_names
from looped_fast.ops.reference import BlockWeights

from .saved_activations import SavedActivations

# Size of ``Outputs``: long enough for products at the library's full speed.
CHUNK_BYTES = 2**30


class Outputs(NamedTuple):
    """Gradients of the outputs of the blocks' weights in C steps, in the operands' dtype."""

    d_qkv: Tensor  # [L, C, N, 3D]
    dx1: Tensor  # [L, C, N, D]: of the residual after attention
    d_hidden: Tensor  # [L, C, N, 4D], of gates and what they scale 2F: before the activation
    hidden: Tensor  # [L, C, N, F]: u, the hidden units after it
    dx2: Tensor  # [L, C, N, D]: of the residual after the MLP


def _widths(block: Block, D: int) -> tuple[int, ...]:
    """Of ``Outputs``."""
    return 3 * D, D, block.fc_width(D), block.hidden(D), D


def empty_outputs(xhat1: Tensor, n_layer: int, steps: int, block: Block) -> Outputs:
    """Allocate for ``steps`` loop steps; ``xhat1`` [..., N, D] gives N, D, dtype and device."""
    N, D = xhat1.shape[-2:]
    return Outputs(*(xhat1.new_empty(n_layer, steps, N, width) for width in _widths(block, D)))


def steps_per_chunk(xhat1: Tensor, window: int, block: Block) -> int:
    """How many steps' ``Outputs`` fit in ``CHUNK_BYTES``, 1 .. window; ``xhat1``: [L W, N, D]."""
    D = xhat1.shape[-1]
    rows = xhat1.numel() // D // window
    step_bytes = sum(_widths(block, D)) * rows * xhat1.element_size()
    return max(1, min(CHUNK_BYTES // max(1, step_bytes), window))


def wanted_products(wanted: Sequence[bool], n_layer: int, settings: Block) -> list[bool]:
    """Which of ``folded_gradients`` serve a gradient that is wanted; four per block.

    ``wanted``: which gradients of the loop's weights are, those of blocks first. The scale of a
    LayerNorm needs the product of the weights that it folds into.
    """
    names, products = block_names(settings), []
    for i in range(0, n_layer * len(names), len(names)):
        block = dict(zip(names, wanted[i : i + len(names)], strict=True))
        products += [
            block["c_attn_weight"] or block.get("ln_1_weight", False),
            block["attn_c_proj_weight"],
            block["c_fc_weight"] or block.get("ln_2_weight", False),
            block["mlp_c_proj_weight"],
        ]
    return products


def folded_gradients(
    outputs: Outputs, inputs: SavedActivations, products: Sequence[bool]
) -> list[Tensor | None]:
    """Gradients of the folded weights, summed over some steps.

    Args:
        outputs: gradients of the products' results in those steps; may have room for more.
        inputs: activations in those steps, each [L, steps, N, ...].
        products: which are wanted, of ``wanted_products``.

    Returns:
        fp32, four per block: dWqkv', dWo, dWfc', dWproj; None where not wanted.
    """
    steps = inputs.xhat1.shape[1]
    pairs = (
        (outputs.d_qkv, inputs.xhat1),
        (outputs.dx1, inputs.attention),
        (outputs.d_hidden, inputs.xhat2),
        (outputs.dx2, outputs.hidden),
    )
    grads: list[Tensor | None] = []
    for i, is_wanted in enumerate(products):
        block, pair = i // len(pairs), pairs[i % len(pairs)]
        dy, x = (t[block, :steps].flatten(0, 1) for t in pair)  # [steps N, out], [.., in]
        grads.append(_product(dy, x) if is_wanted else None)
    return grads


def _product(dy: Tensor, x: Tensor) -> Tensor:
    """dy^T @ x in fp32: the operands' dtype would round every chunk's sum."""
    if dy.dtype == torch.float32:
        return dy.T @ x
    if dy.device.type == "cpu":  # interpreted: CPUs have no product with a result in fp32
        return dy.T.float() @ x.float()
    return torch.mm(dy.T, x, out_dtype=torch.float32)


def unfold(
    block: BlockWeights, d_weights: Sequence[Tensor | None], d_biases: Sequence[Tensor]
) -> list[Tensor | None]:
    """Gradients of a block's parameters, in their order, given those of its folded weights.

        W' = W * scale, b' = b + W @ shift:   dW = dW' * scale + outer(db', shift)
        dscale = column sums of W * dW'       dshift = W^T @ db'           db = db'

    Args:
        block: the parameters.
        d_weights: dW', the block's four of ``folded_gradients``. Where one is None, so are the
            gradients that need it.
        d_biases: db', in the same order.
    """

    def through(weight, scale, shift, d_weight, d_bias):
        column = d_bias[:, None]
        d_shift = (weight * column).sum(0)
        if d_weight is None:
            return None, d_shift, None, d_bias
        return (weight * d_weight).sum(0), d_shift, d_weight * scale + column * shift, d_bias

    d_qkv, d_out, d_fc, d_proj = d_weights
    b_qkv, b_out, b_fc, b_proj = d_biases
    return [
        *through(block.c_attn_weight, block.ln_1_weight, block.ln_1_bias, d_qkv, b_qkv),
        d_out, b_out,
        *through(block.c_fc_weight, block.ln_2_weight, block.ln_2_bias, d_fc, b_fc),
        d_proj, b_proj,
    ]  # fmt: skip
