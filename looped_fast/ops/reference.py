"""The loop in plain PyTorch: the oracle that every other backend is tested against.

It runs on any device in any floating dtype, float64 too, and autograd differentiates it. Source:
arXiv 2311.12424, section 4; the block is GPT-2's (official ``scripts/nano_gpt.py``):

    x0 = inject(z, e) + p
    per block:  x1 = x0 + Wo·attn(LN1(x0)) ;  x2 = x1 + Wproj·gelu(Wfc·LN2(x1))
    z' = LNf(x2)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
import torch.utils.checkpoint
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from looped_fast.config import LAYER_NORM_EPS
from looped_fast.ops import loop_autograd
from looped_fast.ops.call import LoopSettings

AUTOCAST_DTYPES = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}


def is_autocast_enabled(device_type: str) -> bool:
    """True inside ``torch.autocast`` for such a device; a meta device has none."""
    return device_type != "meta" and torch.is_autocast_enabled(device_type)


def autocast(device_type: str, precision: str) -> AbstractContextManager:
    """``torch.autocast`` to ``precision``, or none for ``fp32`` and on meta devices.

    It keeps no cache, as in the official code: a cached cast sums the steps' gradients in low
    precision.
    """
    dtype = AUTOCAST_DTYPES[precision]
    if device_type == "meta" or (dtype is None and not is_autocast_enabled(device_type)):
        return nullcontext()
    return torch.autocast(device_type, dtype=dtype, enabled=dtype is not None, cache_enabled=False)


class Block(NamedTuple):
    """Parameters of one transformer block, in the order that the loop op takes."""

    ln_1_weight: Tensor  # [D]
    ln_1_bias: Tensor  # [D]
    c_attn_weight: Tensor  # [3D, D], rows are q, k, v
    c_attn_bias: Tensor  # [3D]
    attn_c_proj_weight: Tensor  # [D, D]
    attn_c_proj_bias: Tensor  # [D]
    ln_2_weight: Tensor  # [D]
    ln_2_bias: Tensor  # [D]
    c_fc_weight: Tensor  # [4D, D]
    c_fc_bias: Tensor  # [4D]
    mlp_c_proj_weight: Tensor  # [D, 4D]
    mlp_c_proj_bias: Tensor  # [D]


def interleave(xs: Tensor, ys: Tensor) -> Tensor:
    """The prompt x_1, y_1, ..., x_n, y_n; y sits in coordinate 0 of its token, the rest is zero.

    xs: [B, n, d], ys: [B, n] -> [B, 2n, d]. Source: official ``TransformerModel._combine``.
    """
    B, n, d = xs.shape
    ys_wide = F.pad(ys.unsqueeze(-1), (0, d - 1))  # [B, n, d]
    return torch.stack((xs, ys_wide), dim=2).view(B, 2 * n, d)


def read_in(xs: Tensor, ys: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """The embedded prompt e, [B, 2n, D]. xs: [B, n, d], ys: [B, n], weight: [D, d]."""
    return F.linear(interleave(xs, ys), weight, bias)


def derivable() -> AbstractContextManager:
    """Attention written out inside ``torch.func`` transforms and ``forward_ad``.

    PyTorch's fused attention has neither forward nor second derivatives, and no batching rule.
    """
    return nullcontext() if loop_autograd.unsupported() is None else sdpa_kernel(SDPBackend.MATH)


def split_weights(weights: Sequence[Tensor]) -> tuple[list[Block], Tensor, Tensor]:
    """Split ``weights`` of the loop op into blocks and the final LayerNorm's weight and bias."""
    n = len(Block._fields)
    blocks = [Block(*weights[i : i + n]) for i in range(0, len(weights) - 2, n)]
    return blocks, weights[-2], weights[-1]


def attend(qkv: Tensor, n_heads: int, seen: Tensor | None = None) -> Tensor:
    """Causal attention, its heads side by side. qkv: [B, S, 3D] -> [B, S, D].

    ``seen`` is that of ``ops.loop``: the last m tokens are queries that share those before them.
    """
    B, S, width = qkv.shape
    D = width // 3
    q, k, v = qkv.view(B, S, 3, n_heads, D // n_heads).permute(2, 0, 3, 1, 4)  # [B, H, S, D/H]
    if seen is None:
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    else:
        sizes = S - len(seen), len(seen)
        (q, q_own), (k, k_own), (v, v_own) = (t.split(sizes, 2) for t in (q, k, v))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        y = torch.cat((y, attend_to_shared(q_own, k_own, v_own, k, v, seen)), dim=2)
    return y.transpose(1, 2).reshape(B, S, D)


def attend_to_shared(
    q: Tensor, k_own: Tensor, v_own: Tensor, k: Tensor, v: Tensor, seen: Tensor
) -> Tensor:
    """Attention of m queries, each to the first ``seen`` [m] of P shared tokens, and to itself.

    q, k_own, v_own: [B, H, m, D/H]; k, v: [B, H, P, D/H] -> [B, H, m, D/H].
    """
    unseen = torch.arange(k.shape[2], device=k.device) >= seen[:, None]  # [m, P]
    scores = (q @ k.mT).masked_fill(unseen, -torch.inf)
    own = (q * k_own).sum(-1, keepdim=True)
    weights = torch.cat((scores, own), -1).div(q.shape[-1] ** 0.5).softmax(-1)  # [B, H, m, P + 1]
    return weights[..., :-1].to(v.dtype) @ v + weights[..., -1:] * v_own


def attention(x: Tensor, block: Block, n_heads: int, seen: Tensor | None = None) -> Tensor:
    """Causal self-attention with its output projection. x: [B, S, D] -> [B, S, D]."""
    y = attend(F.linear(x, block.c_attn_weight, block.c_attn_bias), n_heads, seen)
    return F.linear(y, block.attn_c_proj_weight, block.attn_c_proj_bias)


def mlp(x: Tensor, block: Block) -> Tensor:
    """Linear, GELU (tanh form), Linear. x: [B, S, D] -> [B, S, D]."""
    hidden = F.gelu(F.linear(x, block.c_fc_weight, block.c_fc_bias), approximate="tanh")
    return F.linear(hidden, block.mlp_c_proj_weight, block.mlp_c_proj_bias)


def transformer_block(x: Tensor, block: Block, n_heads: int, seen: Tensor | None = None) -> Tensor:
    """One pre-norm block on the residual stream. x: [B, S, D] -> [B, S, D]."""
    D = x.shape[-1]
    h = F.layer_norm(x, (D,), block.ln_1_weight, block.ln_1_bias, LAYER_NORM_EPS)
    x = x + attention(h, block, n_heads, seen)
    h = F.layer_norm(x, (D,), block.ln_2_weight, block.ln_2_bias, LAYER_NORM_EPS)
    return x + mlp(h, block)


def initial_state(embeddings: Tensor, injection: str) -> Tensor:
    """z before the first step, [B, S, D]: the neutral element of the injection, or e itself."""
    if injection == "add":
        return torch.zeros_like(embeddings)
    if injection == "mul":
        return torch.ones_like(embeddings)
    return embeddings


def inject(state: Tensor, embeddings: Tensor, injection: str) -> Tensor:
    """The input of a loop step, before positions are added. All [B, S, D]."""
    if injection == "add":
        return state + embeddings
    if injection == "mul":
        return state * embeddings
    return state  # "none" and "every_block"


def step(
    state: Tensor,
    embeddings: Tensor,
    positions: Tensor,
    weights: Sequence[Tensor],
    n_heads: int,
    injection: str,
    seen: Tensor | None = None,
) -> Tensor:
    """One loop step z -> z'. state, embeddings: [B, S, D]; positions: [S, D]."""
    blocks, ln_f_weight, ln_f_bias = split_weights(weights)
    D = state.shape[-1]
    x = inject(state, embeddings, injection) + positions
    for block in blocks:
        if injection == "every_block":
            x = x + embeddings
        x = transformer_block(x, block, n_heads, seen)
    return F.layer_norm(x, (D,), ln_f_weight, ln_f_bias, LAYER_NORM_EPS)


def loop(
    embeddings: Tensor,
    positions: Tensor,
    state: Tensor,
    weights: Sequence[Tensor],
    settings: LoopSettings,
    run_step: Callable[..., Tensor] = step,
    seen: Tensor | None = None,
) -> Tensor:
    """The states after each of the last ``window`` of ``n_loops`` steps: [W, B, S, D].

    Arguments are those of ``looped_fast.ops.loop``. Gradients flow through the last ``window``
    steps only. ``settings.precision`` picks the operands of matrix products, as autocast does; the
    residual stream and all statistics keep the dtype of ``embeddings``. ``run_step`` replaces
    ``step`` (same arguments and result), by a compiled one, say.
    """
    shared = () if seen is None else (seen,)
    arguments = (embeddings, positions, weights, settings.n_heads, settings.injection, *shared)
    return iterate(run_step, state, arguments, settings)


def iterate(
    run_step: Callable[..., Tensor],
    state: Tensor,
    arguments: tuple[Any, ...],
    settings: LoopSettings,
) -> Tensor:
    """Repeat ``state = run_step(state, *arguments)`` as ``settings`` say: the window's states."""
    n_loops, window = settings.n_loops, settings.window
    states = []
    # Inside torch.func transforms, which have no hooks on saved tensors, nothing is recomputed.
    recompute = settings.recompute and loop_autograd.unsupported() is None

    def advance(state: Tensor) -> Tensor:
        if not recompute:
            return run_step(state, *arguments)
        # A step draws no random numbers, and a capture can't read the RNG state.
        return torch.utils.checkpoint.checkpoint(
            run_step, state, *arguments, use_reentrant=False, preserve_rng_state=False
        )

    with autocast(state.device.type, settings.precision), derivable():
        with torch.no_grad():
            for _ in range(n_loops - window):
                state = advance(state)
        if window < n_loops:
            state = state.detach()  # forward-mode derivatives pass through no_grad
        for _ in range(window):
            state = advance(state)
            states.append(state)
    return torch.stack(states)
