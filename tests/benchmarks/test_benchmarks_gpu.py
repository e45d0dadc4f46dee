"""benchmarks.gpu: every part runs dry, reports what is missing, and keeps its results."""

import dataclasses
import json
import math
import tarfile
from importlib.util import find_spec
from types import SimpleNamespace

import pytest
import torch

from benchmarks import provenance
from benchmarks.cases import CASES
from benchmarks.correctness import WrongResult
from benchmarks.gpu import __main__ as command
from benchmarks.gpu import requirements
from benchmarks.gpu.parts import DEFAULT, PARTS
from benchmarks.gpu.visit import Visit, slug
from looped_fast.ops import triton_backend

needs_triton = pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed")
if find_spec("triton"):
    from looped_fast.kernels.candidates import Config, candidates

    from benchmarks.gpu import (
        accuracy,
        compile_cache,
        configurations,
        gpu_tests,
        kernel_times,
        paper,
        pieces,
        rows,
        smoke,
        steps,
    )
    from benchmarks.kernel_launches import Loop, launches_of


@pytest.fixture
def visit(tmp_path):
    return Visit(tmp_path, dry=True)


def lines(capsys):
    return capsys.readouterr().out.splitlines()


# --- what is missing ------------------------------------------------------------------------------


def test_missing_modules_are_named_with_the_command_that_installs_them(monkeypatch):
    there = requirements.find_spec
    absent = ("yaml", "hypothesis", "tyro")
    monkeypatch.setattr(
        requirements, "find_spec", lambda name: None if name in absent else there(name)
    )
    message = requirements.problems(["smoke", "tests"], dry=True)[0]
    assert "has no module yaml, tyro, hypothesis: " in message
    assert "-m pip install pyyaml tyro hypothesis;" in message
    assert requirements.problems(["rows"], dry=True)[0].count("yaml") == 2
    assert "tyro" not in requirements.problems(["rows"], dry=True)[0]


def test_without_pytorch_nothing_is_imported(monkeypatch):
    monkeypatch.setattr(requirements, "find_spec", lambda name: None)
    (message,) = requirements.problems(DEFAULT, dry=False)
    assert "has no module torch, triton, numpy" in message


@pytest.mark.parametrize(
    ("version", "message"), [(None, "is built without CUDA"), ("13.0", "sees no CUDA device here")]
)
def test_without_a_gpu_nothing_starts(version, message, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(torch, "version", SimpleNamespace(cuda=version, hip=None))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(requirements, "find_spec", lambda name: object())
    assert command.main(["smoke", "--out", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("gpu-check: PyTorch ")
    assert message in error
    assert not list(tmp_path.iterdir())


@needs_triton
@pytest.mark.parametrize(
    ("triton_version", "numpy_version", "fails"),
    [("3.6.0", "2.4.0", True), ("3.6.0", "2.3.5", False), ("3.7.0", "2.4.1", False)],
)
def test_an_interpreter_that_fails_with_this_numpy_is_named(
    triton_version, numpy_version, fails, monkeypatch
):
    monkeypatch.setattr("triton.__version__", triton_version)
    monkeypatch.setattr("numpy.__version__", numpy_version)
    reason = triton_backend.unsupported_tensors("cpu", torch.float32, 64)
    assert (reason is not None) == fails
    if fails:
        assert reason == requirements.problems(["smoke"], dry=True)[0]
        assert "Triton 3.6.0 fails with NumPy 2.4.0" in reason
        assert "pip install 'numpy<2.4'" in reason


def test_the_commit_is_that_of_the_preparation_where_there_is_no_git(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(provenance, "PREPARED_COMMIT", tmp_path / "commit")
    assert provenance.commit() == "unknown"
    (tmp_path / "commit").write_text("abc+changes\n")
    assert provenance.commit() == "abc+changes (as prepared; no git here)"


# --- processes and results ------------------------------------------------------------------------


def test_a_part_ends_at_its_limit_and_says_so(visit):
    outcome = command.run_part("pieces", visit, limit=0.2)
    assert outcome.status == "stopped after 0 s; what it had measured is kept"
    assert outcome.seconds < 5


def test_parts_keep_their_results_until_they_run_again(visit, monkeypatch, capsys):
    origin = provenance.provenance("benchmarks.gpu")
    visit.start("rows", provenance=origin, status="not finished", output="")  # interrupted
    visit.save("rows", best={"lr": {"row_forward_kernel": [64, 64, 64, 8, 2]}})
    statuses = iter(["done", "failed with exit status 1"])

    def run_part(part, visit, limit):
        assert limit == PARTS[part].limit
        visit.save(part, measured=1)
        return command.Outcome(next(statuses), 2.0, f"output of {part}\n")

    monkeypatch.setattr(command, "run_part", run_part)
    visit.save("smoke", old=True)
    assert not command.run_parts(["smoke", "steps"], visit, budget=500)
    results = json.loads((visit.out / "gpu_dry_run.json").read_text())
    assert list(results) == ["rows", "smoke", "steps"]
    assert results["smoke"].keys() == {"provenance", "measured", "status", "seconds", "output"}
    assert results["smoke"]["provenance"]["torch"] == torch.__version__
    assert results["steps"]["status"] == "failed with exit status 1"
    page = (visit.out / "gpu_dry_run.md").read_text()
    assert "## smoke" in page
    assert "output of steps\n```" in page
    assert visit.best_configs("lr") == {"row_forward_kernel": [64, 64, 64, 8, 2]}
    assert "--- steps: failed with exit status 1, 2 s" in lines(capsys)


def test_what_the_budget_leaves_out_is_named(visit, monkeypatch, capsys):
    monkeypatch.setattr(command, "run_part", lambda *_: pytest.fail("started"))
    assert not command.run_parts(["smoke", "steps"], visit, budget=0)
    assert "--- not started, the 0 s were over: smoke, steps" in lines(capsys)


def test_cards_are_named_as_files_are():
    assert slug("NVIDIA H100 80GB HBM3") == "h100_80gb_hbm3"


def test_an_unknown_part_is_refused(capsys):
    with pytest.raises(SystemExit):
        command.main(["smok"])
    assert "no part smok; there are compile, smoke" in capsys.readouterr().err


@needs_triton
def test_a_dry_run_of_training_from_the_command_line(tmp_path):
    """The run goes through the processes of the command, the part and the training."""
    assert command.main(["train", "--dry", "--out", str(tmp_path)]) == 0
    result = json.loads((tmp_path / "gpu_dry_run.json").read_text())["train"]
    assert result["status"] == "done"
    assert [line["step"] for line in result["log"]] == [1, 2]
    assert "steps_per_s" in (tmp_path / "gpu_dry_run.md").read_text()


@needs_triton
def test_a_run_of_the_paper_is_packed(visit, monkeypatch):
    def trained(run_dir, arguments, seconds, visit, task):
        assert (seconds, task) == (7, "dt")
        run_dir.mkdir()
        (run_dir / "metrics.jsonl").write_text("{}")
        return [{"step": 1}]

    monkeypatch.setenv("SECONDS", "7")
    monkeypatch.setenv("TASK", "dt")
    monkeypatch.setattr(paper, "trained", trained)
    paper.run(visit)
    with tarfile.open(visit.out / "paper.tgz") as archive:
        assert "dt-paper/metrics.jsonl" in archive.getnames()
    assert visit.load()["paper"]["log"] == [{"step": 1}]
    monkeypatch.setenv("SECONDS", "3600")
    with pytest.raises(SystemExit, match="SECONDS = 3600 is more than 420 in one visit"):
        paper.run(visit)


# --- parts ----------------------------------------------------------------------------------------


@needs_triton
def test_smoke_runs_dry(visit, capsys):
    smoke.run(visit)
    found = visit.load()["smoke"]
    assert found["worst_error"].keys() == {"GPT-2", "TRM"}
    assert all(0 < error["share"] <= 1 for error in found["worst_error"].values())
    assert any(line.startswith("the loop, forward and backward") for line in lines(capsys))


@needs_triton
@pytest.mark.parametrize("share", [1.01, math.nan])
def test_smoke_fails_where_numbers_are_wrong(share, visit, monkeypatch):
    monkeypatch.setattr(smoke, "worst_error", lambda *_: accuracy.Error(share, "states"))
    with pytest.raises(WrongResult, match="states"):
        smoke.run(visit)


@needs_triton
def test_a_wrong_kernel_is_over_the_limit(visit, monkeypatch):
    right = accuracy.results

    def wrong(case, device, dtype, backend, precision, block):
        found = right(case, device, dtype, "reference", precision, block)
        if backend == "triton":
            found["gradient 3 of loss"] *= 1.1
        return found

    monkeypatch.setattr(accuracy, "results", wrong)
    accuracy._limits.cache_clear()
    error = accuracy.worst_error(visit.case("lr"), visit.device)
    accuracy._limits.cache_clear()
    assert error.tensor == "gradient 3 of loss"
    assert error.share > 1


@needs_triton
def test_a_wrong_kernel_of_trms_block_is_over_the_limit(visit, monkeypatch):
    case, right = visit.case("lr"), accuracy.results
    block = accuracy.trm_block(case)

    def wrong(case, device, dtype, backend, precision, block):
        found = right(case, device, dtype, "reference", precision, block)
        if backend == "triton":
            found["gradient 1 of states"] *= 1.1
        return found

    monkeypatch.setattr(accuracy, "results", wrong)
    accuracy._limits.cache_clear()
    error = accuracy.worst_error(case, visit.device, "bf16", block)
    accuracy._limits.cache_clear()
    assert error.tensor == "gradient 1 of states"
    assert error.share > 1


@needs_triton
def test_rows_run_dry(visit):
    rows.run(visit)
    found = visit.load()["rows"]
    assert len(found["us_per_loop_step"]) == 3  # the last are those for few rows
    assert all(row["lr"] > 0 and row["error"] <= 1 for row in found["us_per_loop_step"].values())
    assert visit.best_configs("lr").keys() == {"row_forward_kernel", "row_backward_kernel"}


@needs_triton
def test_wrong_and_failed_configurations_do_not_win(visit, monkeypatch):
    found = {
        32: {"error": 0.5, "lr": 9.0}, 64: {"error": 1.5, "lr": 1.0},
        16: {"failed": "OutOfResources: shared memory"}, 128: {"error": 0.9, "lr": 8.0},
    }  # fmt: skip
    monkeypatch.setattr(rows, "_configurations", lambda *_: [Config(n) for n in found])
    monkeypatch.setattr(rows, "measured", lambda kernel, config, visit: found[config.rows])
    rows.run(visit)
    assert all(config[0] == 128 for config in visit.best_configs("lr").values())


@needs_triton
def test_a_configuration_that_fails_is_a_result(visit, monkeypatch):
    def fails(*_):
        raise RuntimeError("no PTX\nfor this")

    monkeypatch.setattr(rows, "worst_error", fails)
    row = rows.measured("row_forward_kernel", Config(32), visit)
    assert row == {"failed": "RuntimeError: no PTX"}


@needs_triton
def test_steps_run_dry(visit, capsys):
    steps.run(visit)
    (place,) = visit.load()["steps"]["table"].values()
    assert all(row["ms"] > 0 and "wrong" not in row for row in place.values())
    assert len(place) == 3
    assert "times as fast" in lines(capsys)[-1]


@needs_triton
def test_steps_compare_with_the_fastest_opponent_in_bf16_and_mark_wrong_results():
    table = {
        "triton bf16 graphs, tuned": {"ms": 2.0, "wrong": "predictions: error 1"},
        "triton bf16 graphs, best of rows": {"ms": 3.0},
        "eager bf16": {"ms": 9.0}, "eager bf16 graphs": {"failed": "no memory"},
        "compiled step bf16 graphs": {"ms": 5.0}, "eager fp32": {"ms": 1.0},
    }  # fmt: skip
    assert steps.compared(table) == (
        "triton bf16 graphs, tuned (wrong) 2.00 ms, compiled step bf16 graphs 5.00 ms: "
        "2.50 times as fast"
    )
    assert "too little" in steps.compared({"eager bf16": {"ms": 9.0}})
    assert "WRONG: predictions" in steps.described(table["triton bf16 graphs, tuned"])


@needs_triton
def test_a_contender_that_fails_does_not_end_the_table(visit, monkeypatch):
    def fails(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory.\nTried to")

    monkeypatch.setattr(steps, "measure_full_batch", fails)
    row = steps.measured(steps.ENTRIES[0], "lr", "training", visit)
    assert row == {"failed": "OutOfMemoryError: CUDA out of memory."}


@needs_triton
def test_the_profile_runs_dry(visit):
    kernel_times.run(visit)
    assert len(visit.load()["profile"]["us_count_kernel"]) > 10


@needs_triton
def test_pieces_run_dry(visit):
    pieces.run(visit)
    values = visit.load()["pieces"]["values"]
    assert len(values) == 11
    assert all(value > 0 for value in values.values())


@needs_triton
def test_the_gpu_tests_share_the_gpu_among_workers_where_xdist_is_installed(monkeypatch):
    call = gpu_tests.command(dry=False)
    assert call[2:6] == ["pytest", "-m", "gpu", "tests"]
    monkeypatch.setattr(gpu_tests, "find_spec", lambda name: None)
    assert "-n" not in gpu_tests.command(dry=False)


@needs_triton
def test_failed_gpu_tests_fail_the_part(visit, monkeypatch, capsys):
    done = SimpleNamespace(stdout="...\n1 failed, 70 passed in 3.00s\n", returncode=1)
    monkeypatch.setattr(gpu_tests.subprocess, "run", lambda *_, **__: done)
    with pytest.raises(SystemExit):
        gpu_tests.run(visit)
    assert visit.load()["tests"]["counts"] == {"failed": 1, "passed": 70}


# --- configurations -------------------------------------------------------------------------------

WIDTHS = {"row": 256, "attention": 32}


def width(kernel):
    return WIDTHS[kernel.split("_")[0]]


@needs_triton
def test_kernels_run_with_forced_configurations_and_first_candidates():
    config = Config(64, 64, 64, 8, 2)
    attention = Config(64, 0, 32, 4, 2)
    chosen = {
        "row_forward_kernel": config.astuple(), "attention_backward_kernel": attention.astuple(),
    }  # fmt: skip
    with configurations.forced(chosen):
        forward, backward = launches_of(Loop("add", 1, 3, 2), "bf16", 1, 6, 256, 32)
    expected = {
        name: candidates(name, "sm_80", width(name), "bf16")[0] for name in configurations.KERNELS
    } | {"row_forward_kernel": config, "attention_backward_kernel": attention}
    for launch in (*forward, *backward):
        if launch.name in expected:
            assert launch.config == expected[launch.name]


@needs_triton
def test_every_configuration_is_compiled_in_every_form_that_is_measured():
    jobs = compile_cache.jobs_of("measure", "sm_90")
    for kernel in configurations.KERNELS:
        every = configurations.configurations(kernel, "sm_90", width(kernel), "bf16")
        assert len(every) == len(set(every)) >= 4
        compiled = {c for launch, c in jobs if launch.name == kernel and "*bf16" in
                    launch.types.values()}  # fmt: skip
        assert compiled == set(every)


def test_a_dry_run_is_tiny_and_a_real_one_at_paper_size(tmp_path):
    assert Visit(tmp_path).case("dt") == CASES["dt"]
    assert list(Visit(tmp_path).cases) == ["lr", "dt", "lr_b1", "dt_b1"]
    tiny = Visit(tmp_path, dry=True).case("lr")
    assert dataclasses.replace(tiny, batch=64).batch * tiny.n_points < 200
