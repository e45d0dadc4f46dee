"""Launching kernels, recording launches, and how many a loop step takes."""

import pytest
import torch
from conftest import NO_TRITON

if NO_TRITON:
    pytest.skip(NO_TRITON, allow_module_level=True)

import triton
import triton.language as tl
from looped_fast.kernels.candidates import Config
from looped_fast.kernels.launch import launch, recording

from benchmarks.kernel_launches import Loop, launches_of
from looped_fast.config import INJECTIONS


@triton.jit(do_not_specialize=["N"])
def scale_kernel(x, bias, out, factor, N, D: tl.constexpr, ROWS: tl.constexpr):
    i = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    y = tl.load(x + i, mask=i < N) * factor
    if bias is not None:
        y += tl.load(bias + i, mask=i < N)
    tl.store(out + i, y, mask=i < N)


def scale(x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    out = torch.empty_like(x)
    launch(scale_kernel, (2,), x, bias, out, 3.0, x.numel(), config=Config(16), D=7)
    return out


def test_a_launch_computes_and_takes_its_tile_from_the_config() -> None:
    x, bias = torch.randn(20), torch.randn(20)
    torch.testing.assert_close(scale(x, bias), 3 * x + bias)
    torch.testing.assert_close(scale(x, None), 3 * x)


def test_a_record_has_what_machine_code_depends_on() -> None:
    x = torch.randn(40, dtype=torch.float16)[3:]
    with recording() as launches:
        scale(x, None)
    (record,) = launches
    assert record.name == "scale_kernel"
    assert record.types == {"x": "*fp16", "out": "*fp16", "factor": "fp32", "N": "i32"}
    assert record.aligned == {"out"}  # x starts 6 bytes in; N is not specialised
    assert record.constexprs == {"bias": None, "D": 7, "ROWS": 16}
    assert record.config == Config(16)
    assert record.grid == (2,)


def test_recording_can_leave_out_the_computation_and_ends_with_its_block() -> None:
    x = torch.ones(20)
    with recording(execute=False) as outer:
        out = scale(x, None)
        with recording() as inner:
            scale(x, None)
    scale(x, None)
    assert len(outer) == len(inner) == 1
    assert out.isnan().all()  # poisoned by conftest.py, and not written


@pytest.mark.parametrize("injection", INJECTIONS)
@pytest.mark.parametrize("n_layer", [1, 2])
def test_two_launches_per_block_and_step(injection: str, n_layer: int) -> None:
    def count(n_loops: int, window: int) -> tuple[int, int]:
        loop = Loop(injection, n_layer, n_loops, window)
        forward, backward = launches_of(loop, "bf16", 2, 6, 64, 16)
        return len(forward), len(backward)

    forward, backward = count(n_loops=4, window=2)
    longer_forward, same_backward = count(n_loops=5, window=2)
    _, wider_backward = count(n_loops=4, window=3)
    assert longer_forward - forward == 2 * n_layer
    assert same_backward == backward
    assert wider_backward - backward == 2 * n_layer


def test_launches_beside_the_steps_do_not_grow_with_them() -> None:
    forward, backward = launches_of(Loop("add", 1, 20, 15), "bf16", 2, 6, 64, 16)
    # one more than two a step: rows before the first attention; and the fold of the weights
    assert len(forward) == 2 * 20 + 2
    assert len(backward) <= 2 * 15 + 2
