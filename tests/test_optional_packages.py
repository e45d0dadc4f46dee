"""Without the packages of extras everything else works, and one line says what is missing."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch

from looped_fast import LoopedTransformer, evaluate, openml, reproduce, state_probes, sweep
from looped_fast.evaluation import report
from looped_fast.evaluation.report import can_write
from looped_fast.paper import openml as openml_experiment
from looped_fast.paper.ablations import SWEEPS
from looped_fast.paper.results_page import numbers_file
from looped_fast.training import checkpoint
from looped_fast.training.config import TrainConfig
from looped_fast.training.log import METRICS_FILE, MetricsLog, read_metrics

ROOT = Path(__file__).parent.parent
REMEDY = "to have them, pip install matplotlib tensorboard"
SMALL = {"n_embd": 32, "n_head": 2, "n_points": 6, "n_positions": 6, "n_loops": 3, "window": 2}


@pytest.fixture
def none_left_out(monkeypatch):
    """Nothing was said to be left out yet."""
    monkeypatch.setattr(report, "_left_out", set())


@pytest.fixture
def no_report(none_left_out, monkeypatch):
    """Neither matplotlib nor TensorBoard can be imported."""
    for module in ("matplotlib.figure", "PIL", "torch.utils.tensorboard"):
        monkeypatch.setitem(sys.modules, module, None)


@pytest.fixture
def run(tmp_path):
    """The folder of a run that was saved before any training."""
    config = TrainConfig(**SMALL, n_dims=3, steps=5)
    model = LoopedTransformer(config.model_config())
    optimizer = torch.optim.Adam(model.parameters())
    folder = tmp_path / "runs" / "lr-looped-tiny"
    checkpoint.save(folder, 5, model, optimizer, config=config.to_dict())
    return folder


def said(caplog) -> list[str]:
    return [line for line in caplog.messages if line.startswith("not written: ")]


@pytest.mark.usefixtures("no_report")
def test_what_is_left_out_is_said_once_with_the_remedy(caplog):
    assert not can_write("plots")
    assert not can_write("plots", "TensorBoard events")
    assert not can_write("TensorBoard events")
    first, second = said(caplog)
    assert first == f"not written: plots ({halted('matplotlib.figure')}); {REMEDY}"
    assert second.startswith("not written: TensorBoard events (import of torch.utils.tensorboard ")


@pytest.mark.usefixtures("no_report")
def test_both_are_said_in_one_line(caplog):
    assert not can_write("plots", "TensorBoard events")
    (line,) = said(caplog)
    assert line.count("halted") == 2
    assert line.endswith(REMEDY)


def halted(module):
    return f"import of {module} halted; None in sys.modules"


@pytest.mark.usefixtures("none_left_out")
def test_what_is_there_is_written_and_nothing_is_said(caplog):
    assert can_write("plots", "TensorBoard events")
    assert caplog.messages == []


@pytest.mark.usefixtures("none_left_out")
@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (TypeError("Descriptors cannot be created directly.\nIf this ..."), "Descriptors cannot "),
        (ImportError("numpy.core.multiarray failed to import"), "numpy.core.multiarray failed"),
        (AttributeError(), "AttributeError"),
    ],
)
def test_a_package_that_is_broken_counts_as_missing(monkeypatch, caplog, error, reason):
    def broken(name):
        raise error

    monkeypatch.setattr(report, "import_module", broken)
    assert not can_write("plots")
    (line,) = said(caplog)
    assert line.startswith(f"not written: plots ({reason}")
    assert "\n" not in line


@pytest.mark.usefixtures("no_report")
def test_a_log_without_tensorboard_has_every_line(tmp_path, caplog):
    for _ in range(2):
        log = MetricsLog(tmp_path, 0)
        log.write(1, {"loss": 0.5, "errors": {8: [1.0, 0.5]}})
        log.close()
    assert [line["step"] for line in read_metrics(tmp_path / METRICS_FILE)] == [1]
    assert [path.name for path in tmp_path.iterdir()] == [METRICS_FILE]
    assert len(said(caplog)) == 1


@pytest.mark.usefixtures("no_report")
@pytest.mark.parametrize(
    ("flags", "files"),
    [
        ((), ["evaluation.json", "loops.csv", "positions.csv"]),
        (("--ood",), ["ood.csv", "ood.json"]),
    ],
)
def test_an_evaluation_writes_its_numbers(run, tmp_path, caplog, capsys, flags, files):
    line = [
        "--baselines",
        "none",
        "--prompts",
        "20",
        "--loop-prompts",
        "20",
        "--max-loops",
        "2",
        "--loops",
        "3",
    ]
    out = tmp_path / "out"
    assert evaluate.main([str(run), *line, *flags, "--out", str(out)]) == 0
    assert sorted(path.name for path in out.iterdir()) == files
    assert len(said(caplog)) == 1
    assert capsys.readouterr().out.endswith(f"\nnumbers: {out}\n")


@pytest.mark.usefixtures("no_report")
def test_a_sweep_writes_its_numbers(tmp_path, monkeypatch, caplog, capsys):
    runs = {"two loops": {**SMALL, "n_loops": 2}, "three loops": SMALL}
    monkeypatch.setitem(SWEEPS, "two", lambda base: runs)
    line = ["two", "--preset", "tiny", "--steps", "2", "--prompts", "20", "--out", str(tmp_path)]
    assert sweep.main(line) == 0
    files = sorted(path.name for path in tmp_path.iterdir())
    assert files == ["1-two-loops", "2-three-loops", "sweep.csv", "sweep.json"]
    assert len(said(caplog)) == 1
    assert capsys.readouterr().out.endswith(f"\nnumbers: {tmp_path / 'sweep.json'}\n")


@pytest.mark.usefixtures("no_report")
def test_an_experiment_on_tabular_sets_writes_its_numbers(tmp_path, monkeypatch, caplog, capsys):
    row = {predictor: (0.5, 0.1) for predictor in openml_experiment.PREDICTORS}
    monkeypatch.setattr(openml_experiment, "load_sets", lambda data: [])
    monkeypatch.setattr(openml_experiment, "run", lambda *_: {"wine": row})
    assert openml.main(["--out", str(tmp_path)]) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["openml.csv", "openml.json"]
    assert len(said(caplog)) == 1
    assert capsys.readouterr().out.endswith(f"\nnumbers: {tmp_path / 'openml.json'}\n")


@pytest.mark.usefixtures("no_report")
def test_probes_write_their_numbers(run, tmp_path, caplog, capsys):
    line = ["--steps", "2", "--batch-size", "4", "--test-prompts", "8", "--out"]
    out = tmp_path / "probes"
    assert state_probes.main([str(run), *line, str(out)]) == 0
    assert [path.name for path in out.iterdir()] == ["probes.json"]
    assert len(said(caplog)) == 1
    assert capsys.readouterr().out.endswith(f"\nnumbers: {out / 'probes.json'}\n")


@pytest.mark.usefixtures("no_report", "run")
def test_the_page_of_results_is_written(tmp_path, caplog):
    docs = tmp_path / "docs"
    line = ["lr", "probes", "--preset", "tiny", "--prompts", "20", "--probe-steps", "2"]
    assert (
        reproduce.main([*line, "--work", str(tmp_path), "--out", str(docs)]) == 3
    )  # there is no standard model
    files = sorted(path.name for path in docs.rglob("*.*"))
    assert files == ["lr.json", "probes.json", "results.md"]
    assert "positions" in json.loads(numbers_file(docs, "lr").read_text())
    assert len(said(caplog)) == 1


WITHOUT_EXTRAS = """
    import importlib, sys
    for name in sys.argv[1].split(","):
        sys.modules[name] = None
    import looped_fast
    commands = "train evaluate sweep openml state_probes reproduce presets env_report".split()
    for name in [*commands, "kernels.candidates", "baselines", "distributions", "runs", "compat"]:
        importlib.import_module(f"looped_fast.{name}")
    from looped_fast import train
    sys.exit(train.main(sys.argv[2:]))
"""
EXTRAS = (
    "matplotlib", "PIL", "tensorboard", "google.protobuf", "grpc", "wandb", "triton", "flash_attn",
    "sklearn", "scipy", "joblib", "pandas", "xgboost", "peft", "transformers", "nvtx", "numba",
    "huggingface_hub",
)  # fmt: skip


def train_without_extras(*args: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(WITHOUT_EXTRAS), ",".join(EXTRAS), *map(str, args)],
        capture_output=True, text=True, timeout=300,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
    )  # fmt: skip


def test_a_run_without_any_extra_is_trained_and_resumed(tmp_path):
    settings = [
        f"--{name.replace('_', '-')}={value}" for name, value in {**SMALL, "batch_size": 4}.items()
    ]
    quick = ["--preset=tiny", "--eval-prompts=8", "--log-every=5", "--device=cpu", *settings]
    out = tmp_path / "run"
    first = train_without_extras(*quick, "--steps", 10, "--out", out)
    assert first.returncode == 0, first.stderr
    again = train_without_extras("--resume", out, "--steps", 15)
    assert again.returncode == 0, again.stderr
    for done in (first, again):
        (line,) = [text for text in done.stderr.splitlines() if "not written: " in text]
        assert line.startswith("not written: TensorBoard events (")
        assert "), plots (" in line
        assert line.endswith(REMEDY)
        assert "squared error / variance" in done.stdout
        assert "plot: " not in done.stdout
        assert f"weights: {out}" in done.stdout
    files = sorted(path.name for path in out.iterdir())
    assert files == ["checkpoints", "config.yaml", "metrics.jsonl", "results.json"]
    steps = [line["step"] for line in read_metrics(out / METRICS_FILE) if "loss" in line]
    assert steps == [5, 10, 15]
