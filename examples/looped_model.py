"""A looped transformer as anybody may have written it; it knows nothing of looped_fast.

Its parts have the names that nanoGPT and the official looped transformer give them.
"""

from collections import OrderedDict

import torch
from torch import nn
from torch.nn import functional as F


class Attention(nn.Module):
    """Causal attention."""

    def __init__(self, n_embd, n_head):
        super().__init__()
        self.n_head = n_head
        self.c_attn, self.c_proj = nn.Linear(n_embd, 3 * n_embd), nn.Linear(n_embd, n_embd)

    def forward(self, z):
        """States [B, S, D] to their sums over earlier tokens [B, S, D]."""
        q, k, v = self.c_attn(z).unflatten(-1, (3, self.n_head, -1)).permute(2, 0, 3, 1, 4)
        heads = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.c_proj(heads.transpose(1, 2).flatten(2))


class Block(nn.Module):
    """Attention and a 2-layer network, each after a LayerNorm and beside a residual."""

    def __init__(self, n_embd, n_head):
        super().__init__()
        self.ln_1, self.attn = nn.LayerNorm(n_embd), Attention(n_embd, n_head)
        self.ln_2, self.mlp = nn.LayerNorm(n_embd), nn.Sequential(OrderedDict(
            c_fc=nn.Linear(n_embd, 4 * n_embd), gelu=nn.GELU("tanh"),
            c_proj=nn.Linear(4 * n_embd, n_embd),
        ))  # fmt: skip

    def forward(self, z):
        """States [B, S, D] to states."""
        z = z + self.attn(self.ln_1(z))
        return z + self.mlp(self.ln_2(z))


class Backbone(nn.Module):
    """Positions, one block, and a LayerNorm."""

    def __init__(self, n_tokens, n_embd, n_head):
        super().__init__()
        self.transformer = nn.ModuleDict({
            "wpe": nn.Embedding(n_tokens, n_embd), "h": nn.ModuleList([Block(n_embd, n_head)]),
            "ln_f": nn.LayerNorm(n_embd),
        })  # fmt: skip

    def forward(self, z):
        """States [B, S, D] to states."""
        parts = self.transformer
        return parts.ln_f(parts.h[0](z + parts.wpe.weight[: z.shape[1]]))


class LoopedModel(nn.Module):
    """z <- f(z + e), where e is the embedded prompt."""

    loop_func, _pred_type, freq, ind = "z=f(x+z)", "regression", 2, 0

    def __init__(self, n_dims, n_positions, n_embd, n_head):
        super().__init__()
        self._read_in, self._read_out = nn.Linear(n_dims, n_embd), nn.Linear(n_embd, 1)
        self._backbone = Backbone(2 * n_positions, n_embd, n_head)

    def forward(self, xs, ys, n_loop_start, n_loops):
        """Predictions [B, n] of every step after the first n_loop_start, which have no gradient."""
        y_tokens = F.pad(ys[..., None], (0, xs.shape[2] - 1))
        e = self._read_in(torch.stack((xs, y_tokens), 2).flatten(1, 2))
        z, predictions = torch.zeros_like(e), []
        for i in range(n_loops):
            with torch.set_grad_enabled(i >= n_loop_start and torch.is_grad_enabled()):
                z = self._backbone(z + e)
            if i >= n_loop_start:
                predictions.append(self._read_out(z)[:, ::2, 0])
        return predictions
