"""What a trained model is compared with: predictors that see the same prompts.

Each takes xs [B, n, d], ys [B, n] and queries [B, n, d] (xs unless given), and returns
predictions [B, n]: the one at position i is for query i, from the i points before it, and is 0
where there are none. Source: official ``jupyter_notebooks/utils.py``, which fits prompt by prompt
and position by position. Trees are in ``tree_baselines.py``.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from functools import partial

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim.adam import adam

from looped_fast.errors import check_name, needs_extra
from looped_fast.evaluation.tree_baselines import (
    boosted_trees,
    fit_everywhere,
    greedy_tree,
    in_processes,
)
from looped_fast.ops import forks
from looped_fast.tasks import Baseline, Task

_NETWORKS = 192  # trained at once: their weights, gradients and moments take 7 MB of cache


def _asked(xs: Tensor, queries: Tensor | None) -> Tensor:
    """The queries, xs unless given. Baselines begin with it, in forked processes too."""
    forks.keep_to_one_thread()
    return xs if queries is None else queries


def zero(xs: Tensor, ys: Tensor, queries: Tensor | None = None) -> Tensor:
    """Predict 0, the mean of every task."""
    return torch.zeros_like(ys)


def least_squares(xs: Tensor, ys: Tensor, queries: Tensor | None = None) -> Tensor:
    """The least-squares solution of minimum norm, in float64 on the CPU.

    gelsd (an SVD) also solves the rank-deficient systems of the first positions and of
    truncated prompts; the GPU's solver does not.
    """
    queries = _asked(xs, queries)
    xs64, ys64, queries64 = xs.cpu().double(), ys.cpu().double(), queries.cpu().double()
    predictions = torch.zeros_like(ys64)
    for i in range(1, xs.shape[1]):
        fit = torch.linalg.lstsq(xs64[:, :i], ys64[:, :i, None], driver="gelsd")  # [B, d, 1]
        predictions[:, i] = (queries64[:, i, None] @ fit.solution)[:, 0, 0]
    return predictions.to(ys)


def ridge(xs: Tensor, ys: Tensor, queries: Tensor | None = None, alpha: float = 0.01) -> Tensor:
    """Ridge regression without intercept: the w of least |y - X w|^2 + alpha |w|^2.

    The best predictor of noisy linear data with w ~ N(0, I) where alpha is the noise's variance.
    X^T X grows by one point a position; float64.

    Raises:
        ValueError: alpha is not positive.
    """
    if not alpha > 0:
        raise ValueError(f"alpha = {alpha}: more than 0 is needed; without it, least_squares")
    queries = _asked(xs, queries)
    xs64, ys64, queries64 = xs.double(), ys.double(), queries.double()
    B, n, d = xs.shape
    gram = alpha * torch.eye(d, dtype=torch.float64, device=xs.device).repeat(B, 1, 1)
    moment = torch.zeros(B, d, 1, dtype=torch.float64, device=xs.device)  # X^T y
    predictions = torch.zeros_like(ys64)
    for i in range(n):
        w = torch.cholesky_solve(moment, torch.linalg.cholesky(gram))
        predictions[:, i] = (queries64[:, i, None] @ w)[:, 0, 0]
        x = xs64[:, i, :, None]  # [B, d, 1]
        gram += x @ x.mT
        moment += x * ys64[:, i, None, None]
    return predictions.to(ys)


def averaging(xs: Tensor, ys: Tensor, queries: Tensor | None = None) -> Tensor:
    """x·w with w the mean of y_j x_j over the points seen."""
    queries = _asked(xs, queries)
    sums = (xs * ys[..., None]).double().cumsum(1)  # [B, n, d]
    seen = torch.arange(1, xs.shape[1], device=xs.device)
    predictions = torch.zeros_like(ys)
    predictions[:, 1:] = ((sums[:, :-1] * queries[:, 1:]).sum(2) / seen).to(ys)
    return predictions


def nearest_neighbours(xs: Tensor, ys: Tensor, queries: Tensor | None = None, k: int = 3) -> Tensor:
    """The mean y of the k nearest earlier points (of all of them, while fewer than k)."""
    queries = _asked(xs, queries)
    n = xs.shape[1]
    later = torch.ones(n, n, dtype=torch.bool, device=xs.device).triu()
    distances = torch.cdist(queries, xs).masked_fill(later, torch.inf)  # [B, n, n]
    nearest = distances.topk(min(k, n), dim=2, largest=False)
    seen = nearest.values.isfinite()  # [B, n, k]
    values = ys[:, None, :].expand_as(distances).gather(2, nearest.indices)
    return (values * seen).sum(2) / seen.sum(2).clamp(min=1)


def lasso(
    xs: Tensor,
    ys: Tensor,
    queries: Tensor | None = None,
    alpha: float = 0.01,
    tolerance: float = 1e-8,
    max_sweeps: int = 10_000_000,
) -> Tensor:
    """Lasso without intercept: the w of least |y - X w|^2 / 2i + alpha |w|_1, in float64.

    Args:
        xs: [B, n, d].
        ys: [B, n].
        queries: [B, n, d]; xs by default.
        alpha: weight of the penalty, scikit-learn's; the official figure has 0.01.
        tolerance: largest duality gap, relative to |y|^2; scikit-learn's 1e-4 is too coarse here.
        max_sweeps: of coordinate descent at one position; hundreds do but for rare prompts that
            need a million.

    Raises:
        ValueError: alpha is not positive.
        RuntimeError: it did not converge, or scikit-learn is not installed.
    """
    if not alpha > 0:
        raise ValueError(f"alpha = {alpha}: more than 0 is needed; without it, least_squares")
    try:
        from sklearn import config_context
        from sklearn.exceptions import ConvergenceWarning
        from sklearn.linear_model import lasso_path
    except ImportError as error:
        raise needs_extra("lasso needs", "scikit-learn", "eval") from error

    def fit(points: np.ndarray, values: np.ndarray, query: np.ndarray) -> float:
        # A third of the time of scikit-learn's Lasso, which wraps this call.
        with (
            warnings.catch_warnings(),
            config_context(assume_finite=True, skip_parameter_validation=True),
        ):
            warnings.simplefilter("error", ConvergenceWarning)
            try:
                _, weights, _ = lasso_path(
                    points, values, alphas=[alpha], tol=tolerance, max_iter=max_sweeps,
                    precompute=points.T @ points, Xy=points.T @ values, check_input=False,
                )  # fmt: skip
            except ConvergenceWarning as warning:
                raise RuntimeError(
                    f"lasso: a fit to {len(values)} points did not converge in {max_sweeps} "
                    "sweeps; raise max_sweeps, tolerance or alpha"
                ) from warning
        return (query @ weights).item()

    return fit_everywhere(fit, xs, ys, queries, torch.float64)


def two_layer_network(
    xs: Tensor,
    ys: Tensor,
    queries: Tensor | None = None,
    hidden: int = 100,
    steps: int = 1000,
    batch_size: int = 10,
    lr: float = 5e-3,
    seed: int = 0,
) -> Tensor:
    """A ReLU network of one hidden layer, trained by Adam on the points seen; float32.

    Settings are those of the official figure. Initial weights are drawn for every prompt and
    position as ``torch.nn.Linear`` draws them; the minibatches of a position, without replacement,
    are those of all prompts, as in the official code. Positions are shared among processes.

    Args:
        xs: [B, n, d].
        ys: [B, n].
        queries: [B, n, d]; xs by default.
        hidden: units.
        steps: of Adam.
        batch_size: of a step, or all points where there are fewer.
        lr: learning rate.
        seed: of weights and minibatches.

    Raises:
        RuntimeError: joblib is not installed.
    """
    queries = _asked(xs, queries)
    B, n, d = xs.shape

    def predict(i: int, *arrays: np.ndarray) -> Tensor:
        points, values, asked = map(torch.tensor, arrays)
        generator = np.random.default_rng([seed, i])
        weights = initial_network(generator, B, d, hidden)
        batches = torch.from_numpy(minibatches(generator, i, steps, batch_size))
        for part in map(slice, range(0, B, _NETWORKS), range(_NETWORKS, B + _NETWORKS, _NETWORKS)):
            fit_networks(points[part], values[part], batches, lr, [w[part] for w in weights])
        inner, output, bias = weights
        activation = (asked[:, i, None] @ inner).relu()
        return torch.baddbmm(bias, output, activation.mT)[:, 0, 0]

    points, asked = (nn.functional.pad(t.float(), (0, 1), value=1) for t in (xs, queries))
    arrays = [t.cpu().numpy() for t in (points, ys.float()[:, None], asked)]
    columns = in_processes(predict, [(i, *arrays) for i in range(1, n)], B * n)
    return torch.stack([torch.zeros(B), *columns], 1).to(ys)


def initial_network(
    generator: np.random.Generator, n_networks: int, d: int, hidden: int
) -> tuple[Tensor, Tensor, Tensor]:
    """As ``torch.nn.Linear`` starts: uniform within 1 / sqrt(inputs), biases too.

    Returns:
        hidden [P, d + 1, h], whose row d is the bias; output [P, 1, h]; bias [P, 1, 1].
    """

    def uniform(*shape: int, inputs: int) -> Tensor:
        return torch.from_numpy(2 * generator.random(shape, np.float32) - 1) / math.sqrt(inputs)

    inner = uniform(n_networks, d + 1, hidden, inputs=d)
    output = uniform(n_networks, 1, hidden, inputs=hidden)
    return inner, output, uniform(n_networks, 1, 1, inputs=hidden)


def minibatches(generator: np.random.Generator, n_points: int, steps: int, size: int) -> np.ndarray:
    """[steps, min(size, n_points)] of points below n_points, different ones in each step."""
    return generator.random((steps, n_points)).argsort(1)[:, :size]


def fit_networks(xs: Tensor, ys: Tensor, batches: Tensor, lr: float, weights: list[Tensor]) -> None:
    """Train one network for each prompt, in place.

    y = output · relu(hidden^T x) + bias, by Adam on the mean squared error of minibatches. What a
    step takes is counted in microseconds: gradients are written out, since autograd doubles it;
    Adam is called without its class; NumPy multiplies small matrices faster than torch.bmm.

    Args:
        xs: [P, n, d + 1]; the hidden layer's bias is the weight of an input that is 1.
        ys: [P, 1, n].
        batches: points of each step's minibatch, [steps, size].
        lr: learning rate.
        weights: those of ``initial_network``.
    """
    inner, output, bias = weights
    gradients, means, squares = ([torch.zeros_like(w) for w in weights] for _ in range(3))
    steps = [torch.zeros(()) for _ in weights]
    hidden = torch.empty(len(xs), batches.shape[1], inner.shape[2])
    for batch in batches.unbind():
        x = xs.index_select(1, batch)
        np.matmul(x.numpy(), inner.numpy(), out=hidden.numpy())
        hidden.relu_()
        error = torch.baddbmm(bias, output, hidden.mT).sub_(ys.index_select(2, batch))
        error *= 2 / len(batch)
        torch.bmm(error, hidden, out=gradients[1])
        torch.sum(error, 2, keepdim=True, out=gradients[2])
        slope = hidden.sign_().mul_(output).mul_(error.mT)  # of the loss, by values before ReLU
        np.matmul(x.mT.numpy(), slope.numpy(), out=gradients[0].numpy())
        adam(
            weights, gradients, means, squares, [], steps, fused=True, amsgrad=False, beta1=0.9,
            beta2=0.999, lr=lr, weight_decay=0, eps=1e-8, maximize=False,
        )  # fmt: skip


def on_features(features: Callable[[Tensor], Tensor], baseline: Baseline) -> Baseline:
    """``baseline`` that sees ``features`` of points and queries, [B, n, d] -> [B, n, f]."""
    return partial(_predict_on, features, baseline)


def _predict_on(
    features: Callable[[Tensor], Tensor],
    baseline: Baseline,
    xs: Tensor,
    ys: Tensor,
    queries: Tensor | None = None,
) -> Tensor:
    return baseline(features(xs), ys, None if queries is None else features(queries))


def on_signs(baseline: Baseline) -> Baseline:
    """``baseline`` that sees the signs of coordinates alone (paper, figure on decision trees)."""
    return on_features(torch.sign, baseline)


# What a training run ends with: quick, and without optional packages.
QUICK_BASELINES: dict[str, Baseline] = {
    "zero": zero,
    "least squares": least_squares,
    "3-nearest neighbours": nearest_neighbours,
}

BASELINES: dict[str, Baseline] = {
    **QUICK_BASELINES,
    "averaging": averaging,
    "ridge": ridge,
    "lasso": lasso,
    "greedy tree": partial(greedy_tree, max_depth=2),
    "greedy tree, signs": on_signs(partial(greedy_tree, max_depth=4)),
    "XGBoost": boosted_trees,
    "XGBoost, signs": on_signs(partial(boosted_trees, tree_method="hist")),
    "2-layer network": two_layer_network,
    "least squares, squares": on_features(torch.square, least_squares),
}


def figure_baselines(task: Task) -> dict[str, Baseline]:
    """Those that the task names, ``known_baselines``, and its own, by name.

    For the paper's tasks these are those of the official figure, with its settings (notebooks
    ``Figures_*``). Noisy regression has no figure there: ridge has the best penalty for the noise.

    Raises:
        ValueError: the task names a baseline that the library does not have.
    """
    chosen = {}
    for name in task.known_baselines:
        check_name("baseline", name, BASELINES)
        chosen[name] = BASELINES[name]
    if "ridge" in chosen and task.noise_variance > 0:
        chosen["ridge"] = partial(ridge, alpha=task.noise_variance)
    return {**chosen, **task.baselines()}


def quick_baselines(task: Task) -> dict[str, Baseline]:
    """Those that take seconds: ``QUICK_BASELINES``, and the task's own."""
    return {**QUICK_BASELINES, **task.baselines()}
