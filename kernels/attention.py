"""Attention of short sequences, forward and backward, on packed queries, keys and values.

For one head, with i a query, j a key (if causal, j <= i) and scale = 1 / sqrt(head_dim):

    s_ij = scale q_i·k_j        lse_i = log sum_j exp(s_ij)       p_ij = exp(s_ij - lse_i)
    o_i = sum_j p_ij v_j

    dp_ij = do_i·v_j            delta_i = do_i·o_i                ds_ij = p_ij (dp_ij - delta_i)
    dv_j = sum_i p_ij do_i      dk_j = scale sum_i ds_ij q_i      dq_i = scale sum_j ds_ij k_j

A program takes a tile of rows of one head. In the backward it sums dk and dv of its tile over the
queries that see it, then dq of the same tile over the keys it sees. Scores are thus computed twice
(7 products where FlashAttention has 5), and in return there is one launch, every program has the
same amount of work, and sums have a fixed order: no atomics, so results repeat bit for bit.

Source: FlashAttention-2 (arXiv 2307.08691), algorithms 1 and 2.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from . import tuning
from .candidates import Config, operand_precision
from .launch import launch
from .numerics import cast, dot

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)


@triton.jit
def _tile(ptr, rows, S, STRIDE: tl.constexpr, HEAD_DIM: tl.constexpr):
    """Rows [rows, HEAD_DIM] of a matrix; zero from row S on."""
    offsets = rows[:, None] * STRIDE + tl.arange(0, HEAD_DIM)[None, :]
    return tl.load(ptr + offsets, mask=rows[:, None] < S, other=0.0)


@triton.jit
def _store_tile(ptr, rows, S, values, STRIDE: tl.constexpr, HEAD_DIM: tl.constexpr):
    offsets = rows[:, None] * STRIDE + tl.arange(0, HEAD_DIM)[None, :]
    values = cast(values, ptr.dtype.element_ty)
    tl.store(ptr + offsets, values, mask=rows[:, None] < S)


@triton.jit
def _sees(queries, keys, S, CAUSAL: tl.constexpr):
    """Which queries attend to which keys; both broadcast to the shape of the scores."""
    return keys <= queries if CAUSAL else keys < S


@triton.jit
def _end_of_keys(tile, S, ROWS: tl.constexpr, CAUSAL: tl.constexpr):
    """End of the keys that a tile of queries attends to."""
    return tl.minimum((tile + 1) * ROWS, S) if CAUSAL else S


@triton.jit(do_not_specialize=["S"])
def attention_forward_kernel(
    qkv_ptr, out_ptr, lse_ptr, S,
    D: tl.constexpr, HEAD_DIM: tl.constexpr, CAUSAL: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, TF32: tl.constexpr,
):  # fmt: skip
    """Grid (B * H, tiles of ROWS queries). lse is natural; inside, powers are of two."""
    N_HEADS: tl.constexpr = D // HEAD_DIM
    SCALE: tl.constexpr = LOG2_E * HEAD_DIM**-0.5
    head = tl.program_id(0).to(tl.int64)
    tile = tl.num_programs(1) - 1 - tl.program_id(1)  # the longest rows first
    first = head // N_HEADS * S  # row of the sequence
    column = head % N_HEADS * HEAD_DIM
    q_ptr = qkv_ptr + first * (3 * D) + column
    out_ptr += first * D + column

    queries = tile * ROWS + tl.arange(0, ROWS)
    q = _tile(q_ptr, queries, S, 3 * D, HEAD_DIM)
    peak = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    out = tl.zeros([ROWS, HEAD_DIM], tl.float32)
    # Every query has key 0 in the first tile, so that peak is finite from there on.
    for j in range(0, _end_of_keys(tile, S, ROWS, CAUSAL), COLUMNS):
        keys = j + tl.arange(0, COLUMNS)
        k = _tile(q_ptr + D, keys, S, 3 * D, HEAD_DIM)
        v = _tile(q_ptr + 2 * D, keys, S, 3 * D, HEAD_DIM)
        scores = dot(q, tl.trans(k), tl.zeros([ROWS, COLUMNS], tl.float32), TF32) * SCALE
        scores = tl.where(_sees(queries[:, None], keys[None, :], S, CAUSAL), scores, float("-inf"))
        new_peak = tl.maximum(peak, tl.max(scores, axis=1))
        p = tl.exp2(scores - new_peak[:, None])
        shrink = tl.exp2(peak - new_peak)
        total = total * shrink + tl.sum(p, axis=1)
        out = dot(cast(p, v.dtype), v, out * shrink[:, None], TF32)
        peak = new_peak
    _store_tile(out_ptr, queries, S, out / total[:, None], D, HEAD_DIM)
    tl.store(lse_ptr + head * S + queries, (peak + tl.log2(total)) * LN_2, mask=queries < S)


@triton.jit
def _load_queries(
    q_ptr, out_ptr, d_out_ptr, lse_ptr, queries, S, D: tl.constexpr, HEAD_DIM: tl.constexpr
):
    """(q, do, lse in powers of two, delta) of the queries; from row S on, lse makes p = 0."""
    q = _tile(q_ptr, queries, S, 3 * D, HEAD_DIM)
    d_out = _tile(d_out_ptr, queries, S, D, HEAD_DIM)
    out = _tile(out_ptr, queries, S, D, HEAD_DIM)
    lse = tl.load(lse_ptr + queries, mask=queries < S, other=float("inf"))
    delta = tl.sum(out.to(tl.float32) * d_out.to(tl.float32), axis=1)
    return q, d_out, lse * LOG2_E, delta


@triton.jit
def _key_gradients(
    q_ptr, out_ptr, d_out_ptr, lse_ptr, d_q_ptr, tile, S,
    D: tl.constexpr, HEAD_DIM: tl.constexpr, CAUSAL: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, TF32: tl.constexpr,
):  # fmt: skip
    """dk and dv of a tile of keys, from the queries that see it; scores are transposed."""
    SCALE: tl.constexpr = HEAD_DIM**-0.5
    keys = tile * ROWS + tl.arange(0, ROWS)
    k = _tile(q_ptr + D, keys, S, 3 * D, HEAD_DIM)
    v = _tile(q_ptr + 2 * D, keys, S, 3 * D, HEAD_DIM)
    d_k = tl.zeros([ROWS, HEAD_DIM], tl.float32)
    d_v = tl.zeros([ROWS, HEAD_DIM], tl.float32)
    for i in range(tile * ROWS if CAUSAL else 0, S, COLUMNS):
        queries = i + tl.arange(0, COLUMNS)
        q, d_out, lse, delta = _load_queries(
            q_ptr, out_ptr, d_out_ptr, lse_ptr, queries, S, D, HEAD_DIM
        )
        scores = dot(k, tl.trans(q), tl.zeros([ROWS, COLUMNS], tl.float32), TF32)
        scores = scores * (SCALE * LOG2_E) - lse[None, :]
        sees = _sees(queries[None, :], keys[:, None], S, CAUSAL)
        p = tl.exp2(tl.where(sees, scores, float("-inf")))
        d_v = dot(cast(p, d_out.dtype), d_out, d_v, TF32)
        d_p = dot(v, tl.trans(d_out), tl.zeros([ROWS, COLUMNS], tl.float32), TF32)
        d_scores = p * (d_p - delta[None, :])
        d_k = dot(cast(d_scores, q.dtype), q, d_k, TF32)
    _store_tile(d_q_ptr + D, keys, S, d_k * SCALE, 3 * D, HEAD_DIM)
    _store_tile(d_q_ptr + 2 * D, keys, S, d_v, 3 * D, HEAD_DIM)


@triton.jit
def _query_gradients(
    q_ptr, out_ptr, d_out_ptr, lse_ptr, d_q_ptr, tile, S,
    D: tl.constexpr, HEAD_DIM: tl.constexpr, CAUSAL: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, TF32: tl.constexpr,
):  # fmt: skip
    """dq of a tile of queries, from the keys that it sees."""
    SCALE: tl.constexpr = HEAD_DIM**-0.5
    queries = tile * ROWS + tl.arange(0, ROWS)
    q, d_out, lse, delta = _load_queries(
        q_ptr, out_ptr, d_out_ptr, lse_ptr, queries, S, D, HEAD_DIM
    )
    d_q = tl.zeros([ROWS, HEAD_DIM], tl.float32)
    for j in range(0, _end_of_keys(tile, S, ROWS, CAUSAL), COLUMNS):
        keys = j + tl.arange(0, COLUMNS)
        k = _tile(q_ptr + D, keys, S, 3 * D, HEAD_DIM)
        v = _tile(q_ptr + 2 * D, keys, S, 3 * D, HEAD_DIM)
        scores = dot(q, tl.trans(k), tl.zeros([ROWS, COLUMNS], tl.float32), TF32)
        scores = scores * (SCALE * LOG2_E) - lse[:, None]
        sees = _sees(queries[:, None], keys[None, :], S, CAUSAL)
        p = tl.exp2(tl.where(sees, scores, float("-inf")))
        d_p = dot(d_out, tl.trans(v), tl.zeros([ROWS, COLUMNS], tl.float32), TF32)
        d_scores = p * (d_p - delta[:, None])
        d_q = dot(cast(d_scores, k.dtype), k, d_q, TF32)
    _store_tile(d_q_ptr, queries, S, d_q * SCALE, 3 * D, HEAD_DIM)


@triton.jit(do_not_specialize=["S"])
def attention_backward_kernel(
    qkv_ptr, out_ptr, lse_ptr, d_out_ptr, d_qkv_ptr, S,
    D: tl.constexpr, HEAD_DIM: tl.constexpr, CAUSAL: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, TF32: tl.constexpr,
):  # fmt: skip
    """Grid (B * H, tiles of ROWS rows): dk and dv of the tile, then its dq."""
    N_HEADS: tl.constexpr = D // HEAD_DIM
    head = tl.program_id(0).to(tl.int64)
    tile = tl.program_id(1)
    first = head // N_HEADS * S
    column = head % N_HEADS * HEAD_DIM
    q_ptr = qkv_ptr + first * (3 * D) + column
    d_q_ptr = d_qkv_ptr + first * (3 * D) + column
    out_ptr += first * D + column
    d_out_ptr += first * D + column
    lse_ptr += head * S
    _key_gradients(
        q_ptr, out_ptr, d_out_ptr, lse_ptr, d_q_ptr, tile, S,
        D, HEAD_DIM, CAUSAL, ROWS, COLUMNS, TF32,
    )  # fmt: skip
    _query_gradients(
        q_ptr, out_ptr, d_out_ptr, lse_ptr, d_q_ptr, tile, S,
        D, HEAD_DIM, CAUSAL, ROWS, COLUMNS, TF32,
    )  # fmt: skip


def forward(qkv: Tensor, out: Tensor, lse: Tensor, n_heads: int, causal: bool) -> None:
    """Fill ``out`` and ``lse``; all tensors are contiguous.

    Args:
        qkv: queries, keys and values side by side, [B, S, 3D], in the dtype of matrix operands.
        out: [B, S, D], same dtype.
        lse: log-sum-exp of the scores, natural, [B, H, S] fp32.
        n_heads: H; D / H is 16, 32 or 64.
        causal: a query sees keys up to its own; else all keys.
    """
    _launch(attention_forward_kernel, qkv, out, lse, n_heads=n_heads, causal=causal)


def backward(
    qkv: Tensor, out: Tensor, lse: Tensor, d_out: Tensor, d_qkv: Tensor, n_heads: int, causal: bool
) -> None:
    """Fill ``d_qkv`` [B, S, 3D], given ``d_out`` [B, S, D] and the tensors of ``forward``."""
    tensors = qkv, out, lse, d_out, d_qkv
    _launch(attention_backward_kernel, *tensors, n_heads=n_heads, causal=causal)


def _launch(kernel, qkv, out, *tensors, n_heads, causal) -> None:
    B, S, D = out.shape
    precision = operand_precision(qkv.dtype)

    def run(config: Config) -> None:
        grid = (B * n_heads, triton.cdiv(S, config.rows))
        launch(
            kernel, grid, qkv, out, *tensors, S,
            config=config, D=D, HEAD_DIM=D // n_heads, CAUSAL=causal, TF32=precision == "tf32",
        )  # fmt: skip

    config = tuning.choose(
        kernel, width=D // n_heads, precision=precision, n_rows=B * S, device=qkv.device, run=run
    )
    run(config)
