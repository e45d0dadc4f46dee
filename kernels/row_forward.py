"""All of a loop step but attention, in one kernel: it is local to a row.

A launch sits between two attentions. It ends one block and begins the next, so that a row's
residual stays on the chip in between:

    HEAD      x1 = x + attention @ Wo^T + bo
              x2 = x1 + gelu(norm(x1) @ Wfc'^T + bfc') @ Wproj^T + bproj
    STEP_END  z = norm(x2) * scale + shift, and its read-out, predictions = z @ Wout^T + bout,
              from which targets are subtracted where there are any
    TAIL      x = inject(z, e) + p where a step begins, x2 inside one
              qkv = norm(x) @ Wqkv'^T + bqkv'

The loop's first launch is only a TAIL, its last only a HEAD and STEP_END; arguments of the parts
that a launch leaves out are None. ``Wfc'`` and ``Wqkv'`` include the LayerNorms, see ``fold.py``.
"""

import triton
import triton.language as tl

from .numerics import cast, dot, gelu, statistics


@triton.jit
def tile(matrix, row, ROWS: tl.constexpr, column, COLUMNS: tl.constexpr, WIDTH: tl.constexpr):
    """[ROWS, COLUMNS] of a row-major ``matrix`` that is WIDTH wide, from (row, column) on."""
    rows = row + tl.arange(0, ROWS)
    columns = column + tl.arange(0, COLUMNS)
    return tl.load(matrix + rows[:, None] * WIDTH + columns[None, :])


@triton.jit
def add_bias(y, bias):
    """y + bias, of parts."""
    PART: tl.constexpr = y[0].shape[1]
    total = ()
    for i in tl.static_range(len(y)):
        total += (y[i] + tl.load(bias + i * PART + tl.arange(0, PART))[None, :],)
    return total


@triton.jit
def _norm(y, xhat, rstd, rows, valid, D: tl.constexpr):
    """norm(y), stored in ``xhat`` and ``rstd``, as the operand of a product.

    It is read back from memory, where the backward needs it anyway: so it sits in shared memory
    during the loop that multiplies it, and not in registers.
    """
    PART: tl.constexpr = y[0].shape[1]
    mean, r = statistics(y, D)
    tl.store(rstd + rows, r, mask=valid)
    for i in tl.static_range(len(y)):
        part = cast((y[i] - mean[:, None]) * r[:, None], xhat.dtype.element_ty)
        columns = i * PART + tl.arange(0, PART)
        tl.store(xhat + rows[:, None] * D + columns[None, :], part, mask=valid[:, None])
    tl.debug_barrier()
    return tl.load(xhat + rows[:, None] * D + tl.arange(0, D)[None, :])


@triton.jit
def linear(x, weight, bias, row, OUT: tl.constexpr, TF32: tl.constexpr):
    """Outputs row .. row + OUT of a layer: x @ weight[rows]^T + bias[rows]. x: [ROWS, D]."""
    ROWS: tl.constexpr = x.shape[0]
    D: tl.constexpr = x.shape[1]
    y = dot(x, tl.trans(tile(weight, row, OUT, 0, D, D)), tl.zeros([ROWS, OUT], tl.float32), TF32)
    return y + tl.load(bias + row + tl.arange(0, OUT))[None, :]


@triton.jit
def hidden_units(xhat, weights, biases, c, CHUNK: tl.constexpr, TF32: tl.constexpr):
    """Hidden units c .. c + CHUNK of a block's MLP after GELU, as an operand. xhat: [ROWS, D]."""
    D: tl.constexpr = xhat.shape[1]
    y = linear(xhat, weights + 4 * D * D, biases + 4 * D, c, CHUNK, TF32)
    return cast(gelu(y, xhat.dtype != tl.float32), xhat.dtype)


@triton.jit
def add_product(y, x, weight, column, WIDTH: tl.constexpr, TF32: tl.constexpr):
    """y + x @ weight[:, column : column + IN]^T, with x [ROWS, IN] and a weight WIDTH wide."""
    PART: tl.constexpr = y[0].shape[1]
    total = ()
    for i in tl.static_range(len(y)):
        part = tile(weight, i * PART, PART, column, x.shape[1], WIDTH)
        total += (dot(x, tl.trans(part), y[i], TF32),)
    return total


@triton.jit
def end_step(
    y, norm_weight, norm_bias, xhatf, rstdf, state, read_out_weight, read_out_bias, predictions,
    targets, rows, stored, S, D: tl.constexpr, OUTPUTS: tl.constexpr,
):  # fmt: skip
    """z of the rows ``y``; it and what else is not None goes to memory where ``stored``.

    Arguments are those of ``row_forward_kernel``.
    """
    PART: tl.constexpr = y[0].shape[1]
    columns = tl.arange(0, PART)
    offsets = rows[:, None] * D + columns[None, :]
    mean, rstd = statistics(y, D)
    if rstdf is not None:
        tl.store(rstdf + rows, rstd, mask=stored)
    z = ()
    for i in tl.static_range(D // PART):
        part = (y[i] - mean[:, None]) * rstd[:, None]
        if xhatf is not None:
            rounded = cast(part, xhatf.dtype.element_ty)
            tl.store(xhatf + i * PART + offsets, rounded, mask=stored[:, None])
        part *= tl.load(norm_weight + i * PART + columns)[None, :]
        part += tl.load(norm_bias + i * PART + columns)[None, :]
        if state is not None:
            tl.store(state + i * PART + offsets, part, mask=stored[:, None])
        z += (part,)
    if predictions is not None:
        for output in tl.static_range(OUTPUTS):
            weight = read_out_weight + output * D + columns
            dots = tl.sum(z[0] * tl.load(weight)[None, :], axis=1)
            for i in tl.static_range(1, D // PART):
                dots += tl.sum(z[i] * tl.load(weight + i * PART)[None, :], axis=1)
            dots += tl.load(read_out_bias + output)
            if targets is not None:
                token = rows % S
                point = rows // S * ((S + 1) // 2) + token // 2
                target = tl.load(targets + point * OUTPUTS + output)
                dots = tl.where(token % 2 == 0, dots - target, 0.0)
            tl.store(predictions + rows * OUTPUTS + output, dots, mask=stored)
    return z


@triton.jit
def inject(z, scale, shift, offsets):
    """A part of a block's input, from what the step or block before left."""
    if scale is not None:
        z *= tl.load(scale + offsets)
    if shift is not None:
        z += tl.load(shift + offsets)
    return z


# Slots of statistics, 4 bytes per row, start at any multiple of 4: do not compile for alignment.
@triton.jit(
    do_not_specialize=["N", "S"],
    do_not_specialize_on_alignment=["rstd1", "rstd2", "rstdf", "read_out_bias", "predictions"],
)
def row_forward_kernel(
    x,  # [N, D] fp32, the residual; in place
    # HEAD
    attention,  # [N, D] operand
    weights,  # [12 D D] operand: Wqkv', Wo, Wfc', Wproj of the block that ends
    biases,  # [9 D] fp32
    xhat2,  # out [N, D] operand
    rstd2,  # out [N] fp32
    # STEP_END
    norm_weight,  # [D] fp32, of the final LayerNorm
    norm_bias,
    xhatf,  # out [N, D], 16 bits or fp32; may be None
    rstdf,  # out [N] fp32; may be None
    state,  # [N, D] fp32 or None: z, an output of STEP_END; input of a launch that is only a TAIL,
    # where None stands for the injection's neutral element, 0 or 1
    read_out_weight,  # [OUTPUTS, D] fp32; None: no predictions
    read_out_bias,  # [OUTPUTS] fp32
    predictions,  # out [N, OUTPUTS] fp32; with targets their errors at even tokens, 0 at odd ones
    targets,  # [B, ceil(S / 2), OUTPUTS] fp32, or None
    # TAIL
    scale,  # [N, D] fp32, or None: what the block's input is multiplied with, and
    shift,  # [N, D] fp32, or None: what is added to it
    next_weights,  # of the block that begins
    next_biases,
    xhat1,  # out [N, D] operand
    rstd1,  # out [N] fp32
    qkv,  # out [N, 3D] operand
    N,
    S,  # tokens of a sequence
    D: tl.constexpr,
    OUTPUTS: tl.constexpr,  # of the read-out; 0 without one
    TF32: tl.constexpr,
    ROWS: tl.constexpr,  # of a program
    HIDDEN_CHUNK: tl.constexpr,  # of the 4D hidden units, and of D in the output projection
    COLUMNS: tl.constexpr,  # of q, k, v at a time
):
    """See the file's docstring. Grid: [ceil(N / ROWS)]."""
    HEAD: tl.constexpr = attention is not None
    STEP_END: tl.constexpr = norm_weight is not None
    TAIL: tl.constexpr = qkv is not None
    # A row is a tuple of parts of PART columns, processed one after another, so that temporaries
    # take the registers of one part. Parts are wider than high: else tensor cores of sm_80 would do
    # chained products twice.
    PART: tl.constexpr = min(D, 128 if ROWS >= 64 else 64)
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    valid = rows < N
    mask = valid[:, None]
    rows = tl.minimum(rows, N - 1)  # past the end, the last row again: loads need no mask
    columns = tl.arange(0, PART)
    offsets = rows[:, None] * D + columns[None, :]

    y = ()
    for i in tl.static_range(D // PART):
        if HEAD:
            y += (tl.load(x + i * PART + offsets),)
        elif state is not None:
            y += (tl.load(state + i * PART + offsets),)
        else:
            y += (tl.full([ROWS, PART], 0.0 if scale is None else 1.0, tl.float32),)

    if HEAD:
        y = add_bias(y, biases + 3 * D)
        for c in range(0, D, HIDDEN_CHUNK):
            chunk = rows[:, None] * D + (c + tl.arange(0, HIDDEN_CHUNK))[None, :]
            y = add_product(y, tl.load(attention + chunk), weights + 3 * D * D, c, D, TF32)
        xhat = _norm(y, xhat2, rstd2, rows, valid, D)
        y = add_bias(y, biases + 8 * D)
        # A chunk of hidden units is multiplied while the next one is computed. That also hides two
        # products in a row from Triton, which would have every group of warps repeat the first.
        hidden = hidden_units(xhat, weights, biases, 0, HIDDEN_CHUNK, TF32)
        for c in range(HIDDEN_CHUNK, 4 * D, HIDDEN_CHUNK):
            y = add_product(y, hidden, weights + 8 * D * D, c - HIDDEN_CHUNK, 4 * D, TF32)
            hidden = hidden_units(xhat, weights, biases, c, HIDDEN_CHUNK, TF32)
        y = add_product(y, hidden, weights + 8 * D * D, 4 * D - HIDDEN_CHUNK, 4 * D, TF32)

    if STEP_END:
        y = end_step(
            y, norm_weight, norm_bias, xhatf, rstdf, state, read_out_weight, read_out_bias,
            predictions, targets, rows, valid, S, D, OUTPUTS,
        )  # fmt: skip

    if TAIL:
        inputs = ()
        for i in tl.static_range(D // PART):
            part = inject(y[i], scale, shift, i * PART + offsets)
            tl.store(x + i * PART + offsets, part, mask=mask)
            inputs += (part,)
        xhat = _norm(inputs, xhat1, rstd1, rows, valid, D)
        for c in range(0, 3 * D, COLUMNS):
            out = linear(xhat, next_weights, next_biases, c, COLUMNS, TF32)
            chunk = rows[:, None] * (3 * D) + (c + tl.arange(0, COLUMNS))[None, :]
            tl.store(qkv + chunk, cast(out, qkv.dtype.element_ty), mask=mask)
