"""What a trained model is compared with: predictors that see the same prompts.

Each takes xs [B, n, d], ys [B, n] and returns predictions [B, n]; the one at position i uses the
i points before it, and is 0 where there are none. Source: official ``jupyter_notebooks/utils.py``.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def zero(xs: Tensor, ys: Tensor) -> Tensor:
    """Predict 0, the mean of every task."""
    return torch.zeros_like(ys)


def least_squares(xs: Tensor, ys: Tensor) -> Tensor:
    """The least-squares solution of minimum norm, in float64 on the CPU.

    gelsd (an SVD) also solves the rank-deficient systems of the first positions and of
    truncated prompts; the GPU's solver does not.
    """
    xs64, ys64 = xs.cpu().double(), ys.cpu().double()
    predictions = torch.zeros_like(ys64)
    for i in range(1, xs.shape[1]):
        fit = torch.linalg.lstsq(xs64[:, :i], ys64[:, :i, None], driver="gelsd")  # [B, d, 1]
        predictions[:, i] = (xs64[:, i, None] @ fit.solution)[:, 0, 0]
    return predictions.to(ys)


def nearest_neighbours(xs: Tensor, ys: Tensor, k: int = 3) -> Tensor:
    """The mean y of the k nearest earlier points (of all of them, while fewer than k)."""
    n = xs.shape[1]
    later = torch.ones(n, n, dtype=torch.bool, device=xs.device).triu()
    distances = torch.cdist(xs, xs).masked_fill(later, torch.inf)  # [B, n, n]
    nearest = distances.topk(min(k, n), dim=2, largest=False)
    seen = nearest.values.isfinite()  # [B, n, k]
    values = ys[:, None, :].expand_as(distances).gather(2, nearest.indices)
    return (values * seen).sum(2) / seen.sum(2).clamp(min=1)


BASELINES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "zero": zero,
    "least squares": least_squares,
    "3-nearest neighbours": nearest_neighbours,
}
