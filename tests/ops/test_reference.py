from __future__ import annotations

import pytest
import torch
from conftest import (
    FP32_EPS,
    cast,
    leaves,
    loop_inputs,
    naive_loop,
    relative_error,
    require_grad,
)

from looped_fast.config import INJECTIONS
from looped_fast.ops import reference
from looped_fast.ops.call import LoopSettings


def run(inputs, n_heads, n_loops, window, injection="add", precision="fp32", **other):
    settings = LoopSettings(n_heads, n_loops, window, injection, precision, **other)
    return reference.loop(**inputs, settings=settings)


def test_fresh_memory_is_poisoned_in_tests():
    assert torch.empty(3).isnan().all()
    assert torch.zeros(3).new_empty(2).isnan().all()


@pytest.mark.parametrize("injection", INJECTIONS)
@pytest.mark.parametrize("n_layer", [1, 2])
@pytest.mark.parametrize(("S", "n_heads"), [(6, 4), (7, 1), (1, 2)])
@pytest.mark.parametrize(("n_loops", "window"), [(1, 1), (3, 3), (5, 2)])
def test_the_loop_equals_its_formulas(injection, n_layer, S, n_heads, n_loops, window):
    inputs = loop_inputs(S=S, n_layer=n_layer)
    states = run(inputs, n_heads, n_loops, window, injection)
    expected = naive_loop(inputs, n_heads, n_loops, window, injection)
    assert states.shape == (window, 2, S, 16)
    torch.testing.assert_close(states, expected, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("injection", INJECTIONS)
@pytest.mark.parametrize("n_layer", [1, 2])
@pytest.mark.parametrize(("n_loops", "window"), [(3, 3), (5, 2)])
def test_gradients_equal_truncated_backpropagation_of_the_formulas(
    injection, n_layer, n_loops, window
):
    ours = require_grad(loop_inputs(n_layer=n_layer))
    theirs = require_grad(cast(ours, torch.float64))
    direction = torch.randn(window, 2, 6, 16, dtype=torch.float64)
    run(ours, 2, n_loops, window, injection).backward(direction)
    naive_loop(theirs, 2, n_loops, window, injection).backward(direction)
    for (name, mine), expected in zip(leaves(ours).items(), leaves(theirs).values(), strict=True):
        if expected.grad is None:
            assert mine.grad is None, name
        else:
            torch.testing.assert_close(mine.grad, expected.grad, rtol=1e-9, atol=1e-11, msg=name)


@pytest.mark.parametrize(("n_loops", "window"), [(2, 2), (3, 1)])
def test_state_has_a_gradient_only_where_the_window_covers_every_step(n_loops, window):
    inputs = require_grad(loop_inputs())
    run(inputs, 2, n_loops, window).sum().backward()
    assert (inputs["state"].grad is not None) == (window == n_loops)
    assert all(t.grad is not None for name, t in leaves(inputs).items() if name != "state")


def test_windows_show_the_same_run():
    inputs = loop_inputs()
    every = run(inputs, 2, 5, 5)
    for window in (1, 3):
        assert torch.equal(run(inputs, 2, 5, window), every[-window:])


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
@pytest.mark.parametrize("n_loops", [1, 4, 12])
def test_low_precision_is_as_good_as_autocast(precision, n_loops):
    exact = loop_inputs(B=4, S=12, D=32)
    single = cast(exact, torch.float32)
    truth = naive_loop(cast(single, torch.float64), 4, n_loops, 1)
    dtype = reference.AUTOCAST_DTYPES[precision]
    with torch.autocast("cpu", dtype=dtype):
        plain = relative_error(naive_loop(single, 4, n_loops, 1), truth)
    error = relative_error(run(single, 4, n_loops, 1, precision=precision), truth)
    assert error <= 2 * plain + 8 * FP32_EPS
    assert error > 100 * FP32_EPS  # operands were rounded


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_the_residual_stream_stays_single_precision(precision):
    inputs = loop_inputs(dtype=torch.float32)
    for i in (4, 5, 10, 11):  # both output projections: what remains is the residual stream
        inputs["weights"][i].zero_()
    states = run(inputs, 2, 3, 3, precision=precision)
    assert states.dtype == torch.float32
    assert torch.equal(states, run(inputs, 2, 3, 3))


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_a_cast_from_the_steps_without_gradient_is_not_reused(precision):
    """A cached cast, made under no_grad, would cut the weights off from their gradient."""
    inputs = require_grad(loop_inputs(dtype=torch.float32))
    with torch.autocast("cpu", dtype=reference.AUTOCAST_DTYPES[precision]):
        states = run(inputs, 2, 4, 2, precision=precision)
    states.sum().backward()
    for name, tensor in leaves(inputs).items():
        if name != "state":
            assert tensor.grad is not None, name
            assert tensor.grad.isfinite().all(), name


def test_ambient_autocast_does_not_lower_fp32():
    inputs = loop_inputs(dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        states = run(inputs, 2, 3, 1)
    assert torch.equal(states, run(inputs, 2, 3, 1))


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize(("n_loops", "window"), [(3, 3), (4, 2)])
def test_recomputed_activations_give_the_same_gradients(precision, n_loops, window):
    kept = require_grad(loop_inputs(dtype=torch.float32))
    recomputed = require_grad(cast(kept, torch.float32))
    for inputs, recompute in ((kept, False), (recomputed, True)):
        states = run(inputs, 2, n_loops, window, precision=precision, recompute=recompute)
        states.square().mean().backward()
    pairs = zip(leaves(kept).items(), leaves(recomputed).values(), strict=True)
    for (name, expected), tensor in pairs:
        if name != "state" or window == n_loops:
            assert relative_error(tensor.grad, expected.grad) <= 8 * FP32_EPS, name
