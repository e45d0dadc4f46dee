"""``python -m looped_fast.train`` as its users run it."""

import dataclasses
import json
import os
import random
import signal
import subprocess
import sys
import textwrap
import time

import pytest
import torch
import yaml
from safetensors.torch import load_file

from looped_fast import compat
from looped_fast.evaluation.report import plot
from looped_fast.ops import backends, cpu_engine
from looped_fast.train import main
from looped_fast.training import checkpoint
from looped_fast.training.log import read_metrics
from looped_fast.training.presets import preset_config
from looped_fast.training.trainer import Trainer

pytestmark = pytest.mark.usefixtures("no_plot")

# The smallest run that still has a curriculum, several loops and clipping.
MINI = [
    *("--preset", "tiny", "--n-embd", "32", "--n-head", "2", "--batch-size", "4"),
    *("--n-points", "6", "--n-positions", "6", "--n-loops", "3", "--window", "2"),
    *("--curriculum.dims.interval", "5", "--eval-prompts", "8", "--log-every", "5"),
]


def train(*args):
    return main([*MINI, *map(str, args)])


def final_weights(run_dir):
    return load_file(checkpoint.latest(run_dir) / "model.safetensors")


def assert_same_bits(a, b):
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name


def test_a_run_writes_metrics_results_plot_events_and_weights(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("looped_fast.train.plot", plot)
    out = tmp_path / "run"
    assert train("--steps", 10, "--eval-every", 5, "--out", out) == 0
    lines = read_metrics(out / "metrics.jsonl")
    training = [line for line in lines if "loss" in line]
    assert [line["step"] for line in training] == [5, 10]
    assert [line["n_dims"] for line in training] == [2, 3]
    assert {"relative_error", "grad_norm", "lr", "tokens_per_s"} <= training[0].keys()
    evaluations = [line["errors"] for line in lines if "errors" in line]
    assert len(evaluations) == 2
    assert {n: len(e) for n, e in evaluations[0].items()} == {"2": 6, "3": 6, "6": 6}  # T, b, 2b
    results = json.loads((out / "results.json").read_text())
    assert results["prompts"] == 40
    assert results["errors"]["zero"][-1] == pytest.approx(1, abs=0.6)
    assert (out / "report.png").read_bytes().startswith(b"\x89PNG")
    assert list((out / "tensorboard").glob("events.*"))
    assert yaml.safe_load((out / "config.yaml").read_text())["n_embd"] == 32
    assert final_weights(out)["_read_in.weight"].shape == (32, 5)
    printed = capsys.readouterr().out
    assert "preset tiny" in printed.splitlines()[0]
    for expected in ("estimated time", "--preset paper", "least squares", "zero", "3 loops"):
        assert expected in printed
    assert "--preset tiny" not in printed  # it is the preset of this run


def test_without_a_preset_a_cpu_gets_small_and_says_so(tmp_path, capsys):
    args = [*MINI[2:], "--steps", "1", "--device", "cpu", "--out", str(tmp_path / "run")]
    assert main(args) == 0
    assert "preset small (the default on a CPU)" in capsys.readouterr().out.splitlines()[0]


@pytest.mark.parametrize("task", ["noisy_lr", "sparse_lr", "dt", "relu_2nn"])
def test_every_task_trains(tmp_path, task):
    assert train("--task", task, "--steps", 2, "--out", tmp_path / task) == 0


@pytest.mark.parametrize(
    "settings",
    [
        ("--model", "standard", "--n-loops", 1, "--window", 1, "--n-layer", 2),
        ("--model", "tied", "--n-loops", 2, "--window", 2),
        ("--train-prompts", 9),
        ("--amp", "bf16"),
        ("--amp", "fp16"),
        ("--recompute",),
        ("--injection", "mul", "--n-layer", 2),
        ("--injection", "none", "--curriculum.loops.start", None),
    ],
    ids=lambda s: "-".join(map(str, s[:2])).strip("-"),
)
def test_every_kind_of_run_trains(tmp_path, settings):
    assert train("--steps", 3, "--out", tmp_path / "run", *settings) == 0


def test_bf16_on_a_cpu_without_it_runs_in_fp32_and_says_so(tmp_path, monkeypatch, caplog):
    def cpu_unsupported(call):
        return "this CPU has no bf16" if call.settings.precision == "bf16" else None

    monkeypatch.setitem(backends.UNSUPPORTED, "cpu", cpu_unsupported)
    config = preset_config("tiny")
    trainer = Trainer(dataclasses.replace(config, amp="bf16"), tmp_path)
    assert trainer.precision == "fp32"
    assert caplog.messages == ["amp bf16 runs in fp32 here: this CPU has no bf16"]
    with trainer.autocast():
        assert not torch.is_autocast_enabled("cpu")


@pytest.mark.parametrize(
    ("backend", "machine", "has_bf16", "precision"),
    [
        ("auto", "x86_64", False, "fp32"),  # 2 to 24 times slower there
        ("auto", "AMD64", False, "fp32"),
        ("auto", "x86_64", True, "bf16"),
        ("auto", "aarch64", False, "bf16"),  # not known
        ("reference", "x86_64", False, "bf16"),  # asked for
    ],
)
def test_bf16_without_an_engine_is_not_slower_by_accident(
    tmp_path, monkeypatch, caplog, backend, machine, has_bf16, precision
):
    monkeypatch.setitem(backends.UNSUPPORTED, "cpu", lambda call: "there is no engine")
    monkeypatch.setattr("platform.machine", lambda: machine)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: has_bf16)
    config = dataclasses.replace(preset_config("tiny"), amp="bf16", backend=backend)
    assert Trainer(config, tmp_path).precision == precision
    reason = "without the engine, a CPU that has no AVX512_BF16 is slower in bf16"
    told = [f"amp bf16 runs in fp32 here: {reason}"] if precision == "fp32" else []
    assert caplog.messages == told


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_a_run_says_where_there_is_nothing_to_recompute(tmp_path, capsys, backend):
    if backend == "cpu" and (reason := cpu_engine.unsupported_precision("fp32")):
        pytest.skip(reason)
    given = ("--recompute", "--backend", backend, "--device", "cpu")
    assert train("--steps", 1, "--out", tmp_path / "run", *given) == 0
    printed = capsys.readouterr().out
    assert ("recompute changes nothing: the cpu backend keeps" in printed) == (backend == "cpu")


def test_training_learns(tmp_path):
    out = tmp_path / "run"
    # The data is four prompts, which any model that learns at all memorises.
    few = ("--train-prompts", 4, "--curriculum.dims.start", 5, "--warmup-steps", 10)
    assert train("--steps", 100, "--log-every", 20, "--out", out, *few) == 0
    errors = [x["relative_error"] for x in read_metrics(out / "metrics.jsonl") if "loss" in x]
    assert errors[0] > 0.2
    assert errors[-1] < 0.05


# --- resuming ---------------------------------------------------------------------------------

RUN = [*MINI, "--steps", "30", "--save-every", "4", "--eval-every", "1000"]


def start(*args, script=None):
    command = [sys.executable, *(["-c", script] if script else ["-m", "looped_fast.train"])]
    return subprocess.Popen(
        [*command, *map(str, args)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


# Each run is a fork, since importing PyTorch takes longer than training. A run that is killed in a
# write dies at the Nth call of os.fsync or os.rename in a checkpoint, or at the log's os.fsync.
KILLED_AND_RESUMED = textwrap.dedent("""
    import json, os, signal, sys
    import matplotlib.figure, torch._dynamo, torch.utils.tensorboard  # as a run would
    from looped_fast.training import checkpoint
    from looped_fast.train import main
    from looped_fast.training.trainer import Trainer

    def die():
        os.kill(os.getpid(), signal.SIGKILL)

    def die_in_step(step):
        training_step = Trainer.training_step
        def dying(self):
            if self.step == step:
                die()
            training_step(self)
        Trainer.training_step = dying

    def die_in_log(calls):
        def dying(function):
            def call(*args, **kwargs):
                nonlocal calls
                calls -= 1
                if calls == 0:
                    die()
                return function(*args, **kwargs)
            return call
        os.fsync, os.rename = dying(os.fsync), dying(os.rename)

    def die_in_write(calls):
        save = checkpoint.save
        def saving(*args, **kwargs):
            checkpoint.save = save
            die_in_log(calls)
            return save(*args, **kwargs)
        checkpoint.save = saving

    out, kills, *run = sys.argv[1:]
    for where, when in [*json.loads(kills), (None, 0)]:
        resumed = ["--resume", out] if checkpoint.latest(out) else [*run, "--out", out]
        child = os.fork()
        if not child:
            if where:
                {"step": die_in_step, "write": die_in_write, "log": die_in_log}[where](when)
            sys.exit(main(resumed))
        ended = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        assert ended == (-signal.SIGKILL if where else 0), (where, when, ended)
""")


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    out = tmp_path_factory.mktemp("uninterrupted") / "run"
    process = start(*RUN, "--out", out)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    return final_weights(out)


@pytest.mark.slow
def test_killed_six_times_and_resumed_ends_bit_identical(tmp_path, uninterrupted):
    out = tmp_path / "run"
    chance = random.Random(7)
    kills = [
        ("step", chance.randrange(5, 9)),
        ("log", 1),  # rewritten without the lines after the checkpoint
        ("write", 1),  # the first file of the next checkpoint
        ("write", 5),  # its rename
        ("step", chance.randrange(17, 23)),
        ("write", chance.randrange(2, 5)),
    ]
    process = start(out, json.dumps(kills), *RUN, script=KILLED_AND_RESUMED)
    _, errors = process.communicate(timeout=240)
    assert process.returncode == 0, errors
    assert_same_bits(final_weights(out), uninterrupted)
    steps = [line["step"] for line in read_metrics(out / "metrics.jsonl") if "loss" in line]
    assert steps == sorted(set(steps))
    assert steps[-1] == 30


@pytest.mark.slow
@pytest.mark.parametrize(("signum", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_finishes_the_step_checkpoints_and_says_how_to_resume(
    tmp_path, uninterrupted, signum, status
):
    out = tmp_path / "run"
    process = start(*RUN, "--steps", "1000000", "--save-every", "1000000", "--out", out)
    while not (out / "metrics.jsonl").exists() or not (out / "metrics.jsonl").read_text():
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.05)
    os.kill(process.pid, signum)
    printed, _ = process.communicate(timeout=60)
    assert process.returncode == status
    assert f"python -m looped_fast.train --resume {out}" in printed
    assert checkpoint.load(checkpoint.latest(out)).step >= 5


def test_resuming_says_what_was_changed_and_continues(tmp_path, capsys):
    out = tmp_path / "run"
    assert train("--steps", 4, "--save-every", 2, "--out", out) == 0
    assert main(["--resume", str(out), "--steps", "6"]) == 0
    assert f"continuing {out} from step 4; changed: steps 4 -> 6" in capsys.readouterr().out
    assert checkpoint.load(checkpoint.latest(out)).step == 6


def test_fp16_resumes_bit_identically_with_its_loss_scale(tmp_path):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    settings = ("--amp", "fp16", "--lr-decay", "none")
    assert train(*settings, "--steps", 8, "--out", whole) == 0
    assert train(*settings, "--steps", 5, "--out", parts) == 0
    assert main(["--resume", str(parts), "--steps", "8"]) == 0
    assert_same_bits(final_weights(parts), final_weights(whole))


# --- official files ---------------------------------------------------------------------------

OFFICIAL_BASE = """
wandb: {project: test, notes: , log_every_steps: 100}
gpu: {cuda: True}
model: {family: gpt2_loop, n_embd: 32, n_layer: 1, n_head: 2, n_dims: 5, n_positions: 11}
training:
    batch_size: 4
    task_name: linear_regression
    learning_rate: 0.0001
    train_steps: 3
    curriculum:
        dims: {start: 2, end: 5, inc: 1, interval: 2}
        points: {start: 3, end: 7, inc: 2, interval: 2}
        loops: {start: 2, end: 6, inc: 2, interval: 2}
    n_loop_window: 2
out_dir: ./results
"""


def test_an_official_configuration_runs_unchanged(tmp_path, capsys):
    (tmp_path / "base.yaml").write_text(OFFICIAL_BASE)
    derived = "inherit:\n    - base.yaml\ntraining:\n    task_name: decision_tree\n"
    (tmp_path / "tree.yaml").write_text(derived)
    out = tmp_path / "run"
    config = tmp_path / "tree.yaml"
    assert main(["--config", str(config), "--out", str(out), "--eval-prompts", "4"]) == 0
    assert f"task dt, official settings of {config}" in capsys.readouterr().out
    assert checkpoint.load(checkpoint.latest(out)).step == 3
    # The official scripts give b and T on the command line, too.
    out = tmp_path / "run2"
    changes = ["--n-loops", "4", "--window", "2", "--steps", "1", "--eval-prompts", "4"]
    assert main(["--config", str(config), "--out", str(out), *changes]) == 0


def test_a_run_starts_from_an_official_checkpoint_where_it_stopped(tmp_path):
    first = tmp_path / "first"
    assert train("--steps", 5, "--lr-decay", "none", "--out", first) == 0
    ours = checkpoint.load(checkpoint.latest(first))
    official = tmp_path / "state.pt"
    compat.export_official_checkpoint(
        official, ours.model_state, ours.optimizer_state, train_step=4
    )
    second = tmp_path / "second"
    settings = ("--lr-decay", "none", "--steps", 9, "--out", second)
    assert train("--init-from", official, *settings) == 0
    assert main(["--resume", str(first), "--steps", "9"]) == 0
    assert_same_bits(final_weights(second), final_weights(first))


def test_a_run_starts_from_the_weights_of_another(tmp_path):
    assert train("--steps", 3, "--out", tmp_path / "first") == 0
    weights = checkpoint.latest(tmp_path / "first")
    settings = ("--lr", 0, "--steps", 1, "--out", tmp_path / "second")
    assert train("--init-from", weights, *settings) == 0
    assert_same_bits(final_weights(tmp_path / "second"), final_weights(tmp_path / "first"))
