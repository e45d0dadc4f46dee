"""Selection of backends by measured times; they are invented here, without a GPU."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json

import pytest
import torch
from conftest import CALL, changed, prompt, small_model
from fake_graphs import FakeGraph

from looped_fast import explain_backend, train
from looped_fast.ops import backend_times, backends, compiled_backend
from looped_fast.ops.graphs import Graphs
from looped_fast.ops.selection import Selection
from looped_fast.training import backend_autotune
from looped_fast.training.config import CurriculumConfig, ScheduleConfig
from looped_fast.training.presets import preset_config
from looped_fast.training.trainer import Trainer

STEP = changed(CALL, device="cuda", precision="bf16", replayed=True, training=True)
CALL = changed(STEP, training=False)


@pytest.fixture(autouse=True)
def a_gpu(monkeypatch, tmp_path):
    """A GPU that triton, compiled and reference can run on, and an empty cache folder."""
    providers = pytest.importorskip("looped_fast.kernels.providers", exc_type=ImportError)
    monkeypatch.setattr(providers, "select", lambda problem: Selection("attention", "triton", {}))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(backend_times, "_device_name", str)
    monkeypatch.setattr(backend_times, "_failed", {})
    table = {name: lambda problem: None for name in ("triton", "compiled", "reference")}
    monkeypatch.setattr(backends, "UNSUPPORTED", table)
    torch.use_deterministic_algorithms(False)
    backend_times._known.cache_clear()
    yield
    backend_times._known.cache_clear()


class Clock:
    """Reports given milliseconds for each backend, and counts what is timed."""

    def __init__(self, **milliseconds: float | Exception) -> None:
        self.model = small_model()
        self.works = {True: lambda: None, False: lambda: None}
        self.milliseconds = milliseconds
        self.timed: list[tuple[str, str]] = []

    def __call__(self, work) -> float:
        backend = self.model.backend
        what = "training" if work is self.works[True] else "inference"
        self.timed.append((backend, what))
        time = self.milliseconds[backend]
        if isinstance(time, Exception):
            raise time
        return time if what == "training" else time / 10

    def measure(self, problem=STEP, n_steps=10**6) -> str | None:
        return backend_autotune.measure(problem, n_steps, self.model, self.works, self)


# --- what is measured -----------------------------------------------------------------------------


def test_the_faster_backend_runs_training_and_inference():
    clock = Clock(triton=2.1, compiled=1.44)
    line = clock.measure()
    assert clock.timed == [
        (backend, what)
        for backend in ("triton", "compiled")
        for what in ("training", "inference")
    ]  # fmt: skip
    assert line == (
        "triton 2.1 ms, compiled 1.44 ms a training step "
        "(triton 0.21 ms, compiled 0.144 ms an inference call): compiled; "
        f"remembered in {backend_times.path()}"
    )
    for problem, reason in (
        (STEP, "2.1 ms a training step measured here, compiled takes 1.44"),
        (CALL, "0.21 ms an inference call measured here, compiled takes 0.144"),
    ):
        explanation = backends.select(problem)
        assert explanation.chosen == "compiled"
        assert explanation.reasons["triton"] == reason
    assert clock.model.backend == "auto"


def test_a_slower_compiled_step_reports_both_times():
    Clock(triton=2.1, compiled=2.9).measure()
    explanation = backends.select(STEP)
    assert explanation.chosen == "triton"
    assert "2.9 ms a training step measured here, triton takes 2.1" in str(explanation)


def test_times_are_measured_once_and_outlast_the_process():
    Clock(triton=2.1, compiled=1.4).measure()
    again = Clock()
    assert again.measure() is None
    assert again.timed == []
    backend_times._known.cache_clear()  # as in another process
    assert again.measure() is None
    assert backends.select(STEP).chosen == "compiled"


def test_the_file_is_read_once_in_a_process(monkeypatch):
    Clock(triton=2.1, compiled=1.4).measure()
    backend_times._known.cache_clear()
    reads = []
    load = backend_times.cache.load
    monkeypatch.setattr(backend_times.cache, "load", lambda *a: reads.append(a) or load(*a))
    for _ in range(5):
        assert backends.select(STEP).chosen == "compiled"
    assert len(reads) == 1


def test_a_short_run_does_not_wait_for_the_compiler():
    clock = Clock(triton=2.0)
    assert clock.measure(n_steps=140_000) is None  # 280 s
    assert clock.timed == [("triton", "training"), ("triton", "inference")]
    assert backends.select(STEP).chosen == "triton"
    longer = Clock(compiled=1.0)
    assert "triton 2 ms, compiled 1 ms a training step" in longer.measure(n_steps=160_000)


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_plain_pytorch_is_measured_only_in_fp32(precision):
    clock = Clock(triton=20.0, reference=14.0, compiled=12.0)
    clock.measure(changed(STEP, precision=precision))
    names = list(dict.fromkeys(backend for backend, _ in clock.timed))
    fp32 = ["triton", "reference", "compiled"]
    assert names == (fp32 if precision == "fp32" else ["triton", "compiled"])


def test_plain_pytorch_is_measured_where_triton_cannot_run(monkeypatch):
    monkeypatch.setitem(backends.UNSUPPORTED, "triton", lambda problem: "D = 96 is not one of ...")
    clock = Clock(reference=14.0, compiled=12.0)
    assert "reference 14 ms, compiled 12 ms" in clock.measure(changed(STEP, n_embd=96))
    assert backends.select(changed(STEP, n_embd=96)).chosen == "compiled"


@pytest.mark.parametrize("failing", ["triton", "compiled"])
def test_a_failure_is_reported_and_the_other_backend_runs(failing):
    error = RuntimeError("ptxas: no\nand a page more")
    clock = Clock(**{"triton": 2.1, "compiled": 1.4, failing: error})
    other = "compiled" if failing == "triton" else "triton"
    line = clock.measure()
    assert f": {other}; {failing} failed, RuntimeError: ptxas: no; remembered in" in line
    explanation = backends.select(STEP)
    assert explanation.chosen == other
    assert "failed when it was measured: RuntimeError: ptxas: no" in explanation.reasons[failing]
    assert clock.measure() is None  # not again in this process


def test_where_all_fail_the_reference_runs():
    error = RuntimeError("no")
    fp32 = changed(STEP, precision="fp32")
    Clock(triton=error, compiled=error, reference=error).measure(fp32)
    assert backends.select(fp32).chosen == "reference"


def test_a_folder_that_cannot_be_written_is_reported(monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    line = Clock(triton=2.1, compiled=1.4).measure()
    assert f"not remembered, {backend_times.path()} can't be written: Not a directory" in line
    assert backends.select(STEP).chosen == "compiled"


@pytest.mark.parametrize("text", ["", "{", "[]", '{"x": {"triton": "fast"}, "y": 3}'])
def test_a_damaged_file_is_measured_afresh(text):
    backend_times.path().parent.mkdir(parents=True)
    backend_times.path().write_text(text)
    assert Clock(triton=2.1, compiled=1.4).measure()
    assert {"triton": 2.1, "compiled": 1.4} in json.loads(backend_times.path().read_text()).values()


def test_a_time_is_that_of_a_warm_replay(monkeypatch):
    class Event:
        """A stand-in for CUDA events, by which the n-th replay takes n milliseconds."""

        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            self.replays = calls.count("replay")

        def synchronize(self):
            calls.append("synchronize")

        def elapsed_time(self, end):
            assert end.replays == self.replays + 1
            return float(end.replays)

    calls: list[str] = []
    monkeypatch.setattr(backend_autotune, "CudaGraph", lambda *_: FakeGraph(calls))
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "device", contextlib.nullcontext)
    x = torch.ones(2)

    def work() -> None:
        x.add_(1)

    device, generator = torch.device("cuda"), torch.Generator()
    time = backend_autotune.replay_milliseconds(work, device, generator)
    assert time == 30.5  # the median of 21 .. 40
    assert calls == ["warm up", "warm up", "capture", *40 * ["replay", "synchronize"]]


# --- where times hold -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes",
    [
        {"batch": 63}, {"seq_len": 80}, {"n_embd": 128}, {"n_heads": 4}, {"n_layer": 2},
        {"injection": "mul"}, {"precision": "fp16"}, {"device": "cuda:1"}, {"replayed": False},
    ],
    ids=str,
)  # fmt: skip
def test_times_hold_for_one_kind_of_call(changes):
    Clock(triton=2.1, compiled=1.4).measure()
    assert backends.select(changed(STEP, **changes)).chosen == "triton"
    assert backends.select(changed(STEP, n_loops=20, window=5)).chosen == "compiled"


def test_times_do_not_hold_in_tf32(monkeypatch):
    fp32 = changed(STEP, precision="fp32", n_embd=64)
    Clock(triton=2.1, compiled=1.4, reference=2.0).measure(fp32)
    assert backends.select(fp32).chosen == "compiled"
    monkeypatch.setattr(backend_times, "operand_precision", lambda dtype: "tf32")
    assert backends.select(fp32).chosen == "triton"


def test_deterministic_mode_does_not_depend_on_times():
    Clock(triton=2.1, compiled=1.4).measure()
    torch.use_deterministic_algorithms(True)
    assert backends.select(STEP).chosen == "triton"


def test_a_forced_provider_of_attention_is_kept():
    Clock(triton=2.1, compiled=1.4).measure()
    assert backends.select(changed(STEP, attention="triton")).chosen == "triton"


def test_a_backend_that_was_fastest_but_cannot_run_is_passed_over(monkeypatch):
    Clock(triton=2.1, compiled=1.4).measure()
    monkeypatch.setitem(backends.UNSUPPORTED, "compiled", lambda problem: "inside torch.compile")
    explanation = backends.select(STEP)
    assert explanation.chosen == "triton"
    assert explanation.reasons["compiled"] == "inside torch.compile"


def test_graphs_say_to_the_op_that_calls_are_replayed(monkeypatch):
    """The op is told so with and without gradients, while graphs are on."""
    seen = []
    monkeypatch.setattr(
        backends, "UNSUPPORTED", {"reference": lambda problem: seen.append(problem) or None}
    )
    model, (xs, ys) = small_model(), prompt()

    def train() -> None:
        model.loss(xs, ys).backward()

    def infer() -> None:
        with torch.no_grad():
            model(xs, ys)

    for off in (None, "they are off"):
        graphs = Graphs(lambda: FakeGraph([]), budget=1, unsupported=off)
        graphs.run("training", train)
        graphs.run("inference", infer)
    infer()
    kinds = {(problem.replayed, problem.training): None for problem in seen}
    assert list(kinds) == [(True, True), (True, False), (False, False)]


# --- a training run -------------------------------------------------------------------------------

RUN = {
    "n_embd": 16, "n_head": 2, "batch_size": 4, "n_points": 5, "n_positions": 5, "n_loops": 3,
    "window": 2, "n_dims": 4, "steps": 10**6, "device": "cpu",
}  # fmt: skip


@pytest.fixture
def make_trainer(monkeypatch, tmp_path):
    """Make a trainer with only ``compiled`` (by aot_eager) and ``reference``, which run for real.

    ``trainer.timed`` lists timed backends. Times are invented: 1 and 3 ms.
    """
    table = {name: lambda problem: None for name in ("compiled", "reference")}
    monkeypatch.setattr(backends, "UNSUPPORTED", table)
    aot_eager = functools.partial(torch.compile, backend="aot_eager")
    monkeypatch.setattr(torch, "compile", aot_eager)

    def make(**changes) -> Trainer:
        config = dataclasses.replace(preset_config("tiny", "lr"), **{**RUN, **changes})
        trainer = Trainer(config, tmp_path)
        trainer.graphs = Graphs(lambda: FakeGraph([]), budget=1)
        trainer.timed = []

        def milliseconds(work, device, generator) -> float:
            trainer.timed.append(trainer.model.backend)
            work()
            return {"compiled": 1.0, "reference": 3.0}[trainer.model.backend]

        monkeypatch.setattr(backend_autotune, "replay_milliseconds", milliseconds)
        return trainer

    yield make
    torch._dynamo.reset()
    compiled_backend._compiled_step.cache_clear()


def test_a_training_run_measures_the_step_that_it_mostly_makes(make_trainer):
    schedules = CurriculumConfig(
        points=ScheduleConfig(3, 1, 1000, 5), loops=ScheduleConfig(1, 1, 1000)
    )
    trainer = make_trainer(curriculum=schedules)
    line = trainer.measure_backends()
    assert line.startswith("reference 3 ms, compiled 1 ms a training step")
    assert trainer.timed == ["reference", "reference", "compiled", "compiled"]
    measured, other = (
        explain_backend(trainer.model, 4, n_points, "fp32", replayed_training=True)
        for n_points in (5, 4)
    )
    assert (measured.chosen, other.chosen) == ("compiled", "reference")
    assert trainer.measure_backends() is None


def test_a_training_run_prints_times_before_its_choice(make_trainer, capsys):
    train.announce(make_trainer())
    printed = capsys.readouterr().out
    times = printed.index("reference 3 ms, compiled 1 ms a training step")
    assert times < printed.index("backend: compiled")
    assert "not reference: 3 ms a training step measured here, compiled takes 1" in printed


def test_measuring_changes_nothing_in_a_run(make_trainer):
    expected = make_trainer(backend="reference")
    trainer = make_trainer()
    assert trainer.measure_backends()
    trainer.model.backend = "reference"
    for each in (expected, trainer):
        each.training_step()
    assert torch.equal(trainer._sums, expected._sums)
    named = dict(expected.model.named_parameters())
    for name, parameter in trainer.model.named_parameters():
        assert torch.equal(parameter, named[name]), name


def test_a_failure_while_measuring_changes_nothing_in_a_run(make_trainer, monkeypatch):
    def fail(work, device, generator):
        trainer._loss(5, 3)[0].backward()  # half a step
        raise RuntimeError("operation not permitted when stream is capturing")

    expected = make_trainer(backend="reference", amp="fp16")
    trainer = make_trainer(amp="fp16")
    monkeypatch.setattr(backend_autotune, "replay_milliseconds", fail)
    line = trainer.measure_backends()
    assert "reference failed, RuntimeError: operation not permitted" in line
    for each in (expected, trainer):
        each.training_step()
    named = dict(expected.model.named_parameters())
    for name, parameter in trainer.model.named_parameters():
        assert torch.equal(parameter, named[name]), name


def test_training_continues_on_the_fastest(make_trainer, monkeypatch):
    trainer = make_trainer()
    trainer.measure_backends()
    run, steps = compiled_backend.loop, []
    monkeypatch.setattr(
        compiled_backend, "loop", lambda *args, **kwargs: steps.append(1) or run(*args, **kwargs)
    )
    trainer.training_step()
    assert steps == [1]


@pytest.mark.parametrize(
    "changes", [{"backend": "reference"}, {"recompute": True}, {"steps": 1}], ids=str
)
def test_a_run_measures_nothing_that_could_not_change_its_backend(make_trainer, changes):
    trainer = make_trainer(**changes)
    if "steps" in changes:
        trainer.step = 1
    assert trainer.measure_backends() is None
    assert trainer.timed == []


def test_a_run_measures_nothing_in_deterministic_mode(make_trainer):
    trainer = make_trainer()
    torch.use_deterministic_algorithms(True)
    assert trainer.measure_backends() is None
    assert trainer.timed == []


def test_a_run_without_graphs_measures_nothing(make_trainer):
    trainer = make_trainer()
    trainer.graphs.unsupported = "several processes train the model"
    assert trainer.measure_backends() is None
    assert trainer.timed == []
