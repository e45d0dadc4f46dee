"""The backward of ``after_norm_forward.py``, as ``row_backward.py`` for GPT-2's block.

A launch sits between two attention backwards, with the forward's parts in reverse:

    TAIL      dx = d_qkv @ Wqkv + dx, with d_qkv turned back; the second dx came along the residual
              gradients of what was injected; where a step begins, of the state z before it
    STEP_END  gradient of z, with its part from outside the loop
    HEAD      dy2 = rms'(dh2) ;  gate, up, recomputed from h1 ;  du = dy2 @ Wdown
              dgate = du up silu'(gate) ;  dup = du silu(gate)
              dy1 = rms'(dy2 + dgate @ Wgate + dup @ Wup) ;  d_attention = dy1 @ Wo

rms'(d) is the gradient before a norm, given that after it; y1 and y2 are the sums before the norms
h1 and h2. What the weight gradients multiply (d_qkv turned back, u, dgate, dup, dy1, dy2) is stored
in the operands' dtype; the residual's gradient is fp32. There are no sums over rows, as the block
has neither biases nor weights of norms. Loads of gradients are masked, so that rows past the end
are zero. The backward's first launch is only a STEP_END and HEAD, its last only a TAIL; arguments
of the parts that a launch leaves out are None.
"""

import triton
import triton.language as tl

from .after_norm_forward import angles, first_of_pairs, outputs, through_memory, weight_rows
from .numerics import cast, dot, rms_norm_backward, silu_and_slope
from .row_forward import tile


# Slots of statistics, 4 bytes per row, start at any multiple of 4: do not compile for alignment.
@triton.jit(do_not_specialize=["N", "S"], do_not_specialize_on_alignment=["rstd1", "rstd2"])
def after_norm_backward_kernel(
    dx,  # [N, D] fp32, gradient of the residual; in place
    dz,  # without TAIL: dx, which is then the gradient of z from later steps; None if there is none
    # TAIL
    weights,  # operand, as in the forward, of the block that ends
    d_turned,  # [N, 3D] operand: gradient of what the forward called qkv
    tables,  # [2, S, HEAD_DIM] fp32; None: nothing was turned
    d_qkv,  # out [N, 3D] operand: before queries and keys were turned; None without tables
    d_shift,  # [N, D] fp32, or None: sum of what was added to the block's input; in place
    scale,  # [N, D] fp32, or None: what the block's input was multiplied with, and
    state,  # [N, D] fp32: that input; None for ones
    d_scale,  # [N, D] fp32, or None; in place
    # STEP_END
    grad_state,  # [N, D] fp32: of a step's output, its part from outside the loop; or None
    # HEAD
    next_weights,  # of the block that begins
    h1,  # [N, D] operand
    rstd1,  # [N] fp32
    h2,  # [N, D], 16 bits or fp32
    rstd2,  # [N] fp32
    dy2,  # out [N, D] operand
    hidden,  # out [N, F] operand: u
    d_hidden,  # out [N, 2F] operand: dgate, dup
    dy1,  # out [N, D] operand
    d_attention,  # out [N, D] operand
    N,
    S,  # tokens of a sequence
    D: tl.constexpr,
    HIDDEN: tl.constexpr,  # F
    HEAD_DIM: tl.constexpr,
    TF32: tl.constexpr,
    ROWS: tl.constexpr,  # of a program
    HIDDEN_CHUNK: tl.constexpr,  # of the hidden units
    COLUMNS: tl.constexpr,  # of q, k, v in TAIL (or pairs of columns), and of d_attention
):
    """See the file's docstring. Grid: [ceil(N / ROWS)]."""
    TAIL: tl.constexpr = d_turned is not None
    HEAD: tl.constexpr = h1 is not None
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    valid = rows < N
    rows = tl.minimum(rows, N - 1)  # past the end, the last row again: activations need no mask
    mask = valid[:, None]
    offsets = rows[:, None] * D + tl.arange(0, D)[None, :]

    d = tl.zeros([ROWS, D], tl.float32)
    if TAIL:
        wide = rows[:, None] * (3 * D)
        if tables is not None:  # D pairs of q and k
            for c in range(0, D, COLUMNS):
                first = first_of_pairs(c, COLUMNS, HEAD_DIM)
                second = first + HEAD_DIM // 2
                pair = wide + first[None, :]
                d_a = tl.load(d_turned + pair, mask=mask, other=0.0).to(tl.float32)
                d_b = tl.load(d_turned + pair + HEAD_DIM // 2, mask=mask, other=0.0).to(tl.float32)
                cos_a, sin_a, cos_b, sin_b = angles(tables, rows, first, S, HEAD_DIM)
                back = cast(d_a * cos_a + d_b * sin_b, d_qkv.dtype.element_ty)
                tl.store(d_qkv + pair, back, mask=mask)
                d = dot(back, weight_rows(weights, first, D), d, TF32)
                back = cast(d_b * cos_b - d_a * sin_a, d_qkv.dtype.element_ty)
                tl.store(d_qkv + pair + HEAD_DIM // 2, back, mask=mask)
                d = dot(back, weight_rows(weights, second, D), d, TF32)
        UNTURNED: tl.constexpr = 0 if tables is None else 2 * D
        for c in range(UNTURNED, 3 * D, COLUMNS):
            chunk = wide + (c + tl.arange(0, COLUMNS))[None, :]
            d_chunk = tl.load(d_turned + chunk, mask=mask, other=0.0)
            if tables is not None:
                tl.store(d_qkv + chunk, d_chunk, mask=mask)
            d = dot(d_chunk, tile(weights, c, COLUMNS, 0, D, D), d, TF32)
        d += tl.load(dx + offsets, mask=mask, other=0.0)
        if d_shift is not None:
            total = tl.load(d_shift + offsets, mask=mask, other=0.0) + d
            tl.store(d_shift + offsets, total, mask=mask)
        if scale is not None:
            d_product = d if state is None else d * tl.load(state + offsets)
            total = tl.load(d_scale + offsets, mask=mask, other=0.0) + d_product
            tl.store(d_scale + offsets, total, mask=mask)
            d *= tl.load(scale + offsets)
    elif dz is not None:
        d = tl.load(dz + offsets, mask=mask, other=0.0)

    if grad_state is not None:
        d += tl.load(grad_state + offsets, mask=mask, other=0.0)
    if HEAD:
        d = rms_norm_backward(d, tl.load(h2 + offsets).to(tl.float32), tl.load(rstd2 + rows), D)
    # A thread may have read what another one writes now.
    tl.debug_barrier()
    tl.store(dx + offsets, d, mask=mask)

    if HEAD:
        d_out = through_memory((d,), dy2, rows, valid, D)
        h = tl.load(h1 + offsets)
        gate_up = next_weights + 4 * D * D
        down = gate_up + 2 * HIDDEN * D
        for c in range(0, HIDDEN, HIDDEN_CHUNK):
            units = c + tl.arange(0, HIDDEN_CHUNK)
            gate, slope = silu_and_slope(outputs(h, gate_up, units, TF32))
            up = outputs(h, gate_up, HIDDEN + units, TF32)
            out = tile(down, 0, D, c, HIDDEN_CHUNK, HIDDEN)
            d_unit = dot(d_out, out, tl.zeros([ROWS, HIDDEN_CHUNK], tl.float32), TF32)
            u = hidden + rows[:, None] * HIDDEN + units[None, :]
            tl.store(u, cast(gate * up, h.dtype), mask=mask)
            d_pre = d_hidden + rows[:, None] * (2 * HIDDEN) + units[None, :]
            tl.store(d_pre, cast(d_unit * up * slope, h.dtype), mask=mask)
            tl.store(d_pre + HIDDEN, cast(d_unit * gate, h.dtype), mask=mask)
        # A second loop, which reads memory, as in row_backward_kernel.
        tl.debug_barrier()
        d = tl.zeros([ROWS, D], tl.float32)
        for c in range(0, 2 * HIDDEN, HIDDEN_CHUNK):
            chunk = rows[:, None] * (2 * HIDDEN) + (c + tl.arange(0, HIDDEN_CHUNK))[None, :]
            d_chunk = tl.load(d_hidden + chunk, mask=mask, other=0.0)
            d = dot(d_chunk, tile(gate_up, c, HIDDEN_CHUNK, 0, D, D), d, TF32)
        d += tl.load(dx + offsets, mask=mask, other=0.0)
        d = rms_norm_backward(d, tl.load(h1 + offsets).to(tl.float32), tl.load(rstd1 + rows), D)
        tl.debug_barrier()  # dx was read by other threads than those that now write it
        tl.store(dx + offsets, d, mask=mask)

        d = through_memory((d,), dy1, rows, valid, D)
        for c in range(0, D, COLUMNS):
            out = tile(next_weights + 3 * D * D, 0, D, c, COLUMNS, D)
            d_heads = dot(d, out, tl.zeros([ROWS, COLUMNS], tl.float32), TF32)
            chunk = rows[:, None] * D + (c + tl.arange(0, COLUMNS))[None, :]
            tl.store(d_attention + chunk, cast(d_heads, d.dtype), mask=mask)
