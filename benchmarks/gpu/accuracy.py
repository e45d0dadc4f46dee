"""Errors of the kernels against float64, by the rule of the project."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks.cases import Case
from benchmarks.correctness import FLOOR
from benchmarks.kernel_launches import weights_of
from looped_fast import ops
from looped_fast.ops.block import GPT2, TRM, Block


class Error(NamedTuple):
    """The worst error of a run."""

    share: float  # of the limit
    tensor: str  # name


def trm_block(case: Case) -> Block:
    """TRM's block at the case's width, with a hidden width of 3 D."""
    return TRM._replace(mlp_hidden=3 * case.n_embd)


def loop_arguments(case: Case, device: torch.device, block: Block = GPT2) -> dict[str, Any]:
    """Arguments of ``ops.loop``; always the same.

    Those of GPT-2's block have a read-out and, for ``ops.loop_mse``, ``targets``.
    """
    generator = torch.Generator().manual_seed(0)
    B, S, D = case.batch, 2 * case.n_points, case.n_embd

    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(device)

    settings = {"n_heads": case.n_head, "n_loops": case.n_loops, "window": case.window}
    weights = [
        randn(*w.shape) * (0.5 / D**0.5 if w.dim() == 2 else 0.1) for w in weights_of(1, D, block)
    ]
    if block.positions == "rotary":
        angles = randn(S, D // case.n_head)
        return {
            "embeddings": randn(B, S, D), "positions": torch.stack((angles.cos(), angles.sin())),
            "state": None, "weights": weights, "block": block, **settings,
        }  # fmt: skip
    for i in (0, 6, 12):  # scales of the LayerNorms
        weights[i] += 1
    return {
        "embeddings": randn(B, S, D), "positions": randn(S, D),
        "state": None, "weights": weights,
        "read_out": [randn(1, D) / D**0.5, randn(1)], "targets": randn(B, case.n_points, 1),
        **settings,
    }  # fmt: skip


def copied(arguments: dict[str, Any], dtype: torch.dtype, requires_grad: bool) -> dict[str, Any]:
    """Copy ``arguments``, with tensors in ``dtype`` as leaves."""

    def copy(value: Any) -> Any:
        if isinstance(value, Tensor):
            return value.detach().to(dtype, copy=True).requires_grad_(requires_grad)
        return [copy(item) for item in value] if isinstance(value, list) else value

    made = {name: copy(value) for name, value in arguments.items()}
    constant = "targets" if "targets" in made else "positions"  # rotary tables
    made[constant] = made[constant].detach()
    return made


def leaves(arguments: dict[str, Any]) -> list[Tensor]:
    """The tensors that need a gradient."""
    values = [v if isinstance(v, list) else [v] for v in arguments.values()]
    return [t for value in values for t in value if isinstance(t, Tensor) and t.requires_grad]


def results(
    case: Case,
    device: torch.device,
    dtype: torch.dtype,
    backend: str,
    precision: str,
    block: Block,
) -> dict[str, Tensor]:
    """Predictions, states, and the gradients of ``loop_mse`` and of a weighted sum of states.

    Of TRM's block, which has no read-out in the kernels, only what states have.
    """
    options = {"backend": backend, "precision": precision}
    found = {}
    for name in ("loss", "states") if block.final_norm else ("states",):
        arguments = copied(loop_arguments(case, device, block), dtype, requires_grad=True)
        tensors = leaves(arguments)
        targets = arguments.pop("targets", None)
        if name == "loss":
            ops.loop_mse(**arguments, targets=targets, **options).backward()
            with torch.no_grad():
                found["predictions"] = ops.loop(**arguments, **options)
        else:
            arguments.pop("read_out", None)
            states = ops.loop(**arguments, **options)
            # Not a sum of squares, which the LayerNorm makes the same for all states.
            weights = torch.randn(states.shape, generator=torch.Generator().manual_seed(1))
            (states * weights.to(states)).sum().backward()
            found["states"] = states.detach()
        for i, tensor in enumerate(tensors):
            if tensor.grad is not None:
                found[f"gradient {i} of {name}"] = tensor.grad
    return found


@functools.cache
def _limits(
    case: Case, device: torch.device, precision: str, block: Block
) -> dict[str, tuple[Tensor, float]]:
    """By name: float64's value, and the limit, 2 (gradients: 3) times plain PyTorch's error."""
    truths = results(case, device, torch.float64, "reference", "fp32", block)
    plain = results(case, device, torch.float32, "reference", precision, block)
    return {
        name: (truth, (3 if "gradient" in name else 2) * relative(plain[name], truth) + FLOOR)
        for name, truth in truths.items()
    }


def relative(value: Tensor, truth: Tensor) -> float:
    """Relative error in the Frobenius norm."""
    return ((value.double() - truth).norm() / truth.norm()).item()


def worst_error(
    case: Case, device: torch.device, precision: str = "bf16", block: Block = GPT2
) -> Error:
    """The kernels' worst error, as a share of its limit; nan counts as infinite."""
    limits = _limits(case, device, precision, block)
    ours = results(case, device, torch.float32, "triton", precision, block)
    errors = [
        Error(relative(ours[name], truth) / limit, name) for name, (truth, limit) in limits.items()
    ]
    return max(errors, key=lambda error: error.share if error.share == error.share else torch.inf)
