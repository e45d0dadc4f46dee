"""Two baselines that no library batches, compiled by Numba: one prompt to a thread.

Imported when used (``baselines.py``), since Numba is an optional package. Loops over hidden units
come last and run over contiguous memory, so that they become vector instructions; starting one
costs as much as 50 units, so each does a tile of ROWS points by INPUTS inputs.
"""

from __future__ import annotations

import math

import numpy as np
from numba import njit, prange

_FLOAT = np.float32
_BETA1, _BETA2, _EPS = 0.9, 0.999, _FLOAT(1e-8)  # torch.optim.Adam's defaults
INPUTS, ROWS = 3, 5  # that one pass over the hidden units takes in; unrolled below


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
    P, n, width = xs.shape
    h = hidden.shape[2]
    n_steps, size = batches.shape
    n_rows = -(-size // ROWS) * ROWS
    rows = np.full((n_steps, n_rows), n)  # of a tile that is not full: a point of zeros
    rows[:, :size] = batches
    for prompt in prange(P):
        points = np.zeros((n + 1, width), _FLOAT)
        points[:n] = xs[prompt]
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
        slopes = np.empty((n_rows, h), _FLOAT)  # of the loss, by hidden unit
        hidden_values = np.empty((n_rows, h), _FLOAT)  # before ReLU
        errors = np.empty(n_rows, _FLOAT)  # first the outputs
        decay1, decay2 = 1.0, 1.0
        for step in range(n_steps):
            _hidden_values(points, rows[step], inner, hidden_values)
            _output(hidden_values, outer, errors)
            for i in range(size):
                target = ys[prompt, rows[step, i]]
                errors[i] = _FLOAT(2) * (errors[i] - target) / _FLOAT(size)
            errors[size:] = 0
            _add_output_gradient(hidden_values, outer, errors, outer_gradient, slopes)
            _add_hidden_gradient(points, rows[step], slopes, inner_gradient)
            decay1 *= _BETA1
            decay2 *= _BETA2
            rate = _FLOAT(lr / (1 - decay1))
            scale = _FLOAT(1 / math.sqrt(1 - decay2))
            _adam(weights, gradient, mean, square, rate, scale)
        hidden[prompt] = inner
        output[prompt] = outer[:h]
        bias[prompt] = outer[h]


@njit(fastmath=True, error_model="numpy", cache=True)
def _hidden_values(x, rows, inner, values):
    """values [rows, h] = x[rows] inner, before ReLU."""
    values[:] = 0
    for r in range(0, len(rows), ROWS):
        p, q, s, t, u = rows[r], rows[r + 1], rows[r + 2], rows[r + 3], rows[r + 4]
        for k in range(0, x.shape[1], INPUTS):
            a0, a1, a2 = x[p, k], x[p, k + 1], x[p, k + 2]
            b0, b1, b2 = x[q, k], x[q, k + 1], x[q, k + 2]
            c0, c1, c2 = x[s, k], x[s, k + 1], x[s, k + 2]
            d0, d1, d2 = x[t, k], x[t, k + 1], x[t, k + 2]
            e0, e1, e2 = x[u, k], x[u, k + 1], x[u, k + 2]
            for j in range(inner.shape[1]):
                w0, w1, w2 = inner[k, j], inner[k + 1, j], inner[k + 2, j]
                values[r, j] += a0 * w0 + a1 * w1 + a2 * w2
                values[r + 1, j] += b0 * w0 + b1 * w1 + b2 * w2
                values[r + 2, j] += c0 * w0 + c1 * w1 + c2 * w2
                values[r + 3, j] += d0 * w0 + d1 * w1 + d2 * w2
                values[r + 4, j] += e0 * w0 + e1 * w1 + e2 * w2


@njit(fastmath=True, error_model="numpy", cache=True)
def _output(hidden, outer, values):
    """values [rows] = outer · (relu(hidden), 1)."""
    zero, h = _FLOAT(0), hidden.shape[1]
    for r in range(0, len(values), ROWS):
        a, b, c, d, e = outer[h], outer[h], outer[h], outer[h], outer[h]
        for j in range(h):
            a += max(hidden[r, j], zero) * outer[j]
            b += max(hidden[r + 1, j], zero) * outer[j]
            c += max(hidden[r + 2, j], zero) * outer[j]
            d += max(hidden[r + 3, j], zero) * outer[j]
            e += max(hidden[r + 4, j], zero) * outer[j]
        values[r], values[r + 1], values[r + 2], values[r + 3], values[r + 4] = a, b, c, d, e


@njit(fastmath=True, error_model="numpy", cache=True)
def _add_output_gradient(hidden, outer, errors, gradient, slopes):
    """gradient [h + 1] += errors · (relu(hidden), 1); slopes [rows, h], of the loss by hidden."""
    zero, h = _FLOAT(0), hidden.shape[1]
    for r in range(0, len(errors), ROWS):
        a, b, c, d, e = errors[r], errors[r + 1], errors[r + 2], errors[r + 3], errors[r + 4]
        gradient[h] += a + b + c + d + e
        for j in range(h):
            v, w = max(hidden[r, j], zero), max(hidden[r + 1, j], zero)
            x, y = max(hidden[r + 2, j], zero), max(hidden[r + 3, j], zero)
            z = max(hidden[r + 4, j], zero)
            gradient[j] += a * v + b * w + c * x + d * y + e * z
            slopes[r, j] = a * outer[j] if v > zero else zero
            slopes[r + 1, j] = b * outer[j] if w > zero else zero
            slopes[r + 2, j] = c * outer[j] if x > zero else zero
            slopes[r + 3, j] = d * outer[j] if y > zero else zero
            slopes[r + 4, j] = e * outer[j] if z > zero else zero


@njit(fastmath=True, error_model="numpy", cache=True)
def _add_hidden_gradient(x, rows, slopes, gradient):
    """gradient [width, h] += x[rows]^T slopes."""
    for r in range(0, len(rows), ROWS):
        p, q, s, t, u = rows[r], rows[r + 1], rows[r + 2], rows[r + 3], rows[r + 4]
        for k in range(0, x.shape[1], INPUTS):
            a0, a1, a2 = x[p, k], x[p, k + 1], x[p, k + 2]
            b0, b1, b2 = x[q, k], x[q, k + 1], x[q, k + 2]
            c0, c1, c2 = x[s, k], x[s, k + 1], x[s, k + 2]
            d0, d1, d2 = x[t, k], x[t, k + 1], x[t, k + 2]
            e0, e1, e2 = x[u, k], x[u, k + 1], x[u, k + 2]
            for j in range(slopes.shape[1]):
                s0, s1, s2 = slopes[r, j], slopes[r + 1, j], slopes[r + 2, j]
                s3, s4 = slopes[r + 3, j], slopes[r + 4, j]
                gradient[k, j] += a0 * s0 + b0 * s1 + c0 * s2 + d0 * s3 + e0 * s4
                gradient[k + 1, j] += a1 * s0 + b1 * s1 + c1 * s2 + d1 * s3 + e1 * s4
                gradient[k + 2, j] += a2 * s0 + b2 * s1 + c2 * s2 + d2 * s3 + e2 * s4


@njit(fastmath=True, error_model="numpy", cache=True)
def _adam(weights, gradient, mean, square, rate, scale):
    """One step of torch.optim.Adam, which clears the gradient.

    ``rate`` and ``scale`` hold its bias corrections.
    """
    for i in range(len(weights)):
        g = gradient[i]
        gradient[i] = _FLOAT(0)
        mean[i] = _FLOAT(_BETA1) * mean[i] + _FLOAT(1 - _BETA1) * g
        square[i] = _FLOAT(_BETA2) * square[i] + _FLOAT(1 - _BETA2) * g * g
        weights[i] -= rate * mean[i] / (np.sqrt(square[i]) * scale + _EPS)
