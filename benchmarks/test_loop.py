"""Regression timings: ``pytest benchmarks --benchmark-only`` (``--benchmark-compare``: with a run).

Each runs on the default backend, and a training step takes the loss that the trainer takes.
"""

import dataclasses

import pytest

from benchmarks.cases import CASES, Contender
from benchmarks.workload import Workload

# The looped models at the paper's width and lengths, with few loops: time is linear in them.
LR = dataclasses.replace(CASES["lr"], batch=16, n_loops=4, window=3)
DT = dataclasses.replace(CASES["dt"], batch=16, n_loops=4, window=3)


@pytest.fixture(params=["fp32", "bf16"])
def default(request):
    return Contender("auto", request.param, fused_loss=True)


@pytest.mark.parametrize("case", [LR, DT], ids=["lr", "dt"])
def test_forward(benchmark, case, default):
    benchmark(Workload(case, default, "inference"))


@pytest.mark.parametrize("case", [LR, DT], ids=["lr", "dt"])
def test_training_step(benchmark, case, default):
    benchmark(Workload(case, default, "training"))


@pytest.mark.parametrize("case", [CASES["lr_b1"], CASES["dt_b1"]], ids=["lr", "dt"])
def test_latency_of_one_sequence(benchmark, case, default):
    benchmark(Workload(case, default, "inference"))
