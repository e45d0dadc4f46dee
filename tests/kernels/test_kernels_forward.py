"""Accuracy of the interpreted forward against float64, by DESIGN.md's rule."""

from __future__ import annotations

import pytest
import torch
from conftest import FP32_EPS, NO_TRITON, cast, loop_inputs, naive_loop, relative_error

from looped_fast import ops
from looped_fast.ops import reference
from looped_fast.ops.call import LoopSettings

if NO_TRITON:
    pytest.skip(NO_TRITON, allow_module_level=True)

from looped_fast.kernels import few_rows, forward
from looped_fast.kernels.candidates import Config, candidates
from looped_fast.kernels.fold import fold


@pytest.fixture(autouse=True)
def rows_are_not_few(monkeypatch):
    """Turn off the kernels for few rows, which test_kernels_few_rows tests."""
    monkeypatch.setattr(few_rows, "MAX_ROWS", 0)


OPERANDS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def interpreted(inputs, precision, n_heads, n_loops, window, injection, keep=False):
    """States, or predictions of inputs with a read-out, and what was saved."""
    return forward.loop_forward(
        **{"state": None, "read_out": (), **cast(inputs, torch.float32)},
        settings=LoopSettings(n_heads, n_loops, window, injection, precision, attention="triton"),
        save_activations=keep,
        save_start=keep and window < n_loops,
        save_states=keep and "read_out" in inputs,
    )


def check(inputs, precision, n_heads=1, n_loops=2, window=1, injection="add", keep=False):
    """The error after each step is at most twice plain PyTorch's, plus fp32 rounding."""
    arguments = {"n_heads": n_heads, "n_loops": n_loops, "window": window, "injection": injection}

    def plain_pytorch(dtype, precision):
        given = {"state": None, **cast(inputs, dtype)}
        return ops.loop(**given, **arguments, precision=precision, backend="reference")

    exact, plain = plain_pytorch(torch.float64, "fp32"), plain_pytorch(torch.float32, precision)
    result, saved = interpreted(inputs, precision, **arguments, keep=keep)
    if "read_out" in inputs:
        result = result[:, :, ::2]  # the op reads out only the even tokens
    for w in range(window):
        error, of_plain = (relative_error(s[w], exact[w]) for s in (result, plain))
        assert error <= 2 * of_plain + 4 * FP32_EPS, (
            f"window step {w}: error {error:.1e}, plain PyTorch {of_plain:.1e}"
        )
    return saved


@pytest.mark.parametrize(
    ("injection", "n_layer", "precision", "S"),
    [
        ("add", 1, "bf16", 22), ("add", 2, "fp16", 11), ("mul", 1, "fp32", 11),
        ("mul", 2, "bf16", 7), ("none", 1, "fp16", 22), ("none", 2, "bf16", 11),
        ("every_block", 1, "bf16", 11), ("every_block", 2, "fp32", 7),
    ],
)  # fmt: skip
def test_states_are_as_accurate_as_plain_pytorch(injection, n_layer, precision, S):
    inputs = loop_inputs(B=3, S=S, D=64, n_layer=n_layer)
    check(inputs, precision, n_heads=2, n_loops=3, window=2, injection=injection)


@pytest.mark.parametrize(
    ("injection", "D", "n_outputs"), [("add", 64, 1), ("mul", 128, 2), ("add", 64, 8)]
)
def test_predictions_are_as_accurate_as_plain_pytorch(injection, D, n_outputs):
    inputs = loop_inputs(B=2, S=9, D=D, n_outputs=n_outputs)
    arguments = {"n_heads": 2, "n_loops": 3, "window": 2, "injection": injection}
    saved = check(inputs, "bf16", **arguments, keep=True)
    assert all(tensor.isfinite().all() for tensor in saved)


@pytest.mark.parametrize("injection", ["add", "mul"])
def test_no_state_is_the_neutral_element_of_the_injection(injection):
    inputs = loop_inputs(B=2, S=9, D=64)
    del inputs["state"]
    check(inputs, "bf16", injection=injection)


@pytest.mark.parametrize(("precision", "n_loops"), [("bf16", 30), ("fp32", 10)])
def test_accuracy_holds_over_many_loops(precision, n_loops):
    """States after 1 to 3b steps, which include T and b."""
    check(loop_inputs(B=1, S=9, D=64), precision, n_loops=n_loops, window=n_loops)


@pytest.mark.parametrize(("D", "n_heads"), [(128, 2), (256, 4), (512, 8)])
def test_every_width_is_accurate(D, n_heads):
    check(loop_inputs(B=1, S=7, D=D), "bf16", n_heads=n_heads, n_loops=1)


@pytest.mark.parametrize(
    "tiles", sorted({(c.rows, c.hidden_chunk, c.columns) for c in candidates(
        "row_forward_kernel", "sm_80", 128, "bf16")})
)  # fmt: skip
def test_every_tile_size_is_accurate(tiles, monkeypatch):
    monkeypatch.setattr(forward, "choose", lambda *_, **__: Config(*tiles))
    check(loop_inputs(B=3, S=7, D=128), "bf16", n_heads=2, n_loops=1)


@pytest.mark.parametrize("S", [1, 2])
def test_the_shortest_sequences(S):
    check(loop_inputs(B=1, S=S, D=64), "fp32")


def test_no_sequences_give_no_states():
    states, _ = interpreted(loop_inputs(B=0, S=4, D=64), "bf16", 1, 2, 2, "add", keep=True)
    assert states.shape == (2, 0, 4, 64)


@pytest.mark.parametrize("n_layer", [1, 2])
def test_all_that_is_kept_is_written(n_layer):
    """``empty`` holds NaN in tests, so a slot that is not written shows."""
    inputs = loop_inputs(B=2, S=9, D=64, n_layer=n_layer)
    saved = check(inputs, "bf16", n_loops=3, window=2, injection="mul", keep=True)
    assert saved.qkv.shape == (2 * n_layer, 18, 192)
    assert all(tensor.isfinite().all() for tensor in saved)
    start = naive_loop(inputs, 1, n_loops=1, window=1, injection="mul")[0]
    assert relative_error(saved.start, start) <= 0.01  # a bf16 step


def test_activations_that_are_not_kept_take_one_slot():
    inputs = loop_inputs(B=2, S=9, D=64, n_layer=2)
    _, saved = interpreted(inputs, "bf16", 1, 3, 2, "add")
    assert all(t.numel() == 0 for t in saved[2:])
    settings = LoopSettings(n_heads=1, n_loops=3, window=2)
    scratch = forward.with_scratch(saved, inputs["embeddings"].float(), settings)
    assert scratch.qkv.shape == (1, 18, 192)


@pytest.mark.parametrize("operand", OPERANDS.values(), ids=OPERANDS)
def test_folding_moves_scale_and_shift_into_the_weights(operand):
    D, weights = 64, loop_inputs(D=64, n_layer=2)["weights"]
    folded_weights = torch.empty(2, 12 * D * D, dtype=operand)
    folded_biases = torch.empty(2, 9 * D)
    fold([w.float() for w in weights], folded_weights, folded_biases)
    for block, flat, biases in zip(
        reference.split_weights(weights)[0], folded_weights, folded_biases, strict=True
    ):
        layers = [
            (block.c_attn_weight, block.c_attn_bias, block.ln_1_weight, block.ln_1_bias),
            (block.attn_c_proj_weight, block.attn_c_proj_bias, None, None),
            (block.c_fc_weight, block.c_fc_bias, block.ln_2_weight, block.ln_2_bias),
            (block.mlp_c_proj_weight, block.mlp_c_proj_bias, None, None),
        ]
        expected, expected_biases = [], []
        for weight, bias, scale, shift in layers:
            expected.append((weight if scale is None else weight * scale).flatten())
            expected_biases.append(bias if shift is None else bias + weight @ shift)
        rounded = torch.cat(expected).float().to(operand)
        assert (
            relative_error(flat, torch.cat(expected))
            <= 1.1 * relative_error(rounded, torch.cat(expected)) + FP32_EPS
        )
        assert relative_error(biases, torch.cat(expected_biases)) <= 2 * FP32_EPS
