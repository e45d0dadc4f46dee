"""Two baselines that no library batches, compiled by Numba: one prompt to a thread.

Imported when used (``baselines.py``), since Numba is an optional package. Loops over hidden units
come last and run over contiguous memory, so that they become vector instructions.
"""

from __future__ import annotations

import math

import numpy as np
from numba import njit, prange

_FLOAT = np.float32
_BETA1, _BETA2, _EPS = 0.9, 0.999, _FLOAT(1e-8)  # torch.optim.Adam's defaults
INPUTS, ROWS = 3, 5  # that one pass over the hidden units takes in


@njit(parallel=True, cache=True)
def lasso_predictions(xs, ys, queries, alpha, tolerance, max_sweeps, predictions, converged):
    """Fill ``predictions`` [P, n] and ``converged`` [P, n]; see ``baselines.lasso``.

    Coordinate descent on X^T X and X^T y, which grow by one point a position; each position
    starts from the weights of the one before. It ends when the subgradient vanishes to
    ``tolerance`` of the penalty. All arrays but ``converged`` are float64.
    """
    P, n, d = xs.shape
    for prompt in prange(P):
        gram = np.zeros((d, d))
        residual = np.zeros(d)  # X^T (y - X w)
        w = np.zeros(d)
        for i in range(n):
            predictions[prompt, i] = np.dot(queries[prompt, i], w)
            x = xs[prompt, i]
            error = ys[prompt, i] - np.dot(x, w)
            for j in range(d):
                residual[j] += error * x[j]
                for k in range(d):
                    gram[j, k] += x[j] * x[k]
            penalty = alpha * (i + 1)
            converged[prompt, i] = False
            for _ in range(max_sweeps):
                violation = 0.0
                for j in range(d):
                    slope = residual[j] - penalty * np.sign(w[j])
                    if w[j] == 0:
                        slope = max(abs(residual[j]) - penalty, 0.0)
                    violation = max(violation, abs(slope))
                if violation <= tolerance * penalty:
                    converged[prompt, i] = True
                    break
                for j in range(d):
                    if gram[j, j] == 0:
                        continue
                    target = residual[j] + gram[j, j] * w[j]
                    shrunk = max(abs(target) - penalty, 0.0) / gram[j, j]
                    new = math.copysign(shrunk, target)
                    change = new - w[j]
                    if change != 0:
                        w[j] = new
                        for k in range(d):
                            residual[k] -= gram[j, k] * change


@njit(parallel=True, fastmath=True, error_model="numpy", cache=True)
def fit_networks(xs, ys, batches, lr, hidden, output, bias):
    """Train one network for each prompt, in place: ``hidden``, ``output`` and ``bias``.

    y = output · relu(hidden^T x) + bias, by Adam on the mean squared error of minibatches.

    Args:
        xs: [P, n, width]; the hidden layer's bias is the weight of an input that is 1. width is a
            multiple of ``INPUTS``.
        ys: [P, n].
        batches: points of each step's minibatch, [steps, size] integers.
        lr: learning rate.
        hidden: [P, width, h].
        output: [P, h].
        bias: [P].
    """
    P, _, width = xs.shape
    h = hidden.shape[2]
    n_steps, size = batches.shape
    for prompt in prange(P):
        # One array of hidden, output and bias, so that Adam is one loop.
        n_hidden = width * h
        weights = np.empty(n_hidden + h + 1, _FLOAT)
        weights[:n_hidden] = hidden[prompt].ravel()
        weights[n_hidden:-1] = output[prompt]
        weights[-1] = bias[prompt]
        gradient = np.zeros_like(weights)
        mean = np.zeros_like(weights)
        square = np.zeros_like(weights)
        inner, outer = weights[:n_hidden].reshape(width, h), weights[n_hidden:]
        inner_gradient = gradient[:n_hidden].reshape(width, h)
        outer_gradient = gradient[n_hidden:]
        rows = -(-size // ROWS) * ROWS  # those beyond size stay zero
        x = np.zeros((rows, width), _FLOAT)
        slopes = np.zeros((rows, h), _FLOAT)  # of the loss, by hidden unit
        activation = np.empty(h, _FLOAT)
        decay1, decay2 = 1.0, 1.0
        for step in range(n_steps):
            for row in range(size):
                point = batches[step, row]
                for k in range(width):
                    x[row, k] = xs[prompt, point, k]
                prediction = _predict(x, row, inner, outer, activation)
                error = _FLOAT(2) * (prediction - ys[prompt, point]) / _FLOAT(size)
                outer_gradient[h] += error
                for j in range(h):
                    outer_gradient[j] += error * activation[j]
                    slopes[row, j] = error * outer[j] if activation[j] > 0 else _FLOAT(0)
            _add_hidden_gradient(x, slopes, inner_gradient)
            decay1 *= _BETA1
            decay2 *= _BETA2
            rate = _FLOAT(lr / (1 - decay1))
            scale = _FLOAT(1 / math.sqrt(1 - decay2))
            _adam(weights, gradient, mean, square, rate, scale)
            gradient[:] = 0
        hidden[prompt] = inner
        output[prompt] = outer[:h]
        bias[prompt] = outer[h]


@njit(fastmath=True, error_model="numpy", cache=True)
def _predict(x, row, inner, outer, activation):
    """The network's value at x[row]; leaves relu(inner^T x) in ``activation`` [h]."""
    h = len(activation)
    activation[:] = 0
    for k in range(0, x.shape[1], INPUTS):
        x0, x1, x2 = x[row, k], x[row, k + 1], x[row, k + 2]
        for j in range(h):
            activation[j] += x0 * inner[k, j] + x1 * inner[k + 1, j] + x2 * inner[k + 2, j]
    value = outer[h]
    for j in range(h):
        activation[j] = max(activation[j], _FLOAT(0))
        value += activation[j] * outer[j]
    return value


@njit(fastmath=True, error_model="numpy", cache=True)
def _add_hidden_gradient(x, slopes, gradient):
    """gradient += x^T slopes."""
    rows, width = x.shape
    for k in range(width):
        for r in range(0, rows, ROWS):
            x0, x1, x2, x3, x4 = x[r, k], x[r + 1, k], x[r + 2, k], x[r + 3, k], x[r + 4, k]
            for j in range(slopes.shape[1]):
                gradient[k, j] += (
                    x0 * slopes[r, j] + x1 * slopes[r + 1, j] + x2 * slopes[r + 2, j]
                    + x3 * slopes[r + 3, j] + x4 * slopes[r + 4, j]
                )  # fmt: skip


@njit(fastmath=True, error_model="numpy", cache=True)
def _adam(weights, gradient, mean, square, rate, scale):
    """One step of torch.optim.Adam; ``rate`` and ``scale`` hold its bias corrections."""
    for i in range(len(weights)):
        g = gradient[i]
        mean[i] = _FLOAT(_BETA1) * mean[i] + _FLOAT(1 - _BETA1) * g
        square[i] = _FLOAT(_BETA2) * square[i] + _FLOAT(1 - _BETA2) * g * g
        weights[i] -= rate * mean[i] / (np.sqrt(square[i]) * scale + _EPS)
