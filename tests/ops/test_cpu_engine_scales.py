"""The CPU engine is as accurate as plain PyTorch at any scale of inputs and weights.

Errors are those of whole tensors, in the Euclidean norm, and medians over seeds: at the scale where
a loop amplifies rounding, one draw decides little.
"""

from __future__ import annotations

import statistics

import pytest
import torch
from conftest import FP32_EPS, cast, leaves, loop_inputs, require_grad

from looped_fast import ops
from looped_fast.ops import cpu_engine
from looped_fast.ops.block import GPT2, block_names

if cpu_engine.load_error():
    pytest.skip(cpu_engine.load_error(), allow_module_level=True)

PRECISIONS = ["fp32", "bf16"]
NAMES = block_names(GPT2)
FIELDS = {name: i for i, name in enumerate(NAMES)}
MATRICES = ("c_attn_weight", "attn_c_proj_weight", "c_fc_weight", "mlp_c_proj_weight")
SEEDS = 9


def scaled(names, factor):
    """Change ``loop_inputs``: multiply inputs, or weights of the block, by a factor."""

    def change(inputs):
        for name in names:
            if name in inputs:
                inputs[name] = inputs[name] * factor
            else:
                inputs["weights"][FIELDS[name]] = inputs["weights"][FIELDS[name]] * factor

    return change


def steep(factor):
    """Change ``loop_inputs``: queries and keys times ``factor``, scores times its square."""

    def change(inputs):
        weight = inputs["weights"][FIELDS["c_attn_weight"]]
        weight[: 2 * len(weight) // 3] *= factor

    return change


def results(inputs, grad, dtype, **settings):
    """Predictions, and gradients of every tensor."""
    inputs = require_grad(cast(inputs, dtype))
    tensors = leaves(inputs)
    predictions = ops.loop(**inputs, n_loops=3, window=2, **settings)
    grads = torch.autograd.grad(
        predictions, list(tensors.values()), grad.to(dtype), allow_unused=True
    )
    named = {name: g for name, g in zip(tensors, grads, strict=True) if g is not None}
    return {"predictions": predictions.detach(), **named}


def error(value, truth):
    """Relative error, or absolute if the truth is 0; infinite with NaN."""
    difference, norm = (value.double() - truth).norm(), truth.norm()
    return (difference / norm if norm else difference).nan_to_num(torch.inf).item()


def assert_as_good_as_plain(change, precision, n_heads=4, injection="add", seeds=SEEDS, **sizes):
    if reason := cpu_engine.unsupported_precision(precision):
        pytest.skip(reason)
    settings = {"n_heads": n_heads, "injection": injection}
    fast, plain = {}, {}
    for seed in range(seeds):
        torch.manual_seed(seed)
        inputs = loop_inputs(**{"B": 2, "S": 26, "D": 64, "n_outputs": 1, **sizes})
        change(inputs)
        inputs = cast(cast(inputs, torch.float32), torch.float64)
        B, S, _ = inputs["embeddings"].shape
        grad = torch.randn(2, B, S // 2, 1)
        truth = results(inputs, grad, torch.float64, **settings, backend="reference")
        for errors, backend in ((fast, "cpu"), (plain, "reference")):
            found = results(
                inputs, grad, torch.float32, **settings, backend=backend, precision=precision
            )
            for name, value in found.items():
                errors.setdefault(name, []).append(error(value, truth[name]))
    for name in fast:
        limit = 2 if name == "predictions" else 3
        ours, theirs = statistics.median(fast[name]), statistics.median(plain[name])
        assert ours <= limit * theirs + 4 * FP32_EPS, name


@pytest.mark.parametrize("factor", [1e-6, 1e-2, 1e2, 1e4, 1e6])
@pytest.mark.parametrize("injection", ["add", "mul", "every_block"])
@pytest.mark.parametrize("precision", PRECISIONS)
def test_embeddings_of_any_scale(precision, injection, factor):
    assert_as_good_as_plain(scaled(["embeddings"], factor), precision, injection=injection)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_first_state_of_any_scale(precision):
    assert_as_good_as_plain(scaled(["state"], 1e6), precision, injection="none")


@pytest.mark.parametrize("precision", PRECISIONS)
def test_large_embeddings_of_wide_and_long_and_of_deep_models(precision):
    large = scaled(["embeddings"], 1e6)
    assert_as_good_as_plain(large, precision, n_heads=8, seeds=1, D=192, S=202)
    assert_as_good_as_plain(large, precision, n_layer=2)


@pytest.mark.parametrize("factor", [0, 1e-42, 1e-38, 1e-20, 1e-3, 10, 1e3])
@pytest.mark.parametrize("precision", PRECISIONS)
def test_matrices_of_any_scale(precision, factor):
    """Denormal ones too; at 1000, scores are in the millions and attention picks one token."""
    assert_as_good_as_plain(scaled(MATRICES, factor), precision)


@pytest.mark.parametrize("factor", [0, 1e-40, 1e3])
@pytest.mark.parametrize("name", ["ln_1_weight", *MATRICES, "ln_2_weight"])
@pytest.mark.parametrize("precision", PRECISIONS)
def test_one_weight_of_any_scale(precision, name, factor):
    assert_as_good_as_plain(scaled([name], factor), precision)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_weights_that_are_all_zero(precision):
    assert_as_good_as_plain(scaled(NAMES, 0), precision)


@pytest.mark.parametrize(
    ("S", "factor"), [(26, 3), (26, 10), (26, 30), (26, 100), (300, 3), (300, 10), (300, 30)]
)
@pytest.mark.parametrize("precision", PRECISIONS)
def test_attention_whose_rows_are_nearly_one_hot(precision, S, factor):
    """Scores are from tens to tens of thousands; 300 keys come in two chunks."""
    assert_as_good_as_plain(steep(factor), precision, S=S)


@pytest.mark.parametrize("factor", [1e9, 1e12, 1e15])
@pytest.mark.parametrize("precision", PRECISIONS)
def test_hidden_units_whose_cube_overflows(precision, factor):
    assert_as_good_as_plain(scaled(["c_fc_weight"], factor), precision)


@pytest.mark.parametrize("factor", [1e6, 1e9])
@pytest.mark.parametrize("precision", PRECISIONS)
def test_scores_beyond_all_precision_give_finite_predictions(precision, factor):
    """Neighbouring floats are further apart than probabilities are from each other."""
    if reason := cpu_engine.unsupported_precision(precision):
        pytest.skip(reason)
    inputs = cast(loop_inputs(D=64, n_outputs=1), torch.float32)
    scaled(MATRICES, factor)(inputs)
    arguments = {"n_heads": 4, "n_loops": 3, "window": 2, "precision": precision}
    assert ops.loop(**inputs, **arguments, backend="cpu").isfinite().all()
