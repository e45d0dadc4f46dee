from __future__ import annotations

import subprocess
import sys
from functools import partial

import numpy as np
import pytest
import torch
from torch import nn

from looped_fast.evaluation import baselines, tree_baselines
from looped_fast.evaluation.baselines import (
    BASELINES,
    averaging,
    figure_baselines,
    initial_network,
    lasso,
    least_squares,
    minibatches,
    nearest_neighbours,
    on_signs,
    ridge,
    two_layer_network,
    zero,
)
from looped_fast.evaluation.tree_baselines import greedy_tree
from looped_fast.tasks import TASKS, make_task, sample_batch

baseline_loops = pytest.importorskip("benchmarks.baseline_loops", reason="needs the extra eval")
LOOPS, one_by_one = baseline_loops.LOOPS, baseline_loops.one_by_one
FP32_EPS = torch.finfo(torch.float32).eps


def noisy_prompts(B=3, n=14, d=5):
    return torch.randn(B, n, d), torch.randn(B, n)


def assert_agree(predictions, expected, rounding=100):
    """To ``rounding`` units of float32, of the largest prediction; exactly 0 at first."""
    assert predictions.dtype == torch.float32
    assert not predictions[:, 0].any()
    error = (predictions.double() - expected).abs().max()
    assert error <= rounding * FP32_EPS * expected.abs().max()


def test_the_zero_predictor_predicts_zero():
    assert torch.equal(zero(*noisy_prompts()), torch.zeros(3, 14))


def test_least_squares_equals_numpy_prompt_by_prompt():
    prompts = noisy_prompts()
    expected = one_by_one(LOOPS["least squares"], *prompts)
    assert_agree(least_squares(*prompts), expected, rounding=4)


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


@pytest.mark.parametrize("alpha", [1e-2, 1.0, 30.0])
def test_ridge_equals_scikit_learn(alpha):
    prompts = noisy_prompts()
    expected = one_by_one(partial(baseline_loops.ridge, alpha=alpha), *prompts)
    assert_agree(ridge(*prompts, alpha=alpha), expected, rounding=4)


@pytest.mark.parametrize("alpha", [1e-3, 1e-2, 0.3])
@pytest.mark.parametrize("active", [5, 3])
def test_lasso_equals_scikit_learn(alpha, active):
    """Both stop near the optimum: to 1e-4 of the largest prediction. Truncated prompts too."""
    xs, ys = noisy_prompts()
    xs[..., active:] = 0
    expected = one_by_one(partial(baseline_loops.lasso, alpha=alpha, tol=1e-12), xs, ys)
    predictions = lasso(xs, ys, alpha=alpha)
    assert expected.abs().max() > 0.1
    assert (predictions - expected).abs().max() < 1e-4 * expected.abs().max()


def test_lasso_of_float64_is_not_rounded_to_float32():
    predictions = lasso(*(t.double() for t in noisy_prompts()))
    assert predictions.dtype == torch.float64
    assert not torch.equal(predictions, predictions.float().double())


def test_lasso_says_when_it_has_not_converged():
    with pytest.raises(RuntimeError, match="did not converge in 1 sweeps; raise max_sweeps"):
        lasso(*noisy_prompts(), max_sweeps=1)


@pytest.mark.parametrize("baseline", [ridge, lasso])
@pytest.mark.parametrize("alpha", [0.0, -1.0, float("nan")])
def test_a_penalty_is_positive(baseline, alpha):
    with pytest.raises(ValueError, match=r"alpha = .*more than 0"):
        baseline(*noisy_prompts(), alpha=alpha)


def test_averaging_equals_the_mean_of_y_times_x():
    prompts = noisy_prompts()
    assert_agree(averaging(*prompts), one_by_one(LOOPS["averaging"], *prompts))


@pytest.mark.parametrize(
    ("n", "d", "k"), [(14, 5, 3), (60, 4, 3), (8, 2, 1), (2, 3, 3), (40, 20, 5)]
)
def test_nearest_neighbours_equal_scikit_learn(n, d, k):
    prompts = noisy_prompts(n=n, d=d)
    expected = one_by_one(partial(baseline_loops.nearest_neighbours, k=k), *prompts)
    assert_agree(nearest_neighbours(*prompts, k=k), expected, rounding=4)


@pytest.mark.parametrize("depth", [2, 4, None])
@pytest.mark.parametrize("signs", [False, True])
def test_greedy_trees_are_scikit_learns(depth, signs):
    prompts = noisy_prompts()
    ours = partial(greedy_tree, max_depth=depth)
    theirs = partial(baseline_loops.greedy_tree, max_depth=depth)
    if signs:
        ours, theirs = on_signs(ours), baseline_loops.on_signs(theirs)
    assert_agree(ours(*prompts), one_by_one(theirs, *prompts), rounding=4)


@pytest.mark.parametrize("name", ["XGBoost", "XGBoost, signs"])
def test_boosted_trees_are_xgboosts(name):
    prompts = noisy_prompts(n=30)
    assert_agree(BASELINES[name](*prompts), one_by_one(LOOPS[name], *prompts), rounding=4)


def test_trees_in_several_processes_are_those_of_one(monkeypatch):
    prompts = noisy_prompts(B=5)
    alone = greedy_tree(*prompts, max_depth=3)
    monkeypatch.setattr(tree_baselines, "_FITS_PER_WORKER", 1)
    assert torch.equal(greedy_tree(*prompts, max_depth=3), alone)


def test_networks_trained_in_parts_are_those_trained_at_once(monkeypatch):
    prompts = noisy_prompts(B=5)
    at_once = two_layer_network(*prompts, steps=20)
    monkeypatch.setattr(baselines, "_NETWORKS", 2)
    torch.testing.assert_close(two_layer_network(*prompts, steps=20), at_once)


def torch_network(weights, d, dtype):
    """A ``torch.nn`` network with the given weights."""
    hidden, output, bias = weights
    network = nn.Sequential(nn.Linear(d, hidden.shape[1]), nn.ReLU(), nn.Linear(hidden.shape[1], 1))
    network.to(dtype)
    values = (hidden[:d].T, hidden[d], output, bias[0])
    with torch.no_grad():
        for parameter, value in zip(network.parameters(), values, strict=True):
            parameter.copy_(value)
    return network


@pytest.mark.parametrize(("n", "d", "hidden", "size"), [(7, 3, 8, 4), (13, 20, 100, 10)])
def test_networks_are_trained_as_torch_trains_them_one_by_one(n, d, hidden, size):
    """After 60 steps no farther from float64 than twice what torch in float32 is."""
    xs, ys = noisy_prompts(B=2, n=n, d=d)
    predictions = two_layer_network(xs, ys, hidden=hidden, steps=60, batch_size=size, seed=5)
    assert not predictions[:, 0].any()
    answers = {torch.float32: torch.zeros(2, n), torch.float64: torch.zeros(2, n).double()}
    for i in range(1, n):
        generator = np.random.default_rng([5, i])
        weights = initial_network(generator, 2, d, hidden)
        batches = minibatches(generator, i, 60, size)
        for b in range(2):
            for dtype, answer in answers.items():
                network = torch_network([w[b] for w in weights], d, dtype)
                baseline_loops.train_network(network, xs[b].to(dtype), ys[b].to(dtype), batches)
                answer[b, i] = network(xs[b, i].to(dtype)).detach()
    truth = answers[torch.float64]
    ours, theirs = ((p.double() - truth).norm() for p in (predictions, answers[torch.float32]))
    assert ours <= 2 * theirs + FP32_EPS * truth.norm()


def test_networks_start_as_linear_layers_of_torch_do():
    hidden, output, bias = initial_network(np.random.default_rng(0), 500, 20, 100)
    layers = [(hidden[:, :20], 20), (hidden[:, 20], 20), (output, 100), (bias, 100)]
    for values, inputs in layers:
        limit = inputs**-0.5
        assert values.abs().max() <= limit
        assert values.std().item() == pytest.approx(limit / 3**0.5, rel=0.1)  # uniform


def test_minibatches_hold_different_points_already_seen():
    batches = minibatches(np.random.default_rng(0), 12, 200, 10)
    assert batches.shape == (200, 10)
    assert all(len(set(batch)) == 10 for batch in batches)
    assert set(batches.ravel()) == set(range(12))
    assert minibatches(np.random.default_rng(0), 4, 3, 10).shape == (3, 4)


def test_a_network_repeats_and_depends_on_its_seed():
    prompts = noisy_prompts()
    once, again, other = (two_layer_network(*prompts, steps=20, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(once, again)
    assert not torch.equal(once, other)


@pytest.mark.parametrize("name", list(BASELINES))
def test_a_baseline_sees_only_earlier_points(name):
    xs, ys = noisy_prompts()
    before = BASELINES[name](xs, ys)
    xs, ys = xs.clone(), ys.clone()
    xs[:, 7:] += 5
    ys[:, 6:] -= 5
    assert torch.equal(BASELINES[name](xs, ys)[:, :7], before[:, :7])


@pytest.mark.parametrize("name", list(BASELINES))
def test_a_baseline_answers_queries_in_place_of_points(name):
    (xs, ys), (queries, _) = noisy_prompts(n=6), noisy_prompts(n=6)
    answers = BASELINES[name](xs, ys, queries)
    for i in range(6):
        asked = xs.clone()
        asked[:, i] = queries[:, i]
        expected = BASELINES[name](asked, ys)[:, i]
        torch.testing.assert_close(answers[:, i], expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", list(BASELINES))
def test_a_baseline_keeps_shape_and_dtype(name):
    xs, ys = noisy_prompts(B=2, n=1)
    predictions = BASELINES[name](xs, ys)
    assert (predictions.shape, predictions.dtype) == ((2, 1), torch.float32)
    assert not predictions.any()


@pytest.mark.parametrize(
    ("task", "names"),
    [
        ("lr", {"least squares", "3-nearest neighbours", "averaging"}),
        ("sparse_lr", {"least squares", "3-nearest neighbours", "averaging", "lasso"}),
        ("relu_2nn", {"least squares", "3-nearest neighbours", "2-layer network"}),
    ],
)
def test_figures_have_the_baselines_of_the_official_ones(task, names):
    assert set(figure_baselines(make_task(task, 20))) == names


def test_every_task_has_baselines():
    assert all(figure_baselines(make_task(task, 20)) for task in TASKS)


def test_noisy_regression_is_held_against_the_best_ridge():
    task = make_task("noisy_lr", 5, noise_std=0.5)
    xs, ys = sample_batch(task, 4000, 12, seed=0, step=0)

    def error(baseline):
        return (baseline(xs, ys) - ys)[:, 6:].square().mean()

    best = error(figure_baselines(task)["ridge"])
    assert all(best < error(partial(ridge, alpha=alpha)) for alpha in (0.05, 1.25))
    assert "ridge" not in figure_baselines(make_task("noisy_lr", 5, noise_std=0.0))


@pytest.mark.parametrize(
    ("package", "name"),
    [
        ("sklearn.tree", "greedy tree"),
        ("xgboost", "XGBoost"),
        ("joblib", "XGBoost"),
        ("sklearn.linear_model", "lasso"),
        ("joblib", "2-layer network"),
    ],
)
def test_a_missing_package_is_an_error_with_the_command_that_installs_it(
    package, name, monkeypatch
):
    monkeypatch.setitem(sys.modules, package, None)  # importing it fails
    with pytest.raises(RuntimeError, match="pip install scikit-learn pandas xgb"):
        BASELINES[name](*noisy_prompts(B=1, n=3))


def test_importing_baselines_needs_no_optional_package():
    code = "import sys, looped_fast.baselines; print({'sklearn', 'xgboost'} & {*sys.modules})"
    output = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert output.stdout.strip() == "set()"
