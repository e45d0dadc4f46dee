"""What ``looped_fast.train`` refuses, and what a run that fails leaves behind."""

import os
import shutil
import time

import pytest
import yaml
from conftest import held_elsewhere
from test_train_command import MINI, assert_same_bits, final_weights, start, train

import looped_fast
from looped_fast.train import main
from looped_fast.training import checkpoint
from looped_fast.training.log import read_metrics
from looped_fast.training.trainer import Trainer

pytestmark = pytest.mark.usefixtures("no_plot")


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--task", "lrr"], "did you mean 'lr'"),
        (["--preset", "tinny"], "did you mean 'tiny'"),
        (["--model", "loopd"], "did you mean 'looped'"),
        (["--window", "9", "--n-loops", "8"], "window = 9 is outside 1..8"),
        (["--n-embd", "65"], "n_embd = 65 is not divisible by n_head"),
        (["--n-points", "50", "--n-positions", "41"], "n_points = 50 exceeds n_positions = 41"),
        (["--depth", "3"], "--depth is an option of task 'dt': give --task dt --task.depth on"),
        (["--task.depth", "3"], "task 'lr' has no option 'depth', nor any other"),
        (["--task", "dt", "--task.dept", "3"], "unknown option of task 'dt' 'dept'; did you mean"),
        (["--task", "dt", "--task.depth", "x"], "task.depth = 'x': int is needed"),
        (["--task", "fourier", "--period", "3"], "did you mean --task.period?"),
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
    few = ("--task", "sparse_lr", "--n-dims", 8, "--task.sparsity", 1, "--batch-size", 1)
    narrow = ("--curriculum.dims.start", 1, "--curriculum.dims.interval", 100)
    assert train(*few, *narrow, "--steps", 3, "--log-every", 1, "--out", tmp_path / "run") == 0
    lines = [line for line in read_metrics(tmp_path / "run" / "metrics.jsonl") if "loss" in line]
    assert len(lines) == 3
    assert 0 < sum("relative_error" in line for line in lines) < 3


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


def test_a_folder_in_use_is_refused_and_left_alone(tmp_path, capsys):
    out = tmp_path / "run"
    with held_elsewhere(out):
        assert train("--steps", 1, "--out", out) == 1
        assert f"error: {out} is in use: process {os.getpid()} on " in capsys.readouterr().err
        assert os.listdir(out) == ["run.lock"]
    assert train("--steps", 1, "--out", out) == 0
    files = sorted(os.listdir(out))
    settings = (out / "config.yaml").read_text()
    with held_elsewhere(out):
        for args in (["--resume", str(out), "--steps", "2"], ["--out", str(out)]):
            assert main(args) == 1
            assert f"error: {out} is in use: process {os.getpid()}" in capsys.readouterr().err
    assert sorted(os.listdir(out)) == files
    assert (out / "config.yaml").read_text() == settings
    assert main(["--resume", str(out), "--steps", "2"]) == 0


@pytest.mark.slow
def test_of_two_processes_with_one_folder_the_second_is_refused(tmp_path):
    out = tmp_path / "run"
    first = start(*MINI, "--steps", 100_000, "--save-every", 50, "--out", out)
    try:
        while checkpoint.latest(out) is None:
            assert first.poll() is None, first.stderr.read()
            time.sleep(0.05)
        for args in ((*MINI, "--steps", 5, "--out", out), ("--resume", out)):
            second = start(*args)
            _, errors = second.communicate(timeout=60)
            assert second.returncode == 1
            assert f"error: {out} is in use: process {first.pid} on " in errors
    finally:
        first.kill()
        first.communicate()
    steps = [x["step"] for x in read_metrics(out / "metrics.jsonl") if "loss" in x]
    assert steps == list(range(5, 5 * len(steps) + 1, 5))
    last = checkpoint.load(checkpoint.latest(out)).step
    assert main(["--resume", str(out), "--steps", str(last + 1)]) == 0  # a kill ends the lock


def test_a_folder_of_the_user_outlives_a_run_that_did_not_start(tmp_path, capsys):
    out = tmp_path / "mine"
    out.mkdir()
    assert train("--train-prompts", 1, "--out", out) == 2
    assert os.listdir(out) == []
    assert train("--train-prompts", 1, "--out", tmp_path / "new") == 2
    assert not (tmp_path / "new").exists()


def test_a_resume_of_nothing_makes_no_folder(tmp_path, capsys):
    assert main(["--resume", str(tmp_path / "nowhere")]) == 2
    assert os.listdir(tmp_path) == []


def test_an_infinite_last_update_is_an_error_without_results(tmp_path, capsys):
    out = tmp_path / "run"
    assert train("--steps", 1, "--lr", "inf", "--out", out) == 1
    assert "that are NaN or Inf after step 1. No checkpoint was written" in capsys.readouterr().err
    assert checkpoint.latest(out) is None
    assert not (out / "results.json").exists()


def test_a_damaged_log_stops_a_resume_and_is_left_alone(tmp_path, capsys):
    out = tmp_path / "run"
    assert train("--steps", 20, "--out", out) == 0
    log = out / "metrics.jsonl"
    lines = log.read_bytes().split(b"\n")
    lines[1] = bytes(100)
    log.write_bytes(b"\n".join(lines))
    assert main(["--resume", str(out), "--steps", "30"]) == 1
    assert f"error: {log}, line 2 is damaged" in capsys.readouterr().err
    assert log.read_bytes() == b"\n".join(lines)
    assert checkpoint.load(checkpoint.latest(out)).step == 20


def test_a_folder_of_a_run_that_trained_and_saved_nothing_says_so(tmp_path, capsys):
    line = '{"step": 1, "loss": 2.0}\n'
    (tmp_path / "metrics.jsonl").write_text(line)
    assert train("--steps", 1, "--out", tmp_path) == 2
    assert "it saved nothing: delete it" in capsys.readouterr().err
    assert (tmp_path / "metrics.jsonl").read_text() == line


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


@pytest.mark.filterwarnings("error::pytest.PytestUnhandledThreadExceptionWarning")
@pytest.mark.parametrize("often", [("--log-every", 1), ("--log-every", 100, "--save-every", 1)])
def test_a_folder_that_is_deleted_meanwhile_ends_the_run_with_its_name(
    tmp_path, monkeypatch, capsys, often
):
    out, training_step = tmp_path / "run", Trainer.training_step

    def deleting(trainer):
        training_step(trainer)
        if trainer.step == 3:
            shutil.rmtree(out)

    monkeypatch.setattr(Trainer, "training_step", deleting)
    assert train("--steps", 200, *often, "--out", out) == 1
    assert f"{out} was removed or moved while the run was training" in capsys.readouterr().err
    assert not out.exists()
