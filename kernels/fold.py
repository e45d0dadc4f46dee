"""A block's weights as the kernels multiply them: rounded, and side by side.

GPT-2's have LN1 and LN2 folded in:

    norm(x) = xhat * scale + shift,  so  W norm(x) + b = (W * scale) xhat + (b + W shift)

Folding once per forward spares the kernels two vectors, and registers for them, at every step.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from looped_fast.ops.block import GPT2

from .candidates import Config
from .launch import launch
from .numerics import cast


@triton.jit
def fold_kernel(
    scale1,
    shift1,
    qkv_weight,
    qkv_bias,
    out_weight,
    out_bias,
    scale2,
    shift2,
    fc_weight,
    fc_bias,
    proj_weight,
    proj_bias,
    folded_weights,
    folded_biases,
    D: tl.constexpr,
    ROWS: tl.constexpr,
):
    """One program folds ROWS of the 12D rows, D wide, that Wqkv, Wo, Wfc and Wproj have together.

    Wproj, [D, 4D], is taken as 4D rows; its bias goes with the first D of them.
    """
    first = tl.program_id(0) * ROWS
    if first < 3 * D:
        _fold(qkv_weight, qkv_bias, first, folded_weights, folded_biases, scale1, shift1, D, ROWS)
    elif first < 4 * D:
        row = first - 3 * D
        weights, biases = folded_weights + 3 * D * D, folded_biases + 3 * D
        _fold(out_weight, out_bias, row, weights, biases, None, None, D, ROWS)
    elif first < 8 * D:
        row = first - 4 * D
        weights, biases = folded_weights + 4 * D * D, folded_biases + 4 * D
        _fold(fc_weight, fc_bias, row, weights, biases, scale2, shift2, D, ROWS)
    else:
        row = first - 8 * D
        weights, biases = folded_weights + 8 * D * D, folded_biases + 8 * D
        _fold(proj_weight, proj_bias, row, weights, biases, None, None, D, ROWS)


@triton.jit
def _fold(weight, bias, row, to_weight, to_bias, scale, shift, D: tl.constexpr, ROWS: tl.constexpr):
    rows = row + tl.arange(0, ROWS)
    columns = tl.arange(0, D)
    offsets = rows[:, None] * D + columns[None, :]
    w = tl.load(weight + offsets)
    has_bias = rows < 4 * D
    if shift is None:
        has_bias = rows < D
    b = tl.load(bias + rows, mask=has_bias, other=0.0)
    if shift is not None:
        b += tl.sum(w * tl.load(shift + columns)[None, :], axis=1)
        w *= tl.load(scale + columns)[None, :]
    tl.store(to_weight + offsets, cast(w, to_weight.dtype.element_ty))
    tl.store(to_bias + rows, b, mask=has_bias)


def fold(weights: Sequence[Tensor], folded_weights: Tensor, folded_biases: Tensor) -> None:
    """Fill ``folded_weights`` and ``folded_biases``.

    Args:
        weights: as in ``ops.loop``, fp32 and contiguous.
        folded_weights: [L, 12 D D] operand: Wqkv' [3D, D], Wo [D, D], Wfc' [4D, D], Wproj [D, 4D].
        folded_biases: [L, 9 D] fp32, in the same order.
    """
    D, rows = weights[-1].numel(), 32
    n = GPT2.n_block_weights
    for i in range(len(folded_weights)):
        launch(
            fold_kernel,
            (12 * D // rows,),
            *weights[n * i : n * (i + 1)],
            folded_weights[i],
            folded_biases[i],
            config=Config(rows),
            D=D,
        )


def pack(weights: Sequence[Tensor], packed: Tensor) -> None:
    """Fill ``packed`` with weights that nothing is folded into, those of TRM's block.

    Args:
        weights: as in ``ops.loop``, fp32 and contiguous.
        packed: [L, 4 D D + 3 D F] operand: Wqkv [3D, D], Wo [D, D], Wgate and Wup [2F, D], Wdown
            [D, F].
    """
    sizes = [weight.numel() for weight in weights]
    parts = packed.view(-1).split(sizes)
    torch._foreach_copy_(parts, [weight.view(-1) for weight in weights])  # one launch for all
