"""The host code of the Triton backend can be captured in a CUDA graph; see ``fake_graphs``."""

import after_norm_cases
import pytest
import torch
from conftest import NO_TRITON, cast, loop_inputs

if NO_TRITON:
    pytest.skip(NO_TRITON, allow_module_level=True)

from fake_graphs import Recorder
from looped_fast.kernels.backward import loop_backward
from looped_fast.kernels.forward import loop_forward
from looped_fast.kernels.launch import recording

from looped_fast.config import INJECTIONS
from looped_fast.ops.call import LoopSettings

N_HEADS, N_LOOPS, WINDOW = 4, 4, 3


def recorded(injection, precision, recompute, attention):
    """Operations and launches of one forward and backward; no kernel runs."""
    inputs = cast(loop_inputs(B=2, S=10, D=64, n_layer=2), torch.float32)
    read_out = [torch.randn(1, 64), torch.randn(1)]
    settings = LoopSettings(
        N_HEADS, N_LOOPS, WINDOW, injection, precision, recompute, attention=attention
    )
    return recorded_with(inputs, read_out, settings)


def recorded_with(inputs, read_out, settings):
    """Operations and launches, of inputs in fp32."""
    tensors = (
        inputs["embeddings"], inputs["positions"], inputs["state"], inputs["weights"], read_out,
    )  # fmt: skip
    keep = not settings.recompute
    with Recorder() as recorder, recording(execute=False) as launches:
        predictions, saved = loop_forward(*tensors, settings, keep, True, True)
        wanted = [True] * (3 + len(inputs["weights"]) + len(read_out))
        loop_backward(torch.empty_like(predictions), saved, *tensors, settings, wanted)
    return recorder.shapes(), launches


@pytest.mark.parametrize(
    ("precision", "attention"),
    [
        ("fp32", "triton"),
        ("bf16", "triton"),
        ("fp16", "triton"),
        ("bf16", "sdpa"),
    ],
)
@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("injection", INJECTIONS)
def test_it_reads_no_value_on_the_host_and_does_the_same_every_time(
    injection, precision, recompute, attention
):
    shapes, launches = recorded(injection, precision, recompute, attention)
    assert shapes
    assert launches
    assert recorded(injection, precision, recompute, attention) == (shapes, launches)


@pytest.mark.parametrize("attention", ["triton", "sdpa"])
@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("injection", INJECTIONS)
@pytest.mark.parametrize("positions", ["rotary", "none"])
def test_the_kernels_of_trms_block_are_captured_likewise(
    positions, injection, recompute, attention
):
    inputs = after_norm_cases.loop_inputs(S=10, n_layer=2, positions=positions)
    settings = LoopSettings(
        **after_norm_cases.settings_of(inputs, n_loops=N_LOOPS, window=WINDOW),
        injection=injection, precision="bf16", recompute=recompute, attention=attention,
    )  # fmt: skip
    given = {name: value for name, value in inputs.items() if value is not None}
    inputs = {"positions": None, **cast(given, torch.float32)}
    shapes, launches = recorded_with(inputs, [], settings)
    assert shapes
    assert launches
    assert recorded_with(inputs, [], settings) == (shapes, launches)
