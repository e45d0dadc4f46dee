"""Accuracy of the interpreted kernels of TRM's block against float64, by DESIGN.md's rule."""

from __future__ import annotations

import pytest
import torch
from after_norm_cases import check, loop_inputs, run, settings_of
from conftest import FP32_EPS, NO_TRITON

from looped_fast import ops

if NO_TRITON:
    pytest.skip(NO_TRITON, allow_module_level=True)

from looped_fast.kernels import backward, forward, weight_gradients
from looped_fast.kernels.candidates import Config, candidates
from looped_fast.kernels.fold import pack
from looped_fast.kernels.launch import recording

from looped_fast.ops.call import LoopSettings

ROW_KERNELS = ("after_norm_forward_kernel", "after_norm_backward_kernel")


@pytest.mark.parametrize(
    ("injection", "positions", "mask", "n_layer", "precision", "n_loops", "window", "recompute"),
    [
        ("add", "rotary", "full", 1, "fp32", 2, 2, False),
        ("add", "rotary", "full", 2, "bf16", 3, 2, False),
        ("add", "none", "causal", 2, "fp16", 2, 1, True),
        ("mul", "rotary", "causal", 2, "bf16", 3, 2, False),
        ("mul", "none", "full", 1, "fp32", 2, 2, True),
        ("none", "rotary", "full", 2, "fp16", 2, 1, True),
        ("none", "none", "full", 1, "bf16", 1, 1, False),
        ("every_block", "rotary", "causal", 2, "bf16", 3, 2, True),
        ("every_block", "learned", "full", 2, "fp32", 2, 2, False),
        ("none", "learned", "full", 1, "bf16", 2, 2, False),
    ],
)
def test_states_and_gradients_are_as_accurate_as_plain_pytorch(
    injection, positions, mask, n_layer, precision, n_loops, window, recompute
):
    inputs = loop_inputs(n_layer=n_layer, positions=positions)
    check(
        inputs, precision, recompute, injection=injection, mask=mask, n_loops=n_loops,
        window=window,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("B", "S", "D", "n_heads", "hidden"),
    [
        (1, 1, 64, 4, 64),
        (1, 32, 64, 1, 64),  # rows fill their programs; heads of 64
        (5, 13, 64, 2, 192),  # several programs, the last partly filled
        (1, 35, 128, 4, 320),  # attention in more than one tile
    ],
)
def test_any_number_of_rows_heads_and_hidden_units_is_accurate(B, S, D, n_heads, hidden):
    inputs = loop_inputs(B=B, S=S, D=D, n_heads=n_heads, hidden=hidden)
    check(inputs, "bf16", n_heads=n_heads, n_loops=1, window=1, injection="none")


@pytest.mark.slow
@pytest.mark.parametrize(("D", "n_heads", "hidden"), [(256, 8, 768), (512, 8, 1536)])
def test_wide_models_are_accurate(D, n_heads, hidden):
    inputs = loop_inputs(B=1, S=7, D=D, n_heads=n_heads, hidden=hidden)
    check(inputs, "bf16", n_heads=n_heads, n_loops=1, window=1)


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_accuracy_holds_over_many_loops(precision):
    """TRM's own 6 low-level steps, and twice as many."""
    inputs = loop_inputs(B=1, S=9, n_layer=2)
    for n_loops in (6, 12):
        check(inputs, precision, n_loops=n_loops, window=6)


@pytest.mark.parametrize(
    "tiles", sorted({(c.rows, c.hidden_chunk, c.columns) for name in ROW_KERNELS
        for width, precision in ((128, "bf16"), (256, "bf16"), (512, "bf16"), (512, "fp32"))
        for c in candidates(name, "sm_80", width, precision)})
)  # fmt: skip
def test_every_tile_size_is_accurate(tiles, monkeypatch):
    for module in (forward, backward):
        monkeypatch.setattr(module, "choose", lambda *_, **__: Config(*tiles))
    check(loop_inputs(B=3, S=7, n_heads=1), "bf16", n_heads=1, n_loops=2, window=1)


@pytest.mark.parametrize("norm_eps", [1e-6, 0.5])
def test_epsilon_is_the_blocks(norm_eps):
    check(loop_inputs(), "fp32", norm_eps=norm_eps)


def test_attention_of_pytorch_serves_the_block():
    for mask in ("causal", "full"):
        check(loop_inputs(n_layer=2), "bf16", mask=mask, attention="sdpa")


@pytest.mark.parametrize("injection", ["add", "mul"])
def test_no_state_is_the_neutral_element_of_the_injection(injection):
    inputs = {**loop_inputs(), "state": None}
    check(inputs, "bf16", injection=injection, n_loops=2, window=2)


def test_a_block_takes_two_launches_in_each_direction():
    inputs = loop_inputs(n_layer=2)
    settings = settings_of(inputs, n_loops=3, window=3, backend="triton")
    with recording() as launches:
        run(inputs, torch.ones(3, 2, 11, 64), torch.float32, **settings)
    names = [launch.name for launch in launches]
    attention = ("attention_forward_kernel", "attention_backward_kernel")
    for rows, attend in zip(ROW_KERNELS, attention, strict=True):
        assert names.count(attend) == 3 * 2
        assert names.count(rows) == 3 * 2 + 1
    assert len(names) == 2 * (2 * 3 * 2 + 1)  # weights are packed by PyTorch


def test_weight_gradients_do_not_depend_on_chunks(monkeypatch):
    inputs = loop_inputs(B=1, S=9)
    settings = settings_of(inputs, n_loops=3, window=3, backend="triton", precision="bf16")
    grad = torch.randn(3, 1, 9, 64)
    whole = run(inputs, grad, torch.float32, **settings)
    step_bytes = (3 * 64 + 64 + 2 * 128 + 128 + 64) * 9 * 2  # widths, rows, bytes
    monkeypatch.setattr(weight_gradients, "CHUNK_BYTES", 2 * step_bytes)  # 2 steps, then 1
    with recording() as launches:
        chunked = run(inputs, grad, torch.float32, **settings)
    assert sum(launch.name == ROW_KERNELS[1] for launch in launches) == 3 + 2
    for name, expected in whole.items():
        assert (chunked[name] - expected).norm() <= 4 * FP32_EPS * expected.norm(), name


@pytest.mark.parametrize("positions", ["rotary", "none"])
def test_recomputed_activations_give_the_same_gradients(positions):
    inputs = loop_inputs(positions=positions)
    settings = settings_of(inputs, n_loops=3, injection="mul", backend="triton", precision="bf16")
    grad = torch.randn(2, 2, 11, 64)
    kept = run(inputs, grad, torch.float32, recompute=False, **settings)
    recomputed = run(inputs, grad, torch.float32, recompute=True, **settings)
    for name, expected in kept.items():
        if expected is None:
            assert recomputed[name] is None
        else:  # sums of weight gradients in another order
            error = (recomputed[name] - expected).norm() / expected.norm()
            assert error <= 4 * FP32_EPS, name


def test_both_directions_repeat_bit_for_bit():
    inputs = loop_inputs()
    settings = settings_of(inputs, backend="triton", precision="bf16")
    grad = torch.randn(2, 2, 11, 64)
    first, second = (run(inputs, grad, torch.float32, **settings) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("n_layer", [1, 2])
def test_all_that_is_kept_is_written(n_layer):
    """``empty`` holds NaN in tests, so a slot that is not written shows."""
    inputs = loop_inputs(n_layer=n_layer)
    tensors = [inputs[name].float() for name in ("embeddings", "positions", "state")]
    weights = [weight.float() for weight in inputs["weights"]]
    settings = LoopSettings(
        **settings_of(inputs, n_loops=3), injection="mul", precision="bf16", attention="triton"
    )
    states, saved = forward.loop_forward(*tensors, weights, [], settings, True, True, False)
    assert states.isfinite().all()
    assert saved.qkv.shape == (2 * n_layer, 22, 192)
    assert saved.xhatf.shape == (2 * n_layer, 22, 64)
    assert all(tensor.isfinite().all() for tensor in saved)
    assert not any(t.numel() for t in (saved.folded_biases, saved.states, saved.rstd1))


def test_inference_keeps_nothing_but_the_weights():
    inputs = loop_inputs(n_layer=2)
    tensors = [inputs[name].float() for name in ("embeddings", "positions", "state")]
    weights = [weight.float() for weight in inputs["weights"]]
    settings = LoopSettings(**settings_of(inputs, n_loops=3, window=1), attention="triton")
    _, saved = forward.loop_forward(*tensors, weights, [], settings, False, False, False)
    assert all(tensor.numel() == 0 for tensor in saved[1:])


@pytest.mark.parametrize("operand", [torch.float32, torch.bfloat16, torch.float16])
def test_weights_are_packed_side_by_side(operand):
    weights = [weight.float() for weight in loop_inputs(n_layer=2)["weights"]]
    packed = torch.empty(2, 4 * 64 * 64 + 3 * 64 * 128, dtype=operand)
    pack(weights, packed)
    for i, block in enumerate(packed):
        expected = torch.cat([weight.flatten() for weight in weights[4 * i : 4 * i + 4]])
        assert torch.equal(block, expected.to(operand))


def test_an_empty_batch_is_no_error():
    inputs = loop_inputs(B=0)
    settings = settings_of(inputs, backend="triton")
    grads = run(inputs, torch.empty(2, 0, 11, 64), torch.float32, **settings)
    assert grads["states"].shape == (2, 0, 11, 64)
    assert all(grads[f"weights[{i}]"].abs().sum() == 0 for i in range(4))


def test_positions_that_are_rotary_matter_only_by_their_differences():
    """Attention to all tokens with turned queries and keys does not know where the first one is."""
    inputs = loop_inputs(B=1, S=9, n_heads=1)
    frequencies = torch.logspace(0, -2, 32, dtype=torch.float64).repeat(2)

    def states(first: int):
        angles = torch.arange(first, first + 9)[:, None] * frequencies
        tables = torch.stack((angles.cos(), angles.sin())).float()
        arguments = [inputs[name].float() for name in ("embeddings", "state")]
        weights = [weight.float() for weight in inputs["weights"]]
        settings = settings_of(inputs, n_heads=1, backend="triton")
        return ops.loop(arguments[0], tables, arguments[1], weights, **settings)

    torch.testing.assert_close(states(0), states(17), rtol=1e-4, atol=1e-5)
