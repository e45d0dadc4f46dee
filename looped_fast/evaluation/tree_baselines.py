"""Trees as baselines: scikit-learn's and XGBoost's, fitted in parallel at every position."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from looped_fast.errors import needs_extra

# (points [i, d], values [i], query [1, d]) -> prediction
Fit = Callable[[np.ndarray, np.ndarray, np.ndarray], float]
_FITS_PER_WORKER = 1000  # fewer are done before a process has started


def greedy_tree(
    xs: Tensor, ys: Tensor, queries: Tensor | None = None, max_depth: int | None = None
) -> Tensor:
    """scikit-learn's regression tree on the points seen; [B, n].

    Args:
        xs: [B, n, d].
        ys: [B, n].
        queries: [B, n, d]; xs by default.
        max_depth: of the tree; none: until leaves are pure.

    Raises:
        RuntimeError: scikit-learn is not installed.
    """
    try:
        from sklearn import config_context
        from sklearn.tree import DecisionTreeRegressor
    except ImportError as error:
        raise needs_extra("greedy trees need", "scikit-learn", "eval") from error

    random = np.random.RandomState(0)
    start = random.get_state()

    def fit(points: np.ndarray, values: np.ndarray, query: np.ndarray) -> float:
        # Splits that tie are chosen at random: fixed here, by a state that is set sooner than one
        # is made. Checks take most of the time: left out.
        random.set_state(start)
        tree = DecisionTreeRegressor(max_depth=max_depth, random_state=random)
        with config_context(assume_finite=True, skip_parameter_validation=True):
            tree.fit(points, values, check_input=False)
        return tree.tree_.predict(query).item()

    return fit_everywhere(fit, xs, ys, queries)


def boosted_trees(
    xs: Tensor,
    ys: Tensor,
    queries: Tensor | None = None,
    max_depth: int = 4,
    learning_rate: float = 0.1,
    n_estimators: int = 50,
    tree_method: str = "exact",
) -> Tensor:
    """XGBoost on the points seen, with the settings of the official figure; [B, n].

    Splits are found by XGBoost's exact method, the default at this size until version 2; with
    fewer points than histogram bins both consider the same splits, but it cuts half-way between
    points, and takes less time. Where x has two values, as signs have, both cut alike, and ``hist``
    takes less.

    Args:
        xs: [B, n, d].
        ys: [B, n].
        queries: [B, n, d]; xs by default.
        max_depth: of each tree.
        learning_rate: shrinkage of each tree.
        n_estimators: trees.
        tree_method: of XGBoost: exact or hist.

    Raises:
        RuntimeError: XGBoost or scikit-learn is not installed.
    """
    try:
        import xgboost
    except ImportError as error:
        raise needs_extra("boosted trees need", "xgboost", "eval") from error
    settings = {
        "max_depth": max_depth,
        "learning_rate": learning_rate,
        "tree_method": tree_method,
        "nthread": 1,
        "verbosity": 0,
    }

    def fit(points: np.ndarray, values: np.ndarray, query: np.ndarray) -> float:
        # Half the time of XGBRegressor, which wraps the same calls; xgboost.train takes longer too.
        data = xgboost.DMatrix(points, values, nthread=1)
        booster = xgboost.Booster(settings, [data])
        for i in range(n_estimators):
            booster.update(data, i)
        return booster.inplace_predict(query).item()

    return fit_everywhere(fit, xs, ys, queries)


def fit_everywhere(
    fit: Fit, xs: Tensor, ys: Tensor, queries: Tensor | None, dtype: torch.dtype = torch.float32
) -> Tensor:
    """``fit`` at every position of every prompt, prompts shared among processes."""
    queries = xs if queries is None else queries

    def predict(x: np.ndarray, y: np.ndarray, q: np.ndarray) -> list[float]:
        return [0.0] + [fit(x[:i], y[:i], q[i : i + 1]) for i in range(1, len(y))]

    prompts = zip(*(t.to("cpu", dtype).numpy() for t in (xs, ys, queries)), strict=True)
    return torch.tensor(in_processes(predict, prompts, ys.numel()), dtype=dtype).to(ys)


def in_processes(work: Callable[..., Any], arguments: Iterable[tuple], n_fits: int) -> list:
    """``work(*a)`` for each of ``arguments``, which together are ``n_fits`` fits.

    Raises:
        RuntimeError: joblib is not installed.
    """
    try:
        import joblib  # scikit-learn depends on it
    except ImportError as error:
        raise needs_extra(
            "lasso, trees and the 2-layer network need", "scikit-learn", "eval"
        ) from error
    n_workers = min(joblib.cpu_count(), 1 + n_fits // _FITS_PER_WORKER)
    return joblib.Parallel(n_jobs=n_workers)(joblib.delayed(work)(*a) for a in arguments)
