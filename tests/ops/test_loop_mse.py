"""The squared error of the loop's predictions, ``ops.loop_mse``: fused on the CPU engine."""

from __future__ import annotations

import re

import pytest
import torch
from conftest import (
    FP32_EPS,
    cast,
    leaves,
    loop_inputs,
    naive_loop,
    needs_engine,
    prompt,
    relative_error,
    require_grad,
    small_model,
)
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from test_cpu_engine import PRECISIONS, problems
from test_ops import DERIVATIVES, Unused
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn.attention import SDPBackend, sdpa_kernel
from without_coverage import untraced

from looped_fast import LoopedTransformer, ModelConfig, ops
from looped_fast.ops import cpu_engine

ARGUMENTS = {"n_heads": 2, "n_loops": 3, "window": 2}


def targets_of(inputs):
    """Random targets for the inputs."""
    B, S, _ = inputs["embeddings"].shape
    bias = inputs["read_out"][1]
    return torch.randn(B, (S + 1) // 2, len(bias), dtype=bias.dtype)


def mse_of_predictions(inputs, targets, n_supervised=None, **arguments):
    """The error by its definition."""
    predictions = ops.loop(**inputs, **arguments)
    return (predictions[-(n_supervised or 0) :] - targets).square().mean()


def gradients(error, inputs):
    return torch.autograd.grad(error, list(leaves(inputs).values()), allow_unused=True)


@pytest.mark.parametrize("n_supervised", [None, 1])
@pytest.mark.parametrize("S", [5, 6])
def test_it_equals_its_formula(S, n_supervised):
    inputs = loop_inputs(S=S, n_outputs=2)
    targets = targets_of(inputs)
    errors = naive_loop(inputs, 2, 3, 2)[-(n_supervised or 2) :] - targets
    value = ops.loop_mse(**inputs, targets=targets, n_supervised=n_supervised, **ARGUMENTS)
    torch.testing.assert_close(value, errors.square().mean(), rtol=1e-11, atol=1e-11)


@needs_engine
@pytest.mark.parametrize("precision", PRECISIONS)
@settings(max_examples=10, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(problem=problems(), n_supervised=st.integers(1, 4), n_threads=st.integers(1, 3))
@example(  # many short sequences, several to an item, and one item that all threads share
    problem={"B": 67, "S": 11, "D": 64, "n_layer": 1, "n_heads": 8, "n_loops": 3, "window": 2,
             "injection": "add", "n_outputs": 1}, n_supervised=1, n_threads=2,
)  # fmt: skip
@example(  # more outputs than the engine computes itself
    problem={"B": 2, "S": 9, "D": 32, "n_layer": 1, "n_heads": 2, "n_loops": 2, "window": 2,
             "injection": "add", "n_outputs": 9}, n_supervised=2, n_threads=2,
)  # fmt: skip
def test_the_engine_has_the_gradient_of_its_predictions_bit_by_bit(
    precision, problem, n_supervised, n_threads
):
    """The accuracy of predictions is tested with ``ops.loop``."""
    problem = dict(problem)
    problem.pop("recompute", None)
    shape = {k: problem.pop(k) for k in ("B", "S", "D", "n_layer", "n_outputs")}
    inputs = loop_inputs(**shape | {"n_outputs": max(1, shape["n_outputs"])})
    inputs = require_grad(cast(inputs, torch.float32))
    targets = targets_of(inputs)
    arguments = problem | {
        "precision": precision,
        "backend": "cpu",
        "n_supervised": min(n_supervised, problem["window"]),
    }
    before = torch.get_num_threads()
    torch.set_num_threads(n_threads)
    try:
        expected = mse_of_predictions(inputs, targets, **arguments)
        error = ops.loop_mse(**inputs, targets=targets, **arguments)
        pairs = zip(
            leaves(inputs), gradients(expected, inputs), gradients(error, inputs), strict=True
        )
    finally:
        torch.set_num_threads(before)
    assert abs(error - expected) <= 8 * FP32_EPS * expected
    for name, one, other in pairs:
        assert (one is None) == (other is None), name
        assert one is None or torch.equal(one, other), name


@needs_engine
def test_it_repeats_bit_by_bit():
    inputs = require_grad(loop_inputs(B=5, S=23, D=64, dtype=torch.float32, n_outputs=1))
    targets = targets_of(inputs)

    def results():
        error = ops.loop_mse(**inputs, targets=targets, backend="cpu", **ARGUMENTS)
        return [error.detach(), *(g for g in gradients(error, inputs) if g is not None)]

    before = torch.get_num_threads()
    torch.set_num_threads(3)
    first, *others = (results() for _ in range(4))
    torch.set_num_threads(before)
    for other in others:
        assert all(torch.equal(x, y) for x, y in zip(first, other, strict=True))


@needs_engine
def test_a_factor_of_the_error_is_one_of_its_gradient():
    inputs = require_grad(loop_inputs(D=32, dtype=torch.float32, n_outputs=1))
    targets = targets_of(inputs)

    def error():
        return ops.loop_mse(**inputs, targets=targets, backend="cpu", **ARGUMENTS)

    whole, half = gradients(error(), inputs), gradients(0.5 * error(), inputs)
    assert all(torch.equal(0.5 * x, y) for x, y in zip(whole, half, strict=True) if x is not None)


@needs_engine
def test_without_a_gradient_none_is_computed(monkeypatch):
    monkeypatch.setattr(cpu_engine, "loop_mse", lambda *_: pytest.fail("computed gradients"))
    inputs = loop_inputs(D=32, dtype=torch.float32, n_outputs=1)
    targets = targets_of(inputs)
    expected = mse_of_predictions(inputs, targets, backend="cpu", **ARGUMENTS)
    error = ops.loop_mse(**inputs, targets=targets, backend="cpu", **ARGUMENTS)
    assert torch.equal(error, expected)
    require_grad(inputs)
    with torch.no_grad():
        ops.loop_mse(**inputs, targets=targets, backend="cpu", **ARGUMENTS)


@needs_engine
def test_targets_may_want_a_gradient():
    inputs = require_grad(loop_inputs(D=32, dtype=torch.float32, n_outputs=1))
    targets = targets_of(inputs).requires_grad_()
    ops.loop_mse(**inputs, targets=targets, backend="cpu", **ARGUMENTS).backward()
    predictions = ops.loop(**inputs, backend="cpu", **ARGUMENTS)
    expected = 2 * (targets - predictions).sum(0) / predictions.numel()
    assert relative_error(targets.grad, expected) <= 8 * FP32_EPS


@needs_engine
def test_an_empty_batch_is_no_error():
    inputs = require_grad(loop_inputs(B=0, S=4, D=32, dtype=torch.float32, n_outputs=1))
    error = ops.loop_mse(**inputs, targets=targets_of(inputs), backend="cpu", **ARGUMENTS)
    assert error.isnan()  # a mean of nothing, as PyTorch's
    error.backward()
    assert inputs["weights"][2].grad.shape == (96, 32)


@pytest.mark.parametrize(
    ("dtype", "window", "injection", "precision", "n_outputs"),
    [
        (torch.float32, 2, "add", "fp32", 1),
        (torch.float32, 1, "none", "bf16", 2),
        (torch.float32, 1, "mul", "fp32", 9),
        (torch.float64, 1, "every_block", "fp32", 1),
    ],
)
def test_the_op_passes_opcheck(dtype, window, injection, precision, n_outputs):
    inputs = require_grad(loop_inputs(2, 5, 32, 2, dtype, n_outputs))
    settings = (2, 2, window, injection, precision, False, "auto", "auto")
    arguments = (*inputs.values(), targets_of(inputs), 1, *settings)
    untraced(torch.library.opcheck)(torch.ops.looped_fast.loop_mse.default, arguments)


@needs_engine
@pytest.mark.parametrize("precision", PRECISIONS)
def test_the_engines_op_passes_opcheck(precision):
    inputs = require_grad(loop_inputs(2, 5, 32, 1, torch.float32, n_outputs=2))
    weights = [*inputs["weights"], *inputs["read_out"]]
    tensors = (inputs["embeddings"], inputs["positions"], inputs["state"], weights)
    wanted = [True] * (3 + len(weights))
    settings = (2, 3, 2, "mul", precision, "gpt2", 4 * 32, "causal", 1e-5)
    arguments = (*tensors, targets_of(inputs), 1, wanted, *settings)
    torch.library.opcheck(torch.ops.looped_fast.cpu_loop_mse.default, arguments)


@needs_engine
def test_a_second_derivative_is_refused_with_the_remedy():
    inputs = require_grad(loop_inputs(D=32, dtype=torch.float32, n_outputs=1))
    arguments = {**inputs, **ARGUMENTS, "targets": targets_of(inputs)}
    error = ops.loop_mse(**arguments, backend="cpu")
    (first,) = torch.autograd.grad(error, inputs["embeddings"], create_graph=True)
    with pytest.raises(NotImplementedError, match="no second derivatives; use backend='reference'"):
        (error + first.square().sum()).backward()


@needs_engine
def test_an_undefined_gradient_of_the_error_is_none_of_the_inputs():
    inputs = require_grad(loop_inputs(D=32, dtype=torch.float32, n_outputs=1))
    error = ops.loop_mse(**inputs, targets=targets_of(inputs), backend="cpu", **ARGUMENTS)
    assert set(gradients(Unused.apply(error), inputs)) == {None}


@needs_engine
@pytest.mark.parametrize("derivative", DERIVATIVES.values(), ids=DERIVATIVES.keys())
def test_only_the_reference_is_inside_other_derivatives(derivative):
    inputs = loop_inputs(B=1, S=4, D=64, dtype=torch.float32, n_outputs=1)
    targets = targets_of(inputs)

    def error(backend):
        def of(embeddings):
            changed = {**inputs, "embeddings": embeddings}
            return ops.loop_mse(**changed, targets=targets, backend=backend, **ARGUMENTS)

        return of

    with sdpa_kernel(SDPBackend.MATH):
        expected = derivative(error("reference"), inputs["embeddings"])
        assert torch.equal(derivative(error("auto"), inputs["embeddings"]), expected)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"n_supervised": 0}, "n_supervised = 0 is outside 1..2 (window)"),
        ({"n_supervised": 3}, "n_supervised = 3 is outside 1..2 (window)"),
        ({"read_out": ()}, "loop_mse needs a read_out"),
        ({"targets": torch.zeros(2, 6, 1)}, "targets has shape (2, 6, 1); (2, 3, 1) is needed"),
        ({"targets": torch.zeros(2, 3, 1).double()}, "targets is torch.float64 on cpu"),
        ({"window": 4}, "window = 4 is outside 1..3 (n_loops)"),
        ({"precision": "bf61"}, "unknown precision 'bf61'; did you mean 'bf16'?"),
        ({"backend": "refrence"}, "unknown backend 'refrence'; did you mean 'reference'?"),
    ],
)
def test_a_bad_argument_is_refused_with_a_remedy(changes, message):
    inputs = loop_inputs(dtype=torch.float32, n_outputs=1)
    arguments = {**inputs, **ARGUMENTS, "targets": targets_of(inputs), **changes}
    with pytest.raises(ValueError, match=re.escape(message)):
        ops.loop_mse(**arguments)


@pytest.mark.parametrize("n_supervised", [None, 1])
@pytest.mark.parametrize(
    "model",
    [{}, {"n_layer": 2, "n_loops": 1, "window": 1, "injection": "every_block"},
     {"n_loops": 3, "window": 3, "injection": "none"}],
    ids=["looped", "standard", "tied"],
)  # fmt: skip
@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_the_loss_of_a_model_is_that_of_its_predictions(backend, model, n_supervised):
    if backend == "cpu" and (reason := cpu_engine.unsupported_precision("fp32")):
        pytest.skip(reason)
    learner = small_model(n_embd=32, **model)
    learner.backend = backend
    xs, ys = prompt(B=3, n=6)
    results = []
    for loss in (
        learner.loss(xs, ys, n_supervised=n_supervised),
        (learner(xs, ys)[-(n_supervised or 0) :] - ys).square().mean(),
    ):
        learner.zero_grad()
        loss.backward()
        results.append([loss.detach(), *(p.grad for p in learner.parameters())])
    for one, other in zip(*results, strict=True):
        assert torch.equal(one, other) or relative_error(one, other) <= 8 * FP32_EPS


def test_a_compiled_loss_is_one_graph_with_the_same_numbers():
    model = small_model(n_embd=32)
    xs, ys = prompt(B=3, n=6)
    counter = CompileCounterWithBackend("aot_eager")
    torch._dynamo.reset()
    results = []
    for loss in (model.loss, torch.compile(model.loss, backend=counter, fullgraph=True)):
        model.zero_grad()
        loss(xs, ys).backward()
        results.append([p.grad.clone() for p in model.parameters()])
    assert counter.frame_count == 1
    assert all(relative_error(x, y) <= 64 * FP32_EPS for x, y in zip(*results, strict=True))


def test_a_classifier_has_no_squared_error():
    config = ModelConfig(n_dims=3, n_positions=4, n_embd=32, n_head=2, pred_type="classification")
    with pytest.raises(ValueError, match="cross_entropy takes those that a call of the model"):
        LoopedTransformer(config).loss(torch.randn(2, 4, 3), torch.randn(2, 4))
