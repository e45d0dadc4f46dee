"""``TinyRecursiveModel`` against recorded steps of the public code, and against plain PyTorch."""

from __future__ import annotations

import contextlib

import pytest
import torch
from golden_cases import assert_as_good_as_plain
from trm_cases import (
    CASES,
    assert_equal,
    load_case,
    model_of,
    our_results,
    plain_results,
    random_case,
)

from looped_fast.ops import cpu_engine

BACKENDS = ("reference", "cpu")
PRECISIONS = {"fp32": contextlib.nullcontext, "bf16": lambda: torch.autocast("cpu", torch.bfloat16)}


def skip_without_engine(backend, precision):
    if backend == "cpu" and (reason := cpu_engine.unsupported_precision(precision)):
        pytest.skip(reason)


@pytest.mark.parametrize("name", CASES)
def test_float64_is_that_of_the_public_code(name):
    case = load_case(name)
    assert_equal(our_results(case, torch.float64, "reference"), case.results, 1e-10)


@pytest.mark.parametrize("name", CASES)
def test_the_yardstick_is_the_public_code(name):
    case = load_case(name)
    # It rounds halting to float32 as the public code does, after a sum in another order.
    assert_equal(plain_results(case, torch.float64), case.results, 1e-6)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", CASES)
def test_low_precision_is_as_good_as_plain_pytorch(name, backend, precision):
    case = load_case(name)
    skip_without_engine(backend, precision)
    with PRECISIONS[precision]():
        plain = plain_results(case, torch.float32)
        ours = our_results(case, torch.float32, backend)
    assert_as_good_as_plain(case, ours, plain, case.results)


# An error may grow from step to step, so it is looked at after few and many.
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("cycles", [(1, 1), (1, 6), (2, 3), (3, 6)])
def test_any_schedule_is_as_good_as_plain_pytorch(cycles, backend, precision):
    case = random_case(H_cycles=cycles[0], L_cycles=cycles[1])
    skip_without_engine(backend, precision)
    with PRECISIONS[precision]():
        plain = plain_results(case, torch.float32)
        ours = our_results(case, torch.float32, backend)
    for results in (ours, plain, case.results):
        del results["loss"]  # a sum of the others' signed errors: its own is a matter of chance
        # Both heads read one state. Halting does so at one token, so chance decides its error.
        heads = results.pop("logits"), results.pop("q_halt")
        results["heads"] = torch.cat([head.double().flatten() for head in heads])
    assert_as_good_as_plain(case, ours, plain, case.results)


@pytest.mark.parametrize(
    "settings",
    [
        {"pos_encodings": "none", "L_layers": 3},
        {"pos_encodings": "learned", "expansion": 7.0},
        {"rope_theta": 100.0, "rms_norm_eps": 0.1, "num_heads": 8},
    ],
    ids=lambda settings: ", ".join(settings),
)
def test_each_setting_has_the_effect_that_it_has_in_plain_pytorch(settings):
    case = random_case(H_cycles=2, L_cycles=2, **settings)
    assert_equal(our_results(case, torch.float64, "reference"), case.results, 1e-6)


@pytest.mark.filterwarnings("ignore:TinyRecursiveModel runs module by module")
@pytest.mark.parametrize("name", CASES)
def test_module_by_module_it_computes_the_same(name):
    case = load_case(name)
    model = model_of(case, torch.float64, "reference")
    model.L_level.register_forward_hook(lambda *_: None)
    ours = our_results(case, torch.float64, "reference", model)
    assert model.deviations()
    assert_equal(ours, case.results, 1e-10)


def test_recomputing_gives_the_same_gradients():
    case = load_case("trm_tiny")
    model = model_of(case, torch.float64, "reference")
    model.recompute = True
    assert_equal(our_results(case, torch.float64, "reference", model), case.results, 1e-10)
