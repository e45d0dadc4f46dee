from __future__ import annotations

import numpy as np
import pytest
import torch
from conftest import prompt, small_model

from looped_fast.evaluation import (
    bootstrap_curve,
    evaluation_batches,
    loop_errors,
    model_errors,
    model_predictor,
    position_errors,
    prompt_errors,
)
from looped_fast.evaluation.baselines import least_squares, zero
from looped_fast.tasks import TASKS, make_task, sample_batch


def batches(task, n_prompts, n_points=6, seed=0):
    return evaluation_batches(task, n_prompts, n_points, seed=seed, device="cpu")


@pytest.mark.parametrize("name", list(TASKS))
def test_predicting_zero_scores_one(name):
    task = make_task(name, 6)
    errors = position_errors(zero, task, batches(task, 4000))
    assert (errors.shape, errors.dtype) == ((6,), torch.float64)
    assert errors.mean().item() == pytest.approx(1, abs=0.1)


def test_linear_error_is_squared_error_over_d():
    xs, ys = prompt(B=5, n=4)
    task = make_task("lr", 3)
    errors = position_errors(lambda xs, ys: ys + 2, task, iter([(xs, ys)]))
    torch.testing.assert_close(errors, torch.full((4,), 4 / 3, dtype=torch.float64))


def test_a_mean_over_chunks_of_unequal_size_weighs_prompts_alike():
    task = make_task("lr", 3)
    xs, ys = prompt(B=7, n=4)
    whole = position_errors(least_squares, task, iter([(xs, ys)]))
    parts = position_errors(least_squares, task, iter([(xs[:5], ys[:5]), (xs[5:], ys[5:])]))
    torch.testing.assert_close(parts, whole, rtol=1e-12, atol=0)


@pytest.mark.parametrize(("n_prompts", "sizes"), [(1, [1]), (256, [256]), (600, [256, 256, 88])])
def test_batches_hold_the_given_number_of_prompts(n_prompts, sizes):
    assert [len(xs) for xs, _ in batches(make_task("lr", 3), n_prompts)] == sizes


def test_chunks_are_different_prompts_and_none_of_training():
    task = make_task("lr", 3)
    first, second = batches(task, 512)
    training = sample_batch(task, 256, 6, seed=0, step=0)
    assert not torch.isclose(first.xs, second.xs).all(-1).any()
    assert not torch.isclose(first.xs, training.xs).all(-1).any()


def test_evaluation_repeats_and_depends_on_its_seed():
    task = make_task("dt", 3)
    once, again, other = (
        position_errors(zero, task, batches(task, 100, seed=seed)) for seed in (1, 1, 2)
    )
    assert torch.equal(once, again)
    assert not torch.isclose(once, other).any()


def test_a_model_is_evaluated_after_each_loop_count():
    model, task = small_model(), make_task("lr", 3)
    errors = model_errors(model, task, [1, 4, 9], 20, 6, seed=0)
    assert list(errors) == [1, 4, 9]
    for n_loops, error in errors.items():

        def predict(xs, ys, n_loops=n_loops):
            return model(xs, ys, n_loops, n_loops)[-1].detach()

        expected = position_errors(predict, task, batches(task, 20))
        torch.testing.assert_close(error, expected, rtol=1e-4, atol=0)


def test_evaluating_makes_no_gradient_and_follows_autocast():
    model, task = small_model(), make_task("lr", 3)

    def bf16():
        return torch.autocast("cpu", dtype=torch.bfloat16)

    low = model_errors(model, task, [4], 20, 6, seed=0, autocast=bf16)[4]
    single = model_errors(model, task, [4], 20, 6, seed=0)[4]
    assert not low.requires_grad
    assert torch.isclose(low, single, rtol=0.2).all()
    assert not torch.equal(low, single)


def test_the_size_of_chunks_changes_prompts_but_not_their_distribution(monkeypatch):
    task = make_task("lr", 3)
    large = position_errors(least_squares, task, batches(task, 1000))
    monkeypatch.setattr("looped_fast.evaluation.errors._CHUNK", 100)
    small = position_errors(least_squares, task, batches(task, 1000))
    torch.testing.assert_close(small, large, rtol=0.5, atol=1e-6)


def test_errors_of_prompts_average_to_those_of_positions():
    task = make_task("relu_2nn", 3, hidden=4)
    errors = prompt_errors(least_squares, task, batches(task, 300))
    assert errors.shape == (300, 6)
    assert torch.equal(errors.mean(0), position_errors(least_squares, task, batches(task, 300)))


@pytest.mark.parametrize("state_bytes", [1, 10_000, 2**28])
def test_all_loop_counts_come_out_of_one_run_of_the_loop(state_bytes, monkeypatch):
    """This holds however few prompts fit into memory at once."""
    monkeypatch.setattr("looped_fast.evaluation.errors._STATE_BYTES", state_bytes)
    model, task = small_model(), make_task("lr", 3)
    errors = loop_errors(model, task, batches(task, 7), [9, 3, 5])
    assert errors.shape == (3, 7, 6)
    for n_loops, error in zip([9, 3, 5], errors, strict=True):
        single = prompt_errors(model_predictor(model, n_loops), task, batches(task, 7))
        torch.testing.assert_close(error.double(), single, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("counts", [[], [0, 3]])
def test_loop_counts_start_at_one(counts):
    task = make_task("lr", 3)
    with pytest.raises(ValueError, match="at least 1"):
        loop_errors(small_model(), task, batches(task, 2), counts)


def test_a_model_answers_queries_in_place_of_its_points():
    model = small_model()
    (xs, ys), queries = prompt(B=4, n=6), torch.randn(4, 6, 3)
    predict = model_predictor(model, 4)
    answers = predict(xs, ys, queries)
    for i in range(6):
        replaced = xs.clone()
        replaced[:, i] = queries[:, i]
        torch.testing.assert_close(answers[:, i], predict(replaced, ys)[:, i], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(predict(xs, ys, xs), predict(xs, ys), rtol=1e-4, atol=1e-5)


def test_the_bootstrap_band_is_that_of_resampled_means():
    """Compares with the plain procedure, one trial after the other; both are random."""
    errors = torch.randn(200, 3).exp()
    curve = bootstrap_curve(errors, seed=0)
    generator = np.random.default_rng(1)
    means = np.stack([errors[generator.integers(200, size=200)].mean(0) for _ in range(4000)])
    low, high = np.quantile(means, (0.05, 0.95), axis=0)
    width = high - low
    np.testing.assert_allclose(curve.mean, errors.mean(0), rtol=1e-6)
    assert (np.abs(np.array(curve.low) - low) < 0.1 * width).all()
    assert (np.abs(np.array(curve.high) - high) < 0.1 * width).all()


def test_the_bootstrap_repeats_and_depends_on_its_seed():
    errors = torch.rand(30, 2)
    assert bootstrap_curve(errors, seed=3) == bootstrap_curve(errors, seed=3)
    assert bootstrap_curve(errors, seed=3) != bootstrap_curve(errors, seed=4)


def test_too_few_prompts_for_a_band_are_an_error():
    with pytest.raises(ValueError, match=r"19 prompts are too few.*at least 20"):
        bootstrap_curve(torch.rand(19, 2), seed=0)
