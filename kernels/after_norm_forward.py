"""All of a step of TRM's block but attention, in one kernel, as ``row_forward.py`` for GPT-2's.

Each sublayer's sum with the residual is normalised, and the norms have no weights:

    HEAD      h1 = rms(x + attention @ Wo^T)
              h2 = rms(h1 + (silu(h1 @ Wgate^T) (h1 @ Wup^T)) @ Wdown^T)
    STEP_END  z = h2
    TAIL      x = inject(z, e) + p where a step begins, h2 inside one
              qkv = x @ Wqkv^T, with queries and keys turned by the tables of rotary positions

The loop's first launch is only a TAIL, its last only a HEAD and STEP_END; arguments of the parts
that a launch leaves out are None. Source: arXiv 2510.04871.
"""

import triton
import triton.language as tl

from .numerics import cast, dot, inverse_rms, silu_and_slope
from .row_forward import add_product, inject


@triton.jit
def through_memory(y, buffer, rows, valid, D: tl.constexpr):
    """Rows in parts as the operand of a product, [ROWS, D], stored in ``buffer``; 0 past the end.

    It is read back from memory, where the backward needs it anyway: so it sits in shared memory
    during the loop that multiplies it, and not in registers.
    """
    PART: tl.constexpr = y[0].shape[1]
    for i in tl.static_range(len(y)):
        columns = i * PART + tl.arange(0, PART)
        part = cast(y[i], buffer.dtype.element_ty)
        tl.store(buffer + rows[:, None] * D + columns[None, :], part, mask=valid[:, None])
    tl.debug_barrier()
    offsets = rows[:, None] * D + tl.arange(0, D)[None, :]
    return tl.load(buffer + offsets, mask=valid[:, None], other=0.0)


@triton.jit
def weight_rows(weight, rows, D: tl.constexpr):
    """[len(rows), D] of a weight D wide."""
    return tl.load(weight + rows[:, None] * D + tl.arange(0, D)[None, :])


@triton.jit
def outputs(x, weight, rows, TF32: tl.constexpr):
    """Outputs ``rows`` of a Linear without bias: x @ weight[rows]^T. x: [ROWS, D]."""
    into = tl.trans(weight_rows(weight, rows, x.shape[1]))
    return dot(x, into, tl.zeros([x.shape[0], rows.shape[0]], tl.float32), TF32)


@triton.jit
def first_of_pairs(c, PAIRS: tl.constexpr, HEAD_DIM: tl.constexpr):
    """Columns of the first elements of pairs c .. c + PAIRS; the second is HEAD_DIM / 2 later."""
    pair = c + tl.arange(0, PAIRS)
    return pair // (HEAD_DIM // 2) * HEAD_DIM + pair % (HEAD_DIM // 2)


@triton.jit
def angles(tables, rows, first, S, HEAD_DIM: tl.constexpr):
    """(cos, sin) of the first elements of pairs and (cos, sin) of the second, [ROWS, PAIRS] each.

    tables: [2, S, HEAD_DIM] fp32; first: columns of ``first_of_pairs``.
    """
    cos = tables + (rows % S)[:, None] * HEAD_DIM + (first % HEAD_DIM)[None, :]
    sin = cos + S * HEAD_DIM
    HALF: tl.constexpr = HEAD_DIM // 2
    return tl.load(cos), tl.load(sin), tl.load(cos + HALF), tl.load(sin + HALF)


@triton.jit
def _gated_units(h, weight, c, HIDDEN: tl.constexpr, CHUNK: tl.constexpr, TF32: tl.constexpr):
    """Hidden units c .. c + CHUNK after SwiGLU, as an operand. h: [ROWS, D]; weight: [2F, D]."""
    units = c + tl.arange(0, CHUNK)
    gate, _ = silu_and_slope(outputs(h, weight, units, TF32))
    return cast(gate * outputs(h, weight, HIDDEN + units, TF32), h.dtype)


@triton.jit
def _rms_norm(y, rstd, rows, valid, D: tl.constexpr, eps):
    """rms(y), of parts; ``rstd`` is stored unless it is None."""
    r = inverse_rms(y, D, eps)
    if rstd is not None:
        tl.store(rstd + rows, r, mask=valid)
    normed = ()
    for i in tl.static_range(len(y)):
        normed += (y[i] * r[:, None],)
    return normed


# Slots of statistics, 4 bytes per row, start at any multiple of 4: do not compile for alignment.
@triton.jit(do_not_specialize=["N", "S"], do_not_specialize_on_alignment=["rstd1", "rstd2"])
def after_norm_forward_kernel(
    x,  # [N, D] fp32, the residual: a block's input; in place
    # HEAD
    attention,  # [N, D] operand
    weights,  # operand: Wqkv [3D, D], Wo [D, D], Wgate and Wup [2F, D], Wdown [D, F] of the block
    h1,  # out [N, D] operand
    rstd1,  # out [N] fp32; may be None
    h2,  # out [N, D], 16 bits or fp32; may be None
    rstd2,  # out [N] fp32; may be None
    # STEP_END
    state,  # [N, D] fp32 or None: z, an output of STEP_END; input of a launch that is only a TAIL,
    # where None stands for the injection's neutral element, 0 or 1
    # TAIL
    scale,  # [N, D] fp32, or None: what the block's input is multiplied with, and
    shift,  # [N, D] fp32, or None: what is added to it
    next_weights,  # of the block that begins
    inputs,  # out [N, D] operand: the block's input
    tables,  # [2, S, HEAD_DIM] fp32, cosines and sines; None: nothing is turned
    qkv,  # out [N, 3D] operand
    N,
    S,  # tokens of a sequence
    eps,  # fp32, of the norms
    D: tl.constexpr,
    HIDDEN: tl.constexpr,  # F
    HEAD_DIM: tl.constexpr,
    TF32: tl.constexpr,
    ROWS: tl.constexpr,  # of a program
    HIDDEN_CHUNK: tl.constexpr,  # of the hidden units, and of D in the output projection
    COLUMNS: tl.constexpr,  # of q, k, v at a time, or pairs of columns
):
    """See the file's docstring. Grid: [ceil(N / ROWS)]."""
    HEAD: tl.constexpr = attention is not None
    TAIL: tl.constexpr = qkv is not None
    PART: tl.constexpr = min(D, 128 if ROWS >= 64 else 64)  # as in row_forward_kernel
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    valid = rows < N
    mask = valid[:, None]
    rows = tl.minimum(rows, N - 1)  # past the end, the last row again: loads need no mask
    offsets = rows[:, None] * D + tl.arange(0, PART)[None, :]

    y = ()
    for i in tl.static_range(D // PART):
        if HEAD:
            y += (tl.load(x + i * PART + offsets),)
        elif state is not None:
            y += (tl.load(state + i * PART + offsets),)
        else:
            y += (tl.full([ROWS, PART], 0.0 if scale is None else 1.0, tl.float32),)

    if HEAD:
        for c in range(0, D, HIDDEN_CHUNK):
            chunk = rows[:, None] * D + (c + tl.arange(0, HIDDEN_CHUNK))[None, :]
            y = add_product(y, tl.load(attention + chunk), weights + 3 * D * D, c, D, TF32)
        y = _rms_norm(y, rstd1, rows, valid, D, eps)
        h = through_memory(y, h1, rows, valid, D)
        # A chunk of hidden units is multiplied while the next one is computed, see row_forward.
        gate_up = weights + 4 * D * D
        down = gate_up + 2 * HIDDEN * D
        hidden = _gated_units(h, gate_up, 0, HIDDEN, HIDDEN_CHUNK, TF32)
        for c in range(HIDDEN_CHUNK, HIDDEN, HIDDEN_CHUNK):
            y = add_product(y, hidden, down, c - HIDDEN_CHUNK, HIDDEN, TF32)
            hidden = _gated_units(h, gate_up, c, HIDDEN, HIDDEN_CHUNK, TF32)
        y = add_product(y, hidden, down, HIDDEN - HIDDEN_CHUNK, HIDDEN, TF32)
        y = _rms_norm(y, rstd2, rows, valid, D, eps)
        for i in tl.static_range(D // PART):
            if h2 is not None:
                part = cast(y[i], h2.dtype.element_ty)
                tl.store(h2 + i * PART + offsets, part, mask=mask)
            if state is not None:
                tl.store(state + i * PART + offsets, y[i], mask=mask)

    if TAIL:
        begins = ()
        for i in tl.static_range(D // PART):
            part = inject(y[i], scale, shift, i * PART + offsets)
            tl.store(x + i * PART + offsets, part, mask=mask)
            begins += (part,)
        h = through_memory(begins, inputs, rows, valid, D)
        wide = rows[:, None] * (3 * D)
        if tables is not None:  # D pairs of q and k
            for c in range(0, D, COLUMNS):
                first = first_of_pairs(c, COLUMNS, HEAD_DIM)
                a = outputs(h, next_weights, first, TF32)
                b = outputs(h, next_weights, first + HEAD_DIM // 2, TF32)
                cos_a, sin_a, cos_b, sin_b = angles(tables, rows, first, S, HEAD_DIM)
                pair = qkv + wide + first[None, :]
                turned = cast(a * cos_a - b * sin_a, h.dtype)
                tl.store(pair, turned, mask=mask)
                turned = cast(b * cos_b + a * sin_b, h.dtype)
                tl.store(pair + HEAD_DIM // 2, turned, mask=mask)
        UNTURNED: tl.constexpr = 0 if tables is None else 2 * D
        for c in range(UNTURNED, 3 * D, COLUMNS):
            column = c + tl.arange(0, COLUMNS)
            out = outputs(h, next_weights, column, TF32)
            tl.store(qkv + wide + column[None, :], cast(out, h.dtype), mask=mask)
