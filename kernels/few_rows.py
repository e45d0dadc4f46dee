"""The row kernels for few rows, as in inference with one to three prompts.

In ``row_forward_kernel`` a program streams all weights of a block, and few programs do so one
weight after another while the rest of the GPU waits. Here a launch of that kernel becomes three,
each cut by columns as well as by rows, so that many programs stream a share of the weights each:

    output    hidden = gelu(norm(x1) @ Wfc'^T + bfc') with x1 = x + attention @ Wo^T + bo
    project   x2 = x1 + hidden @ Wproj^T + bproj
    input     STEP_END and TAIL, as there

A row needs all columns of the launch before, which has ended when the next one starts. Programs
that share rows repeat the cheap work, the output projection and the norms. Activations are not
saved for a backward.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from .candidates import Config, operand_precision
from .launch import launch
from .numerics import cast, statistics
from .row_forward import (
    add_bias,
    add_product,
    end_step,
    hidden_units,
    inject,
    linear,
)

# Predicted times are equal near 500 rows; the prediction favours many short launches.
MAX_ROWS = 256
ROWS = 16
SHARES = 8  # programs among which the hidden units of a row are divided
TILE_BYTES = 32 * 1024  # the most of a weight that a program loads at a time

Arguments = Sequence[Tensor | None]


@triton.jit
def _normalised(y, dtype: tl.constexpr, D: tl.constexpr):
    """norm(y) as the operand of a product, [ROWS, D]; y has one part."""
    mean, rstd = statistics(y, D)
    return cast((y[0] - mean[:, None]) * rstd[:, None], dtype)


@triton.jit(do_not_specialize=["N"])
def few_rows_output_kernel(
    x,  # [N, D] fp32, the residual before attention
    attention,  # [N, D] operand
    weights,  # [12 D D] operand, as in row_forward_kernel
    biases,  # [9 D] fp32
    middle,  # out [N, D] fp32: x1
    hidden,  # out [N, 4D] operand
    N,
    D: tl.constexpr,
    UNITS: tl.constexpr,  # hidden, of a program
    TF32: tl.constexpr,
    ROWS: tl.constexpr,
    HIDDEN_CHUNK: tl.constexpr,  # of D, at a time
    COLUMNS: tl.constexpr,  # of the hidden units, at a time
):
    """Grid: [ceil(N / ROWS), 4D / UNITS]."""
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    share = tl.program_id(1)
    valid, stored = rows < N, rows < (N if share == 0 else 0)
    rows = tl.minimum(rows, N - 1)
    offsets = rows[:, None] * D + tl.arange(0, D)[None, :]

    y = add_bias((tl.load(x + offsets),), biases + 3 * D)
    for c in range(0, D, HIDDEN_CHUNK):
        chunk = rows[:, None] * D + (c + tl.arange(0, HIDDEN_CHUNK))[None, :]
        y = add_product(y, tl.load(attention + chunk), weights + 3 * D * D, c, D, TF32)
    tl.store(middle + offsets, y[0], mask=stored[:, None])
    xhat = _normalised(y, hidden.dtype.element_ty, D)
    for i in range(0, UNITS, COLUMNS):
        c = share * UNITS + i
        chunk = rows[:, None] * (4 * D) + (c + tl.arange(0, COLUMNS))[None, :]
        part = hidden_units(xhat, weights, biases, c, COLUMNS, TF32)
        tl.store(hidden + chunk, part, mask=valid[:, None])


@triton.jit(do_not_specialize=["N"])
def few_rows_project_kernel(
    x,  # [N, D] fp32: x1, which becomes x2
    hidden,  # [N, 4D] operand
    weights,
    biases,
    N,
    D: tl.constexpr,
    TF32: tl.constexpr,
    ROWS: tl.constexpr,
    HIDDEN_CHUNK: tl.constexpr,  # of the hidden units, at a time
    COLUMNS: tl.constexpr,  # of D; of a program
):
    """Grid: [ceil(N / ROWS), D / COLUMNS]."""
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    valid = rows < N
    rows = tl.minimum(rows, N - 1)
    first = tl.program_id(1) * COLUMNS
    offsets = rows[:, None] * D + (first + tl.arange(0, COLUMNS))[None, :]
    y = add_bias((tl.load(x + offsets),), biases + 8 * D + first)
    weight = weights + 8 * D * D + first * (4 * D)
    for c in range(0, 4 * D, HIDDEN_CHUNK):
        chunk = rows[:, None] * (4 * D) + (c + tl.arange(0, HIDDEN_CHUNK))[None, :]
        y = add_product(y, tl.load(hidden + chunk), weight, c, 4 * D, TF32)
    tl.store(x + offsets, y[0], mask=valid[:, None])


@triton.jit(
    do_not_specialize=["N", "S"],
    do_not_specialize_on_alignment=["read_out_bias", "predictions"],
)
def few_rows_input_kernel(
    x,  # [N, D] fp32: x2, or the loop's first state; None: the injection's neutral element
    # STEP_END
    norm_weight,
    norm_bias,
    state,  # out [N, D] fp32, or None
    read_out_weight,
    read_out_bias,
    predictions,
    targets,
    # TAIL
    scale,
    shift,
    next_weights,
    next_biases,
    block_input,  # out [N, D] fp32: the residual
    qkv,  # out [N, 3D] operand
    N,
    S,
    D: tl.constexpr,
    OUTPUTS: tl.constexpr,
    TF32: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,  # of q, k, v; of a program
):
    """Grid: [ceil(N / ROWS), 3D / COLUMNS, or 1 without a TAIL]; see ``row_forward_kernel``."""
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    valid, stored = rows < N, rows < (N if tl.program_id(1) == 0 else 0)
    rows = tl.minimum(rows, N - 1)
    offsets = rows[:, None] * D + tl.arange(0, D)[None, :]
    if x is None:
        y = (tl.full([ROWS, D], 0.0 if scale is None else 1.0, tl.float32),)
    else:
        y = (tl.load(x + offsets),)
    if norm_weight is not None:
        y = end_step(
            y, norm_weight, norm_bias, None, None, state, read_out_weight, read_out_bias,
            predictions, targets, rows, stored, S, D, OUTPUTS,
        )  # fmt: skip
    if qkv is not None:
        y = (inject(y[0], scale, shift, offsets),)
        tl.store(block_input + offsets, y[0], mask=stored[:, None])
        xhat = _normalised(y, qkv.dtype.element_ty, D)
        first = tl.program_id(1) * COLUMNS
        out = linear(xhat, next_weights, next_biases, first, COLUMNS, TF32)
        chunk = rows[:, None] * (3 * D) + (first + tl.arange(0, COLUMNS))[None, :]
        tl.store(qkv + chunk, cast(out, qkv.dtype.element_ty), mask=valid[:, None])


class FewRows:
    """Launches of the three kernels, and the tensors they pass on."""

    def __init__(self, like: Tensor, operand: torch.dtype) -> None:
        """``like``: [B, S, D] fp32; ``operand``: dtype of the products' operands."""
        self.n_rows, self.S, self.D = like[..., 0].numel(), *like.shape[-2:]
        self.x, self.block_input = torch.empty_like(like), torch.empty_like(like)
        self.hidden = like.new_empty((self.n_rows, 4 * self.D), dtype=operand)
        self.constexprs = {"D": self.D, "TF32": operand_precision(operand) == "tf32"}
        self.units = 4 * self.D // SHARES
        columns = min(64, TILE_BYTES // (self.D * operand.itemsize))
        chunk = max(16, columns // 2)
        self.output = Config(ROWS, chunk, min(columns, self.units), num_stages=3)
        self.project = Config(ROWS, 4 * chunk, 32, num_stages=3)
        self.input = Config(ROWS, 0, columns, num_warps=8)

    def launch(self, head: Arguments, step_end: Arguments, tail: Arguments) -> None:
        """Launch from one attention to the next; arguments as in ``row_forward_kernel``."""
        N, tiles = self.n_rows, triton.cdiv(self.n_rows, ROWS)
        attention, weights, biases, *_ = head
        norm_weight, norm_bias, _, _, state, *read_out = step_end
        read_out_bias = read_out[1]
        scale, shift, next_weights, next_biases, _, _, qkv = tail
        x: Tensor | None = self.x
        if attention is None:
            x, state = state, None
        else:
            launch(
                few_rows_output_kernel, (tiles, SHARES), self.block_input, attention, weights,
                biases, self.x, self.hidden, N, config=self.output, UNITS=self.units,
                **self.constexprs,
            )  # fmt: skip
            launch(
                few_rows_project_kernel, (tiles, self.D // self.project.columns), self.x,
                self.hidden, weights, biases, N, config=self.project, **self.constexprs,
            )  # fmt: skip
        launch(
            few_rows_input_kernel, (tiles, 1 if qkv is None else 3 * self.D // self.input.columns),
            x, norm_weight, norm_bias, state, *read_out, scale, shift, next_weights, next_biases,
            None if qkv is None else self.block_input, qkv, N, self.S, config=self.input,
            OUTPUTS=0 if read_out_bias is None else len(read_out_bias), **self.constexprs,
        )  # fmt: skip
