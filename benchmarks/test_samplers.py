"""Samplers at training size, and the tree sampler against a loop over prompts.

The baseline is written in the manner of the official ``scripts/tasks.py``: a Python loop over
the prompts of a batch, and in it one gather for each level of the tree.
"""

from __future__ import annotations

import time

import pytest
import torch
from torch import Tensor

from looped_fast.tasks import TASKS, DecisionTree, make_task, sample_batch

B, N, D, DEPTH = 64, 101, 20, 4


def draw_loop() -> tuple[Tensor, Tensor, Tensor]:
    """xs, and as in the official code a coordinate and a value for every node, leaf or not."""
    n_nodes = 2 ** (DEPTH + 1) - 1
    coordinates = torch.randint(0, D, (B, n_nodes))
    return torch.randn(B, N, D), coordinates, torch.randn(B, n_nodes)


def evaluate_loop(xs: Tensor, coordinates: Tensor, values: Tensor) -> Tensor:
    """One prompt after the other."""
    ys = torch.zeros(xs.shape[:2])
    for i in range(len(xs)):
        is_positive = xs[i] > 0
        nodes = torch.zeros(xs.shape[1], dtype=torch.int64)
        for _ in range(DEPTH):
            asked = coordinates[i][nodes]
            nodes = 2 * nodes + 1 + is_positive[torch.arange(xs.shape[1]), asked]
        ys[i] = values[i][nodes]
    return ys


def sample_loop() -> Tensor:
    return evaluate_loop(*draw_loop())


def sample_ours() -> Tensor:
    return sample_batch(DecisionTree(D, DEPTH), B, N, seed=0, step=0).ys


def evaluate_ours(xs: Tensor, coordinates: Tensor, values: Tensor) -> Tensor:
    inner = 2**DEPTH - 1
    return DecisionTree.evaluate(
        xs, coordinates=coordinates[:, :inner], leaf_values=values[:, inner:]
    )


def median_times(*functions, repeats: int = 100) -> list[float]:
    """Median seconds of each; they take turns, so that a busy machine slows all alike."""
    times: list[list[float]] = [[] for _ in functions]
    for i in range(repeats + 5):
        for function, taken in zip(functions, times, strict=True):
            start = time.perf_counter()
            function()
            if i >= 5:
                taken.append(time.perf_counter() - start)
    return [sorted(taken)[repeats // 2] for taken in times]


@pytest.fixture(scope="module")
def tree_batch():
    torch.manual_seed(0)
    return draw_loop()


@pytest.mark.parametrize("name", list(TASKS))
def test_sampler(benchmark, name):
    benchmark.group = "samplers"
    task = make_task(name, D)
    benchmark(sample_batch, task, B, N, seed=0, step=0)


@pytest.mark.parametrize("sample", [sample_loop, sample_ours])
def test_tree_sampler(benchmark, sample):
    benchmark.group = "tree sampler"
    benchmark(sample)


@pytest.mark.parametrize("evaluate", [evaluate_loop, evaluate_ours])
def test_tree_evaluation(benchmark, tree_batch, evaluate):
    benchmark.group = "tree evaluation"
    benchmark(evaluate, *tree_batch)


def test_drawing_points_alone(benchmark):
    """What no sampler can undercut: the normal numbers of xs."""
    benchmark.group = "tree sampler"
    benchmark(torch.randn, B, N, D)


def test_trees_cost_a_fraction_of_the_loop(benchmark, tree_batch, capsys):
    """Prints the ratios; the values must agree."""
    assert torch.equal(evaluate_ours(*tree_batch), evaluate_loop(*tree_batch))
    functions = (
        sample_loop,
        sample_ours,
        lambda: evaluate_loop(*tree_batch),
        lambda: evaluate_ours(*tree_batch),
        lambda: torch.randn(B, N, D),
    )
    loop, ours, loop_evaluation, our_evaluation, points = benchmark.pedantic(
        median_times, args=functions, rounds=1
    )
    ratios = {
        "whole sampler / loop": ours / loop,
        "tree evaluation / loop": our_evaluation / loop_evaluation,
        "randn of xs / loop": points / loop,
    }
    benchmark.extra_info.update(ratios)
    with capsys.disabled():
        print(f"\nB = {B}, n = {N}, d = {D}, depth {DEPTH}; {torch.get_num_threads()} threads")
        print(f"loop: {loop * 1e3:.2f} ms, ours: {ours * 1e3:.3f} ms")
        print(f"evaluation: {loop_evaluation * 1e3:.2f} ms, ours: {our_evaluation * 1e3:.3f} ms")
        for name, ratio in ratios.items():
            print(f"{name}: {ratio:.2%}")
    assert ratios["whole sampler / loop"] < 0.5
