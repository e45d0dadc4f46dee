"""Models written against the structure that drop-in acceleration knows, for its tests.

They share only attribute names with the official code, nanoGPT and the code of Garg et al. Every
deviation that a lookalike may have is a setting.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn


@dataclass
class Settings:
    D: int = 32
    n_head: int = 4
    n_layer: int = 1
    positions: int = 23
    bias: bool = True
    eps: float = 1e-5
    gelu: str = "tanh"
    causal: bool = True
    scale: float | None = None  # of attention scores; 1/sqrt(head_dim) if None
    p: float = 0.0  # dropout
    look_back: int | None = None  # tokens that attention sees; None: all
    drop_path: float = 0.0  # probability that a block's MLP is left out while training
    post_norm: bool = False
    detach: bool = False  # cut the gradient between blocks


class Norm(nn.Module):
    def __init__(self, s):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(s.D))
        self.bias = nn.Parameter(torch.zeros(s.D)) if s.bias else None
        self.eps = s.eps

    def forward(self, x):
        return F.layer_norm(x, x.shape[-1:], self.weight, self.bias, self.eps)


class Attention(nn.Module):
    def __init__(self, s):
        super().__init__()
        self.settings, self.n_head = s, s.n_head
        self.c_attn = nn.Linear(s.D, 3 * s.D, bias=s.bias)
        self.c_proj = nn.Linear(s.D, s.D, bias=s.bias)
        self.attn_dropout = nn.Dropout(s.p)

    def forward(self, x):
        B, S, D = x.shape
        q, k, v = (
            t.view(B, S, self.n_head, -1).transpose(1, 2) for t in self.c_attn(x).chunk(3, dim=-1)
        )
        scores = q @ k.mT * (self.settings.scale or 1 / math.sqrt(D // self.n_head))
        if self.settings.causal:
            hidden = torch.ones(S, S, dtype=torch.bool, device=x.device).triu(1)
            if self.settings.look_back is not None:
                hidden |= hidden.new_ones(S, S).tril(-self.settings.look_back)
            scores = scores.masked_fill(hidden, -torch.inf)
        y = self.attn_dropout(scores.softmax(-1)) @ v
        return self.c_proj(y.transpose(1, 2).reshape(B, S, D))


class MLP(nn.Module):
    def __init__(self, s):
        super().__init__()
        self.gelu = s.gelu
        self.c_fc = nn.Linear(s.D, 4 * s.D, bias=s.bias)
        self.c_proj = nn.Linear(4 * s.D, s.D, bias=s.bias)

    def forward(self, x):
        return self.c_proj(F.gelu(self.c_fc(x), approximate=self.gelu))


class Block(nn.Module):
    def __init__(self, s):
        super().__init__()
        self.settings = s
        self.ln_1, self.attn, self.ln_2, self.mlp = Norm(s), Attention(s), Norm(s), MLP(s)

    def forward(self, x):
        if self.settings.detach:
            x = x.detach()
        if self.settings.post_norm:
            x = self.ln_1(x + self.attn(x))
            return self.ln_2(x + self.mlp(x))
        x = x + self.attn(self.ln_1(x))
        if self.training and torch.rand(()) < self.settings.drop_path:
            return x
        return x + self.mlp(self.ln_2(x))


def stack(s):
    return nn.ModuleDict(
        {
            "wpe": nn.Embedding(s.positions, s.D),
            "drop": nn.Dropout(s.p),
            "h": nn.ModuleList(Block(s) for _ in range(s.n_layer)),
            "ln_f": Norm(s),
        }
    )


class Backbone(nn.Module):
    def __init__(self, s):
        super().__init__()
        self.transformer = stack(s)

    def forward(self, embeddings, add_inputs_embeds=False):
        parts = self.transformer
        x = parts.drop(embeddings + parts.wpe.weight[: embeddings.shape[1]])
        for block in parts.h:
            x = block(x + embeddings if add_inputs_embeds else x)
        return parts.ln_f(x)


class Standard(nn.Module):
    """Like ``TransformerModel``."""

    def __init__(self, settings=None, n_dims=5, pred_type="regression"):
        super().__init__()
        s = settings or Settings()
        self.freq, self.ind, self.n_layer, self._pred_type = 2, 0, s.n_layer, pred_type
        self._read_in = nn.Linear(n_dims, s.D)
        self._backbone = Backbone(s)
        self._read_out = nn.Linear(s.D, 1 if pred_type == "regression" else 2)
        self.calls = 0  # the official model keeps such a mark, and prints

    def _embed(self, xs, ys):
        tokens = xs.new_zeros(xs.shape[0], 2 * xs.shape[1], xs.shape[2])
        tokens[:, ::2], tokens[:, 1::2, 0] = xs, ys
        return self._read_in(tokens)

    def _predict(self, state):
        out = self._read_out(state)[:, self.ind :: self.freq]
        return out.squeeze(-1) if self._pred_type == "regression" else out

    def forward(self, xs, ys, add_inputs_embeds=False):
        self.calls += 1
        print("a call")
        return self._predict(self._backbone(self._embed(xs, ys), add_inputs_embeds))


class Tied(Standard):
    """Like ``TransformerModelTying``."""

    def __init__(self, settings=None, steps=3, **kwargs):
        super().__init__(settings, **kwargs)
        self.n_layer = steps

    def f(self, state):
        return self._backbone(state)

    def forward(self, xs, ys, add_inputs_embeds):
        state = self._embed(xs, ys)
        for _ in range(self.n_layer):
            state = self.f(state)
        return self._predict(state)


class Looped(Standard):
    """Like ``TransformerModelLooped``."""

    def __init__(self, settings=None, loop_func="z=f(x+z)", **kwargs):
        super().__init__(settings, **kwargs)
        self.loop_func = loop_func

    def forward(self, xs, ys, n_loop_start, n_loops):
        self.calls += 1
        e = self._embed(xs, ys)
        add = self.loop_func == "z=f(x+z)"
        z = torch.zeros_like(e) if add else torch.ones_like(e)
        predictions = []
        for i in range(n_loops):
            with torch.set_grad_enabled(i >= n_loop_start and torch.is_grad_enabled()):
                z = self._backbone(z + e if add else z * e)
            if i >= n_loop_start:
                predictions.append(self._predict(z))
        return predictions


class GPT(nn.Module):
    """Like nanoGPT's ``GPT``, with tied token embedding and output."""

    def __init__(self, settings=None, vocabulary=17):
        super().__init__()
        s = settings or Settings(n_layer=2)
        self.transformer = stack(s)
        self.transformer["wte"] = nn.Embedding(vocabulary, s.D)
        self.lm_head = nn.Linear(s.D, vocabulary, bias=False)
        self.lm_head.weight = self.transformer.wte.weight

    def forward(self, idx, targets=None):
        parts = self.transformer
        x = parts.drop(parts.wte(idx) + parts.wpe.weight[: idx.shape[1]])
        for block in parts.h:
            x = block(x)
        logits = self.lm_head(parts.ln_f(x))
        if targets is None:
            return logits[:, -1:], None
        return logits, F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-1)


def gpt2_config(D=32, n_layer=2, positions=22, dropout=0.0, **settings):
    """Configuration of Hugging Face's GPT-2."""
    from transformers import GPT2Config

    settings = {"n_head": 4, "vocab_size": 17, "bos_token_id": 15, "eos_token_id": 16} | settings
    settings |= dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), dropout)
    return GPT2Config(n_positions=positions, n_embd=D, n_layer=n_layer, **settings)


def gpt2(**settings):
    """Hugging Face's ``GPT2Model``, which keeps keys and values by default."""
    from transformers import GPT2Model

    return GPT2Model(gpt2_config(**{"use_cache": False, **settings}))


class Garg(nn.Module):
    """Like the ``TransformerModel`` of Garg et al., on Hugging Face's ``GPT2Model``."""

    def __init__(self, n_dims=5, D=32, **settings):
        super().__init__()
        self._read_in = nn.Linear(n_dims, D)
        self._backbone = gpt2(D=D, **settings)
        self._read_out = nn.Linear(D, 1)

    def forward(self, xs, ys, inds=None):
        n = ys.shape[1]
        inds = torch.arange(n) if inds is None else torch.as_tensor(inds)
        if inds.max() >= n or inds.min() < 0:
            raise ValueError("inds contain indices where xs and ys are not defined")
        tokens = torch.stack((xs, F.pad(ys[..., None], (0, xs.shape[2] - 1))), dim=2).flatten(1, 2)
        states = self._backbone(inputs_embeds=self._read_in(tokens)).last_hidden_state
        return self._read_out(states)[:, ::2, 0][:, inds]


class Lora(nn.Module):
    """A low-rank term beside a Linear, with ``weight`` and ``bias`` of its base."""

    def __init__(self, base):
        super().__init__()
        self.base = base
        self.down = nn.Parameter(torch.randn(2, base.in_features) / 4)
        self.up = nn.Parameter(torch.randn(base.out_features, 2) / 4)

    weight = property(lambda self: self.base.weight)
    bias = property(lambda self: self.base.bias)

    def forward(self, x):
        return self.base(x) + x @ self.down.T @ self.up.T
