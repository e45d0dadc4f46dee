"""Recorded steps of the public Tiny Recursive Model, and a plain PyTorch one to compare with."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from golden_cases import load_tensors, with_prefix
from torch import Tensor

from looped_fast import TinyRecursiveModel, TRMConfig
from looped_fast.model import Carry

CASES = ("trm_tiny", "trm_no_positions", "trm_learned_positions")  # float64


def load_case(name: str) -> SimpleNamespace:
    """``config`` as recorded, ``params``, ``inputs``, the carry ``z_H``, ``z_L``, and results."""
    config, tensors = load_tensors(name)
    results = with_prefix(tensors, "out/") | {"loss": tensors["loss"].squeeze()}
    results |= {f"grad {k}": v for k, v in with_prefix(tensors, "grad/").items()}
    given = ("inputs", "z_H", "z_L", "weight_logits", "weight_q")
    params = with_prefix(tensors, "param/")
    return SimpleNamespace(
        config=config, params=params, results=results, **{name: tensors[name] for name in given}
    )


def random_case(**config: Any) -> SimpleNamespace:
    """A case of random values, with the results of the plain model in float64."""
    torch.manual_seed(0)
    config = {"vocab_size": 7, "seq_len": 9, "hidden_size": 64, "num_heads": 4} | config
    settings = TRMConfig(**config)
    model = TinyRecursiveModel(settings).double()
    torch.nn.init.normal_(model.q_head.weight)
    shape = 64, settings.n_tokens, settings.hidden_size
    case = SimpleNamespace(
        config=settings.to_dict(),
        params={name: p.detach() for name, p in model.named_parameters()},
        inputs=torch.randint(settings.vocab_size, (64, settings.seq_len)),
        z_H=torch.randn(shape, dtype=torch.float64),
        z_L=torch.randn(shape, dtype=torch.float64),
        weight_logits=torch.randn(64, settings.seq_len, settings.vocab_size, dtype=torch.float64),
        weight_q=torch.randn(64, dtype=torch.float64),
    )
    case.results = plain_results(case, torch.float64)
    return case


def model_of(case: SimpleNamespace, dtype: torch.dtype, backend: str) -> TinyRecursiveModel:
    """Our model with the parameters of the case."""
    known = {field.name for field in dataclasses.fields(TRMConfig)}
    settings = {name: value for name, value in case.config.items() if name in known}
    model = TinyRecursiveModel(TRMConfig(**settings), backend=backend).to(dtype)
    missing = model.load_state_dict(case.params, strict=False)
    assert (missing.missing_keys, missing.unexpected_keys) == (["H_init", "L_init"], [])
    return model


def our_results(
    case: SimpleNamespace, dtype: torch.dtype, backend: str, model: TinyRecursiveModel | None = None
) -> dict[str, Tensor]:
    """One supervision step, forward and backward, by ``TinyRecursiveModel``."""
    model = model or model_of(case, dtype, backend)
    output = model(case.inputs, Carry(case.z_H.to(dtype), case.z_L.to(dtype)))
    results = {"logits": output.logits, "q_halt": output.q_halt, **output.carry._asdict()}
    return _with_gradients(case, results, dict(model.named_parameters()))


def plain_results(case: SimpleNamespace, dtype: torch.dtype) -> dict[str, Tensor]:
    """One supervision step in plain eager PyTorch; shares no code with the package.

    Source: public ``models/recursive_reasoning/trm.py``; autocast around the call is in force.
    """
    c, given = SimpleNamespace(**case.config), case.params.items()
    params = {name: p.detach().to(dtype).requires_grad_() for name, p in given}
    D, H, eps = c.hidden_size, c.num_heads, getattr(c, "rms_norm_eps", 1e-5)
    S = case.inputs.shape[1]

    def linear(x: Tensor, name: str) -> Tensor:
        return F.linear(x, params[f"{name}.weight"])

    def norm(x: Tensor) -> Tensor:
        return x / ((x**2).mean(-1, keepdim=True) + eps).sqrt()

    frequencies = 1 / getattr(c, "rope_theta", 1e4) ** (torch.arange(0, D // H, 2) / (D // H))
    angles = torch.arange(S).float()[:, None] * frequencies  # [S, head_dim / 2]
    cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)

    def rotated(x: Tensor) -> Tensor:
        if c.pos_encodings != "rope":
            return x
        a, b = x.to(dtype).split(D // H // 2, dim=-1)
        return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1).to(x.dtype)

    def network(x: Tensor) -> Tensor:
        for i in range(c.L_layers):
            h = f"L_level.layers.{i}"
            heads = linear(x, f"{h}.self_attn.qkv_proj").split(D, dim=-1)
            q, k, v = (t.unflatten(-1, (H, D // H)).transpose(1, 2) for t in heads)
            mixed = F.scaled_dot_product_attention(rotated(q), rotated(k), v)
            x = norm(x + linear(mixed.transpose(1, 2).flatten(2), f"{h}.self_attn.o_proj"))
            gate, up = linear(x, f"{h}.mlp.gate_up_proj").tensor_split(2, dim=-1)
            x = norm(x + linear(gate * gate.sigmoid() * up, f"{h}.mlp.down_proj"))
        return x

    e = params["embed_tokens.embedding_weight"][case.inputs]
    if c.pos_encodings == "learned":
        e = 0.707106781 * (e + params["embed_pos.embedding_weight"])
    e, z_H, z_L = e * D**0.5, case.z_H.to(dtype), case.z_L.to(dtype)
    for cycle in range(c.H_cycles):
        with torch.set_grad_enabled(cycle == c.H_cycles - 1):
            for _ in range(c.L_cycles):
                z_L = network(z_L + z_H + e)
            z_H = network(z_H + z_L)
    q = linear(z_H[:, 0], "q_head") + params["q_head.bias"]
    logits = linear(z_H, "lm_head")
    results = {"logits": logits, "q_halt": q[:, 0].float(), "z_H": z_H, "z_L": z_L}
    return _with_gradients(case, results, params)


def _with_gradients(
    case: SimpleNamespace, results: dict[str, Tensor], params: dict[str, Tensor]
) -> dict[str, Tensor]:
    loss = (results["logits"] * case.weight_logits).mean()
    loss = loss + (results["q_halt"] * case.weight_q).mean()
    loss.backward()
    gradients = {f"grad {name}": p.grad for name, p in params.items()}
    return {name: t.detach() for name, t in {**results, "loss": loss, **gradients}.items()}


def assert_equal(ours: dict[str, Tensor], truth: dict[str, Tensor], tolerance: float) -> None:
    """The same results, each within ``tolerance`` of its size."""
    assert ours.keys() == truth.keys()
    for key, exact in truth.items():
        error = (ours[key].double() - exact.double()).norm()
        assert error <= tolerance * exact.double().norm(), f"{key} is off by {error:.1e}"
