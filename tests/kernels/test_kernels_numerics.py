"""Interpreted numerics of kernels, where they correct Triton's interpreter, too."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from conftest import FP32_EPS, NO_TRITON, relative_error

if NO_TRITON:
    pytest.skip(NO_TRITON, allow_module_level=True)

import triton
import triton.language as tl
from looped_fast.kernels import numerics

from looped_fast import kernels


@triton.jit
def cast_kernel(x, out, SIZE: tl.constexpr):
    i = tl.arange(0, SIZE)
    tl.store(out + i, numerics.cast(tl.load(x + i), out.dtype.element_ty))


@triton.jit
def dot_kernel(a, b, out, SIZE: tl.constexpr):
    offsets = tl.arange(0, SIZE)[:, None] * SIZE + tl.arange(0, SIZE)[None, :]
    acc = tl.load(out + offsets)
    tl.store(out + offsets, numerics.dot(tl.load(a + offsets), tl.load(b + offsets), acc, False))


@triton.jit
def gelu_kernel(x, y, also_y, slope, SIZE: tl.constexpr, APPROXIMATE: tl.constexpr):
    i = tl.arange(0, SIZE)
    x = tl.load(x + i)
    tl.store(y + i, numerics.gelu(x, APPROXIMATE))
    value, d = numerics.gelu_and_slope(x, APPROXIMATE)
    tl.store(also_y + i, value)
    tl.store(slope + i, d)


@triton.jit
def silu_kernel(x, y, slope, SIZE: tl.constexpr):
    i = tl.arange(0, SIZE)
    value, d = numerics.silu_and_slope(tl.load(x + i))
    tl.store(y + i, value)
    tl.store(slope + i, d)


@triton.jit
def rms_kernel(x, d_xhat, rstd, dx, eps, D: tl.constexpr, PART: tl.constexpr, ROWS: tl.constexpr):
    rows = tl.arange(0, ROWS)
    parts = ()
    for i in tl.static_range(D // PART):
        columns = i * PART + tl.arange(0, PART)
        parts += (tl.load(x + rows[:, None] * D + columns[None, :]),)
    r = numerics.inverse_rms(parts, D, eps)
    tl.store(rstd + rows, r)
    offsets = rows[:, None] * D + tl.arange(0, D)[None, :]
    xhat = tl.load(x + offsets) * r[:, None]
    d = numerics.rms_norm_backward(tl.load(d_xhat + offsets), xhat, r, D)
    tl.store(dx + offsets, d)


@triton.jit
def statistics_kernel(x, mean, rstd, D: tl.constexpr, PART: tl.constexpr, ROWS: tl.constexpr):
    rows = tl.arange(0, ROWS)
    parts = ()
    for i in tl.static_range(D // PART):
        columns = i * PART + tl.arange(0, PART)
        parts += (tl.load(x + rows[:, None] * D + columns[None, :]),)
    m, r = numerics.statistics(parts, D)
    tl.store(mean + rows, m)
    tl.store(rstd + rows, r)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_cast_rounds_as_the_hardware_does(dtype):
    bits = torch.randint(-(2**31), 2**31, (4096,), dtype=torch.int64).to(torch.int32)
    ties = torch.arange(1, 257, dtype=torch.int32) << 15  # half-way between two bf16, and bf16
    special = torch.tensor([0.0, -0.0, torch.inf, -torch.inf, torch.nan, 3.4e38, 1e-40, 65519.0])
    x = torch.cat([bits.view(torch.float32), ties.view(torch.float32), special])
    x = torch.nn.functional.pad(x, (0, 8192 - len(x)))
    out = torch.empty(8192, dtype=dtype)
    cast_kernel[(1,)](x, out, 8192)
    expected = x.to(dtype)
    assert torch.equal(out.isnan(), expected.isnan())
    same_bits = out.view(torch.uint8) == expected.view(torch.uint8)
    assert same_bits.view(8192, -1).all(1)[~expected.isnan()].all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_dot_multiplies_numbers_and_sums_in_fp32(dtype):
    a, b = torch.randn(32, 32).to(dtype), torch.randn(32, 32).to(dtype)
    start = torch.randn(32, 32)
    out = start.clone()
    dot_kernel[(1,)](a, b, out, 32)
    assert relative_error(out, start.double() + a.double() @ b.double()) <= 4 * FP32_EPS


def gelu_in_pytorch(x):
    x = x.requires_grad_()
    y = torch.nn.functional.gelu(x, approximate="tanh")
    return y.detach(), torch.autograd.grad(y.sum(), x)[0]


def test_gelu_and_its_slope_are_as_accurate_as_plain_pytorch():
    x = torch.linspace(-12, 12, 1024)
    y, also_y, slope = (torch.empty(1024) for _ in range(3))
    gelu_kernel[(1,)](x, y, also_y, slope, 1024, False)
    assert torch.equal(y, also_y)
    exact, plain = gelu_in_pytorch(x.double()), gelu_in_pytorch(x.clone())
    for factor, result, p, e in zip((2, 3), (y, slope), plain, exact, strict=True):
        assert relative_error(result, e) <= factor * relative_error(p, e) + FP32_EPS


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scale", [0.3, 1, 3, 10])
def test_an_approximate_tanh_costs_no_more_than_rounding(scale, dtype, monkeypatch):
    """tanh gets the largest error that PTX documents for it, with random sign."""

    @triton.jit
    def with_error(y):
        sign = tl.where(tl.randint(0, tl.arange(0, 8192)) & 1 == 1, 1.0, -1.0)
        return (2.0 * tl.sigmoid(2.0 * y) - 1.0) * (1.0 + sign * 0.00048828125)

    monkeypatch.setitem(numerics.gelu.fn.__globals__, "_approximate_tanh", with_error)
    x = scale * torch.randn(8192)
    y, also_y, slope = (torch.empty(8192) for _ in range(3))
    gelu_kernel[(1,)](x, y, also_y, slope, 8192, True)
    assert torch.equal(y, also_y)
    results = list(zip((2, 3), (y, slope), gelu_in_pytorch(x.double()), strict=True))
    for factor, result, exact in results[: 2 if dtype == torch.bfloat16 else 1]:
        rounding = relative_error(exact.to(dtype), exact)
        error = relative_error(result.to(dtype), exact)
        assert rounding < error <= factor * rounding


@pytest.mark.parametrize("scale", [0.1, 1, 10, 1000])
def test_silu_and_its_slope_are_as_accurate_as_plain_pytorch(scale):
    def in_pytorch(x):
        x = x.requires_grad_()
        y = torch.nn.functional.silu(x)
        return y.detach(), torch.autograd.grad(y.sum(), x)[0]

    x = scale * torch.linspace(-1, 1, 1024)
    y, slope = torch.empty(1024), torch.empty(1024)
    silu_kernel[(1,)](x, y, slope, 1024)
    exact, plain = in_pytorch(x.double()), in_pytorch(x.clone())
    for factor, result, p, e in zip((2, 3), (y, slope), plain, exact, strict=True):
        assert relative_error(result, e) <= factor * relative_error(p, e) + FP32_EPS


@pytest.mark.parametrize("eps", [1e-5, 0.3])
@pytest.mark.parametrize(("D", "part"), [(64, 64), (256, 64)])
def test_an_rms_norm_and_its_backward_are_those_of_the_whole_row(D, part, eps):
    x, d_xhat = torch.randn(16, D) * torch.logspace(-4, 4, 16)[:, None], torch.randn(16, D)
    rstd, dx = torch.empty(16), torch.empty(16, D)
    rms_kernel[(1,)](x, d_xhat, rstd, dx, eps, D, part, 16)
    exact = x.double().requires_grad_()
    exact_rstd = (exact.square().mean(1) + eps).rsqrt()
    (exact_dx,) = torch.autograd.grad(exact * exact_rstd[:, None], exact, d_xhat.double())
    assert relative_error(rstd, exact_rstd.detach()) <= 4 * FP32_EPS
    for row in range(16):  # whose sizes differ
        assert relative_error(dx[row], exact_dx[row]) <= 16 * FP32_EPS


@pytest.mark.parametrize(("D", "part"), [(64, 64), (256, 64)])
def test_statistics_are_those_of_the_whole_row_and_survive_a_large_mean(D, part):
    x = torch.randn(16, D) + torch.arange(16)[:, None] * 100
    mean, rstd = torch.empty(16), torch.empty(16)
    statistics_kernel[(1,)](x, mean, rstd, D, part, 16)
    exact = x.double()
    variance, exact_mean = torch.var_mean(exact, dim=1, correction=0)
    assert relative_error(mean, exact_mean) <= FP32_EPS
    assert relative_error(rstd, (variance + 1e-5).rsqrt()) <= 16 * FP32_EPS


def test_kernels_multiply_and_round_through_numerics_only():
    for path in Path(kernels.__path__[0]).glob("*.py"):
        if path.name != "numerics.py":
            wrong = re.findall(
                r"tl\.dot\(|\.to\(tl\.(?!float32)\w*float\w*|\.to\(.*element_ty", path.read_text()
            )
            assert not wrong, f"{path.name}: {wrong}"
