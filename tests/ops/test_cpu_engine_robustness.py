"""The CPU engine among threads, processes and instruction sets."""

from __future__ import annotations

import multiprocessing
import os
import re
import shutil
import subprocess
import sys
import textwrap
import threading
from pathlib import Path

import pytest
import torch
from conftest import CALL, cast, changed, leaves, loop_inputs, needs_engine, require_grad
from torch.utils.data import DataLoader, Dataset

from looped_fast import LoopedTransformer, ModelConfig, explain_backend, ops
from looped_fast.ops import backends, cpu_engine, triton_backend

ROOT = Path(__file__).parents[2]
TESTS = ROOT / "tests"
ARGUMENTS = {"n_heads": 4, "n_loops": 3, "window": 2, "backend": "cpu"}


def results(inputs, **changes):
    """States and gradients of a pass on the engine."""
    tensors = list(leaves(require_grad(cast(inputs, torch.float32))).values())
    e, p, z, *weights = tensors
    states = ops.loop(e, p, z, weights, **{**ARGUMENTS, **changes})
    grads = torch.autograd.grad(states.square().sum(), tensors, allow_unused=True)
    return [states.detach(), *(g for g in grads if g is not None)]


def equal(left, right):
    return all(torch.equal(x, y) for x, y in zip(left, right, strict=True))


@pytest.fixture
def inputs():
    return loop_inputs(B=5, S=23, D=64, dtype=torch.float32)


@pytest.fixture
def threads():
    """Sets the number of threads; restored after the test."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@needs_engine
@pytest.mark.parametrize("n_threads", [1, 2, 3, 7])
def test_results_repeat_bit_by_bit_and_agree_between_thread_counts(inputs, threads, n_threads):
    threads(1)
    alone = results(inputs)
    threads(n_threads)
    first = results(inputs)
    for _ in range(3):
        assert equal(first, results(inputs))
    for one, several in zip(alone, first, strict=True):
        assert (one - several).norm() <= 1e-5 * one.norm()


@needs_engine
def test_the_number_of_threads_may_change_before_the_backward(inputs, threads):
    threads(3)
    tensors = list(leaves(require_grad(inputs)).values())
    states = ops.loop(**inputs, **ARGUMENTS)
    threads(1)
    grads = torch.autograd.grad(states.square().sum(), tensors, allow_unused=True)
    for value, expected in zip(
        [g for g in grads if g is not None], results(inputs)[1:], strict=True
    ):
        assert (value - expected).norm() <= 1e-5 * expected.norm()


@needs_engine
def test_two_python_threads_at_once(inputs, threads):
    threads(2)
    expected = results(inputs)
    outcomes = []

    def work():
        torch.set_num_threads(2)
        outcomes.extend(equal(expected, results(inputs)) for _ in range(5))

    workers = [threading.Thread(target=work) for _ in range(2)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
        assert not worker.is_alive()
    assert outcomes == [True] * 10


def _in_child(inputs, expected, queue):
    # Filling poisoned memory is torch's own parallel code, which does hang after a fork.
    torch.use_deterministic_algorithms(False)
    torch.set_num_threads(2)
    with torch.no_grad():
        states = ops.loop(**inputs, **ARGUMENTS)
    queue.put(bool((states - expected).norm() <= 1e-5 * expected.norm()))


@needs_engine
def test_a_forked_child_computes(inputs, threads):
    """The child has no OpenMP pool, although its parent had one, and must not wait for it."""
    threads(2)
    expected = results(inputs)[0]
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    child = context.Process(target=_in_child, args=(inputs, expected, queue), daemon=True)
    child.start()
    assert queue.get(timeout=30)
    child.join(30)
    assert child.exitcode == 0


class _States(Dataset):
    def __init__(self, inputs):
        self.inputs = inputs

    def __len__(self):
        return 4

    def __getitem__(self, index):
        with torch.no_grad():
            return ops.loop(**self.inputs, **ARGUMENTS)


@needs_engine
def test_a_data_loader_worker_computes(inputs, threads):
    threads(2)
    expected = results(inputs)[0]
    loader = DataLoader(_States(inputs), batch_size=1, num_workers=2, timeout=60)
    for batch in loader:
        assert (batch[0] - expected).norm() <= 1e-5 * expected.norm()


def run_python(code, cwd=ROOT, **environment):
    """Run code in a fresh interpreter that can import the tests; return its output.

    Packages in the folder ``cwd`` shadow all others.
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        env={**os.environ, "PYTHONPATH": f"{ROOT}:{TESTS}:{TESTS}/ops", **environment},
        capture_output=True, text=True, timeout=120, cwd=cwd,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


FIRST_CALLS = """
    import sys, threading, warnings
    from looped_fast.ops import cpu_engine, triton_backend
    backend = {backend}
    warnings.simplefilter("error", UserWarning)  # a second registration warns
    sys.setswitchinterval(1e-6)
    start, reasons = threading.Barrier(8), []
    def ask():
        start.wait()
        reasons.append(backend.load_error())
    threads = [threading.Thread(target=ask) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    print(reasons)
"""


@pytest.mark.parametrize("backend", [cpu_engine, triton_backend])
def test_the_first_call_may_be_of_several_threads(backend):
    if reason := backend.load_error():
        pytest.skip(reason)
    name = backend.__name__.rpartition(".")[2]
    assert run_python(FIRST_CALLS.format(backend=name)) == str([None] * 8)


ALTERNATING_LOAD = """
    int getloadavg(double averages[], int n) {  // by which OpenMP chooses how many threads to give
        static int calls;
        const double load = calls++ % 2 ? 1000 : 0;
        for (int i = 0; i < n; ++i) averages[i] = load;
        return n;
    }
"""
AGREEMENT = """
    import torch
    from conftest import loop_inputs
    from test_cpu_engine_robustness import results
    torch.manual_seed(0)
    inputs = loop_inputs(B=5, S=23, D=64, dtype=torch.float32)
    torch.set_num_threads(1)
    alone = results(inputs)
    torch.set_num_threads(2)
    for _ in range(4):
        for one, several in zip(alone, results(inputs), strict=True):
            assert (one - several).norm() <= 1e-5 * one.norm()
"""


@needs_engine
@pytest.mark.skipif(shutil.which("cc") is None, reason="compiles a stand-in for the system's load")
def test_openmp_may_give_each_region_another_number_of_threads(tmp_path):
    source, library = tmp_path / "load.c", tmp_path / "load.so"
    source.write_text(ALTERNATING_LOAD)
    subprocess.run(["cc", "-shared", "-fPIC", "-o", library, source], check=True, timeout=60)
    run_python(AGREEMENT, LD_PRELOAD=str(library), OMP_DYNAMIC="true")


ACCURACY = """
    import torch
    from conftest import loop_inputs
    from test_cpu_engine import check
    torch.manual_seed(0)
    torch.set_num_threads(2)
    check(loop_inputs(B=3, S=23, D=64), "fp32", n_heads=4, n_loops=3, window=2)
    check(loop_inputs(B=1, S=37, D=96), "fp32", n_heads=4, n_loops=2, window=2, injection="mul",
          recompute=True)
    from looped_fast.ops import TRM
    from test_cpu_blocks import check_block
    for head_dim in (8, 16, 32):
        block = TRM._replace(mlp_hidden=96)
        shape = {"S": 23, "D": 96, "n_layer": 2, "n_heads": 96 // head_dim}
        check_block(block, "fp32", **shape, n_loops=3, window=2)
    from looped_fast.ops import cpu_engine
    print(cpu_engine.unsupported_precision("bf16"))
"""


@needs_engine
@pytest.mark.parametrize("limit", ["AVX2", "AVX512_CORE"])
def test_fp32_is_right_and_bf16_refused_where_products_are_limited(limit):
    reason = run_python(ACCURACY, ONEDNN_MAX_CPU_ISA=limit)
    assert "bf16" in reason


@needs_engine
def test_the_avx2_kernels_are_right():
    reason = run_python(ACCURACY, ATEN_CPU_CAPABILITY="avx2", ONEDNN_MAX_CPU_ISA="AVX2")
    assert "AVX512_BF16" in reason


@needs_engine
def test_without_avx2_the_reference_runs_and_says_why():
    code = """
        from looped_fast import LoopedTransformer, ModelConfig, explain_backend
        print(explain_backend(LoopedTransformer(ModelConfig()), 2, 5))
    """
    text = run_python(code, ATEN_CPU_CAPABILITY="default")
    assert "backend: reference" in text
    assert "not cpu: it needs AVX2" in text


def call(**changes):
    return changed(CALL, **{"batch": 2, "seq_len": 10, "n_embd": 64, "n_heads": 4, **changes})


@needs_engine
@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"n_embd": 48}, "D = 48 is not a multiple of 32"),
        ({"n_embd": 2048}, "D = 2048 is not a multiple of 32 up to 1024"),
        ({"n_embd": 96, "n_heads": 8}, "head_dim = 12 is not a multiple of 8"),
        ({"dtype": torch.float64}, "float32"),
        ({"precision": "fp16"}, "not fp16"),
        ({"device": "cuda"}, "cuda"),
    ],
)
def test_what_it_cannot_run_is_refused_with_the_reason(changes, reason):
    assert reason in backends.UNSUPPORTED["cpu"](call(**changes))
    assert backends.select(call(**changes)).chosen == "reference"
    with pytest.raises(ValueError, match="can't run this"):
        backends.select(call(**changes, backend="cpu"))


@needs_engine
def test_it_is_the_default_on_a_cpu():
    model = LoopedTransformer(ModelConfig(n_dims=3, n_positions=4, n_embd=32, n_head=2))
    assert explain_backend(model, batch_size=2, n_points=4).chosen == "cpu"


@needs_engine
def test_phases_show_in_a_profile(inputs):
    with torch.profiler.profile() as profile:
        results(inputs)
    names = {event.key for event in profile.key_averages()}
    phases = {"pack_weights", "loop_steps", "loop_steps_backward", "reduce_gradients"}
    assert {f"looped_fast::{phase}" for phase in phases} <= names


def peak_memory() -> int:
    """Peak memory of this process in KiB; getrusage may report that of a larger parent."""
    return int(re.search(rb"VmHWM:\s+(\d+)", Path("/proc/self/status").read_bytes())[1])


needs_linux = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")

MEMORY = """
    import sys, torch
    from test_cpu_engine_robustness import peak_memory
    from looped_fast import LoopedTransformer, ModelConfig
    torch.set_num_threads(2)
    precision, loss, B = sys.argv[1:]
    model = LoopedTransformer(ModelConfig(n_loops=15, window=15), backend="cpu")
    def step(B):
        xs, ys = torch.randn(B, 41, 20), torch.randn(B, 41)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=precision == "bf16"):
            if loss == "fused":
                model.loss(xs, ys).backward()
            else:
                (model(xs, ys) - ys).square().mean().backward()
    step(1)  # libraries, compiled kernels
    before = peak_memory()
    step(int(B))
    print(peak_memory() - before)
"""


@needs_engine
@needs_linux
@pytest.mark.parametrize(
    ("precision", "B", "loss", "limit"),
    [
        ("fp32", 24, "autograd", 316), ("fp32", 24, "fused", 30),
        ("bf16", 64, "autograd", 475), ("bf16", 64, "fused", 40),
    ],
)  # fmt: skip
def test_a_step_adds_memory_within_its_limit(precision, B, loss, limit):
    """Limits in MB. Measured: 307, 22 to 24; 459, 29 to 31, with PyTorch 2.8, 2.11 and 2.13.

    Eager adds 585 to 661 in fp32, and 1069 to 1332 in bf16. In bf16 a sixth of ours is the final
    LayerNorm's x_hat, which is fp32.
    """
    if cpu_engine.unsupported_precision(precision):
        pytest.skip(cpu_engine.unsupported_precision(precision))
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(MEMORY), precision, loss, str(B)],
        env={**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}:{ROOT / 'tests' / 'ops'}"},
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) <= 1000 * limit


GROWTH = """
    import torch
    from test_cpu_engine_robustness import peak_memory
    from looped_fast import LoopedTransformer, ModelConfig
    torch.set_num_threads(2)
    config = ModelConfig(n_dims=5, n_embd=128, n_head=4, n_loops=10, window=10)
    model = LoopedTransformer(config, backend="cpu")
    def peak_after_steps(B, n):
        for _ in range(2):
            xs, ys = torch.randn(B, n, 5), torch.randn(B, n)
            (model(xs, ys) - ys).square().mean().backward()
        return peak_memory()
    print(peak_after_steps(1, 2), peak_after_steps(32, 29), peak_after_steps(32, 30))
"""


@needs_engine
@needs_linux
def test_a_curriculum_step_adds_little_to_the_peak_of_memory():
    before, shorter, longer = map(int, run_python(GROWTH).split())
    assert longer - shorter <= 0.2 * (shorter - before)


@needs_engine
@pytest.mark.skipif(sys.platform != "linux", reason="page faults are counted for Linux's malloc")
def test_a_training_step_uses_the_memory_of_the_last_one():
    code = """
    import resource
    import torch
    from looped_fast import LoopedTransformer, ModelConfig

    config = ModelConfig(n_dims=5, n_positions=20, n_embd=256, n_head=8, n_loops=16, window=16)
    model = LoopedTransformer(config, backend="cpu", recompute=True)
    xs, ys = torch.randn(64, 20, 5), torch.randn(64, 20)

    def faults_of_a_step():
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        model(xs, ys).square().mean().backward()
        return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

    faults_of_a_step()
    print(faults_of_a_step())
    """
    states = 16 * 64 * 40 * 256 * 4  # bytes, which the backward reads
    assert int(run_python(code)) < states / 4096 / 2
