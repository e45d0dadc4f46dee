"""A model with the structure of the public Tiny Recursive Model, for tests of ``accelerate``.

It shares attribute names with the public code, no code. Every deviation that a lookalike may have
is a setting.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import nn


@dataclass
class Config:
    batch_size: int = 4
    seq_len: int = 9
    vocab_size: int = 7
    hidden_size: int = 32
    num_heads: int = 4
    L_layers: int = 2
    H_cycles: int = 2
    L_cycles: int = 3
    width: int = 48  # of the MLP
    pos_encodings: str = "rope"
    puzzle_emb_ndim: int = 0
    num_puzzle_identifiers: int = 5
    halt_max_steps: int = 3
    forward_dtype: str = "float32"
    mlp_t: bool = False
    norm_eps: float = 1e-5
    more: int = 0  # updates of z_L
    quirks: dict = field(default_factory=dict)  # deviations; see where they are read


class Cast(nn.Module):
    """A linear layer whose weight takes the dtype of its input."""

    def __init__(self, n_in, n_out, bias=False):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(n_out, n_in) / math.sqrt(n_in))
        self.bias = nn.Parameter(torch.zeros(n_out)) if bias else None

    def forward(self, x):
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return F.linear(x, self.weight.to(x.dtype), bias)


class Embed(nn.Module):
    def __init__(self, n, D, dtype):
        super().__init__()
        self.embedding_weight = nn.Parameter(torch.randn(n, D) / math.sqrt(D))
        self.cast_to = dtype

    def forward(self, ids):
        return F.embedding(ids, self.embedding_weight.to(self.cast_to))


class SparseEmbed(nn.Module):
    """Training reads a copy of the rows of a batch, whose gradient an optimizer spreads."""

    def __init__(self, n, D, batch_size, dtype):
        super().__init__()
        self.cast_to = dtype
        self.register_buffer("weights", torch.randn(n, D))
        rows = torch.zeros(batch_size, D, requires_grad=True)
        self.register_buffer("local_weights", rows, persistent=False)
        self.register_buffer("local_ids", torch.zeros(batch_size, dtype=torch.int32), False)

    def forward(self, ids):
        if not self.training:
            return self.weights[ids].to(self.cast_to)
        with torch.no_grad():
            self.local_weights.copy_(self.weights[ids])
            self.local_ids.copy_(ids)
        return self.local_weights.to(self.cast_to)


class Rotary(nn.Module):
    def __init__(self, head_dim, n_tokens):
        super().__init__()
        angles = torch.arange(n_tokens)[:, None] / 100 ** (torch.arange(0, head_dim, 2) / head_dim)
        angles = torch.cat((angles, angles), -1)
        self.register_buffer("cos_cached", angles.cos(), persistent=False)
        self.register_buffer("sin_cached", angles.sin(), persistent=False)

    def forward(self):
        return self.cos_cached, self.sin_cached


def turn(x, tables):  # [B, S, H, d]
    cos, sin = (table[:, None] for table in tables)
    half = x.shape[-1] // 2
    turned = torch.cat((-x[..., half:], x[..., :half]), -1)
    return (x.to(cos.dtype) * cos + turned.to(cos.dtype) * sin).to(x.dtype)


class Attend(nn.Module):
    def __init__(self, c):
        super().__init__()
        D = c.hidden_size
        self.num_heads, self.quirks = c.num_heads, c.quirks
        self.causal, self.scale = c.quirks.get("causal", False), c.quirks.get("scale")
        self.look = c.quirks.get("look")  # tokens to either side; None: all
        self.qkv_proj = Cast(D, 3 * D, bias=c.quirks.get("bias", False))
        self.o_proj = Cast(D, D)

    def forward(self, cos_sin, hidden_states):
        B, S, D = hidden_states.shape
        parts = self.qkv_proj(hidden_states).view(B, S, 3, self.num_heads, -1).unbind(2)
        q, k, v = parts
        if cos_sin is not None:
            q, k = turn(q, cos_sin), turn(k, cos_sin)
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        mask = None
        if self.look is not None:
            at = torch.arange(S)
            mask = (at[:, None] - at).abs() <= self.look
        y = F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=self.causal, scale=self.scale
        )
        return self.o_proj(y.transpose(1, 2).reshape(B, S, D))


class Gated(nn.Module):
    def __init__(self, D, width, act="silu"):
        super().__init__()
        self.act = act
        self.gate_up_proj = Cast(D, 2 * width)
        self.down_proj = Cast(width, D)

    def forward(self, x):
        gate, up = self.gate_up_proj(x).chunk(2, -1)
        return self.down_proj(getattr(F, self.act)(gate) * up)


def rms(x, eps):
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    return (wide * (wide.square().mean(-1, keepdim=True) + eps).rsqrt()).to(x.dtype)


class Layer(nn.Module):
    def __init__(self, c, i):
        super().__init__()
        self.quirks, self.norm_eps = c.quirks, c.norm_eps * (1 + i * c.quirks.get("eps_grows", 0))
        self.true_eps = c.quirks.get("true_eps", self.norm_eps)
        self.drop = nn.Dropout(c.quirks.get("p", 0.0))
        if c.mlp_t:
            self.mlp_t = Gated(c.seq_len, c.width)
        else:
            self.self_attn = Attend(c)
        self.mlp = Gated(c.hidden_size, c.width, c.quirks.get("act", "silu"))

    def forward(self, cos_sin, hidden_states):
        x = hidden_states
        if self.quirks.get("detach"):
            x = x.detach()
        if self.quirks.get("norm_before"):
            x = x + self.self_attn(cos_sin, rms(x, self.true_eps))
            return x + self.mlp(rms(x, self.true_eps))
        x = rms(x + self.drop(self.self_attn(cos_sin, x)), self.true_eps)
        return rms(x + self.mlp(x), self.true_eps)


class Level(nn.Module):
    def __init__(self, layers, quirks):
        super().__init__()
        self.layers, self.quirks = nn.ModuleList(layers), quirks

    def forward(self, hidden_states, input_injection, **info):
        x = hidden_states + input_injection
        if self.quirks.get("weak"):
            x = hidden_states + 0.9 * input_injection
        for layer in self.layers:
            x = layer(hidden_states=x, **info)
        return x


@dataclass
class InnerCarry:
    z_H: torch.Tensor
    z_L: torch.Tensor


class Inner(nn.Module):
    def __init__(self, c):
        super().__init__()
        D = c.hidden_size
        self.config, self.forward_dtype = c, getattr(torch, c.forward_dtype)
        self.calls = 0
        self.embed_tokens = Embed(c.vocab_size, D, self.forward_dtype)
        self.lm_head, self.q_head = Cast(D, c.vocab_size), Cast(D, 2, bias=True)
        self.puzzle_emb_len = -(c.puzzle_emb_ndim // -D)
        n_tokens = c.seq_len + self.puzzle_emb_len
        if c.puzzle_emb_ndim:
            sizes = c.num_puzzle_identifiers, c.puzzle_emb_ndim, c.batch_size
            self.puzzle_emb = SparseEmbed(*sizes, self.forward_dtype)
        if c.pos_encodings == "rope":
            self.rotary_emb = Rotary(D // c.num_heads, n_tokens)
        elif c.pos_encodings == "learned":
            self.embed_pos = Embed(n_tokens, D, self.forward_dtype)
        self.L_level = Level([Layer(c, i) for i in range(c.L_layers)], c.quirks)
        for name in ("H_init", "L_init"):
            self.register_buffer(name, torch.randn(D, dtype=self.forward_dtype))

    def _input_embeddings(self, inputs, identifiers):
        D = self.config.hidden_size
        x = self.embed_tokens(inputs)
        if self.config.puzzle_emb_ndim:
            puzzle = self.puzzle_emb(identifiers)
            puzzle = F.pad(puzzle, (0, self.puzzle_emb_len * D - puzzle.shape[-1]))
            x = torch.cat((puzzle.view(len(x), -1, D), x), 1)
        if self.config.pos_encodings == "learned":
            x = 0.7 * (x + self.embed_pos.embedding_weight.to(x.dtype))
        return math.sqrt(D) * x

    def empty_carry(self, n):
        shape = n, self.config.seq_len + self.puzzle_emb_len, self.config.hidden_size
        return InnerCarry(*(torch.empty(shape, dtype=self.forward_dtype) for _ in range(2)))

    def reset_carry(self, flags, carry):
        flags = flags[:, None, None]
        return InnerCarry(
            torch.where(flags, self.H_init, carry.z_H), torch.where(flags, self.L_init, carry.z_L)
        )

    def forward(self, carry, batch):
        self.calls += 1
        c, quirks = self.config, self.config.quirks
        info = {"cos_sin": self.rotary_emb() if hasattr(self, "rotary_emb") else None}
        e = self._input_embeddings(batch["inputs"], batch["puzzle_identifiers"])
        z_H, z_L = carry.z_H, carry.z_L
        for cycle in range(c.H_cycles):
            last = cycle == c.H_cycles - 1 or bool(quirks.get("all_gradients"))
            with torch.set_grad_enabled(last and torch.is_grad_enabled()):
                if quirks.get("answer_first"):
                    z_H = self.L_level(z_H, z_L, **info)
                for _ in range(c.L_cycles + c.more):
                    z_L = self.L_level(z_L, z_H + e, **info)
                if not quirks.get("answer_first"):
                    z_H = self.L_level(z_H, z_L + e if quirks.get("e_to_H") else z_L, **info)
        out = z_L if quirks.get("reads_z_L") else z_H
        carry = InnerCarry(z_H, z_L) if quirks.get("attached") else None
        carry = carry or InnerCarry(z_H.detach(), z_L.detach())
        q = self.q_head(z_H[:, -1 if quirks.get("q_last") else 0]).float()
        return carry, self.lm_head(out)[:, self.puzzle_emb_len :], (q[..., 0], q[..., 1])


@dataclass
class OuterCarry:
    inner_carry: InnerCarry
    steps: torch.Tensor
    halted: torch.Tensor
    current_data: dict


class Outer(nn.Module):
    """Puzzles that halt are replaced by new ones."""

    def __init__(self, c):
        super().__init__()
        self.config, self.inner = c, Inner(c)

    def initial_carry(self, batch):
        n = len(batch["inputs"])
        data = {name: torch.empty_like(t) for name, t in batch.items()}
        steps = torch.zeros(n, dtype=torch.int32)
        return OuterCarry(self.inner.empty_carry(n), steps, torch.ones(n) > 0, data)

    def forward(self, carry, batch):
        states = self.inner.reset_carry(carry.halted, carry.inner_carry)
        steps = torch.where(carry.halted, 0, carry.steps) + 1
        data = {
            name: torch.where(carry.halted.view(-1, *[1] * (t.dim() - 1)), batch[name], t)
            for name, t in carry.current_data.items()
        }
        states, logits, (halt, go_on) = self.inner(states, data)
        halted = steps >= self.config.halt_max_steps
        if self.training:
            halted = halted | (halt > 0)
        outputs = {"logits": logits, "q_halt_logits": halt, "q_continue_logits": go_on}
        return OuterCarry(states, steps, halted, data), outputs


class Loss(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, **arguments):
        carry, outputs = self.model(**arguments)
        return carry, outputs["logits"].square().mean()
