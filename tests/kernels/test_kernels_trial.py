"""Trials of configurations in the interpreter: comparison of results, and side effects."""

import contextlib
from typing import NamedTuple

import pytest
import torch
from conftest import NO_TRITON

if NO_TRITON:
    pytest.skip(NO_TRITON, allow_module_level=True)

import triton
import triton.language as tl
from looped_fast.kernels import backward, forward, trial, tuning
from looped_fast.kernels.candidates import Config
from looped_fast.kernels.launch import launch

from benchmarks.kernel_launches import Loop, launches_of

INF = tl.constexpr(float("inf"))


@triton.jit
def tile_kernel(x, part, out, N, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """out = 2 x, x += 1, part[program] = the tile's sum; COLUMNS selects a fault."""
    program = tl.program_id(0)
    i = program * ROWS + tl.arange(0, ROWS)
    value = tl.load(x + i, mask=i < N, other=0.0)
    tl.store(x + i, value + 1, mask=i < N)
    if COLUMNS != 4:
        tl.store(part + program, tl.sum(value))
    if COLUMNS == 1:  # a row short
        tl.store(out + i, value * 2, mask=i < N - 1)
    elif COLUMNS == 2:
        tl.store(out + i, value + INF, mask=i < N)
    elif COLUMNS == 3:
        tl.store(out + i, value * 3, mask=i < N)
    else:
        tl.store(out + i, value * 2 * (1 + 1e-6), mask=i < N)


RIGHT, LARGER = Config(16), Config(32)
SHORT, INFINITE, OFF, NO_PART = (Config(16, columns=i) for i in (1, 2, 3, 4))
BROKEN = Config(16, num_warps=3)


class Problem:
    """A caller of ``choose``: its tensors, and a function that launches on them."""

    def __init__(self) -> None:
        self.x = torch.arange(40.0)
        self.out = torch.zeros(41)[1:]  # 4 bytes off an address that is a multiple of 16

    def run(self, config: Config) -> None:
        grid = (triton.cdiv(40, config.rows),)
        part = self.x.new_empty(grid)
        launch(tile_kernel, grid, self.x, part, self.out, 40, config=config)


@pytest.fixture
def times(monkeypatch: pytest.MonkeyPatch) -> dict[Config, float]:
    """Milliseconds by configuration; after a trial, only of those that were timed."""
    given: dict[Config, float] = {}

    def milliseconds(calls) -> list[float]:
        found = {call.config: given.get(call.config, 1.0) for call in calls}
        given.clear()
        given.update(found)
        return list(found.values())

    monkeypatch.setattr(trial, "milliseconds", milliseconds)
    return given


def test_the_fastest_wins_and_the_first_of_equals(times) -> None:
    times[LARGER] = 0.5
    assert trial.fastest([RIGHT, LARGER], Problem().run, "fp32") == LARGER
    times.clear()
    assert trial.fastest([RIGHT, LARGER], Problem().run, "fp32") == RIGHT


@pytest.mark.parametrize(
    ("wrong", "fault"),
    [
        (SHORT, "out is off by"),
        (OFF, "out is off by"),
        (INFINITE, "out is not finite"),
        (NO_PART, "part is off by"),
    ],
    ids=["an element unwritten", "a factor", "not finite", "a sum unwritten"],
)
def test_wrong_numbers_are_out_however_fast(times, caplog, wrong, fault) -> None:
    times[wrong] = 0.1
    assert trial.fastest([RIGHT, wrong, LARGER], Problem().run, "bf16") == RIGHT
    assert set(times) == {RIGHT, LARGER}
    (message,) = caplog.messages
    assert f"tile_kernel with {wrong}: {fault}" in message


def test_the_callers_tensors_do_not_change(monkeypatch) -> None:
    problem, timed = Problem(), []
    monkeypatch.setattr(trial, "milliseconds", lambda calls: timed.extend(calls) or [1.0, 2.0])
    trial.fastest([RIGHT, LARGER], problem.run, "fp32")
    assert torch.equal(problem.x, torch.arange(40.0))
    assert torch.equal(problem.out, torch.zeros(40))
    for call in timed:
        x, part, out, N = call.args
        assert (x.shape, part.shape, out.shape, N) == ((40,), call.grid, (40,), 40)
        # Triton compiles for addresses that are multiples of 16, and for others.
        assert (x.data_ptr() % 16, out.data_ptr() % 16) == (0, 4)


@pytest.mark.parametrize("precision", ["bf16", "fp16", "fp32"])
def test_rounding_is_not_taken_for_an_error(times, caplog, monkeypatch, precision) -> None:
    """The most different tiles sum in different orders."""
    tried = []

    def choose(kernel, *, run, precision, width, **problem) -> Config:
        columns = 0 if "attention" in kernel.__name__ else 64
        small, large = Config(16, 16, 16), Config(32, columns, 32 + columns // 2)
        tried.append(kernel.__name__)
        return trial.fastest([small, large], run, precision)

    for module in (forward, backward, tuning):
        monkeypatch.setattr(module, "choose", choose)
    launches_of(Loop("mul", 1, 2, 1), precision, 2, 10, 64, 16)
    assert len(set(tried)) == 4
    assert caplog.messages == []


def test_a_configuration_that_can_not_be_launched_is_out(times, caplog, monkeypatch) -> None:
    real = tile_kernel.run

    def run(*args, warmup, num_warps, **kwargs):
        if num_warps == BROKEN.num_warps and not warmup:
            raise RuntimeError("out of resource: shared memory\nmore")
        return real(*args, warmup=warmup, num_warps=num_warps, **kwargs)

    monkeypatch.setattr(tile_kernel, "run", run)
    assert trial.fastest([BROKEN, RIGHT], Problem().run, "fp32") == RIGHT
    assert set(times) == {RIGHT}
    (message,) = caplog.messages
    assert "RuntimeError: out of resource: shared memory" in message
    assert "more" not in message
    with pytest.raises(RuntimeError, match="no configuration runs on this GPU; use another backen"):
        trial.fastest([BROKEN], Problem().run, "fp32")


@pytest.mark.parametrize(
    ("error", "config"),
    [(torch.OutOfMemoryError("CUDA out of memory"), BROKEN), (None, RIGHT)],
    ids=["no memory", "no capture"],
)
def test_a_trial_that_can_not_be_timed_is_reported(monkeypatch, error, config) -> None:
    """Out of memory takes the first; other errors the first that is right."""

    def broken(*args):
        raise error or RuntimeError("operation not permitted when stream is capturing")

    real = tile_kernel.run

    def run(*args, warmup, num_warps, **kwargs):
        if num_warps == BROKEN.num_warps and not warmup:
            raise error or RuntimeError("out of resource: shared memory")
        return real(*args, warmup=warmup, num_warps=num_warps, **kwargs)

    monkeypatch.setattr(tile_kernel, "run", run)
    monkeypatch.setattr(trial, "milliseconds", broken)
    with pytest.raises(trial.NotTimed) as caught:
        trial.fastest([BROKEN, RIGHT], Problem().run, "fp32")
    assert caught.value.config == config


def test_milliseconds_are_those_of_one_launch_in_a_replay(monkeypatch) -> None:
    clock, launched = [0.0], []

    class FakeGraph:
        def __init__(self, device) -> None:
            pass

        def capture(self, work) -> None:
            launched.clear()
            work()
            self.takes = sum(launched)

        def replay(self) -> None:
            clock[0] += self.takes

    class Event:
        def __init__(self, enable_timing) -> None:
            assert enable_timing

        def record(self) -> None:
            self.time = clock[0]

        def elapsed_time(self, end) -> float:
            return end.time - self.time

        def synchronize(self) -> None:
            pass

    class FakeCall(NamedTuple):
        takes: float
        device: torch.device = torch.device("cuda")

        def execute(self) -> None:
            launched.append(self.takes)

    monkeypatch.setattr(trial, "CudaGraph", FakeGraph)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    assert trial.milliseconds([FakeCall(2.0), FakeCall(0.5)]) == [2.0, 0.5]
    assert len(launched) == trial.LAUNCHES
