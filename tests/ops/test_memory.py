"""Memory that the CPU engine keeps between calls: a cap, and who frees it."""

from __future__ import annotations

import gc
import sys

import pytest
import torch
from conftest import needs_engine, prompt, small_model
from test_cpu_engine_robustness import run_python
from torch._subclasses.fake_tensor import FakeTensorMode

import looped_fast

pytestmark = [needs_engine, pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")]

# MB that a process holds, and a training step through autograd whose activations take 250 MB.
STEP = """
    import copy, gc, re, torch
    from pathlib import Path
    import looped_fast
    from looped_fast import LoopedTransformer, ModelConfig, ops
    def held():
        gc.collect()
        return int(re.search(r"VmRSS:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) / 1024
    def step(model, B=20):
        xs, ys = torch.randn(B, 41, 20), torch.randn(B, 41)
        (model(xs, ys) - ys).square().mean().backward()
    def made(**options):
        return LoopedTransformer(ModelConfig(n_loops=15, window=15), **options)
    torch.set_num_threads(1)
    model = made()
    step(model, 1)
    before = held()
    step(model)
    assert held() - before > 200  # kept for the next step
"""


@pytest.mark.parametrize(
    "end",
    [
        "del model",
        "looped_fast.empty_cache()",
        "copied = copy.deepcopy(model); del model; step(copied); del copied",
        "model = made(recompute=True); step(model); del model",
        "looped_fast.accelerate(model, precision='fp32'); step(model); del model",
        "model.loss(torch.randn(64, 41, 20), torch.randn(64, 41)).backward(); del model",
    ],
)
def test_memory_is_freed_with_the_model_or_when_asked_for(end):
    code = f"{STEP}\n    {end}\n    print(held() - before)"
    assert float(run_python(code)) < 60


@pytest.mark.slow
def test_more_than_the_cap_is_not_kept():
    code = f"""{STEP}
    step(model, 95)  # activations of 1.2 GB
    print(held() - before)
    """
    assert float(run_python(code)) < 500


def test_freed_memory_is_taken_again():
    model, (xs, ys) = small_model(n_embd=32, n_head=4), prompt()
    expected = model(xs, ys)
    looped_fast.empty_cache()
    looped_fast.empty_cache()
    assert torch.equal(model(xs, ys), expected)


def test_outputs_outlive_the_model_and_the_cache():
    model = small_model(n_embd=32, n_head=4)
    states = model.states(*prompt())
    expected = states.clone()
    del model
    gc.collect()
    looped_fast.empty_cache()
    small_model(n_embd=32, n_head=4).states(*prompt())
    assert torch.equal(states, expected)


def test_a_model_may_die_among_fake_tensors():
    model = small_model(n_embd=32, n_head=4)
    model(*prompt())
    with FakeTensorMode():
        del model
        gc.collect()


def test_emptying_before_the_engine_is_loaded_does_not_load_it():
    code = """
        import looped_fast
        from looped_fast.ops import cpu_engine
        looped_fast.empty_cache()
        print(cpu_engine._load.cache_info().currsize)
    """
    assert run_python(code) == "0"


BUSY = """
    import os, signal, threading, torch, warnings
    import looped_fast
    from conftest import prompt, small_model
    warnings.simplefilter("ignore")
    model, other = small_model(n_embd=32, n_head=4), small_model(n_embd=32, n_head=4)
    xs, ys = prompt()
    expected, stop = model(xs, ys), threading.Event()
    def work():
        while not stop.is_set():
            other.states(xs, ys)
            looped_fast.empty_cache()
    threads = [threading.Thread(target=work, daemon=True) for _ in range(3)]
    for thread in threads:
        thread.start()
    for _ in range(40):
        child = os.fork()
        if child == 0:
            signal.alarm(30)
            looped_fast.empty_cache()
            os._exit(0 if torch.equal(model(xs, ys), expected) else 1)
        assert torch.equal(model(xs, ys), expected)
        assert os.waitpid(child, 0)[1] == 0
    stop.set()
    for thread in threads:  # Python ends its threads inside of C++ otherwise, which aborts
        thread.join()
"""


def test_memory_is_freed_and_taken_by_threads_while_the_process_forks():
    run_python(BUSY)
