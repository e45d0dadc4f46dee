"""benchmarks.compare counts right, refuses wrong results, and reports what it can't measure."""

import dataclasses
import itertools
import json
import re
import signal
from typing import ClassVar

import pytest
import torch
from conftest import needs_engine
from fake_graphs import FakeGraph
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import compare, measure, report, workload
from benchmarks.cases import ALL_CASES, CASES, CONTENDERS, PUZZLES, Case, PuzzleCase, flops, modes
from benchmarks.correctness import WrongResult, check
from benchmarks.processes import Measuring
from benchmarks.workload import Workload
from looped_fast import LoopedTransformer
from looped_fast.ops import backends
from looped_fast.ops.graphs import Graphs

TINY = Case(batch=2, n_points=4, n_loops=3, window=2, n_dims=3, n_embd=32, n_head=4)
TINY_PUZZLE = PuzzleCase(
    batch=3, seq_len=6, vocab_size=5, hidden_size=32, num_heads=2, H_cycles=2, L_cycles=2
)
EAGER, EAGER_BF16 = CONTENDERS["eager fp32"], CONTENDERS["eager bf16"]
PROVIDERS = ("flash_attn", "sdpa", "triton")
PEAK = {"fp32": 100.0, "bf16": 200.0}


@pytest.mark.parametrize("mode", ["training", "inference"])
def test_flops_are_those_of_the_matrix_products(mode):
    with FlopCounterMode(display=False) as counter:
        Workload(TINY, EAGER, mode)()
    S, D, B = 2 * TINY.n_points, TINY.n_embd, TINY.batch
    products = 2 * TINY.n_loops + (5 * TINY.window if mode == "training" else 0)
    hidden = products * B * 2 * D * (S**2 - S * (S + 1) / 2)  # the counter counts all scores
    assert counter.get_total_flops() == pytest.approx(flops(TINY, mode) + hidden, rel=0.02)


@pytest.mark.parametrize("mode", ["training", "inference"])
def test_flops_of_a_puzzle_are_those_of_the_matrix_products(mode):
    with FlopCounterMode(display=False) as counter:
        Workload(TINY_PUZZLE, EAGER, mode)()
    assert counter.get_total_flops() == pytest.approx(flops(TINY_PUZZLE, mode), rel=0.02)


@pytest.mark.parametrize("mode", ["training", "inference"])
@pytest.mark.parametrize("contender", ["eager bf16", "engine fp32"])
@needs_engine
def test_puzzles_are_checked_and_timed(contender, mode):
    threads = torch.get_num_threads()
    row = measure.measure(TINY_PUZZLE, CONTENDERS[contender], mode, [1], repeats=2, seconds=1)
    torch.set_num_threads(threads)
    assert row["gflops"] == pytest.approx(flops(TINY_PUZZLE, mode) / row["ms"] / 1e6)


def test_wrong_results_of_a_puzzle_are_not_timed(monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda step, **_: WRONG_STEPS["gradient of "](step))
    with pytest.raises(WrongResult, match=r"gradient of .*is right"):
        check(TINY_PUZZLE, CONTENDERS["compiled step fp32"], "training")


def test_puzzles_have_one_loss_and_sizes_in_their_heading():
    case = PUZZLES["sudoku9"]
    assert modes(case, CONTENDERS["engine fp32"]) == ["training", "inference"]
    assert modes(case, CONTENDERS["engine fp32 autograd"]) == []
    assert case.describe() == (
        "B=8 S=97 D=512 heads=8 hidden=1536 L_layers=2 H_cycles=3 L_cycles=6"
    )


def test_flops_reproduce_the_feasibility_study():
    # prototypes/cpu/README.md: LR training in 1.05 s at 405 GFLOP/s, DT inference 3.36 s at 452.
    assert flops(CASES["lr"], "training") == pytest.approx(1.05 * 405e9, rel=0.02)
    assert flops(CASES["dt"], "inference") == pytest.approx(3.36 * 452e9, rel=0.02)


@pytest.mark.parametrize("mode", ["training", "inference"])
@pytest.mark.parametrize("contender", [EAGER, EAGER_BF16], ids=["fp32", "bf16"])
def test_right_results_pass_the_check(contender, mode):
    check(TINY, contender, mode)


# Steps with a fault, each of which replaces a compiled one.
WRONG_STEPS = {
    "predictions": lambda step: lambda *args: 1.001 * step(*args),
    "predictions: error nan": lambda step: lambda *args: torch.nan * step(*args),
    "gradient of ": lambda step: lambda *args: _scaled_gradient(step(*args)),
}


def _scaled_gradient(x):
    return x + 0.01 * (x - x.detach())


@pytest.mark.parametrize(("message", "wrong"), WRONG_STEPS.items(), ids=WRONG_STEPS)
def test_wrong_results_are_not_timed(message, wrong, monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda step, **_: wrong(step))
    monkeypatch.setattr(measure, "seconds_of", lambda *_: pytest.fail("timed"))
    with pytest.raises(WrongResult, match=f"{message}.*is right"):
        measure.measure(TINY, CONTENDERS["compiled step fp32"], "training", [1], 2, 0.1)


def test_a_loss_without_predictions_is_checked_by_its_gradients(monkeypatch):
    contender = dataclasses.replace(EAGER, fused_loss=True)
    check(TINY, contender, "training")
    right = LoopedTransformer.loss
    monkeypatch.setattr(LoopedTransformer, "loss", lambda *args: 1.01 * right(*args))
    with pytest.raises(WrongResult, match=r"gradient of .*is right"):
        check(TINY, contender, "training")


def test_a_measurement_holds_time_rate_memory_and_threads():
    threads = torch.get_num_threads()
    row = measure.measure(TINY, EAGER, "training", [1], repeats=3, seconds=10)
    torch.set_num_threads(threads)
    assert row["threads"] == 1
    assert row["repeats"] == 3
    assert 0 < row["ms_min"] <= row["ms"] <= row["ms_max"]
    assert row["gflops"] == pytest.approx(flops(TINY, "training") / row["ms"] / 1e6)
    assert row["compile_s"] is None


@pytest.mark.parametrize("mode", ["training", "inference"])
def test_a_full_batch_is_checked_and_timed_on_one_workload(mode, monkeypatch):
    made = []
    monkeypatch.setattr(
        measure, "Workload", lambda *a, **k: made.append(Workload(*a, **k)) or made[-1]
    )
    row = measure.measure_full_batch(TINY, EAGER_BF16, mode, repeats=3, seconds=10, device="cpu")
    assert len(made) == 1
    assert made[0].case.batch == TINY.batch
    assert (row["repeats"], row["launches"]) == (3, None)
    assert 0 < row["ms_min"] <= row["ms"]


def test_a_full_batch_with_wrong_results_is_not_timed(monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda step, **_: WRONG_STEPS["predictions"](step))
    monkeypatch.setattr(measure, "_times", lambda *_: pytest.fail("timed"))
    contender = CONTENDERS["compiled step fp32"]
    with pytest.raises(WrongResult, match=r"predictions.*is right"):
        measure.measure_full_batch(TINY, contender, "inference", 2, 0.1, "cpu")


def test_slow_contenders_are_repeated_twice_at_least(monkeypatch):
    monkeypatch.setattr(measure, "seconds_of", lambda *_: 30.0)
    assert measure.measure(TINY, EAGER, "inference", [1], repeats=50, seconds=20)["repeats"] == 2


def test_memory_added_is_the_peak_of_this_run_alone():
    torch.ones(50_000_000)  # 200 MB, freed at once: an earlier peak
    added = measure.memory_added_by(lambda: torch.ones(20_000_000))  # 80 MB, freed at once
    assert added == pytest.approx(80, rel=0.1)


@needs_engine
def test_memory_that_the_engine_has_kept_is_added_again():
    run = Workload(CASES["small"], CONTENDERS["engine fp32 autograd"], "training")
    first, second = measure.memory_added_by(run), measure.memory_added_by(run)
    assert second == pytest.approx(first, rel=0.2)


def rows(**ms):
    return [
        {"case": "lr", "mode": "inference", "contender": name.replace("_", " "), "ms": value,
         "gflops": 50.0, "memory_mb": 1.0, "launches": None, "threads": 2,
         "repeats": 3, "compile_s": None}
        for name, value in ms.items()
    ]  # fmt: skip


def test_ratios_are_against_eager_fp32_and_the_best_opponent_of_the_precision():
    measured = rows(
        eager_fp32=100.0, compiled_step_fp32=80.0, eager_bf16=40.0, compiled_step_bf16=60.0,
        compiled_step_bf16_graphs=30.0, engine_fp32=20.0, engine_bf16=10.0,
    )  # fmt: skip
    report.add_ratios(measured, PEAK)
    engine_fp32, engine_bf16 = measured[-2:]
    assert (engine_fp32["eager_fp32_ratio"], engine_bf16["eager_fp32_ratio"]) == (5, 10)
    assert (engine_fp32["best_opponent_ratio"], engine_bf16["best_opponent_ratio"]) == (4, 3)
    assert (engine_fp32["share_of_peak"], engine_bf16["share_of_peak"]) == (0.5, 0.25)


def test_without_opponents_there_are_no_ratios():
    measured = rows(engine_bf16=10.0)
    report.add_ratios(measured, PEAK)
    assert measured[0]["eager_fp32_ratio"] is None
    assert measured[0]["best_opponent_ratio"] is None
    assert re.search(r"engine bf16 +10\.00 +- +- +50 +25", report.tables(measured))


class FakeMeasuring:
    """Stand-in for a process: answers ``done`` for each job, or fails if in ``failures``."""

    started: ClassVar[list[list[str]]] = []
    failures: ClassVar[dict[str, str]] = {}

    def __init__(self, arguments):
        self.jobs = list(itertools.takewhile(lambda a: not a.startswith("--"), arguments))
        self.started.append(list(self.jobs))

    def next(self, timeout):
        assert timeout > 0
        if not self.jobs:
            return PEAK
        job = self.jobs.pop(0)
        if job in self.failures:
            raise RuntimeError(self.failures[job])
        case, mode, contender = measure.parse_job(job)
        (row,) = rows(**{contender.replace(" ", "_"): 100.0})
        return row | {"case": case, "mode": mode}

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass


@pytest.fixture
def started(monkeypatch):
    """Jobs of each process that is started, in lists; the first process measures the peak."""
    monkeypatch.setattr(compare, "Measuring", FakeMeasuring)
    monkeypatch.setattr(compare, "unsupported", lambda *_: None)
    monkeypatch.setattr(FakeMeasuring, "started", [])
    monkeypatch.setattr(FakeMeasuring, "failures", {})
    return FakeMeasuring.started


def test_main_writes_json_with_provenance_and_a_chart(tmp_path, monkeypatch, capsys, started):
    reason = "benchmarks.correctness.WrongResult: predictions: error 1e-2"
    monkeypatch.setitem(FakeMeasuring.failures, "lr inference: eager bf16", reason)
    compare.main(
        ["--cases", "lr", "--contenders", "eager fp32", "eager bf16", "--out", str(tmp_path)]
    )
    result = json.loads((tmp_path / "compare_cpu.json").read_text())
    assert {"cpu", "cores", "torch", "commit", "command", "date"} <= result["provenance"].keys()
    assert result["peak_gflops"] == PEAK
    measured = [(row["contender"], row["mode"]) for row in result["rows"]]
    assert measured == [
        ("eager fp32", "training"), ("eager fp32", "inference"), ("eager bf16", "training"),
    ]  # fmt: skip
    assert result["not_measured"] == [
        {"case": "lr", "mode": "inference", "contender": "eager bf16", "reason": reason}
    ]
    page = (tmp_path / "compare_cpu.md").read_text()
    assert f"- commit: {result['provenance']['commit']}" in page
    assert "| eager fp32" in page
    assert "- not measured: lr, inference, eager bf16" in page
    assert (tmp_path / "compare_cpu.png").read_bytes().startswith(b"\x89PNG")
    printed = capsys.readouterr().out
    assert "lr, inference: B=64 S=82 D=256" in printed
    assert f"not measured: lr, inference, eager bf16: {reason}" in printed


def test_an_engine_that_can_not_run_is_explained_and_not_started(monkeypatch):
    monkeypatch.setitem(backends.UNSUPPORTED, "cpu", lambda problem: "no compiler was found")
    monkeypatch.setattr(compare, "Measuring", FakeMeasuring)
    result = compare.compare(["lr"], ["engine fp32"], repeats=1, seconds=1)
    entry, _ = result["not_measured"]
    assert (entry["case"], entry["mode"]) == ("lr", "training")
    assert entry["contender"] == "engine fp32"
    assert "can't run this: no compiler was found" in entry["reason"]


def test_only_training_tells_losses_apart(started):
    result = compare.compare(["lr_b1"], ["engine fp32 autograd"], repeats=1, seconds=1)
    assert started == [[]]  # the peak
    assert result["rows"] == result["not_measured"] == []
    assert modes(CASES["lr"], CONTENDERS["engine fp32 autograd"]) == ["training"]


def test_after_the_budget_nothing_is_started(started):
    result = compare.compare(["lr"], ["eager fp32"], repeats=1, seconds=1, budget=0)
    assert started == [[]]
    reasons = [entry["reason"] for entry in result["not_measured"]]
    assert reasons == ["the time of this run was over"] * 2


def test_on_a_cpu_each_contender_has_a_process_of_its_own(started):
    compare.compare(["lr", "lr_b1"], ["eager bf16"], repeats=1, seconds=1)
    lr = ["lr training: eager bf16", "lr inference: eager bf16"]
    assert started == [[], lr, ["lr_b1 inference: eager bf16"]]


def test_on_a_gpu_all_but_whole_compiled_models_share_a_process(started, monkeypatch):
    monkeypatch.setattr(compare, "provenance", lambda *_: {"load_before": 0})
    names = ["triton bf16 graphs", "compiled step bf16 graphs", "reduce-overhead bf16"]
    shared = [f"{job}: {name}" for name in names[:2] for job in ("lr training", "lr inference")]
    # A process that fails is replaced by another, which measures the jobs that remain.
    monkeypatch.setitem(FakeMeasuring.failures, shared[1], "CUDA error: an illegal address")
    result = compare.compare(["lr"], names, repeats=1, seconds=1, device="cuda")
    whole = [f"{job}: {names[2]}" for job in ("lr training", "lr inference")]
    assert started == [[], shared, shared[2:], whole]
    assert [row["reason"] for row in result["not_measured"]] == ["CUDA error: an illegal address"]
    assert len(result["rows"]) == 5


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_a_gpu_a_comparison_on_one_says_so_and_exits_2(capsys):
    assert compare.main(["--device", "cuda"]) == 2
    assert "sees no CUDA device here" in capsys.readouterr().err


def test_a_gpu_has_contenders_of_its_own(capsys):
    names = compare.parse_arguments(["--device", "cuda"]).contenders
    assert "triton bf16 graphs" in names
    assert "engine bf16" not in names
    for provider in PROVIDERS:
        assert CONTENDERS[f"triton bf16 graphs {provider}"].attention == provider
    with pytest.raises(SystemExit):
        compare.parse_arguments(["--device", "cuda", "--contenders", "engine bf16"])
    assert "'engine bf16' does not run on cuda" in capsys.readouterr().err


def test_launches_are_counted_in_a_profile():
    profile = [
        ("cudaLaunchKernel", 5), ("cuLaunchKernelEx", 3), ("cudaGraphLaunch", 1),
        ("cudaMemcpyAsync", 2), ("cudaStreamSynchronize", 9), ("aten::mm", 4),
    ]  # fmt: skip
    assert measure.count_launches(profile) == 11


@pytest.mark.parametrize("mode", ["training", "inference"])
def test_replays_are_checked_and_timed(mode, monkeypatch):
    """The path of a contender with CUDA graphs runs on a CPU."""
    calls = []

    def fake_graphs_on(device, mode):
        unsupported = None if mode == "on" else "off"
        return Graphs(lambda: FakeGraph(calls), budget=10**9, unsupported=unsupported)

    monkeypatch.setattr(workload, "graphs_on", fake_graphs_on)
    monkeypatch.setattr("looped_fast.model.transformer.check_prompt", lambda *_: None)
    contender = dataclasses.replace(EAGER, graphs=True)
    monkeypatch.setattr(workload, "LoopedTransformer", without_graphs)
    check(TINY, contender, mode)
    run = Workload(TINY, contender, mode)
    expected = Workload(TINY, contender, mode)
    expected.graphs = fake_graphs_on("cpu", "off")
    for _ in range(4):
        run()
        expected()
    assert ("replay" in calls) == (mode == "training")  # the model has its own for inference
    for ours, theirs in zip(run.model.parameters(), expected.model.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def without_graphs(*args, cuda_graphs, **kwargs):
    return LoopedTransformer(*args, cuda_graphs="off", **kwargs)


SETTINGS = ["--threads", "1", "--repeats", "1", "--seconds", "0.1"]


def test_a_process_prints_each_result_and_ends_with_its_reason():
    with Measuring(["lr_b1 inference: eager bf16", "lr training: nobody", *SETTINGS]) as process:
        assert process.next(60)["repeats"] == 2
        with pytest.raises(RuntimeError, match="KeyError: 'nobody'"):
            process.next(60)


def test_a_process_that_takes_too_long_is_ended():
    process = Measuring(["dt training: eager fp32", *SETTINGS])
    with process, pytest.raises(RuntimeError, match="not done after 0 s"):
        process.next(0.01)
    assert process._process.returncode == -signal.SIGKILL


def test_a_wrong_result_is_a_reason_and_the_next_one_is_measured(monkeypatch, capsys):
    def measured(case, contender, *_):
        if contender == EAGER:
            raise WrongResult("predictions: error 1e-2, at most 1e-3 is right")
        return {"ms": 1.0}

    monkeypatch.setattr(measure, "measure", measured)
    jobs = ["lr training: eager fp32", "lr training: eager bf16"]
    monkeypatch.setattr("sys.argv", ["measure", *jobs, *SETTINGS])
    measure.main()
    wrong, right = map(json.loads, capsys.readouterr().out.splitlines())
    assert wrong["reason"].startswith("wrong result: predictions: error 1e-2")
    assert right == {"case": "lr", "mode": "training", "contender": "eager bf16", "ms": 1.0}


def test_quick_leaves_out_large_cases_and_compilation():
    args = compare.parse_arguments(["--quick"])
    assert args.cases == ["small", "lr_b1"]
    engines = [
        [f"engine {precision}{how}" for how in ("", " autograd", " recompute")]
        for precision in ("bf16", "fp32")
    ]  # fmt: skip
    assert args.contenders == [*engines[0], "eager bf16", *engines[1], "eager fp32"]
    assert compare.parse_arguments([]).cases == list(ALL_CASES)
    args = compare.parse_arguments(["--quick", "--device", "cuda"])
    assert not any(CONTENDERS[name].compiles for name in args.contenders)
