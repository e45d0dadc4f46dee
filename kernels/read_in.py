"""The prompt x_1, y_1, ..., x_n, y_n assembled and embedded in one launch."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .candidates import Config
from .launch import launch


@triton.jit(do_not_specialize=["n_tokens", "n_dims"])
def read_in_kernel(
    xs,  # [B, n, d] fp32
    ys,  # [B, n] fp32
    weight,  # [D, d] fp32
    bias,  # [D] fp32
    embeddings,  # out [B, 2n, D] fp32
    n_tokens,  # 2 B n
    n_dims,  # d
    D: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Token 2i is x_i; token 2i + 1 is y_i in coordinate 0. Grid: [ceil(n_tokens / ROWS)]."""
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    columns = tl.arange(0, D)
    valid = rows < n_tokens
    point = rows // 2
    is_x = valid & (rows % 2 == 0)
    is_y = valid & (rows % 2 == 1)

    first = tl.load(xs + point * n_dims, mask=is_x, other=0.0)
    first += tl.load(ys + point, mask=is_y, other=0.0)
    out = (
        tl.load(bias + columns)[None, :]
        + first[:, None] * tl.load(weight + columns * n_dims)[None, :]
    )
    for k in range(1, n_dims):
        x = tl.load(xs + point * n_dims + k, mask=is_x, other=0.0)
        out += x[:, None] * tl.load(weight + columns * n_dims + k)[None, :]
    tl.store(embeddings + rows[:, None] * D + columns[None, :], out, mask=valid[:, None])


def read_in(xs: Tensor, ys: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Embedded prompt [B, 2n, D]. xs: [B, n, d], ys: [B, n], weight: [D, d]; fp32, contiguous."""
    B, n, d = xs.shape
    D = len(weight)
    embeddings = xs.new_empty(B, 2 * n, D)
    config = Config(rows=16)
    grid = (triton.cdiv(2 * B * n, config.rows),)
    launch(read_in_kernel, grid, xs, ys, weight, bias, embeddings, 2 * B * n, d, config=config, D=D)
    return embeddings
