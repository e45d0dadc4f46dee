"""Threads of the CPU engine: how many, on few or busy cores, and from several Python threads."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from conftest import needs_engine, prompt, small_model
from test_cpu_engine_robustness import run_python

from looped_fast import explain_backend
from looped_fast.ops import cpu_engine

pytestmark = needs_engine
INFINITY = float("inf")

needs_two_cores = pytest.mark.skipif(
    not hasattr(os, "sched_getaffinity") or len(os.sched_getaffinity(0)) < 2,
    reason="pins threads to one of several cores",
)


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.fixture
def model():
    return small_model(n_embd=64, n_head=4, n_loops=6, window=3)


# How many times as long as on one thread a small inference and a small training step take on two;
# the best of eight turns, since other processes come and go.
TIMES = """
    import os, statistics, time, torch
    from conftest import prompt, small_model
    model = small_model(n_embd=64, n_head=4, n_loops=12, window=6, n_positions=16)
    prompts = {1: prompt(1, 16, 3), 3: prompt(3, 16, 3)}
    def inference():
        with torch.no_grad():
            model(*prompts[1])
    def step():
        model.loss(*prompts[3]).backward()
    def seconds(work, n_threads):
        torch.set_num_threads(n_threads)
        times = []
        for _ in range(15):
            start = time.perf_counter()
            work()
            times.append(time.perf_counter() - start)
        return statistics.median(times)
    for work in (inference, step):
        print(min(seconds(work, 2) / seconds(work, 1) for _ in range(8)))
"""


@needs_two_cores
def test_two_threads_on_one_core_take_at_most_three_times_as_long_as_one():
    pin = "    import os; os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})"
    ratios = [float(line) for line in run_python(pin + TIMES).split()]
    assert max(ratios) <= 3, ratios


@needs_two_cores
def test_beside_a_busy_process_two_threads_take_at_most_three_times_as_long_as_one():
    busy = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    try:
        os.sched_setaffinity(busy.pid, {max(os.sched_getaffinity(0))})
        ratios = [float(line) for line in run_python(TIMES).split()]
    finally:
        busy.kill()
        busy.wait()
    assert max(ratios) <= 3, ratios


@needs_two_cores
def test_the_affinity_limits_threads_at_once_and_shows_but_changes_no_bit(model, threads):
    threads(2)
    xs, ys = prompt()
    allowed = os.sched_getaffinity(0)
    with torch.no_grad():
        expected = model(xs, ys)
        assert torch.ops.looped_fast.cpu_threads() == 2
        assert cpu_engine.thread_limit() is None
        try:
            os.sched_setaffinity(0, {min(allowed)})
            assert torch.ops.looped_fast.cpu_threads() == 1
            assert torch.equal(model(xs, ys), expected)
            shown = str(explain_backend(model, 2, 5))
        finally:
            os.sched_setaffinity(0, allowed)
        assert torch.ops.looped_fast.cpu_threads() == 2
    assert "backend: cpu, on 1 of 2 threads" in shown
    assert "affinity" in shown
    assert "of 2 threads" not in str(explain_backend(model, 2, 5))


def test_no_limit_is_shown_on_one_thread(model, threads):
    threads(1)
    assert explain_backend(model, 2, 5).limit is None


COUNT = """
    import torch
    from conftest import prompt, small_model
    torch.set_num_threads(2)
    model = small_model(n_embd=64, n_head=4)
    xs, ys = prompt()
    model.loss(xs, ys).backward()
    two = model(xs, ys)
    count = torch.ops.looped_fast.cpu_threads()
    torch.set_num_threads(1)
    assert torch.equal(model(xs, ys), two)
    print(count)
"""


@needs_two_cores
@pytest.mark.parametrize(
    ("environment", "count"),
    [
        ({"OMP_NUM_THREADS": "1"}, 2),  # set_num_threads comes later
        ({"OMP_THREAD_LIMIT": "1"}, 2),  # OpenMP then starts one thread of them
        ({"OMP_PROC_BIND": "true"}, 2),  # binds the main thread to one CPU
        ({"OMP_WAIT_POLICY": "active"}, 2),
    ],
)
def test_openmp_s_own_settings_are_respected(environment, count):
    assert int(run_python(COUNT, **environment)) == count


def write_tree(root, files):
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


V2 = "0::/jobs/mine\n"
V1 = "9:name=systemd:/\n4:cpu,cpuacct:/docker/abc\n3:cpuset:/docker/abc\n"


@pytest.mark.parametrize(
    ("groups", "files", "quota"),
    [
        (V2, {"jobs/mine/cpu.max": "max 100000\n"}, INFINITY),
        (V2, {"jobs/mine/cpu.max": "150000 100000\n"}, 1.5),
        (V2, {"jobs/mine/cpu.max": "max 100000\n", "jobs/cpu.max": "200000 100000\n"}, 2),
        (V2, {"jobs/mine/cpu.max": "50000 100000\n", "jobs/cpu.max": "200000 100000\n"}, 0.5),
        (V2, {"cpu.max": "100000 100000\n"}, 1),  # a container sees its group as the root
        ("0::/\n", {"cpu.max": "100000 50000\n"}, 2),
        (V2, {}, INFINITY),
        (V2, {"jobs/mine/cpu.max": "garbage\n"}, INFINITY),
        (V2, {"jobs/mine/cpu.max": ""}, INFINITY),
        (V2, {"jobs/mine/cpu.max": "100000 0\n"}, INFINITY),
        (V2, {"jobs/mine/cpu.max/folder": ""}, INFINITY),  # can't be read
        ("", {"cpu.max": "100000 100000\n"}, INFINITY),
        ("nonsense\n::\n1\n", {}, INFINITY),
        (
            V1,
            {
                "cpu,cpuacct/docker/abc/cpu.cfs_quota_us": "300000\n",
                "cpu,cpuacct/docker/abc/cpu.cfs_period_us": "100000\n",
            },
            3,
        ),
        (V1, {"cpu/cpu.cfs_quota_us": "100000\n", "cpu/cpu.cfs_period_us": "100000\n"}, 1),
        (V1, {"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, INFINITY),
        (V1, {"cpu/cpu.cfs_quota_us": "100000\n"}, INFINITY),
    ],
)
def test_the_quota_of_control_groups_is_read(tmp_path, groups, files, quota):
    write_tree(tmp_path, {"proc/self/cgroup": groups})
    write_tree(tmp_path / "sys/fs/cgroup", files)
    assert cpu_engine.load_error() is None
    assert torch.ops.looped_fast.cpu_quota(str(tmp_path)) == quota


def test_a_system_without_control_groups_has_no_quota(tmp_path):
    assert torch.ops.looped_fast.cpu_quota(str(tmp_path)) == INFINITY


def training(model, xs, ys):
    """Loss and gradients."""
    loss = model.loss(xs, ys)
    return [loss.detach(), *torch.autograd.grad(loss, list(model.parameters()))]


def same(left, right):
    return all(torch.equal(x, y) for x, y in zip(left, right, strict=True))


def test_two_models_in_two_python_threads_at_once(threads):
    threads(2)
    models = [small_model(n_embd=64, n_head=4), small_model(n_embd=32, n_head=2, n_loops=5)]
    xs, ys = prompt(5, 8)
    expected = [training(model, xs, ys) for model in models]
    outcomes = []

    def work(index):
        torch.set_num_threads(2)
        outcomes.extend(same(training(models[index], xs, ys), expected[index]) for _ in range(10))

    workers = [threading.Thread(target=work, args=(i % 2,), daemon=True) for i in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
    assert outcomes == [True] * 40


def test_a_model_is_shared_by_the_threads_of_a_pool(model, threads):
    threads(2)
    prompts = [prompt(B, n) for B in (1, 2, 5) for n in (1, 3, 8)]
    with torch.no_grad():
        expected = [model(*p) for p in prompts]

        def predict(p):
            with torch.no_grad():  # a thread's own
                return model(*p)

        with ThreadPoolExecutor(4) as pool:
            for _ in range(5):
                assert same(list(pool.map(predict, prompts, timeout=60)), expected)


def test_a_backward_may_run_in_another_thread_than_its_forward(model, threads):
    threads(2)
    xs, ys = prompt()
    expected = training(model, xs, ys)[1:]
    loss = model.loss(xs, ys)
    with ThreadPoolExecutor(1) as pool:
        gradients = pool.submit(torch.autograd.grad, loss, list(model.parameters())).result(60)
    for mine, theirs in zip(gradients, expected, strict=True):
        torch.testing.assert_close(mine, theirs)
