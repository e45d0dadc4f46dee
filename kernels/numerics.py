"""Arithmetic of all kernels: products, rounding, activations and norms, on tiles in registers.

Kernels multiply through ``dot`` and round through ``cast``, never ``tl.dot`` or ``.to`` themselves:
Triton's interpreter (3.9) multiplies the bit patterns of bf16 and truncates where the hardware
rounds to nearest even, and these two put that right.
"""

import triton
import triton.language as tl
from triton.language import target_info

# True if kernels are interpreted on the CPU; fixed when triton.jit decorates them, at import.
INTERPRET = tl.constexpr(triton.knobs.runtime.interpret)
LAYER_NORM_EPS = tl.constexpr(1e-5)


@triton.jit
def dot(a, b, acc, TF32: tl.constexpr):
    """acc + a @ b, summed in fp32. TF32 only matters to fp32 operands; they are exact without."""
    if INTERPRET:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), acc, input_precision="ieee")
    else:
        return tl.dot(a, b, acc, input_precision="tf32" if TF32 else "ieee")


@triton.jit
def cast(x, dtype: tl.constexpr):
    """fp32 ``x`` rounded to ``dtype``, to nearest even."""
    if INTERPRET and dtype == tl.bfloat16:
        bits = x.to(tl.uint32, bitcast=True)
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
        rounded = tl.where(x == x, rounded, 0x7FC00000)
        return (rounded >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True)
    else:
        return x.to(dtype)


@triton.jit
def _approximate_tanh(y):
    """tanh by one instruction, with a relative error of at most 2^-11 (PTX ISA, tanh.approx).

    That is half a unit in the last place of fp16, and a sixteenth of bf16's.
    """
    if INTERPRET or target_info.is_hip():
        return 2.0 * tl.sigmoid(2.0 * y) - 1.0
    else:
        return tl.inline_asm_elementwise(
            "tanh.approx.f32 $0, $1;", "=f,f", [y], dtype=tl.float32, is_pure=True, pack=1
        )


@triton.jit
def _gelu_gate(x, APPROXIMATE: tl.constexpr):
    """(1 + tanh(y)) / 2, which is sigmoid(2y), with y = sqrt(2/pi) (x + 0.044715 x^3)."""
    y = x * (0.7978845608028654 + 0.035677408136300125 * (x * x))
    if APPROXIMATE:
        return 0.5 + 0.5 * _approximate_tanh(y)
    else:  # near -1 the sum above would cancel
        return tl.sigmoid(2.0 * y)


@triton.jit
def gelu(x, APPROXIMATE: tl.constexpr):
    """GELU in its tanh form; ``APPROXIMATE`` where the result is rounded to 16 bits."""
    return x * _gelu_gate(x, APPROXIMATE)


@triton.jit
def gelu_and_slope(x, APPROXIMATE: tl.constexpr):
    """(gelu(x), d gelu / dx); ``APPROXIMATE`` where both are rounded to bf16.

    fp16 would keep the slope's error: 1 - tanh^2 loses digits that tanh's error does not.
    """
    gate = _gelu_gate(x, APPROXIMATE)
    y = x * gate
    square = x * x
    of_gate = (y - y * gate) * (1.5957691216057308 + 0.2140644488178007 * square)
    if APPROXIMATE:  # from 4 on it is below 4e-4, and tanh's error times x^3 would not be
        of_gate = tl.where(square < 16.0, of_gate, 0.0)
    return y, gate + of_gate


@triton.jit
def silu_and_slope(x):
    """(silu(x), d silu / dx) with silu(x) = x sigmoid(x)."""
    gate = tl.sigmoid(x)
    return x * gate, gate * (1.0 + x * (1.0 - gate))


@triton.jit
def statistics(parts, D: tl.constexpr):
    """(mean, 1 / standard deviation) of the rows of D columns that come in ``parts``, a tuple."""
    total = tl.sum(parts[0], axis=1)
    for i in tl.static_range(1, len(parts)):
        total += tl.sum(parts[i], axis=1)
    mean = total / D
    squares = tl.zeros_like(mean)
    for i in tl.static_range(len(parts)):
        centred = parts[i] - mean[:, None]
        squares += tl.sum(centred * centred, axis=1)
    return mean, 1.0 / tl.sqrt(squares / D + LAYER_NORM_EPS)


@triton.jit
def normalise_backward(d_xhat, xhat, rstd, D: tl.constexpr):
    """Gradient of ``x``, given that of ``xhat`` [rows, D]; all fp32."""
    mean = tl.sum(d_xhat, axis=1) / D
    slope = tl.sum(d_xhat * xhat, axis=1) / D
    return (d_xhat - mean[:, None] - xhat * slope[:, None]) * rstd[:, None]


@triton.jit
def inverse_rms(parts, D: tl.constexpr, eps):
    """1 / sqrt(mean square + eps) of the rows of D columns that come in ``parts``, a tuple."""
    squares = tl.sum(parts[0] * parts[0], axis=1)
    for i in tl.static_range(1, len(parts)):
        squares += tl.sum(parts[i] * parts[i], axis=1)
    return 1.0 / tl.sqrt(squares / D + eps)


@triton.jit
def rms_norm_backward(d_xhat, xhat, rstd, D: tl.constexpr):
    """Gradient of ``x``, given that of ``xhat`` = x rstd [rows, D] after an RMSNorm; all fp32."""
    slope = tl.sum(d_xhat * xhat, axis=1) / D
    return (d_xhat - xhat * slope[:, None]) * rstd[:, None]
