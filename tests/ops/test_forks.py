"""The CPU engine in processes that were forked, spawned, or started by a fork server."""

from __future__ import annotations

import multiprocessing
import os
import sys
import warnings

import pytest
import torch
from conftest import needs_engine, prompt, small_model
from test_cpu_engine_robustness import run_python
from torch.utils.data import DataLoader, Dataset

from looped_fast.ops import forks

pytestmark = [
    needs_engine,
    pytest.mark.skipif(sys.platform != "linux", reason="forks while OpenMP has threads"),
]

# Each code below forks after PyTorch's threads have started, and ends with the child's status.
THREADS = """
    import os, signal, sys, warnings, torch
    torch.set_num_threads(2)
    matrix = torch.randn(500, 500)
    (matrix @ matrix).sum()
    torch.ones(400_000).sum()
    def fork(work):
        child = os.fork()
        if child == 0:
            signal.alarm(60)  # ends a child that waits forever
            try:
                work()
            except BaseException as error:
                print(repr(error), file=sys.stderr, flush=True)
                os._exit(1)
            os._exit(0)
        assert os.waitpid(child, 0)[1] == 0
"""

BEFORE_THE_IMPORT = """
    def work(generation=1):
        from conftest import prompt, small_model
        torch.manual_seed(0)
        model = small_model(n_embd=32, n_head=4)
        model.loss(*prompt()).backward()
        print(torch.ops.looped_fast.cpu_threads(), flush=True)
        if generation < 3:
            fork(lambda: work(generation + 1))
    fork(work)
"""


def test_a_fork_before_the_engine_is_loaded_computes_in_children_and_grandchildren():
    output = run_python(THREADS + BEFORE_THE_IMPORT, PYTHONWARNINGS="ignore")
    assert output.split() == ["1", "1", "1"]


BEFORE_ANY_THREADS = """
    import os, signal, warnings
    child = os.fork()
    if child == 0:
        signal.alarm(60)
        warnings.simplefilter("error")
        import torch
        torch.set_num_threads(2)
        from conftest import prompt, small_model
        model = small_model(n_embd=32, n_head=4)
        model.loss(*prompt(600, 8, 3)).backward()
        print(torch.ops.looped_fast.cpu_threads(), torch.get_num_threads(), flush=True)
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
"""


def test_a_process_that_was_forked_before_threads_started_has_them_all():
    """A daemon, or a worker of a server that loads nothing before it forks."""
    assert run_python(BEFORE_ANY_THREADS) == f"{min(2, len(os.sched_getaffinity(0)))} 2"


BEFORE_THE_LOAD = """
    from conftest import prompt, small_model
    model = small_model(n_embd=32, n_head=4)  # its first call loads the engine
    xs, ys = prompt(600, 8, 3)
    assert xs.numel() * 16 > 32_768  # PyTorch would share the work with its threads
    def work():
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            for _ in range(3):
                model.loss(xs, ys).backward()
        for warning in caught:
            print(warning.message, flush=True)
        assert torch.get_num_threads() == 1
    fork(work)
"""


def test_a_fork_before_the_first_call_keeps_to_one_thread_and_says_so_once():
    said = run_python(THREADS + BEFORE_THE_LOAD)
    assert said.count("this process was forked") == 1
    assert "forkserver" in said


AFTER_CALLS = """
    from conftest import prompt, small_model
    from looped_fast import accelerate, ops
    from looped_fast.compat import build_model
    from looped_fast.ops import cpu_engine
    warnings.simplefilter("ignore")
    model = small_model(n_embd=32, n_head=4)
    xs, ys = prompt(600, 8, 3)
    expected = model(xs, ys)
    def work():
        assert torch.equal(model(xs, ys), expected)
        assert torch.get_num_threads() == 1
        torch.set_num_threads(2)  # whoever insists gets threads of the child's own
        one = model(xs[:5], ys[:5])
        assert torch.ops.looped_fast.cpu_threads() == 2
        assert torch.equal(one, expected[:, :5])
        assert len(os.listdir("/proc/self/task")) >= 3
    fork(work)
    assert torch.equal(model(xs, ys), expected)
    assert torch.get_num_threads() == 2
"""


def test_a_fork_after_calls_computes_in_child_and_parent():
    run_python(THREADS + AFTER_CALLS)


BASELINES = """
    from looped_fast.evaluation.baselines import BASELINES
    xs, ys = torch.randn(2, 6, 3), torch.randn(2, 6)
    expected = {name: predict(xs, ys) for name, predict in BASELINES.items()}
    def work():
        for name in BASELINES:
            assert torch.allclose(BASELINES[name](xs, ys), expected[name], atol=1e-5), name
    fork(work)
"""


def test_baselines_run_in_a_forked_child():
    pytest.importorskip("sklearn")
    pytest.importorskip("xgboost")
    run_python(THREADS + BASELINES)


def test_a_forked_child_of_one_thread_has_nothing_to_say():
    forks._mark()
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        small_model()(*prompt())
    torch.set_num_threads(before)


class Predictions(Dataset):
    """Predictions of a model, made in the worker."""

    def __init__(self, model, xs, ys):
        self.model, self.xs, self.ys = model, xs, ys

    def __len__(self):
        return len(self.xs)

    def __getitem__(self, index):
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("error")
            return self.model(self.xs[[index]], self.ys[[index]])[:, 0]


@pytest.mark.parametrize("method", ["fork", "spawn", "forkserver"])
def test_workers_of_a_data_loader_predict_without_a_warning(method, two_threads):
    model, (xs, ys) = small_model(n_embd=32, n_head=4), prompt(6, 8)
    with torch.no_grad():
        expected = model(xs, ys)
    loader = DataLoader(
        Predictions(model, xs, ys), num_workers=2, timeout=100, multiprocessing_context=method
    )
    assert torch.equal(torch.cat(list(loader)).transpose(0, 1), expected)


def predict(connection, model, xs, ys):
    torch.use_deterministic_algorithms(False)  # whose filling of memory has threads, too
    torch.set_num_threads(2)
    with torch.no_grad(), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        outputs = model(xs, ys)
    said = [str(warning.message) for warning in caught]
    connection.send((outputs.tolist(), said, torch.ops.looped_fast.cpu_threads()))


@pytest.mark.parametrize("method", ["fork", "spawn", "forkserver"])
def test_a_model_goes_to_another_process(method, two_threads):
    model, (xs, ys) = small_model(n_embd=32, n_head=4), prompt(6, 8)
    with torch.no_grad():
        expected = model(xs, ys)
    context = multiprocessing.get_context(method)
    receiver, sender = context.Pipe(duplex=False)
    child = context.Process(target=predict, args=(sender, model, xs, ys), daemon=True)
    child.start()
    assert receiver.poll(100)
    outputs, said, n_threads = receiver.recv()
    child.join(30)
    assert torch.equal(torch.tensor(outputs), expected)
    assert len(said) == (method == "fork"), said
    assert n_threads == (1 if method == "fork" else min(2, len(os.sched_getaffinity(0))))


RENAMED = """
    from pathlib import Path
    Path("/proc/self/comm").write_bytes("cut sho\\u0440".encode()[:-1])
    from looped_fast.ops import forks
    print(forks._lost_threads_before())
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_process_may_have_a_name_that_is_no_utf_8():
    """Linux cuts a process's name after 15 bytes, also within a character."""
    assert run_python(RENAMED) == "False"
