"""The host code of the Triton backend can be captured in a CUDA graph; see ``fake_graphs``."""

import pytest
import torch

pytest.importorskip("triton")

from conftest import cast, loop_inputs
from fake_graphs import Recorder
from looped_fast.kernels.backward import loop_backward
from looped_fast.kernels.forward import loop_forward
from looped_fast.kernels.launch import recording

from looped_fast.config import INJECTIONS

N_HEADS, N_LOOPS, WINDOW = 4, 4, 3


def recorded(injection, operand, checkpoint, attention):
    """Operations and launches of one forward and backward; no kernel runs."""
    inputs = cast(loop_inputs(B=2, S=10, D=64, n_layer=2), torch.float32)
    read_out = [torch.randn(1, 64), torch.randn(1)]
    tensors = (
        inputs["embeddings"], inputs["positions"], inputs["state"], inputs["weights"], read_out,
    )  # fmt: skip
    keep = checkpoint == "none"
    with Recorder() as recorder, recording(execute=False) as launches:
        predictions, history = loop_forward(
            *tensors, N_HEADS, N_LOOPS, WINDOW, injection, operand, attention, keep, True, True
        )
        loop_backward(
            torch.empty_like(predictions), predictions, history, *tensors, N_HEADS, N_LOOPS,
            WINDOW, injection, attention,
        )  # fmt: skip
    return recorder.shapes(), launches


@pytest.mark.parametrize(
    ("operand", "attention"),
    [
        (torch.float32, "triton"),
        (torch.bfloat16, "triton"),
        (torch.float16, "triton"),
        (torch.bfloat16, "sdpa"),
    ],
)
@pytest.mark.parametrize("checkpoint", ["none", "state"])
@pytest.mark.parametrize("injection", INJECTIONS)
def test_it_looks_at_no_value_and_does_the_same_every_time(
    injection, operand, checkpoint, attention
):
    shapes, launches = recorded(injection, operand, checkpoint, attention)
    assert shapes
    assert launches
    assert recorded(injection, operand, checkpoint, attention) == (shapes, launches)
