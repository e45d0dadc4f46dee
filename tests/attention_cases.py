"""Attention by formula and by plain PyTorch, and the rule of accuracy for providers."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from conftest import FP32_EPS
from torch import Tensor

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
GUARD = 7.0  # value around the tensors that a provider fills


def inputs(B: int, S: int, n_heads: int, head_dim: int, precision: str) -> tuple[Tensor, Tensor]:
    """(qkv [B, S, 3D], d_out [B, S, D])."""
    D, dtype = n_heads * head_dim, DTYPES[precision]
    return torch.randn(B, S, 3 * D).to(dtype), torch.randn(B, S, D).to(dtype)


def by_formula(qkv: Tensor, n_heads: int, causal: bool = True) -> tuple[Tensor, Tensor]:
    """Return (out, lse) from the definition of attention."""
    B, S, _ = qkv.shape
    q, k, v = qkv.view(B, S, 3, n_heads, -1).permute(2, 0, 3, 1, 4)
    scores = q @ k.transpose(2, 3) / math.sqrt(q.shape[-1])
    if causal:
        past = torch.ones(S, S, dtype=torch.bool, device=qkv.device).tril()
        scores = scores.masked_fill(~past, -math.inf)
    out = scores.softmax(-1) @ v
    return out.transpose(1, 2).reshape(B, S, -1), scores.logsumexp(-1)


def by_pytorch(qkv: Tensor, n_heads: int, causal: bool = True) -> tuple[Tensor, None]:
    """Return (out, None) from PyTorch's op, which does not return the log-sum-exp."""
    B, S, _ = qkv.shape
    q, k, v = qkv.view(B, S, 3, n_heads, -1).permute(2, 0, 3, 1, 4)
    out = F.scaled_dot_product_attention(q, k, v, is_causal=causal)
    return out.transpose(1, 2).reshape(B, S, -1), None


def differentiated(
    attend: Callable, qkv: Tensor, d_out: Tensor, n_heads: int, causal: bool = True
) -> dict[str, Tensor]:
    """Return out, dq, dk and dv of a differentiable ``attend``."""
    qkv = qkv.detach().requires_grad_()
    out, _ = attend(qkv, n_heads, causal)
    (d_qkv,) = torch.autograd.grad(out, qkv, d_out)
    dq, dk, dv = d_qkv.chunk(3, dim=-1)
    return {"out": out.detach(), "dq": dq, "dk": dk, "dv": dv}


def provided(
    provider, qkv: Tensor, d_out: Tensor, n_heads: int, causal: bool = True
) -> dict[str, Tensor]:
    """Return those and lse of a provider, which fills slots of tensors like SavedActivations'."""
    B, S, D = d_out.shape
    slots = {
        "out": qkv.new_full((3, B, S, D), GUARD),
        "lse": qkv.new_full((3, B, n_heads, S), GUARD, dtype=torch.float32),
        "d_qkv": qkv.new_full((3, B, S, 3 * D), GUARD),
    }
    for slot in slots.values():
        slot[1].fill_(math.nan)
    out, lse, d_qkv = (slot[1] for slot in slots.values())
    provider.forward(qkv, out, lse, n_heads, causal)
    provider.backward(qkv, out, lse, d_out, d_qkv, n_heads, causal)
    for name, slot in slots.items():
        assert (slot[::2] == GUARD).all(), f"{name}: written beside its slot"
    dq, dk, dv = d_qkv.chunk(3, dim=-1)
    return {"out": out, "lse": lse, "dq": dq, "dk": dk, "dv": dv}


def check(provider, qkv: Tensor, d_out: Tensor, n_heads: int, causal: bool = True) -> None:
    """Errors are at most 2x (gradients 3x) plain PyTorch's, plus fp32 rounding."""
    truth = differentiated(by_formula, qkv.double(), d_out.double(), n_heads, causal)
    plain = differentiated(by_pytorch, qkv, d_out, n_heads, causal)
    ours = provided(provider, qkv, d_out, n_heads, causal)
    for name, exact in truth.items():
        # A single token attends only to itself: dq and dk are only rounding errors.
        vanishes = qkv.shape[1] == 1 and name in ("dq", "dk")
        size = truth["dv" if vanishes else name].norm()
        error, plain_error = ((x[name].double() - exact).norm() / size for x in (ours, plain))
        factor = 2 if name == "out" else 3
        assert error <= factor * plain_error + 4 * FP32_EPS, (
            f"{name}: error {error:.1e}, plain PyTorch {plain_error:.1e}"
        )
