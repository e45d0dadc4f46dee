"""The backward of ``row_forward.py``: all of a loop step's backward but attention's, in one kernel.

A launch sits between two attention backwards. It ends one block's backward and begins that of the
block before it, with the forward's parts in reverse:

    TAIL      dx = norm'(d_qkv @ Wqkv') + dx, where the second dx came along the residual
              gradients of what was injected; where a step begins, of the state z before it
    STEP_END  gradient of z, with its part from outside the loop (of the state itself, or of
              predictions: grad_predictions @ Wout), through scale and norm
    HEAD      u, slope = gelu(xhat2 @ Wfc'^T + bfc'), recomputed
              dpre = (dx2 @ Wproj) slope ;  dx1 = dx2 + norm'(dpre @ Wfc') ;  d_attention = dx1 @ Wo

norm'(d) is the gradient before a normalisation, given that after it. What the weight gradients
multiply (u, dpre, dx1, dx2) is stored in the operands' dtype; the residual's gradient is fp32.
Sums over rows (gradients of biases, of the final LayerNorm and of the read-out) are stored by
program: their sum over programs and steps has a fixed order, without atomics. Loads of gradients
are masked, so that rows past the end are zero and add nothing.
The backward's first launch is only a STEP_END and HEAD, its last only a TAIL; arguments of the
parts that a launch leaves out are None.
"""

import triton
import triton.language as tl

from .numerics import cast, dot, gelu_and_slope, normalise_backward
from .row_forward import tile


@triton.jit
def _own(buffer, offsets, mask):
    # A buffer that is updated in place: rows past the end must not read what another thread writes.
    return tl.load(buffer + offsets, mask=mask, other=0.0)


@triton.jit
def _through_memory(y, buffer, offsets, mask):
    # An operand that is read back from memory sits in shared memory, not in registers, during the
    # loop that multiplies it; weight gradients need it in memory anyway.
    tl.store(buffer + offsets, cast(y, buffer.dtype.element_ty), mask=mask)
    tl.debug_barrier()
    return tl.load(buffer + offsets, mask=mask, other=0.0)


# Slots of statistics, 4 bytes per row, start at any multiple of 4: do not compile for alignment.
@triton.jit(
    do_not_specialize=["N"],
    do_not_specialize_on_alignment=["rstd1", "rstd2", "rstdf", "grad_predictions"],
)
def row_backward_kernel(
    dx,  # [N, D] fp32, gradient of the residual; in place
    dz,  # without TAIL: dx, which is then the gradient of z from later steps; None if there is none
    # TAIL
    weights,  # [12 D D] operand: Wqkv', Wo, Wfc', Wproj of the block that ends
    d_qkv,  # [N, 3D] operand
    xhat1,  # [N, D] operand
    rstd1,  # [N] fp32
    d_biases,  # out [programs, 9D] fp32: sums over a program's rows, for bqkv' (the first 3D)
    d_shift,  # [N, D] fp32, or None: sum of what was added to the block's input; in place
    scale,  # [N, D] fp32, or None: what the block's input was multiplied with, and
    state,  # [N, D] fp32: that input; None for ones
    d_scale,  # [N, D] fp32, or None; in place
    # STEP_END
    norm_weight,  # [D] fp32, of the final LayerNorm
    xhatf,  # [N, D], 16 bits or fp32
    rstdf,  # [N] fp32
    d_norm,  # out [2, programs, D] fp32: sums over a program's rows, for scale and shift
    grad_state,  # [N, D] fp32: of a step's output, its part from outside the loop; or None
    grad_predictions,  # [N, OUTPUTS] fp32, or None
    read_out_weight,  # [OUTPUTS, D] fp32
    d_read_out,  # out [programs, OUTPUTS, D] fp32: sums of grad_predictions xhatf
    # HEAD
    next_weights,  # of the block that begins
    next_biases,  # [9 D] fp32
    xhat2,  # [N, D] operand
    rstd2,  # [N] fp32
    dx2,  # out [N, D] operand
    hidden,  # out [N, 4D] operand: u
    d_hidden,  # out [N, 4D] operand: dpre
    dx1,  # out [N, D] operand
    d_attention,  # out [N, D] operand
    next_d_biases,  # out [programs, 9D] fp32: for bo, bfc', bproj (the last 6D)
    N,
    D: tl.constexpr,
    OUTPUTS: tl.constexpr,  # of the read-out; 0 without one
    TF32: tl.constexpr,
    ROWS: tl.constexpr,  # of a program
    HIDDEN_CHUNK: tl.constexpr,  # of the 4D hidden units
    COLUMNS: tl.constexpr,  # of q, k, v in TAIL, and of d_attention, at a time
):
    """See the file's docstring. Grid: [ceil(N / ROWS)]."""
    TAIL: tl.constexpr = d_qkv is not None
    STEP_END: tl.constexpr = xhatf is not None
    HEAD: tl.constexpr = xhat2 is not None
    program = tl.program_id(0)
    rows = program * ROWS + tl.arange(0, ROWS)
    columns = tl.arange(0, D)
    valid = rows < N
    rows = tl.minimum(rows, N - 1)  # past the end, the last row again: activations need no mask
    mask = valid[:, None]
    offsets = rows[:, None] * D + columns[None, :]

    d = tl.zeros([ROWS, D], tl.float32)
    if TAIL:
        for k in range(0, 3 * D, COLUMNS):
            column = k + tl.arange(0, COLUMNS)
            chunk = rows[:, None] * (3 * D) + column[None, :]
            d_chunk = tl.load(d_qkv + chunk, mask=mask, other=0.0)
            tl.store(d_biases + program * (9 * D) + column, tl.sum(d_chunk.to(tl.float32), axis=0))
            d = dot(d_chunk, tile(weights, k, COLUMNS, 0, D, D), d, TF32)
        xhat = tl.load(xhat1 + offsets).to(tl.float32)
        d = normalise_backward(d, xhat, tl.load(rstd1 + rows), D) + _own(dx, offsets, mask)
        if d_shift is not None:
            tl.store(d_shift + offsets, _own(d_shift, offsets, mask) + d, mask=mask)
        if scale is not None:
            d_product = d if state is None else d * tl.load(state + offsets)
            tl.store(d_scale + offsets, _own(d_scale, offsets, mask) + d_product, mask=mask)
            d *= tl.load(scale + offsets)
    elif dz is not None:
        d = _own(dz, offsets, mask)

    if STEP_END:
        xhat = tl.load(xhatf + offsets).to(tl.float32)
        if grad_state is not None:
            d += _own(grad_state, offsets, mask)
        if grad_predictions is not None:
            for output in tl.static_range(OUTPUTS):
                grad = tl.load(grad_predictions + rows * OUTPUTS + output, mask=valid, other=0.0)
                d += grad[:, None] * tl.load(read_out_weight + output * D + columns)[None, :]
                sums = (program * OUTPUTS + output) * D + columns
                tl.store(d_read_out + sums, tl.sum(grad[:, None] * xhat, axis=0))
        sums = program * D + columns
        tl.store(d_norm + sums, tl.sum(d * xhat, axis=0))
        tl.store(d_norm + tl.num_programs(0) * D + sums, tl.sum(d, axis=0))
        d *= tl.load(norm_weight + columns)[None, :]
        d = normalise_backward(d, xhat, tl.load(rstdf + rows), D)
    tl.store(dx + offsets, d, mask=mask)

    if HEAD:
        next_d_biases += program * (9 * D)
        tl.store(next_d_biases + 8 * D + columns, tl.sum(d, axis=0))
        d_out = _through_memory(d, dx2, offsets, mask)
        xhat = tl.load(xhat2 + offsets)
        for c in range(0, 4 * D, HIDDEN_CHUNK):
            chunk = c + tl.arange(0, HIDDEN_CHUNK)
            into = tile(next_weights + 4 * D * D, c, HIDDEN_CHUNK, 0, D, D)
            pre = dot(xhat, tl.trans(into), tl.zeros([ROWS, HIDDEN_CHUNK], tl.float32), TF32)
            pre += tl.load(next_biases + 4 * D + chunk)[None, :]
            u, slope = gelu_and_slope(pre, xhat.dtype == tl.bfloat16)
            out = tile(next_weights + 8 * D * D, 0, D, c, HIDDEN_CHUNK, 4 * D)
            d_pre = dot(d_out, out, tl.zeros([ROWS, HIDDEN_CHUNK], tl.float32), TF32) * slope
            tl.store(next_d_biases + 4 * D + chunk, tl.sum(d_pre, axis=0))
            wide = rows[:, None] * (4 * D) + chunk[None, :]
            tl.store(hidden + wide, cast(u, xhat.dtype), mask=mask)
            tl.store(d_hidden + wide, cast(d_pre, xhat.dtype), mask=mask)
        # A second loop, which reads memory: Triton has every group of warps repeat a product if it
        # sees that another product follows.
        tl.debug_barrier()
        d = tl.zeros([ROWS, D], tl.float32)
        for c in range(0, 4 * D, HIDDEN_CHUNK):
            wide = rows[:, None] * (4 * D) + (c + tl.arange(0, HIDDEN_CHUNK))[None, :]
            d_pre = tl.load(d_hidden + wide, mask=mask, other=0.0)
            d = dot(d_pre, tile(next_weights + 4 * D * D, c, HIDDEN_CHUNK, 0, D, D), d, TF32)
        xhat = tl.load(xhat2 + offsets).to(tl.float32)
        d = normalise_backward(d, xhat, tl.load(rstd2 + rows), D) + _own(dx, offsets, mask)
        tl.debug_barrier()  # dx was read by other threads than those that now write it
        tl.store(dx + offsets, d, mask=mask)
        tl.store(next_d_biases + 3 * D + columns, tl.sum(d, axis=0))

        d = _through_memory(d, dx1, offsets, mask)
        for c in range(0, D, COLUMNS):
            out = tile(next_weights + 3 * D * D, 0, D, c, COLUMNS, D)
            d_heads = dot(d, out, tl.zeros([ROWS, COLUMNS], tl.float32), TF32)
            chunk = rows[:, None] * D + (c + tl.arange(0, COLUMNS))[None, :]
            tl.store(d_attention + chunk, cast(d_heads, d.dtype), mask=mask)
