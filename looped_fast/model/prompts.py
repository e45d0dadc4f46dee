"""Checks of what a model is asked to predict."""

from __future__ import annotations

import torch
from torch import Tensor

from looped_fast.config import ModelConfig
from looped_fast.ops.prompt import check_finite


def check_tensors(**values: object) -> None:
    """Raise TypeError for an argument that is no tensor."""
    for name, value in values.items():
        if not isinstance(value, Tensor):
            raise TypeError(f"{name} is a {type(value).__name__}; a torch.Tensor is needed")


def check_prompt(config: ModelConfig, xs: Tensor, ys: Tensor, weight: Tensor | None) -> None:
    """Check a prompt, and that it is like ``weight`` unless modules check that by themselves.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit, too many points, or NaN or Inf.
    """
    if xs.dim() != 3 or xs.shape[-1] != config.n_dims:
        raise ValueError(
            f"xs has shape {tuple(xs.shape)}; [B, n, {config.n_dims}] is needed (n_dims)"
        )
    if ys.shape != xs.shape[:2]:
        raise ValueError(
            f"ys has shape {tuple(ys.shape)}; {tuple(xs.shape[:2])} is needed to match xs"
        )
    if xs.shape[1] > config.n_positions:
        raise ValueError(
            f"{xs.shape[1]} points exceed n_positions = {config.n_positions}; "
            f"shorten the prompt, or build the model with a larger n_positions"
        )
    if weight is not None:
        _check_fit(weight, xs=xs, ys=ys)
    check_finite(xs=xs, ys=ys)


def check_queries(config: ModelConfig, queries: Tensor, xs: Tensor, weight: Tensor | None) -> None:
    """Check queries for the examples ``xs``, which are checked; ``weight`` as in ``check_prompt``.

    Raises:
        ValueError: as in ``check_prompt``.
    """
    B, n, d = xs.shape
    if queries.dim() != 3 or len(queries) != B or queries.shape[-1] != d:
        raise ValueError(
            f"queries have shape {tuple(queries.shape)}; [{B}, m, {d}] is needed for examples of "
            f"shape {tuple(xs.shape)}"
        )
    if n + 1 > config.n_positions:
        raise ValueError(
            f"a query after {n} examples is point {n + 1}, beyond n_positions = "
            f"{config.n_positions}; give fewer examples, or build the model with a larger "
            f"n_positions"
        )
    if weight is not None:
        _check_fit(weight, queries=queries)
    check_finite(queries=queries)


def check_seen(seen: Tensor | None, queries: Tensor, n_examples: int) -> Tensor:
    """Return how many examples each of the m queries sees: [m], all of them by default.

    Raises:
        ValueError: no int64 tensor of that shape, or (on a CPU) values outside 0..n_examples.
    """
    m = queries.shape[1]
    if seen is None:
        return torch.full((m,), n_examples, dtype=torch.int64, device=queries.device)
    if not isinstance(seen, Tensor) or seen.dtype != torch.int64 or seen.shape != (m,):
        raise ValueError(
            f"seen = {seen!r}; a tensor [{m}] int64 is needed, the number of examples that each "
            f"query sees"
        )
    if m and seen.device.type == "cpu" and not (seen.min() >= 0 and seen.max() <= n_examples):
        raise ValueError(
            f"seen holds {int(seen.min())}..{int(seen.max())}; 0..{n_examples} is possible with "
            f"{n_examples} examples"
        )
    return seen.to(queries.device)


def _check_fit(weight: Tensor, **tensors: Tensor) -> None:
    for name, tensor in tensors.items():
        if tensor.dtype != weight.dtype or tensor.device != weight.device:
            raise ValueError(
                f"{name} is {tensor.dtype} on {tensor.device}, the model is {weight.dtype} "
                f"on {weight.device}; convert with {name}.to(device, dtype)"
            )
