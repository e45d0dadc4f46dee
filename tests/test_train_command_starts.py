"""A start that fails leaves nothing in the way, and settings that nobody gave adapt."""

import json
import os
import sys
from types import SimpleNamespace

import pytest
import torch
import yaml
from test_train_command import OFFICIAL_BASE, train

from looped_fast import compat
from looped_fast.train import main
from looped_fast.training import checkpoint
from looped_fast.training.trainer import Trainer

pytestmark = pytest.mark.usefixtures("no_plot")

needs_no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU can run these")


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        pytest.param(("--backend", "triton"), "triton", marks=needs_no_gpu),
        pytest.param(("--attention", "sdpa"), "sdpa", marks=needs_no_gpu),
        pytest.param(("--cuda-graphs", "on"), "cuda_graphs = 'on'", marks=needs_no_gpu),
        (("--train-prompts", 3), "3 training prompts are fewer"),
        (("--init-from", "nowhere"), "nowhere does not exist"),
    ],
    ids=lambda value: value[0] if isinstance(value, tuple) else "",
)
@pytest.mark.parametrize("own", [False, True], ids=["new folder", "own empty folder"])
def test_the_corrected_command_may_use_the_folder(tmp_path, capsys, wrong, message, own):
    out = tmp_path / "run"
    if own:
        out.mkdir()
    given = ("--steps", 1, "--device", "cpu", "--out", out)
    assert train(*given, *wrong) == 2
    assert message in capsys.readouterr().err
    assert out.exists() == own  # the user's own folder is kept
    assert not own or list(out.iterdir()) == []
    assert train(*given) == 0


@pytest.mark.parametrize("failing", ["measure_backends", "estimate_seconds", "fit"])
def test_a_fault_before_the_first_step_does_not_stand_in_the_way(tmp_path, monkeypatch, failing):
    out = tmp_path / "run"

    def fail(self):
        raise RuntimeError("no memory is left")

    with monkeypatch.context() as patched:
        patched.setattr(Trainer, failing, fail)
        assert train("--steps", 1, "--out", out) == 1
    assert train("--steps", 2, "--seed", 7, "--out", out) == 0
    assert yaml.safe_load((out / "config.yaml").read_text())["seed"] == 7


def test_a_missing_package_of_a_log_does_not_stand_in_the_way(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "wandb", None)
    out = tmp_path / "run"
    assert train("--steps", 1, "--wandb", "project", "--out", out) == 1
    assert "pip install" in capsys.readouterr().err
    assert train("--steps", 1, "--out", out) == 0


def test_a_folder_with_files_of_somebody_else_is_used_and_kept(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    assert train("--steps", 1, "--init-from", "nowhere", "--out", tmp_path) == 2
    assert os.listdir(tmp_path) == ["notes.txt"]
    assert train("--steps", 1, "--out", tmp_path) == 0
    assert (tmp_path / "notes.txt").read_text() == "mine"


@pytest.mark.parametrize("steps", [22, 1001])
def test_a_start_that_leaves_no_step_to_train_is_an_error(tmp_path, capsys, steps):
    sizes = {"n_layer": 1, "n_dims": 5, "n_positions": 6, "n_embd": 32, "n_head": 2}
    model = compat.build_model(SimpleNamespace(family="gpt2_loop", **sizes))
    compat.export_official_checkpoint(tmp_path / "model_1000.pt", model.state_dict())
    given = ("--init-from", tmp_path / "model_1000.pt", "--out", tmp_path / "run")
    assert train(*given, "--steps", steps) == 2
    error = capsys.readouterr().err
    assert f"model_1000.pt has 1001 finished steps, which leaves none of --steps {steps}" in error
    assert not (tmp_path / "run").exists()
    assert train(*given, "--steps", 1002) == 0
    assert checkpoint.load(checkpoint.latest(tmp_path / "run")).step == 1002


# --- a window that nobody gave ------------------------------------------------------------------


def settings(out):
    return yaml.safe_load((out / "config.yaml").read_text())


@pytest.mark.parametrize(
    ("given", "n_loops", "window"),
    [
        (("--n-loops", 4), 4, 4),
        (("--n_loops=3",), 3, 3),
        (("--n-loops", 9), 9, 6),
        (("--n-loops", 4, "--window", 2), 4, 2),
        (("--model", "tied", "--n-loops", 3), 3, 3),
        (("--model", "tied", "--n-loops", 14), 14, 14),
    ],
)
def test_a_window_of_the_preset_is_lowered_to_the_loop_count(tmp_path, given, n_loops, window):
    args = ("--preset", "tiny", "--steps", 1, "--batch-size", 2, "--eval-prompts", 2, *given)
    assert main([*map(str, args), "--out", str(tmp_path / "run")]) == 0
    found = settings(tmp_path / "run")
    assert (found["n_loops"], found["window"]) == (n_loops, window)


@pytest.mark.parametrize(
    ("file", "given", "message"),
    [
        ({}, ("--n-loops", 4, "--window", 5), "window = 5 is outside 1..4"),
        ({}, ("--window", 13), "window = 13 is outside 1..12"),
        ({"window": 6}, ("--n-loops", 4), "window = 6 is outside 1..4"),
        ({"n_loops": 4, "window": 6}, (), "mine.yaml: window = 6 is outside 1..4"),
    ],
)
def test_a_window_that_was_given_is_not_changed(tmp_path, capsys, file, given, message):
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump({"preset": "tiny", **file}))
    config = ["--config", str(tmp_path / "mine.yaml")]
    assert main([*config, *map(str, given), "--out", str(tmp_path / "run")]) == 2
    assert message in capsys.readouterr().err


def test_a_file_may_lower_the_loop_count_alone_and_so_may_an_official_one(tmp_path):
    quick = ["--steps", "1", "--batch-size", "2", "--eval-prompts", "2"]
    (tmp_path / "mine.yaml").write_text("preset: tiny\nn_loops: 3\n")
    (tmp_path / "base.yaml").write_text(OFFICIAL_BASE)
    for name, more, found in (("mine", [], (3, 3)), ("base", ["--n-loops", "1"], (1, 1))):
        config, out = tmp_path / f"{name}.yaml", tmp_path / name
        assert main(["--config", str(config), *quick, *more, "--out", str(out)]) == 0
        assert (settings(out)["n_loops"], settings(out)["window"]) == found


def test_a_resumed_run_lowers_its_window_and_says_so(tmp_path, capsys):
    assert train("--steps", 1, "--out", tmp_path / "run") == 0
    assert main(["--resume", str(tmp_path / "run"), "--steps", "2", "--n-loops", "1"]) == 0
    assert "changed: n_loops 3 -> 1, window 2 -> 1" in capsys.readouterr().out


# --- settings in a checkpoint -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("steps", "20", "setting steps = '20': int is needed"),
        ("beta2", float("nan"), "beta2 = nan: at least 0"),
        ("n_head", 7, "n_embd = 32 is not divisible by n_head = 7"),
        ("colour", "red", "unknown setting 'colour'"),
    ],
)
def test_settings_of_a_checkpoint_that_cant_be_used_name_its_file(
    tmp_path, capsys, name, value, message
):
    out = tmp_path / "run"
    assert train("--steps", 1, "--out", out) == 0
    index = checkpoint.latest(out) / checkpoint.INDEX
    content = json.loads(index.read_text())
    content["config"][name] = value
    content.pop("sha256", None)  # as an older version wrote it, or somebody's program
    index.write_text(json.dumps(content))
    assert main(["--resume", str(out)]) == 1
    error = capsys.readouterr().err
    assert str(index) in error
    assert message in error
