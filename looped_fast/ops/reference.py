"""The loop in plain PyTorch: the oracle that every other backend is tested against.

It runs on any device in any floating dtype, float64 too, and autograd differentiates it. Source:
arXiv 2311.12424, section 4. The block is GPT-2's (official ``scripts/nano_gpt.py``),

    x0 = inject(z, e) + p
    per block:  x1 = x0 + Wo·attn(LN1(x0)) ;  x2 = x1 + Wproj·gelu(Wfc·LN2(x1))
    z' = LNf(x2)

or what other settings make of it: see ``block.Block``.
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

from looped_fast.ops import loop_autograd
from looped_fast.ops.block import GPT2, Block, block_names, final_names
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


class BlockWeights(NamedTuple):
    """Parameters of one transformer block; the loop op takes them as ``block.block_names`` lists.

    F is the MLP's hidden width; without a gate ``c_fc`` has F outputs. Norms and biases that the
    block has not are None.
    """

    c_attn_weight: Tensor  # [3D, D], rows are q, k, v
    attn_c_proj_weight: Tensor  # [D, D]
    c_fc_weight: Tensor  # [2F, D], rows are gates, then what they scale
    mlp_c_proj_weight: Tensor  # [D, F]
    c_attn_bias: Tensor | None = None  # [3D]
    attn_c_proj_bias: Tensor | None = None  # [D]
    c_fc_bias: Tensor | None = None  # [2F]
    mlp_c_proj_bias: Tensor | None = None  # [D]
    ln_1_weight: Tensor | None = None  # [D], likewise the other norms
    ln_1_bias: Tensor | None = None
    ln_1_after_weight: Tensor | None = None
    ln_1_after_bias: Tensor | None = None
    ln_2_weight: Tensor | None = None
    ln_2_bias: Tensor | None = None
    ln_2_after_weight: Tensor | None = None
    ln_2_after_bias: Tensor | None = None

    @classmethod
    def of(cls, weights: Sequence[Tensor], settings: Block = GPT2) -> BlockWeights:
        """The weights of one block in the order of the loop op."""
        return cls(**dict(zip(block_names(settings), weights, strict=True)))


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


def split_weights(
    weights: Sequence[Tensor], settings: Block = GPT2
) -> tuple[list[BlockWeights], dict[str, Tensor]]:
    """Split ``weights`` of the loop op into blocks and the final norm's, by name."""
    n, last = settings.n_block_weights, final_names(settings)
    end = len(weights) - len(last)
    blocks = [BlockWeights.of(weights[i : i + n], settings) for i in range(0, end, n)]
    return blocks, dict(zip(last, weights[end:], strict=True))


def attend(
    qkv: Tensor,
    n_heads: int,
    seen: Tensor | None = None,
    mask: str = "causal",
    tables: Tensor | None = None,
) -> Tensor:
    """Attention, its heads side by side. qkv: [B, S, 3D] -> [B, S, D].

    ``seen`` is that of ``ops.loop``: the last m tokens are queries that share those before them.
    ``mask`` is that of ``Block``; ``tables`` [2, S, D/H], if any, rotate queries and keys.
    """
    B, S, width = qkv.shape
    D = width // 3
    q, k, v = qkv.view(B, S, 3, n_heads, D // n_heads).permute(2, 0, 3, 1, 4)  # [B, H, S, D/H]
    if tables is not None:
        q, k = rotate(q, tables), rotate(k, tables)
    is_causal = mask == "causal"
    if seen is None:
        y = F.scaled_dot_product_attention(q, k, v, is_causal=is_causal)
    else:
        sizes = S - len(seen), len(seen)
        (q, q_own), (k, k_own), (v, v_own) = (t.split(sizes, 2) for t in (q, k, v))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=is_causal)
        y = torch.cat((y, attend_to_shared(q_own, k_own, v_own, k, v, seen)), dim=2)
    return y.transpose(1, 2).reshape(B, S, D)


def rotate(x: Tensor, tables: Tensor) -> Tensor:
    """Rotary positions: pairs (j, j + D/2H) turned by the token's angles. x: [B, H, S, D/H].

    ``tables`` [2, S, D/H] are cosines and sines. Source: arXiv 2104.09864, in the order of the
    public ``models/layers.py``, ``apply_rotary_pos_emb``.
    """
    cos, sin = tables
    first, second = x.chunk(2, -1)
    return (x * cos + torch.cat((-second, first), -1) * sin).to(x.dtype)


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


def attention(
    x: Tensor,
    block: BlockWeights,
    n_heads: int,
    seen: Tensor | None = None,
    settings: Block = GPT2,
    tables: Tensor | None = None,
) -> Tensor:
    """Self-attention with its output projection. x: [B, S, D] -> [B, S, D]."""
    qkv = F.linear(x, block.c_attn_weight, block.c_attn_bias)
    y = attend(qkv, n_heads, seen, settings.mask, tables)
    return F.linear(y, block.attn_c_proj_weight, block.attn_c_proj_bias)


def mlp(x: Tensor, block: BlockWeights, settings: Block = GPT2) -> Tensor:
    """Linear, GELU (tanh form) or SwiGLU, Linear. x: [B, S, D] -> [B, S, D]."""
    hidden = F.linear(x, block.c_fc_weight, block.c_fc_bias)
    if settings.mlp == "swiglu":
        gate, up = hidden.chunk(2, -1)
        hidden = F.silu(gate) * up
    else:
        hidden = F.gelu(hidden, approximate="tanh")
    return F.linear(hidden, block.mlp_c_proj_weight, block.mlp_c_proj_bias)


def norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, settings: Block) -> Tensor:
    """LayerNorm or RMSNorm over the last dimension, scaled and shifted. x: [..., D]."""
    if settings.norm == "layer_norm":
        return F.layer_norm(x, x.shape[-1:], weight, bias, settings.norm_eps)
    y = x * (x.square().mean(-1, keepdim=True) + settings.norm_eps).rsqrt()
    y = y if weight is None else y * weight
    return y if bias is None else y + bias


def transformer_block(
    x: Tensor,
    block: BlockWeights,
    n_heads: int,
    seen: Tensor | None = None,
    settings: Block = GPT2,
    tables: Tensor | None = None,
) -> Tensor:
    """One block on the residual stream, with its norms in their places. x: [B, S, D] -> same."""
    before, after = settings.norm_place != "after", settings.norm_place != "before"
    h = norm(x, block.ln_1_weight, block.ln_1_bias, settings) if before else x
    x = x + attention(h, block, n_heads, seen, settings, tables)
    x = norm(x, block.ln_1_after_weight, block.ln_1_after_bias, settings) if after else x
    h = norm(x, block.ln_2_weight, block.ln_2_bias, settings) if before else x
    x = x + mlp(h, block, settings)
    return norm(x, block.ln_2_after_weight, block.ln_2_after_bias, settings) if after else x


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
    positions: Tensor | None,
    weights: Sequence[Tensor],
    n_heads: int,
    injection: str,
    settings: Block = GPT2,
    seen: Tensor | None = None,
) -> Tensor:
    """One loop step z -> z'. state, embeddings: [B, S, D]; positions: those of ``loop``."""
    blocks, last = split_weights(weights, settings)
    x, tables = inject(state, embeddings, injection), None
    if settings.positions == "rotary":
        tables = positions
    elif positions is not None:
        x = x + positions
    for block in blocks:
        if injection == "every_block":
            x = x + embeddings
        x = transformer_block(x, block, n_heads, seen, settings, tables)
    if not settings.final_norm:
        return x
    return norm(x, last.get("ln_f_weight"), last.get("ln_f_bias"), settings)


def loop(
    embeddings: Tensor,
    positions: Tensor | None,
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
    n_heads, injection, block = settings.n_heads, settings.injection, settings.block
    arguments = (embeddings, positions, weights, n_heads, injection, block, *shared)
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
