"""Quadratic regression, linear classification, Fourier series, mixtures."""

from __future__ import annotations

import math

import pytest
import torch

from looped_fast.evaluation.baselines import figure_baselines
from looped_fast.tasks import (
    DecisionTree,
    FixedPrompts,
    LinearRegression,
    make_task,
    sample_batch,
)

D = 4


def drawn(task, B=64, n=8):
    generator = torch.Generator().manual_seed(1)
    return task.points(B, n, generator), task.draw(B, n, generator)


def test_quadratic_regression_is_linear_in_squares():
    task = make_task("quadratic", D)
    xs, function = drawn(task)
    expected = torch.einsum("bnd,bd->bn", xs**2, function["w"][..., 0]) / 3**0.5
    torch.testing.assert_close(task.evaluate(xs, **function), expected)


def test_least_squares_on_squares_solves_quadratic_regression():
    task = make_task("quadratic", D)
    xs, ys = sample_batch(task, 32, 8, seed=0, step=0)
    predictions = figure_baselines(task)["least squares, squares"](xs, ys)
    assert (predictions - ys)[:, D:].abs().max() < 1e-3
    assert (predictions - ys)[:, 1].abs().max() > 0.1


def test_linear_classification_has_the_sign_of_linear_regression():
    task = make_task("classification", D)
    xs, function = drawn(task)
    ys = task.evaluate(xs, **function)
    assert torch.equal(ys, LinearRegression.evaluate(xs, **function).sign())
    assert set(ys.flatten().tolist()) == {-1.0, 1.0}
    assert ys.dtype == torch.float32


def test_a_fourier_series_is_the_written_sum():
    task = make_task("fourier", 2, frequencies=3, period=5.0)
    xs, function = drawn(task, B=3, n=4)
    a = function["cosines"].view(3, 2, 4)
    b = function["sines"].view(3, 2, 4)
    ys = task.evaluate(xs, **function)
    for prompt in range(3):
        for i in range(4):
            expected = 0.0
            for j in range(2):
                for k in range(4):
                    angle = 2 * math.pi * k * xs[prompt, i, j].item() / 5.0
                    expected += a[prompt, j, k].item() * math.cos(angle)
                    expected += b[prompt, j, k].item() * math.sin(angle)
            assert ys[prompt, i].item() == pytest.approx(expected / 2, abs=1e-4)


def test_a_fourier_series_has_its_period():
    task = make_task("fourier", D, period=3.0)
    xs, function = drawn(task)
    shifted = task.evaluate(xs + 3.0, **function)
    torch.testing.assert_close(task.evaluate(xs, **function), shifted, rtol=1e-4, atol=1e-4)


def test_each_prompt_of_a_mixture_is_from_one_of_its_tasks():
    task = make_task("mixture", D, second_options={"depth": 2})
    xs, function = drawn(task, B=4000)
    ys, from_first = task.evaluate(xs, **function), function["from_first"]
    linear = LinearRegression.evaluate(xs, w=function["first.w"])
    trees = DecisionTree.evaluate(
        xs,
        coordinates=function["second.coordinates"],
        leaf_values=function["second.leaf_values"],
    )
    assert torch.equal(ys[from_first], linear[from_first])
    assert torch.equal(ys[~from_first], trees[~from_first])
    assert abs(from_first.double().mean().item() - 0.5) < 5 * 0.5 / 4000**0.5


@pytest.mark.parametrize(("share", "n_first"), [(0.0, 0), (1.0, 500)])
def test_a_share_of_zero_or_one_is_a_single_task(share, n_first):
    _, function = drawn(make_task("mixture", D, share=share), B=500)
    assert function["from_first"].sum() == n_first


def test_a_mixture_of_two_of_a_kind_has_two_sets_of_options():
    task = make_task("mixture", 3, first="dt", first_options={"depth": 1}, share=0.25)
    assert task.options["first_options"] == {"depth": 1}
    assert task.options["second_options"] == {"depth": 4}  # the default, filled in
    _, function = drawn(task)
    assert function["first.leaf_values"].shape[1] == 2
    assert function["second.leaf_values"].shape[1] == 16


def test_a_mixture_has_the_variance_and_baselines_of_both():
    task = make_task("mixture", D, first="noisy_lr", first_options={"noise_std": 2.0}, share=0.75)
    assert task.variance == 0.75 * (D + 4) + 0.25
    assert task.noise_variance == 3.0
    names = figure_baselines(task)
    assert {"least squares", "ridge", "greedy tree", "3-nearest neighbours"} <= names.keys()
    assert names["ridge"].keywords == {"alpha": 3.0}


def test_a_mixture_truncates_if_both_tasks_do():
    both = make_task("mixture", D, second="sparse_lr")
    xs, ys = sample_batch(both, 8, 5, seed=0, step=0, n_dims=2)
    assert not xs[..., 2:].any()
    assert both.truncates
    assert not make_task("mixture", D).truncates
    assert ys.isfinite().all()


def test_mixtures_nest():
    inner = {"first": "quadratic", "second": "fourier"}
    task = make_task("mixture", 2, second="mixture", second_options=inner)
    xs, function = drawn(task)
    assert "second.first.w" in function
    assert task.evaluate(xs, **function).isfinite().all()
    assert task.variance == 2


def test_a_fixed_set_of_a_mixtures_prompts_keeps_their_tasks():
    prompts = FixedPrompts(make_task("mixture", D), 8, 5, 8, seed=0)
    first, again = prompts.batch(5, step=0), prompts.batch(5, step=1)
    order, reorder = first.xs[:, 0, 0].argsort(), again.xs[:, 0, 0].argsort()
    torch.testing.assert_close(first.ys[order], again.ys[reorder])
