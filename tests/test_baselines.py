from __future__ import annotations

import numpy as np
import pytest
import torch

from looped_fast.baselines import BASELINES, least_squares, nearest_neighbours, zero
from looped_fast.tasks import make_task, sample_batch


def noisy_prompts(B=3, n=14, d=5):
    return torch.randn(B, n, d), torch.randn(B, n)


def test_the_zero_predictor_predicts_zero():
    assert torch.equal(zero(*noisy_prompts()), torch.zeros(3, 14))


def test_least_squares_equals_numpy_prompt_by_prompt():
    xs, ys = noisy_prompts()
    predictions = least_squares(xs, ys)
    assert not predictions[:, 0].any()
    for b in range(3):
        for i in range(1, 14):
            seen = xs[b, :i].double().numpy(), ys[b, :i].double().numpy()
            w = np.linalg.lstsq(*seen, rcond=None)[0]  # of minimum norm where i < d
            expected = float(xs[b, i].double().numpy() @ w)
            assert predictions[b, i].item() == pytest.approx(expected, rel=1e-4, abs=1e-5)


def test_least_squares_is_exact_once_there_are_as_many_points_as_dimensions():
    xs, ys = sample_batch(make_task("lr", 5), 64, 9, seed=0, step=0)
    errors = (least_squares(xs, ys) - ys).abs().amax(0)
    assert (errors[5:] < 1e-3).all()
    assert (errors[:5] > 0.1).all()


def test_least_squares_solves_truncated_prompts():
    """Columns of zeros make every system rank deficient."""
    xs, ys = sample_batch(make_task("lr", 5), 64, 9, seed=0, step=0, n_dims=2)
    assert (least_squares(xs, ys) - ys)[:, 2:].abs().max() < 1e-3


def test_least_squares_is_the_minimum_norm_fit_when_underdetermined():
    xs = torch.tensor([[[2.0, 0.0], [1.0, 1.0]]])
    ys = torch.tensor([[6.0, 0.0]])
    assert least_squares(xs, ys)[0, 1].item() == pytest.approx(3)  # w = (3, 0)


@pytest.mark.parametrize(
    ("n", "d", "k"), [(14, 5, 3), (60, 4, 3), (8, 2, 1), (2, 3, 3), (40, 20, 5)]
)
def test_nearest_neighbours_equal_scikit_learn(n, d, k):
    neighbors = pytest.importorskip("sklearn.neighbors")
    xs, ys = noisy_prompts(n=n, d=d)
    predictions = nearest_neighbours(xs, ys, k)
    assert not predictions[:, 0].any()
    for b in range(3):
        for i in range(1, n):
            model = neighbors.KNeighborsRegressor(min(i, k)).fit(xs[b, :i], ys[b, :i])
            expected = model.predict(xs[b, i : i + 1]).item()
            assert predictions[b, i].item() == pytest.approx(expected, rel=1e-5, abs=1e-6)


@pytest.mark.parametrize("name", list(BASELINES))
def test_a_baseline_sees_only_earlier_points(name):
    xs, ys = noisy_prompts()
    before = BASELINES[name](xs, ys)
    xs, ys = xs.clone(), ys.clone()
    xs[:, 7:] += 5
    ys[:, 6:] -= 5
    assert torch.equal(BASELINES[name](xs, ys)[:, :7], before[:, :7])


@pytest.mark.parametrize("name", list(BASELINES))
def test_a_baseline_keeps_shape_and_dtype(name):
    xs, ys = noisy_prompts(B=2, n=1)
    predictions = BASELINES[name](xs, ys)
    assert (predictions.shape, predictions.dtype) == ((2, 1), torch.float32)
    assert not predictions.any()
