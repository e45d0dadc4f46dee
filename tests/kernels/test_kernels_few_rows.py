"""Accuracy of the interpreted kernels for few rows against float64, by DESIGN.md's rule."""

from __future__ import annotations

import pytest
from conftest import NO_TRITON, loop_inputs
from test_kernels_forward import check

if NO_TRITON:
    pytest.skip(NO_TRITON, allow_module_level=True)

from looped_fast.kernels.few_rows import MAX_ROWS
from looped_fast.kernels.launch import recording

from benchmarks.kernel_launches import Loop, launches_of

FEW = {"few_rows_output_kernel", "few_rows_project_kernel", "few_rows_input_kernel"}


def check_few(inputs, *args, **kwargs):
    with recording() as launches:
        saved = check(inputs, *args, **kwargs)
    names = {launch.name for launch in launches}
    assert names - {"fold_kernel", "attention_forward_kernel"} == FEW
    return saved


@pytest.mark.parametrize(
    ("seq_len", "training", "recompute", "few"),
    [
        (MAX_ROWS, False, False, True), (MAX_ROWS + 1, False, False, False),
        (10, True, False, False), (10, True, True, True),
    ],
)  # fmt: skip
def test_they_run_where_rows_are_few_and_nothing_is_kept(seq_len, training, recompute, few):
    loop = Loop("add", 1, 3, 1, training=training, recompute=recompute)
    forward, _ = launches_of(loop, "bf16", 1, seq_len, 64, 16)
    rows = {launch.name for launch in forward} - {"fold_kernel", "attention_forward_kernel"}
    assert rows == (FEW if few else {"row_forward_kernel"})


@pytest.mark.parametrize(
    ("injection", "n_layer", "precision", "S", "n_outputs", "window"),
    [
        ("add", 1, "bf16", 17, 1, 1), ("add", 2, "fp32", 11, 2, 2), ("mul", 1, "fp16", 7, 0, 2),
        ("mul", 2, "bf16", 9, 8, 1), ("none", 1, "bf16", 7, 0, 1),
        ("every_block", 2, "bf16", 7, 1, 2),
    ],
)  # fmt: skip
def test_they_are_as_accurate_as_plain_pytorch(injection, n_layer, precision, S, n_outputs, window):
    inputs = loop_inputs(B=2, S=S, D=64, n_layer=n_layer, n_outputs=n_outputs)
    check_few(inputs, precision, n_heads=2, n_loops=3, window=window, injection=injection)


@pytest.mark.parametrize("injection", ["add", "mul"])
def test_no_state_is_the_neutral_element_of_the_injection(injection):
    inputs = loop_inputs(B=1, S=5, D=64)
    del inputs["state"]
    check_few(inputs, "bf16", injection=injection)


@pytest.mark.parametrize(("D", "precision"), [(128, "bf16"), (256, "fp32"), (512, "bf16")])
def test_every_width_is_accurate(D, precision):
    check_few(loop_inputs(B=1, S=7, D=D), precision, n_heads=D // 64, n_loops=1)
