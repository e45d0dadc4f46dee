"""Recorded runs of the official code (``golden/``), and a plain PyTorch model to compare with."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors import safe_open
from torch import Tensor

FOLDER = Path(__file__).parent / "golden"
SHARED = Path(__file__).parents[2] / "shared" / "golden"  # has the file that is too big to commit

MODEL_CASES = (
    "looped_tiny",
    "looped_tiny_window_covers_all",
    "looped_mul_injection",
    "looped_two_blocks",
    "looped_classification",
    "standard_tiny",
    "standard_tiny_inject_every_layer",
    "tied_tiny",
)  # all float64
GARG_CASES = ("garg_tiny", "garg_wide")  # float64, too: Garg et al. on Hugging Face's GPT-2


@dataclass(frozen=True)
class Case:
    """One forward and backward pass of an official model.

    ``config`` has the official attribute names, and ``n_loop_start, n_loops,
    add_inputs_embeds`` of the call.
    """

    name: str
    config: dict[str, Any]
    params: dict[str, Tensor]
    xs: Tensor  # [B, n, d]
    ys: Tensor  # [B, n]
    preds: Tensor  # [W, B, n], or [W, B, n, 2] logits; [B, n] of Garg et al.
    loss: Tensor  # []
    grads: dict[str, Tensor]

    @property
    def conf(self) -> SimpleNamespace:
        """The configuration that the official ``build_model`` takes."""
        return SimpleNamespace(**self.config)


def load_tensors(name: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """A golden file's configuration and tensors; skips the test without the file."""
    for folder in (FOLDER, SHARED):
        file = folder / f"{name}.safetensors"
        if file.exists():
            with safe_open(file, "pt") as h:
                return json.loads(h.metadata()["case"]), {k: h.get_tensor(k) for k in h.keys()}  # noqa: SIM118
    pytest.skip(f"{name}.safetensors is neither in {FOLDER} nor in {SHARED}")


def load_case(name: str) -> Case:
    config, tensors = load_tensors(name)
    return Case(
        name=name,
        config=config,
        params=with_prefix(tensors, "param/"),
        xs=tensors["xs"],
        ys=tensors["ys"],
        preds=tensors["preds"],
        loss=tensors["loss"].squeeze(),
        grads=with_prefix(tensors, "grad/"),
    )


def with_prefix(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}


def loss_of(preds: Tensor, ys: Tensor, pred_type: str) -> Tensor:
    """Official ``train.py`` and ``train_openml.py``: mean over window, batch and positions."""
    ys = ys.expand(preds.shape[:3])
    if pred_type == "classification":
        return F.cross_entropy(preds.flatten(0, 2), ys.flatten().long())
    return (preds - ys).square().mean()


# The gradients of these are a sum of all predictions' signed errors, times a constant: the relative
# error of that number is a matter of chance. Its error is therefore divided by the sum of the
# errors' sizes, and may be as large as that of plain PyTorch's predictions.
NEARLY_CANCELLING = (
    "_read_out.bias",
    "_backbone.transformer.ln_f.bias",
    "_backbone.ln_f.bias",
)


def assert_as_good_as_plain(
    case: Case, ours: dict[str, Tensor], plain: dict[str, Tensor], truth: dict[str, Tensor]
) -> None:
    """DESIGN.md: at most 2x (gradients 3x) plain PyTorch's error, plus a floor of fp32 rounding.

    Each maps ``preds`` to predictions, ``grad NAME`` to a parameter's gradient, perhaps ``loss``
    to the loss.
    """
    assert ours.keys() == plain.keys() == truth.keys()

    def error(results: dict[str, Tensor], key: str, size: Tensor) -> float:
        assert results[key].shape == truth[key].shape, key
        return ((results[key].double() - truth[key].double()).norm() / size).item()

    for key, exact in truth.items():
        size, least = exact.double().norm(), 0.0
        name = key.removeprefix("grad ")
        if case.config.get("pred_type", "regression") == "regression" and name in NEARLY_CANCELLING:
            size = 2 * (truth["preds"] - case.ys).double().abs().mean()
            if name != "_read_out.bias":
                size = size * case.params["_read_out.weight"].double().norm()
            least = error(plain, "preds", truth["preds"].double().norm())
        plain_error, our_error = max(error(plain, key, size), least), error(ours, key, size)
        factor = 3 if key.startswith("grad") else 2
        assert our_error <= factor * plain_error + 4 * torch.finfo(torch.float32).eps, (
            f"{key}: error {our_error:.1e}, plain PyTorch {plain_error:.1e}"
        )


def plain_predictions(case: Case, params: dict[str, Tensor], xs: Tensor, ys: Tensor) -> Tensor:
    """Plain eager PyTorch with the arithmetic of the official ``models.py``: [W, B, n(, 2)].

    The yardstick of a low-precision error; shares no code with the package.
    """
    c = case.config
    D, H = c["n_embd"], c["n_head"]

    def linear(x: Tensor, name: str) -> Tensor:
        return x @ params[f"{name}.weight"].mT + params[f"{name}.bias"]

    def norm(x: Tensor, name: str) -> Tensor:
        return F.layer_norm(x, (D,), params[f"{name}.weight"], params[f"{name}.bias"], 1e-5)

    def block(x: Tensor, i: int) -> Tensor:
        h = f"_backbone.transformer.h.{i}"
        heads = linear(norm(x, f"{h}.ln_1"), f"{h}.attn.c_attn").split(D, dim=-1)
        q, k, v = (t.unflatten(-1, (H, D // H)).transpose(1, 2) for t in heads)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + linear(mixed.transpose(1, 2).flatten(2), f"{h}.attn.c_proj")
        u = linear(norm(x, f"{h}.ln_2"), f"{h}.mlp.c_fc")
        gelu = 0.5 * u * (1 + torch.tanh(math.sqrt(2 / math.pi) * (u + 0.044715 * u**3)))
        return x + linear(gelu, f"{h}.mlp.c_proj")

    def backbone(inputs: Tensor, n_blocks: int, inject: bool = False) -> Tensor:
        x = inputs + params["_backbone.transformer.wpe.weight"][: inputs.shape[1]]
        for i in range(n_blocks):
            x = block(x + inputs if inject else x, i)
        return norm(x, "_backbone.transformer.ln_f")

    wide = torch.zeros_like(xs)
    wide[..., 0] = ys
    e = linear(torch.stack((xs, wide), dim=2).flatten(1, 2), "_read_in")
    if c["family"] == "gpt2":
        states = [backbone(e, c["n_layer"], c["add_inputs_embeds"])]
    elif c["family"] == "gpt2_tying":
        z = e
        for _ in range(c["n_layer"]):
            z = backbone(z, 1)
        states = [z]
    else:
        multiply = c["loop_func"] == "z=f(x*z)"
        z, states = (torch.ones_like(e) if multiply else torch.zeros_like(e)), []
        for i in range(c["n_loops"]):
            with torch.set_grad_enabled(torch.is_grad_enabled() and i >= c["n_loop_start"]):
                z = backbone(z * e if multiply else z + e, c["n_layer"])
            if i >= c["n_loop_start"]:
                states.append(z)
    preds = linear(torch.stack(states)[:, :, ::2], "_read_out")
    return preds if c["pred_type"] == "classification" else preds.squeeze(-1)
