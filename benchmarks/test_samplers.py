"""Samplers at training size, and the tree sampler compared with a loop over prompts.

As in the official code a task sampler draws functions and evaluates them at points that another
sampler drew. The baseline follows the official ``scripts/tasks.py``: a Python loop over the prompts
of a batch, with one gather for each level of the tree.
"""

from __future__ import annotations

import timeit

import pytest
import torch
from torch import Tensor

from looped_fast.tasks import TASKS, DecisionTree, batch_generator, make_task, sample_batch

B, N, D, DEPTH = 64, 101, 20, 4


def draw_loop() -> tuple[Tensor, Tensor]:
    """Draw a coordinate and a value for every node, leaf or not, as in the official code."""
    n_nodes = 2 ** (DEPTH + 1) - 1
    return torch.randint(0, D, (B, n_nodes)), torch.randn(B, n_nodes)


def evaluate_loop(xs: Tensor, coordinates: Tensor, values: Tensor) -> Tensor:
    """Evaluate one prompt after another."""
    ys = torch.zeros(xs.shape[:2])
    for i in range(len(xs)):
        is_positive = xs[i] > 0
        nodes = torch.zeros(xs.shape[1], dtype=torch.int64)
        for _ in range(DEPTH):
            tested = coordinates[i][nodes]
            nodes = 2 * nodes + 1 + is_positive[torch.arange(xs.shape[1]), tested]
        ys[i] = values[i][nodes]
    return ys


def sample_loop(xs: Tensor) -> Tensor:
    return evaluate_loop(xs, *draw_loop())


def sample_ours(xs: Tensor) -> Tensor:
    task = DecisionTree(D, DEPTH)
    return task.evaluate(xs, **task.draw(B, N, batch_generator(0, 0, 0, "cpu")))


def evaluate_ours(xs: Tensor, coordinates: Tensor, values: Tensor) -> Tensor:
    inner = 2**DEPTH - 1
    return DecisionTree.evaluate(
        xs, coordinates=coordinates[:, :inner], leaf_values=values[:, inner:]
    )


def least_seconds(function, repeats: int) -> float:
    """Time of an undisturbed call, with caches as warm as the loop's are within one call."""
    return min(timeit.repeat(function, number=1, repeat=repeats))


@pytest.fixture(scope="module")
def xs():
    torch.manual_seed(0)
    return torch.randn(B, N, D)


@pytest.mark.parametrize("name", list(TASKS))
def test_sampler(benchmark, name):
    """Draw points and functions."""
    benchmark.group = "samplers"
    task = make_task(name, D)
    benchmark(sample_batch, task, B, N, seed=0, step=0)


def test_points_alone(benchmark):
    """Time the normal numbers of xs, a lower bound for every sampler."""
    benchmark.group = "samplers"
    benchmark(torch.randn, B, N, D)


@pytest.mark.parametrize("sample", [sample_loop, sample_ours])
def test_tree_sampler(benchmark, xs, sample):
    benchmark.group = "tree sampler, at given points"
    benchmark(sample, xs)


def test_trees_cost_at_most_a_twentieth_of_the_loop(benchmark, xs, capsys):
    """Print the ratio; values must agree."""
    trees = draw_loop()
    assert torch.equal(evaluate_ours(xs, *trees), evaluate_loop(xs, *trees))
    # Time both equally long: else a short disturbance would spoil all calls of the faster one.
    loop = least_seconds(lambda: sample_loop(xs), repeats=100)
    ours = benchmark.pedantic(least_seconds, args=(lambda: sample_ours(xs), 3000), rounds=1)
    benchmark.extra_info["ratio"] = ours / loop
    with capsys.disabled():
        print(f"\nB = {B}, n = {N}, d = {D}, depth {DEPTH}; {torch.get_num_threads()} threads")
        print(f"loop: {loop * 1e3:.2f} ms, ours: {ours * 1e3:.3f} ms: {ours / loop:.2%}")
    assert ours / loop <= 0.05
