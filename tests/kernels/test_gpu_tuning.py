"""The choice of configurations by timing on a GPU; other tests run in deterministic mode."""

from __future__ import annotations

import collections
import functools
import json
import math

import pytest
import torch
from conftest import FP32_EPS, NO_TRITON, cast, leaves, loop_inputs, relative_error, require_grad

if NO_TRITON:
    pytest.skip(NO_TRITON, allow_module_level=True)

import triton
import triton.language as tl
from looped_fast.kernels import ahead, attention, trial, tuning
from looped_fast.kernels.candidates import Config
from looped_fast.kernels.launch import Call, launch
from torch import Tensor

from looped_fast import ops
from looped_fast.ops.graphs import CudaGraph

pytestmark = pytest.mark.gpu

KERNELS = {
    "row_forward_kernel", "row_backward_kernel", "attention_forward_kernel",
    "attention_backward_kernel",
}  # fmt: skip
SETTINGS = {"n_heads": 8, "n_loops": 3, "window": 2}


@pytest.fixture(autouse=True)
def untuned(monkeypatch, tmp_path) -> None:
    """Forget earlier choices, and allow timing."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(tuning, "_chosen", {})
    monkeypatch.setattr(ahead, "_done", set())
    torch.use_deterministic_algorithms(False)  # conftest.py's fixture puts it back


def on_device(inputs, device: torch.device):
    moved = {name: t.to(device) for name, t in inputs.items() if name != "weights"}
    return moved | {"weights": [w.to(device) for w in inputs["weights"]]}


def states_and_gradients(inputs, backend: str, precision: str) -> dict[str, Tensor]:
    inputs = require_grad(inputs)
    states = ops.loop(**inputs, **SETTINGS, backend=backend, precision=precision)
    states.square().sum().backward()
    return {"states": states.detach()} | {
        name: t.grad for name, t in leaves(inputs).items() if t.grad is not None
    }


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
@pytest.mark.parametrize("index", [0, 1])
@pytest.mark.parametrize("current", [0, 1])
def test_candidates_are_timed_on_the_tensors_device_and_the_numbers_are_right(
    caplog, index, current, precision
):
    """The numbers are right even in the call that times candidates."""
    if max(index, current) >= torch.cuda.device_count():
        pytest.skip("needs two GPUs")
    inputs = on_device(loop_inputs(B=4, S=82, D=256), torch.device("cuda", index))
    with torch.cuda.device(current):
        truth = states_and_gradients(cast(inputs, torch.float64), "reference", "fp32")
        plain = states_and_gradients(cast(inputs, torch.float32), "reference", precision)
        fast = states_and_gradients(cast(inputs, torch.float32), "triton", precision)
    assert {(kernel, at) for kernel, *_, at in tuning._chosen} == {(k, index) for k in KERNELS}
    assert len(json.loads(tuning.cache_file().read_text())) == len(KERNELS)
    assert [r.message for r in caplog.records if r.levelname == "WARNING"] == []
    for name, exact in truth.items():
        factor = 2 if name == "states" else 3
        limit = factor * relative_error(plain[name], exact) + 4 * FP32_EPS
        error = relative_error(fast[name], exact)
        assert error <= limit, f"{name}: error {error:.1e}, at most {limit:.1e} is right"


def test_a_loop_is_tuned_in_its_warm_up_and_captured_after():
    inputs = cast(on_device(loop_inputs(B=4, S=82, D=256), torch.device("cuda")), torch.float32)
    loop = functools.partial(ops.loop, **inputs, **SETTINGS, backend="triton", precision="bf16")
    graph = CudaGraph(torch.device("cuda"))
    warm = graph.warm_up(loop)
    assert {kernel for kernel, *_ in tuning._chosen} == {k for k in KERNELS if "forward" in k}
    captured = graph.capture(loop)
    graph.replay()
    assert torch.equal(captured, warm)
    assert torch.equal(loop(), warm)


def attention_call(batch: int) -> Call:
    qkv = torch.randn(batch, 82, 768, device="cuda").bfloat16()
    out, lse = qkv.new_empty(batch, 82, 256), torch.empty(batch, 8, 82, device="cuda")
    config = Config(32, columns=32)
    constexprs = {"D": 256, "HEAD_DIM": 32, "TF32": False}
    grid = (8 * batch, triton.cdiv(82, config.rows))
    call = Call(attention.attention_forward_kernel, grid, (qkv, out, lse, 82), config, constexprs)
    call.execute()
    return call


def test_longer_work_takes_longer():
    short, long = trial.milliseconds([attention_call(8), attention_call(2048)])
    assert 0 < short < long / 10  # the short one fits on the GPU at once


@triton.jit
def product_kernel(a, b, out, K, ROWS: tl.constexpr):
    i = tl.arange(0, ROWS)
    total = tl.zeros([ROWS, ROWS], tl.float32)
    for k in range(0, K, ROWS):
        x = tl.load(a + i[:, None] * K + (k + i)[None, :])
        y = tl.load(b + (k + i)[:, None] * ROWS + i[None, :])
        total = tl.dot(x, y, total)
    tl.store(out + i[:, None] * ROWS + i[None, :], total)


def test_a_configuration_without_enough_shared_memory_is_out(caplog):
    a, out = torch.randn(64, 4096, device="cuda").half(), torch.zeros(64, 64, device="cuda")

    def run(config: Config) -> None:
        launch(product_kernel, (1,), a, a.T.contiguous(), out, 4096, config=config)

    good, greedy = Config(64, num_stages=2), Config(64, num_stages=40)
    assert trial.fastest([greedy, good], run, "fp16") == good
    (message,) = caplog.messages
    assert "product_kernel" in message
    assert "OutOfResources" in message
    assert not out.any()  # the trial has tensors of its own


def test_what_is_compiled_ahead_is_not_compiled_again(monkeypatch):
    device = torch.device("cuda", torch.cuda.current_device())
    qkv = torch.randn(4, 82, 768, device=device).bfloat16()
    out, d_qkv = torch.full((4, 82, 256), math.nan, device=device).bfloat16(), torch.zeros_like(qkv)
    lse = torch.full((4, 8, 82), math.nan, device=device)

    def host_code() -> None:
        attention.forward(qkv, out, lse, 8)
        attention.backward(qkv, out, lse, out, d_qkv, 8)

    kernels = [attention.attention_forward_kernel, attention.attention_backward_kernel]
    for kernel in kernels:  # other tests have used them
        nothing = collections.defaultdict(kernel.create_binder)
        monkeypatch.setattr(kernel, "device_caches", nothing)
    compiled: list[str] = []

    def listen(*, src, **others) -> None:
        compiled.append(src.fn.__name__)

    monkeypatch.setattr(triton.knobs.compilation, "listener", listen)
    ahead.compile_ahead("key", device, host_code)
    assert set(compiled) == {kernel.__name__ for kernel in kernels}
    assert out.isnan().all()  # nothing was launched on these tensors
    compiled.clear()
    host_code()
    assert d_qkv.isfinite().all()
    ahead.compile_ahead("key", device, host_code)
    assert compiled == []
