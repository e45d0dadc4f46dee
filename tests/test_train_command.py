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

import looped_fast
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


def test_bf16_on_a_cpu_without_it_runs_in_fp32_and_says_so(tmp_path, monkeypatch):
    def cpu_unsupported(call):
        return "this CPU has no bf16" if call.settings.precision == "bf16" else None

    monkeypatch.setitem(backends.UNSUPPORTED, "cpu", cpu_unsupported)
    config = preset_config("tiny")
    trainer = Trainer(dataclasses.replace(config, amp="bf16"), tmp_path)
    assert trainer.precision == "fp32"
    assert "this CPU has no bf16" in trainer.precision_note
    with trainer.autocast():
        assert not torch.is_autocast_enabled("cpu")


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
# write dies at the Nth call of os.fsync or os.rename, which only checkpoints make.
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

    def die_in_write(calls):
        def dying(function):
            def call(*args, **kwargs):
                nonlocal calls
                calls -= 1
                if calls == 0:
                    die()
                return function(*args, **kwargs)
            return call
        os.fsync, os.rename = dying(os.fsync), dying(os.rename)

    out, kills, *run = sys.argv[1:]
    for where, when in [*json.loads(kills), (None, 0)]:
        resumed = ["--resume", out] if checkpoint.latest(out) else [*run, "--out", out]
        child = os.fork()
        if not child:
            if where:
                {"step": die_in_step, "write": die_in_write}[where](when)
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
def test_killed_five_times_and_resumed_ends_bit_identical(tmp_path, uninterrupted):
    out = tmp_path / "run"
    chance = random.Random(7)
    kills = [
        ("step", chance.randrange(5, 9)),
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


# --- bad input --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--task", "lrr"], "did you mean 'lr'"),
        (["--preset", "tinny"], "did you mean 'tiny'"),
        (["--model", "loopd"], "did you mean 'looped'"),
        (["--window", "9", "--n-loops", "8"], "window = 9 is outside 1..8"),
        (["--n-embd", "65"], "n_embd = 65 is not divisible by n_head"),
        (["--n-points", "50", "--n-positions", "41"], "n_points = 50 exceeds n_positions = 41"),
        (["--depth", "3"], "depth = 3 is no setting of task 'lr'"),
        (["--device", "gpu"], "device 'gpu'"),
        (["--device", "cuda:99"], "use --device cpu"),
        (["--train-prompts", "3"], "3 training prompts are fewer than a step uses"),
        (["--resume", "nowhere"], "nowhere holds no checkpoint"),
        (["--config", "nowhere.yaml"], "no configuration file nowhere.yaml"),
        (["--steps", "0"], "steps = 0: at least 1"),
        (["--n-points", "0"], "n_points = 0: at least 1"),
        (["--curriculum.dims.interval", "0"], "curriculum.dims: interval = 0: at least 1 step"),
        (["--init-from", "lr-smal"], "lr-smal does not exist; give the folder of a run"),
        (["--backend", "cuda"], "unknown backend 'cuda'"),
    ],
    ids=lambda a: a[0].strip("-") if isinstance(a, list) else "",
)
def test_bad_settings_exit_2_and_name_value_limit_and_remedy(
    tmp_path, monkeypatch, capsys, args, message
):
    monkeypatch.chdir(tmp_path)
    assert main([*args, "--out", "run"] if "--resume" not in args else args) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "run").exists()  # the corrected command may use it


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--config", "mine.yaml"], "a resumed run keeps its own settings"),
        (["--preset", "paper"], "--preset paper is for a new run"),
        (["--out", "elsewhere"], "--out elsewhere is for a new run"),
        (["--init-from", "lr-small"], "--init-from lr-small is for a new run"),
        (["--steps", "1"], "--steps 1: run is at step 2 already"),
        (["--n-embd", "65"], "n_embd = 65"),
    ],
    ids=lambda a: a[0].strip("-") if isinstance(a, list) else "",
)
def test_a_resumed_run_refuses_what_it_cant_take_and_stays_as_it_was(
    tmp_path, monkeypatch, capsys, args, message
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.yaml").write_text("steps: 3\n")
    assert train("--steps", 2, "--out", "run") == 0
    settings = (tmp_path / "run" / "config.yaml").read_text()
    assert main(["--resume", "run", *args]) == 2
    assert message in capsys.readouterr().err
    assert (tmp_path / "run" / "config.yaml").read_text() == settings
    assert [path.name for path in tmp_path.iterdir() if path.is_dir()] == ["run"]


def test_a_checkpoint_to_resume_names_its_run(tmp_path, capsys):
    assert train("--steps", 1, "--out", tmp_path / "run") == 0
    step = checkpoint.latest(tmp_path / "run")
    assert main(["--resume", str(step)]) == 2
    assert f"give its run: --resume {tmp_path / 'run'}" in capsys.readouterr().err


def test_runs_that_start_in_the_same_second_have_folders_of_their_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("time.strftime", lambda _: "20260101-000000")
    for seed in range(3):
        assert train("--steps", 1, "--seed", seed) == 0
    folders = sorted((tmp_path / "runs").iterdir())
    stems = [folder.name.partition("20260101-000000")[2] for folder in folders]
    assert stems == ["", "-2", "-3"]
    seeds = [yaml.safe_load((folder / "config.yaml").read_text())["seed"] for folder in folders]
    assert seeds == [0, 1, 2]


def test_weights_are_taken_from_a_run_or_a_shipped_model_by_name(tmp_path):
    assert train("--steps", 1, "--out", tmp_path / "run") == 0
    more = ("--steps", 1, "--lr", 0, "--out")
    assert train(*more, tmp_path / "next", "--init-from", tmp_path / "run") == 0
    assert main(["--preset", "small", "--steps", "1", "--lr", "0", "--batch-size", "2",
                 "--eval-prompts", "2", "--init-from", "lr-small",
                 "--out", str(tmp_path / "shipped")]) == 0  # fmt: skip
    assert_same_bits(final_weights(tmp_path / "next"), final_weights(tmp_path / "run"))
    shipped = looped_fast.from_pretrained("lr-small").state_dict()
    assert_same_bits(final_weights(tmp_path / "shipped"), shipped)


def test_where_all_of_y_is_zero_there_is_no_relative_error(tmp_path):
    few = ("--task", "sparse_lr", "--n-dims", 8, "--sparsity", 1, "--batch-size", 1)
    narrow = ("--curriculum.dims.start", 1, "--curriculum.dims.interval", 100)
    assert train(*few, *narrow, "--steps", 3, "--log-every", 1, "--out", tmp_path / "run") == 0
    lines = [line for line in read_metrics(tmp_path / "run" / "metrics.jsonl") if "loss" in line]
    assert len(lines) == 3
    assert 0 < sum("relative_error" in line for line in lines) < 3


def test_an_unknown_setting_names_the_nearest(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["--n-lops", "3"])
    assert stop.value.code == 2
    assert "--n-loops" in capsys.readouterr().err


def test_a_setting_misspelt_in_a_file_names_the_nearest(tmp_path, capsys):
    (tmp_path / "mine.yaml").write_text("n_lops: 3\n")
    assert main(["--config", str(tmp_path / "mine.yaml")]) == 2
    assert "did you mean 'n_loops'" in capsys.readouterr().err


def test_a_folder_that_holds_a_run_is_refused_and_left_alone(tmp_path, capsys):
    out = tmp_path / "run"
    assert train("--steps", 1, "--out", out) == 0
    before = (out / "metrics.jsonl").read_text()
    assert train("--steps", 2, "--out", out) == 2
    assert f"already holds a run; continue it with --resume {out}" in capsys.readouterr().err
    assert (out / "metrics.jsonl").read_text() == before


def test_a_folder_of_a_run_that_saved_nothing_says_so(tmp_path, capsys):
    (tmp_path / "config.yaml").write_text("task: lr\n")
    assert train("--steps", 1, "--out", tmp_path) == 2
    assert "it saved nothing: delete it" in capsys.readouterr().err


def test_a_folder_that_cannot_be_written_is_an_error(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert train("--steps", 1, "--out", tmp_path / "file" / "run") == 1
    assert "choose another folder with --out" in capsys.readouterr().err


def test_a_full_disk_stops_the_run_and_keeps_earlier_checkpoints(tmp_path, monkeypatch, capsys):
    out = tmp_path / "run"
    assert train("--steps", 2, "--out", out) == 0
    real = os.fsync

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    assert main(["--resume", str(out), "--steps", "4"]) == 1
    monkeypatch.setattr(os, "fsync", real)
    assert "space" in capsys.readouterr().err
    assert checkpoint.load(checkpoint.latest(out)).step == 2


def test_a_non_finite_loss_stops_with_step_checkpoint_and_remedies(tmp_path, capsys):
    out = tmp_path / "run"
    wild = ("--lr", 1e30, "--clip-grad-norm", "None", "--warmup-steps", 0)
    assert train("--steps", 20, "--save-every", 1, "--out", out, *wild) == 1
    error = capsys.readouterr().err
    last = checkpoint.load(checkpoint.latest(out))
    assert f"at step {last.step + 1}" in error
    assert str(last.path) in error
    assert "--lr" in error
    assert all(tensor.isfinite().all() for tensor in last.model_state.values())


def test_a_checkpoint_of_another_model_is_refused(tmp_path, capsys):
    out = tmp_path / "run"
    assert train("--steps", 1, "--out", out) == 0
    settings = (out / "config.yaml").read_text()
    assert main(["--resume", str(out), "--n-embd", "64"]) == 1
    assert "_read_in.weight" in capsys.readouterr().err
    assert (out / "config.yaml").read_text() == settings
