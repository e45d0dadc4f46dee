"""The baselines as a library's user would write them: a fit for each prompt and position.

A fit takes the points seen X [i, d], their values y [i] and a query x [d], as float64 arrays, and
returns a prediction. ``tests/evaluation/test_baselines.py`` compares the library's baselines with
these, and ``benchmarks.baselines`` times them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial

import numpy as np
import torch
import xgboost
from sklearn.linear_model import Lasso, Ridge
from sklearn.neighbors import KNeighborsRegressor
from sklearn.tree import DecisionTreeRegressor
from torch import Tensor, nn

Fit = Callable[[np.ndarray, np.ndarray, np.ndarray], float]


def one_by_one(fit: Fit, xs: Tensor, ys: Tensor, positions: Iterable[int] | None = None) -> Tensor:
    """``fit`` at those positions (all by default) of every prompt, 0 elsewhere: [B, n] float64."""
    B, n = ys.shape
    points, values = xs.double().numpy(), ys.double().numpy()
    predictions = torch.zeros(B, n, dtype=torch.float64)
    for b in range(B):
        for i in range(1, n) if positions is None else positions:
            predictions[b, i] = float(fit(points[b, :i], values[b, :i], points[b, i]))
    return predictions


def least_squares(X: np.ndarray, y: np.ndarray, x: np.ndarray) -> float:
    return x @ np.linalg.lstsq(X, y, rcond=None)[0]  # of minimum norm


def averaging(X: np.ndarray, y: np.ndarray, x: np.ndarray) -> float:
    return x @ (y[:, None] * X).mean(0)


def nearest_neighbours(X: np.ndarray, y: np.ndarray, x: np.ndarray, k: int = 3) -> float:
    return KNeighborsRegressor(min(len(y), k)).fit(X, y).predict(x[None])[0]


def ridge(X: np.ndarray, y: np.ndarray, x: np.ndarray, alpha: float = 0.01) -> float:
    return Ridge(alpha=alpha, fit_intercept=False).fit(X, y).predict(x[None])[0]


def lasso(
    X: np.ndarray, y: np.ndarray, x: np.ndarray, alpha: float = 0.01, tol: float = 1e-4
) -> float:
    model = Lasso(alpha=alpha, fit_intercept=False, max_iter=1_000_000, tol=tol)
    return model.fit(X, y).predict(x[None])[0]


def greedy_tree(X: np.ndarray, y: np.ndarray, x: np.ndarray, max_depth: int | None = 2) -> float:
    return DecisionTreeRegressor(max_depth=max_depth, random_state=0).fit(X, y).predict(x[None])[0]


def boosted_trees(X: np.ndarray, y: np.ndarray, x: np.ndarray) -> float:
    model = xgboost.XGBRegressor(
        max_depth=4, learning_rate=0.1, n_estimators=50, tree_method="exact", n_jobs=1
    )
    return model.fit(X, y).predict(x[None]).item()


def on_signs(fit: Fit) -> Fit:
    return lambda X, y, x: fit(np.sign(X), y, np.sign(x))


def train_network(
    network: nn.Sequential, X: Tensor, y: Tensor, batches: Iterable[np.ndarray], lr: float = 5e-3
) -> None:
    """Minimise the mean squared error of each batch of points by ``torch.optim.Adam``."""
    optimizer = torch.optim.Adam(network.parameters(), lr=lr)
    for batch in batches:
        optimizer.zero_grad()
        (network(X[batch])[:, 0] - y[batch]).square().mean().backward()
        optimizer.step()


def two_layer_network(X: np.ndarray, y: np.ndarray, x: np.ndarray) -> float:
    network = nn.Sequential(nn.Linear(X.shape[1], 100), nn.ReLU(), nn.Linear(100, 1))
    batches = (np.random.default_rng(i).permutation(len(y))[:10] for i in range(1000))
    train_network(network, torch.from_numpy(X).float(), torch.from_numpy(y).float(), batches)
    return network(torch.from_numpy(x).float()).item()


LOOPS: dict[str, Fit] = {
    "least squares": least_squares,
    "3-nearest neighbours": nearest_neighbours,
    "averaging": averaging,
    "ridge": ridge,
    "lasso": lasso,
    "greedy tree": greedy_tree,
    "greedy tree, signs": on_signs(partial(greedy_tree, max_depth=4)),
    "XGBoost": boosted_trees,
    "XGBoost, signs": on_signs(boosted_trees),
    "2-layer network": two_layer_network,
}
