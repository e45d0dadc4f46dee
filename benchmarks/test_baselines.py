"""Regression timings of the baselines on a few prompts: ``pytest benchmarks --benchmark-only``.

``python -m benchmarks.baselines`` measures a whole figure, and the loop over prompts.
"""

import pytest

from benchmarks.baseline_loops import LOOPS, one_by_one
from benchmarks.baselines import figure_prompts, warm_up
from looped_fast.evaluation.baselines import BASELINES

POINTS, DIMS = 41, 20


@pytest.mark.parametrize("name", list(LOOPS))
def test_baseline(benchmark, name):
    benchmark.group = name
    prompts = figure_prompts(name, 4, POINTS, DIMS)
    warm_up(name, prompts)
    benchmark.pedantic(BASELINES[name], args=prompts, rounds=3)


@pytest.mark.parametrize("name", list(LOOPS))
def test_loop_over_prompts(benchmark, name):
    benchmark.group = name
    prompts = figure_prompts(name, 1, POINTS, DIMS)
    warm_up(name, prompts)
    benchmark.pedantic(one_by_one, args=(LOOPS[name], *prompts, [10, 20, 40]), rounds=3)
