from __future__ import annotations

import pytest
import torch

from looped_fast.evaluation import evaluation_batches
from looped_fast.evaluation.shifts import SHIFTS, sample_shifted, shifted_prompts
from looped_fast.tasks import TASKS, make_task

D = 6


def shifted(name, task="lr", B=400, n=6, seed=0):
    return sample_shifted(name, make_task(task, D), B, n, seed=seed)


def plain(task="lr", B=400, n=6, seed=0):
    return shifted("none", task, B, n, seed)


@pytest.mark.parametrize("task", list(TASKS))
def test_without_a_shift_prompts_are_those_of_every_evaluation(task):
    prompts = shifted_prompts("none", make_task(task, D), 300, 5, seed=3)
    batches = evaluation_batches(make_task(task, D), 300, 5, seed=3, device="cpu")
    for mine, parts in zip((prompts.xs, prompts.ys), zip(*batches, strict=True), strict=True):
        assert torch.equal(mine, torch.cat(parts))
    assert prompts.queries is None
    assert torch.equal(prompts.targets, prompts.ys)


@pytest.mark.parametrize("name", list(SHIFTS))
@pytest.mark.parametrize("task", list(TASKS))
def test_every_shift_of_every_task_is_finite_and_repeats(name, task):
    one, again, other = shifted(name, task), shifted(name, task), shifted(name, task, seed=1)
    for mine, same, different in zip(one, again, other, strict=True):
        if mine is not None:
            assert mine.isfinite().all()
            assert torch.equal(mine, same)
            assert not torch.equal(mine, different)


def covariance(xs):
    """Covariance of each prompt's points: [B, d, d]."""
    return xs.mT.double() @ xs.double() / xs.shape[1]


def test_skewed_points_keep_their_mean_square_and_have_eigenvalues_of_1_over_i_squared():
    xs = shifted("skewed covariance", B=20, n=5000).xs
    spectrum = torch.linalg.eigvalsh(covariance(xs)).flip(1).mean(0)
    expected = torch.arange(1, D + 1).double() ** -2
    torch.testing.assert_close(spectrum, expected * D / expected.sum(), rtol=0.05, atol=0)


def test_the_axes_of_a_skewed_covariance_are_random():
    means = covariance(shifted("skewed covariance", B=4000, n=50).xs).mean(0)
    torch.testing.assert_close(means, torch.eye(D).double(), rtol=0, atol=0.15)


def test_half_subspace_has_half_the_rank_and_the_same_mean_square():
    xs = shifted("half subspace", n=12).xs
    assert (torch.linalg.matrix_rank(xs) == D // 2).all()
    assert xs.square().sum(2).mean().item() == pytest.approx(D, rel=0.05)


def test_lower_dimension_zeroes_the_last_half_as_the_curriculum_does():
    xs = shifted("lower dimension").xs
    assert not xs[..., D // 2 :].any()
    assert torch.equal(xs[..., : D // 2], plain().xs[..., : D // 2])


@pytest.mark.parametrize(("name", "scale"), [("1/3", 1 / 3), ("1/2", 0.5), ("2", 2), ("3", 3)])
def test_scales_apply_to_inputs_or_labels(name, scale):
    base, inputs, weights = plain(), shifted(f"inputs x {name}"), shifted(f"weights x {name}")
    torch.testing.assert_close(inputs.xs, scale * base.xs)
    torch.testing.assert_close(inputs.ys, scale * base.ys)  # a linear function
    assert torch.equal(weights.xs, base.xs)
    torch.testing.assert_close(weights.ys, scale * base.ys)


def test_noise_is_a_twentieth_of_the_variance_and_not_in_the_targets():
    prompts = shifted("label noise", B=2000)
    assert torch.equal(prompts.targets, plain(B=2000).ys)
    noise = prompts.ys - prompts.targets
    assert noise.square().mean().item() == pytest.approx(D / 20, rel=0.05)


def test_the_points_of_random_quadrants_lie_in_one_and_their_queries_anywhere():
    prompts = shifted("random quadrants")
    assert (prompts.xs.sign() == prompts.xs[:, :1].sign()).all()
    assert torch.equal(prompts.queries.abs(), prompts.xs.abs())
    assert (prompts.queries > 0).float().mean().item() == pytest.approx(0.5, abs=0.05)


def test_orthogonal_queries_are_orthogonal_to_earlier_points_and_as_long_as_theirs():
    prompts = shifted("orthogonal queries")
    cosines = torch.einsum("bid,bjd->bij", prompts.queries, prompts.xs)
    cosines /= prompts.queries.norm(dim=2)[:, :, None] * prompts.xs.norm(dim=2)[:, None, :]
    assert cosines.tril(-1).abs().max() < 1e-4
    assert (cosines.diagonal(dim1=1, dim2=2) > 0).all()
    torch.testing.assert_close(prompts.queries.norm(dim=2), prompts.xs.norm(dim=2))


def test_nothing_is_orthogonal_to_as_many_points_as_dimensions():
    with pytest.raises(ValueError, match=r"orthogonal to 6 points in 6 dimensions.*at most 6"):
        shifted("orthogonal queries", n=7)


@pytest.mark.parametrize("task", ["lr", "dt", "relu_2nn"])
def test_overlapping_queries_are_earlier_points_with_their_values(task):
    prompts = shifted("overlapping queries", task)
    chosen = set()
    for i in range(1, 6):
        same = (prompts.queries[:, i, None] == prompts.xs[:, :i]).all(2)  # [B, i]
        assert (same.sum(1) == 1).all()
        chosen |= {(i, j) for j in same.nonzero()[:, 1].tolist()}
        values = (prompts.ys[:, :i] * same).sum(1)
        torch.testing.assert_close(prompts.targets[:, i], values)
    assert len(chosen) == 1 + 2 + 3 + 4 + 5


def test_an_unknown_shift_is_an_error_with_the_nearest_name():
    with pytest.raises(ValueError, match="did you mean 'label noise'"):
        shifted("label nois")
