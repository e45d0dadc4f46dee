"""Accuracy of the interpreted backward against float64, by DESIGN.md's rule."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from conftest import FP32_EPS, NO_TRITON, cast, leaves, loop_inputs, require_grad
from torch import Tensor

from looped_fast import ops
from looped_fast.ops import reference
from looped_fast.ops.block import GPT2, block_names

if NO_TRITON:
    pytest.skip(NO_TRITON, allow_module_level=True)

from looped_fast.kernels import backward, trial, weight_gradients
from looped_fast.kernels.candidates import Config
from looped_fast.kernels.launch import recording

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def run(inputs: dict[str, Any], grad: Tensor, dtype: torch.dtype, **arguments: Any):
    """Name -> result and the gradient of every tensor, for ``(result * grad).sum()``."""
    inputs = require_grad(cast(inputs, dtype))
    result = ops.loop(**{"state": None, **inputs}, **arguments)
    tensors = leaves(inputs)
    grads = torch.autograd.grad(result, list(tensors.values()), grad.to(dtype), allow_unused=True)
    return {"result": result.detach()} | dict(zip(tensors, grads, strict=True))


def interpreted(inputs: dict[str, Any], grad: Tensor, **arguments: Any):
    return run(inputs, grad, torch.float32, **arguments, backend="triton", attention="triton")


def check(inputs: dict[str, Any], precision: str, recompute: bool = False, **arguments: Any):
    """The kernels' error is at most 2x (gradients 3x) plain PyTorch's, plus fp32 rounding."""
    B, S, D = inputs["embeddings"].shape
    shape = ((S + 1) // 2, len(inputs["read_out"][1])) if "read_out" in inputs else (S, D)
    grad = torch.randn(arguments["window"], B, *shape, dtype=torch.float64)
    plainly = {**arguments, "backend": "reference"}
    truth = run(inputs, grad, torch.float64, precision="fp32", **plainly)
    plain = run(inputs, grad, torch.float32, precision=precision, **plainly)
    fast = interpreted(inputs, grad, recompute=recompute, precision=precision, **arguments)
    for name, exact in truth.items():
        if exact is None:
            assert fast[name] is None, name
            continue
        plain_error, error = (
            ((result[name].double() - exact).norm() / exact.norm()).item()
            for result in (plain, fast)
        )
        factor = 2 if name == "result" else 3
        assert error <= factor * plain_error + 4 * FP32_EPS, (
            f"{name}: error {error:.1e}, plain PyTorch {plain_error:.1e}"
        )


@pytest.mark.parametrize(
    ("injection", "n_layer", "precision", "n_loops", "window", "recompute"),
    [
        ("add", 1, "fp32", 2, 2, False),
        ("add", 2, "bf16", 3, 2, False),
        ("mul", 1, "bf16", 3, 2, False),
        ("mul", 2, "fp32", 2, 2, True),
        ("none", 1, "fp16", 2, 1, True),
        ("none", 2, "fp32", 2, 2, False),
        ("every_block", 1, "bf16", 3, 2, True),
        ("every_block", 2, "fp16", 2, 2, False),
    ],
)
def test_gradients_are_as_accurate_as_plain_pytorch(
    injection, n_layer, precision, n_loops, window, recompute
):
    inputs = loop_inputs(B=2, S=11, D=64, n_layer=n_layer)
    check(
        inputs, precision, recompute, n_heads=2, n_loops=n_loops, window=window,
        injection=injection,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("injection", "n_layer", "n_loops", "window", "recompute", "n_outputs", "starts"),
    [
        ("add", 1, 3, 2, False, 1, "from a state"),
        ("add", 2, 2, 2, True, 2, "without a state"),
        ("mul", 1, 3, 2, False, 1, "without a state"),
        ("mul", 1, 2, 2, True, 3, "from a state"),
        ("mul", 1, 2, 2, False, 1, "without a state"),
        ("none", 2, 1, 1, False, 1, "without a state"),
        ("every_block", 1, 2, 1, False, 2, "from a state"),
    ],
)
def test_gradients_of_predictions_are_as_accurate_as_plain_pytorch(
    injection, n_layer, n_loops, window, recompute, n_outputs, starts
):
    inputs = loop_inputs(B=2, S=11, D=64, n_layer=n_layer, n_outputs=n_outputs)
    if starts == "without a state":
        del inputs["state"]
    check(
        inputs, "bf16", recompute, n_heads=2, n_loops=n_loops, window=window,
        injection=injection,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("B", "S", "D", "n_heads"),
    [
        (1, 1, 64, 4),
        (1, 32, 64, 1),  # rows fill their programs
        (5, 13, 64, 4),  # several programs, the last partly filled
        (1, 9, 128, 4),
    ],
)
def test_any_number_of_rows_is_accurate(B, S, D, n_heads):
    inputs = loop_inputs(B=B, S=S, D=D)
    check(inputs, "bf16", n_heads=n_heads, n_loops=1, window=1, injection="add")


@pytest.mark.slow
@pytest.mark.parametrize(("precision", "n_loops"), [("bf16", 4), ("bf16", 9), ("fp32", 9)])
def test_accuracy_holds_over_many_loops(precision, n_loops):
    """Gradients through T and b steps; most tests have one or two."""
    inputs = loop_inputs(B=1, S=10, D=64)
    window = min(4, n_loops)
    check(inputs, precision, n_heads=2, n_loops=n_loops, window=window, injection="add")


def small_problem(**changes: Any) -> tuple[dict[str, Any], Tensor, dict[str, Any]]:
    arguments = {
        "n_heads": 2, "n_loops": 3, "window": 3, "injection": "add", "precision": "bf16", **changes
    }  # fmt: skip
    inputs = loop_inputs(B=1, S=9, D=64)
    return inputs, torch.randn(arguments["window"], 1, 9, 64), arguments


def test_weight_gradients_do_not_depend_on_chunks(monkeypatch):
    inputs, grad, arguments = small_problem()
    whole = interpreted(inputs, grad, **arguments)
    step_bytes = 13 * 64 * 9 * 2  # widths, rows, bytes
    monkeypatch.setattr(weight_gradients, "CHUNK_BYTES", 2 * step_bytes)  # 2 steps, then 1
    with recording() as launches:
        chunked = interpreted(inputs, grad, **arguments)
    n_rows_launches = sum(launch.name == "row_backward_kernel" for launch in launches)
    assert n_rows_launches == 3 + 2  # one per step, and one more per chunk
    for name, expected in whole.items():
        error = (chunked[name] - expected).norm() / expected.norm()
        assert error <= 4 * FP32_EPS, name


def test_recomputed_activations_give_the_same_gradients():
    inputs, grad, arguments = small_problem(injection="mul", window=2)
    kept = interpreted(inputs, grad, recompute=False, **arguments)
    recomputed = interpreted(inputs, grad, recompute=True, **arguments)
    for name, expected in kept.items():
        if expected is None:
            assert recomputed[name] is None
        else:
            error = (recomputed[name] - expected).norm() / expected.norm()
            assert error <= 4 * FP32_EPS, name  # sums of weight gradients in another order


def test_the_backward_repeats_bit_for_bit():
    inputs, grad, arguments = small_problem(n_loops=1, window=1)
    first, second = (interpreted(inputs, grad, **arguments) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_a_trial_of_configurations_leaves_the_gradients_alone(monkeypatch):
    inputs, grad, arguments = small_problem(injection="mul", n_loops=2, window=1)
    expected = interpreted(inputs, grad, **arguments)
    chosen, timed = backward.choose, []

    def choose(kernel, *, run, precision, **problem):
        config = chosen(kernel, run=run, precision=precision, **problem)
        trial.fastest([Config(16, 32, 32), config], run, precision)
        return config

    def milliseconds(calls):
        timed.extend(calls)
        return [1.0] * len(calls)

    monkeypatch.setattr(backward, "choose", choose)
    monkeypatch.setattr(trial, "milliseconds", milliseconds)
    grads = interpreted(inputs, grad, **arguments)
    assert len(timed) == 2
    for name, value in expected.items():
        assert value is None or torch.equal(grads[name], value), name


def test_folded_gradients_unfold_into_those_of_the_parameters():
    D = 64
    block = reference.BlockWeights.of(
        [w.requires_grad_() for w in loop_inputs(D=D)["weights"][:12]]
    )
    folded = [
        block.c_attn_weight * block.ln_1_weight,
        block.c_attn_bias + block.c_attn_weight @ block.ln_1_bias,
        block.attn_c_proj_weight, block.attn_c_proj_bias,
        block.c_fc_weight * block.ln_2_weight,
        block.c_fc_bias + block.c_fc_weight @ block.ln_2_bias,
        block.mlp_c_proj_weight, block.mlp_c_proj_bias,
    ]  # fmt: skip
    grads = [torch.randn_like(t) for t in folded]
    names = block_names(GPT2)
    expected = torch.autograd.grad(folded, [getattr(block, name) for name in names], grads)
    with torch.no_grad():
        unfolded = weight_gradients.unfold(block, grads[::2], grads[1::2])
    for name, value, truth in zip(names, unfolded, expected, strict=True):
        torch.testing.assert_close(value, truth, rtol=1e-12, atol=1e-12, msg=name)
