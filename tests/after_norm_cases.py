"""Inputs of loops of TRM's block, and the rule of accuracy for them."""

from __future__ import annotations

import math
from typing import Any

import torch
from conftest import FP32_EPS
from torch import Tensor

from looped_fast import ops
from looped_fast.ops.block import TRM


def rotary_tables(S: int, head_dim: int) -> Tensor:
    """Cosines and sines [2, S, head_dim] of angles that differ in the two halves of a head."""
    angles = 6 * torch.rand(S, head_dim, dtype=torch.float64)
    return torch.stack((angles.cos(), angles.sin()))


def loop_inputs(
    B: int = 2,
    S: int = 11,
    D: int = 64,
    n_heads: int = 4,
    n_layer: int = 1,
    hidden: int = 128,
    positions: str = "rotary",
) -> dict[str, Any]:
    """Tensors of ``ops.loop``, float64."""

    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, dtype=torch.float64)

    shapes = (3 * D, D), (D, D), (2 * hidden, D), (D, hidden)
    return {
        "embeddings": randn(B, S, D),
        "positions": {
            "rotary": rotary_tables(S, D // n_heads), "learned": randn(S, D), "none": None,
        }[positions],
        "state": randn(B, S, D),
        "weights": [
            randn(*shape) / math.sqrt(shape[1]) for _ in range(n_layer) for shape in shapes
        ],
    }  # fmt: skip


def settings_of(inputs: dict[str, Any], n_heads: int = 4, **changes: Any) -> dict[str, Any]:
    """Settings of ``ops.loop`` for ``loop_inputs``; some of ``changes`` are the block's."""
    positions, S = inputs["positions"], inputs["embeddings"].shape[1]
    of_block = {name: changes.pop(name) for name in ("mask", "norm_eps") if name in changes}
    kind = "none" if positions is None else "learned" if len(positions) == S else "rotary"
    hidden = inputs["weights"][3].shape[1]
    block = TRM._replace(mlp_hidden=hidden, positions=kind, **of_block)
    return {"n_heads": n_heads, "n_loops": 2, "window": 2, "block": block, **changes}


def run(inputs: dict[str, Any], grad: Tensor, dtype: torch.dtype, **settings: Any):
    """Name -> states and the gradient of each tensor that has one, for ``(states * grad).sum()``.

    None where nothing flows.
    """

    def copied(tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else tensor.detach().to(dtype, copy=True)

    names = "embeddings", "positions", "state"
    given = {name: copied(inputs[name]) for name in names}
    weights = [copied(weight) for weight in inputs["weights"]]
    tensors = {name: t for name, t in given.items() if t is not None}
    if settings["block"].positions == "rotary":
        del tensors["positions"]
    tensors |= {f"weights[{i}]": weight for i, weight in enumerate(weights)}
    for tensor in tensors.values():
        tensor.requires_grad_()
    states = ops.loop(**given, weights=weights, **settings)
    grads = torch.autograd.grad(states, list(tensors.values()), grad.to(dtype), allow_unused=True)
    return {"states": states.detach()} | dict(zip(tensors, grads, strict=True))


def check(inputs: dict[str, Any], precision: str, recompute: bool = False, **changes: Any) -> None:
    """The kernels' error is at most 2x (gradients 3x) plain PyTorch's, plus fp32 rounding."""
    attention = changes.pop("attention", "triton")
    settings = settings_of(inputs, **changes)
    grad = torch.randn(settings["window"], *inputs["embeddings"].shape, dtype=torch.float64)
    truth = run(inputs, grad, torch.float64, backend="reference", **settings)
    plain = run(
        inputs, grad, torch.float32, backend="reference", precision=precision, **settings
    )  # fmt: skip
    ours = run(
        inputs, grad, torch.float32, backend="triton", precision=precision, recompute=recompute,
        attention=attention, **settings,
    )  # fmt: skip
    for name, exact in truth.items():
        if exact is None:
            assert ours[name] is None, name
            continue
        plain_error, error = (
            ((result[name].double() - exact).norm() / exact.norm()).item()
            for result in (plain, ours)
        )
        factor = 2 if name == "states" else 3
        assert error <= factor * plain_error + 4 * FP32_EPS, (
            f"{name}: error {error:.1e}, plain PyTorch {plain_error:.1e}"
        )
